package proxy_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"cacheproxy/internal/testenv"
	"cacheproxy/policy"
	"cacheproxy/proxy"
)

// Meetings of events that the model has found (test/model), each on real servers. What cannot be waited for is done by hand: the test writes into a store what
// another sidecar would.

// stepped starts a sidecar whose messages to Redis the test can stop at.
func (w *world) stepped(phase policy.Phase, change func(*sidecarOptions)) (*sidecar, *testenv.Steps) {
	w.t.Helper()
	link := testenv.NewLink(w.t, w.redis.Addr())
	steps := testenv.NewSteps(link, nil)
	o := sidecarOptions{redisURL: "redis://" + link.Addr() + "/0", routes: []policy.Route{route(phase)}}
	if change != nil {
		change(&o)
	}
	return w.start(o), steps
}

// once calls f before the next step of that name.
func once(steps *testenv.Steps, name string, f func()) {
	var did atomic.Bool
	steps.At(func(s testenv.Step) bool {
		if s.Name == name && !s.Done && !did.Swap(true) {
			f()
		}
		return true
	})
}

// fenced is a store inside whose fences, when their part in Redis is done, the test does something.
type fenced struct {
	proxy.Store
	inside func()
}

func (f *fenced) Fence(ctx context.Context, scope string, during func(context.Context) error) error {
	return f.Store.Fence(ctx, scope, func(ctx context.Context) error {
		err := during(ctx)
		f.inside()
		return err
	})
}

// A reader misses between the two stores of a FLUSHALL: what it finds in the one must not come back into the other.
func TestFlushBesideAReader(t *testing.T) {
	for _, cmd := range []string{"FLUSHALL", "FLUSHDB ASYNC", "MULTI"} {
		t.Run(cmd, func(t *testing.T) {
			w := newWorld(t)
			store := &fenced{}
			one := w.start(sidecarOptions{routes: []policy.Route{route(policy.Phase1)}, store: func(s proxy.Store) proxy.Store { store.Store = s; return store }})
			a, b := one.dial(t), w.sidecar(policy.Phase1).dial(t)
			a.want("+OK", "SET", "k", "v")
			store.inside = func() { b.want("v", "GET", "k") } // FLUSHALL is not answered yet
			if cmd == "MULTI" {
				a.want("+OK", "MULTI")
				a.want("+QUEUED", "FLUSHALL")
				a.want("[+OK]", "EXEC")
			} else {
				a.want("+OK", strings.Fields(cmd)...)
			}
			w.raw.want(":0", "EXISTS", "k")
			b.want("(nil)", "GET", "k")
			a.want(":0", "EXISTS", "k")
			b.want("+OK", "SET", "k", "w") // and what closes is open again
			w.raw.want(":1", "DEL", "k")
			a.want("w", "GET", "k")
			w.raw.want("w", "GET", "k")
		})
	}
}

// turns is a relay to Redis that does what Redis does since 7.4: when a client has said FLUSHALL, others have their turn, which is what meet does, before
// Redis looks at what this client has sent behind it.
func turns(t *testing.T, addr string, meet func()) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	t.Cleanup(func() { ln.Close(); all.Wait() })
	flush := []byte("$8\r\nFLUSHALL\r\n")
	relay := func(client, server net.Conn) {
		defer server.Close()
		b := make([]byte, 1<<16)
		for {
			n, err := client.Read(b)
			if err != nil {
				return
			}
			first := b[:n]
			at := bytes.Index(first, flush)
			if at >= 0 && bytes.HasSuffix(first[:at], []byte("*1\r\n")) {
				first = first[:at+len(flush)]
			}
			server.Write(first) //nolint:errcheck // the next read fails
			if at >= 0 {
				meet()
			}
			server.Write(b[len(first):n]) //nolint:errcheck // the next read fails
		}
	}
	all.Go(func() {
		for {
			client, err := ln.Accept()
			if err != nil {
				return
			}
			server, err := net.Dial("tcp", addr)
			if err != nil {
				client.Close()
				continue
			}
			all.Go(func() { relay(client, server) })
			all.Go(func() { defer client.Close(); io.Copy(client, server) }) //nolint:errcheck // one of them has ended
		}
	})
	return ln.Addr().String()
}

