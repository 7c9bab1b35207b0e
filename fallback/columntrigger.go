package fallback

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
)

// TriggerState is a closed list: whether changes of a column are recorded that others make.
type TriggerState uint8

const (
	// TriggerMissing: they are not. What is changed behind the proxy's back reaches Redis when its copy expires.
	TriggerMissing TriggerState = iota
	// TriggerInstalled: they are, as SchemaSQL of the column says.
	TriggerInstalled
	// TriggerOutdated: they are recorded as for another configuration or version, or by some statements only.
	TriggerOutdated
)

// changeKeys is how many keys have one number in the order of the journal, and are repaired together. A hundred is what one repair takes
// on at once; an entry may only be struck under the locks of all its keys.
const changeKeys = 100

// triggerSQL is what records changes of a column that are not the proxy's own. A statement leaves one row of cacheproxy.meta for each
// key that it has changed, however often others change it: a later change gives the row another number, and who has struck the
// earlier one has not struck the later. It becomes visible with the change itself, and voids what meta says of the value before.
//
// The functions run with the rights of their owner, so that whoever changes the table needs none; their search_path is fixed.
// To compile their expressions would take longer than to run them: for 20,000 rows 0.4 s, of 0.7.
const triggerSQL = `-- Records changes of {table}.{value} that are not made through cacheproxy, for the route {name}.
-- Run it as a superuser, or as a role that owns the table and may create in the schema cacheproxy. It may be repeated.
-- To remove it: DROP FUNCTION cacheproxy.{function} CASCADE;
BEGIN;
SET LOCAL client_min_messages = warning;
SET LOCAL lock_timeout = '5s'; -- the triggers wait for statements on the table, and others wait behind them

CREATE OR REPLACE FUNCTION cacheproxy.{function}() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET jit = off
AS $cacheproxy${body}$cacheproxy$;

DROP TRIGGER IF EXISTS {insert} ON {table};
DROP TRIGGER IF EXISTS {update} ON {table};
DROP TRIGGER IF EXISTS {delete} ON {table};
DROP TRIGGER IF EXISTS {truncate} ON {table};
CREATE TRIGGER {insert} AFTER INSERT ON {table} REFERENCING NEW TABLE AS new_rows
    FOR EACH STATEMENT EXECUTE FUNCTION cacheproxy.{function}();
CREATE TRIGGER {update} AFTER UPDATE ON {table} REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows
    FOR EACH STATEMENT EXECUTE FUNCTION cacheproxy.{function}();
CREATE TRIGGER {delete} AFTER DELETE ON {table} REFERENCING OLD TABLE AS old_rows
    FOR EACH STATEMENT EXECUTE FUNCTION cacheproxy.{function}();
CREATE TRIGGER {truncate} BEFORE TRUNCATE ON {table}
    FOR EACH STATEMENT EXECUTE FUNCTION cacheproxy.{function}();
REVOKE ALL ON FUNCTION cacheproxy.{function}() FROM PUBLIC;

DO $owner$
DECLARE
    owner text := (SELECT r.rolname FROM pg_catalog.pg_namespace n JOIN pg_catalog.pg_roles r ON r.oid = n.nspowner WHERE n.nspname = 'cacheproxy');
BEGIN
    EXECUTE format('ALTER FUNCTION cacheproxy.{function}() OWNER TO %I', owner);
    IF NOT has_table_privilege(owner, {regclass}, 'SELECT') THEN -- TRUNCATE has to name the keys that were there
        EXECUTE format({grant}, owner);
    END IF;
END
$owner$;
COMMIT;
`

// bodySQL is the function. An UPDATE that leaves value, key and expiry alone leaves no trace, nor does the expiry of an empty column. A deleted row leaves
// one if it had a value, or if the proxy has noted that Redis holds it alone.
const bodySQL = `
DECLARE
    changed text[];
BEGIN
    IF current_setting('cacheproxy.own', true) = 'on' THEN
        RETURN NULL;
    ELSIF TG_OP = 'INSERT' THEN
        changed := ARRAY(SELECT {newkey} FROM new_rows n WHERE n.{value} IS NOT NULL AND {newjoins});
    ELSIF TG_OP = 'UPDATE' THEN
        changed := ARRAY(
            SELECT CASE WHEN n.{first} IS NULL THEN {oldkey} ELSE {newkey} END
            FROM new_rows n FULL JOIN old_rows o ON {same}
            WHERE CASE WHEN n.{first} IS NULL THEN {oldheld} AND {oldjoins}
                       WHEN o.{first} IS NULL THEN n.{value} IS NOT NULL AND {newjoins}
                       ELSE (n.{value} IS DISTINCT FROM o.{value}{expires}) AND {newjoins} END);
    ELSIF TG_OP = 'DELETE' THEN
        changed := ARRAY(SELECT {oldkey} FROM old_rows o WHERE {oldheld} AND {oldjoins});
    ELSE
        changed := ARRAY(SELECT {oldkey} FROM {table} o WHERE {oldheld} AND {oldjoins});
    END IF;
    IF cardinality(changed) = 0 THEN
        RETURN NULL;
    END IF;
    WITH numbered AS (
        SELECT d.key, (row_number() OVER (ORDER BY d.key) - 1) / {keys} AS part
        FROM (SELECT DISTINCT u.key COLLATE "C" AS key FROM unnest(changed) AS u(key)) d
    ), parts AS MATERIALIZED (
        SELECT p.part, nextval('cacheproxy.journal_id_seq') AS id FROM (SELECT DISTINCT n.part FROM numbered n) p
    )
    INSERT INTO cacheproxy.meta AS m (route, key, generation, updated_at, change)
    SELECT {route}, n.key, (SELECT coalesce(max(g.generation), 0) FROM cacheproxy.generations g WHERE g.scope = {scope}),
           clock_timestamp(), p.id
    FROM numbered n JOIN parts p ON p.part = n.part
    ORDER BY n.key
    ON CONFLICT (route, key) DO UPDATE
    SET expires_at = NULL, digest = NULL, dropped = false,
        generation = excluded.generation, updated_at = excluded.updated_at, change = excluded.change;
    RETURN NULL;
END
`

