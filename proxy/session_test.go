package proxy

import (
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	cmdtab "cacheproxy/internal/command"
	"cacheproxy/policy"
)

// bench drives a session without a socket.
type bench struct {
	mu   sync.Mutex
	cond *sync.Cond
	s    *session
}

func (b *bench) lock()   { b.mu.Lock() }
func (b *bench) unlock() { b.cond.Broadcast(); b.mu.Unlock() }
func (b *bench) wait()   { b.cond.Wait() }

// newBench makes a session over an engine whose lanes go to f.
func newBench(t *testing.T, lim sessionLimits, routes ...policy.Route) (*bench, *fakeRedis) {
	t.Helper()
	e, err := newEngine(Config{Redis: RedisConfig{URL: "redis://127.0.0.1:1"}, Routes: routes}, noStore{})
	if err != nil {
		t.Fatal(err)
	}
	f := newFakeRedis(t)
	e.up.state.Store(int32(trusted))
	for i := range e.up.lanes {
		for _, l := range e.up.lanes[i].all() {
			l.dial = f.dial
		}
	}
	b := &bench{}
	b.cond = sync.NewCond(&b.mu)
	b.s = newSession(b, e, 1, "", "test", lim)
	t.Cleanup(func() {
		e.up.closeLanes()
		e.wg.Wait()
	})
	return b, f
}

func (b *bench) feed(args ...string) {
	raw := appendCommand(nil, args...)
	var views [][]byte
	for _, a := range args {
		views = append(views, []byte(a))
	}
	b.lock()
	defer b.unlock()
	b.s.feed(command{raw: raw, args: views})
}

// until waits until cond holds of the session.
func (b *bench) until(t *testing.T, what string, cond func(s *session) bool) {
	t.Helper()
	timer := time.AfterFunc(10*time.Second, b.cond.Broadcast)
	defer timer.Stop()
	b.lock()
	defer b.unlock()
	for end := time.Now().Add(10 * time.Second); !cond(b.s); b.cond.Wait() {
		if time.Now().After(end) {
			t.Fatalf("never: %s", what)
		}
	}
}

// A panic on an event of one client ends that client and nobody else.
func TestPanicEndsOneClient(t *testing.T) {
	for name, event := range map[string]func(sl *slot){
		"reply":   func(sl *slot) { sl.reply(sl.tag, []byte("+OK\r\n")) },
		"failed":  func(sl *slot) { sl.failed(sl.tag, true, errLaneDown) },
		"overdue": func(sl *slot) { sl.overdue(sl.tag) },
		"event":   func(sl *slot) { sl.s.event(sl, sl.tag, func() { panic("an event") }) },
	} {
		t.Run(name, func(t *testing.T) {
			b, f := newBench(t, sessionLimits{})
			b.feed("ECHO", "x")
			<-f.conns
			b.lock()
			sl := b.s.slots[0]
			sl.then = func([]byte) { panic("a reply") }
			if name != "reply" {
				sl.routes = []*policy.Route{{Name: "r", Phase: policy.Phase1}}
				sl.keys = []cmdtab.Key{{Arg: 99}} // there is no such argument
				sl.class = policy.ReadThrough
			}
			b.unlock()
			event(sl)
			b.lock()
			defer b.unlock()
			if !b.s.ending || !b.s.idle() {
				t.Errorf("ending %t, %d slots", b.s.ending, len(b.s.slots))
			}
		})
	}
	b, _ := newBench(t, sessionLimits{})
	if got := string(b.s.contained(func() []byte { panic("in a goroutine") })); got != "-ERR internal error\r\n" {
		t.Errorf("contained: %q", got)
	}
}

// Replies come in the order of the commands, and one that comes too late belongs to nobody.
func TestSessionKeepsOrder(t *testing.T) {
	b, f := newBench(t, sessionLimits{})
	for _, x := range []string{"a", "b", "c"} {
		b.feed("ECHO", x)
	}
	<-f.conns
	b.lock()
	slots := append([]*slot(nil), b.s.slots...)
	b.unlock()
	tag := slots[0].tag
	slots[2].reply(slots[2].tag, []byte("+c\r\n"))
	slots[1].reply(slots[1].tag, []byte("+b\r\n"))
	if b.s.out.bytes != 0 {
		t.Errorf("out of order: %q", b.s.out.text())
	}
	slots[0].overdue(tag)
	if got := b.s.out.text(); got != "-UNAVAILABLE redis cannot be reached\r\n+b\r\n+c\r\n" {
		t.Errorf("got %q", got)
	}
	slots[0].reply(tag, []byte("+late\r\n"))
	slots[0].failed(tag, true, errLaneDown)
	if strings.Contains(b.s.out.text(), "late") || b.s.held != 0 || b.s.open != 0 || !b.s.idle() {
		t.Errorf("out %q, held %d, open %d", b.s.out.text(), b.s.held, b.s.open)
	}
}