// A reader takes its lease in a Redis that FLUSHALL has just emptied, and holds it until FLUSHALL has been answered.
func TestFlushIsOneStep(t *testing.T) {
	w := newWorld(t)
	b, steps := w.stepped(policy.Phase1, func(o *sidecarOptions) {
		o.change = func(cfg *proxy.ServerConfig) { cfg.Redis.Timeout = time.Minute } // the test stops it for as long as a fence takes
	})
	reader := b.dial(t)
	answered, promotes, release := make(chan string, 1), make(chan bool), make(chan bool)
	raw := dial(t, w.redis.Addr()) // meet runs in a goroutine of the relay's
	addr := turns(t, w.redis.Addr(), func() {
		w.until("redis is empty", func() bool { return raw.do("EXISTS", "k") == ":0" })
		once(steps, "promote", func() { close(promotes); <-release })
		reader.send("GET", "k")
		go func() { answered <- reader.reply() }()
		select {
		case <-promotes:
		case got := <-answered: // it has no lease, and nothing to promote
			answered <- got
		}
	})
	a := w.start(sidecarOptions{redisURL: "redis://" + addr + "/0", routes: []policy.Route{route(policy.Phase1)}}).dial(t)
	a.want("+OK", "SET", "k", "v")
	a.want("+OK", "FLUSHALL")
	close(release)
	<-answered // "v" or nil: they ran at the same time
	w.raw.want(":0", "EXISTS", "k")
	reader.want("(nil)", "GET", "k")
	a.want("(nil)", "GET", "k")
}

// Redis has no memory left: FLUSHALL is how one gets it back. In a transaction Redis itself refuses it.
func TestFlushWithoutMemory(t *testing.T) {
	for _, cmd := range []string{"FLUSHALL", "FLUSHALL SYNC", "FLUSHDB ASYNC", "SWAPDB 0 1"} {
		t.Run(cmd, func(t *testing.T) {
			w := newWorld(t)
			c := w.sidecar(policy.Phase1).dial(t)
			c.want("+OK", "SET", "k", "v")
			w.raw.want("+OK", "CONFIG", "SET", "maxmemory", "1")
			for _, conn := range []*conn{w.raw, c} {
				conn.want("+OK", "MULTI")
				if got := conn.do(strings.Fields(cmd)...); !strings.HasPrefix(got, "-OOM") {
					t.Errorf("%s is queued: %q", cmd, got)
				}
				if got := conn.do("EXEC"); !strings.HasPrefix(got, "-EXECABORT") {
					t.Errorf("EXEC answers %q", got)
				}
			}
			c.want("v", "GET", "k")
			c.want("+OK", strings.Fields(cmd)...)
			w.raw.want(":0", "EXISTS", "cacheproxy:closed")
			w.raw.want("+OK", "CONFIG", "SET", "maxmemory", "0")
			c.want("(nil)", "GET", "k")
		})
	}
}

// FLUSHALL answers with Redis's own words, also where they are a refusal.
func TestFlushInRedissWords(t *testing.T) {
	w := newWorld(t)
	c := w.sidecar(policy.Phase1).dial(t)
	c.want("+OK", "SET", "k", "v")
	for _, cmd := range []string{"FLUSHALL NOW", "FLUSHDB a b", "SWAPDB 0", "SWAPDB 0 1000", "SWAPDB x 1"} {
		if got, want := c.do(strings.Fields(cmd)...), w.raw.do(strings.Fields(cmd)...); got != want {
			t.Errorf("%s: %q, and Redis says %q", cmd, got, want)
		}
	}
	c.want("v", "GET", "k")
	w.raw.want("v", "GET", "k")
}

