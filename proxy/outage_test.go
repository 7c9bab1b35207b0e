package proxy_test

import (
	"context"
	"fmt"
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

	"github.com/jackc/pgx/v5"
)

// What an outage of Redis must look like in phase1, however it comes about.
func TestRedisOutagePhase1(t *testing.T) {
	outages := map[string]struct{ begin, end func(w *world) error }{
		"paused": {func(w *world) error { return w.redis.Pause() }, func(w *world) error { return w.redis.Resume() }},
		"killed": {func(w *world) error { return w.redis.Kill() }, func(w *world) error { return w.redis.Restart() }},
	}
	for name, o := range outages {
		for _, writerDies := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/writer_dies=%t", name, writerDies), func(t *testing.T) {
				w := newWorld(t)
				one, two := w.sidecar(policy.Phase1), w.sidecar(policy.Phase1)
				a, b := one.dial(t), two.dial(t)
				a.want("+OK", "SET", "k", "old")
				a.want("+OK", "SET", "n", "1")
				b.want("old", "GET", "k")
				w.journalEmpty()
				if err := o.begin(w); err != nil {
					t.Fatal(err)
				}
				a.want("old", "GET", "k")
				a.want("+OK", "SET", "k", "new", "PX", "500000")
				a.want(":2", "INCR", "n")
				a.want(":1", "DEL", "k2", "k")
				a.want("+OK", "SET", "k", "newer")
				a.want("newer", "GET", "k")
				b.want("newer", "GET", "k")
				b.want(":3", "INCR", "n")
				if got := a.do("LPUSH", "list", "x"); !strings.HasPrefix(got, "-UNAVAILABLE") {
					t.Errorf("LPUSH during the outage: %q", got)
				}
				if writerDies {
					one.stop()
					a = b
				}
				if err := o.end(w); err != nil {
					t.Fatal(err)
				}
				w.until("redis is trusted again", func() bool { return two.srv.Health().Redis.Status == "connected" })
				a.want("newer", "GET", "k")
				b.want("3", "GET", "n")
				w.raw = dial(t, w.redis.Addr())
				w.journalEmpty()
				// A repair may have deleted what was promoted before it, and a sidecar that has not seen yet that an entry is struck promotes
				// nothing: some later read does.
				w.until("the values are promoted", func() bool {
					a.want("newer", "GET", "k")
					b.want("3", "GET", "n")
					return w.raw.do("GET", "k") == "newer" && w.raw.do("GET", "n") == "3"
				})
			})
		}
	}
}

func TestPostgresOutage(t *testing.T) {
	for _, phase := range []policy.Phase{policy.Phase1, policy.Phase2, policy.Drain} {
		t.Run(phase.String(), func(t *testing.T) {
			pg := testenv.PostgresServer(t)
			w := newWorldWith(t, testenv.Redis(t), pg.URL("postgres"))
			one, two := w.sidecar(phase), w.sidecar(phase)
			a, b := one.dial(t), two.dial(t)
			a.want("+OK", "SET", "k", "old")
			a.want("+OK", "SET", "gone", "x")
			if err := pg.Kill(); err != nil {
				t.Fatal(err)
			}
			a.want("old", "GET", "k")
			w.until("a write is accepted", func() bool { return a.do("SET", "k", "new") == "+OK" })
			a.want(":1", "DEL", "gone")
			a.want("new", "GET", "k")
			b.want("new", "GET", "k")
			b.want("(nil)", "GET", "gone")
			b.want(":6", "APPEND", "k", "est")
			b.want(":7", "SETRANGE", "k", "6", "!")
			if got := b.do("INCR", "unseen"); !strings.HasPrefix(got, "-UNAVAILABLE") {
				t.Errorf("INCR of a key that only the store might hold: %q", got)
			}
			one.stop() // the writer is gone before the store is back
			if err := pg.Restart(); err != nil {
				t.Fatal(err)
			}
			w.journalEmpty()
			b.want("newest!", "GET", "k")
			if phase == policy.Phase1 {
				if got := w.sql("SELECT convert_from(raw, 'UTF8') FROM cacheproxy.entries WHERE key = 'k'"); got != "newest!" {
					t.Errorf("the row holds %q", got)
				}
				w.raw.want(":1", "DEL", "k")
				b.want("newest!", "GET", "k")
			} else if got := w.sql("SELECT count(*) FROM cacheproxy.entries WHERE key IN ('k', 'gone')"); got != "0" {
				t.Errorf("%s rows are left", got)
			}
			b.want("(nil)", "GET", "gone")
		})
	}
}

