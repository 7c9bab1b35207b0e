package proxy

import (
	"crypto/tls"
	"net"
	"syscall"
)

// What the net package does not tell of a socket.

// socketOf is the connection that the kernel knows, below TLS.
func socketOf(c net.Conn) net.Conn {
	if t, ok := c.(*tls.Conn); ok {
		return t.NetConn()
	}
	return c
}

// withFD runs f with a connection's descriptor, which stays open meanwhile. false: it has none, or is closed. A TLS connection has none:
// what stands in its socket are not the bytes of its stream.
func withFD(c net.Conn, f func(fd int)) bool {
	sc, ok := c.(syscall.Conn)
	if !ok {
		return false
	}
	raw, err := sc.SyscallConn()
	return err == nil && raw.Control(func(fd uintptr) { f(int(fd)) }) == nil
}

// quietConn: the connection is open and nothing has come on it. Of TLS nobody can tell.
func quietConn(c net.Conn) (quiet bool) {
	withFD(c, func(fd int) {
		var b [1]byte
		n, err := syscall.Read(fd, b[:])
		quiet = n < 0 && (err == syscall.EAGAIN || err == syscall.EWOULDBLOCK)
	})
	return quiet
}

// unreadConn: something has come on a connection and has not been read. Of TLS nobody can tell.
func unreadConn(c net.Conn) (some bool) {
	withFD(c, func(fd int) { some = unreadFD(fd) })
	return some
}

// unreadFD is unreadConn for a descriptor.
func unreadFD(fd int) bool {
	var b [1]byte
	n, _, err := syscall.Recvfrom(fd, b[:], syscall.MSG_PEEK|syscall.MSG_DONTWAIT)
	return err == nil && n > 0
}
