package proxy

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/zap"
)

// fakeRedis accepts the lane's connections one by one; each is handed to the test.
type fakeRedis struct {
	t     *testing.T
	conns chan net.Conn
	fail  chan error // refuses the next dial
}

func newFakeRedis(t *testing.T) *fakeRedis {
	return &fakeRedis{t: t, conns: make(chan net.Conn, 8), fail: make(chan error, 8)}
}

func (f *fakeRedis) dial(context.Context) (net.Conn, error) {
	select {
	case err := <-f.fail:
		return nil, err
	default:
	}
	ours, theirs := net.Pipe()
	f.conns <- theirs
	return ours, nil
}

// told is what a completer was told.
type told struct {
	what string
	sent bool
}

type recorder struct {
	mu  sync.Mutex
	got []told
	ch  chan told
}

func newRecorder() *recorder { return &recorder{ch: make(chan told, 1000)} }

func (r *recorder) note(o told) {
	r.mu.Lock()
	r.got = append(r.got, o)
	r.mu.Unlock()
	r.ch <- o
}
func (r *recorder) reply(_ uint64, frame []byte)        { r.note(told{string(frame), true}) }
func (r *recorder) failed(_ uint64, sent bool, _ error) { r.note(told{"failed", sent}) }
func (r *recorder) part(uint64, []byte) bool            { return false }
func (r *recorder) overdue(uint64)                      { r.note(told{"overdue", true}) }
func (r *recorder) next(t *testing.T) told {
	t.Helper()
	select {
	case o := <-r.ch:
		return o
	case <-time.After(10 * time.Second):
		t.Fatal("no told")
		return told{}
	}
}

func testLane(t *testing.T) (*lane, *fakeRedis) {
	f := newFakeRedis(t)
	l := newLane(f.dial, zap.NewNop())
	t.Cleanup(l.close)
	return l, f
}

var ping = pingRequest

func TestLaneAnswersInOrder(t *testing.T) {
	l, f := testLane(t)
	r := newRecorder()
	for range 3 {
		if err := l.send(ping, pending{cb: r}); err != nil {
			t.Fatal(err)
		}
	}
	c := <-f.conns
	go func() {
		io.ReadFull(c, make([]byte, 3*len(ping)))
		io.WriteString(c, "+1\r\n>2\r\n+push\r\n:1\r\n$")
		io.WriteString(c, "1\r\n2\r\n*1\r\n:3\r\n")
	}()
	for _, want := range []string{"+1\r\n", "$1\r\n2\r\n", "*1\r\n:3\r\n"} {
		if got := r.next(t); got.what != want {
			t.Errorf("got %q, want %q", got.what, want)
		}
	}
	if l.waiting() != 0 || !l.up() {
		t.Errorf("waiting %d, up %t", l.waiting(), l.up())
	}
}

func TestLaneFailures(t *testing.T) {
	tests := map[string]struct {
		act  func(l *lane, c net.Conn)
		sent bool
	}{
		"the peer closes":                {func(_ *lane, c net.Conn) { c.Close() }, true},
		"the peer talks nonsense":        {func(_ *lane, c net.Conn) { io.WriteString(c, "nonsense\r\n") }, true},
		"an aggregate too large to be":   {func(_ *lane, c net.Conn) { io.WriteString(c, "*99999999999999\r\n") }, true},
		"the peer closes within a frame": {func(_ *lane, c net.Conn) { io.WriteString(c, "$5\r\nab"); c.Close() }, true},
		"it is dropped":                  {func(l *lane, _ net.Conn) { l.drop(errLaneDown) }, true},
		"it is closed":                   {func(l *lane, _ net.Conn) { l.close() }, true},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			l, f := testLane(t)
			r := newRecorder()
			l.send(ping, pending{cb: r})
			c := <-f.conns
			io.ReadFull(c, make([]byte, len(ping)))
			tt.act(l, c)
			if got := r.next(t); got != (told{"failed", tt.sent}) {
				t.Errorf("got %v", got)
			}
		})
	}
}

