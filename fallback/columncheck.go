package fallback

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5"
)

// ColumnReport is what the catalogue says of one column.
type ColumnReport struct {
	Route    string
	Findings []ColumnFinding
	// Trigger says whether changes are recorded that others make.
	Trigger TriggerState
}

// ColumnFinding is something that keeps a column from being used, or, as a warning, is worth to know.
type ColumnFinding struct {
	Problem, Remedy string
	Warning         bool
}

// ColumnError says what keeps columns from being used.
type ColumnError struct {
	Reports []ColumnReport // those that have findings
}

func (e *ColumnError) Error() string {
	var all []string
	for _, r := range e.Reports {
		for _, f := range r.Findings {
			if !f.Warning {
				all = append(all, "route "+r.Route+": "+f.Problem+"; "+f.Remedy)
			}
		}
	}
	return "a column cannot be used: " + strings.Join(all, "; ")
}

// columnError is nil if nothing but warnings was found.
func columnError(reports []ColumnReport) error {
	e := &ColumnError{}
	for _, r := range reports {
		if slices.ContainsFunc(r.Findings, func(f ColumnFinding) bool { return !f.Warning }) {
			e.Reports = append(e.Reports, r)
		}
	}
	if len(e.Reports) == 0 {
		return nil
	}
	return e
}

// CheckColumns looks every column that is in use up in the catalogue. Findings are no error: that is for a Postgres that cannot be asked.
func (s *Store) CheckColumns(ctx context.Context) ([]ColumnReport, error) {
	cs, err := newColumns(s.columns.Load().configured()) // apart from what is in use
	if err != nil {
		return nil, err
	}
	return s.lookUp(ctx, cs.unknown(nil))
}

// UseColumns makes sure that the columns that are in use can be used; the error is a *ColumnError if they cannot.
func (s *Store) UseColumns(ctx context.Context) error {
	_, err := s.known(ctx)
	return wrap("look the columns up", err)
}

func (cs *columns) configured() []Column {
	out := make([]Column, len(cs.list))
	for i, c := range cs.list {
		out[i] = c.Column
		out[i].Unused = c.unused.Load()
	}
	return out
}

// lookUp asks the catalogue for every column of list, and completes those that can be used.
func (s *Store) lookUp(ctx context.Context, list []*column) ([]ColumnReport, error) {
	reports := make([]ColumnReport, len(list))
	err := s.do(ctx, s.house, "look the columns up", func(ctx context.Context, conn *pgx.Conn) error {
		for i, c := range list {
			look := looker{c: c, conn: conn}
			if err := look.all(ctx); err != nil {
				return err
			}
			reports[i] = ColumnReport{Route: c.Route, Findings: look.found, Trigger: look.trigger}
		}
		return nil
	})
	return reports, err
}

// looker is one look at one column.
type looker struct {
	c    *column
	conn *pgx.Conn

	role    string
	oid     uint32
	attrs   map[string]attribute
	found   []ColumnFinding
	trigger TriggerState
}

type attribute struct {
	number           int16
	typ              uint32
	typeName         string
	notNull          bool
	generated        bool
	deterministic    bool
	readable, filled bool // the rights SELECT and UPDATE
	collation        uint32
}

func (l *looker) wrong(remedy, format string, args ...any) {
	l.found = append(l.found, ColumnFinding{Problem: fmt.Sprintf(format, args...), Remedy: remedy})
}

func (l *looker) warn(remedy, format string, args ...any) {
	l.found = append(l.found, ColumnFinding{Problem: fmt.Sprintf(format, args...), Remedy: remedy, Warning: true})
}

// all is the whole look. It returns an error only if Postgres could not be asked.
func (l *looker) all(ctx context.Context) error {
	usable, err := l.relation(ctx)
	if err != nil || !usable {
		return err
	}
	if err := l.attributes(ctx); err != nil {
		return err
	}
	l.columns()
	if len(l.found) == 0 { // an index over columns that are not there would only be said twice
		if err := l.index(ctx); err != nil {
			return err
		}
	}
	if err := l.triggers(ctx); err != nil {
		return err
	}
	if slices.ContainsFunc(l.found, func(f ColumnFinding) bool { return !f.Warning }) {
		return nil
	}
	l.c.types = make([]keyType, len(l.c.Keys))
	for i, key := range l.c.Keys {
		l.c.types[i] = keyTypes[l.attrs[key].typ]
	}
	l.c.compose()
	if err := l.empty(ctx); err != nil {
		return err
	}
	l.trigger, err = l.installed(ctx)
	return err
}

