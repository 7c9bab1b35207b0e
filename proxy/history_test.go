package proxy_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"cacheproxy/fallback"
	"cacheproxy/internal/devserver"
	"cacheproxy/internal/testenv"
	"cacheproxy/policy"
	"cacheproxy/proxy"
)

// history is what happened to one key: one client writes it, with a number that rises with every write, and
// many read it through every sidecar.
//
// A read that began after write a was acknowledged and ended before write b+1 began must answer the state that some
// write in a..b left: never an older one (P3), never none (P4) unless Redis alone held it.
type history struct {
	mu     sync.Mutex
	states []string    // what write i leaves; "" is nil
	begun  int         // index of the last write that was sent
	acked  []time.Time // when write i was acknowledged; zero: refused or uncertain
}

// floor is the last write acknowledged before t.
func (h *history) floor(t time.Time) int {
	h.mu.Lock()
	defer h.mu.Unlock()
	for i := len(h.acked) - 1; i > 0; i-- {
		if !h.acked[i].IsZero() && h.acked[i].Before(t) {
			return i
		}
	}
	return 0
}

func (h *history) check(got string, from int) (to int, ok bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for i := from; i <= h.begun; i++ {
		if h.states[i] == got {
			return i, true
		}
	}
	return h.begun, false
}

// scenario is one run of the history test.
type scenario struct {
	name   string
	phases []policy.Phase
	// slack is how much later than its acknowledgement a write may be seen: exception (a) of P3 where one sidecar
	// notices an outage of Redis before another, else 0.
	slack time.Duration
	// forgets: Redis loses values that it alone held (exception (c)), so nil is right.
	forgets bool
	nemesis func(w *world, pg *devserver.Postgres, rng *rand.Rand, stop <-chan struct{})
}

const historyKeys = 12

func sleep(d time.Duration, stop <-chan struct{}) bool {
	select {
	case <-stop:
		return false
	case <-time.After(d):
		return true
	}
}

// evict deletes keys in Redis behind the proxies' back.
func evict(w *world, _ *devserver.Postgres, rng *rand.Rand, stop <-chan struct{}) {
	c := dial(w.t, w.redis.Addr())
	for sleep(time.Millisecond, stop) {
		c.do("DEL", "k"+strconv.Itoa(rng.IntN(historyKeys)))
		if rng.IntN(20) == 0 {
			c.do("DEL", "cacheproxy:lease:k:{k"+strconv.Itoa(rng.IntN(historyKeys))+"}")
		}
	}
}

func pause(w *world, _ *devserver.Postgres, rng *rand.Rand, stop <-chan struct{}) {
	for sleep(time.Duration(500+rng.IntN(700))*time.Millisecond, stop) {
		w.redis.Pause()
		sleep(time.Duration(rng.IntN(900))*time.Millisecond, stop)
		w.redis.Resume()
	}
}

func killRedis(w *world, _ *devserver.Postgres, rng *rand.Rand, stop <-chan struct{}) {
	for sleep(time.Duration(700+rng.IntN(700))*time.Millisecond, stop) {
		w.redis.Kill()
		sleep(time.Duration(rng.IntN(500))*time.Millisecond, stop)
		w.redis.Restart()
	}
}

func killPostgres(_ *world, pg *devserver.Postgres, rng *rand.Rand, stop <-chan struct{}) {
	for sleep(time.Duration(700+rng.IntN(700))*time.Millisecond, stop) {
		pg.Kill()
		sleep(time.Duration(rng.IntN(500))*time.Millisecond, stop)
		pg.Restart()
	}
}

