package proxy_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"cacheproxy/internal/testenv"
	"cacheproxy/policy"
	"cacheproxy/proxy"
)

// fate is what becomes of a COMMIT, and what the proxy can know of it.
type fate string

const (
	notDone   fate = "not done"             // and that is certain
	unknownNo fate = "unknown, not done"    // the connection broke before the server had it
	unknownOK fate = "unknown, but it's in" // the connection broke before the answer
)

var (
	errTorn = errors.New("the connection broke")
	errDead = errors.New("the server ended the session before the COMMIT")
)

// tornStore gives the next COMMIT that changes something a fate of the test's; meanwhile happens at that moment.
type tornStore struct {
	proxy.Store
	next      atomic.Pointer[fate]
	meanwhile func()
}

func (s *tornStore) Begin(ctx context.Context, refs []policy.Ref) (proxy.Tx, error) {
	tx, err := s.Store.Begin(ctx, refs)
	if err != nil {
		return nil, err
	}
	return &tornTx{tx, s}, nil
}

func (s *tornStore) Uncertain(err error) bool {
	return errors.Is(err, errTorn) || s.Store.Uncertain(err)
}
func (s *tornStore) Unavailable(err error) bool {
	return errors.Is(err, errTorn) || errors.Is(err, errDead) || s.Store.Unavailable(err)
}

type tornTx struct {
	proxy.Tx
	s *tornStore
}

func (t *tornTx) Commit(ctx context.Context, changes []policy.Change, journal []policy.Ref, known []int64, rawOnly bool) (int64, error) {
	f := t.s.next.Swap(nil)
	if f == nil || *f == unknownOK {
		if id, err := t.Tx.Commit(ctx, changes, journal, known, rawOnly); f == nil || err != nil {
			return id, err
		}
	}
	t.Rollback()
	t.s.meanwhile()
	if *f == notDone {
		return 0, errDead
	}
	return 0, errTorn
}

// Postgres dies between the moment at which a write has deleted the key in Redis and the end of its COMMIT. The write goes on in Redis,
// as the phase says; the key is not missing for as long as the outage lasts, and nothing is stale when it is over.
func TestPostgresDiesInAWrite(t *testing.T) {
	both := route(policy.Phase1)
	both.Name, both.Match, both.WritePolicy = "both", "both:*", policy.WriteBothStores
	routes := []policy.Route{both, route(policy.Phase1)}
	for _, f := range []fate{notDone, unknownNo, unknownOK} {
		t.Run(string(f), func(t *testing.T) {
			pg := testenv.PostgresServer(t)
			w := newWorldWith(t, testenv.Redis(t), pg.URL("postgres"))
			two := w.start(sidecarOptions{routes: routes})
			b := two.dial(t)
			for i, c := range []struct{ cmd, reply, then string }{
				{"SET %s new PX 500000", "+OK", "new"},
				{"INCR %s", ":6", "6"},
				{"DEL %s", ":1", "(nil)"},
				{"MSET %s new other x", "+OK", "new"},
				{"EVAL return(redis.call('INCR',KEYS[1])) 1 %s", ":6", "6"},
				{"SETRANGE %s 1 !", ":2", "5!"},
			} {
				torn := &tornStore{meanwhile: func() { kill(t, pg) }}
				one := w.start(sidecarOptions{routes: routes, store: func(s proxy.Store) proxy.Store { torn.Store = s; return torn }})
				a := one.dial(t)
				key, strict := fmt.Sprint("k", i), i%2 == 1
				if strict {
					key = "both:" + key
				}
				a.want("+OK", "SET", key, "5")
				b.want("5", "GET", key)
				cmd := strings.Fields(fmt.Sprintf(c.cmd, key))
				torn.next.Store(&f)
				got, then := a.do(cmd...), c.then
				switch {
				case !strict && got != c.reply:
					t.Errorf("%v answered %q", cmd, got)
				case strict && f == notDone:
					then = "5"
					if !strings.HasPrefix(got, "-UNAVAILABLE") {
						t.Errorf("%v answered %q", cmd, got)
					}
				case strict && !strings.HasPrefix(got, "-UNCERTAIN"):
					t.Errorf("%v answered %q", cmd, got)
				}
				a.want(then, "GET", key)
				b.want(then, "GET", key)
				w.raw.want(then, "GET", key)
				one.stop() // the writer is gone before the store is back
				if err := pg.Restart(); err != nil {
					t.Fatal(err)
				}
				w.until("postgres is back", func() bool { return two.srv.Health().Postgres.Status == "connected" })
				w.journalEmpty()
				b.want(then, "GET", key)
				w.raw.do("DEL", key)
				b.want(then, "GET", key)
			}
		})
	}
}