// Whether a command whose answer was lost may have run is said, and only reads are said to have changed nothing.
func TestLostReplies(t *testing.T) {
	for cmd, want := range map[string]string{
		"ECHO x": "-UNAVAILABLE", "PING": "-UNAVAILABLE", "INFO": "-UNCERTAIN", "INCR k": "-UNCERTAIN", "PUBLISH c m": "-UNCERTAIN",
		"EVAL return(1) 0": "-UNCERTAIN", "LPUSH l x": "-UNCERTAIN", "CONFIG SET x y": "-UNCERTAIN",
	} {
		b, f := newBench(t, sessionLimits{})
		b.feed(strings.Fields(cmd)...)
		c := <-f.conns
		c.Read(make([]byte, 1))
		c.Close()
		b.until(t, cmd+" is answered", func(s *session) bool { return s.idle() })
		if !strings.HasPrefix(b.s.out.text(), want) {
			t.Errorf("%s: %q", cmd, b.s.out.text())
		}
	}
}

// A read whose connection broke is asked once more on another one, unless something may have been changed behind it.
func TestReadsAreRepeated(t *testing.T) {
	asked := func(c net.Conn) string {
		buf := make([]byte, 1024)
		n, _ := c.Read(buf)
		return string(buf[:n])
	}
	b, f := newBench(t, sessionLimits{})
	lose := func(c net.Conn) {
		c.Close()
		b.until(t, "it waits", func(s *session) bool { return s.idle() || s.slots[0].again })
		b.s.e.up.state.Store(int32(trusted))
	}
	b.feed("GET", "k")
	first := <-f.conns
	want := asked(first)
	lose(first)
	second := <-f.conns
	if got := asked(second); got != want {
		t.Errorf("asked %q, then %q", want, got)
	}
	second.Write([]byte("$1\r\nv\r\n"))
	b.until(t, "GET is answered", func(s *session) bool { return s.out.bytes > 0 })
	b.feed("GET", "k")
	asked(second)
	lose(second)
	third := <-f.conns
	asked(third)
	lose(third)
	b.until(t, "GET is refused", func(s *session) bool { return s.idle() })
	if got := b.s.out.text(); got != "$1\r\nv\r\n-UNAVAILABLE redis cannot be reached\r\n" {
		t.Errorf("got %q", got)
	}

	b, f = newBench(t, sessionLimits{})
	b.feed("GET", "k")
	b.feed("INCR", "k")
	c := <-f.conns
	asked(c)
	c.Close()
	b.until(t, "both are answered", func(s *session) bool { return s.idle() })
	if got := b.s.out.text(); !strings.HasPrefix(got, "-UNAVAILABLE ") || !strings.Contains(got, "\r\n-UNCERTAIN ") {
		t.Errorf("got %q", got)
	}
}

// A client that does not read its replies cannot make more than its limit wait for it.
func TestSessionBounds(t *testing.T) {
	const limit = 4 << 20
	b, f := newBench(t, sessionLimits{commands: 100, bytes: limit})
	for range 100 {
		b.feed("ECHO", "x")
	}
	<-f.conns
	if !b.s.full() {
		t.Error("not full at its number of commands")
	}
	reply := appendBulk(nil, strings.Repeat("x", 100<<10))
	fed, peak := 100, 0
	for range 10000 {
		b.lock()
		sl, tag := b.s.waitsLongest()
		b.unlock()
		if sl == nil {
			break
		}
		sl.reply(tag, reply)
		b.lock()
		peak = max(peak, b.s.held+b.s.out.bytes)
		room := !b.s.full()
		b.unlock()
		if room {
			b.feed("ECHO", "x")
			fed++
		}
	}
	if peak > limit+len(reply) || peak < limit/2 {
		t.Errorf("%d bytes wait for the client", peak)
	}
	// It reads: everything is answered.
	for range fed {
		b.lock()
		b.s.out.drop()
		b.s.settle()
		sl, tag := b.s.waitsLongest()
		b.unlock()
		if sl == nil {
			break
		}
		sl.reply(tag, reply)
	}
	b.lock()
	defer b.unlock()
	b.s.out.drop()
	if !b.s.idle() || b.s.held != 0 || b.s.open != 0 {
		t.Errorf("%d slots, held %d, open %d", len(b.s.slots), b.s.held, b.s.open)
	}
}