const relationSQL = `
SELECT current_user::text, n.oid IS NOT NULL, coalesce(has_schema_privilege(n.oid, 'USAGE'), false),
       coalesce(c.oid, 0), coalesce(c.relkind::text, ''),
       EXISTS (SELECT FROM pg_catalog.pg_inherits i WHERE i.inhparent = c.oid) AND c.relkind = 'r',
       CASE WHEN c.relkind IN ('r', 'p') THEN row_security_active(c.oid) ELSE false END,
       EXISTS (SELECT FROM pg_catalog.pg_rewrite w WHERE w.ev_class = c.oid AND w.ev_enabled <> 'D'),
       coalesce((SELECT min(o.relname::text) FROM pg_catalog.pg_class o
                 WHERE o.relnamespace = n.oid AND lower(o.relname::text) = lower($2::text) AND o.relkind IN ('r', 'p')), ''),
       coalesce(c.relispartition, false)
FROM (SELECT 1) one
LEFT JOIN pg_catalog.pg_namespace n ON n.nspname = $1::text
LEFT JOIN pg_catalog.pg_class c ON c.relnamespace = n.oid AND c.relname = $2::text`

// relation tells whether there is a table to look at.
func (l *looker) relation(ctx context.Context) (usable bool, err error) {
	c := l.c
	var schema, usage, parent, secured, rules, partition bool
	var kind, near string
	err = l.conn.QueryRow(ctx, relationSQL, c.schema, c.table).Scan(&l.role, &schema, &usage, &l.oid, &kind, &parent, &secured, &rules, &near, &partition)
	if err != nil {
		return false, err
	}
	name := c.relation()
	switch {
	case !schema:
		l.wrong("name the schema of the table in store.table", "there is no schema %s", quoted(c.schema))
		return false, nil
	case l.oid == 0 && near != "":
		l.wrong("write it as it stands in the catalogue", "there is no table %s; did you mean %s?", name, pgx.Identifier{c.schema, near}.Sanitize())
		return false, nil
	case l.oid == 0:
		l.wrong("name one that exists in store.table", "there is no table %s", name)
		return false, nil
	case kind == "v" || kind == "m":
		l.wrong("name the table behind it", "%s is a view", name)
		return false, nil
	case kind == "f":
		l.wrong("name a table of this database", "%s is a foreign table, whose rows cannot be locked", name)
		return false, nil
	case kind != "r" && kind != "p":
		l.wrong("name a table", "%s is no table", name)
		return false, nil
	}
	if !usage {
		l.wrong(fmt.Sprintf("let the owner of the schema run: GRANT USAGE ON SCHEMA %s TO %s;", quoted(c.schema), quoted(l.role)),
			"this role may not use the schema %s", quoted(c.schema))
	}
	if parent {
		l.wrong("name a table without children, or use declarative partitioning", "%s has tables that inherit from it, and no unique index covers them", name)
	}
	if secured {
		l.wrong(fmt.Sprintf("let the owner run: ALTER ROLE %s BYPASSRLS; or use a role that the policies do not concern", quoted(l.role)),
			"row-level security of %s hides rows from this role", name)
	}
	if rules {
		l.wrong("drop the rules, or make them triggers", "%s has rules, which rewrite what the proxy asks", name)
	}
	if partition {
		l.warn("name the partitioned table if keys may be in other partitions", "%s is a partition", name)
	}
	return true, nil
}

const attributesSQL = `
SELECT a.attname::text, a.attnum, a.atttypid::oid, format_type(a.atttypid, a.atttypmod), a.attnotnull, a.attgenerated::text <> '',
       coalesce(co.collisdeterministic, true), a.attcollation::oid,
       has_column_privilege(a.attrelid, a.attnum, 'SELECT'), has_column_privilege(a.attrelid, a.attnum, 'UPDATE')
FROM pg_catalog.pg_attribute a
LEFT JOIN pg_catalog.pg_collation co ON co.oid = a.attcollation
WHERE a.attrelid = $1::oid AND a.attnum > 0 AND NOT a.attisdropped`

func (l *looker) attributes(ctx context.Context) error {
	rows, err := l.conn.Query(ctx, attributesSQL, l.oid)
	if err != nil {
		return err
	}
	l.attrs = map[string]attribute{}
	var name string
	var a attribute
	_, err = pgx.ForEachRow(rows, []any{&name, &a.number, &a.typ, &a.typeName, &a.notNull, &a.generated, &a.deterministic, &a.collation, &a.readable, &a.filled}, func() error {
		l.attrs[name] = a
		return nil
	})
	return err
}

const (
	oidJSONB       = 3802
	oidJSON        = 114
	oidTimestamptz = 1184
	oidTimestamp   = 1114
	oidBpchar      = 1042
)

