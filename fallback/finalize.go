package fallback

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"cacheproxy/policy"
)

const (
	// finalQuiet is how long no sidecar may have served the route in a phase that has a store. Sidecars say so every five seconds;
	// a minute is for one that hangs. What is dropped does not come back, so this is longer than what a step asks for.
	finalQuiet = time.Minute
	// finalLock is how long a statement waits for a table before it lets everybody else go first: whoever asks for a lock that excludes
	// all makes every later one wait behind it.
	finalLock = 2 * time.Second
	// finalTries and finalPause: half a minute in all.
	finalTries = 10
	finalPause = time.Second
	// finalTimeout bounds one statement. Dropping a table or a column rewrites nothing.
	finalTimeout = 30 * time.Second
	// finalBatch rows are deleted at a time: few enough for every other writer to get in between.
	finalBatch = 5000
)

// Removal says what goes with a route.
type Removal struct {
	Route string
	// Column is the adopted column; nil: the rows are in the proxy's own table.
	Column *AdoptedColumn
	// Others are the routes of the configuration in a phase that uses the proxy's own table.
	Others []string
	// Known are all routes of the configuration. A sidecar that serves another one has another configuration, which may name the column.
	Known []string
}

// AdoptedColumn is a column of the application's, by its names in the catalogue.
type AdoptedColumn struct{ Schema, Table, Column string }

// RemovalPlan is what Finalize would do.
type RemovalPlan struct {
	// Against says what speaks against it, each with a remedy. Nothing is done while there is any.
	Against []string
	// Statements are the SQL, for people to read and for psql to run.
	Statements []string
	// Goes are the objects that go with what is dropped, such as indexes.
	Goes []string
	// Done says that there is nothing to remove.
	Done bool
	// Held is not nil if somebody held the table, so that it could not be tried.
	Held *HeldError

	drop  string   // the statement that needs the table for itself; "": none
	first []string // what goes before it
	rows  string   // deletes rows by batches; "": none
	table pgx.Identifier
}

// PlanRemoval looks at what is stored and says how the store of a route is removed and what speaks against it. What would stop the
// statement that drops something is found by running it in a transaction that is rolled back.
func (s *Store) PlanRemoval(ctx context.Context, r Removal) (RemovalPlan, error) {
	const op = "look at what can be removed"
	conn, err := s.pool.Acquire(ctx)
	if err != nil {
		return RemovalPlan{}, wrap(op, err)
	}
	defer conn.Release()
	p, err := planRemoval(ctx, conn, r)
	if err != nil || len(p.Against) > 0 || p.Done || p.drop == "" {
		return p, wrap(op, err)
	}
	err = s.dropping(ctx, p, r, false)
	if blocks, ok := errors.AsType[*DependentError](err); ok {
		p.Against = append(p.Against, blocks.Error())
		err = nil
	}
	if held, ok := errors.AsType[*HeldError](err); ok {
		p.Held, err = held, nil
	}
	return p, wrap(op, err)
}

func planRemoval(ctx context.Context, conn *pgxpool.Conn, r Removal) (p RemovalPlan, err error) {
	var schema bool
	if err := conn.QueryRow(ctx, tableThereSQL, "cacheproxy", "phases").Scan(&schema); err != nil {
		return p, err
	}
	if schema { // else no sidecar was ever here, or everything has gone already
		if p.Against, err = stillUsed(ctx, conn, r); err != nil {
			return p, err
		}
	}
	if r.Column != nil {
		return p, p.column(ctx, conn, r)
	}
	return p, p.entries(ctx, conn, r)
}

const finalPhasesSQL = `
SELECT phase, (extract(epoch FROM clock_timestamp() - last_seen) * 1000000)::bigint
FROM cacheproxy.phases
WHERE route = $1::text AND last_seen > clock_timestamp() - $2::bigint * interval '1 millisecond'
ORDER BY phase`

// backForStrikes is the remedy where the journal names keys of a route that nobody repairs any more: on the way back to a phase that reads the store the rows
// are fenced, and what names dead rows is struck.
var backForStrikes = fmt.Sprintf("then move all sidecars back to %s and one to %s, which makes the rows dead and strikes the entries, and forward again", policy.Drain, policy.Phase2)