// A Redis that comes back with an old data set must not serve it.
func TestRedisReturnsWithOldData(t *testing.T) {
	w := newWorld(t, "--save", "100000 1000000", "--dbfilename", "old.rdb")
	s := w.sidecar(policy.Phase1)
	c := s.dial(t)
	c.want("+OK", "SET", "k", "old")
	c.want("+OK", "SET", "deleted", "old")
	c.want("+OK", "SET", "short", "old")
	w.raw.want("+OK", "SAVE")
	c.want("+OK", "SET", "k", "new")
	c.want(":1", "DEL", "deleted")
	c.want("+OK", "SET", "short", "new", "PX", "1")
	if err := w.redis.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := w.redis.Restart(); err != nil {
		t.Fatal(err)
	}
	c.want("new", "GET", "k")
	c.want("(nil)", "GET", "deleted")
	c.want("(nil)", "GET", "short")
	w.until("redis is trusted again", func() bool { return s.srv.Health().Redis.Status == "connected" })
	c.want("new", "GET", "k")
	c.want("(nil)", "GET", "deleted")
	c.want("(nil)", "GET", "short")
	// A sidecar that starts only now finds a verified Redis too.
	w.sidecar(policy.Phase1).dial(t).want("new", "GET", "k")
}

// Redis is there but does not answer, and only for one sidecar: its link is frozen.
func TestBlackHole(t *testing.T) {
	w := newWorld(t)
	link := testenv.NewLink(t, w.redis.Addr())
	cut := w.start(sidecarOptions{redisURL: "redis://" + link.Addr() + "/0", routes: []policy.Route{route(policy.Phase1)}})
	well := w.sidecar(policy.Phase1)
	a, b := cut.dial(t), well.dial(t)
	a.want("+OK", "SET", "k", "1")
	b.want("1", "GET", "k")
	link.Freeze()
	a.want("+OK", "SET", "k", "2")
	a.want("2", "GET", "k")
	// Exception (a) of P3: within journal.poll the other sidecar learns of it.
	w.until("the other sidecar serves the new value", func() bool { return b.do("GET", "k") == "2" })
	b.want("+OK", "SET", "k", "3")
	a.want("3", "GET", "k")
	link.Heal()
	w.until("the link is trusted again", func() bool { return cut.srv.Health().Redis.Status == "connected" })
	w.journalEmpty()
	a.want("3", "GET", "k")
	w.raw.want("3", "GET", "k")
}