// phase3 tells the store nothing, so a sidecar in drain must not begin from a row.
func TestDrainBesidePhase3(t *testing.T) {
	w := newWorld(t)
	one := w.sidecar(policy.Phase1)
	c := one.dial(t)
	keys := []string{"incr", "getset", "append", "setrange", "multi"}
	for _, k := range keys {
		c.want("+OK", "SET", k, "7")
	}
	one.stop()
	drain, three := w.sidecar(policy.Drain).dial(t), w.sidecar(policy.Phase3).dial(t)
	for _, k := range keys {
		three.want("+OK", "SET", k, "2")
	}
	drain.want(":3", "INCR", "incr")
	drain.want("2", "GETSET", "getset", "3")
	drain.want(":2", "APPEND", "append", "!")
	drain.want(":1", "SETRANGE", "setrange", "0", "3")
	drain.want("+OK", "MULTI")
	drain.want("+QUEUED", "INCR", "multi")
	drain.want("[:3]", "EXEC")
	for k, want := range map[string]string{"incr": "3", "getset": "3", "append": "2!", "setrange": "3", "multi": "3"} {
		three.want(want, "GET", k)
		if got := w.sql("SELECT count(*) FROM cacheproxy.entries WHERE key = $1", k); got != "0" {
			t.Errorf("the row of %s is still there", k)
		}
	}
}

// polled is a store whose polls, and their repairs, the test holds up.
type polled struct {
	proxy.Store
	poll, lock atomic.Pointer[func() error]
	begin      atomic.Pointer[atomic.Bool]     // set when somebody begins
	last       atomic.Pointer[proxy.StorePoll] // what polls answer, if it is not nil
}

func (p *polled) Begin(ctx context.Context, refs []policy.Ref) (proxy.Tx, error) {
	if b := p.begin.Load(); b != nil {
		b.Store(true)
	}
	return p.Store.Begin(ctx, refs)
}

func (p *polled) Poll(ctx context.Context, after int64) (proxy.StorePoll, error) {
	if f := p.poll.Load(); f != nil {
		if err := (*f)(); err != nil {
			return proxy.StorePoll{}, err
		}
	}
	if last := p.last.Load(); last != nil {
		return *last, nil
	}
	return p.Store.Poll(ctx, after)
}

func (p *polled) Lock(ctx context.Context, refs []policy.Ref) (proxy.Tx, error) {
	if f := p.lock.Load(); f != nil {
		if err := (*f)(); err != nil {
			return nil, err
		}
	}
	return p.Store.Lock(ctx, refs)
}

// control is the id of the control connection, "" without one.
func control(raw *conn) (id string) {
	for line := range strings.SplitSeq(raw.do("CLIENT", "LIST"), "\n") {
		if strings.Contains(line, "name=cacheproxy-control") {
			id, _, _ = strings.Cut(strings.TrimPrefix(line, "id="), " ")
		}
	}
	return id
}

// A reader waits for another's lease, and then for the key lock. Meanwhile Redis is lost, and another one is there that has not been verified.
func TestWaitingReaderAsksNoUnverifiedRedis(t *testing.T) {
	w := newWorld(t)
	store := &polled{}
	var locking atomic.Bool
	s := w.start(sidecarOptions{routes: []policy.Route{route(policy.Phase1)}, store: func(s proxy.Store) proxy.Store { store.Store = s; return store }})
	c := s.dial(t)
	w.raw.want("+OK", "SET", "cacheproxy:lease:k:{k}", "1:99999999999999:wother", "PX", "60000")
	tx := lockKey(t, w, "k")
	store.begin.Store(&locking)
	c.send("GET", "k")
	w.until("the reader wants the lock", locking.Load)
	release := make(chan struct{})
	hold := func() error { <-release; return nil }
	store.poll.Store(&hold)
	was := control(w.raw)
	w.raw.do("CLIENT", "KILL", "ID", was)
	w.until("there is another control connection", func() bool { now := control(w.raw); return now != "" && now != was })
	w.raw.want("+OK", "SET", "k", "old") // a memory of before
	tx.Rollback()
	if got := c.reply(); got != "(nil)" {
		t.Errorf("the reader was told %q", got)
	}
	store.poll.Store(nil)
	close(release)
}