func TestLaneConnectsAgain(t *testing.T) {
	l, f := testLane(t)
	r := newRecorder()
	broken := make(chan error, 1)
	l.broken = func(err error) { broken <- err }
	f.fail <- errors.New("refused")
	l.send(ping, pending{cb: r})
	if got := r.next(t); got != (told{"failed", false}) {
		t.Errorf("a dial that fails: %v", got)
	}
	l.send(ping, pending{cb: r})
	c := <-f.conns
	io.ReadFull(c, make([]byte, len(ping)))
	c.Close()
	<-broken
	r.next(t)
	l.send(ping, pending{cb: r})
	c = <-f.conns
	io.ReadFull(c, make([]byte, len(ping)))
	io.WriteString(c, "+PONG\r\n")
	if got := r.next(t); got.what != "+PONG\r\n" {
		t.Errorf("after the second dial: %v", got)
	}
	// A reply that nobody asked for means that the two no longer agree.
	io.WriteString(c, "+EXTRA\r\n")
	<-broken
	if l.up() {
		t.Error("it is still used")
	}
}

// What was never given to the socket is certain not to have run.
func TestLaneTellsSentFromUnsent(t *testing.T) {
	l, f := testLane(t)
	first, second := newRecorder(), newRecorder()
	l.send(ping, pending{cb: first})
	c := <-f.conns
	io.ReadFull(c, make([]byte, 1)) // the writer is within its first write: a pipe has no buffer
	l.send(ping, pending{cb: second})
	c.Close()
	if got := first.next(t); got != (told{"failed", true}) {
		t.Errorf("first: %v", got)
	}
	if got := second.next(t); got != (told{"failed", false}) {
		t.Errorf("second: %v", got)
	}
}

func TestLaneBounds(t *testing.T) {
	l, f := testLane(t)
	r := newRecorder()
	l.send(ping, pending{cb: r})
	c := <-f.conns
	bufio.NewReader(c).ReadByte() // and no more
	large := appendCommand(nil, "SET", "k", strings.Repeat("x", maxLaneBytes/2))
	for i, want := range []error{nil, nil, errLaneFull} {
		if err := l.send(large, pending{cb: r}); err != want {
			t.Errorf("command %d: %v, want %v", i, err, want)
		}
	}
	l.close()
	if err := l.send(ping, pending{cb: r}); err != errLaneClosed {
		t.Errorf("closed: %v", err)
	}
	control := newLane(nil, zap.NewNop())
	defer control.close()
	if err := control.send(ping, pending{cb: r}); err != errLaneDown {
		t.Errorf("without a connection: %v", err)
	}
	a, b := net.Pipe()
	l.adopt(a) // after close
	if _, err := b.Write([]byte("x")); err == nil {
		t.Error("a closed lane keeps a connection")
	}
}

func TestLaneDeadlines(t *testing.T) {
	l, f := testLane(t)
	bounded, free := newRecorder(), newRecorder()
	now := time.Now()
	l.send(ping, pending{cb: free})
	l.send(ping, pending{cb: bounded, deadline: now.Add(time.Second)})
	l.send(ping, pending{cb: bounded, deadline: now.Add(3 * time.Second)})
	c := <-f.conns
	go io.ReadFull(c, make([]byte, 3*len(ping)))
	if n := l.expire(now); n != 0 {
		t.Errorf("%d expired at once", n)
	}
	if n := l.expire(now.Add(2 * time.Second)); n != 1 {
		t.Errorf("%d expired after 2 s", n)
	}
	if n := l.expire(now.Add(2 * time.Second)); n != 0 {
		t.Errorf("%d expired twice", n)
	}
	if got := bounded.next(t); got.what != "overdue" {
		t.Errorf("got %v", got)
	}
	io.WriteString(c, "+1\r\n+2\r\n+3\r\n") // a reply still comes to whoever it is due to
	if got := free.next(t); got.what != "+1\r\n" {
		t.Errorf("got %v", got)
	}
	for _, want := range []string{"+2\r\n", "+3\r\n"} {
		if got := bounded.next(t); got.what != want {
			t.Errorf("got %v", got)
		}
	}
}

