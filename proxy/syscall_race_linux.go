//go:build race

package proxy

import (
	"syscall"

	"golang.org/x/sys/unix"
)

// The race detector is told of what the kernel reads and writes, which a raw call does not.

func readFD(fd int, b []byte) (int, syscall.Errno) {
	n, err := unix.Read(fd, b)
	return n, errnoOf(err)
}

func writeFD(fd int, b []byte) (int, syscall.Errno) {
	n, err := unix.Write(fd, b)
	return n, errnoOf(err)
}