// Another sidecar, which reaches both stores, takes the key while the fate of our COMMIT is open: what it wrote stays.
func TestOvertakenWhileTheCommitIsOpen(t *testing.T) {
	for _, f := range []fate{unknownNo, unknownOK} {
		for _, cmd := range []string{"SET k ours", "EVAL return(redis.call('SET',KEYS[1],'ours')) 1 k"} {
			for _, phase := range []policy.Phase{policy.Phase1, policy.Phase2} {
				t.Run(strings.Fields(cmd)[0]+", "+string(f)+", "+phase.String(), func(t *testing.T) {
					w := newWorld(t)
					var b *conn
					torn := &tornStore{meanwhile: func() { b.want("+OK", "SET", "k", "theirs") }}
					one := w.start(sidecarOptions{routes: []policy.Route{route(policy.Phase1)}, store: func(s proxy.Store) proxy.Store { torn.Store = s; return torn }})
					two := w.sidecar(phase)
					a := one.dial(t)
					b = two.dial(t)
					a.want("+OK", "SET", "k", "old")
					torn.next.Store(&f)
					if got := a.do(strings.Fields(cmd)...); !strings.HasPrefix(got, "-UNCERTAIN") {
						t.Errorf("answered %q", got)
					}
					a.want("theirs", "GET", "k")
					b.want("theirs", "GET", "k")
					w.until("the store is back", func() bool { return one.srv.Health().Postgres.Status == "connected" })
					w.journalEmpty()
					if phase == policy.Phase1 {
						w.raw.do("DEL", "k")
					}
					a.want("theirs", "GET", "k")
					b.want("theirs", "GET", "k")
				})
			}
		}
	}
}

// The same without gates: clients write in a loop when the postmaster is killed. None is refused, and each key holds the last value that
// was acknowledged, or the one after it if its fate was unknown.
func TestPostgresKilledUnderWriters(t *testing.T) {
	pg := testenv.PostgresServer(t)
	w := newWorldWith(t, testenv.Redis(t), pg.URL("postgres"))
	s := w.sidecar(policy.Phase1)
	for round := range 3 {
		stop := make(chan struct{})
		var wg sync.WaitGroup
		for i := range 6 {
			c := s.dial(t)
			key := fmt.Sprintf("k%d.%d", round, i)
			wg.Go(func() {
				for v := 1; ; v++ {
					select {
					case <-stop:
						return
					default:
					}
					if got := c.do("SET", key, fmt.Sprint(v)); got != "+OK" {
						t.Errorf("round %d: SET answered %q", round, got)
						return
					}
					if got := c.do("GET", key); got != fmt.Sprint(v) {
						t.Errorf("round %d: GET answered %q, want %d", round, got, v)
						return
					}
				}
			})
		}
		w.until("there is traffic", func() bool { return s.srv.Stats(t.Context()).Routes[0].Writes > int64(300*(round+1)) })
		kill(t, pg)
		n := s.srv.Stats(t.Context()).Routes[0].Writes
		w.until("there is traffic without postgres", func() bool { return s.srv.Stats(t.Context()).Routes[0].Writes > n+100 })
		if err := pg.Restart(); err != nil {
			t.Fatal(err)
		}
		w.until("postgres is back", func() bool { return s.srv.Health().Postgres.Status == "connected" })
		close(stop)
		wg.Wait()
		w.journalEmpty()
	}
}
