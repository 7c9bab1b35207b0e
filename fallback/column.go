package fallback

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"unsafe"

	"github.com/jackc/pgx/v5"

	"cacheproxy/policy"
)

// Column says which column of which table of the application holds the values of a route.
type Column struct {
	Route string
	// Table is the table's name as policy.ParseTable reads it.
	Table string
	// Keys are the columns of the key, in the order of the template's placeholders.
	Keys []string
	// Value is the column of type jsonb that holds the value.
	Value string
	// Expires is a column of type timestamptz that says until when the value counts; "": the route has none, and what
	// the proxy is told of a key's life stands in cacheproxy.meta.
	Expires string
	// Updated is a column of type timestamptz that says when the row was last changed; "": there is none.
	Updated string
	// Template is the pattern of the route's keys.
	Template *policy.Template
	// Unused: the route is in a phase that has no store. The column may be gone, and is looked up when a key is asked for, if ever, or
	// when Register tells of another phase.
	Unused bool
}

// JSON tells whether a column of type jsonb can hold value: whether it is JSON, and such that every Postgres takes it and
// gives it back. Commit refuses what is not (see BadData).
func JSON(value []byte) bool {
	_, ok := gate(value)
	return ok
}

// columns are the columns of a configuration. They are static but for what the catalogue has said of them.
type columns struct {
	list    []*column
	byRoute map[string]*column

	mu sync.Mutex // one look into the catalogue at a time
}

// none are the columns of a store that has none.
var none = &columns{}

func newColumns(list []Column) (*columns, error) {
	if len(list) == 0 {
		return none, nil
	}
	cs := &columns{byRoute: make(map[string]*column, len(list))}
	for _, c := range list {
		if c.Template == nil || len(c.Keys) != len(c.Template.Names()) {
			return nil, fmt.Errorf("fallback: the column of route %s needs a key column for each placeholder", c.Route)
		}
		schema, table, err := policy.ParseTable(c.Table)
		if err != nil {
			return nil, fmt.Errorf("fallback: the table of route %s: %w", c.Route, err)
		}
		if _, taken := cs.byRoute[c.Route]; taken {
			return nil, fmt.Errorf("fallback: route %s has two columns", c.Route)
		}
		one := &column{Column: c, schema: schema, table: table}
		one.unused.Store(c.Unused)
		cs.list, cs.byRoute[c.Route] = append(cs.list, one), one
	}
	return cs, nil
}

// SetColumns replaces the columns. What was begun with the old ones ends with them.
func (s *Store) SetColumns(list []Column) error {
	cs, err := newColumns(list)
	if err == nil {
		s.columns.Store(cs)
	}
	return err
}

// known returns the columns as soon as the catalogue has confirmed those that are in use and those that refs name. Until then
// every use of the store asks the catalogue again, and fails with a *ColumnError for as long as a person has to mend something.
func (s *Store) known(ctx context.Context, refs ...policy.Ref) (*columns, error) {
	cs := s.columns.Load()
	if len(cs.unknown(refs)) == 0 {
		return cs, nil
	}
	cs.mu.Lock()
	defer cs.mu.Unlock()
	list := cs.unknown(refs)
	reports, err := s.lookUp(ctx, list)
	if err != nil {
		return nil, err
	}
	if err := columnError(reports); err != nil {
		return nil, err
	}
	for _, c := range list {
		c.checked.Store(true)
	}
	return cs, nil
}

// enter prepares for a phase of a route: its column comes into use, or goes out of it, and is looked up anew whenever it is used again, since it may have become
// another one. One that cannot be used stays out of it: it is no outage of the others.
func (s *Store) enter(ctx context.Context, route, phase string) error {
	if s.columns.Load().byRoute[route] == nil {
		return nil
	}
	p, err := policy.ParsePhase(phase)
	if err != nil {
		return err
	}
	unused := !p.Rules().UsesStore
	for {
		cs := s.columns.Load()
		if c := cs.byRoute[route]; c == nil || c.unused.Load() == unused {
			return nil
		}
		fresh, err := newColumns(cs.configured())
		if err != nil {
			return err
		}
		fresh.byRoute[route].unused.Store(true) // until it has been looked up
		if s.columns.CompareAndSwap(cs, fresh) {
			break
		}
	}
	if unused {
		return nil
	}
	cs, err := s.known(ctx, policy.Ref{Route: route})
	if err != nil {
		return err
	}
	if c := cs.byRoute[route]; c != nil {
		c.unused.Store(false)
	}
	return nil
}