// text is everything that an outbox holds.
func (o *outbox) text() string {
	var b strings.Builder
	for _, s := range o.segs {
		b.Write(s.b)
	}
	return b.String()
}

// A reply that comes in parts has its place among the others, counts against the client's limit while it waits for it, and ends the
// client if it has no end.
func TestSessionStreams(t *testing.T) {
	b, f := newBench(t, sessionLimits{})
	for _, x := range []string{"a", "b", "c"} {
		b.feed("ECHO", x)
	}
	<-f.conns
	b.lock()
	slots := append([]*slot(nil), b.s.slots...)
	b.unlock()
	tags := []uint64{slots[0].tag, slots[1].tag, slots[2].tag}
	if !slots[1].part(tags[1], []byte("$8\r\nlon")) || !slots[1].part(tags[1], []byte("g ")) {
		t.Error("a part was not taken")
	}
	if b.s.out.bytes != 0 || b.s.held < 10 {
		t.Errorf("out of order: %q, held %d", b.s.out.text(), b.s.held)
	}
	slots[1].overdue(tags[1]) // it has begun to come
	slots[0].reply(tags[0], []byte("+a\r\n"))
	if got := b.s.out.text(); got != "+a\r\n$8\r\nlong " {
		t.Errorf("got %q", got)
	}
	slots[1].part(tags[1], []byte("va"))
	slots[1].reply(tags[1], []byte("l\r\n"))
	slots[2].part(tags[2], []byte("$100\r\n"))
	if got := b.s.out.text(); got != "+a\r\n$8\r\nlong val\r\n$100\r\n" {
		t.Errorf("got %q", got)
	}
	if !slots[1].part(tags[1], []byte("late")) {
		t.Error("a part that nobody waits for was not taken")
	}
	slots[2].failed(tags[2], true, errLaneDown)
	if !b.s.over || !b.s.idle() || b.s.held != 0 || strings.Contains(b.s.out.text(), "UNC") {
		t.Errorf("over %t, held %d, out %q", b.s.over, b.s.held, b.s.out.text())
	}
}

// However large and small pieces alternate, an outbox holds little more than what is in it, in few pieces: each is a system call.
func TestOutboxWastesNothing(t *testing.T) {
	for _, sizes := range [][]int{{4200, 7}, {7, 4200}, {17 << 10, 100, 100}, {100}, {64<<10 + 50, 7}, {keepOut, 1}} {
		var o, taken outbox
		for range 2 { // with and without a buffer from before
			want := 0
			for want < 4<<20 {
				for _, n := range sizes {
					o.add(make([]byte, n))
					want += n
				}
			}
			held := 0
			for _, seg := range o.segs {
				if seg.pooled != nil {
					held += chunkSize
				} else {
					held += cap(seg.b)
				}
			}
			if o.bytes != want || held > want+2*chunkSize || len(o.segs) > want/chunkSize+2 {
				t.Errorf("%v: %d bytes of %d, in %d held by %d pieces", sizes, o.bytes, want, held, len(o.segs))
			}
			o.swap(&taken)
		}
		if len(taken.segs) == 0 || len(o.segs) > 0 && (!o.segs[0].open || cap(o.segs[0].b) > 2*keepOut) {
			t.Errorf("%v: it keeps %d pieces", sizes, len(o.segs))
		}
	}
}

func TestOutbox(t *testing.T) {
	var o, taken, parts outbox
	var want strings.Builder
	for i := range 400 {
		b := []byte(strings.Repeat(string(rune('a'+i%26)), i*i))
		want.Write(b)
		switch i % 3 {
		case 0:
			o.add(b)
		case 1:
			o.lend(b)
		case 2:
			parts.addChunks(b)
			o.take(&parts)
		}
		if i%50 == 49 {
			if o.bytes != want.Len() || o.text() != want.String() {
				t.Fatalf("%d bytes of %d", o.bytes, want.Len())
			}
			o.swap(&taken)
			if taken.bytes != want.Len() || taken.text() != want.String() || o.bytes != 0 || o.text() != "" {
				t.Fatalf("taken: %d bytes of %d, %d left", taken.bytes, want.Len(), o.bytes)
			}
			want.Reset()
		}
	}
}

// waitsLongest is the slot that has waited longest for a reply, with its tag; nil if none does. Caller holds the lock.
func (s *session) waitsLongest() (*slot, uint64) {
	for _, sl := range s.slots[:s.begun] {
		if !sl.done {
			return sl, sl.tag
		}
	}
	return nil, 0
}
