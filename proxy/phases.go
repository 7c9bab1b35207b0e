package proxy

import (
	"context"
	"errors"
	"strconv"
	"time"

	"cacheproxy/internal/said"
	"cacheproxy/policy"

	"go.uber.org/zap"
)

// enter puts a router in place: what its phases need is done first, so that the other sidecars know and no row that a
// phase without the store has missed is served again. before is the router in place, nil at the start of the process. force leaves keys that
// only Redis holds behind.
func (e *engine) enter(ctx context.Context, before, next *policy.Router, force bool) error {
	e.telling.Lock()
	defer e.telling.Unlock()
	was := map[string]policy.Phase{}
	if before != nil {
		for _, r := range before.Routes() {
			was[r.Name] = r.Phase
		}
	}
	for _, r := range next.Routes() {
		old, known := was[r.Name]
		if known && old == r.Phase {
			continue
		}
		if !e.usesStore() {
			if r.Phase.Rules().UsesStore {
				return said.Sentence("the process was started without postgres.url: set it and restart to use a phase that has a store")
			}
			continue
		}
		if !force && known && old.Rules().ReadsRedis && !r.Phase.Rules().ReadsRedis {
			if err := e.nothingOnlyInRedis(ctx, next, r.Name); err != nil {
				return err
			}
		}
		if err := e.store.Register(ctx, r.Name, r.Phase.String()); err != nil {
			return errors.Join(said.Sentence("the phase cannot be registered in postgres"), e.store.note("register", err))
		}
		if known && r.Phase.Rules().ReadsStore && !old.Rules().ReadsStore {
			if err := e.fenceRoute(ctx, r.Name); err != nil {
				return err
			}
		}
	}
	if !usesStore(e.router.Load()) && usesStore(next) {
		// Redis was trusted without a look at the store: look now, while nobody asks for it yet.
		if l := e.up.connection(); l == nil || e.verify(ctx, l) != nil {
			e.up.suspect(outUnverified)
		}
	}
	e.router.Store(next)
	for _, r := range next.Routes() {
		old, known := was[r.Name]
		if !known || old != r.Phase {
			e.stats.begin(r.Name)
		}
		if known && old != r.Phase {
			e.log.Info("phase changed", zap.String("route", r.Name), zap.Stringer("from", old), zap.Stringer("to", r.Phase))
		}
	}
	return nil
}

// usesStore: some route's phase has a store.
func usesStore(router *policy.Router) bool {
	for _, r := range router.Routes() {
		if r.Phase.Rules().UsesStore {
			return true
		}
	}
	return false
}

// fenceRoute makes the rows of a route dead, and forgets the phases that had missed writes.
func (e *engine) fenceRoute(ctx context.Context, route string) error {
	if err := e.store.Fence(ctx, route, func(context.Context) error { return nil }); err != nil {
		return errors.Join(said.Sentence("the store cannot be fenced"), e.store.note("fence", err))
	}
	e.stats.fences.Add(1)
	for _, p := range policy.Phases() {
		if p.Rules().UsesStore {
			continue
		}
		// If this fails, the next start fences once more than it must.
		if err := e.store.Forget(ctx, route, p.String()); err != nil {
			return errors.Join(said.Sentence("the phase cannot be forgotten in postgres"), e.store.note("forget", err))
		}
	}
	return nil
}

// register notes the phases that this process serves, at its start or as soon as Postgres can be reached. A route that some
// process served without the store since its last fence is fenced before its rows are read.
func (e *engine) register(ctx context.Context) error {
	p, err := e.store.Poll(ctx, 0)
	if e.store.note("poll", err) != nil {
		return err
	}
	for _, r := range e.router.Load().Routes() {
		if err := e.store.Register(ctx, r.Name, r.Phase.String()); e.store.note("register", err) != nil {
			return err
		}
		if !r.Phase.Rules().ReadsStore {
			continue
		}
		for _, word := range p.Phases[r.Name] {
			if old, err := policy.ParsePhase(word); err == nil && !old.Rules().UsesStore {
				e.log.Info("the route was served without its store before; its rows are fenced", zap.String("route", r.Name), zap.Stringer("phase", old))
				if err := e.fenceRoute(ctx, r.Name); err != nil {
					return err
				}
			}
		}
	}
	e.journal.mu.Lock()
	e.journal.registered = true
	e.journal.mu.Unlock()
	e.store.ok()
	return nil
}

// maxBackScan bounds the keys that a step back to a phase without reads from Redis looks at: a million takes some ten seconds.
const maxBackScan = 1_000_000

// nothingOnlyInRedis refuses a step after which keys that only Redis holds would no longer be seen.
func (e *engine) nothingOnlyInRedis(ctx context.Context, router *policy.Router, route string) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), backScanTime)
	defer cancel()
	seen, only := 0, 0
	for cursor := "0"; ; {
		frame, err := e.up.do(ctx, "SCAN", cursor, "COUNT", "1000", "TYPE", "string")
		if err != nil {
			return errors.Join(said.Sentence("redis cannot be asked for keys that only it has"), err)
		}
		cols, _ := elements(frame, nil)
		if len(cols) != 2 {
			return said.Sentence("redis answered SCAN out of shape")
		}
		next, _ := bulk(cols[0])
		names, _ := elements(cols[1], nil)
		var refs []policy.Ref
		for _, f := range names {
			name, _ := bulk(f)
			if r := router.Match(name); r != nil && r.Name == route {
				refs = append(refs, policy.Ref{Route: route, Key: string(name)})
			}
		}
		if seen += len(names); seen > maxBackScan {
			return said.Sentence("redis has more than " + strconv.Itoa(maxBackScan) + " keys: too many to compare here")
		}
		if len(refs) > 0 {
			// That it takes too long does not open the breaker: it looks at more than clients do.
			rows, err := e.store.Look(ctx, refs)
			switch {
			case ctx.Err() != nil:
				return said.Sentence("the comparison of Redis with Postgres was not done within " + backScanTime.String() + ": try again when they are less busy")
			case err != nil:
				return errors.Join(said.Sentence("postgres cannot be asked for its keys"), err)
			}
			for _, row := range rows {
				if row.State == policy.Absent {
					only++
				}
			}
		}
		if cursor = string(next); cursor == "0" {
			break
		}
	}
	if only > 0 {
		return said.Sentence(strconv.Itoa(only) + " keys of the route are only in Redis and would no longer be seen: copy them with `cacheproxy migrate --reverse`, or let them expire")
	}
	return nil
}

// backScanTime bounds that comparison.
const backScanTime = 30 * time.Second
