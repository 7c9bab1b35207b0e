package proxy_test

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"cacheproxy/internal/testenv"
	"cacheproxy/policy"
)

// stored is what the store holds of a key.
func (w *world) stored(key string) string {
	w.t.Helper()
	return w.sql("SELECT coalesce(convert_from(raw, 'UTF8'), value::text, 'tombstone') FROM cacheproxy.entries WHERE key = $1", key)
}

// What EXEC changes is mirrored as the phase says, whatever the commands were and whoever looks.
func TestExecIsMirrored(t *testing.T) {
	for _, phase := range policy.Phases() {
		t.Run(phase.String(), func(t *testing.T) {
			w := newWorld(t)
			a, b := w.sidecar(phase), w.sidecar(phase)
			c, d := a.dial(t), b.dial(t)
			c.want("+OK", "SET", "old", "1")
			if phase.Rules().ReadsRedis && phase.Rules().ReadsStore {
				w.raw.do("DEL", "old") // evicted: phase1 has it in the row
			}
			c.want("+OK", "MULTI")
			for _, cmd := range []string{"SET k v EX 1000", "INCR n", "APPEND n 0", "RENAME n m", "SETBIT bits 7 1", "LPUSH list x", "SET gone 1", "DEL gone",
				"EVAL return(redis.call('INCRBY',KEYS[1],ARGV[1])) 1 m 5", "GET old", "GET m", "TTL k"} {
				c.want("+QUEUED", strings.Fields(cmd)...)
			}
			old := "1"
			if phase == policy.Phase2 {
				old = "(nil)" // Redis was the only holder, and has forgotten it
			}
			if got := c.do("EXEC"); got != "[+OK :1 :2 +OK :0 :1 +OK :1 :15 "+old+" 15 :1000]" {
				t.Errorf("EXEC: %q", got)
			}
			d.want("v", "GET", "k")
			d.want("15", "GET", "m")
			d.want("(nil)", "GET", "n")
			d.want("(nil)", "GET", "gone")
			d.want("\x01", "GET", "bits")
			d.want("[x]", "LRANGE", "list", "0", "-1")
			d.want(":16", "INCR", "m")
			c.want("16", "GET", "m")
			row := map[policy.WriteMode]string{policy.WriteStoreOnly: "v", policy.WriteBoth: "v"}[phase.Rules().Write]
			if row == "" {
				row = "no row"
			}
			if got := w.stored("k"); got != row {
				t.Errorf("the row of k: %q, want %q", got, row)
			}
			if phase.Rules().Write == policy.WriteBoth {
				for _, k := range []string{"k", "m", "bits"} {
					w.raw.do("DEL", k)
				}
				d.want("v", "GET", "k")
				c.want("16", "GET", "m")
			}
			if got := w.raw.do("HLEN", "cacheproxy:journal"); got > ":1" {
				t.Errorf("marks are left: %s", got)
			}
		})
	}
}

