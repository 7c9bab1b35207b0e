package proxy_test

import (
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"os"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"cacheproxy/fallback"
	"cacheproxy/internal/metrics"
	"cacheproxy/internal/testenv"
	"cacheproxy/policy"
	"cacheproxy/proxy"

	"github.com/jackc/pgx/v5"
)

// metric is what Prometheus would be told of one metric, named with its labels. Without labels it is the sum over all.
func (s *sidecar) metric(t testing.TB, name string) float64 {
	t.Helper()
	sum, found := 0.0, false
	for series, v := range s.scrape(t) {
		bare, _, _ := strings.Cut(series, "{")
		if series == "cacheproxy_"+name || bare == "cacheproxy_"+name {
			sum, found = sum+v, true
		}
	}
	if !found {
		t.Fatalf("no metric %s", name)
	}
	return sum
}

// scrape returns all metrics with their labels, and lets the watch over them see them.
func (s *sidecar) scrape(t testing.TB) map[string]float64 {
	t.Helper()
	w := httptest.NewRecorder()
	var program metrics.Process
	if s.db != nil {
		program.Pool, program.Waited = s.db.Connections, s.db.Waited
	}
	metrics.Handler(s.srv, program).ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/metrics", nil))
	all := map[string]float64{}
	for line := range strings.Lines(w.Body.String()) {
		if at := strings.LastIndexByte(line, ' '); at > 0 && strings.HasPrefix(line, "cacheproxy_") {
			v, err := strconv.ParseFloat(strings.TrimSpace(line[at:]), 64)
			if err != nil {
				t.Fatal(err)
			}
			all[line[:at]] = v
		}
	}
	watched.see(s, all)
	return all
}

// watch is over what metrics have moved: have had two values, in one sidecar.
type watch struct {
	mu    sync.Mutex
	first map[*sidecar]map[string]float64
	moved map[string]bool // by the metric's name and labels but the route's
}

var (
	watched    = &watch{first: map[*sidecar]map[string]float64{}, moved: map[string]bool{}}
	routeLabel = regexp.MustCompile(`route="[^"]*",?`)
)

