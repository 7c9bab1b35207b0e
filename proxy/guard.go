package proxy

import (
	"crypto/tls"
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

const (
	// keepAlive is Redis's default tcp-keepalive. Shorter wakes idle clients
	// for nothing; longer lets middleboxes forget them.
	keepAlive = 300 * time.Second

	// Accept that fails, above all for want of file descriptors, is tried
	// again after minBackoff, then twice that, up to maxBackoff: short enough
	// for a hiccup to pass unnoticed, long enough not to spin through an
	// outage, and an operator's ulimit takes effect within a second.
	minBackoff = 5 * time.Millisecond
	maxBackoff = time.Second

	// farewell is how long the last words to a client that is being refused
	// may take. They fit in any socket buffer, so what exceeds it is no
	// client we know, and nobody shall wait behind it in Accept.
	farewell = 100 * time.Millisecond

	// slowWords is how long after a stop a client that was held back is
	// read until it is silent: what it sent before the stop may still be
	// in its own socket, and comes as ours has room. Longer, a client that
	// always has the next batch ready would hold up the stop.
	slowWords = time.Second

	// heldWords is the same for a client that is being held back: its
	// commands wait for the answers before them, which may take a while,
	// but a few megabytes are all that the sockets hold.
	heldWords = 3 * time.Second

	// minRead is the least room a read of the socket is given. While no large
	// command arrives it is usually the whole of keepBuffer.
	minRead = 4 << 10
)

const replyMaxClients = "-ERR max number of clients reached\r\n"

// errPartial means that Detach was called from somewhere else than the handler
// of the first command.
var errPartial = errors.New("proxy: a command is still being handed to redcon")

// A guardListener stands between an untrusted network and redcon, whose own
// parser a packet of thirty bytes can stop for ever. It limits the number of
// clients, and the connections it accepts let nothing pass but complete,
// well-formed commands within Redis's own limits.
type guardListener struct {
	net.Listener
	lim        limits
	maxClients int // static; 0 means no limit
	failing    func(err error, again time.Duration)

	open     atomic.Int64 // connections accepted and not closed
	admitted atomic.Int64 // connections accepted
	rejected atomic.Int64 // connections closed because of maxClients
	broken   atomic.Int64 // connections closed because the first thing they brought was no command

	closing sync.Once
	closed  chan struct{} // closed by Close: ends the wait of a back-off
	last    atomic.Bool   // finish was called: the next error is the end
}

// newGuard returns a listener that accepts from ln, which it owns, and which
// may be a TLS listener. maxClients is the most connections open at a time, 0
// for no limit. failing, if not nil, is told why accepting fails and when
// it is tried again.
func newGuard(ln net.Listener, lim limits, maxClients int, failing func(err error, again time.Duration)) *guardListener {
	if failing == nil {
		failing = func(error, time.Duration) {}
	}
	return &guardListener{
		Listener:   ln,
		lim:        lim.withDefaults(),
		maxClients: maxClients,
		failing:    failing,
		closed:     make(chan struct{}),
	}
}

// Accept returns the next client as a *guardConn. It returns an error only when
// the listener is closed: redcon would call it again at once after any other.
func (g *guardListener) Accept() (net.Conn, error) {
	wait := time.Duration(0)
	for {
		conn, err := g.Listener.Accept()
		switch {
		case err == nil && g.admit():
			return g.wrap(conn), nil
		case err == nil:
			g.refuse(conn)
			wait = 0
		case g.last.Load():
			g.Close() //nolint:errcheck // it is over
			return nil, net.ErrClosed
		case errors.Is(err, net.ErrClosed):
			return nil, err
		default:
			wait = min(max(2*wait, minBackoff), maxBackoff)
			g.failing(err, wait)
			if !g.sleep(wait) {
				return nil, net.ErrClosed
			}
		}
	}
}

// sleep waits for d. It returns false if the listener was closed meanwhile.
func (g *guardListener) sleep(d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-g.closed:
		return false
	}
}

// finish stops accepting after d: whoever has connected by now, as far as he knows, still waits in the kernel's queue and is
// not to be reset.
func (g *guardListener) finish(d time.Duration) error {
	ln, ok := g.Listener.(interface{ SetDeadline(time.Time) error })
	if !ok {
		return g.Close() // TLS: its handshake has not begun
	}
	g.last.Store(true)
	return ln.SetDeadline(time.Now().Add(d))
}