// Redis that answers, but with an error that stands for an outage.
func TestRedisRefusesWrites(t *testing.T) {
	counted := func(t *testing.T, s *sidecar, reason string) {
		t.Helper()
		if n := s.srv.Stats(t.Context()).Redis.Errors[reason]; n == 0 {
			t.Errorf("no error is counted as %s", reason)
		}
	}
	t.Run("oom", func(t *testing.T) {
		w := newWorld(t)
		s := w.sidecar(policy.Phase1)
		c := s.dial(t)
		c.want("+OK", "SET", "k", "old")
		w.journalEmpty()
		w.raw.want("+OK", "CONFIG", "SET", "maxmemory", "1")
		c.want("+OK", "SET", "k", "new")
		c.want("new", "GET", "k")
		c.want("+OK", "SET", "fresh", "x")
		c.want("x", "GET", "fresh")
		counted(t, s, "oom")
		w.raw.want("+OK", "CONFIG", "SET", "maxmemory", "0")
		w.journalEmpty()
		c.want("new", "GET", "k")
		w.until("redis has the new value", func() bool { c.do("GET", "k"); return w.raw.do("GET", "k") == "new" })
	})
	t.Run("misconf", func(t *testing.T) {
		w := newWorld(t)
		s := w.sidecar(policy.Phase1)
		c := s.dial(t)
		c.want("+OK", "SET", "k", "old")
		w.journalEmpty()
		w.raw.want("+OK", "CONFIG", "SET", "min-replicas-to-write", "1") // -NOREPLICAS: refuses writes as MISCONF does
		c.want("+OK", "SET", "k", "new")
		c.want("new", "GET", "k")
		counted(t, s, "misconf")
		w.raw.want("+OK", "CONFIG", "SET", "min-replicas-to-write", "0")
		w.journalEmpty()
		c.want("new", "GET", "k")
	})
	t.Run("readonly", func(t *testing.T) {
		w := newWorld(t)
		master := testenv.Redis(t)
		s := w.sidecar(policy.Phase1)
		c := s.dial(t)
		c.want("+OK", "SET", "k", "old")
		host, port, _ := strings.Cut(master.Addr(), ":")
		w.raw.want("+OK", "REPLICAOF", host, port)
		c.want("+OK", "SET", "k", "new")
		c.want("new", "GET", "k")
		counted(t, s, "readonly")
		w.raw.want("+OK", "REPLICAOF", "NO", "ONE")
		w.until("redis is trusted again", func() bool { return s.srv.Health().Redis.Status == "connected" })
		c.want("new", "GET", "k")
	})
	t.Run("phase2 passes redis's own words on", func(t *testing.T) {
		w := newWorld(t)
		c := w.sidecar(policy.Phase2).dial(t)
		c.want("+OK", "SET", "k", "old")
		w.raw.want("+OK", "CONFIG", "SET", "maxmemory", "1")
		if got := c.do("SET", "k", "new"); !strings.HasPrefix(got, "-OOM") {
			t.Errorf("got %q", got)
		}
		c.want("old", "GET", "k")
	})
}

func TestPhase2WithoutRedis(t *testing.T) {
	w := newWorld(t)
	one := w.sidecar(policy.Phase1)
	c := one.dial(t)
	c.want("+OK", "SET", "row", "v")
	c.want("+OK", "CACHEPROXY", "PHASE", "all", "phase2")
	c.want("+OK", "SET", "only-redis", "v")
	if err := w.redis.Kill(); err != nil {
		t.Fatal(err)
	}
	c.want("v", "GET", "row")
	c.want("(nil)", "GET", "only-redis") // on_unknown: miss
	for _, cmd := range []string{"SET row x", "DEL row", "INCR n", "LPUSH l x", "EVAL return(1) 1 row"} {
		if got := c.do(strings.Fields(cmd)...); !strings.HasPrefix(got, "-UNAVAILABLE") {
			t.Errorf("%s: %q", cmd, got)
		}
	}
	c.want("v", "GET", "row")
}