// TriggerSQL returns the statements that make Postgres record changes of c that are not the proxy's own.
func TriggerSQL(c Column) (string, error) {
	cs, err := newColumns([]Column{c})
	if err != nil {
		return "", err
	}
	if strings.Contains(cs.list[0].body(), "$cacheproxy$") {
		return "", errors.New("fallback: a name or the pattern holds $cacheproxy$, which quotes the function")
	}
	return cs.list[0].triggerSQL(), nil
}

// function is the name of the column's trigger function; the triggers' begin with it.
func (c *column) function() string {
	return trackFunction(c.Route)
}

func trackFunction(route string) string {
	sum := sha256.Sum256([]byte(route))
	return "track_" + hex.EncodeToString(sum[:6])
}

// triggerNames are those of the column's triggers.
func (c *column) triggerNames() map[string]string {
	names := map[string]string{}
	for _, op := range []string{"insert", "update", "delete", "truncate"} {
		names[op] = "cacheproxy_" + c.function() + "_" + op
	}
	return names
}

func (c *column) triggerSQL() string {
	names := c.triggerNames()
	return strings.NewReplacer(
		"{table}", c.relation(), "{value}", quoted(c.Value), "{name}", c.Route, "{function}", c.function(), "{body}", c.body(),
		"{insert}", names["insert"], "{update}", names["update"], "{delete}", names["delete"], "{truncate}", names["truncate"],
		"{regclass}", literalSQL(c.relation())+"::regclass", "{grant}", literalSQL("GRANT SELECT ON "+strings.ReplaceAll(c.relation(), "%", "%%")+" TO %I"),
	).Replace(triggerSQL)
}

// body is what the function of the column must be for what is recorded to be right.
func (c *column) body() string {
	same := make([]string, len(c.Keys))
	for i, key := range c.Keys {
		same[i] = "n." + quoted(key) + " = o." + quoted(key)
	}
	expires := ""
	if c.Expires != "" {
		expires = " OR n." + quoted(c.Value) + " IS NOT NULL AND n." + quoted(c.Expires) + " IS DISTINCT FROM o." + quoted(c.Expires)
	}
	oldKey := c.keySQL("o")
	held := fmt.Sprintf("(o.%s IS NOT NULL OR EXISTS (SELECT FROM cacheproxy.meta m WHERE m.route = %s AND m.key = %s AND m.dropped))",
		quoted(c.Value), literalSQL(c.Route), oldKey)
	return strings.NewReplacer(
		"{table}", c.relation(), "{value}", quoted(c.Value), "{expires}", expires, "{keys}", fmt.Sprint(changeKeys),
		"{same}", strings.Join(same, " AND "), "{first}", quoted(c.Keys[0]), "{oldheld}", held,
		"{newkey}", c.keySQL("n"), "{oldkey}", oldKey, "{newjoins}", c.joinsSQL("n"), "{oldjoins}", c.joinsSQL("o"),
		"{route}", literalSQL(c.Route), "{scope}", literalSQL(c.scope()),
	).Replace(bodySQL)
}

const installedSQL = `
SELECT t.tgname::text, p.prosrc, p.prosecdef, t.tgenabled IN ('O', 'A') AND t.tgqual IS NULL
FROM pg_catalog.pg_trigger t
JOIN pg_catalog.pg_proc p ON p.oid = t.tgfoid
JOIN pg_catalog.pg_namespace n ON n.oid = p.pronamespace
WHERE t.tgrelid = $1::oid AND n.nspname = 'cacheproxy' AND p.proname = $2::text`

// installed looks for the column's triggers.
func (l *looker) installed(ctx context.Context) (TriggerState, error) {
	rows, err := l.conn.Query(ctx, installedSQL, l.oid, l.c.function())
	if err != nil {
		return TriggerMissing, err
	}
	body, want := l.c.body(), l.c.triggerNames()
	right, n := 0, 0
	var name, source string
	var definer, enabled bool
	for rows.Next() {
		if err := rows.Scan(&name, &source, &definer, &enabled); err != nil {
			rows.Close()
			return TriggerMissing, err
		}
		n++
		for _, w := range want {
			if name == w && source == body && definer && enabled {
				right++
			}
		}
	}
	switch err := rows.Err(); {
	case err != nil:
		return TriggerMissing, err
	case n == 0:
		return TriggerMissing, nil
	case right == len(want):
		return TriggerInstalled, nil
	}
	return TriggerOutdated, nil
}
