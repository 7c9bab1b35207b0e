package proxy_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"cacheproxy/policy"
	"cacheproxy/proxy"
)

func TestOwnCommands(t *testing.T) {
	w := newWorld(t)
	var reloads int
	s := w.start(sidecarOptions{
		routes: []policy.Route{{Name: "a", Match: "a:*", Phase: policy.Phase1}, {Name: "b", Match: "b:*", Phase: policy.Phase2}},
		change: func(c *proxy.ServerConfig) {
			c.Text = func() string { return "listen: here\n" }
			c.Reload = func() error {
				if reloads++; reloads > 1 {
					return errors.New("line 3: no\nline 4: no")
				}
				return nil
			}
		},
	})
	c := s.dial(t)
	own := func(args ...string) string { return c.do(append([]string{"CACHEPROXY"}, args...)...) }
	c.want("-ERR wrong number of arguments for 'cacheproxy' command", "CACHEPROXY")
	c.want("-ERR unknown subcommand 'NO PE'. Try CACHEPROXY HELP.", "CACHEPROXY", "NO\nPE")
	for _, sub := range []string{"help", "stats", "routes", "journal", "config", "reload", "version"} {
		c.want("-ERR wrong number of arguments for 'cacheproxy|"+sub+"' command", "CACHEPROXY", sub, "x")
	}
	for _, sub := range []string{"explain", "diff"} {
		c.want("-ERR wrong number of arguments for 'cacheproxy|"+sub+"' command", "CACHEPROXY", sub)
	}
	c.want("-ERR wrong number of arguments for 'cacheproxy|phase' command", "CACHEPROXY", "PHASE", "a")
	if got := own("HELP"); !strings.Contains(got, "EXPLAIN <key>") {
		t.Errorf("HELP: %q", got)
	}
	c.want("test", "CACHEPROXY", "VERSION")
	c.want("listen: here\n", "CACHEPROXY", "CONFIG")
	c.want("+OK", "CACHEPROXY", "RELOAD")
	c.want("-ERR line 3: no; line 4: no", "CACHEPROXY", "RELOAD")
	if got := own("PHASE"); !strings.HasPrefix(got, "[+a (match a:*): phase1, both are written +  for ") || !strings.Contains(got, "+b (match b:*): phase2, Redis is the primary ") ||
		!strings.Contains(got, "+  next: phase2, and this speaks against it: +    few_reads: 0 reads since the phase began in this sidecar: too few to tell a rate +      remedy: wait until there are 1000") {
		t.Errorf("PHASE: %q", got)
	}
	if got := own("ROUTES"); !strings.Contains(got, "a match=a:* phase=phase1") || !strings.Contains(got, "b match=b:* phase=phase2") {
		t.Errorf("ROUTES: %q", got)
	}

	explain := func(key string, want ...string) {
		t.Helper()
		got := own("EXPLAIN", key)
		for _, x := range want {
			if !strings.Contains(got, x) {
				t.Errorf("EXPLAIN %s: %q lacks %q", key, got, x)
			}
		}
	}
	explain("other", "no route matches it", "passes through")
	explain("\x00", "route: none", "contains NUL")
	explain("a:1", "route: a (match a:*)", "redis: absent", "store: absent", "a read answers nil")
	c.want("[+same: absent in both]", "CACHEPROXY", "DIFF", "a:1")
	c.want("[+not routed: there is only one copy]", "CACHEPROXY", "DIFF", "other")
	c.want("+OK", "SET", "a:1", "hello", "PX", "1000000")
	explain("a:1", "redis: 5 bytes, expires in 16m", "store: 5 bytes, expires in 16m", "answered by redis")
	if got := own("DIFF", "a:1"); !strings.HasPrefix(got, "[+same: 5 bytes, expires in") {
		t.Errorf("DIFF: %q", got)
	}
	w.raw.want("+OK", "SET", "a:1", "help")
	if got := own("DIFF", "a:1"); !strings.HasPrefix(got, "[+different value: redis 4 bytes, store 5 bytes, first difference at byte 3 +different life: redis no expiry, store expires in") {
		t.Errorf("DIFF: %q", got)
	}
	w.raw.want(":1", "DEL", "a:1")
	explain("a:1", "answered by jsonb: Redis lacks the key")
	if got := own("DIFF", "a:1"); !strings.HasPrefix(got, "[+only in the store: 5 bytes") {
		t.Errorf("DIFF: %q", got)
	}
	w.raw.want(":1", "LPUSH", "a:1", "x")
	explain("a:1", "redis: a list")
	c.want("[+different type: redis holds a list]", "CACHEPROXY", "DIFF", "a:1")
	w.raw.want(":1", "DEL", "a:1")
	c.want("hello", "GET", "a:1")
	c.want(":1", "DEL", "a:1")
	explain("a:1", "store: deleted")
	c.want("+OK", "SET", "b:1", "x")
	c.want("[+only in redis: 1 bytes, no expiry]", "CACHEPROXY", "DIFF", "b:1")

	// Phases.
	c.want("-ERR no such route; see CACHEPROXY ROUTES", "CACHEPROXY", "PHASE", "nope", "phase2")
	if got := own("PHASE", "a", "phase9"); !strings.HasPrefix(got, "-ERR") {
		t.Errorf("PHASE phase9: %q", got)
	}
	if got := own("PHASE", "a", "phase3"); !strings.Contains(got, "more than one step") {
		t.Errorf("PHASE phase3: %q", got)
	}
	for _, phase := range []string{"phase2", "drain", "phase3"} {
		c.want("+OK", "CACHEPROXY", "PHASE", "a", phase)
	}
	if got := own("PHASE"); !strings.HasPrefix(got, "[+a (match a:*): phase3, Redis alone ") || !strings.Contains(got, "+  back: drain, and this speaks against it: +    sidecars: a sidecar served the route in phase1 ") {
		t.Errorf("PHASE: %q", got)
	}
	c.want("[+phase3: there is only one copy]", "CACHEPROXY", "DIFF", "a:1")
	explain("a:1", "not connected in this phase")
	c.want("+OK", "CACHEPROXY", "PHASE", "a", "drain")
	w.journalEmpty()
	if got := own("JOURNAL"); !strings.Contains(got, "redis is stale: 0 entries") || !strings.Contains(got, "store is stale: 0 keys") {
		t.Errorf("JOURNAL: %q", got)
	}

	for _, proto := range []string{"2", "3"} {
		c.do("HELLO", proto)
		var st proxy.Stats
		if err := json.Unmarshal([]byte(strings.TrimPrefix(own("STATS"), "txt:")), &st); err != nil {
			t.Fatal(err)
		}
		if st.MigrationPhase != "mixed" || len(st.Routes) != 2 || st.Performance.JSONBHits != 1 || st.Redis.Status != "connected" || st.Postgres.Status != "connected" || st.Proxy.Clients != 1 {
			t.Errorf("STATS: %+v", st)
		}
	}
	// Outages are told, not waited for.
	c.want("+OK", "SET", "b:2", "x")
	if err := w.redis.Kill(); err != nil {
		t.Fatal(err)
	}
	w.until("the outage is noticed", func() bool { c.do("GET", "b:2"); return s.srv.Health().Redis.Status != "connected" })
	explain("b:2", "redis: cannot be asked", "a read answers nil")
	explain("a:2", "nobody: Redis cannot be asked and this phase does not read the store")
	if got := own("DIFF", "b:2"); !strings.HasPrefix(got, "[+unknown: redis cannot be asked") {
		t.Errorf("DIFF: %q", got)
	}
	if got := own("STATS"); !strings.Contains(got, `"status": "down"`) && !strings.Contains(got, `"status": "recovering"`) {
		t.Errorf("STATS: %q", got)
	}
}

