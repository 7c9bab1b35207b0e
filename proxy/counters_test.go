package proxy_test

import (
	"context"
	"net/http"
	"net/http/httptest"
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"

	"cacheproxy/internal/metrics"
	"cacheproxy/internal/testenv"
	"cacheproxy/policy"
	"cacheproxy/proxy"
)

// metric is what Prometheus would be told of one metric, named with its labels.
func (s *sidecar) metric(t testing.TB, name string) float64 {
	t.Helper()
	w := httptest.NewRecorder()
	metrics.Handler(s.srv, metrics.Build{}).ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/metrics", nil))
	for line := range strings.Lines(w.Body.String()) {
		if rest, ok := strings.CutPrefix(line, "cacheproxy_"+name+" "); ok {
			v, err := strconv.ParseFloat(strings.TrimSpace(rest), 64)
			if err != nil {
				t.Fatal(err)
			}
			return v
		}
	}
	t.Fatalf("no metric %s in\n%s", name, w.Body)
	return 0
}

// counts holds a metric to a value.
func (s *sidecar) counts(t testing.TB, name string, want float64) {
	t.Helper()
	if got := s.metric(t, name); got != want {
		t.Errorf("%s is %v, want %v", name, got, want)
	}
}

// repaired waits until both journals are empty, and holds the causes of s to what is given; of the others there was none.
func (s *sidecar) repaired(t testing.TB, w *world, want map[string]int64) {
	t.Helper()
	w.journalEmpty()
	w.until("the sidecar has seen that", func() bool {
		j := s.srv.Figures().Journal
		return j.RedisStale == 0 && j.StoreStale == 0
	})
	for cause, n := range s.srv.Figures().Journal.Repairs {
		if n != want[cause] {
			t.Errorf("repairs because of %s: %d, want %d", cause, n, want[cause])
		}
		s.counts(t, `journal_repairs_total{cause="`+cause+`"}`, float64(want[cause]))
		delete(want, cause)
	}
	if len(want) > 0 {
		t.Errorf("no such causes: %v", want)
	}
	for _, name := range []string{"redis_stale", "store_stale"} {
		s.counts(t, `journal_entries{journal="`+name+`"}`, 0)
		s.counts(t, `journal_oldest_seconds{journal="`+name+`"}`, 0)
	}
}

// A write that Redis missed stands in Postgres's journal and grows older until it is repaired.
func TestCountsWhatRedisMissed(t *testing.T) {
	w := newWorld(t)
	link := testenv.NewLink(t, w.redis.Addr())
	s := w.start(sidecarOptions{redisURL: "redis://" + link.Addr() + "/0", routes: []policy.Route{route(policy.Phase1)}})
	c := s.dial(t)
	c.want("+OK", "SET", "k", "old")
	link.Cut()
	c.want("+OK", "MSET", "k", "new", "other", "x")
	s.counts(t, `journal_entries{journal="redis_stale"}`, 1)
	s.counts(t, `journal_entries{journal="store_stale"}`, 0)
	s.counts(t, `upstream_up{upstream="redis"}`, 0)
	s.counts(t, `circuit_opens_total{upstream="redis"}`, 1)
	age := func() float64 { return s.metric(t, `journal_oldest_seconds{journal="redis_stale"}`) }
	before := age()
	w.until("the entry grows older", func() bool { return age() > before })
	w.until("its age is Postgres's", func() bool { return s.srv.Figures().Journal.RedisStaleOldest > 1 }) // polls have read it since
	link.Heal()
	s.repaired(t, w, map[string]int64{"redis_stale_row": 2})
	if longest := s.metric(t, `journal_longest_seconds{journal="redis_stale"}`); longest <= 1 {
		t.Errorf("it had stood for %v s", longest)
	}
	s.counts(t, `journal_longest_seconds{journal="store_stale"}`, 0)
	s.counts(t, `upstream_up{upstream="redis"}`, 1)
}

