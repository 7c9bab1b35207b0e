//go:build !race

package proxy

import (
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// longCall bytes are copied by the kernel in some twenty microseconds. What takes longer is for the scheduler to know.
const longCall = 256 << 10

// readFD reads from a non-blocking descriptor into b, which must not be empty. 0 and no error is the end of the stream.
func readFD(fd int, b []byte) (int, syscall.Errno) {
	if len(b) > longCall {
		b = b[:longCall]
	}
	n, _, errno := unix.RawSyscall(unix.SYS_READ, uintptr(fd), uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)))
	if errno != 0 {
		return 0, errno
	}
	return int(n), 0
}

// writeFD writes to a non-blocking descriptor what it has room for. b must not be empty.
func writeFD(fd int, b []byte) (int, syscall.Errno) {
	if len(b) > longCall {
		n, err := unix.Write(fd, b)
		return n, errnoOf(err)
	}
	n, _, errno := unix.RawSyscall(unix.SYS_WRITE, uintptr(fd), uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)))
	if errno != 0 {
		return 0, errno
	}
	return int(n), 0
}
