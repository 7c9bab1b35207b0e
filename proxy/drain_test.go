package proxy_test

import (
	"context"
	"sync/atomic"
	"testing"

	"cacheproxy/policy"
	"cacheproxy/proxy"
)

// looked is a store that tells when a repair has looked at what is journaled, and the poll behind it has begun.
type looked struct {
	proxy.Store
	locks, polls, since atomic.Int64
}

func (l *looked) Lock(ctx context.Context, refs []policy.Ref) (proxy.Tx, error) {
	l.since.Store(l.polls.Load())
	l.locks.Add(1)
	return l.Store.Lock(ctx, refs)
}

func (l *looked) Poll(ctx context.Context, after int64) (proxy.StorePoll, error) {
	l.polls.Add(1)
	return l.Store.Poll(ctx, after)
}

// afterRepair waits until a repair that begins from now on is done.
func (w *world) afterRepair(l *looked) {
	w.t.Helper()
	w.until("a repair has looked", func() bool { return l.locks.Load() > 0 && l.polls.Load() > l.since.Load() })
}

// drained starts a sidecar in drain with the column "legacy", whose triggers are there, and the table's route "plain".
func (w *world) drained() (*sidecar, *looked) {
	w.t.Helper()
	l := &looked{}
	return w.column(policy.Drain, func(o *sidecarOptions) {
		o.routes[1].Phase = policy.Drain
		o.store = func(s proxy.Store) proxy.Store { l.Store = s; return l }
	}), l
}

const recorded = "SELECT count(*) FROM cacheproxy.meta WHERE change IS NOT NULL"

// drain reads Redis alone: what others write into the column is no reason to delete there what clients have written. Who reads the column repairs.
func TestDrainLeavesRedisAsItIs(t *testing.T) {
	w := columnWorld(t)
	s, l := w.drained()
	w.record()
	c := s.dial(t)
	c.want("+OK", "SET", "report:1", "1")
	c.want("+OK", "SET", "report:2", "2")
	w.exec("UPDATE public.reports SET analytics_cache = '[1]' WHERE id = 1")
	w.exec("DELETE FROM public.reports WHERE id = 2")
	w.afterRepair(l)
	c.want("1", "GET", "report:1")
	c.want("2", "GET", "report:2")
	if n := w.sql(recorded); n != "2" {
		t.Errorf("%s records are left, and a sidecar in phase2 would need both", n)
	}
	two := w.column(policy.Phase2, nil).dial(t)
	w.until("phase2 has repaired them", func() bool { return w.sql(recorded) == "0" })
	two.want("[1]", "GET", "report:1")
	two.want("(nil)", "GET", "report:2")
	c.want("[1]", "GET", "report:1")
}

// A key that is written in drain has no row any more, and nobody needs its record.
func TestDrainStrikesWhatHasNoRow(t *testing.T) {
	w := columnWorld(t)
	s, l := w.drained()
	w.record()
	c := s.dial(t)
	w.exec("UPDATE public.reports SET analytics_cache = '[1]' WHERE id = 1")
	c.want("+OK", "SET", "report:1", "2") // before or after a repair has looked
	w.exec("INSERT INTO cacheproxy.journal (keys, routes) VALUES ('{plain:1}', '{plain}')")
	w.afterRepair(l)
	w.until("they are struck", func() bool {
		return w.sql(recorded) == "0" && w.sql("SELECT count(*) FROM cacheproxy.journal") == "0"
	})
	c.want("2", "GET", "report:1")
}

// phase3 tells the store nothing. A row that is older than what it has written must not take that away, not in drain and not on the way back.
func TestDrainBesidePhase3KeepsItsWrites(t *testing.T) {
	w := columnWorld(t)
	three := w.column(policy.Phase3, func(o *sidecarOptions) { o.columns[0].Unused = true })
	w.record()
	c := three.dial(t)
	w.exec("UPDATE public.reports SET analytics_cache = '[1]' WHERE id IN (1, 2)")
	w.exec("DELETE FROM public.reports WHERE id = 2")
	c.want("+OK", "SET", "report:1", "10")
	c.want("+OK", "SET", "report:2", "20")
	s, l := w.drained()
	w.afterRepair(l)
	d := s.dial(t)
	d.want("10", "GET", "report:1")
	d.want("20", "GET", "report:2")
	three.stop()
	d.want("+OK", "CACHEPROXY", "PHASE", "legacy", "phase2")
	w.until("the records are struck", func() bool { return w.sql(recorded) == "0" })
	d.want("10", "GET", "report:1")
	d.want("20", "GET", "report:2")
}

// An entry may name keys of routes in several phases: each has its own repair, and what is not ours to repair stays.
func TestDrainRepairsAnEntryInPart(t *testing.T) {
	w := columnWorld(t)
	l := &looked{}
	s := w.start(sidecarOptions{
		routes: []policy.Route{{Name: "a", Match: "a:*", Phase: policy.Drain}, {Name: "b", Match: "b:*", Phase: policy.Phase1}},
		store:  func(s proxy.Store) proxy.Store { l.Store = s; return l },
	})
	c := s.dial(t)
	c.want("+OK", "SET", "b:1", "old")
	w.raw.want("+OK", "SET", "a:1", "old")
	w.exec("INSERT INTO cacheproxy.entries (key, route, raw, generation, updated_at) VALUES ('a:1', 'a', 'new', 0, now())")
	w.exec("UPDATE cacheproxy.entries SET raw = 'new', value = NULL WHERE key = 'b:1'")
	w.exec("INSERT INTO cacheproxy.journal (keys, routes) VALUES ('{a:1,b:1}', '{a,b}')")
	w.until("only the key of drain is left", func() bool {
		return w.sql("SELECT string_agg(array_to_string(keys, ' '), ', ') FROM cacheproxy.journal") == "a:1"
	})
	c.want("old", "GET", "a:1")
	c.want("new", "GET", "b:1")
}

// Redis is back with an older memory. What the store has changed since the clock is deleted there by those who read the store, also if a sidecar in drain comes first.
func TestDrainLeavesTheWindowToPhase2(t *testing.T) {
	w := newWorld(t, "--save", "100000 1000000", "--dbfilename", "old.rdb")
	w.makeReports(10)
	d, _ := w.drained()
	w.record()
	c := d.dial(t)
	c.want("+OK", "SET", "report:1", "1")
	w.raw.want("+OK", "SAVE")
	two := w.column(policy.Phase2, nil)
	w.exec("UPDATE public.reports SET analytics_cache = '[1]' WHERE id = 1")
	w.until("phase2 has repaired it", func() bool { return w.sql(recorded) == "0" })
	two.stop()
	if err := w.redis.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := w.redis.Restart(); err != nil {
		t.Fatal(err)
	}
	w.raw = dial(t, w.redis.Addr())
	w.until("drain trusts the new redis", func() bool { return d.srv.Health().Redis.Status == "connected" })
	c = d.dial(t)
	c.want("1", "GET", "report:1")
	two = w.column(policy.Phase2, nil)
	w.until("phase2 trusts it", func() bool { return two.srv.Health().Redis.Status == "connected" })
	two.dial(t).want("[1]", "GET", "report:1")
}