// stillUsed says who still reads a route's store, or may.
func stillUsed(ctx context.Context, q querier, r Removal) (against []string, err error) {
	rows, err := q.Query(ctx, finalPhasesSQL, r.Route, finalQuiet.Milliseconds())
	if err != nil {
		return nil, err
	}
	var word string
	var micros int64
	_, err = pgx.ForEachRow(rows, []any{&word, &micros}, func() error {
		if phase, err := policy.ParsePhase(word); err == nil && !phase.Rules().UsesStore {
			return nil
		}
		against = append(against, fmt.Sprintf("a sidecar served the route in %s, which uses the store, %s ago; move all of them to %s, and wait %s after the last",
			word, policy.Short(time.Duration(micros)*time.Microsecond), policy.Phase3, policy.Short(finalQuiet)))
		return nil
	})
	if err != nil {
		return nil, err
	}
	var n int
	if err := q.QueryRow(ctx, `SELECT count(*) FROM cacheproxy.journal WHERE $1::text = ANY (routes)`, r.Route).Scan(&n); err != nil {
		return nil, err
	}
	if n > 0 {
		against = append(against, fmt.Sprintf("the journal has %d entries of the route: Redis may be stale for their keys, and keeps what it has; %s", n, backForStrikes))
	}
	if r.Column == nil {
		return against, nil
	}
	err = servedInStore(ctx, q, r.Route, func(other, phase string) {
		if !slices.Contains(r.Known, other) {
			against = append(against, fmt.Sprintf("a sidecar serves route %s in %s, and this configuration has no such route: it may have the same column; run this with the configuration that all sidecars have, or stop that one and wait %s", other, phase, policy.Short(finalQuiet)))
		}
	})
	return against, err
}

// servedInStore calls found for every route but one that a sidecar serves in a phase that uses the store.
func servedInStore(ctx context.Context, q querier, but string, found func(route, phase string)) error {
	rows, err := q.Query(ctx, otherPhasesSQL, but, finalQuiet.Milliseconds())
	if err != nil {
		return err
	}
	var route, word string
	_, err = pgx.ForEachRow(rows, []any{&route, &word}, func() error {
		if phase, err := policy.ParsePhase(word); err != nil || phase.Rules().UsesStore {
			found(route, word)
		}
		return nil
	})
	return err
}

// querier is a connection or a transaction on it.
type querier interface {
	Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error)
	QueryRow(ctx context.Context, sql string, args ...any) pgx.Row
}

// entries plans for the proxy's own table: it is dropped, or if others use it too, the route's rows are deleted.
func (p *RemovalPlan) entries(ctx context.Context, q querier, r Removal) error {
	var there bool
	p.table = pgx.Identifier{"cacheproxy", "entries"}
	if err := q.QueryRow(ctx, tableThereSQL, "cacheproxy", "entries").Scan(&there); err != nil {
		return err
	}
	if !there {
		p.Done = true
		return nil
	}
	users, err := otherUsers(ctx, q, r)
	if err != nil {
		return err
	}
	if len(users) == 0 {
		p.drop = "DROP TABLE " + p.table.Sanitize()
		p.Statements = []string{p.drop + ";"}
		return nil
	}
	p.Goes = append(p.Goes, "the table stays, because of "+strings.Join(users, ", "))
	var rows bool
	if err := q.QueryRow(ctx, `SELECT EXISTS (SELECT FROM cacheproxy.entries WHERE route = $1::text)`, r.Route).Scan(&rows); err != nil {
		return err
	}
	if !rows {
		p.Done = true
		return nil
	}
	p.rows = entriesBatchSQL
	p.Statements = []string{"DELETE FROM cacheproxy.entries WHERE route = " + literalSQL(r.Route) + ";"}
	return nil
}

const (
	tableThereSQL = `
SELECT EXISTS (SELECT FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
               WHERE n.nspname = $1::text AND c.relname = $2::text AND c.relkind IN ('r', 'p'))`
	entriesBatchSQL = `
DELETE FROM cacheproxy.entries
WHERE key = ANY (ARRAY(SELECT e.key FROM cacheproxy.entries e WHERE e.route = $1::text LIMIT $2::bigint))`
	// The distinct routes, from one to the next along the index that begins with them.
	otherRowsSQL = `
WITH RECURSIVE routes (route) AS (
    (SELECT e.route FROM cacheproxy.entries e ORDER BY e.route LIMIT 1)
    UNION ALL
    SELECT (SELECT e.route FROM cacheproxy.entries e WHERE e.route > r.route ORDER BY e.route LIMIT 1)
    FROM routes r WHERE r.route IS NOT NULL
)
SELECT route FROM routes WHERE route <> $1::text ORDER BY route`
	otherPhasesSQL = `
SELECT route, phase FROM cacheproxy.phases
WHERE route <> $1::text AND last_seen > clock_timestamp() - $2::bigint * interval '1 millisecond' ORDER BY route`
)

