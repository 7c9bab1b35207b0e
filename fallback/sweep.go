package fallback

import (
	"context"
	"math/rand/v2"
	"time"

	"github.com/jackc/pgx/v5"
	"go.uber.org/zap"
)

const (
	// sweepBatch is how many rows one sweep takes: few enough to finish in milliseconds and to hold no writer
	// up on a row lock, many enough to outrun what expires.
	sweepBatch = 500
	// sweepBusy is the pause while there is more to do: at most some 10,000 rows per second and sidecar,
	// with the database free in between.
	sweepBusy = 50 * time.Millisecond
)

// sweepSQL takes at most $1 rows that are over and answers how many it took. A row of a dead generation and a
// tombstone older than $2 milliseconds are removed. An expired row is as old as its last write or the end of its
// life, whichever came later: it is removed at the same age, and made a tombstone of that age before.
//
// Candidates come from three indexes (each with the ORDER BY that makes the planner use it); routes walks the
// distinct routes of the table from one to the next. The statement decides again on the row that it has locked,
// since a writer may have renewed it meanwhile, and passes over rows that somebody else has locked. Arrays, and
// not IN, carry the keys from step to step: they leave the planner nothing but the primary key. No row is in both
// of the last steps, which see the table as it was before either. greatest passes over a NULL. The time is that of
// the statement's start: rather a moment too old than too young.
const sweepSQL = `
WITH RECURSIVE routes (route) AS (
    (SELECT e.route FROM cacheproxy.entries e ORDER BY e.route LIMIT 1)
    UNION ALL
    SELECT (SELECT e.route FROM cacheproxy.entries e WHERE e.route > r.route ORDER BY e.route LIMIT 1)
    FROM routes r WHERE r.route IS NOT NULL
), candidates AS MATERIALIZED (
    (SELECT e.key FROM cacheproxy.entries e
     WHERE e.expires_at <= statement_timestamp()
     ORDER BY e.expires_at LIMIT $1::bigint)
    UNION ALL
    (SELECT e.key FROM cacheproxy.entries e
     WHERE e.value IS NULL AND e.raw IS NULL
       AND e.updated_at < statement_timestamp() - $2::bigint * interval '1 millisecond'
     ORDER BY e.updated_at LIMIT $1::bigint)
    UNION ALL
    (SELECT d.key
     FROM routes r
     CROSS JOIN LATERAL (SELECT coalesce(max(g.generation), 0) AS floor FROM cacheproxy.generations g
                         WHERE g.scope IN ('', r.route)) f
     CROSS JOIN LATERAL (SELECT e.key FROM cacheproxy.entries e
                         WHERE e.route = r.route AND e.generation < f.floor
                         ORDER BY e.generation LIMIT $1::bigint) d
     LIMIT $1::bigint)
), over AS MATERIALIZED (
    SELECT e.key,
           greatest(e.updated_at, e.expires_at) < statement_timestamp() - $2::bigint * interval '1 millisecond'
           OR e.generation < (SELECT coalesce(max(g.generation), 0) FROM cacheproxy.generations g
                              WHERE g.scope IN ('', e.route)) AS gone
    FROM cacheproxy.entries e
    WHERE e.key = ANY (ARRAY(SELECT c.key FROM candidates c))
      AND (e.expires_at <= statement_timestamp()
           OR (e.value IS NULL AND e.raw IS NULL
               AND e.updated_at < statement_timestamp() - $2::bigint * interval '1 millisecond')
           OR e.generation < (SELECT coalesce(max(g.generation), 0) FROM cacheproxy.generations g
                              WHERE g.scope IN ('', e.route)))
    LIMIT $1::bigint
    FOR UPDATE OF e SKIP LOCKED
), turned AS (
    UPDATE cacheproxy.entries
    SET value = NULL, raw = NULL, expires_at = NULL, updated_at = greatest(updated_at, expires_at)
    WHERE key = ANY (ARRAY(SELECT o.key FROM over o WHERE NOT o.gone))
    RETURNING 1
), removed AS (
    DELETE FROM cacheproxy.entries
    WHERE key = ANY (ARRAY(SELECT o.key FROM over o WHERE o.gone))
    RETURNING 1
)
SELECT (SELECT count(*) FROM turned) + (SELECT count(*) FROM removed)`

// Sweep takes one batch of rows that are over and returns how many they were. It removes rows of a dead
// generation, and tombstones and expired rows older than Window; of a younger expired row it leaves a tombstone,
// which is as old as the end of the key's life. It takes no key locks: what it touches reads the same before and
// after, but for the tombstones whose time is over.
func (s *Store) Sweep(ctx context.Context) (int, error) {
	var n int
	err := s.do(ctx, s.house, "sweep", func(ctx context.Context, c *pgx.Conn) error {
		return c.QueryRow(ctx, sweepSQL, sweepBatch, s.cfg.Window.Milliseconds()).Scan(&n)
	})
	return n, err
}

// metaPageSQL is a page of what is known of a column's keys, in their order.
const metaPageSQL = `SELECT key FROM cacheproxy.meta WHERE route = $1::text AND key > $2::text ORDER BY key LIMIT $3::bigint`

// sweepMeta takes one page of cacheproxy.meta, behind the one that it took before, and forgets what is not needed any more. The
// columns themselves are never swept. Most of what is there stays, so that a full walk is no hurry: it only keeps the table
// from growing by keys that the application has deleted.
func (s *Store) sweepMeta(ctx context.Context, at *metaPlace) error {
	cs, err := s.known(ctx)
	if err != nil || len(cs.list) == 0 {
		return err
	}
	if at.column >= len(cs.list) {
		*at = metaPlace{}
	}
	c := cs.list[at.column]
	if !c.checked.Load() {
		*at = metaPlace{column: at.column + 1}
		return nil
	}
	return s.do(ctx, s.house, "sweep what is known of a column", func(ctx context.Context, conn *pgx.Conn) error {
		rows, err := conn.Query(ctx, metaPageSQL, c.Route, at.after, sweepBatch)
		if err != nil {
			return err
		}
		page, err := pgx.CollectRows(rows, pgx.RowTo[string])
		if err != nil {
			return err
		}
		if len(page) < sweepBatch {
			*at = metaPlace{column: at.column + 1}
		} else {
			at.after = page[len(page)-1]
		}
		var keys parallel
		for _, key := range page {
			if parts, ok := c.split(key); ok {
				keys.add(key, parts)
			}
		}
		if len(keys.keys) == 0 {
			return nil
		}
		_, err = conn.Exec(ctx, c.forget, keys.args(c.Route, s.cfg.Window.Milliseconds(), c.scope())...)
		return err
	})
}

// metaPlace is how far sweepMeta has come.
type metaPlace struct {
	column int
	after  string
}

// Run sweeps until ctx ends and then returns nil; nothing that it started is left. A sweep that fails is
// logged once until one succeeds again.
func (s *Store) Run(ctx context.Context) error {
	failing := false
	var meta metaPlace
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-timer.C:
		}
		// The sidecars of a fleet start together and must not sweep together: half to one and a half times.
		pause := s.sweepEvery/2 + rand.N(s.sweepEvery)
		n, err := s.Sweep(ctx)
		if err == nil {
			err = s.sweepMeta(ctx, &meta)
		}
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil && !failing:
			failing = true
			s.cfg.Log.Warn("sweeping the store fails", zap.Error(err))
		case err == nil && failing:
			failing = false
			s.cfg.Log.Info("sweeping the store works again")
		}
		if n == sweepBatch {
			pause = sweepBusy
		}
		timer.Reset(pause)
	}
}
