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

// errnoOf is what a system call of package unix has returned: 0 is no error.
func errnoOf(err error) syscall.Errno {
	errno, _ := err.(syscall.Errno) //nolint:errorlint // it is returned bare
	return errno
}

// yield lets another thread have the processor, if one wants it.
func yield() { unix.RawSyscall(unix.SYS_SCHED_YIELD, 0, 0, 0) } //nolint:errcheck // it cannot fail

// poller is an epoll instance that is waited for as Go waits for sockets: a loop with nothing to do is a goroutine that is parked, not a thread in
// the kernel whose processor the scheduler has to take away.
type poller struct {
	fd     int
	file   *os.File // has fd
	raw    syscall.RawConn
	timed  bool // the last wait had an end
	events []unix.EpollEvent
	look   func(uintptr) bool // now, which keeps what it has found here:
	found  []unix.EpollEvent
	err    error
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
	p := &poller{fd: fd, file: os.NewFile(uintptr(fd), "epoll"), events: make([]unix.EpollEvent, 256)}
	p.look = func(uintptr) bool {
		p.found, p.err = p.now()
		return len(p.found) > 0 || p.err != nil
	}
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
func (p *poller) now() ([]unix.EpollEvent, error) {
	n, _, errno := unix.RawSyscall6(unix.SYS_EPOLL_PWAIT, uintptr(p.fd), uintptr(unsafe.Pointer(&p.events[0])), uintptr(len(p.events)), 0, 0, 0)
	switch errno {
	case 0:
		return p.events[:n], nil
	case unix.EINTR:
		return nil, nil
	}
	return nil, errno
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
			return p.now()
		}
		return nil, err
	}
	return p.found, p.err
}