// unknown are the columns that have to be looked up before refs can be served.
func (cs *columns) unknown(refs []policy.Ref) (list []*column) {
	for _, c := range cs.list {
		if !c.checked.Load() && (!c.unused.Load() || slices.ContainsFunc(refs, func(ref policy.Ref) bool { return ref.Route == c.Route })) {
			list = append(list, c)
		}
	}
	return list
}

// doubt has the catalogue asked again if err says that a table is not as it was, and returns err: a column that was dropped
// is an outage until somebody has mended it, and the poll must not find that it is over before.
func (s *Store) doubt(cs *columns, err error) error {
	if pg := pgError(err); pg != nil && class(pg) == "42" && len(cs.list) > 0 {
		if fresh, err := newColumns(cs.configured()); err == nil {
			s.columns.CompareAndSwap(cs, fresh)
		}
	}
	return err
}

// column is one Column with its SQL. The columns of the table and the literals of the template are part of it, each quoted;
// keys and values never are.
type column struct {
	Column
	schema, table string

	unused  atomic.Bool // as Column says, until Register says otherwise
	checked atomic.Bool // the catalogue has confirmed it; what follows is static from then on

	types  []keyType
	load   string // $1 keys, $2… parts, then route, scope, and what of the values is wanted
	lock   string // $1 keys, $2… parts
	write  string // $1 keys, $2… parts, then JSON, kinds, amounts, drops, route, scope
	page   string // $1… parts to begin behind, then route and limit
	first  string // $1 route, $2 limit
	walk   string // $1… parts to begin behind, then route, scope and limit
	begin  string // $1 route, $2 scope, $3 limit
	sample string // $1 route, $2 scope, $3 limit, $4 percent
	forget string // $1 keys, $2… parts, then route, milliseconds, scope
	recent string // $1 route, $2 since, $3 the key to begin behind, $4 limit
}

// scope names the column's fences among those of the table's routes: what flushes cacheproxy.entries says nothing of a column.
func (c *column) scope() string { return columnScope(c.Route) }

func columnScope(route string) string { return columnFences + route }

// columnFences begins the scopes of columns.
const columnFences = "column "

// relation is the table's name in SQL.
func (c *column) relation() string { return pgx.Identifier{c.schema, c.table}.Sanitize() }

func quoted(name string) string { return pgx.Identifier{name}.Sanitize() }

// keyType is a type whose text is canonical: two texts are two values.
type keyType struct {
	name string            // in SQL
	fits func(string) bool // part is the text of a value
}

// keyTypes by their oid. A type belongs here if its output does not depend on settings and fits accepts nothing but its
// output: a key such as report:007 must not name the row of report:7.
var keyTypes = map[uint32]keyType{
	21:   {"smallint", integer(16)},
	23:   {"integer", integer(32)},
	20:   {"bigint", integer(64)},
	25:   {"text", func(string) bool { return true }},
	1043: {"text", func(string) bool { return true }}, // varchar: a longer text equals none that is there
	2950: {"uuid", isUUID},
}

func integer(bits int) func(string) bool {
	return func(part string) bool {
		n, err := strconv.ParseInt(part, 10, bits)
		return err == nil && strconv.FormatInt(n, 10) == part
	}
}

func isUUID(part string) bool {
	if len(part) != 36 {
		return false
	}
	for i := range len(part) {
		switch c := part[i]; {
		case i == 8 || i == 13 || i == 18 || i == 23:
			if c != '-' {
				return false
			}
		case c >= '0' && c <= '9' || c >= 'a' && c <= 'f':
		default:
			return false
		}
	}
	return true
}

