// Package soak runs the built proxy under 200 clients that connect, pipeline, subscribe, block and vanish at random, and judges every reply,
// and what is left when all of them have gone.
//
// soak_test.go has the run and its checkpoints, life_test.go what a client does and how it ends, conn_test.go whose reply is whose,
// judge_test.go what replies may say, process_test.go what a leak is.
package soak

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"cacheproxy/internal/testenv"
)

func TestMain(m *testing.M) { testenv.Main(m) }

// setting reads the environment.
func setting[T any](t *testing.T, name string, parse func(string) (T, error), otherwise T) T {
	t.Helper()
	s := os.Getenv(name)
	if s == "" {
		return otherwise
	}
	v, err := parse(s)
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return v
}

const clients = 200

// Two hundred clients with random lives: no reply is wrong, and when they have gone nothing is left of them. They go, and are looked for,
// every two minutes. Half of the time there are no routes, and half of it all keys are in phase1 or phase2.
func TestSoak(t *testing.T) {
	length := setting(t, "SOAK", time.ParseDuration, 40*time.Second) / 2
	seed := setting(t, "SOAK_SEED", func(s string) (uint64, error) { return strconv.ParseUint(s, 10, 64) }, uint64(time.Now().UnixNano()))
	for _, cfg := range []struct{ name, routes string }{
		{"no routes", "[]"},
		{"routes", "[{name: two, match: 'two:*', phase: phase2, on_unknown: error}, {name: all, match: '*', phase: phase1, on_unknown: error}]"},
	} {
		t.Run(cfg.name, func(t *testing.T) {
			t.Logf("SOAK_SEED=%d", seed)
			w := newWorld(t, cfg.routes, seed)
			defer w.report()
			w.section(2 * time.Second) // makes the connections that stay
			w.checkpoint(nil)
			base := w.least()
			t.Logf("at first: %v", base)
			for end := time.Now().Add(length); time.Now().Before(end) && !t.Failed(); {
				w.section(min(time.Until(end), 2*time.Minute))
				w.checkpoint(&base)
			}
		})
	}
}

// world is a proxy, what it stands before, and its clients.
type world struct {
	t       *testing.T
	proxy   *process
	redis   *plain
	pgURL   string // empty: there are no routes
	seed    uint64
	actors  uint64 // how many there have been
	stop    chan struct{}
	ledger  *ledger
	readers sync.WaitGroup
	large   chan struct{} // bounds how many clients have values of megabytes: the machine is small
	monitor chan struct{} // bounds how many clients watch

	// For the report.
	commands, replies, conns, messages, published, pushes, pops, bytes atomic.Int64

	mu       sync.Mutex
	retired  []*keys        // guarded by mu: of clients that are no more
	mistakes int            // guarded by mu
	ends     map[string]int // guarded by mu
}

func newWorld(t *testing.T, routes string, seed uint64) *world {
	w := &world{
		t: t, seed: seed, ledger: &ledger{elems: map[string]*element{}}, large: make(chan struct{}, 4), monitor: make(chan struct{}, 1),
		ends: map[string]int{},
	}
	r := testenv.Redis(t)
	if routes != "[]" {
		w.pgURL = testenv.Postgres(t)
	}
	w.proxy = startProxy(t, r.URL(), w.pgURL, routes)
	w.redis = dialPlain(t, r.Addr())
	w.redis.do("CLIENT", "SETNAME", ours)
	return w
}

// wrong reports what must not be. The first few are shown.
func (w *world) wrong(format string, args ...any) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.mistakes++; w.mistakes <= 12 {
		w.t.Errorf("%.1000s", fmt.Sprintf(format, args...))
	}
}

func (w *world) retire(k *keys) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.retired = append(w.retired, k)
}

func (w *world) ended(how string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.ends[how]++
}

// section lets clients live for a while, and waits until the last one has gone.
func (w *world) section(length time.Duration) {
	w.stop = make(chan struct{})
	c := dialPlain(w.t, w.proxy.addr)
	if sha := c.do("SCRIPT", "LOAD", script); !sha.is('$', scriptSHA) {
		w.t.Errorf("SCRIPT LOAD answers %s", sha)
	}
	c.nc.Close()
	var all sync.WaitGroup
	for range clients {
		w.actors++
		a := &actor{w: w, n: int(w.actors), rng: rand.New(rand.NewPCG(w.seed, w.actors))}
		all.Go(a.run)
	}
	time.Sleep(length)
	close(w.stop)
	all.Wait()
	w.readers.Wait()
}

// checkpoint judges what is left when everybody has gone. base: the proxy may hold no more than then.
func (w *world) checkpoint(base *usage) {
	w.nobody()
	w.values()
	c := dialPlain(w.t, w.proxy.addr)
	for _, err := range w.ledger.settle(func(queue string) []frame {
		if queue[1] == 'z' {
			return c.in(queue, "ZRANGE", queue, "0", "-1").elems
		}
		return c.in(queue, "LRANGE", queue, "0", "-1").elems
	}) {
		w.wrong("%v", err)
	}
	if f := c.do("FLUSHALL"); !f.is('+', "OK") {
		w.t.Errorf("FLUSHALL answers %s", f)
	}
	c.nc.Close()
	w.nobody()
	if base != nil {
		var now usage
		if !soon(w.t, "the proxy holds what it held at first", func() error {
			now = w.use()
			return now.more(*base)
		}) {
			w.t.Logf("goroutines:\n%s", w.proxy.profile("goroutine?debug=1"))
			heap := w.proxy.profile("heap?gc=1&debug=1")
			w.t.Logf("heap, the largest first:\n%s", heap[:min(len(heap), heapShown)])
		}
		w.t.Logf("afterwards: %v", now)
	}
	for _, line := range w.proxy.complaints() {
		w.wrong("the proxy says %s", line)
	}
}

// heapShown bytes of a heap profile are its largest entries.
const heapShown = 20_000

// values asks for what clients have left that are no more.
func (w *world) values() {
	w.mu.Lock()
	left := w.retired
	w.retired = nil
	w.mu.Unlock()
	slices.SortStableFunc(left, func(a, b *keys) int { return a.db - b.db })
	rng := rand.New(rand.NewPCG(w.seed, 0))
	c := w.dial(w.proxy.addr, "the checkpoint", rng)
	if c == nil {
		return
	}
	for i, k := range left {
		if i == 0 || k.db != left[i-1].db {
			c.expect('+', "OK", "SELECT", strconv.Itoa(k.db))
		}
		if k.verify(c); i%50 == 0 && !c.wait() {
			return
		}
	}
	if c.wait() {
		c.vanish()
	}
	w.readers.Wait()
}

// report says what was done.
func (w *world) report() {
	var b strings.Builder
	fmt.Fprintf(&b, "%d commands, %d replies judged, %d MB in both directions\n", w.commands.Load(), w.replies.Load(), w.bytes.Load()>>20)
	fmt.Fprintf(&b, "%d messages published, %d received; %d elements pushed to queues, %d popped\n", w.published.Load(), w.messages.Load(), w.pushes.Load(), w.pops.Load())
	fmt.Fprintf(&b, "%d connections made, of which ended", w.conns.Load())
	for _, how := range slices.Sorted(maps.Keys(w.ends)) {
		fmt.Fprintf(&b, " %s: %d,", how, w.ends[how])
	}
	w.t.Logf("%s\n%d mistakes", b.String(), w.mistakes)
}