// A transaction is refused if a key that it watches was changed by anybody, through any sidecar, and only then.
func TestWatchOnRoutedKeys(t *testing.T) {
	pairs := [][2]policy.Phase{}
	for _, p := range policy.Phases() {
		pairs = append(pairs, [2]policy.Phase{p, p})
		if p > 0 {
			pairs = append(pairs, [2]policy.Phase{p - 1, p}, [2]policy.Phase{p, p - 1})
		}
	}
	for _, pair := range pairs {
		t.Run(pair[0].String()+" beside "+pair[1].String(), func(t *testing.T) {
			w := newWorld(t)
			c, d := w.sidecar(pair[0]).dial(t), w.sidecar(pair[1]).dial(t)
			for _, start := range []string{"there", "absent"} {
				for _, change := range []string{"", "SET k w", "DEL k", "INCR k", "SETRANGE k 0 9", "EXPIRE k 100", "GETSET k 2"} {
					d.do("DEL", "k")
					if start == "there" {
						d.want("+OK", "SET", "k", "1")
					}
					c.want("+OK", "WATCH", "k")
					before := c.do("GET", "k")
					touched := false
					if change != "" {
						reply := d.do(strings.Fields(change)...)
						touched = reply != ":0"
					}
					c.want("+OK", "MULTI")
					c.want("+QUEUED", "SET", "k", "mine")
					got := c.do("EXEC")
					switch {
					case touched && got != "(nil)":
						t.Errorf("k is %s (%s), %s: EXEC ran: %q", start, before, change, got)
					case !touched && got != "[+OK]":
						t.Errorf("k is %s (%s), %s: EXEC was refused: %q", start, before, change, got)
					}
					want := "mine"
					if touched {
						want = d.do("GET", "k")
					}
					c.want(want, "GET", "k")
				}
			}
			c.want("+OK", "WATCH", "k")
			d.want("+OK", "SET", "k", "w")
			c.want("+OK", "UNWATCH")
			c.want("+OK", "MULTI")
			c.want("+QUEUED", "GET", "k")
			c.want("[w]", "EXEC")
		})
	}
}

// Counting by WATCH, GET, MULTI, SET, EXEC through two sidecars loses nothing: the oldest use of transactions there is.
func TestOptimisticCounting(t *testing.T) {
	const clients, each = 6, 15
	for _, pair := range [][2]policy.Phase{{0, 0}, {0, 1}, {1, 1}, {1, 2}, {2, 2}, {2, 3}} {
		t.Run(pair[0].String()+" beside "+pair[1].String(), func(t *testing.T) {
			w := newWorld(t)
			ss := []*sidecar{w.sidecar(pair[0]), w.sidecar(pair[1])}
			var wg sync.WaitGroup
			for n := range clients {
				c := ss[n%2].dial(t)
				wg.Go(func() {
					for i := 0; i < each; {
						c.do("WATCH", "n")
						v := 0
						fmt.Sscan(c.do("GET", "n"), &v)
						c.do("MULTI")
						c.do("SET", "n", fmt.Sprint(v+1))
						c.do("INCR", "tries")
						switch got := c.do("EXEC"); {
						case strings.HasPrefix(got, "[+OK :"):
							i++
						case got != "(nil)":
							t.Errorf("EXEC: %q", got)
							return
						}
					}
				})
			}
			wg.Wait()
			for _, s := range ss {
				s.dial(t).want(fmt.Sprint(clients*each), "GET", "n")
				s.dial(t).want(fmt.Sprint(clients*each), "GET", "tries")
			}
		})
	}
}

// Keys of routes in different phases may meet in one transaction.
func TestExecOverSeveralPhases(t *testing.T) {
	w := newWorld(t)
	var routes []policy.Route
	for _, p := range policy.Phases() {
		routes = append(routes, policy.Route{Name: p.String(), Match: p.String() + ":*", Phase: p})
	}
	s := w.start(sidecarOptions{routes: routes})
	c, d := s.dial(t), s.dial(t)
	c.want("+OK", "WATCH", "phase0:n", "phase1:n", "phase2:n", "plain")
	c.want("+OK", "MULTI")
	for _, r := range routes {
		c.want("+QUEUED", "INCR", r.Name+":n")
	}
	c.want("+QUEUED", "INCR", "plain")
	c.want("+QUEUED", "BITOP", "OR", "phase1:or", "phase2:n", "phase0:n")
	c.want("[:1 :1 :1 :1 :1 :1 :1]", "EXEC")
	for key, row := range map[string]string{"phase0:n": "1", "phase1:n": "1", "phase1:or": "1", "phase2:n": "no row", "drain:n": "no row", "phase3:n": "no row"} {
		d.want("1", "GET", key)
		if got := w.stored(key); got != row {
			t.Errorf("the row of %s: %q, want %q", key, got, row)
		}
	}
	if got := w.raw.do("EXISTS", "phase0:n"); got != ":0" {
		t.Error("phase0 left a copy in Redis")
	}
	c.want(":1", "BITOP", "AND", "phase2:and", "phase1:n", "phase0:n", "plain")
}

