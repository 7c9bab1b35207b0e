package proxy_test

import (
	"strings"
	"testing"

	"cacheproxy/policy"
)

// The way there and back, in one process, with what each step changes.
func TestPhaseSteps(t *testing.T) {
	w := newWorld(t)
	s := w.sidecar(policy.Phase0)
	c := s.dial(t)
	step := func(to string) { t.Helper(); c.want("+OK", "CACHEPROXY", "PHASE", "all", to) }
	c.want("+OK", "SET", "k", "0")
	w.raw.want("(nil)", "GET", "k")
	step("phase1")
	c.want("0", "GET", "k")
	w.raw.want("0", "GET", "k") // promoted
	c.want("+OK", "SET", "k", "1")
	w.raw.want("1", "GET", "k")
	if got := c.do("CACHEPROXY", "PHASE", "all", "phase3"); !strings.HasPrefix(got, "-ERR") {
		t.Errorf("a jump was accepted: %q", got)
	}
	step("phase2")
	c.want("1", "GET", "k")
	c.want("+OK", "SET", "k", "2")
	if got := w.sql("SELECT count(*) FROM cacheproxy.entries WHERE key = 'k'"); got != "0" {
		t.Errorf("phase2 left the row")
	}
	step("phase1")
	c.want("+OK", "SET", "old", "row")
	step("phase2")
	step("drain")
	w.raw.want(":1", "DEL", "old")
	c.want("(nil)", "GET", "old") // the store is not read any more
	step("phase3")
	c.want("+OK", "SET", "k", "3")
	step("drain")
	step("phase2") // fenced: what was written before the return is never served
	c.want("(nil)", "GET", "old")
	c.want("3", "GET", "k")
	step("phase1")
	if got := c.do("CACHEPROXY", "PHASE", "all", "phase0"); !strings.Contains(got, "only in Redis") {
		t.Errorf("back to phase0 although only Redis has k: %q", got)
	}
	c.want("+OK", "SET", "k", "4")
	step("phase0")
	c.want("4", "GET", "k")
	w.raw.do("DEL", "k")
	c.want("4", "GET", "k")
}

// A process that served phase3 is remembered in Postgres: a later one in phase2 must not serve rows from before.
func TestRowsFromBeforePhase3StayDead(t *testing.T) {
	w := newWorld(t)
	one := w.sidecar(policy.Phase1)
	one.dial(t).want("+OK", "SET", "k", "old")
	one.stop()
	three := w.sidecar(policy.Phase3)
	w.until("phase3 is registered", func() bool {
		return w.sql("SELECT count(*) FROM cacheproxy.phases WHERE phase = 'phase3'") == "1"
	})
	c := three.dial(t)
	c.want("+OK", "SET", "k", "new")
	c.want(":1", "DEL", "k")
	three.stop()
	for range 2 {
		two := w.sidecar(policy.Phase2)
		two.dial(t).want("(nil)", "GET", "k")
		two.stop()
	}
	// Fenced once, not at every start.
	again := w.sidecar(policy.Phase1)
	again.dial(t).want("+OK", "SET", "k2", "v")
	again.stop()
	last := w.sidecar(policy.Phase2).dial(t)
	w.raw.do("DEL", "k2")
	last.want("v", "GET", "k2")
}

// TTLs are the same in both stores, and a promoted value keeps what remains.
func TestLife(t *testing.T) {
	for _, phase := range []policy.Phase{policy.Phase1, policy.Phase2} {
		t.Run(phase.String(), func(t *testing.T) {
			w := newWorld(t)
			r := route(phase)
			r.TTL = 1000e9
			c := w.start(sidecarOptions{routes: []policy.Route{r}}).dial(t)
			for _, cmd := range []string{
				"SET a v", "SET b v EX 500", "SET c v PXAT 99999999999999", "SETEX d 500 v", "MSET e v", "INCR f", "SETNX g v", "GETSET h v", "APPEND i v",
				"SET a w KEEPTTL", "EXPIRE b 400", "PERSIST c", "GETEX d EX 300", "INCR f", "APPEND i w",
			} {
				if got := c.do(strings.Fields(cmd)...); got[0] == '-' {
					t.Fatalf("%s: %s", cmd, got)
				}
			}
			for key, want := range map[string]int64{"a": 1000e3, "b": 400e3, "c": -1, "d": 300e3, "e": 1000e3, "f": 1000e3, "g": 1000e3, "h": 1000e3, "i": 1000e3} {
				ms := number(c.do("PTTL", key))
				if want < 0 && ms != -1 || want > 0 && (ms > want || ms < want-5000) {
					t.Errorf("%s lives %d ms, want %d", key, ms, want)
				}
				if phase != policy.Phase1 {
					continue
				}
				// Both ends, as absolute times of the same clock: this machine's.
				inRedis := number(w.raw.do("PEXPIRETIME", key))
				inStore := number(":" + w.sql("SELECT coalesce((extract(epoch FROM expires_at) * 1000)::bigint, -1)::text FROM cacheproxy.entries WHERE key = $1", key))
				if d := inRedis - inStore; d > 10 || d < -10 {
					t.Errorf("%s ends %d ms later in Redis than in the store", key, d)
				}
				w.raw.want(":1", "DEL", key)
				c.do("GET", key)
				if promoted := number(w.raw.do("PEXPIRETIME", key)); promoted-inStore > 10 || inStore-promoted > 10 {
					t.Errorf("%s was promoted with an end %d ms off", key, promoted-inStore)
				}
			}
		})
	}
}

func number(reply string) int64 {
	var n int64
	neg := false
	for _, ch := range strings.TrimPrefix(reply, ":") {
		if ch == '-' {
			neg = true
			continue
		}
		n = n*10 + int64(ch-'0')
	}
	if neg {
		return -n
	}
	return n
}