// otherUsers names the routes that use the proxy's table besides r's: by the configuration, by what sidecars say, and by their rows.
func otherUsers(ctx context.Context, q querier, r Removal) ([]string, error) {
	var users []string
	add := func(route string) {
		if !slices.Contains(users, "route "+route) {
			users = append(users, "route "+route)
		}
	}
	for _, route := range r.Others {
		add(route)
	}
	if err := servedInStore(ctx, q, r.Route, func(route, _ string) { add(route) }); err != nil {
		return nil, err
	}
	rows, err := q.Query(ctx, otherRowsSQL, r.Route)
	if err != nil {
		return nil, err
	}
	var route string
	_, err = pgx.ForEachRow(rows, []any{&route}, func() error {
		add(route)
		return nil
	})
	return users, err
}

const (
	columnThereSQL = `
SELECT EXISTS (SELECT FROM pg_catalog.pg_class c
               JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
               JOIN pg_catalog.pg_attribute a ON a.attrelid = c.oid
               WHERE n.nspname = $1::text AND c.relname = $2::text AND a.attname = $3::text AND a.attnum > 0 AND NOT a.attisdropped)`
	// What Postgres drops with a column without being asked: indexes, constraints, statistics.
	columnGoesSQL = `
SELECT DISTINCT pg_describe_object(d.classid, d.objid, d.objsubid)
FROM pg_catalog.pg_depend d
JOIN pg_catalog.pg_class c ON c.oid = d.refobjid AND d.refclassid = 'pg_catalog.pg_class'::regclass
JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
JOIN pg_catalog.pg_attribute a ON a.attrelid = c.oid AND a.attnum = d.refobjsubid
WHERE n.nspname = $1::text AND c.relname = $2::text AND a.attname = $3::text AND d.deptype IN ('a', 'i')
ORDER BY 1`
	// The triggers that call the route's function, wherever they are.
	ownTriggersSQL = `
SELECT t.tgname, tn.nspname, c.relname
FROM pg_catalog.pg_trigger t
JOIN pg_catalog.pg_class c ON c.oid = t.tgrelid
JOIN pg_catalog.pg_namespace tn ON tn.oid = c.relnamespace
JOIN pg_catalog.pg_proc p ON p.oid = t.tgfoid
JOIN pg_catalog.pg_namespace pn ON pn.oid = p.pronamespace
WHERE NOT t.tgisinternal AND pn.nspname = 'cacheproxy' AND p.proname = $1::text
ORDER BY 2, 3, 1`
	functionThereSQL = `
SELECT EXISTS (SELECT FROM pg_catalog.pg_proc p JOIN pg_catalog.pg_namespace n ON n.oid = p.pronamespace
               WHERE n.nspname = 'cacheproxy' AND p.proname = $1::text)`
	// Changes of the column that the proxy did not make and has not told Redis of.
	changesSQL   = `SELECT count(*) FROM cacheproxy.meta WHERE route = $1::text AND change IS NOT NULL`
	metaBatchSQL = `
DELETE FROM cacheproxy.meta
WHERE (route, key) IN (SELECT m.route, m.key FROM cacheproxy.meta m WHERE m.route = $1::text LIMIT $2::bigint)`
)