// Transactions while a store is down: as the phase says, and never half.
func TestExecInOutages(t *testing.T) {
	w := newWorldWith(t, testenv.Redis(t), "")
	pg := testenv.PostgresServer(t)
	if err := pg.CreateDatabase(t.Context(), "app"); err != nil {
		t.Fatal(err)
	}
	link := testenv.NewLink(t, pg.Addr())
	w.pgURL = pg.URLVia(link.Addr(), "app")
	redisLink := testenv.NewLink(t, w.redis.Addr())
	s := w.start(sidecarOptions{redisURL: "redis://" + redisLink.Addr() + "/0", routes: []policy.Route{
		{Name: "one", Match: "one:*", Phase: policy.Phase1}, {Name: "strict", Match: "strict:*", Phase: policy.Phase1, WritePolicy: policy.WriteBothStores}, {Name: "two", Match: "two:*", Phase: policy.Phase2},
	}})
	c := s.dial(t)
	for _, k := range []string{"one:k", "two:k", "strict:k"} {
		c.want("+OK", "SET", k, "1")
	}
	exec := func(key string) string {
		c.do("MULTI")
		c.do("INCR", key)
		return c.do("EXEC")
	}
	link.Cut()
	w.until("the outage of postgres is seen", func() bool { c.do("SET", "one:probe", "1"); return s.srv.Health().Postgres.Status == "down" })
	if got := exec("one:k"); got != "[:2]" {
		t.Errorf("phase1 without postgres: %q", got)
	}
	if got := exec("two:k"); got != "[:2]" {
		t.Errorf("phase2 without postgres: %q", got)
	}
	if got := exec("strict:k"); !strings.HasPrefix(got, "-UNAVAILABLE") {
		t.Errorf("write_policy both without postgres: %q", got)
	}
	if got := exec("one:unknown"); !strings.HasPrefix(got, "-UNAVAILABLE the store may hold the key") {
		t.Errorf("a key that the store may hold: %q", got)
	}
	c.want("-ERR EXEC without MULTI", "EXEC")
	link.Heal()
	w.journalEmptyVia(pg.URL("app"))
	for key, want := range map[string]string{"one:k": "2", "two:k": "2", "strict:k": "1"} {
		c.want(want, "GET", key)
	}
	w.pgURL = pg.URL("app")
	if got := w.stored("one:k"); got != "2" {
		t.Errorf("the row after the repair: %q", got)
	}

	c.want("+OK", "MULTI")
	c.want("+QUEUED", "INCR", "one:k")
	redisLink.Freeze()
	if got := c.do("EXEC"); !strings.HasPrefix(got, "-UNAVAILABLE") {
		t.Errorf("EXEC while redis hangs: %q", got)
	}
	redisLink.Heal()
	w.until("redis is trusted again", func() bool { return s.srv.Health().Redis.Status == "connected" })
	c = s.dial(t)
	c.want("2", "GET", "one:k")
}

// journalEmptyVia is journalEmpty with another way to Postgres.
func (w *world) journalEmptyVia(url string) {
	w.t.Helper()
	before := w.pgURL
	w.pgURL = url
	w.journalEmpty()
	w.pgURL = before
}