func TestOwnCommandsWithoutFile(t *testing.T) {
	w := newWorld(t)
	c := w.start(sidecarOptions{pgURL: "none", routes: []policy.Route{route(policy.Phase3)}}).dial(t)
	c.want("-ERR no configuration to show", "CACHEPROXY", "CONFIG")
	c.want("-ERR this process was started without a file to reload", "CACHEPROXY", "RELOAD")
	if got := c.do("CACHEPROXY", "PHASE", "all", "drain"); !strings.HasPrefix(got, "-ERR the process was started without postgres") {
		t.Errorf("PHASE without a store: %q", got)
	}
	if got := c.do("CACHEPROXY", "PHASE"); !strings.HasPrefix(got, "[+all (match *): phase3, ") {
		t.Errorf("PHASE: %q", got)
	}
}

func TestOwnKeysAreHidden(t *testing.T) {
	w := newWorld(t)
	c := w.sidecar(policy.Phase2).dial(t)
	for i := range 3 {
		c.want("+OK", "SET", fmt.Sprint("k", i), "v")
		c.want(":2", "APPEND", fmt.Sprint("k", i), "w")
	}
	w.until("there are keys to hide", func() bool { return strings.Contains(w.raw.do("KEYS", "*"), "cacheproxy:") })
	sorted := func(s string) string {
		f := strings.Fields(strings.Trim(s, "[]"))
		slices.Sort(f)
		return strings.Join(f, " ")
	}
	for _, proto := range []string{"2", "3"} {
		c.do("HELLO", proto)
		if got := sorted(c.do("KEYS", "*")); got != "k0 k1 k2" {
			t.Errorf("KEYS: %q", got)
		}
		c.want("[]", "KEYS", "cacheproxy:*")
		if got := sorted(strings.TrimPrefix(c.do("SCAN", "0", "COUNT", "1000"), "[0 ")); got != "k0 k1 k2" {
			t.Errorf("SCAN: %q", got)
		}
		c.want(":3", "DBSIZE")
		for range 50 {
			if got := c.do("RANDOMKEY"); !strings.HasPrefix(got, "k") {
				t.Fatalf("RANDOMKEY: %q", got)
			}
		}
		c.want(":3", "DEL", "k0", "k1", "k2")
		c.want("(nil)", "RANDOMKEY")
		c.want(":0", "DBSIZE")
		for i := range 3 {
			c.want("+OK", "SET", fmt.Sprint("k", i), "v")
		}
	}
}

