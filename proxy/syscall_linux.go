package proxy

import (
	"errors"
	"os"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The system calls of a loop. None of them waits, so the scheduler need not know of them: told of every one, its monitor wakes up again and
// again to see whether a processor should be taken from a thread that is in the kernel. Measured at 50 connections without a pipeline, that was a
// twelfth of the proxy's CPU time.

// longCall bytes are copied by the kernel in some twenty microseconds. What takes longer is for the scheduler to know.
const longCall = 256 << 10

// readFD reads from a non-blocking descriptor into b, which must not be empty. 0 without an error is the end of the stream.
func readFD(fd int, b []byte) (int, error) {
	if len(b) > longCall {
		b = b[:longCall]
	}
	n, _, errno := unix.RawSyscall(unix.SYS_READ, uintptr(fd), uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)))
	if errno != 0 {
		return 0, errno
	}
	return int(n), nil
}

// writeFD writes to a non-blocking descriptor what it has room for. b must not be empty.
func writeFD(fd int, b []byte) (int, error) {
	if len(b) > longCall {
		return unix.Write(fd, b)
	}
	n, _, errno := unix.RawSyscall(unix.SYS_WRITE, uintptr(fd), uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)))
	if errno != 0 {
		return 0, errno
	}
	return int(n), nil
}

// yield lets another thread have the processor, if one wants it.
func yield() { unix.RawSyscall(unix.SYS_SCHED_YIELD, 0, 0, 0) } //nolint:errcheck // it cannot fail

// poller is an epoll instance that is waited for as Go waits for sockets: a loop with nothing to do is a goroutine that is parked, not a thread in
// the kernel whose processor the scheduler has to take away.
type poller struct {
	fd     int
	file   *os.File // has fd
	raw    syscall.RawConn
	timed  bool              // the last wait had an end
	events []unix.EpollEvent // what the last wait has found
	err    error
	look   func(uintptr) bool // now
}

func newPoller() (*poller, error) {
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, err
	}
	if err := unix.SetNonblock(fd, true); err != nil { // or package os would not have it polled
		unix.Close(fd) //nolint:errcheck // nothing is lost
		return nil, err
	}
	p := &poller{fd: fd, file: os.NewFile(uintptr(fd), "epoll"), events: make([]unix.EpollEvent, 0, 256)}
	p.look = func(uintptr) bool { return len(p.now()) > 0 || p.err != nil }
	if p.raw, err = p.file.SyscallConn(); err == nil {
		err = p.file.SetReadDeadline(time.Time{}) // fails if it is not polled
	}
	if err != nil {
		p.close()
		return nil, err
	}
	return p, nil
}

func (p *poller) close() { p.file.Close() } //nolint:errcheck // it is over

// now returns the events that are here; the next call reuses them.
func (p *poller) now() []unix.EpollEvent {
	all := p.events[:cap(p.events)]
	n, _, errno := unix.RawSyscall6(unix.SYS_EPOLL_PWAIT, uintptr(p.fd), uintptr(unsafe.Pointer(&all[0])), uintptr(len(all)), 0, 0, 0)
	p.err = nil
	if errno != 0 {
		n = 0
		if errno != unix.EINTR {
			p.err = errno
		}
	}
	p.events = all[:n]
	return p.events
}

// wait is now, but waits if there are none: for d, or without end if d is 0.
func (p *poller) wait(d time.Duration) ([]unix.EpollEvent, error) {
	if d > 0 || p.timed {
		var end time.Time
		if p.timed = d > 0; p.timed {
			end = time.Now().Add(d)
		}
		if err := p.file.SetReadDeadline(end); err != nil {
			return nil, err
		}
	}
	if err := p.raw.Read(p.look); err != nil {
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return p.now(), p.err
		}
		return nil, err
	}
	return p.events, p.err
}