// Close stops accepting. Connections that were accepted stay open.
func (g *guardListener) Close() error {
	g.closing.Do(func() { close(g.closed) })
	return g.Listener.Close()
}

// clients returns how many accepted connections are open, accepted how many there
// have been, refused how many were turned away because there were too many.
func (g *guardListener) clients() int    { return int(g.open.Load()) }
func (g *guardListener) accepted() int64 { return g.admitted.Load() }
func (g *guardListener) refused() int64  { return g.rejected.Load() }

// violations returns how many clients broke the protocol before their first command.
func (g *guardListener) violations() int64 { return g.broken.Load() }

// admit counts one more client, or refuses.
func (g *guardListener) admit() bool {
	if n := g.open.Add(1); g.maxClients > 0 && n > int64(g.maxClients) {
		g.open.Add(-1)
		return false
	}
	g.admitted.Add(1)
	return true
}

// refuse closes a connection in the words of Redis. A TLS client gets none, as
// from Redis: they would have to wait for its handshake.
func (g *guardListener) refuse(conn net.Conn) {
	g.rejected.Add(1)
	if _, ok := conn.(*tls.Conn); !ok {
		_ = conn.SetWriteDeadline(time.Now().Add(farewell))
		_, _ = io.WriteString(conn, replyMaxClients)
	}
	conn.Close()
}

// wrap makes a client of a connection.
func (g *guardListener) wrap(conn net.Conn) *guardConn {
	if t, ok := socketOf(conn).(*net.TCPConn); ok {
		_ = t.SetNoDelay(true)
		_ = t.SetKeepAliveConfig(net.KeepAliveConfig{
			Enable:   true,
			Idle:     keepAlive,
			Interval: keepAlive / 3,
			Count:    3,
		})
	}
	c := &guardConn{Conn: conn, in: newScanner(g.lim), guard: g}
	if g.lim.handshake > 0 {
		c.handshake = time.Now().Add(g.lim.handshake)
		_ = conn.SetReadDeadline(c.handshake)
	}
	return c
}

// A guardConn is one client's connection. It is read in one of two ways.
//
// Read is for redcon, which is given one command at a time: while redcon's
// handler has a command, redcon holds no byte of the next. So the handler of
// the first command may call Detach, copy the command, return, and whoever
// owns the connection then calls next for those that follow.
//
// All methods but Close and those that write belong to one goroutine at a time.
type guardConn struct {
	net.Conn
	in    *scanner
	guard *guardListener

	handshake time.Time    // when the first command must be complete; zero: at any time
	begun     bool         // the first command is complete
	unread    []byte       // the rest of the command that Read is releasing
	kept      *command     // the first command, if it is so large that redcon sees stub instead; nil otherwise
	detached  bool         // next has been called
	stopped   atomic.Int64 // when stop was called first, in Unix nanoseconds; 0: not yet
	heldBack  bool         // the stream was not read for a while since the last read: its sender may have more to say than the socket had room for
	slow      bool         // that was so once
	readErr   error        // what ended the socket's stream

	closing sync.Once
}

// stub is what redcon gets to see of a first command that is large: it would hold four copies.
const stub = "*1\r\n$4\r\nPING\r\n"

// Read releases the bytes of the next command, and those of the one after it
// when called again after the last of them, so at most one command a call. A
// protocol error is told to the client in Redis's words and looks like the end
// of the stream to the caller.
func (c *guardConn) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	if len(c.unread) == 0 {
		cmd, err := c.receive()
		if err != nil {
			return 0, c.hangUp(err)
		}
		c.unread = cmd.raw
		if !c.detached && len(cmd.raw) > largeCommand && c.in.surrender(&cmd) {
			c.kept, c.unread = &cmd, []byte(stub)
		}
	}
	n := copy(p, c.unread)
	c.unread = c.unread[n:]
	return n, nil
}

// hangUp says farewell if err is a protocol error, and returns what Read is to
// return for err.
func (c *guardConn) hangUp(err error) error {
	var violation *protocolError
	if !errors.As(err, &violation) {
		return err
	}
	c.guard.broken.Add(1)
	if text := violation.reply(); text != "" {
		_ = c.SetWriteDeadline(time.Now().Add(farewell))
		_, _ = io.WriteString(c.Conn, text)
	}
	return io.EOF
}