// columns judges the columns that the configuration names.
func (l *looker) columns() {
	c, table := l.c, l.c.relation()
	readable, written := true, []string{quoted(c.Value)}
	get := func(setting, name string) (attribute, bool) {
		a, ok := l.attrs[name]
		if !ok {
			remedy := "name one that exists in store." + setting
			for other := range l.attrs {
				if strings.EqualFold(other, name) {
					remedy = "did you mean " + other + "?"
				}
			}
			l.wrong(remedy, "%s has no column %s", table, quoted(name))
		}
		readable = readable && (!ok || a.readable)
		return a, ok
	}
	for _, key := range c.Keys {
		a, ok := get("key_column", key)
		if !ok {
			continue
		}
		_, known := keyTypes[a.typ]
		switch {
		case a.typ == oidBpchar:
			l.wrong("use a column of type text, varchar, uuid or an integer type; or ALTER TABLE … ALTER COLUMN … TYPE text",
				"the key column %s is %s, where keys that differ in trailing blanks are one", quoted(key), a.typeName)
		case !known:
			l.wrong("use a column of type text, varchar, uuid or an integer type", "the key column %s is %s, and a value of it may have several spellings", quoted(key), a.typeName)
		case !a.deterministic:
			l.wrong("use a column with a deterministic collation", "the key column %s has a collation in which different keys may be equal", quoted(key))
		}
	}
	if a, ok := get("value_column", c.Value); ok {
		alter := "ALTER TABLE " + table + " ALTER COLUMN " + quoted(c.Value)
		switch {
		case a.typ == oidJSON:
			l.wrong(alter+" TYPE jsonb;", "the value column %s is json", quoted(c.Value))
		case a.typ != oidJSONB:
			l.wrong("name a column of type jsonb in store.value_column", "the value column %s is %s", quoted(c.Value), a.typeName)
		case a.generated:
			l.wrong("name a column that can be written", "the value column %s is generated", quoted(c.Value))
		case a.notNull:
			l.wrong(alter+" DROP NOT NULL;", "the value column %s is NOT NULL, and a deleted key leaves it NULL", quoted(c.Value))
		}
	}
	for _, moment := range []struct{ setting, name string }{{"expires_column", c.Expires}, {"updated_column", c.Updated}} {
		if moment.name == "" {
			continue
		}
		written = append(written, quoted(moment.name))
		a, ok := get(moment.setting, moment.name)
		alter := "ALTER TABLE " + table + " ALTER COLUMN " + quoted(moment.name)
		switch {
		case !ok:
		case a.typ == oidTimestamp:
			l.wrong(alter+" TYPE timestamptz;", "%s %s is a timestamp without time zone, which is another moment in another time zone", moment.setting, quoted(moment.name))
		case a.typ != oidTimestamptz:
			l.wrong("name a column of type timestamptz", "%s %s is %s", moment.setting, quoted(moment.name), a.typeName)
		case a.generated:
			l.wrong("name a column that can be written", "%s %s is generated", moment.setting, quoted(moment.name))
		case a.notNull && moment.name == c.Expires:
			l.wrong(alter+" DROP NOT NULL;", "%s %s is NOT NULL, and a key without a TTL leaves it NULL", moment.setting, quoted(moment.name))
		}
	}
	for _, name := range []string{c.Value, c.Expires, c.Updated} {
		if a, ok := l.attrs[name]; ok && !a.filled {
			l.wrong(fmt.Sprintf("let the owner of the table run: GRANT UPDATE (%s) ON %s TO %s;", strings.Join(written, ", "), table, quoted(l.role)),
				"this role may not update the column %s", quoted(name))
			break
		}
	}
	if !readable {
		l.wrong(fmt.Sprintf("let the owner of the table run: GRANT SELECT ON %s TO %s;", table, quoted(l.role)), "this role may not read %s", table)
	}
}

// An index that is still being built, or deferred, or partial, lets a key name several rows.
const indexSQL = `
SELECT i.indisvalid AND i.indisready, i.indimmediate, i.indpred IS NULL,
       i.indnkeyatts = cardinality($2::smallint[])
       AND (SELECT coalesce(array_agg(k.n ORDER BY k.n), '{}') FROM (SELECT unnest(i.indkey::smallint[]) AS n LIMIT i.indnkeyatts) k)
           = (SELECT array_agg(w.n ORDER BY w.n) FROM unnest($2::smallint[]) AS w(n)),
       NOT EXISTS (SELECT FROM unnest(i.indcollation::oid[], i.indkey::smallint[]) AS x(coll, n)
                   JOIN pg_catalog.pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = x.n
                   WHERE x.coll <> 0 AND x.coll <> a.attcollation)
FROM pg_catalog.pg_index i
JOIN pg_catalog.pg_class c ON c.oid = i.indexrelid
JOIN pg_catalog.pg_am m ON m.oid = c.relam
WHERE i.indrelid = $1::oid AND i.indisunique AND i.indexprs IS NULL AND m.amname = 'btree'`