// split returns the parts of a key, and whether a row can have it.
func (c *column) split(key string) ([]string, bool) {
	if !c.checked.Load() {
		return nil, false
	}
	parts, ok := c.Template.Split(key)
	if !ok {
		return nil, false
	}
	for i, part := range parts {
		if !c.types[i].fits(part) {
			return nil, false
		}
	}
	return parts, true
}

// parallel gathers what keys and their parts are in SQL: one array for the keys, and one for each part.
type parallel struct {
	keys  []string
	parts [][]string
}

func (p *parallel) add(key string, parts []string) {
	if p.parts == nil {
		p.parts = make([][]string, len(parts))
	}
	p.keys = append(p.keys, key)
	for i, part := range parts {
		p.parts[i] = append(p.parts[i], part)
	}
}

// args are the arrays and what follows them.
func (p *parallel) args(more ...any) []any {
	args := make([]any, 0, 1+len(p.parts)+len(more))
	args = append(args, p.keys)
	for _, part := range p.parts {
		args = append(args, part)
	}
	return append(args, more...)
}

// compose fills the SQL of c in, once its types are known.
func (c *column) compose() {
	n := len(c.Keys)
	arrays, names, match, order := make([]string, n), make([]string, n), make([]string, n), make([]string, n)
	for i, key := range c.Keys {
		arrays[i] = fmt.Sprintf("$%d::text[]", i+2)
		names[i] = fmt.Sprintf("p%d", i+1)
		match[i] = fmt.Sprintf("r.%s = u.p%d::%s", quoted(key), i+1, c.types[i].name)
		order[i] = "r." + quoted(key)
	}
	word := strings.NewReplacer(
		"{table}", c.relation(), "{value}", quoted(c.Value), "{n}", strconv.Itoa(n),
		"{arrays}", strings.Join(arrays, ", "), "{names}", strings.Join(names, ", "),
		"{match}", strings.Join(match, " AND "), "{order}", strings.Join(order, ", "),
		"{state}", columnStateSQL, "{size}", sizeOf("r."+quoted(c.Value)), "{life}", c.lifeSQL(), "{set}", c.setSQL(), "{kept}", c.keptSQL(),
		"{$1}", c.dollar(1), "{$2}", c.dollar(2), "{$3}", c.dollar(3), "{$4}", c.dollar(4), "{$5}", c.dollar(5), "{$6}", c.dollar(6),
		"{after1}", "$"+strconv.Itoa(n+1), "{after2}", "$"+strconv.Itoa(n+2), "{after3}", "$"+strconv.Itoa(n+3), "{texts}", c.textsSQL(), "{behind}", c.behindSQL(), "{named}", c.namedSQL(),
		"{first}", quoted(c.Keys[0]), "{columns}", c.columnsSQL(), "{key}", c.keySQL("r"), "{joins}", c.joinsSQL("r"), "{updated}", c.updatedSQL(),
	)
	c.load = word.Replace(columnLoadSQL)
	c.lock = word.Replace(columnLockSQL)
	c.write = word.Replace(columnWriteSQL)
	c.first = word.Replace(columnFirstSQL)
	c.page = word.Replace(columnPageSQL)
	c.walk = word.Replace(strings.NewReplacer("{begin}", "{behind} AND", "{route}", "{after1}", "{scope}", "{after2}", "{limit}", "{after3}").Replace(columnWalkSQL))
	c.begin = word.Replace(strings.NewReplacer("{begin}", "", "{route}", "$1", "{scope}", "$2", "{limit}", "$3").Replace(columnWalkSQL))
	c.sample = word.Replace(columnSampleSQL)
	c.forget = word.Replace(columnForgetSQL)
	c.recent = word.Replace(columnRecentSQL)
}

// dollar is the i-th parameter behind the keys and their parts.
func (c *column) dollar(i int) string { return "$" + strconv.Itoa(1+len(c.Keys)+i) }

// lifeSQL is until when the value of r counts, NULL for ever; m is its row of cacheproxy.meta. What that says is for one value,
// and not for another that somebody has put there since. infinity is for ever.
func (c *column) lifeSQL() string {
	if c.Expires != "" {
		return "nullif(r." + quoted(c.Expires) + ", 'infinity')"
	}
	v := "r." + quoted(c.Value)
	return "CASE WHEN m.expires_at IS NOT NULL AND m.digest = sha256(convert_to(" + v + "::text, 'UTF8')) THEN m.expires_at END"
}

