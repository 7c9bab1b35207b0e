package proxy_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"cacheproxy/internal/testenv"
	"cacheproxy/policy"
	"cacheproxy/proxy"
)

// sampled starts a sidecar that compares every hit.
func (w *world) sampled(phase policy.Phase) *sidecar {
	w.t.Helper()
	return w.column(phase, func(o *sidecarOptions) {
		o.change = func(c *proxy.ServerConfig) { c.Sample = 1 }
		o.routes[1].Phase = phase
	})
}

// verified reads keys that Redis has, one after the other, and waits until the hits have been compared.
func (s *sidecar) verified(t *testing.T, c *conn, keys ...string) {
	t.Helper()
	checked := func(route string) float64 { return s.metric(t, `verify_checked_total{route="`+route+`"}`) }
	sum := func() float64 { return checked("legacy") + checked("plain") }
	want := sum()
	for _, key := range keys {
		if got := c.do("GET", key); got == "(nil)" || strings.HasPrefix(got, "-") {
			t.Errorf("GET %s answers %q", key, got)
		}
		want++
	}
	until(t, "the hits are compared", func() bool { return sum() >= want })
	if got := sum(); got != want {
		t.Errorf("%v hits were compared, want %v", got, want)
	}
}

// mismatched holds the mismatches of both routes to what is given.
func (s *sidecar) mismatched(t *testing.T, missing, value, ttl float64) {
	t.Helper()
	for kind, want := range map[string]float64{"missing": missing, "value": value, "ttl": ttl} {
		got := 0.0
		for _, route := range []string{"legacy", "plain"} {
			got += s.metric(t, fmt.Sprintf(`verify_mismatches_total{kind="%s",route="%s"}`, kind, route))
		}
		if got != want {
			t.Errorf("mismatches of kind %s: %v, want %v", kind, got, want)
		}
	}
	for _, route := range []string{"legacy", "plain"} {
		s.counts(t, `verify_dropped_total{route="`+route+`"}`, 0)
	}
}

// Both copies are written: Redis must have nothing that the store lacks.
func countsMismatches(t *testing.T) {
	w := columnWorld(t)
	s := w.sampled(policy.Phase1)
	c := s.dial(t)
	c.want("+OK", "MSET", "report:1", "1.0e1", "report:2", "2", "report:3", `{"a":1}`, "report:4", "4", "report:99", "9", "plain:1", "one", "plain:2", "two", "plain:3", "three", "plain:4", "four")
	c.want(":1", "EXPIRE", "report:3", "1000")
	c.want(":1", "EXPIRE", "plain:3", "1000")
	s.verified(t, c, "report:1", "report:2", "report:3", "report:4", "report:99", "plain:1", "plain:2", "plain:3", "plain:4")
	s.mismatched(t, 0, 0, 0)

	w.exec("UPDATE public.reports SET analytics_cache = NULL WHERE id = 1")
	w.exec("DELETE FROM cacheproxy.entries WHERE key = 'plain:1'")
	s.verified(t, c, "report:1", "plain:1")
	s.mismatched(t, 2, 0, 0)

	w.exec("UPDATE public.reports SET analytics_cache = '[2]' WHERE id = 2")
	w.raw.want("+OK", "SET", "plain:2", "other")
	s.verified(t, c, "report:2", "plain:2")
	s.mismatched(t, 2, 2, 0)

	w.raw.want(":1", "PERSIST", "report:3")
	w.raw.want(":1", "EXPIRE", "plain:3", "2000")
	w.raw.want(":1", "EXPIRE", "report:4", "1000")
	s.verified(t, c, "report:3", "plain:3", "report:4")
	s.mismatched(t, 2, 2, 3)

	// What a journal names is being repaired.
	w.raw.want("+OK", "SET", "plain:4", "other")
	w.raw.want(":1", "HSET", "cacheproxy:journal", "plain:4", "dead.1")
	s.verified(t, c, "plain:4")
	s.mismatched(t, 2, 2, 3)

	// While it is 0, or once it is again, nothing is compared.
	s.srv.SetSample(0)
	before := s.metric(t, `verify_checked_total{route="legacy"}`)
	for range 100 {
		c.do("GET", "report:1")
	}
	s.srv.SetSample(1)
	s.verified(t, c, "report:99")
	s.counts(t, `verify_checked_total{route="legacy"}`, before+1)
}

