package proxy_test

import (
	"fmt"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"cacheproxy/internal/testenv"
	"cacheproxy/policy"
)

// traffic is clients that go on through an outage, each writing and reading a key of its own. Every read must answer what the
// client wrote last.
type traffic struct {
	stop chan struct{}
	wg   sync.WaitGroup
	keys []string
	last []int
}

func newTraffic(t *testing.T, clients int, sidecars ...*sidecar) *traffic {
	tr := &traffic{stop: make(chan struct{}), last: make([]int, clients)}
	for i := range clients {
		c, key := sidecars[i%len(sidecars)].dial(t), fmt.Sprint("traffic", i)
		tr.keys = append(tr.keys, key)
		tr.wg.Go(func() {
			for v := 1; ; v++ {
				select {
				case <-tr.stop:
					return
				default:
				}
				if got := c.do("SET", key, strconv.Itoa(v)); got != "+OK" {
					t.Errorf("SET %s: %q", key, got)
					return
				}
				tr.last[i] = v
				if got := c.do("GET", key); got != strconv.Itoa(v) {
					t.Errorf("GET %s: %q, want %d", key, got, v)
					return
				}
			}
		})
	}
	return tr
}

func (tr *traffic) end() {
	close(tr.stop)
	tr.wg.Wait()
}

// repairTime is what the repair after an outage may take. It needs a second at most for the next look at Redis and some milliseconds
// for the rest; a loaded machine with the race detector gets five.
const repairTime = 5 * time.Second

// However long an outage of Redis takes, its journal names each key once or twice, and it is empty soon after although the clients never
// pause.
func TestRepairUnderTraffic(t *testing.T) {
	set := func(w *world, name, value string) error {
		if got := w.raw.do("CONFIG", "SET", name, value); got != "+OK" {
			return fmt.Errorf("CONFIG SET %s: %s", name, got)
		}
		return nil
	}
	for name, o := range map[string]struct{ begin, end func(w *world) error }{
		"paused": {func(w *world) error { return w.redis.Pause() }, func(w *world) error { return w.redis.Resume() }},
		"killed": {func(w *world) error { return w.redis.Kill() }, func(w *world) error { return w.redis.Restart() }},
		"oom":    {func(w *world) error { return set(w, "maxmemory", "1") }, func(w *world) error { return set(w, "maxmemory", "0") }},
		"noreplicas": {func(w *world) error { return set(w, "min-replicas-to-write", "1") },
			func(w *world) error { return set(w, "min-replicas-to-write", "0") }},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			one, two := w.sidecar(policy.Phase1), w.sidecar(policy.Phase1)
			const clients = 6
			tr := newTraffic(t, clients, one, two)
			time.Sleep(200 * time.Millisecond) // the traffic comes to speed
			if err := o.begin(w); err != nil {
				t.Fatal(err)
			}
			most := 0
			for end := time.Now().Add(1500 * time.Millisecond); time.Now().Before(end); {
				n, _ := strconv.Atoi(w.sql("SELECT count(*) FROM cacheproxy.journal"))
				most = max(most, n)
			}
			if most > 2*clients { // a poll and a repair may come between the look at the journal and the COMMIT
				t.Errorf("the journal had %d entries for %d keys", most, clients)
			}
			if err := o.end(w); err != nil {
				t.Fatal(err)
			}
			began := time.Now()
			w.until("the journal is empty and both trust redis", func() bool {
				return w.sql("SELECT count(*) FROM cacheproxy.journal") == "0" &&
					one.srv.Health().Redis.Status == "connected" && two.srv.Health().Redis.Status == "connected" &&
					one.srv.Stats(t.Context()).Journal.RedisStale == 0 && two.srv.Stats(t.Context()).Journal.RedisStale == 0
			})
			if took := time.Since(began); took > repairTime {
				t.Errorf("the repair took %v", took)
			}
			tr.end()
			raw := dial(t, w.redis.Addr())
			for i, key := range tr.keys {
				want := strconv.Itoa(tr.last[i])
				for _, s := range []*sidecar{one, two} {
					s.dial(t).want(want, "GET", key)
				}
				raw.want(want, "GET", key)
			}
		})
	}
}