// A mark of this sidecar was struck by another's repair, and then Redis lost its journal and the key. The mark must not come back.
func TestStruckMarkStaysAway(t *testing.T) {
	pg := testenv.PostgresServer(t)
	if err := pg.CreateDatabase(t.Context(), "app"); err != nil {
		t.Fatal(err)
	}
	w := newWorldWith(t, testenv.Redis(t), pg.URL("app"))
	link := testenv.NewLink(t, pg.Addr())
	a := w.start(sidecarOptions{pgURL: pg.URLVia(link.Addr(), "app"), routes: []policy.Route{route(policy.Phase1)}})
	b := w.sidecar(policy.Phase1)
	ac, bc := a.dial(t), b.dial(t)
	ac.want("+OK", "SET", "k", "old")
	link.Cut()
	w.until("the outage of postgres is seen", func() bool { ac.do("SET", "probe", "1"); return a.srv.Health().Postgres.Status == "down" })
	ac.want("+OK", "SET", "k", "new")
	w.until("the other has repaired it", func() bool { return w.raw.do("HLEN", "cacheproxy:journal") == ":1" })
	w.raw.want(":1", "DEL", "k")
	w.raw.want(":1", "DEL", "cacheproxy:journal")
	link.Heal()
	w.until("postgres is seen again", func() bool { return a.srv.Health().Postgres.Status == "connected" })
	for range 50 {
		bc.want("new", "GET", "k")
		ac.want("new", "GET", "k")
		w.raw.do("DEL", "k")
		time.Sleep(5 * time.Millisecond)
	}
}

// A sidecar that is cut off from Postgres computes from what Redis has of a key; meanwhile another writes it and deletes it again. The value is what it was, and
// the key is not.
func TestWriteWithoutPostgresComparesMoreThanTheValue(t *testing.T) {
	pg := testenv.PostgresServer(t)
	if err := pg.CreateDatabase(t.Context(), "app"); err != nil {
		t.Fatal(err)
	}
	w := newWorldWith(t, testenv.Redis(t), pg.URL("app"))
	link := testenv.NewLink(t, pg.Addr())
	a, steps := w.stepped(policy.Phase1, func(o *sidecarOptions) {
		o.pgURL = pg.URLVia(link.Addr(), "app")
		o.change = func(cfg *proxy.ServerConfig) { cfg.Redis.Timeout = time.Minute } // the test stops it for as long as a repair takes
	})
	b := w.sidecar(policy.Phase1).dial(t)
	c := a.dial(t)
	c.want("+OK", "SET", "k", "5")
	link.Cut()
	w.until("the outage of postgres is seen", func() bool { c.do("SET", "probe", "1"); return a.srv.Health().Postgres.Status == "down" })
	once(steps, "write", func() {
		b.want(":6", "INCR", "k")
		b.want(":5", "DECR", "k")
		w.raw.want("5", "GET", "k")
	})
	before := w.raw.do("GET", "cacheproxy:lease:k:{k}")
	c.want(":6", "INCR", "k")
	steps.At(nil)
	b.want("6", "GET", "k")
	if before == w.raw.do("GET", "cacheproxy:lease:k:{k}") {
		t.Error("nobody wrote in between")
	}

	// It was marked as deleted when it was read; the other has repaired, written and deleted it since.
	w.until("the other has repaired it", func() bool { return w.raw.do("HLEN", "cacheproxy:journal") == ":1" })
	c.want(":1", "DEL", "k")
	raced := false
	once(steps, "write", func() {
		w.until("the other has repaired it", func() bool { return w.raw.do("HLEN", "cacheproxy:journal") == ":1" })
		b.want("+OK", "SET", "k", "9")
		b.want(":1", "DEL", "k")
		raced = true
	})
	got := c.do("INCR", "k")
	steps.At(nil)
	if !raced || !strings.HasPrefix(got, "-UNAVAILABLE the store may hold the key") {
		t.Errorf("raced %t, answered %q: with Postgres away nobody can tell what an unmarked key holds", raced, got)
	}
}