// An idle connection is kept from being closed by Redis, one that is in use or gone is left alone.
func TestLaneKeptAwake(t *testing.T) {
	l, f := testLane(t)
	r := newRecorder()
	now := time.Now()
	l.keepAwake(now.Add(time.Hour), time.Minute) // there is no connection yet, and none is made
	if err := l.send(ping, pending{cb: r}); err != nil {
		t.Fatal(err)
	}
	c := <-f.conns
	expect := func() {
		t.Helper()
		b := make([]byte, len(ping))
		if _, err := io.ReadFull(c, b); err != nil || !bytes.Equal(b, ping) {
			t.Fatalf("%q, %v", b, err)
		}
	}
	expect()
	l.keepAwake(now.Add(time.Hour), time.Minute) // it waits for a reply
	if n := l.waiting(); n != 1 {
		t.Fatalf("%d requests wait", n)
	}
	io.WriteString(c, "+PONG\r\n")
	r.next(t)
	heard := time.Unix(0, l.heard.Load())
	l.keepAwake(heard.Add(time.Minute-1), time.Minute)
	if n := l.waiting(); n != 0 {
		t.Fatalf("%d requests wait although it has been idle for less than a minute", n)
	}
	l.keepAwake(heard.Add(time.Minute), time.Minute)
	expect()
	if n := l.waiting(); n != 1 {
		t.Fatalf("%d requests wait after a minute", n)
	}
}

// A connection does not keep the memory that its largest reply took.
func TestIntakeShrinks(t *testing.T) {
	in := newIntake(newLane(nil, nil), 0)
	in.each, in.part = func([]byte, bool) bool { return true }, func([]byte) bool { return false }
	most := 0
	for rest := appendBulk(nil, make([]byte, 900<<10)); len(rest) > 0; {
		n := copy(in.room(), rest)
		rest = rest[n:]
		most = max(most, len(in.buf))
		if _, err := in.took(n); err != nil {
			t.Fatal(err)
		}
	}
	if most < 900<<10 || len(in.buf) > keepIntake*intakeRoom {
		t.Fatalf("the buffer grew to %d bytes for a reply of 900 KiB, and is %d bytes after it", most, len(in.buf))
	}
}

// readFrames runs an intake on a connection until it ends.
func readFrames(c net.Conn, part, each func(b []byte) bool) error {
	in := newIntake(new(lane), 0)
	in.part, in.each = part, func(b []byte, _ bool) bool { return each(b) }
	for {
		n, err := c.Read(in.room())
		more, ferr := in.took(n)
		if !more || ferr != nil {
			return ferr
		}
		if err != nil {
			return err
		}
	}
}

func TestReadFramesOfAnySize(t *testing.T) {
	a, b := net.Pipe()
	defer a.Close()
	var want [][]byte
	for _, n := range []int{0, 1, 100, 20 << 10, 40 << 10, 3 << 20, 10} {
		want = append(want, appendBulk(nil, bytes.Repeat([]byte("x"), n)))
	}
	go func() {
		all := bytes.Join(want, nil)
		for len(all) > 0 {
			n := min(len(all), 7001)
			b.Write(all[:n])
			all = all[n:]
		}
		b.Close()
	}()
	i := 0
	err := readFrames(a, nil, func(f []byte) bool {
		if !bytes.Equal(f, want[i]) {
			t.Errorf("frame %d differs", i)
		}
		i++
		return true
	})
	if err != io.EOF || i != len(want) {
		t.Errorf("%d frames, then %v", i, err)
	}
}