// More entries than a page of the journal, of as many keys: all are known when Redis is trusted, and repaired soon after.
func TestRepairOfManyKeys(t *testing.T) {
	const keys = 2500
	w := newWorld(t)
	one, two := w.sidecar(policy.Phase1), w.sidecar(policy.Phase1)
	c := one.dial(t)
	args := []string{"MSET"}
	for i := range keys {
		args = append(args, fmt.Sprint("m", i), "old")
	}
	c.want("+OK", args...)
	if err := w.redis.Pause(); err != nil {
		t.Fatal(err)
	}
	for _, s := range []*sidecar{one, two} { // one that has not noticed may miss the writes of others for a moment: exception (a)
		s.dial(t).want("old", "GET", "m0")
		w.until("the outage is seen", func() bool { return s.srv.Health().Redis.Status == "down" })
	}
	// What as many clients would leave, one entry each.
	w.sql("UPDATE cacheproxy.entries SET value = NULL, raw = 'new', updated_at = clock_timestamp() WHERE key LIKE 'm%' RETURNING key")
	w.sql("INSERT INTO cacheproxy.journal (keys, routes) SELECT ARRAY['m' || i], ARRAY['all'] FROM generate_series(0, $1) i RETURNING id", keys-1)
	if err := w.redis.Resume(); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	for _, s := range []*sidecar{one, two} {
		c := s.dial(t)
		w.until("redis is trusted", func() bool { return s.srv.Health().Redis.Status == "connected" })
		for i := 0; i < keys; i += 25 {
			c.want("new", "GET", fmt.Sprint("m", i))
		}
	}
	w.journalEmpty()
	if took := time.Since(began); took > repairTime {
		t.Errorf("the repair took %v", took)
	}
	if got := c.do("MGET", "m0", "m1", "m2499"); got != "[new new new]" {
		t.Errorf("after the repair: %s", got)
	}
}

// What a repair holds up is the key whose lock somebody keeps.
func TestRepairPassesOverALockedKey(t *testing.T) {
	w := newWorld(t)
	s := w.sidecar(policy.Phase1)
	c := s.dial(t)
	args := []string{"MSET"}
	for i := range 300 {
		args = append(args, fmt.Sprint("m", i), "v")
	}
	c.want("+OK", args...)
	tx := lockKey(t, w, "m7")
	w.sql("INSERT INTO cacheproxy.journal (keys, routes) SELECT ARRAY['m' || i], ARRAY['all'] FROM generate_series(0, 299) i RETURNING id")
	w.until("the others are repaired", func() bool {
		n, _ := strconv.Atoi(w.sql("SELECT count(*) FROM cacheproxy.journal"))
		return n <= 128
	})
	tx.Rollback()
	w.journalEmpty()
}

// A key that Redis holds a stale copy of cannot be written while Postgres is away: the row would win.
func TestBothStoresFailInTurn(t *testing.T) {
	pg := testenv.PostgresServer(t)
	w := newWorldWith(t, testenv.Redis(t), pg.URL("postgres"))
	s := w.sidecar(policy.Phase1)
	c := s.dial(t)
	c.want("+OK", "SET", "k", "old")
	w.raw.want("+OK", "CONFIG", "SET", "min-replicas-to-write", "1") // Redis is there, and takes no repair either
	c.want("+OK", "SET", "k", "new")
	kill(t, pg)
	w.until("the outage is seen", func() bool { c.do("GET", "other"); return s.srv.Health().Postgres.Status == "down" })
	w.raw.want("+OK", "CONFIG", "SET", "min-replicas-to-write", "0")
	for _, cmd := range []string{"SET k newer", "DEL k", "INCR k", "SETRANGE k 0 x"} {
		if got := c.do(strings.Fields(cmd)...); !strings.HasPrefix(got, "-UNAVAILABLE") {
			t.Errorf("%s: %q", cmd, got)
		}
	}
	c.want("+OK", "SET", "other", "v")
	if err := pg.Restart(); err != nil {
		t.Fatal(err)
	}
	w.until("postgres is back", func() bool { return s.srv.Health().Postgres.Status == "connected" })
	w.journalEmpty()
	c.want("new", "GET", "k")
	c.want("v", "GET", "other")
}
