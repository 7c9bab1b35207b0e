package main

import (
	"context"
	"net/http"
	"os/exec"
	"strings"
	"testing"

	"cacheproxy/internal/testenv"

	"github.com/jackc/pgx/v5"
)

const legacyRoutes = `
journal: {poll: 50ms}
routes:
  - name: legacy
    match: "report:{id}"
    phase: phase1
    store: {kind: column, table: public.reports, key_column: id, value_column: analytics_cache}
  - {name: rest, match: "*", phase: phase1}
`

// execute runs statements as the application's own code does.
func execute(t *testing.T, url, statements string) {
	t.Helper()
	conn, err := pgx.Connect(context.Background(), url)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	if _, err := conn.PgConn().Exec(context.Background(), statements).ReadAll(); err != nil {
		t.Fatal(err)
	}
}

// TestColumn adopts a column: with the program as it is shipped, and with code beside it that goes on writing the table.
func TestColumn(t *testing.T) {
	s := newSite(t, testenv.Redis(t).URL(), testenv.Postgres(t))
	s.write(legacyRoutes)
	if code := exitCode(s.run("check"), &s.stderr); code != exitNot || !s.stdout.has(`route legacy: there is no table "public"."reports"; name one that exists in store.table`) {
		t.Errorf("check without the table: exit code %d", code)
	}
	execute(t, s.postgresURL, `CREATE TABLE public.reports (id bigint PRIMARY KEY, title text, analytics_cache jsonb);
		INSERT INTO reports VALUES (1, 'one', '{"n": 1}'), (2, 'two', NULL)`)
	if code := exitCode(s.run("check"), &s.stderr); code != exitFine ||
		!s.stdout.has("ok    postgres  route legacy: column analytics_cache of public.reports", "warn  postgres  route legacy: changes that others make are not recorded", "run: cacheproxy schema --route legacy | psql") {
		t.Errorf("check: exit code %d", code)
	}

	s.start(exec.Command(testenv.Program(t), "--config", s.config))
	s.started()
	for _, step := range []struct {
		args []any
		want string
	}{
		{[]any{"GET", "report:1"}, `{"n": 1}`},
		{[]any{"GET", "report:2"}, "redis: nil"},
		{[]any{"SET", "report:2", `{"n":2,"a":[1]}`, "EX", "1000"}, "OK"},
		{[]any{"SET", "other", "bytes"}, "OK"},
		{[]any{"MGET", "report:1", "other"}, `[{"n": 1} bytes]`},
		{[]any{"TTL", "report:2"}, "1000"},
	} {
		if got := s.do(step.args...); got != step.want && !(step.want == "1000" && got == "999") {
			t.Errorf("%v: %s, want %s", step.args, got, step.want)
		}
	}
	if n := count(t, s.postgresURL, `SELECT count(*) FROM reports WHERE id = 2 AND analytics_cache = '{"a": [1], "n": 2}'`); n != 1 {
		t.Error("the column does not hold what was written")
	}
	if n := count(t, s.postgresURL, `SELECT count(*) FROM cacheproxy.entries WHERE key LIKE 'report:%'`); n != 0 {
		t.Error("the proxy's own table does")
	}
	if got := s.do("DEL", "report:2"); got != "1" {
		t.Errorf("DEL: %s", got)
	}
	if n := count(t, s.postgresURL, `SELECT count(*) FROM reports WHERE id = 2 AND analytics_cache IS NULL`); n != 1 {
		t.Error("a deleted key is not NULL")
	}

	// Others write too.
	printed := newSite(t, s.redisURL, s.postgresURL)
	printed.config = s.config
	if err := printed.run("schema", "--route", "legacy"); err != nil {
		t.Fatal(err)
	}
	execute(t, s.postgresURL, printed.stdout.String())
	if code := exitCode(s.run("check"), &s.stderr); code != exitFine || !s.stdout.has("route legacy: changes that others make are recorded") {
		t.Errorf("check with triggers: exit code %d", code)
	}
	execute(t, s.postgresURL, `UPDATE reports SET analytics_cache = '{"n": 11}' WHERE id = 1`)
	eventually(t, "Redis is told of what others write", func() bool { return s.do("GET", "report:1") == `{"n": 11}` })
	execute(t, s.postgresURL, `UPDATE reports SET analytics_cache = NULL WHERE id = 1`)
	eventually(t, "and of what they delete", func() bool { return s.do("GET", "report:1") == "redis: nil" })
	eventually(t, "and the record is struck", func() bool {
		return count(t, s.postgresURL, `SELECT count(*) FROM cacheproxy.meta WHERE change IS NOT NULL`) == 0
	})

	// A reload to a column that cannot be used changes nothing.
	s.write(strings.Replace(legacyRoutes, "value_column: analytics_cache", "value_column: nowhere", 1))
	if code, body := s.post("/reload"); code == http.StatusOK || !strings.Contains(body, `no column "nowhere"`) {
		t.Errorf("a column that is not there is accepted: %d %s", code, body)
	}
	if got := s.do("SET", "report:1", `1`); got != "OK" {
		t.Errorf("SET after a reload that was refused: %s", got)
	}
	s.write(strings.Replace(legacyRoutes, "phase: phase1\n    store", "phase: phase2\n    store", 1))
	eventually(t, "the route goes on to phase2", func() bool { return strings.Contains(s.do("CACHEPROXY", "PHASE"), "legacy:phase2") })
	if got := s.do("SET", "report:1", `2`); got != "OK" {
		t.Errorf("SET in phase2: %s", got)
	}
	if n := count(t, s.postgresURL, `SELECT count(*) FROM reports WHERE id = 1 AND analytics_cache IS NULL`); n != 1 {
		t.Error("phase2 leaves the value in the column")
	}
	if got := s.do("GET", "report:1"); got != "2" {
		t.Errorf("GET in phase2: %s", got)
	}
}

func TestSchemaOfRoutes(t *testing.T) {
	s := newSite(t, "", "")
	s.write(legacyRoutes)
	for route, want := range map[string]string{"rest": "proxy's own table", "nobody": `no route is called "nobody"`} {
		if err := s.run("schema", "--route", route); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", route, err, want)
		}
	}
}
