package fallback

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
)

// plan is PlanRemoval that must not fail.
func plan(t *testing.T, s *Store, r Removal) RemovalPlan {
	t.Helper()
	p, err := s.PlanRemoval(context.Background(), r)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// removing is a store with a schema, and a connection beside it.
func removing(t *testing.T) (*Store, *pgx.Conn) {
	t.Helper()
	s := open(t)
	conn, err := pgx.Connect(context.Background(), s.cfg.URL)
	must(t, err)
	t.Cleanup(func() { conn.Close(context.Background()) })
	return s, conn
}

func execute(t *testing.T, c *pgx.Conn, text string, args ...any) {
	t.Helper()
	if _, err := c.Exec(context.Background(), text, args...); err != nil {
		t.Fatalf("%s: %v", text, err)
	}
}

func there(t *testing.T, c *pgx.Conn, text string) (yes bool) {
	t.Helper()
	if err := c.QueryRow(context.Background(), "SELECT "+text).Scan(&yes); err != nil {
		t.Fatal(err)
	}
	return yes
}

func silent(int64, error) {}

const entriesThere = `to_regclass('cacheproxy.entries') IS NOT NULL`

// What may still read the rows keeps them.
func TestPlanRemovalRefuses(t *testing.T) {
	s, c := removing(t)
	ctx := context.Background()
	for _, tt := range []struct{ name, before, says, after string }{
		{"a sidecar in drain", `INSERT INTO cacheproxy.phases VALUES ('a', 'drain', now(), now() - interval '30 seconds')`, "in drain, which uses the store, 30s ago", `DELETE FROM cacheproxy.phases`},
		{"a sidecar in phase2", `INSERT INTO cacheproxy.phases VALUES ('a', 'phase2', now(), now())`, "in phase2", `DELETE FROM cacheproxy.phases`},
		{"the journal", `INSERT INTO cacheproxy.journal (keys, routes) VALUES ('{k,l}', '{b,a}')`, "the journal has 1 entries of the route", `DELETE FROM cacheproxy.journal`},
		{"a view", `CREATE VIEW public.seen AS SELECT key FROM cacheproxy.entries`, "view seen depends on table ", `DROP VIEW public.seen`},
	} {
		execute(t, c, tt.before)
		p := plan(t, s, Removal{Route: "a"})
		if len(p.Against) != 1 || !strings.Contains(p.Against[0], tt.says) {
			t.Errorf("%s: %q", tt.name, p.Against)
		}
		execute(t, c, tt.after)
	}
	for _, harmless := range []string{
		`INSERT INTO cacheproxy.phases VALUES ('a', 'phase3', now(), now())`,
		`INSERT INTO cacheproxy.phases VALUES ('a', 'phase2', now(), now() - interval '2 minutes')`,
		`INSERT INTO cacheproxy.journal (keys, routes) VALUES ('{k}', '{b}')`,
	} {
		execute(t, c, harmless)
	}
	p := plan(t, s, Removal{Route: "a"})
	if len(p.Against) > 0 || p.Done || len(p.Statements) != 1 || p.Statements[0] != `DROP TABLE "cacheproxy"."entries";` {
		t.Fatalf("%+v", p)
	}
	if !there(t, c, entriesThere) {
		t.Fatal("the plan has dropped the table")
	}
	// A sidecar that comes between the plan and what it plans is seen.
	execute(t, c, `UPDATE cacheproxy.phases SET last_seen = now() WHERE phase = 'phase2'`)
	if err := s.Finalize(ctx, p, Removal{Route: "a"}, silent); !errors.Is(err, ErrUsedAgain) || !there(t, c, entriesThere) {
		t.Fatalf("with a sidecar that came back: %v", err)
	}
	execute(t, c, `DELETE FROM cacheproxy.phases`)
	if err := s.Finalize(ctx, p, Removal{Route: "a"}, silent); err != nil || there(t, c, entriesThere) {
		t.Fatalf("%v", err)
	}
	if p := plan(t, s, Removal{Route: "a"}); !p.Done {
		t.Errorf("a second time: %+v", p)
	}
	if n, err := s.Sweep(ctx); !undefinedTable(err) {
		t.Errorf("the sweep: %d %v", n, err)
	}
	execute(t, c, `DROP SCHEMA cacheproxy CASCADE`)
	if p := plan(t, s, Removal{Route: "a"}); !p.Done {
		t.Errorf("without the schema: %+v", p)
	}
}

// A table that others use too stays, and only the route's rows go.
func TestFinalizeSharedTable(t *testing.T) {
	s, c := removing(t)
	ctx := context.Background()
	fill := func(route string, n int) {
		execute(t, c, `INSERT INTO cacheproxy.entries (key, value, route, generation, updated_at) SELECT $1 || i, '1', $1, 0, now() FROM generate_series(1, $2::int) i`, route, n)
	}
	fill("a", 2*finalBatch+1)
	fill("it's", 3)
	for _, tt := range []struct {
		name   string
		others []string
	}{
		{"configured", []string{"it's"}},
		{"with rows", nil},
	} {
		if p := plan(t, s, Removal{Route: "a", Others: tt.others}); len(p.Against) > 0 || len(p.Statements) != 1 || p.Statements[0] != "DELETE FROM cacheproxy.entries WHERE route = 'a';" {
			t.Errorf("%s: %+v", tt.name, p)
		}
	}
	if p := plan(t, s, Removal{Route: "it's"}); p.Statements[0] != "DELETE FROM cacheproxy.entries WHERE route = 'it''s';" {
		t.Errorf("quotes: %q", p.Statements)
	}
	var told []int64
	p := plan(t, s, Removal{Route: "a"})
	if err := s.Finalize(ctx, p, Removal{Route: "a"}, func(n int64, _ error) { told = append(told, n) }); err != nil {
		t.Fatal(err)
	}
	if fmt.Sprint(told) != fmt.Sprint([]int64{finalBatch, 2 * finalBatch, 2*finalBatch + 1}) {
		t.Errorf("told %v", told)
	}
	if !there(t, c, `(SELECT count(*) FROM cacheproxy.entries) = 3`) {
		t.Error("other rows are left, or fewer")
	}
	if p := plan(t, s, Removal{Route: "a"}); !p.Done {
		t.Errorf("a second time: %+v", p)
	}
	// The last one takes the table with it; a sidecar that says it uses the table keeps it, without rows too.
	execute(t, c, `INSERT INTO cacheproxy.phases VALUES ('other', 'phase1', now(), now())`)
	if p := plan(t, s, Removal{Route: "it's"}); !strings.HasPrefix(p.Statements[0], "DELETE") {
		t.Errorf("another route in use: %+v", p)
	}
	execute(t, c, `DELETE FROM cacheproxy.phases`)
	if p := plan(t, s, Removal{Route: "it's"}); !strings.HasPrefix(p.Statements[0], "DROP TABLE") {
		t.Errorf("the last route: %+v", p)
	}
}

// Somebody who holds the table is named and waited for, and nobody queues behind us meanwhile for long.
func TestFinalizeWaits(t *testing.T) {
	s, c := removing(t)
	ctx := context.Background()
	p := plan(t, s, Removal{Route: "a"})
	execute(t, c, `SET application_name = 'holder'`)
	execute(t, c, `BEGIN`)
	execute(t, c, `LOCK TABLE cacheproxy.entries IN ACCESS SHARE MODE`)
	if p := plan(t, s, Removal{Route: "a"}); p.Held == nil || !strings.Contains(p.Held.Error(), "somebody holds the table: process ") || !strings.Contains(p.Held.Error(), "(holder), idle in transaction, for ") {
		t.Errorf("the plan: %+v", p)
	}
	tried := 0
	err := s.Finalize(ctx, p, Removal{Route: "a"}, func(_ int64, held error) {
		if held == nil || !strings.Contains(held.Error(), "(holder)") {
			t.Errorf("held: %v", held)
		}
		if tried++; tried == 2 {
			execute(t, c, `COMMIT`)
		}
	})
	if err != nil || tried != 2 || there(t, c, entriesThere) {
		t.Errorf("%v after %d attempts", err, tried)
	}
	// It is given up when the caller does.
	if err := s.EnsureSchema(ctx); err != nil {
		t.Fatal(err)
	}
	p = plan(t, s, Removal{Route: "a"})
	execute(t, c, `BEGIN`)
	execute(t, c, `LOCK TABLE cacheproxy.entries IN ACCESS SHARE MODE`)
	ending, cancel := context.WithCancel(ctx)
	if err := s.Finalize(ending, p, Removal{Route: "a"}, func(int64, error) { cancel() }); !errors.Is(err, context.Canceled) {
		t.Errorf("after the end of the caller: %v", err)
	}
	execute(t, c, `COMMIT`)
	if !there(t, c, entriesThere) {
		t.Error("the table has gone all the same")
	}
}

func TestFinalizeColumn(t *testing.T) {
	s, c := removing(t)
	ctx := context.Background()
	execute(t, c, `CREATE SCHEMA "my app"`)
	execute(t, c, `CREATE TABLE "my app"."Reports" (id int PRIMARY KEY, cache jsonb, name text)`)
	execute(t, c, `CREATE INDEX by_cache ON "my app"."Reports" ((cache ->> 'a'))`)
	execute(t, c, `CREATE TABLE IF NOT EXISTS cacheproxy.meta (route text, key text, expires_at timestamptz, updated_at timestamptz, generation bigint, change bigint, PRIMARY KEY (route, key))`)
	execute(t, c, `INSERT INTO cacheproxy.meta (route, key, updated_at, generation) VALUES ('r', 'k', now(), 0), ('q', 'k', now(), 0)`)
	execute(t, c, `INSERT INTO cacheproxy.generations VALUES ('column r', 1), ('r', 1)`)
	own, other := trackFunction("r"), trackFunction("q")
	for _, f := range []string{own, other} { // of two routes with columns of one table
		execute(t, c, `CREATE FUNCTION cacheproxy.`+f+`() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'`)
		for _, op := range []string{"INSERT", "UPDATE"} {
			execute(t, c, `CREATE TRIGGER `+f+`_`+op+` AFTER `+op+` ON "my app"."Reports" FOR EACH STATEMENT EXECUTE FUNCTION cacheproxy.`+f+`()`)
		}
	}
	execute(t, c, `CREATE FUNCTION public.theirs() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END'`)
	execute(t, c, `CREATE TRIGGER theirs AFTER UPDATE ON "my app"."Reports" FOR EACH ROW EXECUTE FUNCTION public.theirs()`)
	r := Removal{Route: "r", Column: &AdoptedColumn{"my app", "Reports", "cache"}}

	execute(t, c, `CREATE VIEW public.seen AS SELECT cache FROM "my app"."Reports"`)
	if p := plan(t, s, r); len(p.Against) != 1 || !strings.Contains(p.Against[0], "view seen depends on") {
		t.Errorf("with a view: %+v", p)
	}
	execute(t, c, `DROP VIEW public.seen`)
	execute(t, c, `ALTER TABLE "my app"."Reports" ADD COLUMN a text GENERATED ALWAYS AS (cache ->> 'a') STORED`)
	if p := plan(t, s, r); len(p.Against) != 1 || !strings.Contains(p.Against[0], "column a of table") {
		t.Errorf("with a generated column: %+v", p)
	}
	execute(t, c, `ALTER TABLE "my app"."Reports" DROP COLUMN a`)

	execute(t, c, `UPDATE cacheproxy.meta SET change = 7`)
	if p := plan(t, s, r); len(p.Against) != 1 || !strings.Contains(p.Against[0], "1 values of the column were changed by others") {
		t.Errorf("with changes of others: %+v", p)
	}
	execute(t, c, `UPDATE cacheproxy.meta SET change = NULL`)

	// Whoever serves a route that nobody here knows has another configuration.
	execute(t, c, `INSERT INTO cacheproxy.phases VALUES ('renamed', 'phase1', now(), now()), ('elsewhere', 'phase3', now(), now()), ('long ago', 'phase1', now(), now() - interval '2 minutes')`)
	stranger := plan(t, s, r)
	if len(stranger.Against) != 1 || !strings.Contains(stranger.Against[0], "serves route renamed in phase1, and this configuration has no such route") {
		t.Errorf("with a route of another configuration: %q", stranger.Against)
	}
	stranger.Against = nil
	if err := s.Finalize(ctx, stranger, r, silent); !errors.Is(err, ErrUsedAgain) {
		t.Errorf("done all the same: %v", err)
	}
	r.Known = []string{"r", "renamed"} // which has another column there

	p := plan(t, s, r)
	want := []string{
		`DROP TRIGGER "` + own + `_insert" ON "my app"."Reports";`,
		`DROP TRIGGER "` + own + `_update" ON "my app"."Reports";`,
		`DROP FUNCTION "cacheproxy"."` + own + `"();`,
		`DELETE FROM cacheproxy.generations WHERE scope = 'column r';`,
		`ALTER TABLE "my app"."Reports" DROP COLUMN "cache";`,
		`DELETE FROM cacheproxy.meta WHERE route = 'r';`,
	}
	if len(p.Against) > 0 || strings.Join(p.Statements, "\n") != strings.Join(want, "\n") {
		t.Fatalf("%q, %q", p.Against, p.Statements)
	}
	if len(p.Goes) != 1 || !strings.Contains(p.Goes[0], "index") || !strings.Contains(p.Goes[0], "by_cache") {
		t.Errorf("what goes with it: %q", p.Goes)
	}
	if err := s.Finalize(ctx, p, r, silent); err != nil {
		t.Fatal(err)
	}
	if !there(t, c, `(SELECT array_agg(attname::text ORDER BY attnum) = '{id,name}' FROM pg_attribute WHERE attrelid = '"my app"."Reports"'::regclass AND attnum > 0 AND NOT attisdropped)
		AND (SELECT count(*) = 3 AND bool_or(tgname = 'theirs') FROM pg_trigger WHERE NOT tgisinternal) AND to_regproc('cacheproxy.`+other+`') IS NOT NULL AND to_regproc('cacheproxy.`+own+`') IS NULL AND (SELECT array_agg(route) = '{q}' FROM cacheproxy.meta) AND (SELECT array_agg(scope) = '{r}' FROM cacheproxy.generations)`) {
		t.Error("something else went, or not all")
	}
	if p := plan(t, s, r); !p.Done {
		t.Errorf("a second time: %+v", p)
	}
}

func TestStanding(t *testing.T) {
	s, c := removing(t)
	ctx := context.Background()
	got, err := s.Standing(ctx, "a", 10)
	if err != nil || len(got.Phases) > 0 || got.Longest != 0 || len(got.Keys) > 0 {
		t.Fatalf("of nothing: %+v, %v", got, err)
	}
	execute(t, c, `INSERT INTO cacheproxy.phases VALUES ('a', 'phase1', now() - interval '1 hour', now() - interval '1 minute'), ('b', 'phase2', now(), now())`)
	execute(t, c, `INSERT INTO cacheproxy.generations VALUES ('a', 1)`)
	execute(t, c, `INSERT INTO cacheproxy.entries (key, value, route, generation, updated_at, expires_at) VALUES
		('new', '1', 'a', 1, now(), NULL), ('old', '1', 'a', 1, now() - interval '1 day', now() + interval '2 hours'),
		('dead', '1', 'a', 0, now() - interval '1 day', NULL), ('over', '1', 'a', 1, now() - interval '1 day', now() - interval '1 second'),
		('gone', NULL, 'a', 1, now() - interval '1 day', NULL), ('other', '1', 'b', 1, now(), now() + interval '9 hours')`)
	if got, err = s.Standing(ctx, "a", 10); err != nil {
		t.Fatal(err)
	}
	if fmt.Sprint(got.Keys) != "[old new]" {
		t.Errorf("keys %v", got.Keys)
	}
	near := func(d, want time.Duration) bool { return d > want-5*time.Minute && d < want+5*time.Minute }
	if !near(got.Longest, 2*time.Hour) || len(got.Phases) != 1 || got.Phases[0].Phase != "phase1" || !near(got.Phases[0].Since, time.Hour) || got.Phases[0].Seen < time.Minute {
		t.Errorf("%+v", got)
	}
	// Where a thousand rows of others live longer, they bound it.
	execute(t, c, `INSERT INTO cacheproxy.entries (key, value, route, generation, updated_at, expires_at) SELECT 'b' || i, '1', 'b', 1, now(), now() + interval '5 hours' FROM generate_series(1, $1::int) i`, longestLooked)
	if got, err = s.Standing(ctx, "a", 1); err != nil || !near(got.Longest, 5*time.Hour) || len(got.Keys) != 1 {
		t.Errorf("%+v, %v", got, err)
	}
	if got, err = s.Standing(ctx, "a", -1); err != nil || got.Longest != 0 || len(got.Phases) != 1 {
		t.Errorf("without rows: %+v, %v", got, err)
	}

	// Seen renews what is old, leaves what is new, and knows again what was forgotten.
	if err := s.Seen(ctx, []string{"a", "b", "c"}, []string{"phase1", "phase2", "phase3"}); err != nil {
		t.Fatal(err)
	}
	if !there(t, c, `(SELECT array_agg(route || phase ORDER BY route) = '{aphase1,bphase2,cphase3}' AND bool_and(last_seen > now() - interval '1 minute') AND min(since) < now() - interval '30 minutes' FROM cacheproxy.phases)`) {
		t.Error("the phases in use are not as told")
	}
	if err := s.Seen(ctx, nil, nil); err != nil {
		t.Errorf("nothing to say: %v", err)
	}
}
