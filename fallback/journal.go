package fallback

import (
	"context"
	"time"

	"github.com/jackc/pgx/v5"

	"cacheproxy/policy"
)

const (
	// pollLimit bounds one poll. Oldest first, so that what remains is never forgotten; a thousand rows are
	// more than a sidecar repairs between two polls.
	pollLimit = 1000
	// maxPhases bounds what a poll returns of cacheproxy.phases: routes times phases ever used. More than this
	// is not a configuration but a runaway writer.
	maxPhases = 10_000
	// commitLag is how much earlier than asked ChangedSince looks: a row carries the time of its INSERT, and
	// becomes visible with the COMMIT that follows in the same round trip. Ten seconds exceed any commit that
	// still keeps its deadline, and cost no more than a few repairs that were not needed.
	commitLag = 10 * time.Second
	// maxPage bounds one page of ChangedSince: 10,000 keys of 2,000 bytes are 20 MB.
	maxPage = 10_000
)

const (
	intentSQL = `
INSERT INTO cacheproxy.journal (keys, routes)
SELECT array_agg(u.key), array_agg(u.route)
FROM unnest($1::text[], $2::text[], $3::bigint[]) AS u(key, route, known)
WHERE NOT EXISTS (SELECT FROM cacheproxy.journal j WHERE j.id = u.known)
  AND NOT EXISTS (SELECT FROM cacheproxy.meta m WHERE m.route = u.route AND m.key = u.key AND m.change = u.known)
HAVING count(*) > 0
RETURNING id`
	strikeSQL = `DELETE FROM cacheproxy.journal WHERE id = ANY ($1::bigint[])`
	// The rows of what is struck count as changed now. What Redis is told because of an entry may be lost in a failover like any write, and
	// only what changed since the clock there is looked at then (see Store.ChangedSince):
	//
	//	1 K's row changes while Redis cannot be reached: entry E    2 an hour later Redis is back, and a sidecar sets the clock there
	//	3 K is deleted in Redis, and E struck    4 Redis fails over to a replica that has the clock, and K
	//
	// A row of meta that is made for that says of an empty column what none says: nothing.
	takeSQL = `
WITH struck AS (` + strikeSQL + ` RETURNING id, keys, routes),
touched AS (
    UPDATE cacheproxy.entries SET updated_at = clock_timestamp()
    WHERE key = ANY (ARRAY(SELECT unnest(s.keys) FROM struck s))
),
noted AS (
    INSERT INTO cacheproxy.meta (route, key, dropped, generation, updated_at)
    SELECT d.route, d.key, true, 0, clock_timestamp()
    FROM (SELECT DISTINCT u.route, u.key
          FROM struck s CROSS JOIN LATERAL unnest(s.keys, s.routes) AS u(key, route)
          WHERE u.route = ANY ($2::text[])) d
    ORDER BY d.route, d.key
    ON CONFLICT (route, key) DO UPDATE SET updated_at = excluded.updated_at
)
SELECT id, keys, routes FROM struck ORDER BY id`
	// What triggers have recorded is struck like an entry: the keys of one number are one. What was recorded below a fence of the column says nothing of its keys any
	// more, also where there is no row that could be dead:
	//
	//	1 K's row is deleted in SQL    2 K is written through phase3    3 the way back fences the route; because of the record K would go in Redis
	toldSQL = `
WITH told AS (
    UPDATE cacheproxy.meta m SET change = NULL, updated_at = clock_timestamp()
    FROM (SELECT DISTINCT unnest($1::bigint[]) AS id) i
    WHERE m.change = i.id
    RETURNING i.id, m.key, m.route,
              m.generation >= (SELECT coalesce(max(g.generation), 0) FROM cacheproxy.generations g WHERE g.scope = '` + columnFences + `' || m.route) AS counts
)
SELECT t.id, coalesce(array_agg(t.key) FILTER (WHERE t.counts), '{}'), coalesce(array_agg(t.route) FILTER (WHERE t.counts), '{}')
FROM told t GROUP BY t.id ORDER BY t.id`
	namedSQL = `
SELECT DISTINCT u.key
FROM cacheproxy.journal j CROSS JOIN unnest(j.keys) AS u(key)
WHERE j.keys && $1::text[] AND u.key = ANY ($1::text[])
UNION
SELECT m.key FROM cacheproxy.meta m
WHERE m.route = ANY ($2::text[]) AND m.key = ANY ($1::text[]) AND m.change IS NOT NULL`
	// recallsSQL: a row that is inserted now, with nothing in its column, would read as a tombstone, or an entry names the key.
	recallsSQL = `
SELECT EXISTS (SELECT FROM cacheproxy.meta m
               WHERE m.route = ANY ($2::text[]) AND m.key = ANY ($1::text[]) AND (m.change IS NOT NULL OR NOT m.dropped))
    OR EXISTS (SELECT FROM cacheproxy.journal j WHERE j.keys && $1::text[])`
	clockSQL = `SELECT clock_timestamp()`
	pollSQL  = `
SELECT id, keys, routes, greatest((extract(epoch FROM clock_timestamp() - created_at) * 1000000)::bigint, 0)
FROM cacheproxy.journal
WHERE id > $2::bigint
ORDER BY id
LIMIT $1::bigint`
	// The same where columns are: what triggers have recorded of the routes $3 is read with the entries, in one order of numbers.
	pollColumnsSQL = `
SELECT p.id, p.keys, p.routes, greatest((extract(epoch FROM clock_timestamp() - p.at) * 1000000)::bigint, 0)
FROM ((SELECT j.id, j.keys, j.routes, j.created_at AS at FROM cacheproxy.journal j WHERE j.id > $2::bigint ORDER BY j.id LIMIT $1::bigint)
      UNION ALL
      (SELECT m.change, array_agg(m.key), array_agg(m.route), min(m.updated_at)
       FROM cacheproxy.meta m
       WHERE m.change > $2::bigint AND m.route = ANY ($3::text[])
       GROUP BY m.change ORDER BY m.change LIMIT $1::bigint)) p
ORDER BY p.id
LIMIT $1::bigint`
	phasesSQL   = `SELECT route, phase FROM cacheproxy.phases ORDER BY route, phase LIMIT $1::bigint`
	registerSQL = `
INSERT INTO cacheproxy.phases AS p (route, phase, since, last_seen)
VALUES ($1::text, $2::text, clock_timestamp(), clock_timestamp())
ON CONFLICT (route, phase) DO UPDATE SET last_seen = excluded.last_seen`
	changedSQL = `
SELECT route, key
FROM cacheproxy.entries
WHERE updated_at >= $1::timestamptz AND key > $2::text
ORDER BY key
LIMIT $3::bigint`
	allSQL = `SELECT route, key FROM cacheproxy.entries WHERE key > $1::text ORDER BY key LIMIT $2::bigint`
)

