package main

import (
	"context"
	"strings"
	"testing"

	"cacheproxy/internal/testenv"

	"github.com/jackc/pgx/v5"
)

// tables counts the tables of the proxy that hold rows.
func (s *site) tables() int {
	return count(s.t, s.postgresURL, `SELECT count(*) FROM pg_tables WHERE schemaname = 'cacheproxy' AND tablename = 'entries'`)
}

func TestFinalizeCommand(t *testing.T) {
	s := newSite(t, testenv.Redis(t).URL(), testenv.Postgres(t))
	phases := func(user, report string) {
		s.write("routes:\n  - {name: user, match: 'user:*', phase: " + user + "}\n  - {name: report, match: 'report:*', phase: " + report + "}\n")
	}
	finalize := func(want int, says string, args ...string) {
		t.Helper()
		before := len(s.stderr.String())
		code, out := s.command(append([]string{"finalize"}, args...)...)
		if out += s.stderr.String()[before:]; code != want || !strings.Contains(out, says) {
			t.Errorf("finalize %v: exit code %d, want %d and %q\n%s", args, code, want, says, out)
		}
	}
	phases("phase1", "phase1")
	finalize(exitUsage, "name the route")
	finalize(exitUsage, "the configuration has no route nobody", "--route", "nobody")
	finalize(exitNot, "the configuration has it in phase1, which uses the store", "--route", "user")
	s.exec("--config", s.config)
	s.connected()
	for _, key := range []string{"user:1", "report:1"} {
		if got := s.do("SET", key, "1"); got != "OK" {
			t.Fatal(got)
		}
	}

	// The file says phase3 before the sidecar is there: it is read at once, and by the binary step for step.
	for _, to := range []string{"phase2", "drain", "phase3"} {
		if got := s.do("CACHEPROXY", "PHASE", "user", to); got != "OK" {
			t.Fatal(got)
		}
	}
	phases("phase3", "phase1")
	finalize(exitNot, "a sidecar served the route in ", "--route", "user", "--yes")
	s.forget("phase3")
	finalize(exitFine, "-- note: the table stays, because of route report\nDELETE FROM cacheproxy.entries WHERE route = 'user';\n-- Nothing was changed.", "--route", "user")
	if n := count(t, s.postgresURL, `SELECT count(*) FROM cacheproxy.entries WHERE route = 'user'`); n != 1 {
		t.Fatalf("%d rows of user before --yes", n)
	}
	finalize(exitFine, "1 rows deleted", "--route", "user", "--yes")
	finalize(exitFine, "-- Route user has nothing in Postgres.", "--route", "user", "--yes")
	if n := count(t, s.postgresURL, `SELECT count(*) FROM cacheproxy.entries`); n != 1 {
		t.Errorf("%d rows are left", n)
	}

	// The last route takes the table; the sidecar, which still has a URL, goes on.
	for _, to := range []string{"phase2", "drain", "phase3"} {
		if got := s.do("CACHEPROXY", "PHASE", "report", to); got != "OK" {
			t.Fatal(got)
		}
	}
	phases("phase3", "phase3")
	s.forget("phase3")
	conn, err := pgx.Connect(context.Background(), s.postgresURL)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	if _, err := conn.Exec(context.Background(), `CREATE VIEW public.dashboard AS SELECT key, value FROM cacheproxy.entries`); err != nil {
		t.Fatal(err)
	}
	finalize(exitNot, "view dashboard depends on table", "--route", "report", "--yes")
	if _, err := conn.Exec(context.Background(), `DROP VIEW public.dashboard`); err != nil {
		t.Fatal(err)
	}
	finalize(exitFine, `DROP TABLE "cacheproxy"."entries";`, "--route", "report")
	if s.tables() != 1 {
		t.Fatal("the table was dropped without --yes")
	}
	finalize(exitFine, "-- Done.", "--route", "report", "--yes")
	if s.tables() != 0 {
		t.Error("the table is there")
	}
	if got := s.do("SET", "report:1", "2"); got != "OK" {
		t.Errorf("SET: %s", got)
	}
	if got := s.do("GET", "report:1"); got != "2" {
		t.Errorf("GET: %s", got)
	}
	if got := s.phaseOf("report"); got.Phase != "phase3" || len(got.Evidence.Unknown) > 0 {
		t.Errorf("phase: %+v", got)
	}
}

func TestFinalizeFails(t *testing.T) {
	s := newSite(t, "", "")
	s.write("routes: [{name: user, match: 'user:*', phase: phase3}]\n")
	if code, _ := s.command("finalize", "--route", "user"); code != exitUnreachable || !s.stderr.has("postgres cannot be used") {
		t.Errorf("without Postgres: exit code %d", code)
	}

	// A role that does not own the table is told who may do it, and what.
	owner := testenv.Postgres(t)
	s = newSite(t, "", owner)
	s.write("routes: [{name: user, match: 'user:*', phase: phase1}]\n")
	s.command("check") // makes the schema
	execSQL(t, owner, `CREATE ROLE finalize_guest LOGIN`)
	t.Cleanup(func() {
		execSQL(t, owner, `DROP OWNED BY finalize_guest`)
		execSQL(t, owner, `DROP ROLE finalize_guest`)
	})
	execSQL(t, owner, `GRANT USAGE ON SCHEMA cacheproxy TO finalize_guest`)
	execSQL(t, owner, `GRANT SELECT ON ALL TABLES IN SCHEMA cacheproxy TO finalize_guest`)
	cc, err := pgx.ParseConfig(owner)
	if err != nil {
		t.Fatal(err)
	}
	s.postgresURL = strings.Replace(owner, cc.User+"@", "finalize_guest@", 1)
	if !strings.Contains(s.postgresURL, "finalize_guest") {
		s.postgresURL += "&user=finalize_guest"
	}
	s.write("routes: [{name: user, match: 'user:*', phase: phase3}]\n")
	if code, _ := s.command("finalize", "--route", "user"); code != exitNot || !s.stderr.has("this role may not do it", `DROP TABLE "cacheproxy"."entries";`) {
		t.Errorf("without the right: exit code %d", code)
	}
}
