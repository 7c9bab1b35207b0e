package testenv

import (
	"context"
	"errors"
	"io"
	"net"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

const (
	// dialBound limits a dial from the link to its target. Both are on this machine: only a paused target with a full
	// backlog does not answer, and then the client waits as it would without the link.
	dialBound = 10 * time.Second
	// chunkSize and queued bound what a link holds back for one direction of one connection: 2 MB. Beyond that it reads
	// no more, and the sender feels it.
	chunkSize = 32 << 10
	queued    = 64
	// acceptPause follows a failed accept.
	acceptPause = 5 * time.Millisecond
)

// Link is a TCP address in front of another address. Everything between the two can be cut, frozen, delayed and lost. Its
// methods are safe for concurrent use.
type Link struct {
	t    testing.TB
	addr string

	mu       sync.Mutex
	network  string       // of the target
	target   string       // guarded by mu, as network
	listener net.Listener // nil while cut
	ended    bool         // the test is over
	// thawed is closed when bytes may flow; Freeze replaces it with an open one.
	thawed chan struct{}
	delay  time.Duration
	drop   map[bool]bool      // guarded by mu: directions in which all is lost, by Passing.Request
	look   func(Passing) bool // guarded by mu; nil: nobody looks
	opened int64              // guarded by mu: connections so far
	// cut ends the connections that were made since the last Cut, and conns waits for them and for the accept loop.
	cut   context.CancelFunc
	conns *sync.WaitGroup
}

// NewLink puts a link in front of target, a host:port or the path of a unix socket. It ends with the test.
func NewLink(t testing.TB, target string) *Link {
	t.Helper()
	l := &Link{
		t:      t,
		addr:   net.JoinHostPort("127.0.0.1", strconv.Itoa(FreePort(t))),
		thawed: make(chan struct{}),
		drop:   map[bool]bool{},
	}
	l.Aim(target)
	close(l.thawed)
	l.mu.Lock()
	err := l.listen()
	l.mu.Unlock()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		l.ended = true
		l.close()
	})
	return l
}

// Addr is the host:port that the link listens on. It never changes.
func (l *Link) Addr() string { return l.addr }

// Aim puts the link in front of another target. Connections that there are stay where they are.
func (l *Link) Aim(target string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.network, l.target = "tcp", target
	if strings.HasPrefix(target, "/") {
		l.network = "unix"
	}
}

// Cut closes every connection and refuses new ones until Heal. When it has returned, no byte passes any more.
func (l *Link) Cut() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.close()
}

// Freeze stops the bytes in both directions: connections stay open and new ones are accepted, but nothing arrives, not
// even that the other side has closed. What is sent meanwhile arrives after Thaw.
func (l *Link) Freeze() {
	l.mu.Lock()
	defer l.mu.Unlock()
	select {
	case <-l.thawed:
		l.thawed = make(chan struct{})
	default:
	}
}

// Thaw ends Freeze.
func (l *Link) Thaw() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.thaw()
}

// Delay makes everything that is sent from now on arrive d later, in each direction. Throughput stays.
func (l *Link) Delay(d time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.delay = d
}

// Drop makes the link half-open: what is sent in one direction, towards the target or back, is lost from now on, until Heal, and also that a side has closed. Connections
// stay open, and new ones are accepted. One that has lost anything loses all that follows in that direction, also after Heal: no stream may go on behind a gap.
func (l *Link) Drop(request bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.drop[request] = true
}

// Passing are bytes on their way through a link: what one read brought. They belong to the link.
type Passing struct {
	Conn    int64 // counts the connections of the link
	Request bool  // towards the target
	Bytes   []byte
}

// Look shows f all that passes from now on, before it passes, until the next Look; nil ends it. f decides whether it passes; if not, its connection ends. It may
// wait, and is called for several connections at once, but must not call Cut, which waits for it.
func (l *Link) Look(f func(Passing) bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.look = f
}

// Heal undoes Cut, Freeze, Delay and Drop. Connections that were cut stay closed.
func (l *Link) Heal() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.thaw()
	l.delay = 0
	clear(l.drop)
	if l.listener != nil || l.ended {
		return
	}
	if err := l.listen(); err != nil {
		l.t.Errorf("heal a link: %v", err)
	}
}

// listen begins to accept. The caller holds mu.
func (l *Link) listen() error {
	listener, err := net.Listen("tcp", l.addr)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(context.Background())
	conns := new(sync.WaitGroup)
	l.listener, l.cut, l.conns = listener, cancel, conns
	conns.Go(func() {
		for {
			conn, err := listener.Accept()
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err != nil {
				// A client gave up while it waited, or file descriptors ran out: the pause keeps the latter from
				// becoming a busy loop.
				sleepUntil(ctx, time.Now().Add(acceptPause))
				continue
			}
			conns.Go(func() { l.serve(ctx, conn) })
		}
	})
	return nil
}