// A transaction is refused as a whole, in Redis's words, and leaves nothing.
func TestExecRefused(t *testing.T) {
	w := newWorld(t)
	c := w.sidecar(policy.Phase1).dial(t)
	c.want("+OK", "SET", "k", "1")
	c.want("+OK", "MULTI")
	c.want("+QUEUED", "SET", "k", "2")
	c.want("-ERR wrong number of arguments for 'get' command", "GET")
	c.want("-EXECABORT Transaction discarded because of previous errors.", "EXEC")
	c.want("1", "GET", "k")
	c.want("+OK", "MULTI")
	c.want("+QUEUED", "SET", "k", "2")
	if got := c.do("CACHEPROXY", "STATS"); !strings.HasPrefix(got, "-DENIED") {
		t.Errorf("CACHEPROXY: %q", got)
	}
	c.want("-EXECABORT Transaction discarded because of previous errors.", "EXEC")
	c.want("1", "GET", "k")
	c.want("+OK", "MULTI")
	c.want("+QUEUED", "SET", "k", "2")
	c.want("-EXECABORT Transaction discarded because of: wrong number of arguments for 'exec' command", "EXEC", "x")
	c.want("-ERR EXEC without MULTI", "EXEC")
	c.want("1", "GET", "k")
	c.want("+OK", "MULTI")
	c.want("+QUEUED", "SET", "k", "3")
	c.want("+OK", "DISCARD")
	c.want("1", "GET", "k")
	// A command that fails while it runs does not stop the others.
	c.want("+OK", "MULTI")
	c.want("+QUEUED", "SET", "k", "a")
	c.want("+QUEUED", "INCR", "k")
	c.want("+QUEUED", "APPEND", "k", "b")
	c.want("[+OK -ERR value is not an integer or out of range :2]", "EXEC")
	w.raw.do("DEL", "k")
	c.want("ab", "GET", "k")
	// Without memory.
	c.want("+OK", "MULTI")
	c.want("+QUEUED", "DEL", "k")
	c.want("+QUEUED", "INCR", "k")
	w.raw.want("+OK", "CONFIG", "SET", "maxmemory", "1")
	if got := c.do("EXEC"); !strings.HasPrefix(got, "-OOM") {
		t.Errorf("EXEC: %q", got)
	}
	c.want("-ERR EXEC without MULTI", "EXEC")
	w.raw.want("+OK", "CONFIG", "SET", "maxmemory", "0")
	c.want("ab", "GET", "k")
}

// A transaction that empties the database fences the stores, and what it writes afterwards stays.
func TestFlushInMulti(t *testing.T) {
	for _, phase := range policy.Phases() {
		t.Run(phase.String(), func(t *testing.T) {
			w := newWorld(t)
			c, d := w.sidecar(phase).dial(t), w.sidecar(phase).dial(t)
			for _, k := range []string{"a", "b", "c"} {
				c.want("+OK", "SET", k, "old")
			}
			c.want("+OK", "WATCH", "a")
			c.want("+OK", "MULTI")
			c.want("+QUEUED", "SET", "a", "x")
			c.want("+QUEUED", "FLUSHALL")
			c.want("+QUEUED", "SET", "b", "new")
			c.want("[+OK +OK +OK]", "EXEC")
			for range 2 {
				for _, x := range []*conn{c, d} {
					x.want("(nil)", "GET", "a")
					x.want("new", "GET", "b")
					x.want("(nil)", "GET", "c")
				}
				if phase.Rules().Write != policy.WriteBoth {
					break
				}
				w.raw.do("UNLINK", "a", "b", "c")
			}
			d.want("+OK", "SET", "a", "1")
			c.want("+OK", "WATCH", "a")
			d.want("+OK", "SET", "a", "2")
			c.want("+OK", "MULTI")
			c.want("+QUEUED", "FLUSHALL")
			c.want("(nil)", "EXEC")
			c.want("2", "GET", "a")
			c.want("new", "GET", "b")
		})
	}
}