// next returns the next command of a detached connection and waits for it if
// need be. more tells whether one further call would not wait, because another
// command or the error that comes after it is already here: as long as it is
// true, replies may be kept back and sent together.
//
// The command's bytes are valid until the next call of next. After a
// *protocolError the caller sends the replies it owes, then the error's reply,
// and closes. Any other error is the socket's; after a time-out next may be
// called again and nothing is lost.
func (c *guardConn) next() (cmd command, more bool, err error) {
	if err := c.detach(); err != nil {
		return command{}, false, err
	}
	cmd, err = c.receive()
	if err != nil {
		return command{}, false, err
	}
	if len(cmd.raw) > largeCommand {
		c.in.surrender(&cmd)
	}
	return cmd, c.in.ready(), nil
}

// detach ends redcon's part; the first call of next does it if nobody has before. It clears the read deadline, so who sets
// one detaches first.
func (c *guardConn) detach() error {
	if c.detached {
		return nil
	}
	if len(c.unread) > 0 {
		return errPartial
	}
	c.detached = true
	// redcon's idle deadline would outlive it.
	return c.SetReadDeadline(time.Time{})
}

// pending tells whether next would not wait. It leaves the last command alive.
func (c *guardConn) pending() bool { return c.in.ready() }

// setAuthenticated lifts or restores the limits for unauthenticated clients.
func (c *guardConn) setAuthenticated(yes bool) { c.in.setAuthenticated(yes) }

// receive returns the next command, reading the socket as often as it takes.
func (c *guardConn) receive() (command, error) {
	for {
		cmd, ok, err := c.in.next()
		if err != nil {
			return command{}, err
		}
		if ok {
			if !c.begun {
				c.begin()
			}
			return cmd, nil
		}
		if err := c.fill(); err != nil {
			return command{}, err
		}
	}
}

// begin notes that the first command is complete.
func (c *guardConn) begin() {
	c.begun = true
	if !c.handshake.IsZero() {
		_ = c.Conn.SetReadDeadline(time.Time{})
	}
}

// fill reads the socket once.
func (c *guardConn) fill() error {
	if err := c.readErr; err != nil {
		c.readErr = nil
		return err
	}
	c.slow = c.slow || c.heldBack
	if at := c.stopped.Load(); at != 0 {
		since := time.Duration(time.Now().UnixNano() - at)
		if c.heldBack && since < heldWords || c.slow && since < slowWords {
			_ = c.stop(lastWords) // a failure shows in Read
		}
	}
	c.heldBack = false
	room := c.in.space(minRead)
	n, err := c.Conn.Read(room)
	if n == 0 && isTimeout(err) && c.stopped.Load() != 0 {
		n = c.sweep(room)
	}
	c.in.wrote(n)
	if n > 0 {
		// A reader may return bytes and an error at once; bytes first.
		c.readErr = err
		return nil
	}
	if err == nil {
		return io.ErrNoProgress
	}
	return err
}

// stop ends the client's stream after d: what it has sent by then is still read, and nothing that comes later.
func (c *guardConn) stop(d time.Duration) error {
	c.stopped.CompareAndSwap(0, time.Now().UnixNano())
	return c.Conn.SetReadDeadline(time.Now().Add(d))
}

// sweep reads what is in the socket without waiting. A deadline alone would lose it: a read that begins after the deadline,
// because the machine is busy or the client was held back, fails however much is there.
func (c *guardConn) sweep(b []byte) (n int) {
	withFD(c.Conn, func(fd int) { n, _ = syscall.Read(fd, b) })
	return max(n, 0)
}

// SetReadDeadline is that of net.Conn, except that it cannot put off the
// handshake's deadline: redcon sets its own for every command.
func (c *guardConn) SetReadDeadline(t time.Time) error {
	if !c.begun && !c.handshake.IsZero() && (t.IsZero() || t.After(c.handshake)) {
		t = c.handshake
	}
	return c.Conn.SetReadDeadline(t)
}

// SetDeadline sets both deadlines; see SetReadDeadline.
func (c *guardConn) SetDeadline(t time.Time) error {
	return errors.Join(c.SetReadDeadline(t), c.SetWriteDeadline(t))
}

// NetConn returns the connection below, for who takes it over or ends it. What has been read of it stands in c.in.
func (c *guardConn) NetConn() net.Conn { return c.Conn }

// Close closes the connection and makes room for another client.
func (c *guardConn) Close() error {
	c.closing.Do(func() { c.guard.open.Add(-1) })
	return c.Conn.Close()
}