// Redis is the truth: a row that stands beside it must be the same, for it comes back when Redis forgets the key.
func TestVerifyFindsEachKindInPhase2(t *testing.T) {
	for _, phase := range []policy.Phase{policy.Phase2, policy.Drain} {
		t.Run(phase.String(), func(t *testing.T) {
			w := columnWorld(t)
			first := w.sampled(policy.Phase1)
			first.dial(t).want("+OK", "MSET", "report:1", "1", "report:2", "2", "report:3", "3", "plain:1", "one", "plain:2", "two", "plain:3", "three")
			first.stop()
			s := w.sampled(phase)
			c := s.dial(t)
			c.want("+OK", "SET", "report:4", "4") // its row goes
			c.want("+OK", "SET", "report:99", "9")
			s.verified(t, c, "report:1", "report:2", "report:3", "report:4", "report:99", "plain:1", "plain:2", "plain:3")
			s.mismatched(t, 0, 0, 0)
			w.exec("UPDATE public.reports SET analytics_cache = NULL WHERE id = 1")
			w.exec("UPDATE cacheproxy.entries SET value = NULL, raw = NULL WHERE key = 'plain:1'")
			s.verified(t, c, "report:1", "plain:1")
			s.mismatched(t, 2, 0, 0)
			w.exec("UPDATE public.reports SET analytics_cache = '20' WHERE id = 2")
			w.raw.want("+OK", "SET", "plain:2", "other")
			s.verified(t, c, "report:2", "plain:2")
			s.mismatched(t, 2, 2, 0)
			w.raw.want(":1", "EXPIRE", "report:3", "1000")
			w.raw.want(":1", "EXPIRE", "plain:3", "1000")
			s.verified(t, c, "report:3", "plain:3")
			s.mismatched(t, 2, 2, 2)
			if phase == policy.Drain { // beside phase3, whose writes the store is not told of, all that is right
				other := w.sampled(policy.Phase3)
				w.until("the other has registered", func() bool {
					return w.sql("SELECT count(*) FROM cacheproxy.phases WHERE phase = 'phase3'") == "2"
				})
				other.stop()
				w.until("the sidecar knows", func() bool {
					s.verified(t, c, "report:2")
					before := s.metric(t, `verify_mismatches_total{kind="value",route="legacy"}`)
					s.verified(t, c, "report:2")
					return s.metric(t, `verify_mismatches_total{kind="value",route="legacy"}`) == before
				})
			}
		})
	}
}

// Writes and repairs that are under way are no mismatches.
func TestVerifyRaisesNoFalseAlarm(t *testing.T) {
	for _, fleet := range [][]policy.Phase{{policy.Phase1, policy.Phase1}, {policy.Phase1, policy.Phase2}, {policy.Phase2, policy.Drain}} {
		t.Run(fleet[0].String()+"+"+fleet[1].String(), func(t *testing.T) {
			w := columnWorld(t)
			sidecars := []*sidecar{w.sampled(fleet[0]), w.sampled(fleet[1])}
			var wg sync.WaitGroup
			end := time.Now().Add(4 * time.Second)
			for i := range 6 {
				s := sidecars[i%2]
				wg.Go(func() {
					c := s.dial(t)
					for time.Now().Before(end) {
						key := []string{"report:1", "report:2", "report:3", "report:99", "plain:1", "plain:2"}[rand.IntN(6)]
						cmd := []string{"GET K", "GET K", "GET K", "GET K", "SET K 1.0e1", "SET K 7 PX 300", "INCR K", "DEL K", "PEXPIRE K 500", "PERSIST K",
							"EVAL return(redis.call('SET',KEYS[1],'{}')) 1 K"}[rand.IntN(11)]
						if got := c.do(strings.Fields(strings.ReplaceAll(cmd, "K", key))...); strings.HasPrefix(got, "-U") || strings.HasPrefix(got, "-NOTJSON") {
							t.Errorf("%s answers %q", cmd, got)
						}
					}
				})
			}
			wg.Wait()
			for _, s := range sidecars {
				before := -1.0
				w.until("everything that was drawn is compared", func() bool { // or dropped; another look at the same difference comes within seconds
					now := 0.0
					for _, r := range []string{"legacy", "plain"} {
						now += s.metric(t, `verify_checked_total{route="`+r+`"}`) + s.metric(t, `verify_dropped_total{route="`+r+`"}`)
					}
					time.Sleep(time.Second)
					done := now == before
					before = now
					return done
				})
				if s.metric(t, `verify_checked_total{route="legacy"}`) == 0 {
					t.Error("nothing was compared")
				}
				for _, route := range []string{"legacy", "plain"} {
					for _, kind := range []string{"missing", "value", "ttl"} {
						s.counts(t, fmt.Sprintf(`verify_mismatches_total{kind="%s",route="%s"}`, kind, route), 0)
					}
				}
			}
		})
	}
}