// The repair of a mark finds a row that another sidecar, cut off from Redis, has committed with an entry since the last poll.
func TestRepairOfAMarkLooksForEntries(t *testing.T) {
	w := newWorld(t)
	store := &polled{}
	b := w.start(sidecarOptions{routes: []policy.Route{route(policy.Phase1)}, store: func(s proxy.Store) proxy.Store { store.Store = s; return store }})
	link := testenv.NewLink(t, w.redis.Addr())
	lonely := &polled{}
	a := w.start(sidecarOptions{redisURL: "redis://" + link.Addr() + "/0", routes: []policy.Route{route(policy.Phase1)},
		store: func(s proxy.Store) proxy.Store { lonely.Store = s; return lonely }})
	ac, bc := a.dial(t), b.dial(t)
	ac.want("+OK", "SET", "k", "old")
	link.Cut()
	w.until("the outage of redis is seen", func() bool { ac.do("SET", "probe", "1"); return a.srv.Health().Redis.Status != "connected" })
	w.until("the entry for the probe is repaired", func() bool { return w.sql("SELECT count(*) FROM cacheproxy.journal") == "0" })
	var met atomic.Bool
	raw := dial(t, w.redis.Addr()) // the hook runs in a goroutine of the sidecar's
	meet := func() error {
		if raw.do("HEXISTS", "cacheproxy:journal", "k") == ":1" && !met.Swap(true) {
			ac.want("+OK", "SET", "k", "new")
		}
		return nil
	}
	store.lock.Store(&meet)
	w.raw.want("+OK", "SET", "k", "marked")
	w.raw.want(":1", "HSET", "cacheproxy:journal", "k", "other.1")
	w.until("both journals are empty", func() bool {
		return met.Load() && w.raw.do("HLEN", "cacheproxy:journal") == ":1" && w.sql("SELECT count(*) FROM cacheproxy.journal") == "0"
	})
	bc.want("new", "GET", "k")
	if got := w.stored("k"); got != "new" {
		t.Errorf("the row is %q", got)
	}
}

// A sidecar avoids a copy in Redis because of an entry that has been struck since its last poll, while a write without Postgres stands there, marked.
func TestAvoidedCopyMayBeMarked(t *testing.T) {
	w := newWorld(t)
	store := &polled{}
	s := w.start(sidecarOptions{routes: []policy.Route{route(policy.Phase1)}, store: func(s proxy.Store) proxy.Store { store.Store = s; return store }})
	c := s.dial(t)
	c.want("+OK", "SET", "k", "old")
	fail := func() error { return errors.New("not now") }
	store.lock.Store(&fail) // it repairs nothing
	store.last.Store(&proxy.StorePoll{Now: time.Now(), Intents: []proxy.Intent{{ID: 1 << 40, Refs: []policy.Ref{{Route: "all", Key: "k"}}}}})
	w.until("it knows the entry", func() bool { return s.srv.Stats(t.Context()).Journal.RedisStale > 0 })
	w.raw.want("+OK", "SET", "k", "new")
	w.raw.want(":1", "HSET", "cacheproxy:journal", "k", "other.1")
	time.AfterFunc(100*time.Millisecond, func() { store.last.Store(nil) })
	c.want("new", "GET", "k")
	store.lock.Store(nil)
}