// CLIENT, SELECT, HELLO and SUBSCRIBE in a transaction speak of this client.
func TestSessionInMulti(t *testing.T) {
	w := newWorld(t)
	c := w.sidecar(policy.Phase1).dial(t)
	id := c.do("CLIENT", "ID")
	c.want("+OK", "SET", "k", "home")
	c.want("+OK", "MULTI")
	for _, cmd := range []string{"CLIENT ID", "CLIENT SETNAME alice", "CLIENT GETNAME", "SELECT 3", "SET k away", "GET k", "KEYS *", "HELLO 3"} {
		c.want("+QUEUED", strings.Fields(cmd)...)
	}
	got := c.do("EXEC")
	if !strings.HasPrefix(got, "["+id+" +OK alice +OK +OK away [k] [server redis version ") || !strings.Contains(got, " proto :3 id "+id+" ") {
		t.Errorf("EXEC: %q", got)
	}
	c.want("alice", "CLIENT", "GETNAME")
	c.want("away", "GET", "k")
	c.want("+OK", "SELECT", "0")
	c.want("home", "GET", "k")
	c.want("+OK", "MULTI")
	c.want("+QUEUED", "SUBSCRIBE", "ch")
	c.want("+QUEUED", "PING")
	c.want("[[subscribe ch :1] +PONG]", "EXEC")
	w.raw.want(":1", "PUBLISH", "ch", "m")
	if got := c.reply(); got != "[message ch m]" {
		t.Errorf("got %q", got)
	}
	c.want("home", "GET", "k")
}

// Random transactions give what Redis gives, and leave what Redis is left with.
func TestTransactionsAgainstRedis(t *testing.T) {
	const rounds = 60
	for _, phase := range []policy.Phase{policy.Phase0, policy.Phase1, policy.Phase2} {
		t.Run(phase.String(), func(t *testing.T) {
			w := newWorld(t)
			s := w.start(sidecarOptions{routes: []policy.Route{{Name: "r", Match: "*:r*", Phase: phase}}})
			redis := testenv.Redis(t).Addr()
			oracle, d := dial(t, redis), s.dial(t)
			there := target{name: "redis", addr: redis, upstream: redis}
			here := target{name: "proxy", addr: s.addr, upstream: w.redis.Addr(), routed: true}
			rng := rand.New(rand.NewPCG(5, uint64(phase)))
			for i := range rounds {
				cmds := program(rng, 6+rng.IntN(10))
				at := rng.IntN(len(cmds))
				all := append([][]string{}, cmds[:at]...)
				all = append(append(all, []string{"MULTI"}), cmds[at:]...)
				all = append(all, []string{"EXEC"})
				keys := map[string]bool{}
				for _, cmd := range cmds {
					for _, a := range cmd {
						if strings.Contains(a, ":r") || strings.Contains(a, ":u") {
							keys[a] = true
						}
					}
				}
				for k := range keys {
					if !strings.HasSuffix(k, "l") {
						all = append(all, []string{"GET", k}, []string{"PTTL", k})
					}
				}
				r := run{conversation{at: fmt.Sprint("program ", i)}, 2, pieces, i}
				for _, words := range all {
					r.steps = append(r.steps, say(words...))
				}
				want, got := hold(there, r, replyBound), hold(here, r, replyBound)
				if m := compareHeard(here, r.conversation, want, got); m != nil {
					t.Fatal(report(r, m, want))
				}
				if phase != policy.Phase2 { // whatever Redis loses the row has
					for k := range keys {
						if strings.Contains(k, ":r") && !strings.HasSuffix(k, "l") {
							w.raw.do("UNLINK", k)
							if got, want := d.do("GET", k), oracle.do("GET", k); got != want {
								t.Errorf("the row of %s: %q, want %q", k, got, want)
							}
						}
					}
				}
				if t.Failed() {
					t.Fatalf("program %d: %q", i, all)
				}
			}
		})
	}
}

// What the proxy answers itself, or refuses, is refused by Redis first if it is not well-formed, and dooms the transaction.
func TestArityInMulti(t *testing.T) {
	w := newWorld(t)
	s := w.sidecar(policy.Phase1)
	c, direct := s.dial(t), dial(t, w.redis.Addr())
	for _, cmd := range [][]string{{"RESET", "x"}, {"SUBSCRIBE"}, {"CLIENT", "GETNAME", "x"}, {"EXEC", "x"}, {"DISCARD", "x"}, {"WATCH"}, {"SELECT"}, {"GET"}} {
		for _, conn := range []*conn{direct, c} {
			conn.want("+OK", "MULTI")
			conn.want("+QUEUED", "SET", "k", "v")
		}
		want := direct.do(cmd...)
		c.want(want, cmd...)
		want = direct.do("EXEC")
		c.want(want, "EXEC")
		w.raw.do("DEL", "k")
	}
}