func TestPolicies(t *testing.T) {
	pg := testenv.PostgresServer(t)
	w := newWorldWith(t, testenv.Redis(t), pg.URL("postgres"))
	both, strict := route(policy.Phase1), route(policy.Phase2)
	both.Name, both.Match, both.WritePolicy = "both", "both:*", policy.WriteBothStores
	strict.Name, strict.Match, strict.OnUnknown = "strict", "strict:*", policy.UnknownError
	s := w.start(sidecarOptions{routes: []policy.Route{both, strict}})
	c := s.dial(t)
	c.want("+OK", "SET", "both:k", "1")
	c.want("+OK", "SET", "strict:k", "1")
	if err := w.redis.Kill(); err != nil {
		t.Fatal(err)
	}
	for _, cmd := range []string{"SET both:k 2", "GET strict:k"} {
		if got := c.do(strings.Fields(cmd)...); !strings.HasPrefix(got, "-UNAVAILABLE") {
			t.Errorf("without redis %s: %q", cmd, got)
		}
	}
	c.want("1", "GET", "both:k")
	if err := w.redis.Restart(); err != nil {
		t.Fatal(err)
	}
	w.until("redis is trusted again", func() bool { return s.srv.Health().Redis.Status == "connected" })
	if err := pg.Kill(); err != nil {
		t.Fatal(err)
	}
	for _, cmd := range []string{"SET both:k 2", "GET strict:absent"} {
		w.until("without postgres "+cmd+" is refused", func() bool { return strings.HasPrefix(c.do(strings.Fields(cmd)...), "-UNAVAILABLE") })
	}
}

// Many clients over three sidecars miss one key at once: one query.
func TestHerd(t *testing.T) {
	pg := testenv.PostgresServer(t)
	w := newWorldWith(t, testenv.Redis(t), pg.URL("postgres"))
	admin, err := pgx.Connect(context.Background(), w.pgURL)
	if err != nil {
		t.Fatal(err)
	}
	defer admin.Close(context.Background())
	if _, err := admin.Exec(context.Background(), "CREATE EXTENSION IF NOT EXISTS pg_stat_statements"); err != nil {
		t.Fatal(err)
	}
	var sidecars []*sidecar
	for range 3 {
		sidecars = append(sidecars, w.sidecar(policy.Phase1))
	}
	c := sidecars[0].dial(t)
	c.want("+OK", "SET", "cold", `{"a": 1}`)
	w.journalEmpty()
	var clients []*conn
	for i := range 500 {
		clients = append(clients, sidecars[i%3].dial(t))
	}
	for _, c := range clients {
		c.want("+PONG", "PING")
	}
	w.raw.want(":1", "DEL", "cold")
	if _, err := admin.Exec(context.Background(), "SELECT pg_stat_statements_reset()"); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	var wrong atomic.Int64
	for _, c := range clients {
		wg.Go(func() {
			if _, err := c.Write(encode("GET", "cold")); err != nil {
				wrong.Add(1)
				return
			}
			if got, err := c.read(); err != nil || got != `{"a": 1}` {
				wrong.Add(1)
			}
		})
	}
	wg.Wait()
	if n := wrong.Load(); n > 0 {
		t.Errorf("%d of 500 answers were wrong", n)
	}
	if got := w.sql("SELECT sum(calls)::text FROM pg_stat_statements WHERE query LIKE '%key = ANY%' AND query NOT LIKE '%DELETE%' AND query NOT LIKE '%FOR UPDATE%'"); got != "1" {
		t.Errorf("the store was asked %s times", got)
	}
}

func TestIncrThroughTwoSidecars(t *testing.T) {
	for _, phases := range [][2]policy.Phase{{policy.Phase0, policy.Phase1}, {policy.Phase1, policy.Phase1}, {policy.Phase1, policy.Phase2}, {policy.Phase2, policy.Phase2}, {policy.Phase2, policy.Drain}} {
		t.Run(phases[0].String()+"+"+phases[1].String(), func(t *testing.T) {
			w := newWorld(t)
			s := [2]*sidecar{w.sidecar(phases[0]), w.sidecar(phases[1])}
			const clients, each = 8, 40
			var wg sync.WaitGroup
			for i := range clients {
				c := s[i%2].dial(t)
				wg.Go(func() {
					for n := range each {
						cmd := []string{"INCR", "n"}
						if n%10 == 9 {
							cmd = []string{"EVAL", "return redis.call('INCR', KEYS[1])", "1", "n"}
						}
						c.Write(encode(cmd...))
						if got, err := c.read(); err != nil || got[0] != ':' {
							t.Errorf("%v: %q %v", cmd, got, err)
							return
						}
					}
				})
			}
			wg.Wait()
			want := fmt.Sprint(clients * each)
			w.journalEmpty()
			s[0].dial(t).want(want, "GET", "n")
			s[1].dial(t).want(want, "GET", "n")
			if phases[1] == policy.Phase1 {
				if got := w.sql("SELECT value::text FROM cacheproxy.entries WHERE key = 'n'"); got != want {
					t.Errorf("the row holds %s, want %s", got, want)
				}
			}
		})
	}
}