// More than can be compared is not queued without end, and is counted.
func countsWhatIsNotCompared(t *testing.T) {
	w := columnWorld(t)
	s := w.sampled(policy.Phase1)
	c := s.dial(t)
	c.want("+OK", "MSET", "plain:1", "1", "plain:2", "2", "plain:3", "3", "plain:4", "4")
	const n = 400
	for range n {
		c.send("MGET", "plain:1", "plain:2", "plain:3", "plain:4")
	}
	for range n {
		if got := c.reply(); got != "[1 2 3 4]" {
			t.Fatal(got)
		}
	}
	if got := s.metric(t, `verify_dropped_total{route="plain"}`); got < 100 || got > 4*n-1024 {
		t.Errorf("%v of %d hits were dropped", got, 4*n)
	}
	w.until("the others are compared", func() bool {
		return s.metric(t, `verify_dropped_total{route="plain"}`)+s.metric(t, `verify_checked_total{route="plain"}`) == 4*n
	})
	s.counts(t, `verify_mismatches_total{kind="value",route="plain"}`, 0)
}

// heldLoad is a store whose first Load waits.
type heldLoad struct {
	proxy.Store
	loads   atomic.Int64
	release chan struct{}
}

func (h *heldLoad) Load(ctx context.Context, refs []policy.Ref) ([]policy.Row, error) {
	if h.loads.Add(1) == 1 {
		<-h.release
	}
	return h.Store.Load(ctx, refs)
}

// Values come to the comparison over the connection by which Redis is judged: few at a time if they are large.
func TestShadowTakesLargeValuesOneByOne(t *testing.T) {
	w := newWorld(t)
	h := &heldLoad{release: make(chan struct{})}
	s, steps := w.stepped(policy.Phase1, func(o *sidecarOptions) {
		o.change = func(c *proxy.ServerConfig) { c.Sample = 1 }
		o.store = func(s proxy.Store) proxy.Store { h.Store = s; return h }
		o.storeTimeout = 30 * time.Second
	})
	c := s.dial(t)
	large := strings.Repeat("x", 600<<10)
	for i := range 5 {
		c.want("+OK", "SET", fmt.Sprint("k", i), large)
	}
	var reads atomic.Int64
	steps.At(func(s testenv.Step) bool {
		if s.Name == "read" && !s.Done {
			reads.Add(1)
		}
		return true
	})
	c.do("MGET", "k0") // the reply to GET is passed on as it comes
	until(t, "the first is compared", func() bool { return h.loads.Load() == 1 })
	for i := 1; i < 5; i++ {
		c.do("MGET", fmt.Sprint("k", i))
	}
	close(h.release)
	until(t, "all are compared", func() bool { return s.metric(t, `verify_checked_total{route="all"}`) == 5 })
	if n := reads.Load(); n != 5 {
		t.Errorf("they were read in %d steps", n)
	}
}