// close ends everything that listen began. The caller holds mu; no goroutine of the link that is waited for here takes
// it without looking at its context first.
func (l *Link) close() {
	if l.listener == nil {
		return
	}
	_ = l.listener.Close() // what it refuses from now on is what we want
	l.cut()
	conns := l.conns
	l.listener = nil
	l.mu.Unlock()
	conns.Wait()
	l.mu.Lock()
}

func (l *Link) thaw() {
	select {
	case <-l.thawed:
	default:
		close(l.thawed)
	}
}

// flowing waits while the link is frozen. It reports whether the connection still lives.
func (l *Link) flowing(ctx context.Context) bool {
	for {
		l.mu.Lock()
		thawed := l.thawed
		l.mu.Unlock()
		select {
		case <-ctx.Done():
			return false
		case <-thawed:
		}
		// Frozen again between the two looks? Then look once more.
		l.mu.Lock()
		same := l.thawed == thawed
		l.mu.Unlock()
		if same {
			return ctx.Err() == nil
		}
	}
}

// serve carries one connection until one side is done with it or the link is cut.
func (l *Link) serve(ctx context.Context, client net.Conn) {
	defer client.Close()
	if !l.flowing(ctx) {
		return
	}
	dialer := net.Dialer{Timeout: dialBound}
	l.mu.Lock()
	network, target := l.network, l.target
	l.opened++
	id := l.opened
	l.mu.Unlock()
	server, err := dialer.DialContext(ctx, network, target)
	if err != nil {
		return // the client sees its connection close
	}
	defer server.Close()

	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	// Closing both ends is what wakes a goroutine that reads or writes.
	stop := context.AfterFunc(ctx, func() {
		_ = client.Close()
		_ = server.Close()
	})
	defer stop()
	var both sync.WaitGroup
	both.Go(func() { l.carry(ctx, cancel, server, client, Passing{Conn: id, Request: true}) })
	both.Go(func() { l.carry(ctx, cancel, client, server, Passing{Conn: id}) })
	both.Wait()
}

// chunk is what one read brought, and when it may arrive. Without bytes it is the end of the stream.
type chunk struct {
	bytes []byte
	due   time.Time
}

// carry moves one direction of a connection. A clean end is passed on as such, so that the other direction lives on; any
// error ends both. way is what is told to whom looks.
func (l *Link) carry(ctx context.Context, cancel context.CancelFunc, dst, src net.Conn, way Passing) {
	queue := make(chan chunk, queued)
	var lost atomic.Bool // something was: all that follows is
	loses := func() bool {
		l.mu.Lock()
		defer l.mu.Unlock()
		if l.drop[way.Request] {
			lost.Store(true)
		}
		return lost.Load()
	}
	var reader sync.WaitGroup
	reader.Go(func() {
		defer close(queue)
		for {
			buf := make([]byte, chunkSize)
			n, err := src.Read(buf)
			l.mu.Lock()
			due := time.Now().Add(l.delay)
			l.mu.Unlock()
			if n > 0 {
				select {
				case queue <- chunk{bytes: buf[:n], due: due}:
				case <-ctx.Done():
					return
				}
			}
			if err != nil {
				if !errors.Is(err, io.EOF) {
					l.flowing(ctx) // while frozen, the other side does not learn of it either
					if !loses() {
						cancel()
					}
					return
				}
				select {
				case queue <- chunk{due: due}:
				case <-ctx.Done():
				}
				return
			}
		}
	})
	defer reader.Wait()
	for c := range queue {
		if !sleepUntil(ctx, c.due) || !l.flowing(ctx) {
			cancel()
			return
		}
		if loses() {
			continue
		}
		if len(c.bytes) == 0 {
			if w, ok := dst.(interface{ CloseWrite() error }); ok && w.CloseWrite() == nil {
				continue
			}
			cancel()
			return
		}
		l.mu.Lock()
		look := l.look
		l.mu.Unlock()
		way.Bytes = c.bytes
		if look != nil && !look(way) {
			cancel()
			return
		}
		if _, err := dst.Write(c.bytes); err != nil {
			cancel()
			return
		}
	}
}

// sleepUntil reports whether the connection still lives at that time.
func sleepUntil(ctx context.Context, due time.Time) bool {
	wait := time.Until(due)
	if wait <= 0 {
		return ctx.Err() == nil
	}
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}