// Both journals name one of two keys that are asked for together, and the one in Postgres cannot be asked what it says now. That is nothing to the other key.
func TestMarkedKeyIsNothingToOthers(t *testing.T) {
	w := newWorld(t)
	store := &polled{}
	s := w.start(sidecarOptions{routes: []policy.Route{route(policy.Phase1)}, store: func(s proxy.Store) proxy.Store { store.Store = s; return store }})
	c := s.dial(t)
	c.want("+OK", "MSET", "k", "old", "other", "v")
	fail := func() error { return errors.New("not now") }
	store.lock.Store(&fail) // it repairs nothing
	store.last.Store(&proxy.StorePoll{Now: time.Now(), Intents: []proxy.Intent{{ID: 1 << 40, Refs: []policy.Ref{{Route: "all", Key: "k"}, {Route: "all", Key: "other"}}}}})
	w.until("it knows the entry", func() bool { return s.srv.Stats(t.Context()).Journal.RedisStale > 0 })
	w.raw.want(":1", "HSET", "cacheproxy:journal", "k", "other.1")
	store.poll.Store(&fail)
	c.want("v", "GET", "other")
	if _, err := c.Write([]byte("*2\r\n$3\r\nGET\r\n$1\r\nk\r\n*2\r\n$3\r\nGET\r\n$5\r\nother\r\n")); err != nil {
		t.Fatal(err)
	}
	if got := c.reply(); !strings.HasPrefix(got, "-UNAVAILABLE") {
		t.Errorf("the key that both journals name is answered with %q", got)
	}
	if got := c.reply(); got != "v" {
		t.Errorf("the other is answered with %q", got)
	}
	store.poll.Store(nil)
	store.last.Store(nil)
	store.lock.Store(nil)
}

// What a repair has deleted in Redis is lost in a failover, though the row is old: the strike has made it young.
func TestRepairedRowsAreYoung(t *testing.T) {
	w := newWorld(t, "--save", "100000 1000000", "--dbfilename", "old.rdb")
	s := w.sidecar(policy.Phase1)
	c := s.dial(t)
	c.want("+OK", "SET", "k", "old")
	w.sql(`UPDATE cacheproxy.entries SET raw = 'new', value = NULL, updated_at = clock_timestamp() - interval '30 minutes' WHERE key = 'k' RETURNING 1`)
	w.raw.want("+OK", "SAVE")
	w.sql(`INSERT INTO cacheproxy.journal (keys, routes) VALUES ('{k}', '{all}') RETURNING 1`)
	w.until("it is repaired", func() bool { return w.sql("SELECT count(*) FROM cacheproxy.journal") == "0" })
	c.want("new", "GET", "k")
	if err := w.redis.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := w.redis.Restart(); err != nil {
		t.Fatal(err)
	}
	w.raw = dial(t, w.redis.Addr())
	w.raw.want("old", "GET", "k")
	w.until("redis is trusted again", func() bool { return s.srv.Health().Redis.Status == "connected" })
	c.want("new", "GET", "k")
}

// strikes is a polled store before whose strikes the test does something.
type strikes struct {
	polled
	strike func()
}

func (s *strikes) Lock(ctx context.Context, refs []policy.Ref) (proxy.Tx, error) {
	tx, err := s.polled.Lock(ctx, refs)
	if err != nil {
		return nil, err
	}
	return strikesTx{tx, s}, nil
}

type strikesTx struct {
	proxy.Tx
	s *strikes
}

func (t strikesTx) Strike(ctx context.Context, ids []int64) ([]proxy.Intent, error) {
	t.s.strike()
	return t.Tx.Strike(ctx, ids)
}