// queueIntent adds one journal row for refs to b; its answer is the row's id. known is as in CommitOptions.
func queueIntent(b *pgx.Batch, refs []policy.Ref, known []int64) {
	keys, routes := make([]string, len(refs)), make([]string, len(refs))
	for i, ref := range refs {
		keys[i], routes[i] = ref.Key, ref.Route
	}
	if known == nil {
		known = []int64{}
	}
	b.Queue(intentSQL, keys, routes, known)
}

func newIntent(id int64, keys, routes []string) Intent {
	in := Intent{ID: id, Refs: make([]policy.Ref, len(keys))}
	for i := range keys { // a CHECK holds that both arrays are of one length
		in.Refs[i] = policy.Ref{Route: routes[i], Key: keys[i]}
	}
	return in
}

// Strike deletes journal rows. Rows that are gone already do not matter.
func (s *Store) Strike(ctx context.Context, intents []int64) error {
	if len(intents) == 0 {
		return nil
	}
	return s.do(ctx, s.house, "strike", func(ctx context.Context, c *pgx.Conn) error {
		if _, err := c.Exec(ctx, strikeSQL, intents); err != nil || len(s.columns.Load().list) == 0 {
			return err
		}
		_, err := c.Exec(ctx, toldSQL, intents)
		return err
	})
}

// Intent is one journal row: Redis may be stale for Refs.
type Intent struct {
	ID   int64
	Refs []policy.Ref
	Age  time.Duration // on the server's clock
}

// Poll is what a sidecar has to know regularly.
type Poll struct {
	Now     time.Time // the server's clock
	Intents []Intent  // oldest first, at most 1,000
	More    bool      // there are more of them
	// Phases names for each route every phase that was ever registered, in alphabetical order.
	Phases map[string][]string
}

// Poll reads the clock, the journal and the phases in one round trip. Of the journal it answers a page: the rows behind after.
func (s *Store) Poll(ctx context.Context, after int64) (Poll, error) {
	cs, err := s.known(ctx)
	if err != nil {
		return Poll{}, wrap("poll", err)
	}
	var p Poll
	err = s.do(ctx, s.house, "poll", func(ctx context.Context, c *pgx.Conn) error {
		p = Poll{Phases: map[string][]string{}}
		var b pgx.Batch
		b.Queue(clockSQL)
		if len(cs.list) == 0 {
			b.Queue(pollSQL, pollLimit+1, after)
		} else {
			b.Queue(pollColumnsSQL, pollLimit+1, after, cs.inUse())
		}
		b.Queue(phasesSQL, maxPhases)
		br := c.SendBatch(ctx, &b)
		err := p.read(br)
		if cerr := br.Close(); err == nil {
			err = cerr
		}
		return err
	})
	if err != nil {
		return Poll{}, err
	}
	return p, nil
}

