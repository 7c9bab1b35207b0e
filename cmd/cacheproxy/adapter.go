package main

import (
	"context"
	"errors"
	"sync/atomic"

	"cacheproxy/fallback"
	"cacheproxy/internal/admin"
	"cacheproxy/internal/bridge"
	"cacheproxy/policy"
	"cacheproxy/proxy"

	"github.com/jackc/pgx/v5/pgconn"
)

// store is a fallback.Store as a running process has it: besides what the proxy asks of it, a database may answer and yet
// be of no use, and may be so for hours.
type store struct {
	proxy.Store
	db *fallback.Store
	// standby: a write was refused because the server takes none. Reads would still work there, and the rows that they
	// find may be older than what was acknowledged.
	standby atomic.Bool
}

func newStore(db *fallback.Store) *store { return &store{Store: bridge.Store(db), db: db} }

// noted looks at what a write came to. A server that takes no writes is left: new connections look for the primary.
func (s *store) noted(err error) error {
	if fallback.ReadOnly(err) && !s.standby.Swap(true) {
		s.db.Reset()
	}
	return err
}

func (s *store) Begin(ctx context.Context, refs []policy.Ref) (proxy.Tx, error) {
	t, err := s.Store.Begin(ctx, refs)
	if err != nil {
		return nil, s.noted(err)
	}
	return tx{t, s}, nil
}

func (s *store) Lock(ctx context.Context, refs []policy.Ref) (proxy.Tx, error) {
	t, err := s.Store.Lock(ctx, refs)
	if err != nil {
		return nil, s.noted(err)
	}
	return tx{t, s}, nil
}

// noIntent is the id of no journal entry: they begin at 1.
const noIntent = 0

// Poll is the probe that declares the store fit for use again. After a write was refused it has to see one succeed.
func (s *store) Poll(ctx context.Context, after int64) (proxy.StorePoll, error) {
	if s.standby.Load() {
		if err := s.db.Strike(ctx, []int64{noIntent}); err != nil {
			if fallback.ReadOnly(err) {
				s.db.Reset()
			}
			return proxy.StorePoll{}, err
		}
		s.standby.Store(false)
	}
	return s.Store.Poll(ctx, after)
}

func (s *store) Register(ctx context.Context, route, phase string) error {
	return s.noted(s.Store.Register(ctx, route, phase))
}

// Codes of a database that answers and yet cannot be our store: the schema, a table, a column or a right is missing.
const (
	codeNoTable  = "42P01"
	codeNoSchema = "3F000"
	codeNoRight  = "42501"
	codeNoColumn = "42703"
)

func (s *store) Unavailable(err error) bool {
	if s.Store.Unavailable(err) || fallback.ReadOnly(err) {
		return true
	}
	if _, ok := errors.AsType[*fallback.ColumnError](err); ok {
		return true
	}
	pg, ok := errors.AsType[*pgconn.PgError](err)
	return ok && (pg.Code == codeNoTable || pg.Code == codeNoSchema || pg.Code == codeNoRight || pg.Code == codeNoColumn)
}

// tx tells its store what became of the commit.
type tx struct {
	proxy.Tx
	s *store
}

func (t tx) Commit(ctx context.Context, changes []policy.Change, journal []policy.Ref, known []int64, rawOnly bool) (int64, error) {
	intent, err := t.Tx.Commit(ctx, changes, journal, known, rawOnly)
	return intent, t.s.noted(err)
}

func (t tx) Strike(ctx context.Context, ids []int64) ([]proxy.Intent, error) {
	there, err := t.Tx.Strike(ctx, ids)
	return there, t.s.noted(err)
}

// admission is a process as the HTTP handlers want it.
type admission struct{ p *process }

var (
	_ admin.Observed   = admission{}
	_ admin.Controlled = admission{}
)

func (a admission) Health() admin.Health {
	h := a.p.server.Health()
	return admin.Health{
		Serving:  h.Serving,
		Draining: h.Draining,
		Redis:    admin.Store{Status: h.Redis.Status, Reason: h.Redis.Reason, Since: h.Redis.Since},
		Postgres: admin.Store{Status: h.Postgres.Status, Reason: h.Postgres.Reason, Since: h.Postgres.Since},
	}
}

func (a admission) Stats(ctx context.Context) any { return a.p.server.Stats(ctx) }

func (a admission) ReadyRequires() string { return a.p.settings.current().Health.ReadyRequires }

func (a admission) Identity() map[string]string {
	return map[string]string{"version": versionText(), "instance": a.p.instance}
}

func (a admission) Reload() error { return a.p.reload() }

func (a admission) Phases(ctx context.Context, route string) (any, error) {
	out, err := a.p.server.Standings(ctx, route)
	if errors.Is(err, proxy.ErrNoRoute) {
		return nil, admin.ErrNoRoute
	}
	return out, err
}

func (a admission) SetPhase(route string, to policy.Phase, force bool) error {
	move := a.p.server.SetPhase
	if force {
		move = a.p.server.ForcePhase
	}
	err := move(route, to)
	if errors.Is(err, proxy.ErrNoRoute) {
		return admin.ErrNoRoute
	}
	return err
}
