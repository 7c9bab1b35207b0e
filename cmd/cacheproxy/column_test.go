package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os/exec"
	"strings"
	"testing"
	"time"

	"cacheproxy/internal/testenv"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/redis/go-redis/v9"
	"golang.org/x/sync/errgroup"
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
	eventually(t, "the route goes on to phase2", func() bool { return s.phaseOf("legacy").Phase == "phase2" })
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

// TestColumnTraffic has two sidecars and other code change the same rows. When all is still, what clients are told is what the
// column holds.
func TestColumnTraffic(t *testing.T) {
	const (
		rows    = 40
		changes = 100 // of each writer
	)
	redisURL, postgresURL := testenv.Redis(t).URL(), testenv.Postgres(t)
	execute(t, postgresURL, fmt.Sprintf(`CREATE TABLE public.reports (id bigint PRIMARY KEY, title text, analytics_cache jsonb);
		INSERT INTO reports SELECT i, 'x', '0' FROM generate_series(1, %d) i`, rows))
	var sites []*site
	for range 2 {
		s := newSite(t, redisURL, postgresURL)
		s.write(legacyRoutes)
		if err := s.run("check"); err != nil {
			t.Fatal(err)
		}
		s.start(exec.Command(testenv.Program(t), "--config", s.config))
		s.started()
		sites = append(sites, s)
	}
	printed := newSite(t, redisURL, postgresURL)
	printed.config = sites[0].config
	if err := printed.run("schema", "--route", "legacy"); err != nil {
		t.Fatal(err)
	}
	execute(t, postgresURL, printed.stdout.String())

	ctx := context.Background()
	var group errgroup.Group
	for w := range 4 {
		group.Go(func() error {
			c := sites[w%2].client()
			rnd := rand.New(rand.NewPCG(1, uint64(w)))
			for n := range changes {
				key := fmt.Sprintf("report:%d", 1+rnd.IntN(rows))
				var err error
				switch rnd.IntN(6) {
				case 0:
					err = c.Set(ctx, key, fmt.Sprintf(`{"n": %d, "w": %d}`, n, w), 0).Err()
				case 1:
					err = c.Set(ctx, key, n, time.Hour).Err()
				case 2:
					err = c.Del(ctx, key).Err()
				default:
					err = c.MGet(ctx, key, "report:1", "report:2").Err()
				}
				// A row that other code holds may be waited for in vain: that is a refusal, and nothing has changed.
				if err != nil && !errors.Is(err, redis.Nil) && !strings.HasPrefix(err.Error(), "UNAVAILABLE") {
					return err
				}
			}
			return nil
		})
	}
	for w := range 2 {
		group.Go(func() error {
			conn, err := pgx.Connect(ctx, postgresURL)
			if err != nil {
				return err
			}
			defer conn.Close(ctx)
			rnd := rand.New(rand.NewPCG(2, uint64(w)))
			for n := range changes {
				id := 1 + rnd.IntN(rows)
				sql, args := `UPDATE reports SET analytics_cache = to_jsonb($2::text) WHERE id = $1`, []any{id, fmt.Sprint("legacy ", w, " ", n)}
				switch rnd.IntN(8) {
				case 0:
					sql, args = `UPDATE reports SET analytics_cache = NULL WHERE id = $1`, args[:1]
				case 1, 2:
					sql = `INSERT INTO reports VALUES ($1, 'again', to_jsonb($2::text)) ON CONFLICT (id) DO UPDATE SET analytics_cache = excluded.analytics_cache`
				case 3:
					sql = `UPDATE reports SET analytics_cache = to_jsonb($2::text), title = 'many' WHERE id BETWEEN $1 AND $1 + 5`
				case 4:
					sql, args = `UPDATE reports SET title = 'y' WHERE id > $1`, args[:1]
				}
				_, err := conn.Exec(ctx, sql, args...)
				// Two statements that go through the table may meet in a deadlock of their own.
				if pg, ok := errors.AsType[*pgconn.PgError](err); err != nil && (!ok || pg.Code != "40P01") {
					return fmt.Errorf("%s: %w", sql, err)
				}
			}
			return nil
		})
	}
	if err := group.Wait(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "what others changed is repaired", func() bool {
		return count(t, postgresURL, `SELECT (SELECT count(*) FROM cacheproxy.meta WHERE change IS NOT NULL) + (SELECT count(*) FROM cacheproxy.journal)`) == 0
	})
	conn, err := pgx.Connect(ctx, postgresURL)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(ctx)
	list, err := conn.Query(ctx, `SELECT id::text, coalesce(analytics_cache::text, '') FROM reports`)
	if err != nil {
		t.Fatal(err)
	}
	var id, value string
	n := 0
	_, err = pgx.ForEachRow(list, []any{&id, &value}, func() error {
		n++
		for i, s := range sites {
			got, err := s.client().Get(ctx, "report:"+id).Result()
			if err != nil && !errors.Is(err, redis.Nil) {
				return err
			}
			if got != value {
				t.Errorf("sidecar %d says %q of row %s, and it holds %q", i, got, id, value)
			}
		}
		return nil
	})
	if err != nil || n == 0 {
		t.Fatal(n, err)
	}
}
