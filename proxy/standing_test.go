package proxy_test

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"cacheproxy/policy"
	"cacheproxy/proxy"
)

// standing is what GET /phase says of the only route.
func (s *sidecar) standing(t *testing.T) proxy.Standing {
	t.Helper()
	all, err := s.srv.Standings(context.Background(), "all")
	if err != nil || len(all) != 1 {
		t.Fatalf("%+v, %v", all, err)
	}
	return all[0]
}

// Reads are counted from the phase on, rows are looked for in Redis, and what is not there is told.
func TestStanding(t *testing.T) {
	w := newWorld(t)
	s := w.sidecar(policy.Phase1)
	c := s.dial(t)
	if _, err := s.srv.Standings(context.Background(), "nobody"); err != proxy.ErrNoRoute {
		t.Errorf("of no route: %v", err)
	}
	for i := range 5 {
		c.want("+OK", "SET", fmt.Sprint("k", i), "v", "EX", "7200")
	}
	c.want("v", "GET", "k0")
	c.want("(nil)", "GET", "nothing")
	got := s.standing(t)
	if ev := got.Evidence; ev.RedisHits != 1 || ev.CacheMisses != 1 || ev.JSONBHits != 0 || ev.Sampled != 0 || ev.Redis != "connected" || ev.Store != "connected" || len(ev.Unknown) > 0 {
		t.Errorf("in phase1: %+v", ev)
	}
	if got.Seconds.LongestLife < 7000 || got.Seconds.LongestLife > 7200 || len(got.Evidence.Others) != 1 || got.Evidence.Others[0].Phase != policy.Phase1 {
		t.Errorf("in phase1: %+v", got)
	}

	c.want("+OK", "CACHEPROXY", "PHASE", "all", "phase2")
	w.raw.want(":2", "DEL", "k1", "k2")
	c.want("v", "GET", "k2") // from Postgres, and into Redis
	got = s.standing(t)
	if ev := got.Evidence; ev.RedisHits != 0 || ev.JSONBHits != 1 || ev.CacheMisses != 0 || ev.Sampled != 5 || ev.Missing != 1 {
		t.Errorf("in phase2: %+v", ev)
	}
	if !slices.ContainsFunc(got.Next.Against, func(r policy.Reason) bool { return r.Doubt == policy.DoubtRows }) {
		t.Errorf("against drain: %+v", got.Next)
	}

	// What Postgres cannot be asked is named.
	if err := w.redis.Kill(); err != nil {
		t.Fatal(err)
	}
	w.until("the outage is noticed", func() bool { c.do("GET", "k0"); return s.srv.Health().Redis.Status != "connected" })
	got = s.standing(t)
	if text := strings.Join(got.Lines(), "\n"); got.Evidence.Redis == "connected" || len(got.Evidence.Unknown) != 2 || !strings.Contains(text, "whether Redis has the rows could not be found out") {
		t.Errorf("without Redis: %+v\n%s", got.Evidence, text)
	}
}

// Keys that are only in Redis keep the route from phase0, unless it is forced; they are back with phase1.
func TestForcePhase(t *testing.T) {
	w := newWorld(t)
	s := w.sidecar(policy.Phase1)
	c := s.dial(t)
	w.raw.want("+OK", "SET", "only", "v")
	if err := s.srv.SetPhase("all", policy.Phase0); err == nil || !strings.Contains(err.Error(), "1 keys of the route are only in Redis") {
		t.Errorf("to phase0: %v", err)
	}
	if err := s.srv.ForcePhase("all", policy.Drain); err == nil {
		t.Error("a jump was forced")
	}
	if err := s.srv.ForcePhase("all", policy.Phase0); err != nil {
		t.Fatal(err)
	}
	c.want("(nil)", "GET", "only")
	c.want("+OK", "CACHEPROXY", "PHASE", "all", "phase1")
	c.want("v", "GET", "only")
}

// seenGate stops the telling of phase3 until it is opened.
type seenGate struct {
	proxy.Store
	asked chan struct{} // closed when it is on its way
	open  chan struct{}
}

func (g *seenGate) Seen(ctx context.Context, routes, phases []string) error {
	if slices.Contains(phases, "phase3") {
		select {
		case <-g.asked:
		default:
			close(g.asked)
		}
		<-g.open
	}
	return g.Store.Seen(ctx, routes, phases)
}

// A process that goes back from phase3 while it says that it is there is not found there afterwards: the next one would fence its rows.
func TestToldPhaseIsNotTheOneBefore(t *testing.T) {
	w := newWorld(t)
	g := &seenGate{asked: make(chan struct{}), open: make(chan struct{})}
	s := w.start(sidecarOptions{routes: []policy.Route{route(policy.Drain)}, storeTimeout: time.Minute, store: func(inner proxy.Store) proxy.Store {
		g.Store = inner
		return g
	}})
	if err := s.srv.SetPhase("all", policy.Phase3); err != nil {
		t.Fatal(err)
	}
	<-g.asked
	moved := make(chan error, 1)
	go func() {
		err := s.srv.SetPhase("all", policy.Drain)
		if err == nil {
			err = s.srv.SetPhase("all", policy.Phase2)
		}
		moved <- err
	}()
	select {
	case err := <-moved: // it did not wait, and what was on its way comes too late
		moved <- err
	case <-time.After(time.Second): // long enough for the mistake to happen
	}
	close(g.open)
	if err := <-moved; err != nil {
		t.Fatal(err)
	}
	for range 2 { // what was under way is over when it says so again
		w.sql("UPDATE cacheproxy.phases SET last_seen = last_seen - interval '1 minute' WHERE phase = 'phase2'")
		w.until("the phase is told", func() bool {
			return w.sql("SELECT last_seen > now() - interval '30 seconds' FROM cacheproxy.phases WHERE phase = 'phase2'") == "true"
		})
	}
	if got := w.sql("SELECT count(*) FROM cacheproxy.phases WHERE phase = 'phase3'"); got != "0" {
		t.Error("phase3 is known again")
	}
}