// Redis is lost while a repair is under way, and what it deletes is deleted in another one: its entries stay.
func TestRepairThatLosesRedisStrikesNothing(t *testing.T) {
	w := newWorld(t)
	store := &strikes{}
	s := w.start(sidecarOptions{routes: []policy.Route{route(policy.Phase1)}, store: func(s proxy.Store) proxy.Store { store.Store = s; return store }})
	c := s.dial(t)
	c.want("+OK", "SET", "k", "v")
	release := make(chan struct{})
	hold := func() error { <-release; return nil }
	var lost atomic.Bool
	raw := dial(t, w.redis.Addr()) // the hook runs in a goroutine of the sidecar's
	store.strike = func() {
		if lost.Load() {
			return
		}
		store.poll.Store(&hold) // so that it is not verified
		was := control(raw)
		raw.do("CLIENT", "KILL", "ID", was)
		w.until("there is another control connection", func() bool { now := control(raw); return now != "" && now != was })
		lost.Store(true)
	}
	w.sql(`INSERT INTO cacheproxy.journal (keys, routes) VALUES ('{k}', '{all}') RETURNING 1`)
	w.until("redis is lost", lost.Load)
	w.until("the repair has deleted the key", func() bool { return w.raw.do("EXISTS", "k") == ":0" })
	time.Sleep(50 * time.Millisecond) // for the COMMIT that must not come
	if got := w.sql("SELECT count(*) FROM cacheproxy.journal"); got != "1" {
		t.Errorf("%s entries are left", got)
	}
	store.poll.Store(nil)
	close(release)
	w.until("it is repaired in the end", func() bool { return w.sql("SELECT count(*) FROM cacheproxy.journal") == "0" })
	c.want("v", "GET", "k")
}

// A row expires between its COMMIT and the entry that says that it could not be put into Redis.
func TestExpiredRowIsJournaled(t *testing.T) {
	w := newWorld(t)
	link := testenv.NewLink(t, w.redis.Addr())
	store := &meantime{}
	s := w.start(sidecarOptions{redisURL: "redis://" + link.Addr() + "/0", routes: []policy.Route{route(policy.Phase1)},
		store: func(s proxy.Store) proxy.Store { store.Store = s; return store }})
	c := s.dial(t)
	c.want("+OK", "SET", "k", "old")
	freeze := func() { link.Freeze() }
	store.commit.Store(&freeze)
	c.want("+OK", "SET", "k", "new", "PX", "20") // step 4 waits for 250 ms in vain
	if got := w.sql("SELECT count(*) FROM cacheproxy.journal WHERE 'k' = ANY (keys)"); got != "1" {
		t.Errorf("%s entries", got)
	}
	link.Heal()
	w.until("it is repaired", func() bool { return w.sql("SELECT count(*) FROM cacheproxy.journal") == "0" })
	c.want("(nil)", "GET", "k")
}

// A transaction that cannot be queued again is loaded, and before its EXEC a write without Postgres marks the key. What it leaves must not be taken out of Redis:
// absent and marked means deleted.
func TestExecLeavesAMarkedKeyInRedis(t *testing.T) {
	w := newWorld(t)
	s, steps := w.stepped(policy.Phase1, nil)
	c := s.dial(t)
	c.want("+OK", "SET", "k", "5")
	c.want("+OK", "WATCH", "other")
	c.want("+OK", "MULTI")
	c.want("+QUEUED", "INCR", "k")
	once(steps, "capture", func() {
		w.raw.want("+OK", "SET", "k", "7")
		w.raw.want(":1", "HSET", "cacheproxy:journal", "k", "other.1")
	})
	if got := c.do("EXEC"); !strings.HasPrefix(got, "-UNCERTAIN") {
		t.Errorf("EXEC answers %q", got)
	}
	steps.At(nil)
	c.want("8", "GET", "k")
	w.journalEmpty()
	c.want("8", "GET", "k")
	if got := w.stored("k"); got != "8" {
		t.Errorf("the row is %q", got)
	}
}