// column plans for an adopted column: the proxy's triggers go, then the column, then what the proxy kept beside it.
func (p *RemovalPlan) column(ctx context.Context, q querier, r Removal) error {
	c := r.Column
	p.table = pgx.Identifier{c.Schema, c.Table}
	var there, meta bool
	if err := q.QueryRow(ctx, columnThereSQL, c.Schema, c.Table, c.Column).Scan(&there); err != nil {
		return err
	}
	if err := q.QueryRow(ctx, tableThereSQL, "cacheproxy", "meta").Scan(&meta); err != nil {
		return err
	}
	ours := meta // the schema is there
	if meta {
		var changes int
		if err := q.QueryRow(ctx, changesSQL, r.Route).Scan(&changes); err != nil {
			return err
		}
		if changes > 0 {
			p.Against = append(p.Against, fmt.Sprintf("%d values of the column were changed by others since a sidecar last looked, and Redis lacks them: stop what writes the column, and SET what is still wanted; %s", changes, backForStrikes))
		}
		if err := q.QueryRow(ctx, `SELECT EXISTS (SELECT FROM cacheproxy.meta WHERE route = $1::text)`, r.Route).Scan(&meta); err != nil {
			return err
		}
	}
	if there {
		if err := p.triggers(ctx, q, trackFunction(r.Route)); err != nil {
			return err
		}
		rows, err := q.Query(ctx, columnGoesSQL, c.Schema, c.Table, c.Column)
		if err != nil {
			return err
		}
		if p.Goes, err = pgx.CollectRows(rows, pgx.RowTo[string]); err != nil {
			return err
		}
		if ours { // it speaks of a column that is gone; another one gets another route (docs/columns.md)
			p.first = append(p.first, "DELETE FROM cacheproxy.generations WHERE scope = "+literalSQL(columnScope(r.Route)))
		}
		p.drop = "ALTER TABLE " + p.table.Sanitize() + " DROP COLUMN " + pgx.Identifier{c.Column}.Sanitize()
		for _, sql := range append(slices.Clone(p.first), p.drop) {
			p.Statements = append(p.Statements, sql+";")
		}
	}
	if meta {
		p.rows = metaBatchSQL
		p.Statements = append(p.Statements, "DELETE FROM cacheproxy.meta WHERE route = "+literalSQL(r.Route)+";")
	}
	p.Done = !there && !meta
	return nil
}

// triggers plans for those that record what others change, and for their function.
func (p *RemovalPlan) triggers(ctx context.Context, q querier, function string) error {
	rows, err := q.Query(ctx, ownTriggersSQL, function)
	if err != nil {
		return err
	}
	var trigger, schema, table string
	if _, err := pgx.ForEachRow(rows, []any{&trigger, &schema, &table}, func() error {
		p.first = append(p.first, "DROP TRIGGER "+pgx.Identifier{trigger}.Sanitize()+" ON "+pgx.Identifier{schema, table}.Sanitize())
		return nil
	}); err != nil {
		return err
	}
	var there bool
	if err := q.QueryRow(ctx, functionThereSQL, function).Scan(&there); err != nil || !there {
		return err
	}
	p.first = append(p.first, "DROP FUNCTION "+pgx.Identifier{"cacheproxy", function}.Sanitize()+"()")
	return nil
}

// DependentError says that something depends on what is to be dropped.
type DependentError struct{ What string }

func (e *DependentError) Error() string {
	return "something depends on it, and has to be changed or dropped first: " + e.What
}

// HeldError says that somebody holds the table.
type HeldError struct{ Who []string }

func (e *HeldError) Error() string {
	who := "who it was is not known any more"
	if len(e.Who) > 0 {
		who = strings.Join(e.Who, "; ")
	}
	return "somebody holds the table: " + who
}

// ErrUsedAgain says that something speaks against a removal that was planned.
var ErrUsedAgain = errors.New("the store is in use again; nothing was removed")

// Finalize does what p, which PlanRemoval made for r, says. tell is called before each attempt to get a table that somebody holds, and for
// every batch of rows with how many were deleted.
func (s *Store) Finalize(ctx context.Context, p RemovalPlan, r Removal, tell func(deleted int64, held error)) error {
	const op = "remove the store of a route"
	if p.drop != "" {
		for try := 1; ; try++ {
			err := s.dropping(ctx, p, r, true)
			held, ok := errors.AsType[*HeldError](err)
			if !ok && err != nil {
				return wrap(op, err)
			}
			if err == nil {
				break
			}
			if try == finalTries {
				return wrap(op, held)
			}
			tell(0, held)
			select {
			case <-ctx.Done():
				return wrap(op, ctx.Err())
			case <-time.After(finalPause):
			}
		}
	}
	if p.rows == "" {
		return nil
	}
	for deleted := int64(0); ; {
		conn, err := s.pool.Acquire(ctx)
		if err != nil {
			return wrap(op, err)
		}
		against, err := stillUsed(ctx, conn, r)
		if err == nil && len(against) > 0 {
			err = ErrUsedAgain
		}
		n := int64(0)
		if err == nil {
			tag, e := conn.Exec(ctx, p.rows, r.Route, finalBatch)
			n, err = tag.RowsAffected(), e
		}
		conn.Release()
		if err != nil {
			return wrap(op, err)
		}
		if deleted += n; n == 0 {
			return nil
		}
		tell(deleted, nil)
	}
}