// index looks for the unique index that makes a key the name of one row.
func (l *looker) index(ctx context.Context) error {
	numbers := make([]int16, len(l.c.Keys))
	names := make([]string, len(l.c.Keys))
	for i, key := range l.c.Keys {
		numbers[i], names[i] = l.attrs[key].number, quoted(key)
	}
	rows, err := l.conn.Query(ctx, indexSQL, l.oid, numbers)
	if err != nil {
		return err
	}
	because := ""
	good := false
	var valid, immediate, whole, same, collated bool
	_, err = pgx.ForEachRow(rows, []any{&valid, &immediate, &whole, &same, &collated}, func() error {
		switch {
		case !same:
		case !whole:
			because = "; one is partial"
		case !immediate:
			because = "; one is deferrable"
		case !valid:
			because = "; one is invalid or not ready yet"
		case !collated:
			because = "; one has another collation than its column"
		default:
			good = true
		}
		return nil
	})
	if err == nil && !good {
		l.wrong(fmt.Sprintf("CREATE UNIQUE INDEX CONCURRENTLY ON %s (%s);", l.c.relation(), strings.Join(names, ", ")),
			"%s has no unique index on exactly %s that holds for every row at once%s", l.c.relation(), strings.Join(names, ", "), because)
	}
	return err
}

// triggers looks for those that come before a change of a row, and may make it another one.
func (l *looker) triggers(ctx context.Context) error {
	var names []string
	err := l.conn.QueryRow(ctx, `
SELECT coalesce(array_agg(t.tgname::text ORDER BY t.tgname), '{}')
FROM pg_catalog.pg_trigger t
WHERE t.tgrelid = $1::oid AND NOT t.tgisinternal AND t.tgenabled IN ('O', 'A')
  AND t.tgtype & 1 <> 0 AND t.tgtype & 2 <> 0 AND t.tgtype & 16 <> 0`, l.oid).Scan(&names)
	if err == nil && len(names) > 0 {
		l.warn("see that it leaves the value column as it is written", "a trigger runs before every UPDATE of %s: %s", l.c.relation(), strings.Join(names, ", "))
	}
	return err
}

// errTried ends the transaction in which something was tried.
var errTried = errors.New("tried")

const emptySQL = `
UPDATE {table} r SET {value} = NULL{nulls}
FROM (SELECT {order} FROM {table} r LIMIT 1 FOR NO KEY UPDATE OF r SKIP LOCKED) x
WHERE {same}`

// empty empties the column of one row and takes that back: a constraint may forbid what the catalogue allows.
func (l *looker) empty(ctx context.Context) error {
	c := l.c
	nulls := ""
	if c.Expires != "" {
		nulls = ", " + quoted(c.Expires) + " = NULL"
	}
	order, same := make([]string, len(c.Keys)), make([]string, len(c.Keys))
	for i, key := range c.Keys {
		order[i], same[i] = "r."+quoted(key), "r."+quoted(key)+" = x."+quoted(key)
	}
	sql := strings.NewReplacer("{table}", c.relation(), "{value}", quoted(c.Value), "{nulls}", nulls,
		"{order}", strings.Join(order, ", "), "{same}", strings.Join(same, " AND ")).Replace(emptySQL)
	err := pgx.BeginFunc(ctx, l.conn, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, ownSQL); err != nil {
			return err
		}
		if _, err := tx.Exec(ctx, sql); err != nil {
			return err
		}
		return errTried
	})
	pg := pgError(err)
	switch {
	case errors.Is(err, errTried):
		return nil
	case pg != nil && class(pg) == "23" && pg.ConstraintName != "":
		l.wrong(fmt.Sprintf("let it accept NULL: ALTER TABLE %s DROP CONSTRAINT %s, ADD CONSTRAINT %[2]s CHECK (%s IS NULL OR …);",
			c.relation(), quoted(pg.ConstraintName), quoted(c.Value)),
			"the constraint %s refuses NULL in the value column %s, and a deleted key leaves it NULL", quoted(pg.ConstraintName), quoted(c.Value))
		return nil
	case pg != nil && rejects(pg):
		l.wrong("let the table accept it", "NULL in the value column %s is refused, and a deleted key leaves it NULL", quoted(c.Value))
		return nil
	}
	return err
}