func (w *watch) see(s *sidecar, all map[string]float64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.first[s] == nil {
		w.first[s] = map[string]float64{}
	}
	for series, v := range all {
		name := routeLabel.ReplaceAllString(series, "")
		before, seen := w.first[s][series]
		if !seen {
			w.first[s][series] = v
			before = 0 // which is what a counter begins with, and a state that is not there
		}
		w.moved[name] = w.moved[name] || v != before
	}
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

// rare are metrics that no test of this package provokes, and why.
var rare = map[string]string{
	`cacheproxy_build_info`:                                            "always 1, and of the program",
	`cacheproxy_redis_errors_total`:                                    "its reasons are words for outages; TestRedisRefusesWrites sees those that an alert names, here there are some",
	`cacheproxy_circuit_state{state="unused",upstream="redis"}`:        "Redis is always used",
	`cacheproxy_circuit_state{state="recovering",upstream="redis"}`:    "passes in a moment; TestMetrics of internal/metrics shows it",
	`cacheproxy_circuit_state{state="recovering",upstream="postgres"}`: "Postgres never is",
	`cacheproxy_commands_total{class="blocking",outcome="refused"}`:    "what is refused does not wait",
	`cacheproxy_draining`:                                              "TestSecondSignal of the program sees it",
}

// Every metric, with each of its labels, moves when what it counts is provoked: whoever adds one provokes it here.
func TestCounts(t *testing.T) {
	ran := 0
	tests := []struct {
		name string
		test func(*testing.T)
	}{
		{"what redis missed", countsWhatRedisMissed},
		{"what the store missed", countsWhatTheStoreMissed},
		{"what others left", countsWhatOthersLeft},
		{"a restart", countsARestart},
		{"promotions and leases", countsPromotionsAndLeases},
		{"fences", countsFences},
		{"uncertain outcomes", countsUncertainOutcomes},
		{"lifted numbers", countsLiftedNumbers},
		{"reads and clients", countsReadsAndClients},
		{"timings", countsTimings},
		{"mismatches", countsMismatches},
		{"what is not compared", countsWhatIsNotCompared},
		{"keys without a row", countsKeysWithoutARow},
		{"waits for a connection", countsWaits},
	}
	for _, c := range tests {
		t.Run(c.name, func(t *testing.T) {
			ran++
			c.test(t)
		})
	}
	if ran < len(tests) {
		return // some were asked for
	}
	watched.mu.Lock()
	defer watched.mu.Unlock()
	families := map[string]bool{}
	for series, moved := range watched.moved {
		family, _, _ := strings.Cut(series, "{")
		families[family] = families[family] || moved
		if !moved && rare[series] == "" && rare[family] == "" && !strings.HasSuffix(family, "_bucket") {
			t.Errorf("%s has not moved", series)
		}
	}
	for family, moved := range families {
		if !moved && rare[family] == "" {
			t.Errorf("%s has not moved", family)
		}
	}
}

// A write that Redis missed stands in Postgres's journal and grows older until it is repaired.
func countsWhatRedisMissed(t *testing.T) {
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
func countsWhatTheStoreMissed(t *testing.T) {
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
func countsWhatOthersLeft(t *testing.T) {
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
func countsARestart(t *testing.T) {
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

func countsPromotionsAndLeases(t *testing.T) {
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

// One read and one write of the store at a time: while the table is locked, those that come second wait for a connection.
func countsWaits(t *testing.T) {
	w := newWorld(t)
	s := w.start(sidecarOptions{routes: []policy.Route{route(policy.Phase1)}, storeSlots: 1, storeTimeout: 30 * time.Second})
	waits := func(cause string) (count, sum float64) {
		t.Helper()
		all, labels := s.scrape(t), `{cause="`+cause+`",upstream="postgres"}`
		return all["cacheproxy_upstream_pool_wait_seconds_count"+labels], all["cacheproxy_upstream_pool_wait_seconds_sum"+labels]
	}
	if count, sum := waits("connect"); count < 1 || sum <= 0 {
		t.Errorf("the first connections were waited for %v times, for %v seconds", count, sum)
	}
	s.metric(t, `upstream_pool_connections{state="active",upstream="postgres"}`)
	ctx := t.Context()
	other, err := pgx.Connect(ctx, w.pgURL)
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close(context.WithoutCancel(ctx))
	for _, c := range []struct {
		cause   string
		waiting func(fallback.Stats) (busy, waiting int)
		command func(key string) []string
		want    string
	}{
		{"max_reads", func(st fallback.Stats) (int, int) { return st.Reads.Busy, st.Reads.Waiting }, func(key string) []string { return []string{"GET", key} }, "(nil)"},
		{"max_writes", func(st fallback.Stats) (int, int) { return st.Writes.Busy, st.Writes.Waiting }, func(key string) []string { return []string{"SET", key, "v"} }, "+OK"},
	} {
		before, beforeSum := waits(c.cause)
		tx, err := other.Begin(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := tx.Exec(ctx, `LOCK TABLE cacheproxy.entries IN ACCESS EXCLUSIVE MODE`); err != nil {
			t.Fatal(err)
		}
		clients := []*conn{s.dial(t), s.dial(t)}
		for i, client := range clients {
			client.send(c.command(c.cause + strconv.Itoa(i))...)
			w.until("it is at Postgres, or waits to be", func() bool {
				busy, waiting := c.waiting(s.db.Stats())
				return busy == 1 && waiting == i
			})
		}
		if active := s.metric(t, `upstream_pool_connections{state="active",upstream="postgres"}`); active < 1 {
			t.Errorf("%v connections are active", active)
		}
		if err := tx.Rollback(ctx); err != nil {
			t.Fatal(err)
		}
		for _, client := range clients {
			if got, err := client.read(); err != nil || got != c.want {
				t.Errorf("%s: %q, %v", c.cause, got, err)
			}
		}
		if count, sum := waits(c.cause); count != before+1 || sum <= beforeSum {
			t.Errorf("%s: %v waits after %v, %v seconds after %v", c.cause, count, before, sum, beforeSum)
		}
	}
}

func countsFences(t *testing.T) {
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

func countsUncertainOutcomes(t *testing.T) {
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
func countsLiftedNumbers(t *testing.T) {
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

func countsReadsAndClients(t *testing.T) {
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
		`reads_total{outcome="hit",route="user",source="jsonb"}`:     1,
		`reads_total{outcome="miss",route="user",source="none"}`:     1,
		`reads_total{outcome="miss",route="user",source="negative"}`: 1,
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

// hasty is a store that answers one question too late, or not at all for there are too many. It may take one value for no JSON that is.
type hasty struct {
	proxy.Store
	fail  atomic.Pointer[error]
	picky atomic.Bool
}

var errTooMany, errNotJSON = errors.New("too many"), errors.New("no JSON")

func (h *hasty) Load(ctx context.Context, refs []policy.Ref) ([]policy.Row, error) {
	if err := h.fail.Swap(nil); err != nil {
		return nil, *err
	}
	return h.Store.Load(ctx, refs)
}

func (h *hasty) Begin(ctx context.Context, refs []policy.Ref) (proxy.Tx, error) {
	tx, err := h.Store.Begin(ctx, refs)
	if err != nil {
		return nil, err
	}
	return hastyTx{tx, h}, nil
}

type hastyTx struct {
	proxy.Tx
	h *hasty
}

func (t hastyTx) Commit(ctx context.Context, changes []policy.Change, journal []policy.Ref, known []int64, rawOnly bool) (int64, error) {
	if t.h.picky.Swap(false) {
		t.Rollback() // as after any COMMIT that fails
		return 0, errNotJSON
	}
	return t.Tx.Commit(ctx, changes, journal, known, rawOnly)
}

func (h *hasty) BadData(err error) bool { return errors.Is(err, errNotJSON) || h.Store.BadData(err) }

func (h *hasty) Overloaded(err error) bool {
	return errors.Is(err, errTooMany) || h.Store.Overloaded(err)
}

func (h *hasty) Unavailable(err error) bool {
	return !errors.Is(err, errTooMany) && h.Store.Unavailable(err)
}

// Each command is counted with its class and outcome, and each thing that is asked of a store with how long it took.
func countsTimings(t *testing.T) {
	w := newWorld(t)
	store := &hasty{}
	routes := []policy.Route{
		{Name: "user", Match: "user:*", Phase: policy.Phase1, TTL: time.Hour, NegativeTTL: 0},
		{Name: "two", Match: "two:*", Phase: policy.Phase2},
		{Name: "done", Match: "done:*", Phase: policy.Phase3},
	}
	s := w.start(sidecarOptions{routes: routes, store: func(s proxy.Store) proxy.Store { store.Store = s; return store },
		change: func(c *proxy.ServerConfig) { c.Deny = []string{"debug"} }})
	c := s.dial(t)
	before := s.scrape(t)
	rise := func(name string, want float64) {
		t.Helper()
		after := s.scrape(t)
		if got := after["cacheproxy_"+name] - before["cacheproxy_"+name]; got != want {
			t.Errorf("%s has risen by %v, want %v", name, got, want)
		}
	}
	commands := func(class, outcome string) string {
		return `commands_total{class="` + class + `",outcome="` + outcome + `"}`
	}
	type step struct {
		class, outcome, want string
		args                 []string
	}
	for _, st := range []step{
		{"write", "ok", "+OK", []string{"SET", "user:1", "v"}},
		{"read", "ok", "v", []string{"GET", "user:1"}},
		{"write", "error", "-ERR value is not an integer or out of range", []string{"INCR", "user:1"}},
		{"generic", "ok", ":2", []string{"SETRANGE", "user:1", "1", "x"}},
		{"generic", "ok", ":1", []string{"LPUSH", "user:list", "x"}},
		{"read", "error", "-WRONGTYPE Operation against a key holding the wrong kind of value", []string{"GET", "user:list"}},
		{"generic", "error", "-WRONGTYPE Operation against a key holding the wrong kind of value", []string{"HGET", "user:1", "f"}},
		{"plain", "ok", "+OK", []string{"SET", "elsewhere", "v"}},
		{"plain", "error", "-ERR value is not an integer or out of range", []string{"INCR", "elsewhere"}},
		{"plain", "ok", "+PONG", []string{"PING"}},
		{"write", "ok", "+OK", []string{"SET", "two:1", "v"}},
		{"other", "ok", "+OK", []string{"CLIENT", "SETNAME", "me"}},
		{"other", "error", "-ERR DB index is out of range", []string{"SELECT", "99"}},
		{"plain", "ok", ":1", []string{"LPUSH", "queue", "x"}},
		{"blocking", "ok", "[queue x]", []string{"BLPOP", "queue", "9"}},
		{"blocking", "error", "-WRONGTYPE Operation against a key holding the wrong kind of value", []string{"BLPOP", "user:1", "9"}},
	} {
		before = s.scrape(t)
		c.want(st.want, st.args...)
		rise(commands(st.class, st.outcome), 1)
		if st.class != "blocking" {
			rise(`command_duration_seconds_count{class="`+st.class+`"}`, 1)
		}
		sum := `cacheproxy_command_duration_seconds_sum{class="` + st.class + `"}`
		if after := s.scrape(t); after[sum] < before[sum] {
			t.Errorf("%v took a negative time", st.args)
		}
	}
	if _, timed := s.scrape(t)[`cacheproxy_command_duration_seconds_count{class="blocking"}`]; timed {
		t.Error("to wait for an event is timed")
	}
	before = s.scrape(t)
	if got := c.do("DEBUG", "JMAP"); !strings.HasPrefix(got, "-DENIED") {
		t.Errorf("DEBUG answers %q", got)
	}
	rise(commands("other", "refused"), 1)

	before = s.scrape(t)
	store.picky.Store(true)
	c.want("+OK", "SET", "user:odd", `{"a":1}`)
	rise(`stored_raw_only_total`, 1)

	// What Postgres is asked for.
	w.raw.want(":1", "DEL", "user:1")
	before = s.scrape(t)
	c.want("vx", "GET", "user:1")
	rise(`fallback_requests_total{result="found"}`, 1)
	rise(`fallback_duration_seconds_count`, 1)
	rise(`upstream_duration_seconds_count{operation="promote",upstream="redis"}`, 1)
	rise(`upstream_duration_seconds_count{operation="read",upstream="postgres"}`, 1)
	before = s.scrape(t)
	c.want("(nil)", "GET", "user:2")
	rise(`fallback_requests_total{result="absent"}`, 1)
	for result, err := range map[string]error{"shed": errTooMany, "timeout": context.DeadlineExceeded, "error": errors.New("of no kind")} {
		before = s.scrape(t)
		store.fail.Store(&err)
		c.do("GET", "user:2")
		rise(`fallback_requests_total{result="`+result+`"}`, 1)
		w.until("the store is up", func() bool { return s.srv.Health().Postgres.Status == "connected" })
	}
	if s.metric(t, `shed_total`) == 0 {
		t.Error("nothing was shed")
	}

	// Reads that Redis alone answers are counted as well.
	c.want("+OK", "SET", "done:1", "v")
	before = s.scrape(t)
	c.want("v", "GET", "done:1")
	c.want("(nil)", "GET", "done:2")
	c.want("[v (nil) (nil)]", "MGET", "done:1", "done:2", "done:3")
	c.want(":1", "EXISTS", "done:1", "done:2")
	rise(`reads_total{outcome="hit",route="done",source="redis"}`, 3)
	rise(`reads_total{outcome="miss",route="done",source="none"}`, 4)

	// What is no command.
	before = s.scrape(t)
	for _, first := range []string{"", "PING\r\n"} {
		bad := s.dial(t)
		if _, err := bad.Write([]byte(first + "*1\r\n!\r\n")); err != nil {
			t.Fatal(err)
		}
		if first != "" {
			if got, err := bad.read(); err != nil || got != "+PONG" {
				t.Errorf("PING answers %q, %v", got, err)
			}
		}
		bad.over()
	}
	rise(`downstream_protocol_errors_total`, 2)

	// A refusal of each class.
	if err := w.redis.Kill(); err != nil {
		t.Fatal(err)
	}
	for class, args := range map[string][]string{
		"read": {"GET", "done:1"}, "write": {"SET", "two:1", "v"}, "generic": {"SETRANGE", "user:1", "0", "x"}, "plain": {"GET", "elsewhere"},
		"blocking": {"BLPOP", "queue", "1"},
	} {
		before = s.scrape(t)
		if got := c.do(args...); !strings.HasPrefix(got, "-U") {
			t.Errorf("%v answers %q", args, got)
		}
		if class != "blocking" {
			rise(commands(class, "refused"), 1)
		}
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