// What Redis evicts while a transaction is on its way is not missing in it: the rows are loaded, and watched.
func TestEvictionBeforeExec(t *testing.T) {
	for _, phase := range []policy.Phase{policy.Phase0, policy.Phase1} {
		t.Run(phase.String(), func(t *testing.T) {
			w := newWorld(t)
			c := w.sidecar(phase).dial(t)
			stop := make(chan struct{})
			var evictor sync.WaitGroup
			evictor.Go(func() {
				for {
					select {
					case <-stop:
						return
					case <-time.After(time.Duration(rand.IntN(500)) * time.Microsecond):
						w.raw.do("DEL", "n")
					}
				}
			})
			refused := 0
			for i := 1; i <= 200 && refused < 50; i++ {
				c.send("MULTI")
				c.send("INCR", "n")
				c.send("GET", "n")
				c.send("EXEC")
				c.reply()
				c.reply()
				c.reply()
				got := c.reply()
				if strings.HasPrefix(got, "-UNAVAILABLE") { // evicted each time for as long as it was tried: nothing has happened
					i--
					refused++
					continue
				}
				if want := fmt.Sprintf("[:%d %d]", i, i); got != want {
					t.Errorf("EXEC: %s, want %s", got, want)
					break
				}
			}
			close(stop)
			evictor.Wait()
			if refused == 50 {
				t.Error("transactions are refused")
			}
		})
	}
}

// A transaction may begin and end in another database than that of routed keys: what it does to those is mirrored, and the other one is left alone.
func TestExecAcrossDatabases(t *testing.T) {
	for _, phase := range policy.Phases() {
		if !phase.Rules().UsesStore {
			continue
		}
		t.Run(phase.String(), func(t *testing.T) {
			w := newWorld(t)
			s := w.sidecar(phase)
			c, d := s.dial(t), s.dial(t)
			exec := func(want string, cmds ...string) {
				t.Helper()
				c.want("+OK", "MULTI")
				for _, cmd := range cmds {
					c.want("+QUEUED", strings.Fields(cmd)...)
				}
				c.want(want, "EXEC")
			}
			other := dial(t, w.redis.Addr())
			other.want("+OK", "SELECT", "5")
			alone := func(want string) {
				t.Helper()
				if got := other.do("KEYS", "*"); got != want {
					t.Errorf("the other database holds %s, want %s", got, want)
				}
			}

			exec("[+OK +OK +OK]", "SET a 1", "SELECT 5", "SET x 1") // it leaves
			d.want("1", "GET", "a")
			alone("[x]")
			exec("[+OK :2]", "SELECT 0", "INCR a") // and comes back
			d.want("2", "GET", "a")
			alone("[x]")
			exec("[:3 3 +OK 1]", "INCR a", "GETSET a 9", "SELECT 5", "GET x")
			c.want("1", "GET", "x") // there it is now
			d.want("9", "GET", "a")
			alone("[x]")
			if row := w.stored("a"); phase.Rules().Write.KeepsRow() && row != "9" {
				t.Errorf("the row is %s", row)
			}
			w.journalEmpty()
		})
	}
}