// setSQL is what a write sets beside the value; u has it.
func (c *column) setSQL() string {
	set := ""
	if c.Expires != "" {
		set += ", " + quoted(c.Expires) + " = u.ends"
	}
	if c.Updated != "" {
		set += ", " + quoted(c.Updated) + " = clock_timestamp()"
	}
	return set
}

// keptSQL is the moment that cacheproxy.meta keeps of a write.
func (c *column) keptSQL() string {
	if c.Expires != "" {
		return "NULL::timestamptz"
	}
	return "CASE WHEN c.value IS NOT NULL THEN l.ends END"
}

// textsSQL are the parts of the key of r, as text in one array.
func (c *column) textsSQL() string {
	texts := make([]string, len(c.Keys))
	for i, key := range c.Keys {
		texts[i] = "r." + quoted(key) + "::text"
	}
	return "ARRAY[" + strings.Join(texts, ", ") + "]"
}

// columnsSQL are the columns that say what a row reads as.
func (c *column) columnsSQL() string {
	list := make([]string, 0, len(c.Keys)+2)
	for _, key := range c.Keys {
		list = append(list, "r."+quoted(key))
	}
	list = append(list, "r."+quoted(c.Value))
	if c.Expires != "" {
		list = append(list, "r."+quoted(c.Expires))
	}
	return strings.Join(list, ", ")
}

// namedSQL tells whether r has a value in each of its key columns.
func (c *column) namedSQL() string {
	named := make([]string, len(c.Keys))
	for i, key := range c.Keys {
		named[i] = "r." + quoted(key) + " IS NOT NULL"
	}
	return strings.Join(named, " AND ")
}

// behindSQL compares the key of r with the parameters from $1 on, in the order of the unique index.
func (c *column) behindSQL() string {
	left, right := make([]string, len(c.Keys)), make([]string, len(c.Keys))
	for i, key := range c.Keys {
		left[i], right[i] = "r."+quoted(key), fmt.Sprintf("$%d::text::%s", i+1, c.types[i].name)
	}
	return "(" + strings.Join(left, ", ") + ") > (" + strings.Join(right, ", ") + ")"
}

// keySQL is the key of the row r, in SQL what Template.Join is.
func (c *column) keySQL(r string) string {
	lits := c.Template.Literals()
	sql := literalSQL(lits[0])
	for i, key := range c.Keys {
		sql += " || " + r + "." + quoted(key) + "::text"
		if lits[i+1] != "" {
			sql += " || " + literalSQL(lits[i+1])
		}
	}
	return "(" + sql + `) COLLATE "C"`
}

// joinsSQL tells whether the row r has a key, as Template.Join does.
func (c *column) joinsSQL(r string) string {
	lits := c.Template.Literals()
	sql := fmt.Sprintf("octet_length(%s) <= %d AND NOT starts_with(%[1]s, 'cacheproxy:')", c.keySQL(r), policy.MaxKey)
	for i, key := range c.Keys {
		part := r + "." + quoted(key) + "::text"
		sql += " AND " + part + " <> ''"
		if lit := lits[i+1]; lit != "" {
			l := literalSQL(lit)
			sql += fmt.Sprintf(" AND strpos((%s || %s) COLLATE \"C\", %s) = length(%s) + 1", part, l, l, part)
		}
	}
	return sql
}

// updatedSQL are the keys of rows that the application's own column calls changed; nothing without such a column.
func (c *column) updatedSQL() string {
	if c.Updated == "" {
		return ""
	}
	return "UNION SELECT " + c.keySQL("r") + " FROM " + c.relation() + " r WHERE r." + quoted(c.Updated) + " >= $2::timestamptz AND " +
		c.joinsSQL("r") + " AND " + c.keySQL("r") + " > $3::text"
}