func (p *Poll) read(br pgx.BatchResults) error {
	if err := br.QueryRow().Scan(&p.Now); err != nil {
		return err
	}
	rows, err := br.Query()
	if err != nil {
		return err
	}
	var id, micros int64
	var keys, routes []string
	_, err = pgx.ForEachRow(rows, []any{&id, &keys, &routes, &micros}, func() error {
		if len(p.Intents) == pollLimit {
			p.More = true
			return nil
		}
		in := newIntent(id, keys, routes)
		in.Age = time.Duration(micros) * time.Microsecond
		p.Intents = append(p.Intents, in)
		return nil
	})
	if err != nil {
		return err
	}
	if rows, err = br.Query(); err != nil {
		return err
	}
	var route, phase string
	_, err = pgx.ForEachRow(rows, []any{&route, &phase}, func() error {
		p.Phases[route] = append(p.Phases[route], phase)
		return nil
	})
	return err
}

// Register records that route is served in phase; the first time stays, the last time is now. A column is looked up for a phase that uses it, and what others
// change there is polled from then on.
func (s *Store) Register(ctx context.Context, route, phase string) error {
	if err := s.enter(ctx, route, phase); err != nil {
		return wrap("register a phase", err)
	}
	return s.do(ctx, s.house, "register a phase", func(ctx context.Context, c *pgx.Conn) error {
		_, err := c.Exec(ctx, registerSQL, route, phase)
		return err
	})
}

// Forget takes back what Register recorded.
func (s *Store) Forget(ctx context.Context, route, phase string) error {
	return s.do(ctx, s.house, "forget a phase", func(ctx context.Context, c *pgx.Conn) error {
		_, err := c.Exec(ctx, `DELETE FROM cacheproxy.phases WHERE route = $1 AND phase = $2`, route, phase)
		return err
	})
}

// ChangedSince returns the keys of rows (tombstones, expired and dead ones included) that were written since
// a time on the server's clock, or of all rows if since is zero. The sweep may have made tombstones of expired
// rows; these are listed also if they only expired since. Keys come in an order of their own, those after the key
// after, limit at most (0 and more than 10,000 mean 10,000): the last key of a page is the next after, and a
// page shorter than limit is the last. Of a column that the application has, all rows are those that are not empty or that
// cacheproxy.meta speaks of. It looks ten seconds further back than since, because a row becomes
// visible a little later than the time it carries. Rows written while the pages are read may be missing; their
// writers are alive and finish their own work.
func (s *Store) ChangedSince(ctx context.Context, since time.Time, after string, limit int) ([]policy.Ref, error) {
	if limit <= 0 || limit > maxPage {
		limit = maxPage
	}
	cs, err := s.known(ctx)
	if err != nil {
		return nil, wrap("list changed keys", err)
	}
	l := lister{s: s, cs: cs, since: since, limit: limit}
	if i := cs.holder(after); i >= 0 {
		if err := l.columns(ctx, i, after); err != nil {
			return nil, err
		}
		return l.refs, nil
	}
	if err := l.table(ctx, after); err != nil {
		return nil, err
	}
	if len(l.refs) < limit {
		if err := l.columns(ctx, 0, ""); err != nil {
			return nil, err
		}
	}
	return l.refs, nil
}

// lister gathers one page of ChangedSince: the keys of the table, then those of each column. A key says by itself among which it
// is, as one that a column may have is never listed for the table. What stands there of it is left from another configuration.
type lister struct {
	s     *Store
	cs    *columns
	since time.Time
	limit int
	refs  []policy.Ref
}

// table lists keys of the table behind after.
func (l *lister) table(ctx context.Context, after string) error {
	for {
		// The statement is planned anew for each page: a plan made for any since would expect a third of the table
		// and walk the primary key for the handful of rows that a short outage has changed.
		limit := l.limit - len(l.refs)
		sql, args := allSQL, []any{pgx.QueryExecModeExec, after, limit}
		if !l.since.IsZero() {
			sql, args = changedSQL, []any{pgx.QueryExecModeExec, l.since.Add(-commitLag), after, limit}
		}
		var page []policy.Ref
		err := l.s.do(ctx, l.s.house, "list changed keys", func(ctx context.Context, c *pgx.Conn) error {
			rows, err := c.Query(ctx, sql, args...)
			if err != nil {
				return err
			}
			page, err = pgx.CollectRows(rows, pgx.RowToStructByPos[policy.Ref])
			return err
		})
		if err != nil {
			return err
		}
		for _, ref := range page {
			if l.cs.holder(ref.Key) < 0 {
				l.refs = append(l.refs, ref)
			}
		}
		if len(page) < limit || len(l.refs) == l.limit {
			return nil
		}
		after = page[len(page)-1].Key
	}
}