// A transaction that Redis cannot be told of is refused as a whole, also if its commands come in one write: were MULTI refused, the others would run alone.
func TestTransactionWithoutRedis(t *testing.T) {
	eachDriver(t, func(t *testing.T) {
		w := newWorld(t)
		link := testenv.NewLink(t, w.redis.Addr())
		s := w.start(sidecarOptions{redisURL: "redis://" + link.Addr() + "/0", routes: []policy.Route{{Name: "one", Match: "one:*", Phase: policy.Phase1}}})
		c := s.dial(t)
		c.want("+OK", "SET", "one:k", "1")
		link.Cut()
		w.until("the outage of redis is seen", func() bool { c.do("GET", "one:k"); return s.srv.Health().Redis.Status != "connected" })
		const no = "-UNAVAILABLE redis cannot be reached"
		for _, cmd := range [][]string{{"MULTI"}, {"SET", "one:k", "2"}, {"WATCH", "one:k"}, {"MULTI"}, {"SET"}, {"EXEC"}, {"GET", "one:k"}} {
			c.send(cmd...)
		}
		for _, want := range []string{"+OK", "+QUEUED", "-ERR WATCH inside MULTI is not allowed", "-ERR MULTI calls can not be nested", "+QUEUED", no, "1"} {
			if got := c.reply(); got != want {
				t.Errorf("%s, want %s", got, want)
			}
		}
		c.want("+OK", "MULTI")
		c.want("+OK", "DISCARD")
		c.want("1", "GET", "one:k")
		c.want("+OK", "MULTI")
		link.Heal()
		w.until("redis is trusted again", func() bool { return s.srv.Health().Redis.Status == "connected" })
		c.want("+QUEUED", "SET", "one:k", "3")
		c.want(no, "EXEC") // it was not told of the beginning
		c.want("1", "GET", "one:k")
		c.want("+OK", "MULTI")
		c.want("+QUEUED", "INCR", "one:k")
		c.want("[:2]", "EXEC")
	})
}

// A sidecar that is cut off from Postgres sees a key between the steps of another's write, when Redis lacks it, and does not take it for absent.
func TestCutOffBesideAnotherWriter(t *testing.T) {
	pg := testenv.PostgresServer(t)
	if err := pg.CreateDatabase(t.Context(), "app"); err != nil {
		t.Fatal(err)
	}
	w := newWorldWith(t, testenv.Redis(t), pg.URL("app"))
	link := testenv.NewLink(t, pg.Addr())
	a := w.start(sidecarOptions{pgURL: pg.URLVia(link.Addr(), "app"), routes: []policy.Route{route(policy.Phase1)}})
	b := w.sidecar(policy.Phase1)
	c := a.dial(t)
	c.want("+OK", "SET", "k", "0")
	link.Cut()
	w.until("the outage of postgres is seen", func() bool { c.do("SET", "probe", "1"); return a.srv.Health().Postgres.Status == "down" })
	var wrote atomic.Int64
	stop := make(chan struct{})
	var writer sync.WaitGroup
	writer.Go(func() {
		d := b.dial(t)
		for {
			select {
			case <-stop:
				return
			default:
			}
			if got := d.do("SET", "k", "1"); got == "+OK" {
				wrote.Add(1)
			} else {
				t.Errorf("SET beside it: %s", got)
				return
			}
		}
	})
	written := func() { // one that has begun after now is acknowledged
		n := wrote.Load()
		w.until("another write", func() bool { return wrote.Load() > n+1 })
	}
	ran := map[string]int{}
	for i := range 600 {
		written()
		var got, want, what string
		switch i % 3 {
		case 0:
			what, want, got = "DEL", ":1", c.do("DEL", "k")
		case 1:
			what, want, got = "EVAL", ":1", c.do("EVAL", "return redis.call('EXISTS', KEYS[1])", "1", "k")
		case 2:
			c.send("MULTI")
			c.send("EXISTS", "k")
			c.send("EXEC")
			c.reply()
			c.reply()
			what, want, got = "MULTI", "[:1]", c.reply()
		}
		if strings.HasPrefix(got, "-UNAVAILABLE the store may hold the key") && what != "DEL" {
			continue
		}
		ran[what]++
		if got != want {
			t.Errorf("%d: %s answers %s, want %s", i, what, got, want)
			break
		}
	}
	close(stop)
	writer.Wait()
	for _, what := range []string{"DEL", "EVAL", "MULTI"} {
		if ran[what] == 0 {
			t.Errorf("%s never ran", what)
		}
	}
	t.Log(ran)
}
