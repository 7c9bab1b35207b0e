package fallback

import (
	"context"
	"time"

	"github.com/jackc/pgx/v5"
)

const (
	// longestLooked rows of the latest expiries are looked at for the latest of one route: the index is over all routes, and others
	// may outlive it by far. If the route is not among them, the earliest of them bounds it.
	longestLooked = 1000
	// standingLooked rows, those not written for the longest time, are looked at for the keys of one route, for the same reason; and as many of the
	// route's own, if there are too few among them.
	standingLooked = 20_000
	// seenAgain is how old a sighting must be to be renewed: the sidecars of a fleet share one row, and need not all write it.
	seenAgain = 2 * time.Second
)

const (
	// Sorted, so that two sidecars lock the rows in the same order.
	seenSQL = `
INSERT INTO cacheproxy.phases AS p (route, phase, since, last_seen)
SELECT u.route, u.phase, clock_timestamp(), clock_timestamp()
FROM unnest($1::text[], $2::text[]) AS u(route, phase)
WHERE NOT EXISTS (SELECT FROM cacheproxy.phases h WHERE h.route = u.route AND h.phase = u.phase
                  AND h.last_seen > clock_timestamp() - $3::bigint * interval '1 millisecond')
ORDER BY u.route, u.phase
ON CONFLICT (route, phase) DO UPDATE SET last_seen = excluded.last_seen`
	sightingsSQL = `
SELECT phase, greatest((extract(epoch FROM clock_timestamp() - since) * 1000000)::bigint, 0),
       greatest((extract(epoch FROM clock_timestamp() - last_seen) * 1000000)::bigint, 0)
FROM cacheproxy.phases WHERE route = $1::text ORDER BY phase`
	longestSQL = `
SELECT coalesce(greatest((extract(epoch FROM CASE
           WHEN count(*) FILTER (WHERE l.route = $1::text) > 0 THEN max(l.expires_at) FILTER (WHERE l.route = $1::text)
           WHEN count(*) = $2::bigint THEN min(l.expires_at) END - clock_timestamp()) * 1000000)::bigint, 0), 0)
FROM (SELECT e.route, e.expires_at FROM cacheproxy.entries e
      WHERE e.expires_at IS NOT NULL ORDER BY e.expires_at DESC LIMIT $2::bigint) l`
	oldestSQL = `
SELECT l.key
FROM (SELECT e.key, e.route, e.generation, e.expires_at, e.value IS NULL AND e.raw IS NULL AS tombstone
      FROM cacheproxy.entries e ORDER BY e.updated_at LIMIT $3::bigint) l
WHERE l.route = $1::text AND NOT l.tombstone
  AND (l.expires_at IS NULL OR l.expires_at > clock_timestamp())
  AND l.generation >= (SELECT coalesce(max(g.generation), 0) FROM cacheproxy.generations g WHERE g.scope IN ('', $1::text))
LIMIT $2::bigint`
	// Through the index that the sweep has (with the ORDER BY that makes the planner use it): whatever others the table has are not looked at.
	routeKeysSQL = `
WITH l AS MATERIALIZED (
    SELECT e.key, e.expires_at, e.value IS NULL AND e.raw IS NULL AS tombstone
    FROM cacheproxy.entries e
    WHERE e.route = $1::text AND e.generation >= (SELECT coalesce(max(g.generation), 0) FROM cacheproxy.generations g WHERE g.scope IN ('', $1::text))
    ORDER BY e.generation LIMIT $3::bigint)
SELECT (SELECT count(*) FROM l) < $3::bigint,
       ARRAY(SELECT l.key FROM l WHERE NOT l.tombstone AND (l.expires_at IS NULL OR l.expires_at > clock_timestamp()) LIMIT $2::bigint)`
)

// Seen records that routes[i] is still served in phases[i]. A phase that was forgotten is registered again: whoever serves in it may
// write past the store, and must be known.
func (s *Store) Seen(ctx context.Context, routes, phases []string) error {
	return s.do(ctx, s.house, "tell the phases in use", func(ctx context.Context, c *pgx.Conn) error {
		_, err := c.Exec(ctx, seenSQL, routes, phases, seenAgain.Milliseconds())
		return err
	})
}

// Standing is what the store knows of a route's phases and rows.
type Standing struct {
	Phases []PhaseSeen
	// Longest is the longest life that a row of the route has left, or more than that where many rows of other routes live
	// longer; 0 if none has an end.
	Longest time.Duration
	// Keys are of live rows: those first that have not been written for the longest time, or of a column some at random.
	Keys []string
	// Partial: there are fewer of them than were asked for, and more may be among the rows that were not looked at.
	Partial bool
}

// PhaseSeen is a phase in which a route was served: how long ago that was first recorded, and last.
type PhaseSeen struct {
	Phase       string
	Since, Seen time.Duration
}

// Standing reads what speaks for or against a change of a route's phase, with the keys of at most rows rows, or with less than 0
// without a look at the rows. It reads a bounded number of
// rows however large the table is, in the place of a Load: polls must not wait for it.
func (s *Store) Standing(ctx context.Context, route string, rows int) (Standing, error) {
	cs, err := s.known(ctx)
	if err != nil {
		return Standing{}, wrap("look at phases", err)
	}
	column := cs.byRoute[route]
	var out Standing
	err = s.do(ctx, s.reads, "look at phases", func(ctx context.Context, c *pgx.Conn) error {
		out = Standing{}
		var b pgx.Batch
		b.Queue(sightingsSQL, route).Query(func(r pgx.Rows) error {
			var phase string
			var since, seen int64
			_, err := pgx.ForEachRow(r, []any{&phase, &since, &seen}, func() error {
				out.Phases = append(out.Phases, PhaseSeen{phase, time.Duration(since) * time.Microsecond, time.Duration(seen) * time.Microsecond})
				return nil
			})
			return err
		})
		longest := func(r pgx.Row) error {
			var micros int64
			err := r.Scan(&micros)
			out.Longest = time.Duration(micros) * time.Microsecond
			return err
		}
		switch {
		case rows < 0 || column != nil && !column.checked.Load():
		case column != nil:
			sql, args := column.longest()
			b.Queue(sql, args...).QueryRow(longest)
		default:
			b.Queue(longestSQL, route, longestLooked).QueryRow(longest)
		}
		if rows > 0 && column == nil {
			b.Queue(oldestSQL, route, rows, standingLooked).Query(func(r pgx.Rows) (err error) {
				out.Keys, err = pgx.CollectRows(r, pgx.RowTo[string])
				return err
			})
		}
		if err := c.SendBatch(ctx, &b).Close(); err != nil || column != nil || len(out.Keys) >= rows {
			return err
		}
		var all bool
		var more []string
		err := c.QueryRow(ctx, routeKeysSQL, route, rows, standingLooked).Scan(&all, &more)
		oldest := make(map[string]bool, len(out.Keys))
		for _, key := range out.Keys {
			oldest[key] = true
		}
		for _, key := range more {
			if len(out.Keys) < rows && !oldest[key] {
				out.Keys = append(out.Keys, key)
			}
		}
		out.Partial = !all && len(out.Keys) < rows
		return err
	})
	if err == nil && rows > 0 && column != nil && column.checked.Load() {
		out.Keys, out.Partial, err = s.columnKeys(ctx, column, rows)
	}
	if err != nil {
		return Standing{}, err
	}
	return out, nil
}
