// Package bridge introduces the data path and the store to each other: proxy states the store it needs, fallback does not know
// who asks, and here the one becomes the other. It holds no logic.
package bridge

import (
	"context"
	"time"

	"cacheproxy/fallback"
	"cacheproxy/policy"
	"cacheproxy/proxy"
)

// Store gives the data path a fallback store.
func Store(s *fallback.Store) proxy.Store { return store{s} }

// Peer is Store for a process that serves no clients.
func Peer(s *fallback.Store) proxy.PeerStore { return store{s} }

type store struct{ s *fallback.Store }

func (b store) Look(ctx context.Context, refs []policy.Ref) ([]policy.Row, error) {
	return b.s.Look(ctx, refs)
}

func (b store) Weigh(ctx context.Context, refs []policy.Ref) ([]int64, error) {
	return b.s.Weigh(ctx, refs)
}

func (b store) Load(ctx context.Context, refs []policy.Ref) ([]policy.Row, error) {
	return b.s.Load(ctx, refs)
}

func (b store) Begin(ctx context.Context, refs []policy.Ref) (proxy.Tx, error) {
	t, err := b.s.Begin(ctx, refs)
	if err != nil {
		return nil, err // not a nil *Tx in an interface
	}
	return tx{t}, nil
}

func (b store) Lock(ctx context.Context, refs []policy.Ref) (proxy.Tx, error) {
	t, err := b.s.Lock(ctx, refs)
	if err != nil {
		return nil, err
	}
	return tx{t}, nil
}

func (b store) Poll(ctx context.Context, after int64) (proxy.StorePoll, error) {
	p, err := b.s.Poll(ctx, after)
	out := proxy.StorePoll{Now: p.Now, More: p.More, Phases: p.Phases}
	out.Intents = intents(p.Intents)
	return out, err
}

func (b store) Register(ctx context.Context, route, phase string) error {
	return b.s.Register(ctx, route, phase)
}

func (b store) Forget(ctx context.Context, route, phase string) error {
	return b.s.Forget(ctx, route, phase)
}

func (b store) Seen(ctx context.Context, routes, phases []string) error {
	return b.s.Seen(ctx, routes, phases)
}

func (b store) Standing(ctx context.Context, route string, rows int) (proxy.StoreStanding, error) {
	s, err := b.s.Standing(ctx, route, rows)
	out := proxy.StoreStanding{Longest: s.Longest, Keys: s.Keys, Partial: s.Partial}
	for _, p := range s.Phases {
		out.Phases = append(out.Phases, proxy.PhaseSeen(p))
	}
	return out, err
}

func (b store) ChangedSince(ctx context.Context, since time.Time, after string, limit int) ([]policy.Ref, error) {
	return b.s.ChangedSince(ctx, since, after, limit)
}

func (b store) Fence(ctx context.Context, scope string, during func(context.Context) error) error {
	return b.s.Fence(ctx, scope, during)
}

func (b store) Lift(ctx context.Context, above int64) (bool, error) { return b.s.Lift(ctx, above) }

func (b store) JSON(value []byte) bool     { return fallback.JSON(value) }
func (b store) Unavailable(err error) bool { return fallback.Unavailable(err) }
func (b store) Uncertain(err error) bool   { return fallback.Uncertain(err) }
func (b store) BadData(err error) bool     { return fallback.BadData(err) }
func (b store) Rejected(err error) bool    { return fallback.Rejected(err) }
func (b store) Overloaded(err error) bool  { return fallback.Overloaded(err) }

type tx struct{ *fallback.Tx }

func (t tx) Commit(ctx context.Context, changes []policy.Change, journal []policy.Ref, known []int64, rawOnly bool) (int64, error) {
	return t.Tx.Commit(ctx, changes, fallback.CommitOptions{Journal: journal, Known: known, RawOnly: rawOnly})
}

func (t tx) Strike(ctx context.Context, ids []int64) ([]proxy.Intent, error) {
	out, err := t.Tx.Strike(ctx, ids)
	return intents(out), err
}

func intents(in []fallback.Intent) (out []proxy.Intent) {
	for _, i := range in {
		out = append(out, proxy.Intent{ID: i.ID, Refs: i.Refs, Age: i.Age})
	}
	return out
}