// columns lists keys of the column from and those that follow it, in the first behind after.
func (l *lister) columns(ctx context.Context, from int, after string) error {
	for i := from; i < len(l.cs.list) && len(l.refs) < l.limit; i++ {
		if !l.cs.list[i].checked.Load() {
			continue
		}
		list := l.recent
		if l.since.IsZero() {
			list = l.rows
		}
		if err := list(ctx, l.cs.list[i], after); err != nil {
			return err
		}
		after = ""
	}
	return nil
}

// recent lists what has changed of a column, in the order of the keys.
func (l *lister) recent(ctx context.Context, c *column, after string) error {
	return l.s.do(ctx, l.s.house, "list changed keys", func(ctx context.Context, conn *pgx.Conn) error {
		rows, err := conn.Query(ctx, c.recent, pgx.QueryExecModeExec, c.Route, l.since.Add(-commitLag), after, l.limit-len(l.refs))
		if err != nil {
			return err
		}
		keys, err := pgx.CollectRows(rows, pgx.RowTo[string])
		if err != nil {
			return err
		}
		for _, key := range keys {
			l.refs = append(l.refs, policy.Ref{Route: c.Route, Key: key})
		}
		return nil
	})
}

// rows lists the rows of a column, in the order of its key columns. A row that has no key (see Template.Join) is passed over.
func (l *lister) rows(ctx context.Context, c *column, after string) error {
	behind, _ := c.split(after)
	for {
		limit := l.limit - len(l.refs)
		var page [][]string
		err := l.s.do(ctx, l.s.house, "list changed keys", func(ctx context.Context, conn *pgx.Conn) error {
			sql, args := c.first, []any{pgx.QueryExecModeExec}
			if behind != nil {
				sql = c.page
				for _, part := range behind {
					args = append(args, part)
				}
			}
			rows, err := conn.Query(ctx, sql, append(args, c.Route, limit)...)
			if err != nil {
				return err
			}
			page, err = pgx.CollectRows(rows, pgx.RowTo[[]string])
			return err
		})
		if err != nil {
			return err
		}
		for _, parts := range page {
			if key := c.Template.Join(parts); key != "" {
				l.refs = append(l.refs, policy.Ref{Route: c.Route, Key: key})
			}
		}
		if len(page) < limit || len(l.refs) == l.limit {
			return nil
		}
		behind = page[len(page)-1]
	}
}

// countLimit is up to where Counts counts exactly; beyond, an estimate is as good and costs nothing.
const countLimit = 10_000

// Counts is how much is stored.
type Counts struct {
	Rows    int64         // rows of entries of any kind: exact up to 10,000, the planner's estimate beyond
	Bytes   int64         // entries on disk with its indexes and long values
	Journal int64         // journal rows and keys that triggers have recorded, each counted up to 10,000
	Oldest  time.Duration // age of the oldest journal row; 0 without one
}

const countsSQL = `
SELECT CASE WHEN n.exact <= $1::bigint THEN n.exact
            ELSE greatest(n.exact, (SELECT c.reltuples FROM pg_catalog.pg_class c
                                    WHERE c.oid = 'cacheproxy.entries'::regclass)::bigint) END,
       pg_total_relation_size('cacheproxy.entries'),
       (SELECT count(*) FROM (SELECT 1 FROM cacheproxy.journal LIMIT $1::bigint) j)
       + (SELECT count(*) FROM (SELECT 1 FROM cacheproxy.meta WHERE change IS NOT NULL LIMIT $1::bigint) m),
       greatest(0, (SELECT (extract(epoch FROM clock_timestamp() - created_at) * 1000000)::bigint
                    FROM cacheproxy.journal ORDER BY id LIMIT 1),
                   (SELECT (extract(epoch FROM clock_timestamp() - updated_at) * 1000000)::bigint
                    FROM cacheproxy.meta WHERE change IS NOT NULL ORDER BY change LIMIT 1))
FROM (SELECT count(*) AS exact FROM (SELECT 1 FROM cacheproxy.entries LIMIT $1::bigint + 1) e) n`

// Counts is for people to look at: cheap, and exact only where it is small.
func (s *Store) Counts(ctx context.Context) (Counts, error) {
	var n Counts
	err := s.do(ctx, s.house, "count", func(ctx context.Context, c *pgx.Conn) error {
		var micros int64
		err := c.QueryRow(ctx, countsSQL, countLimit).Scan(&n.Rows, &n.Bytes, &n.Journal, &micros)
		n.Oldest = time.Duration(micros) * time.Microsecond
		return err
	})
	return n, err
}
