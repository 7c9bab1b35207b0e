//go:build race

package proxy

import "golang.org/x/sys/unix"

// The race detector is told of what the kernel reads and writes, which a raw call does not.

func readFD(fd int, b []byte) (int, error)  { return unix.Read(fd, b) }
func writeFD(fd int, b []byte) (int, error) { return unix.Write(fd, b) }