func TestNegativeTTL(t *testing.T) {
	w := newWorld(t)
	r := route(policy.Phase1)
	r.NegativeTTL = time.Minute
	s := w.start(sidecarOptions{routes: []policy.Route{r}})
	other := w.start(sidecarOptions{routes: []policy.Route{r}})
	c := s.dial(t)
	c.want("(nil)", "GET", "k")
	c.want("(nil)", "GET", "k")
	if got := s.srv.Stats(context.Background()).Routes[0].Negative; got != 1 {
		t.Errorf("%d answers were remembered, want 1", got)
	}
	other.dial(t).want("+OK", "SET", "k", "v")
	w.raw.do("DEL", "k")
	c.want("v", "GET", "k") // a write voids it, also another sidecar's and although Redis has lost the key
}

// The store is not reachable when the sidecar starts.
func TestStartWithoutStores(t *testing.T) {
	w := newWorld(t)
	s := w.start(sidecarOptions{redisURL: fmt.Sprintf("redis://127.0.0.1:%d/0", testenv.FreePort(t)), pgURL: fmt.Sprintf("postgres://127.0.0.1:%d/none", testenv.FreePort(t)),
		routes: []policy.Route{route(policy.Phase1)}, noWait: true})
	c := s.dial(t)
	for _, cmd := range []string{"GET k", "SET k v", "PING", "LPUSH l x"} {
		if got := c.do(strings.Fields(cmd)...); !strings.HasPrefix(got, "-UNAVAILABLE") {
			t.Errorf("%s: %q", cmd, got)
		}
	}
	h := s.srv.Health()
	if h.Redis.Status != "down" || h.Postgres.Status != "down" || h.Redis.Reason != "refused" {
		t.Errorf("health: %+v", h)
	}
}

// What a long outage of Postgres left is repaired whatever it weighs, and nothing is unreadable meanwhile.
func TestHeavyRepair(t *testing.T) {
	pg := testenv.PostgresServer(t)
	w := newWorldWith(t, testenv.Redis(t), pg.URL("postgres"))
	s := w.sidecar(policy.Phase1)
	c := s.dial(t)
	c.want("+OK", "SET", "warm", "1")
	if err := pg.Kill(); err != nil {
		t.Fatal(err)
	}
	big := strings.Repeat("x", 1<<20)
	w.until("a write is accepted", func() bool { return c.do("SET", "m0", big) == "+OK" })
	for i := range 60 {
		c.want("+OK", "SET", fmt.Sprint("m", i), big)
	}
	if err := pg.Restart(); err != nil {
		t.Fatal(err)
	}
	w.journalEmpty()
	if n := s.srv.Stats(t.Context()).Redis.Opens; n != 0 {
		t.Errorf("the breaker opened %d times", n)
	}
	if got := w.sql("SELECT count(*) FROM cacheproxy.entries WHERE key LIKE 'm%' AND length(raw) = 1048576"); got != "60" {
		t.Errorf("%s rows were repaired, want 60", got)
	}
}

// A writer that died between taking a lease and committing leaves its lease behind: the next read does not wait for it to lapse.
func TestDeadWritersLease(t *testing.T) {
	w := newWorld(t)
	c := w.sidecar(policy.Phase1).dial(t)
	w.raw.want("+OK", "SET", "cacheproxy:lease:k:{k}", "5:99999999999999:wdead", "PX", "60000")
	c.want("(nil)", "GET", "k")
	c.want("+OK", "SET", "k", "v")
	c.want("v", "GET", "k")
}