// A write that Postgres missed stands in Redis's journal, also when it is written again meanwhile.
func TestCountsWhatTheStoreMissed(t *testing.T) {
	for phase, cause := range map[policy.Phase]string{policy.Phase1: "store_stale_copied", policy.Phase2: "store_stale_dropped"} {
		t.Run(phase.String(), func(t *testing.T) {
			pg := testenv.PostgresServer(t)
			w := newWorldWith(t, testenv.Redis(t), pg.URL("postgres"))
			one := w.sidecar(phase)
			a := one.dial(t)
			a.want("+OK", "SET", "k", "old")
			one.counts(t, `journal_entries{journal="store_stale"}`, 0)
			kill(t, pg)
			w.until("a write is accepted", func() bool { return a.do("SET", "k", "new") == "+OK" })
			one.counts(t, `journal_entries{journal="store_stale"}`, 1)
			age := func() float64 { return one.metric(t, `journal_oldest_seconds{journal="store_stale"}`) }
			w.until("the mark grows older", func() bool { return age() > 1 })
			a.want("+OK", "SET", "k", "newer")
			if got := age(); got <= 1 {
				t.Errorf("written again it is %v s old", got)
			}
			one.counts(t, `upstream_up{upstream="postgres"}`, 0)
			if err := pg.Restart(); err != nil {
				t.Fatal(err)
			}
			one.repaired(t, w, map[string]int64{cause: 1})
			if longest := one.metric(t, `journal_longest_seconds{journal="store_stale"}`); longest <= 1 {
				t.Errorf("it had stood for %v s", longest)
			}
			one.counts(t, `journal_longest_seconds{journal="redis_stale"}`, 0)
		})
	}
}

// What a sidecar that died has left in the journals, in the combinations that its own restart would not make.
func TestCountsWhatOthersLeft(t *testing.T) {
	w := newWorld(t)
	first := w.sidecar(policy.Phase1)
	first.dial(t).want("+OK", "MSET", "both", "row", "row", "x")
	first.stop()
	w.raw.want("+OK", "SET", "alone", "only Redis has it")
	w.raw.want(":2", "HSET", "cacheproxy:journal", "both", "dead.1", "mark", "dead.2")
	w.sql("INSERT INTO cacheproxy.journal (keys, routes) VALUES ('{both,row,alone}', '{all,all,all}') RETURNING id")
	s := w.sidecar(policy.Phase1)
	s.repaired(t, w, map[string]int64{"both_stale": 1, "redis_stale_row": 1, "redis_stale_no_row": 1, "store_stale_copied": 1})
	s.dial(t).want("row", "GET", "both")
	w.raw.want("only Redis has it", "GET", "alone")
}

// A Redis that was restarted with an old data set: what the store has changed since is counted, and nothing else.
func TestCountsARestart(t *testing.T) {
	w := newWorld(t, "--save", "100000 1000000", "--dbfilename", "old.rdb")
	s := w.sidecar(policy.Phase1)
	c := s.dial(t)
	c.want("+OK", "MSET", "a", "1", "b", "1")
	w.raw.want("+OK", "SAVE")
	if err := w.redis.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := w.redis.Restart(); err != nil {
		t.Fatal(err)
	}
	w.raw = dial(t, w.redis.Addr())
	w.until("redis is trusted again", func() bool {
		return s.srv.Figures().Journal.Repairs["restart"] > 0 && s.srv.Health().Redis.Status == "connected"
	})
	s.repaired(t, w, map[string]int64{"restart": 2})
}

// meantime is a store during whose next read, or before whose next COMMIT, the test does something.
type meantime struct {
	proxy.Store
	read, commit atomic.Pointer[func()]
}

func then(at *atomic.Pointer[func()]) {
	if f := at.Swap(nil); f != nil {
		(*f)()
	}
}

func (m *meantime) Load(ctx context.Context, refs []policy.Ref) ([]policy.Row, error) {
	rows, err := m.Store.Load(ctx, refs)
	then(&m.read)
	return rows, err
}

func (m *meantime) Begin(ctx context.Context, refs []policy.Ref) (proxy.Tx, error) {
	tx, err := m.Store.Begin(ctx, refs)
	if err != nil {
		return nil, err
	}
	return meantimeTx{tx, m}, nil
}

type meantimeTx struct {
	proxy.Tx
	m *meantime
}

func (t meantimeTx) Commit(ctx context.Context, changes []policy.Change, journal []policy.Ref, known []int64, rawOnly bool) (int64, error) {
	then(&t.m.commit)
	return t.Tx.Commit(ctx, changes, journal, known, rawOnly)
}