// A long reply is handed on in parts, which make the whole, however it is cut, and those who want it whole get it so.
func TestReadFramesInParts(t *testing.T) {
	rng := rand.New(rand.NewPCG(3, 3))
	for range 40 {
		var want [][]byte
		for range 1 + rng.IntN(6) {
			text := []string{"x\r\n", ">", "*", "$", "-", ":1\r\n", "_\r\n", "$1\r\n>\r\n"}[rng.IntN(8)]
			f := appendBulk(nil, bytes.Repeat([]byte(text), rng.IntN(1+rng.IntN(200<<10))))
			if rng.IntN(3) == 0 {
				inner := appendArray(nil, 3)
				inner = append(append(append(inner, f...), "+a line\r\n"...), f...)
				f = inner
			}
			want = append(want, f)
		}
		a, b := net.Pipe()
		go func() {
			all := bytes.Join(want, nil)
			for len(all) > 0 {
				n := min(len(all), 1+rng.IntN(100_000))
				b.Write(all[:n])
				all = all[n:]
			}
			b.Close()
		}()
		var got [][]byte
		var now []byte
		parts := 0
		err := readFrames(a, func(p []byte) bool {
			if len(got)%2 == 1 {
				return false
			}
			now = append(now, p...)
			parts++
			return true
		}, func(f []byte) bool {
			got = append(got, append(now, f...))
			now = nil
			return true
		})
		if err != io.EOF || len(got) != len(want) {
			t.Fatalf("%d of %d frames, %v", len(got), len(want), err)
		}
		for i := range want {
			if !bytes.Equal(got[i], want[i]) {
				t.Fatalf("frame %d differs (%d parts)", i, parts)
			}
		}
	}
}

// stuck is a completer that keeps its lane busy until it is let go.
type stuck struct {
	*recorder
	entered, let chan struct{}
}

func (s *stuck) reply(tag uint64, frame []byte) {
	close(s.entered)
	<-s.let
	s.recorder.reply(tag, frame)
}

// A reply that has come and was not taken up, because this process is busy, is not Redis's to be blamed for.
func TestLaneBehindItself(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	l := newLane(func(ctx context.Context) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "tcp", ln.Addr().String())
	}, zap.NewNop())
	defer l.close()
	first := &stuck{newRecorder(), make(chan struct{}), make(chan struct{})}
	second := newRecorder()
	long := time.Now().Add(-time.Hour)
	for _, cb := range []completer{first, second} {
		if err := l.send(appendCommand(nil, "PING"), pending{cb: cb, deadline: long}); err != nil {
			t.Fatal(err)
		}
	}
	theirs, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer theirs.Close()
	judge := func() (late int, deaf bool) {
		now := time.Now().Add(time.Minute)
		l.mu.Lock()
		l.silent = long
		l.mu.Unlock()
		return l.expire(now), l.deaf(time.Second, now.UnixNano())
	}
	theirs.Write([]byte("+PONG\r\n"))
	<-first.entered
	theirs.Write([]byte("+PONG\r\n"))
	if late, deaf := judge(); late != 0 || deaf {
		t.Errorf("while a reply is delivered: %d late, deaf %t", late, deaf)
	}
	l.working.Store(false) // as if the goroutine had not come to the next read yet
	for !unreadConn(connOf(l)) {
		time.Sleep(time.Millisecond)
	}
	if late, deaf := judge(); late != 0 || deaf {
		t.Errorf("while a reply has not been read: %d late, deaf %t", late, deaf)
	}
	l.working.Store(true)
	close(first.let)
	<-first.ch
	<-second.ch
	third := newRecorder()
	if err := l.send(appendCommand(nil, "PING"), pending{cb: third, deadline: long}); err != nil {
		t.Fatal(err)
	}
	given := func() bool {
		l.mu.Lock()
		defer l.mu.Unlock()
		return l.taken > 0
	}
	for l.working.Load() || !given() {
		time.Sleep(time.Millisecond)
	}
	if late, deaf := judge(); late != 1 || !deaf {
		t.Errorf("of a silent Redis: %d late, deaf %t", late, deaf)
	}
}

func connOf(l *lane) net.Conn {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.conn
}