// Postgres forgot in a crash that it had given a number, and gives it again. Whatever a command says to Redis first must find that out.
func TestNumberIsGivenTwice(t *testing.T) {
	for _, phase := range []policy.Phase{policy.Phase1, policy.Phase2} {
		for _, cmd := range []string{"SET k 2", "INCR k", "SETRANGE k 0 2", "MULTI"} {
			t.Run(phase.String()+"/"+cmd, func(t *testing.T) {
				w := newWorld(t)
				c := w.sidecar(phase).dial(t)
				c.want("+OK", "SET", "k", "1")
				if cmd == "MULTI" {
					c.want("+OK", "MULTI")
					c.want("+QUEUED", "INCR", "k")
				}
				next := number(":"+w.sql("SELECT last_value FROM cacheproxy.fence")) + 1
				w.raw.want("+OK", "SET", "cacheproxy:lease:k:{k}", w.sql("SELECT $1::bigint || ':0:'", next), "PX", "60000")
				if cmd == "MULTI" {
					c.want("[:2]", "EXEC")
				} else if got := c.do(strings.Fields(cmd)...); strings.HasPrefix(got, "-") {
					t.Error(got)
				}
				c.want("2", "GET", "k")
				lease, _, _ := strings.Cut(w.raw.do("GET", "cacheproxy:lease:k:{k}"), ":")
				if got := number(":" + lease); got <= next {
					t.Errorf("the writer took number %d, which is another's", got)
				}
			})
		}
	}
}

// Both journals name a key: an entry "Redis is stale", and a mark that was struck and that a failover has brought back with what Redis had then. The row wins, also
// one that says that the key was deleted, and also where the last poll does not know the entry yet.
func TestBothJournalsNameAKey(t *testing.T) {
	const swap = `local v = redis.call('GET', KEYS[1]); redis.call('SET', KEYS[1], ARGV[1]); return v`
	w := newWorld(t)
	link := testenv.NewLink(t, w.redis.Addr())
	one := w.start(sidecarOptions{redisURL: "redis://" + link.Addr() + "/0", routes: []policy.Route{route(policy.Phase1)}})
	two := w.start(sidecarOptions{routes: []policy.Route{route(policy.Phase2)}, change: func(cfg *proxy.ServerConfig) { cfg.Poll = time.Minute }})
	a, b := one.dial(t), two.dial(t)
	a.want("+OK", "SET", "probe", "1")
	link.Cut()
	w.until("the outage of redis is seen", func() bool { a.do("GET", "probe"); return one.srv.Health().Redis.Status == "down" })
	left := map[string]string{}
	for _, c := range []struct {
		name         string
		live, gone   string // the answer
		after, ended string // what the key holds then
		run          func(k string) string
	}{
		{"DEL", ":1", ":0", "(nil)", "(nil)", func(k string) string { return b.do("DEL", k) }},
		{"GETSET", "new", "(nil)", "x", "x", func(k string) string { return b.do("GETSET", k, "x") }},
		{"SET NX", "(nil)", "+OK", "new", "x", func(k string) string { return b.do("SET", k, "x", "NX") }},
		{"EVAL", "new", "(nil)", "x", "x", func(k string) string { return b.do("EVAL", swap, "1", k, "x") }},
		{"MULTI", "[new +OK]", "[(nil) +OK]", "x", "x", func(k string) string {
			b.want("+OK", "MULTI")
			b.want("+QUEUED", "GET", k)
			b.want("+QUEUED", "SET", k, "x")
			return b.do("EXEC")
		}},
		{"MULTI that reads", "[new]", "[(nil)]", "new", "(nil)", func(k string) string {
			b.want("+OK", "MULTI")
			b.want("+QUEUED", "GET", k)
			return b.do("EXEC")
		}},
	} {
		for _, gone := range []bool{false, true} {
			k, want := c.name+" live", c.live
			if gone {
				k, want = c.name+" gone", c.gone
			}
			left[k] = map[bool]string{false: c.after, true: c.ended}[gone]
			a.want("+OK", "SET", k, "new")
			if gone {
				a.want(":1", "DEL", k)
			}
			w.raw.want("+OK", "SET", k, "old")
			w.raw.want(":1", "HSET", "cacheproxy:journal", k, "struck.1")
			if got := c.run(k); got != want {
				t.Errorf("%s: %q, want %q", k, got, want)
			}
		}
	}
	link.Heal()
	w.journalEmpty()
	for k, want := range left {
		a.want(want, "GET", k)
		b.want(want, "GET", k)
	}
}