func TestCountsPromotionsAndLeases(t *testing.T) {
	w := newWorld(t)
	store := &meantime{}
	one := w.start(sidecarOptions{routes: []policy.Route{route(policy.Phase1)}, store: func(s proxy.Store) proxy.Store { store.Store = s; return store }})
	two := w.sidecar(policy.Phase1)
	a, b := one.dial(t), two.dial(t)
	a.want("+OK", "SET", "k", "old")
	w.raw.want(":1", "DEL", "k")
	a.want("old", "GET", "k")
	one.counts(t, `promotions_total{result="ok"}`, 1)
	one.counts(t, `promotions_total{result="refused"}`, 0)

	// Another sidecar writes the key between our read of its row and the promotion.
	w.raw.want(":1", "DEL", "k")
	write := func() { b.want("+OK", "SET", "k", "new") }
	store.read.Store(&write)
	a.want("old", "GET", "k") // it was asked for before the write was answered
	one.counts(t, `promotions_total{result="refused"}`, 1)
	one.counts(t, `promotions_total{result="ok"}`, 1)
	a.want("new", "GET", "k")

	// Redis refuses to store anything.
	w.raw.want(":1", "DEL", "k")
	full := func() { w.raw.want("+OK", "CONFIG", "SET", "maxmemory", "1") }
	store.read.Store(&full)
	a.want("new", "GET", "k")
	w.raw.want("+OK", "CONFIG", "SET", "maxmemory", "0")
	one.counts(t, `promotions_total{result="failed"}`, 1)
	one.counts(t, `promotions_total{result="refused"}`, 1)
	one.counts(t, `promotions_total{result="ok"}`, 1)

	// A lease that is gone when the write has committed, as if it had lapsed.
	one.counts(t, `lost_leases_total`, 0)
	lose := func() { w.raw.want(":1", "DEL", "cacheproxy:lease:k:{k}") }
	store.commit.Store(&lose)
	a.want("+OK", "SET", "k", "newer")
	one.counts(t, `lost_leases_total`, 1)
	b.want("newer", "GET", "k")
}

func TestCountsFences(t *testing.T) {
	w := newWorld(t)
	s := w.sidecar(policy.Phase1)
	c := s.dial(t)
	c.want("+OK", "SET", "k", "v")
	s.counts(t, `fences_total`, 0)
	c.want("+OK", "FLUSHALL")
	s.counts(t, `fences_total`, 1)
	c.want("+OK", "MULTI")
	c.want("+QUEUED", "FLUSHDB")
	c.want("[+OK]", "EXEC")
	s.counts(t, `fences_total`, 2)
	for i, phase := range []string{"phase2", "drain", "phase3", "drain", "phase2"} { // the last step back fences the route
		s.counts(t, `fences_total`, 2)
		c.want("+OK", "CACHEPROXY", "PHASE", "all", phase)
		if i == 2 {
			s.counts(t, `route_info{phase="phase3",route="all"}`, 1)
		}
	}
	s.counts(t, `fences_total`, 3)
	if err := w.redis.Kill(); err != nil {
		t.Fatal(err)
	}
	if got := c.do("FLUSHALL"); !strings.HasPrefix(got, "-UNAVAILABLE") {
		t.Errorf("FLUSHALL without Redis answers %q", got)
	}
	s.counts(t, `fences_total`, 3)
}

func TestCountsUncertainOutcomes(t *testing.T) {
	w := newWorld(t)
	both := route(policy.Phase1)
	both.WritePolicy = policy.WriteBothStores
	torn := &tornStore{meanwhile: func() {}}
	s := w.start(sidecarOptions{routes: []policy.Route{both}, store: func(s proxy.Store) proxy.Store { torn.Store = s; return torn }})
	c := s.dial(t)
	c.want("+OK", "SET", "k", "v")
	s.counts(t, `uncertain_total`, 0)
	s.counts(t, `refused_total{route="all"}`, 0)
	for i, cmd := range []string{"SET k new", "SETRANGE k 0 x"} {
		w.until("the store is up", func() bool { return s.srv.Health().Postgres.Status == "connected" })
		f := unknownNo
		torn.next.Store(&f)
		if got := c.do(strings.Fields(cmd)...); !strings.HasPrefix(got, "-UNCERTAIN") {
			t.Errorf("%s answers %q", cmd, got)
		}
		s.counts(t, `uncertain_total`, float64(i+1))
		s.counts(t, `refused_total{route="all"}`, float64(i+1))
	}
	s.counts(t, `writes_total{route="all"}`, 3)
}