// literalSQL is text as a constant, whatever standard_conforming_strings says.
func literalSQL(text string) string {
	q := strings.ReplaceAll(text, "'", "''")
	if strings.Contains(q, `\`) {
		return " E'" + strings.ReplaceAll(q, `\`, `\\`) + "'"
	}
	return "'" + q + "'"
}

// columnStateSQL is the policy.State of a row. It is dead below the fence of its route, by the generation that cacheproxy.meta has
// of it; one that nobody has changed through the proxy is as old as the first.
//
// An empty column is a tombstone if cacheproxy.meta knows of the key, and does not say that the proxy has emptied the column because Redis holds the value from
// then on: there has been a value, or a delete. Where it knows nothing, NULL is what the row was inserted with, and says nothing of the key:
//
//	1 the application inserts the row, in a transaction    2 SET k: there is no row, and Redis alone gets the value
//	3 the transaction is committed; was k deleted?
const columnStateSQL = `CASE WHEN e.generation < e.floor OR e.empty AND e.dropped THEN 0
                  WHEN e.empty OR e.ends <= e.now THEN 1
                  ELSE 2 END`

// columnLoadSQL reads rows by their key columns; $1 says which key of Redis each is.
var columnLoadSQL = `
WITH clock AS MATERIALIZED (SELECT clock_timestamp() AS now),
     fence AS MATERIALIZED (SELECT coalesce(max(g.generation), 0) AS floor FROM cacheproxy.generations g WHERE g.scope = {$2}::text)
SELECT k.key, k.state,
       CASE WHEN k.state <> 2 OR {$3}::smallint = 0 THEN ''
            WHEN {$3}::smallint = 2 THEN convert_to(octet_length(k.value::text)::text, 'UTF8')
            ELSE convert_to(k.value::text, 'UTF8') END,
       CASE WHEN k.state = 2 THEN coalesce((extract(epoch FROM k.ends) * 1000)::bigint, -1) ELSE -1 END,
       CASE WHEN k.state = 2 THEN coalesce((extract(epoch FROM k.ends) * 1000)::bigint
                                           - floor(extract(epoch FROM k.now) * 1000)::bigint, -1) ELSE -1 END,
       k.empty AND k.unknown
FROM (SELECT e.*,
             {state} AS state
      FROM (SELECT u.key, r.{value} AS value, r.{value} IS NULL AS empty, {life} AS ends,
                   coalesce(m.generation, 0) AS generation, coalesce(m.dropped, true) AS dropped, m.key IS NULL AS unknown, fence.floor, clock.now
            FROM clock, fence, unnest($1::text[], {arrays}) AS u(key, {names})
            JOIN {table} r ON {match}
            ` + metaOf("{$1}", "u.key") + `
            OFFSET 0) e) k`

// metaOf joins what cacheproxy.meta has of a key, as m: by its primary key, for each row. Left to the planner it is read whole and compared with every key, as long
// as no ANALYZE has seen that it is not empty any more: two seconds for a thousand keys beside 25,000.
func metaOf(route, key string) string {
	return "LEFT JOIN LATERAL (SELECT * FROM cacheproxy.meta o WHERE o.route = " + route + "::text AND o.key = " + key + " OFFSET 0) m ON true"
}

// columnLockSQL locks rows in the order of their keys, as a statement of the application's that goes through the table does.
const columnLockSQL = `
SELECT count(*)
FROM (SELECT 1
      FROM unnest($1::text[], {arrays}) AS u(key, {names})
      JOIN {table} r ON {match}
      ORDER BY {order}
      FOR NO KEY UPDATE OF r) AS locked`

// columnWriteSQL sets values, or empties the column where there is none, and notes in cacheproxy.meta what the column cannot
// hold. A key without a row stays without one. An empty column is not emptied again: in phase2 every write would make a new
// version of the row. Kinds and amounts are those of upsertSQL. The generation is that of the column's own fences; the shared
// lock of the store keeps it from rising meanwhile.
var columnWriteSQL = `
WITH fence AS MATERIALIZED (SELECT coalesce(max(g.generation), 0) AS floor FROM cacheproxy.generations g WHERE g.scope = {$6}::text),
life AS MATERIALIZED (
    SELECT u.*, u.json::jsonb AS value, r.{value} IS NULL AS empty,
           coalesce(m.dropped AND m.generation >= fence.floor, false) AS was_dropped,
           CASE u.kind
                WHEN 1 THEN date_trunc('milliseconds', clock_timestamp())
                            + (u.ms / 1000) * interval '1 second' + (u.ms % 1000) * interval '1 millisecond'
                WHEN 2 THEN to_timestamp(u.ms / 1000) + (u.ms % 1000) * interval '1 millisecond'
                WHEN 3 THEN CASE WHEN r.{value} IS NOT NULL AND coalesce(m.generation, 0) >= fence.floor AND {life} > clock_timestamp()
                                 THEN {life} END
           END AS ends
    FROM fence, unnest($1::text[], {arrays}, {$1}::text[], {$2}::smallint[], {$3}::bigint[], {$4}::bool[])
                AS u(key, {names}, json, kind, ms, dropped)
    JOIN {table} r ON {match}
    ` + metaOf("{$5}", "u.key") + `
    OFFSET 0
), changed AS (
    UPDATE {table} AS r
    SET {value} = u.value{set}
    FROM life u
    WHERE {match} AND NOT (u.empty AND u.value IS NULL)
    RETURNING u.key, r.{value} AS value
)
INSERT INTO cacheproxy.meta AS m (route, key, expires_at, digest, dropped, generation, updated_at)
SELECT {$5}::text, l.key, {kept},
       CASE WHEN {kept} IS NOT NULL THEN sha256(convert_to(c.value::text, 'UTF8')) END,
       l.dropped, fence.floor, clock_timestamp()
FROM fence, life l
LEFT JOIN changed c ON c.key = l.key
WHERE NOT (l.dropped AND l.was_dropped AND l.empty)
ORDER BY l.key
ON CONFLICT (route, key) DO UPDATE
SET expires_at = excluded.expires_at, digest = excluded.digest, dropped = excluded.dropped,
    generation = excluded.generation, updated_at = excluded.updated_at`

// letGoSQL has it forgotten that keys without a row were deleted: Redis has them now.
const letGoSQL = `
UPDATE cacheproxy.meta SET dropped = true, expires_at = NULL, digest = NULL, updated_at = clock_timestamp()
WHERE route = $1::text AND key = ANY ($2::text[]) AND NOT dropped`

const (
	columnFirstSQL = `
SELECT {texts} FROM {table} r
WHERE {named} AND (r.{value} IS NOT NULL OR EXISTS (SELECT FROM cacheproxy.meta m WHERE m.route = $1::text AND m.key = {key}))
ORDER BY {order}
LIMIT $2::bigint`
	columnPageSQL = `
SELECT {texts} FROM {table} r
WHERE {behind} AND {named}
  AND (r.{value} IS NOT NULL OR EXISTS (SELECT FROM cacheproxy.meta m WHERE m.route = {after1}::text AND m.key = {key}))
ORDER BY {order}
LIMIT {after2}::bigint`
	// What is known of a key is not needed any more if it is as old as tombstones get and says nothing that the row does not say by
	// itself: there is no row; or it is empty, and was not dropped; or the value stays for ever, and no fence has ever been raised.
	//
	// What somebody else has locked is passed over. The triggers lock these rows in the order of the keys, for the rest of the application's transaction:
	//
	//	1 a statement of the application's changes row 2: its trigger locks what is known of it    2 we lock what is known of row 1, and wait for that of row 2
	//	3 its next statement changes row 1: a deadlock, and it may be theirs that is ended
	columnForgetSQL = `
WITH over AS MATERIALIZED (
    SELECT m.key
    FROM cacheproxy.meta m
    JOIN (SELECT u.key, r.{first} IS NULL AS none, r.{value} IS NULL AS empty
          FROM unnest($1::text[], {arrays}) AS u(key, {names})
          LEFT JOIN {table} r ON {match}) k ON m.key = k.key
    WHERE m.route = {$1}::text AND m.key = ANY ($1::text[]) AND m.change IS NULL
      AND m.updated_at < statement_timestamp() - {$2}::bigint * interval '1 millisecond'
      AND (k.none OR k.empty AND NOT m.dropped
           OR NOT k.empty AND m.expires_at IS NULL
              AND NOT EXISTS (SELECT FROM cacheproxy.generations g WHERE g.scope = {$3}::text))
    FOR UPDATE OF m SKIP LOCKED
)
DELETE FROM cacheproxy.meta
WHERE route = {$1}::text AND key = ANY (ARRAY(SELECT o.key FROM over o))`
	columnRecentSQL = `
SELECT m.key FROM cacheproxy.meta m WHERE m.route = $1::text AND m.updated_at >= $2::timestamptz AND m.key > $3::text
{updated}
ORDER BY 1
LIMIT $4::bigint`
)

// columnChunk is one UPDATE's arrays.
type columnChunk struct {
	parallel
	json    []*string
	kinds   []int16
	amounts []int64
	drops   []bool
	bytes   int
}

func (w *columnChunk) queue(b *pgx.Batch, c *column) {
	if len(w.keys) > 0 {
		b.Queue(c.write, w.args(w.json, w.kinds, w.amounts, w.drops, c.Route, c.scope())...)
	}
}

// queueColumn adds what changes ask of c to b, in as few statements as chunkBytes allows. A key that no row can have is left out.
func queueColumn(b *pgx.Batch, c *column, changes []policy.Change) error {
	var w columnChunk
	for i := range changes {
		ch := &changes[i]
		parts, ok := c.split(ch.Ref.Key)
		if !ok {
			continue
		}
		var json *string
		var kind int16
		var amount int64
		size := 0
		if ch.Op == policy.Put {
			canonical, ok := gate(ch.Value)
			if !ok {
				return errNotJSON
			}
			text := unsafe.String(unsafe.SliceData(ch.Value), len(ch.Value)) // the caller's bytes rest until Commit returns
			json, size = &text, max(canonical, len(text))
			kind, amount = expiry(ch.Expiry)
		}
		if w.bytes > 0 && w.bytes+size > chunkBytes {
			w.queue(b, c)
			w = columnChunk{}
		}
		w.add(ch.Ref.Key, parts)
		w.json, w.kinds, w.amounts, w.drops = append(w.json, json), append(w.kinds, kind), append(w.amounts, amount), append(w.drops, ch.Op == policy.Drop)
		w.bytes += size
	}
	w.queue(b, c)
	return nil
}

// queueAll adds what changes ask for to b, those of the table first and then those of each column.
func (cs *columns) queueAll(b *pgx.Batch, changes []policy.Change, rawOnly bool) error {
	if len(cs.list) == 0 {
		queueChanges(b, changes, rawOnly)
		return nil
	}
	of := map[string][]policy.Change{}
	var table []policy.Change
	for _, ch := range changes {
		if _, ok := cs.byRoute[ch.Ref.Route]; ok {
			of[ch.Ref.Route] = append(of[ch.Ref.Route], ch)
		} else {
			table = append(table, ch)
		}
	}
	queueChanges(b, table, rawOnly)
	for _, c := range cs.list {
		if err := queueColumn(b, c, of[c.Route]); err != nil {
			return err
		}
	}
	return nil
}

// among returns the columns that refs name, each with the keys that a row can have.
func (cs *columns) among(refs []policy.Ref) (list []*column, keys []parallel) {
	if len(cs.list) == 0 {
		return nil, nil
	}
	for _, ref := range refs {
		c, ok := cs.byRoute[ref.Route]
		if !ok {
			continue
		}
		i := slices.Index(list, c)
		if i < 0 {
			i, list, keys = len(list), append(list, c), append(keys, parallel{})
		}
		if parts, ok := c.split(ref.Key); ok {
			keys[i].add(ref.Key, parts)
		}
	}
	return list, keys
}

// holder is the place in list of the column that a row of key would be in; -1: none.
func (cs *columns) holder(key string) int {
	for i, c := range cs.list {
		if _, ok := c.split(key); ok {
			return i
		}
	}
	return -1
}

// inUse are the routes whose columns are known, as an argument: never NULL.
func (cs *columns) inUse() []string {
	routes := []string{}
	for _, c := range cs.list {
		if c.checked.Load() {
			routes = append(routes, c.Route)
		}
	}
	return routes
}