// dropping runs the statements that need the table for themselves in one transaction, and commits or rolls back. What speaks against it is
// looked at once more while no writer of any sidecar is under way.
func (s *Store) dropping(ctx context.Context, p RemovalPlan, r Removal, commit bool) error {
	conn, err := s.pool.Acquire(ctx)
	if err != nil {
		return err
	}
	defer rollback(conn)
	exec := func(sql string, args ...any) error {
		_, err := conn.Exec(ctx, sql, args...)
		switch pg := pgError(err); {
		case pg == nil:
			return err
		case pg.Code == codeLockNotAvailable:
			rollbackNow(ctx, conn)
			return &HeldError{s.holders(ctx, conn, p.table)}
		case pg.Code == codeDependentObjects:
			return &DependentError{strings.ReplaceAll(pg.Detail, "\n", "; ")}
		}
		return err
	}
	var b pgx.Batch
	b.Queue(beginSQL)
	queueTimeouts(&b, finalTimeout)
	b.Queue("SET LOCAL lock_timeout = " + milliseconds(finalLock))
	if err := conn.SendBatch(ctx, &b).Close(); err != nil {
		return err
	}
	if err := exec(lockStoreSQL, storeLockClass, storeLock); err != nil {
		return err
	}
	var schema bool
	if err := conn.QueryRow(ctx, tableThereSQL, "cacheproxy", "phases").Scan(&schema); err != nil {
		return err
	}
	var against []string
	if schema {
		if against, err = stillUsed(ctx, conn, r); err != nil {
			return err
		}
	}
	if r.Column == nil && len(against) == 0 {
		if against, err = otherUsers(ctx, conn, r); err != nil {
			return err
		}
	}
	if len(against) > 0 {
		return ErrUsedAgain
	}
	for _, sql := range append(slices.Clone(p.first), p.drop) {
		if err := exec(sql); err != nil {
			return err
		}
	}
	if !commit {
		return nil
	}
	tag, err := conn.Exec(ctx, commitSQL)
	if err == nil && tag.String() != commitSQL {
		err = errors.New("the server rolled back")
	}
	return err
}

// rollbackNow ends a transaction on a connection that is used further.
func rollbackNow(ctx context.Context, conn *pgxpool.Conn) {
	_, _ = conn.Exec(ctx, rollbackSQL) // if it fails, so does the next statement
}

// holdersSQL finds who has a lock on a table, or holds the store's own lock.
const holdersSQL = `
SELECT DISTINCT a.pid, coalesce(a.usename, ''), coalesce(a.application_name, ''), coalesce(a.state, ''),
       greatest((extract(epoch FROM clock_timestamp() - coalesce(a.xact_start, a.backend_start)) * 1000000)::bigint, 0)
FROM pg_catalog.pg_locks l
JOIN pg_catalog.pg_stat_activity a ON a.pid = l.pid
LEFT JOIN pg_catalog.pg_class c ON c.oid = l.relation AND l.locktype = 'relation'
LEFT JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE l.granted AND l.pid <> pg_backend_pid()
  AND l.database = (SELECT oid FROM pg_catalog.pg_database WHERE datname = current_database())
  AND ((n.nspname = $1::text AND c.relname = $2::text)
       OR (l.locktype = 'advisory' AND l.classid = $3::bigint::oid AND l.objid = $4::bigint::oid AND l.objsubid = 2))
ORDER BY 5 DESC
LIMIT 5`

// holders names the sessions that hold a table: never what they ask, which may have data in it.
func (s *Store) holders(ctx context.Context, q querier, table pgx.Identifier) (who []string) {
	rows, err := q.Query(ctx, holdersSQL, table[0], table[1], storeLockClass, storeLock)
	if err != nil {
		return nil
	}
	var pid int
	var user, program, state string
	var micros int64
	_, _ = pgx.ForEachRow(rows, []any{&pid, &user, &program, &state, &micros}, func() error { // what is known is told
		text := fmt.Sprintf("process %d of %s", pid, user)
		if program != "" {
			text += " (" + program + ")"
		}
		who = append(who, text+", "+state+", for "+policy.Short(time.Duration(micros)*time.Microsecond))
		return nil
	})
	return who
}