// Redis remembers a number that Postgres has not drawn: it was drawn before a crash and never committed.
func TestCountsLiftedNumbers(t *testing.T) {
	w := newWorld(t)
	s := w.sidecar(policy.Phase1)
	c := s.dial(t)
	c.want("+OK", "SET", "k", "v")
	s.counts(t, `numbers_lifted_total`, 0)
	w.raw.want("+OK", "SET", "cacheproxy:lease:k:{k}", "1000000:0:", "PX", "60000")
	c.want("+OK", "SET", "k", "new")
	s.counts(t, `numbers_lifted_total`, 1)
	c.want("+OK", "SET", "k", "newer")
	s.counts(t, `numbers_lifted_total`, 1)
}

func TestCountsReadsAndClients(t *testing.T) {
	w := newWorld(t)
	r := route(policy.Phase1)
	r.Name, r.Match, r.NegativeTTL = "user", "user:*", 1000e9
	s := w.start(sidecarOptions{routes: []policy.Route{r}, change: func(c *proxy.ServerConfig) { c.MaxClients, c.Deny = 2, []string{"flushall"} }})
	c := s.dial(t)
	c.want("(nil)", "GET", "user:1")
	c.want("(nil)", "GET", "user:1")
	c.want("+OK", "SET", "user:2", "v")
	c.want("v", "GET", "user:2")
	w.raw.want(":1", "DEL", "user:2")
	c.want("v", "GET", "user:2")
	c.want("v", "GET", "user:2")
	c.want("(nil)", "GET", "elsewhere")
	if got := c.do("FLUSHALL"); !strings.HasPrefix(got, "-DENIED") {
		t.Errorf("FLUSHALL answers %q", got)
	}
	s.dial(t).want("+PONG", "PING")
	third := s.dial(t)
	if got, err := third.read(); err != nil || !strings.HasPrefix(got, "-ERR max number of clients") {
		t.Errorf("a third client is told %q, %v", got, err)
	}
	for name, want := range map[string]float64{
		`reads_total{outcome="hit",route="user",source="redis"}`:     2,
		`reads_total{outcome="hit",route="user",source="postgres"}`:  1,
		`reads_total{outcome="miss",route="user",source="none"}`:     1,
		`reads_total{outcome="negative",route="user",source="none"}`: 1,
		`writes_total{route="user"}`:                                 1,
		`commands_denied_total`:                                      1,
		`commands_unrouted_total`:                                    1, // GET elsewhere
		`commands_total`:                                             9,
		`downstream_connections`:                                     2,
		`downstream_connections_total{result="accepted"}`:            2,
		`downstream_connections_total{result="rejected"}`:            1,
		`draining`: 0,
	} {
		s.counts(t, name, want)
	}
	if p := s.srv.Figures().Performance; p.CacheMisses != 2 || p.RedisHits != 2 || p.JSONBHits != 1 {
		t.Errorf("%+v", p)
	}
}

// docs/metrics.md names every field of our section of INFO.
func TestInfoIsDocumented(t *testing.T) {
	doc, err := os.ReadFile("../docs/metrics.md")
	if err != nil {
		t.Fatal(err)
	}
	w := newWorld(t)
	_, text := infoReply(t, w.sidecar(policy.Phase1).dial(t), "cacheproxy")
	for _, name := range names(text) {
		if !strings.Contains(string(doc), "`"+name+"`") && !strings.HasPrefix(name, "journal_repairs_") {
			t.Errorf("%s is not there", name)
		}
		if cause, ok := strings.CutPrefix(name, "journal_repairs_"); ok && !strings.Contains(string(doc), "\n| `"+cause+"` |") {
			t.Errorf("the cause %s is not there", cause)
		}
	}
}
