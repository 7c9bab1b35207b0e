package proxy

import (
	"io"
	"net"
	"strings"
	"sync"
	"testing"

	"cacheproxy/policy"
)

// idleLoop stands in for the loop: what is sent stays in the lane until the benchmark takes it.
type idleLoop struct{}

func (idleLoop) hasOutput(*lane)                            {}
func (idleLoop) take(_ *lane, c net.Conn) (net.Conn, error) { return c, nil }
func (idleLoop) use(*lane)                                  {}
func (idleLoop) hold(*lane, bool)                           {}

// A GET's way through session and lane, without sockets: from the command that the guard lets through to the reply that is for the client.
func BenchmarkSession(b *testing.B) {
	route := policy.Route{Name: "r", Match: "user:*", Phase: policy.Phase1}
	for _, c := range []struct {
		name   string
		routes []policy.Route
		depth  int
	}{
		{"plain/1", nil, 1},
		{"plain/16", nil, 16},
		{"routed/1", []policy.Route{route}, 1},
		{"routed/16", []policy.Route{route}, 16},
	} {
		b.Run(c.name, func(b *testing.B) {
			turn := hitTurn(b, c.routes, c.depth)
			b.ReportAllocs()
			for b.Loop() {
				turn()
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*c.depth), "ns/command")
		})
	}
}

// What is allocated for a hit is garbage that a busy proxy makes a hundred thousand times a second.
func TestHitAllocatesNothing(t *testing.T) {
	for name, routes := range map[string][]policy.Route{
		"plain":  nil,
		"phase1": {{Name: "r", Match: "user:*", Phase: policy.Phase1}},
		"phase2": {{Name: "r", Match: "user:*", Phase: policy.Phase2}},
		"phase3": {{Name: "r", Match: "user:*", Phase: policy.Phase3}},
	} {
		t.Run(name, func(t *testing.T) {
			if n := testing.AllocsPerRun(1000, hitTurn(t, routes, 16)); n > 0 {
				t.Fatalf("16 GETs allocate %v times", n)
			}
		})
	}
}

// hitTurn is a turn of the loop in which one client asks for depth values that Redis has.
func hitTurn(b testing.TB, routes []policy.Route, depth int) func() {
	s, l := benchSession(b, routes)
	raw := appendCommand(nil, "GET", "user:4711")
	cmd := command{raw: raw, args: [][]byte{[]byte("GET"), []byte("user:4711")}}
	reply := appendBulk(nil, strings.Repeat("v", 100))
	var toRedis, toClient outbox // what the loop would write
	return func() {
		for range depth {
			s.feed(cmd)
		}
		l.mu.Lock()
		l.out.swap(&toRedis)
		l.taken = depth
		l.mu.Unlock()
		for range depth {
			if !l.deliver(l.gen, reply, false) {
				b.Fatal("nobody waits for the reply")
			}
		}
		s.out.swap(&toClient)
		if toRedis.bytes != depth*len(raw) || toClient.bytes != depth*len(reply) || !s.idle() {
			b.Fatalf("sent %q, answered %q", toRedis.text(), toClient.text())
		}
	}
}

// benchSession is a session whose lane leads nowhere.
func benchSession(b testing.TB, routes []policy.Route) (*session, *lane) {
	b.Helper()
	e, err := newEngine(Config{Redis: RedisConfig{URL: "redis://127.0.0.1:1"}, Routes: routes}, noStore{})
	if err != nil {
		b.Fatal(err)
	}
	e.up.state.Store(int32(trusted))
	d := &bench{}
	d.cond = sync.NewCond(&d.mu)
	s := newSession(d, e, 1, "", "bench", sessionLimits{})
	s.loop = idleLoop{}
	s.shared = e.up.lanesOn(idleLoop{})
	l := s.shared.main[0]
	ours, theirs := net.Pipe()
	l.adopt(ours)
	b.Cleanup(func() {
		theirs.Close()
		e.up.closeLanes()
		e.wg.Wait()
	})
	return s, l
}

// What one read of a shared connection brings is framed and handed on.
func BenchmarkIntake(b *testing.B) {
	for _, c := range []struct {
		name   string
		in     string
		frames int
	}{
		{"bulk100x16", strings.Repeat(string(appendBulk(nil, make([]byte, 100))), 16), 16},
		{"ok x256", strings.Repeat("+OK\r\n", 256), 256},
		{"bulk32k", string(appendBulk(nil, make([]byte, 32<<10))), 1},
	} {
		b.Run(c.name, func(b *testing.B) {
			in := newIntake(newLane(nil, nil), 0)
			frames := 0
			in.each = func([]byte, bool) bool { frames++; return true }
			in.part = func([]byte) bool { return false }
			b.ReportAllocs()
			b.SetBytes(int64(len(c.in)))
			for b.Loop() {
				frames = 0
				for rest := strings.NewReader(c.in); rest.Len() > 0; {
					n, err := rest.Read(in.room())
					if err != nil && err != io.EOF {
						b.Fatal(err)
					}
					if _, err := in.took(n); err != nil {
						b.Fatal(err)
					}
				}
				if frames != c.frames {
					b.Fatalf("%d frames, want %d", frames, c.frames)
				}
			}
		})
	}
}