// After a flush nothing comes back from the store, and what is written after it stays.
func TestFlushFencesTheStore(t *testing.T) {
	for _, phase := range []policy.Phase{policy.Phase0, policy.Phase1, policy.Phase2} {
		for _, flush := range [][]string{{"FLUSHALL"}, {"FLUSHALL", "ASYNC"}, {"FLUSHDB"}, {"SWAPDB", "0", "1"}} {
			t.Run(phase.String()+"/"+strings.Join(flush, "_"), func(t *testing.T) {
				w := newWorld(t)
				s, other := w.sidecar(phase), w.sidecar(phase)
				c, o := s.dial(t), other.dial(t)
				for i := range 10 {
					c.want("+OK", "SET", fmt.Sprint("k", i), "old")
				}
				o.want("old", "GET", "k0")
				// One pipeline: the order of its commands holds across the fence.
				c.Write(slices.Concat(encode("SET", "k1", "old2"), encode(flush...), encode("GET", "k1"), encode("SET", "k2", "new"), encode("GET", "k2")))
				for _, want := range []string{"+OK", "+OK", "(nil)", "+OK", "new"} {
					if got := c.reply(); got != want {
						t.Errorf("got %q, want %q", got, want)
					}
				}
				for i := range 10 {
					want := "(nil)"
					if i == 2 {
						want = "new"
					}
					for _, x := range []*conn{c, o} {
						x.want(want, "GET", fmt.Sprint("k", i))
					}
				}
				w.raw.do("DEL", "k2")
				if phase != policy.Phase2 {
					c.want("new", "GET", "k2")
				}
				c.want("-ERR syntax error", "FLUSHALL", "NOW")
				if phase != policy.Phase2 {
					c.want("new", "GET", "k2")
				}
			})
		}
	}
}