// A connection whose path is gone without a word is given up once Redis is seen to speak elsewhere.
func TestDeafLane(t *testing.T) {
	w := newWorld(t)
	link := testenv.NewLink(t, w.redis.Addr())
	s := w.start(sidecarOptions{redisURL: "redis://" + link.Addr() + "/0", routes: []policy.Route{route(policy.Phase1)}, change: func(c *proxy.ServerConfig) { c.Redis.Connections = 1 }})
	c := s.dial(t)
	c.want("+OK", "SET", "k", "v")
	c.want("+PONG", "PING")
	link.Freeze()
	c.send("PING")
	w.until("the outage is seen", func() bool { s.dial(t).do("GET", "k"); return s.srv.Health().Redis.Status == "down" })
	link.Heal()
	if got := c.reply(); got != "+PONG" && got[0] != '-' {
		t.Errorf("PING: %q", got)
	}
	w.until("PING is answered", func() bool { return s.dial(t).do("PING") == "+PONG" })
}

func TestKeysFromOtherDatabases(t *testing.T) {
	w := newWorld(t)
	c := w.sidecar(policy.Phase1).dial(t)
	c.want("+OK", "SET", "k", "v")
	c.want(":1", "COPY", "k", "k2", "DB", "1")
	c.want(":1", "MOVE", "k", "1")
	c.want("(nil)", "GET", "k")
	if got := w.sql("SELECT count(*) FROM cacheproxy.entries WHERE key IN ('k', 'k2') AND (value IS NOT NULL OR raw IS NOT NULL)"); got != "0" {
		t.Errorf("%s rows are left of a key that moved away", got)
	}
	c.want("+OK", "SET", "k", "v")
	c.want("+OK", "SELECT", "1")
	c.want("+OK", "SET", "k", "other")
	for _, cmd := range []string{"MOVE k 0", "COPY k k DB 0 REPLACE"} {
		if got := c.do(strings.Fields(cmd)...); !strings.HasPrefix(got, "-DENIED") {
			t.Errorf("%s: %q", cmd, got)
		}
	}
	c.want("+OK", "SELECT", "0")
	c.want("v", "GET", "k")
}

func kill(t *testing.T, pg *devserver.Postgres) {
	t.Helper()
	if err := pg.Kill(); err != nil {
		t.Fatal(err)
	}
}

// lockKey takes the lock of a key as a sidecar would that hangs in a write. It is held until Rollback.
func lockKey(t *testing.T, w *world, key string) *fallback.Tx {
	t.Helper()
	// The server ends an idle transaction after five seconds, which a busy machine may need for what follows.
	fs, err := fallback.New(fallback.Config{URL: w.pgURL + "&idle_in_transaction_session_timeout=0"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(fs.Close)
	tx, err := fs.Begin(context.Background(), []policy.Ref{{Route: "all", Key: key}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(tx.Rollback)
	return tx
}

// A key whose lock somebody keeps holds up its own writes, not those of other keys.
func TestLockedKeyHoldsUpNobodyElse(t *testing.T) {
	w := newWorld(t)
	s := w.sidecar(policy.Phase1)
	c, d := s.dial(t), s.dial(t)
	c.want("+OK", "SET", "hot", "1")
	tx := lockKey(t, w, "hot")
	for range 3 { // the first times the lock is waited for together with others; then the key is known
		c.send("SET", "hot", "2")
		for i := range 20 {
			d.want("+OK", "SET", fmt.Sprint("cool", i), "v")
		}
		if got := c.reply(); !strings.HasPrefix(got, "-UNAVAILABLE another sidecar keeps the key locked") {
			t.Errorf("the locked key: %q", got)
		}
	}
	tx.Rollback()
	w.until("the key can be written again", func() bool { return c.do("SET", "hot", "3") == "+OK" })
}