// killConnections breaks every connection to Redis at random moments.
func killConnections(w *world, _ *devserver.Postgres, rng *rand.Rand, stop <-chan struct{}) {
	c := dial(w.t, w.redis.Addr())
	for sleep(time.Duration(20+rng.IntN(200))*time.Millisecond, stop) {
		c.do("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
	}
}

// transferring copies and repairs keys to and fro beside another nemesis, as migrate and verify do.
func transferring(other func(*world, *devserver.Postgres, *rand.Rand, <-chan struct{})) func(*world, *devserver.Postgres, *rand.Rand, <-chan struct{}) {
	return func(w *world, pg *devserver.Postgres, rng *rand.Rand, stop <-chan struct{}) {
		var wg sync.WaitGroup
		defer wg.Wait()
		for range 2 {
			rng := rand.New(rand.NewPCG(rng.Uint64(), 1))
			peer, _ := w.newPeer(time.Second)
			wg.Go(func() { transferKeys(peer, rng, stop) })
		}
		other(w, pg, rng, stop)
	}
}

// transferKeys has a peer work on random keys until stop. What fails is tried again on another connection, as soon as a sidecar trusts what it reaches.
func transferKeys(peer *proxy.Peer, rng *rand.Rand, stop <-chan struct{}) {
	ctx := context.Background()
	for sleep(time.Millisecond, stop) {
		link, err := peer.Dial(ctx)
		if err != nil {
			continue
		}
		if _, err = link.Measure(ctx); err == nil {
			var trust proxy.Trust
			if trust, err = link.Trust(ctx); err == nil && trust != proxy.Verified {
				err = errors.New("nobody has looked at this redis yet")
			}
		}
		for err == nil && sleep(time.Duration(rng.IntN(3))*time.Millisecond, stop) {
			var keys []string
			for range 1 + rng.IntN(4) {
				keys = append(keys, "k"+strconv.Itoa(rng.IntN(historyKeys)))
			}
			slices.Sort(keys)
			keys = slices.Compact(keys)
			switch rng.IntN(5) {
			case 0:
				_, err = link.Copy(ctx, refs(keys...), nil)
			case 1:
				_, err = link.PreferStore(ctx, refs(keys...))
			default:
				_, err = link.Promote(ctx, refs(keys...), nil)
			}
		}
		link.Close()
	}
}

var scenarios = []scenario{
	{"transfer/phase1", []policy.Phase{policy.Phase1, policy.Phase1}, 0, false, transferring(evict)},
	{"transfer/phase0+phase1", []policy.Phase{policy.Phase0, policy.Phase1}, 0, false, transferring(evict)},
	{"transfer/phase1+phase2", []policy.Phase{policy.Phase1, policy.Phase2}, 0, true, transferring(evict)},
	{"transfer/phase2", []policy.Phase{policy.Phase2, policy.Phase2}, 0, true, transferring(evict)},
	{"transfer/connections/phase1", []policy.Phase{policy.Phase1, policy.Phase1}, 700 * time.Millisecond, false, transferring(killConnections)},
	{"transfer/killRedis/phase1", []policy.Phase{policy.Phase1, policy.Phase1}, 700 * time.Millisecond, false, transferring(killRedis)},
	{"transfer/killPostgres/phase1", []policy.Phase{policy.Phase1, policy.Phase1}, 0, false, transferring(killPostgres)},

	{"evict/phase1", []policy.Phase{policy.Phase1, policy.Phase1}, 0, false, evict},
	{"evict/phase0+phase1", []policy.Phase{policy.Phase0, policy.Phase1}, 0, false, evict},
	{"evict/phase1+phase2", []policy.Phase{policy.Phase1, policy.Phase2}, 0, true, evict},
	{"evict/phase2", []policy.Phase{policy.Phase2, policy.Phase2}, 0, true, evict},
	{"evict/phase2+drain", []policy.Phase{policy.Phase2, policy.Drain}, 0, true, evict},
	{"connections/phase1", []policy.Phase{policy.Phase1, policy.Phase1}, 700 * time.Millisecond, false, killConnections},
	{"connections/phase2", []policy.Phase{policy.Phase2, policy.Phase2}, 0, true, killConnections},
	{"pause/phase1", []policy.Phase{policy.Phase1, policy.Phase1, policy.Phase1}, 700 * time.Millisecond, false, pause},
	{"killRedis/phase1", []policy.Phase{policy.Phase1, policy.Phase1}, 700 * time.Millisecond, false, killRedis},
	{"killRedis/phase1+phase2", []policy.Phase{policy.Phase1, policy.Phase2}, 700 * time.Millisecond, true, killRedis},
	{"killPostgres/phase1", []policy.Phase{policy.Phase1, policy.Phase1}, 0, false, killPostgres},
	{"killPostgres/phase1+phase2", []policy.Phase{policy.Phase1, policy.Phase2}, 0, false, killPostgres},
	{"killPostgres/phase2", []policy.Phase{policy.Phase2, policy.Phase2}, 0, false, killPostgres},
}

// inColumn are the scenarios that are run with an adopted column too: one of each fault and each kind of write.
var inColumn = []string{"evict/phase0+phase1", "evict/phase1+phase2", "evict/phase2+drain", "killRedis/phase1", "killPostgres/phase1+phase2"}

// TestHistories runs traffic under faults and judges what the clients saw. HISTORY_SECONDS makes each run longer, HISTORY_SEED repeats one.
func TestHistories(t *testing.T) {
	seconds := 2.0
	if v := os.Getenv("HISTORY_SECONDS"); v != "" {
		seconds, _ = strconv.ParseFloat(v, 64)
	}
	for _, sc := range scenarios {
		t.Run(sc.name, func(t *testing.T) {
			runHistory(t, sc, false, time.Duration(seconds*float64(time.Second)))
		})
	}
	for _, sc := range scenarios {
		if !slices.Contains(inColumn, sc.name) {
			continue
		}
		t.Run("column/"+sc.name, func(t *testing.T) {
			runHistory(t, sc, true, time.Duration(seconds*float64(time.Second)))
		})
	}
}

// runHistory is one run. column: the keys live in a column of the application's, which has a row for each.
func runHistory(t *testing.T, sc scenario, column bool, length time.Duration) {
	seed := uint64(time.Now().UnixNano())
	if v := os.Getenv("HISTORY_SEED"); v != "" {
		seed, _ = strconv.ParseUint(v, 10, 64)
	}
	t.Logf("seed %d", seed)
	pg := testenv.PostgresServer(t)
	w := newWorldWith(t, testenv.Redis(t), pg.URL("postgres"))
	if column {
		w.makeReports(historyKeys)
	}
	var sidecars []*sidecar
	for _, p := range sc.phases {
		r := route(p)
		o := sidecarOptions{}
		if column {
			r = reports(p)
			r.Name, r.Match, r.Template = "all", "k{id}", template("k{id}")
			o.columns = []fallback.Column{{Route: "all", Table: "public.reports", Keys: []string{"id"}, Value: "analytics_cache", Template: r.Template}}
		}
		r.OnUnknown = policy.UnknownError // nil must mean nil
		o.routes = []policy.Route{r}
		sidecars = append(sidecars, w.start(o))
	}
	keys := make([]*history, historyKeys)
	for i := range keys {
		keys[i] = &history{states: []string{"(nil)"}, acked: []time.Time{{}}}
	}
	stop := make(chan struct{})
	var wg, nem sync.WaitGroup
	var reads, writes, refused atomic.Int64
	var reasons sync.Map
	because := func(got string) {
		n, _ := reasons.LoadOrStore(got, new(atomic.Int64))
		n.(*atomic.Int64).Add(1)
	}
	anomaly := func(format string, args ...any) { t.Errorf(format, args...) }
	for i, h := range keys {
		conns := make([]*conn, len(sidecars))
		for j, s := range sidecars {
			conns[j] = s.dial(t)
		}
		rng := rand.New(rand.NewPCG(seed, uint64(i)))
		key := fmt.Sprint("k", i)
		wg.Go(func() {
			for n := 1; ; n++ {
				select {
				case <-stop:
					return
				default:
				}
				c := conns[rng.IntN(len(conns))]
				v := strconv.Itoa(n)
				var cmd []string
				switch rng.IntN(10) {
				case 0:
					cmd, v = []string{"DEL", key}, "(nil)"
				case 1:
					cmd = []string{"SET", key, v, "PX", "600000"}
				case 2:
					cmd = []string{"GETSET", key, v}
				case 3:
					cmd = []string{"EVAL", "return redis.call('SET', KEYS[1], ARGV[1])", "1", key, v}
				case 4:
					cmd = []string{"MSET", key, v}
				default:
					cmd = []string{"SET", key, v}
				}
				h.mu.Lock()
				h.states = append(h.states, v)
				h.acked = append(h.acked, time.Time{})
				h.begun = n
				h.mu.Unlock()
				got := c.do(cmd...)
				writes.Add(1)
				if strings.HasPrefix(got, "-") {
					refused.Add(1)
					because(got)
					if !strings.HasPrefix(got, "-UNAVAILABLE") && !strings.HasPrefix(got, "-UNCERTAIN") {
						anomaly("%s: %s answered %q", key, cmd[0], got)
					}
					if sc.forgets { // without a breath a refused writer only spins
						time.Sleep(5 * time.Millisecond)
					}
					continue
				}
				h.mu.Lock()
				h.acked[n] = time.Now()
				h.mu.Unlock()
				time.Sleep(time.Duration(rng.IntN(3)) * time.Millisecond)
			}
		})
		for _, s := range sidecars {
			c := s.dial(t)
			wg.Go(func() {
				for {
					select {
					case <-stop:
						return
					default:
					}
					from := h.floor(time.Now().Add(-sc.slack))
					got := c.do("GET", key)
					reads.Add(1)
					if strings.HasPrefix(got, "-UNAVAILABLE") {
						refused.Add(1)
						because(got)
						time.Sleep(2 * time.Millisecond)
						continue
					}
					if got == "(nil)" && sc.forgets {
						continue
					}
					if to, ok := h.check(got, from); !ok {
						h.mu.Lock()
						anomaly("%s: read %q, want what one of the writes %d..%d left: %q", key, got, from, to, h.states[from:min(to+1, from+6)])
						h.mu.Unlock()
						return
					}
				}
			})
		}
	}
	nem.Go(func() { sc.nemesis(w, pg, rand.New(rand.NewPCG(seed, 99)), stop) })
	time.Sleep(length)
	close(stop)
	wg.Wait()
	nem.Wait()
	t.Logf("%d writes, %d reads, %d refused", writes.Load(), reads.Load(), refused.Load())
	reasons.Range(func(k, v any) bool {
		t.Logf("%5d times %s", v.(*atomic.Int64).Load(), k)
		return true
	})
	for _, s := range sidecars {
		st := s.srv.Stats(t.Context())
		t.Logf("redis: opened %d times, errors %v; postgres: opened %d times; journal %+v; %+v", st.Redis.Opens, st.Redis.Errors, st.Postgres.Opens, st.Journal, st.Proxy)
	}
	if t.Failed() {
		return
	}
	// After the faults: every sidecar answers the last acknowledged write or a later uncertain one, and the journals empty.
	for _, s := range sidecars {
		w.until("both stores are back", func() bool {
			h := s.srv.Health()
			return h.Redis.Status == "connected" && h.Postgres.Status == "connected"
		})
	}
	w.raw = dial(t, w.redis.Addr())
	defer func() {
		if t.Failed() {
			t.Logf("journal in redis: %s", w.raw.do("HGETALL", "cacheproxy:journal"))
			t.Logf("journal in postgres: %s", w.sql("SELECT string_agg(id || ' ' || keys::text, ', ') FROM cacheproxy.journal"))
			t.Logf("%s", sidecars[0].dial(t).do("CACHEPROXY", "JOURNAL"))
		}
	}()
	w.journalEmpty()
	for i, h := range keys {
		key := fmt.Sprint("k", i)
		from := h.floor(time.Now())
		first := ""
		for j, s := range sidecars {
			got := s.dial(t).do("GET", key)
			if j == 0 {
				first = got
			} else if got != first {
				t.Errorf("%s: the sidecars disagree in the end: %q and %q", key, first, got)
			}
			if got == "(nil)" && sc.forgets {
				continue
			}
			if to, ok := h.check(got, from); !ok {
				t.Errorf("%s: in the end %q, want what one of the writes %d..%d left", key, got, from, to)
			}
		}
	}
}
