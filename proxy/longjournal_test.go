package proxy_test

import (
	"context"
	"fmt"
	"math"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"cacheproxy/policy"
	"cacheproxy/proxy"
)

// ordered is a store that remembers in which order polls and repairs come, and each of whose repairs takes longer than the time between two polls.
type ordered struct {
	proxy.Store
	pause time.Duration
	mu    sync.Mutex
	order strings.Builder
}

func (o *ordered) did(what string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.order.WriteString(what)
}

func (o *ordered) Lock(ctx context.Context, refs []policy.Ref) (proxy.Tx, error) {
	o.did("R")
	time.Sleep(o.pause)
	return o.Store.Lock(ctx, refs)
}

func (o *ordered) Poll(ctx context.Context, after int64) (proxy.StorePoll, error) {
	o.did("p")
	return o.Store.Poll(ctx, after)
}

// One statement changes many rows. While their copies are repaired, what others change must be known as soon as ever.
func TestJournalIsPolledBetweenRepairs(t *testing.T) {
	w := newWorld(t)
	w.makeReports(600)
	o := &ordered{}
	s := w.column(policy.Phase1, func(so *sidecarOptions) {
		so.store = func(s proxy.Store) proxy.Store { o.Store = s; return o }
		so.change = func(c *proxy.ServerConfig) { c.Poll = 40 * time.Millisecond; o.pause = c.Poll }
	})
	w.record()
	w.exec("UPDATE public.reports SET analytics_cache = '1'")
	w.until("all is repaired", func() bool { return w.sql(recorded) == "0" })
	s.stop()
	if order := o.order.String(); strings.Count(order, "R") < 6 || strings.Contains(order, "RR") {
		t.Errorf("polls (p) and repairs (R) came in the order %s", order)
	}
}

// endless is a store whose journal names a hundred keys in each of a thousand entries a page, and has more pages than anybody should read.
type endless struct {
	proxy.Store
	on   atomic.Bool
	most atomic.Int64 // behind which entry was asked
}

func (e *endless) Poll(ctx context.Context, after int64) (proxy.StorePoll, error) {
	p, err := e.Store.Poll(ctx, 0)
	if !e.on.Load() || err != nil || after == math.MaxInt64 {
		return p, err
	}
	e.most.Store(max(e.most.Load(), after))
	for id := after + 1; id <= after+1000; id++ {
		in := proxy.Intent{ID: id}
		for k := range 100 {
			in.Refs = append(in.Refs, policy.Ref{Route: "all", Key: fmt.Sprintf("many:%d:%d", id, k)})
		}
		p.Intents = append(p.Intents, in)
	}
	p.More = after < 4000
	return p, nil
}

// What is remembered of the journal is bounded by its keys. Beyond, any copy in Redis may be stale.
func TestJournalIsBoundedByItsKeys(t *testing.T) {
	w := newWorld(t)
	store := &endless{}
	s := w.start(sidecarOptions{routes: []policy.Route{route(policy.Phase1)}, store: func(s proxy.Store) proxy.Store { store.Store = s; return store }})
	c := s.dial(t)
	c.want("+OK", "SET", "k", "v")
	w.raw.want("+OK", "SET", "k", "stale")
	c.want("stale", "GET", "k")
	store.on.Store(true)
	w.until("no copy is served", func() bool { return c.do("GET", "k") == "v" })
	if most := store.most.Load(); most != 0 {
		t.Errorf("it has read behind entry %d, which is %d keys", most, 100*most)
	}
}
