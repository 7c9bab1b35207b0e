package main

import (
	"context"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"cacheproxy/internal/testenv"

	"github.com/jackc/pgx/v5"
)

const guide = "docs/migration-guide.md"

// TestMigrationGuide does what the guide says, with the built program and real stores, and compares what is printed. Redis has the limit and the
// policy of those in deploy/, the proxy has the rights that the guide asks for, and config.yaml is what the guide shows.
func TestMigrationGuide(t *testing.T) {
	const document = "../../" + guide
	pg := testenv.Postgres(t)
	at, err := url.Parse(pg)
	if err != nil {
		t.Fatal(err)
	}
	// Roles are those of the cluster, which other tests use, and go with it.
	database := strings.TrimPrefix(at.Path, "/")
	owner, role := "app_"+database, "sidecar_"+database
	execute(t, pg, "CREATE ROLE "+owner+" LOGIN")
	as := func(name string) string {
		u := *at
		u.User = url.User(name)
		return u.String()
	}
	names := strings.NewReplacer("sidecar", role, "DATABASE app", "DATABASE "+database, "TO app", "TO "+owner)
	execute(t, pg, names.Replace(sqlOf(t, document, "CREATE TABLE"))+`;
		INSERT INTO reports SELECT i, 'report ' || i, '{"views": 3}' FROM generate_series(1, 1000) i;
		ALTER TABLE reports OWNER TO `+owner+`;`+names.Replace(sqlOf(t, document, "CREATE ROLE")))

	s := newSite(t, testenv.Redis(t, "--maxmemory", "512mb", "--maxmemory-policy", "allkeys-lru").URL(), as(role))
	addresses := []string{"CACHEPROXY_LISTEN=unix://" + s.socket, "CACHEPROXY_OBSERVE=" + s.observe, "CACHEPROXY_ADMIN=" + s.admin}
	bin := filepath.Join(s.dir, "bin")
	if err := os.Mkdir(bin, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(testenv.Program(t), filepath.Join(bin, "cacheproxy")); err != nil {
		t.Fatal(err)
	}
	here := strings.NewReplacer("-p 6380", "-s "+s.socket)
	env := append(append(s.env(), addresses...), "OWNER_URL="+as(owner), "PATH="+bin+":"+os.Getenv("PATH"))
	shell := func(command string) string { return s.shell(here.Replace(command), env...) }
	there := strings.NewReplacer(s.dir+"/", "")
	same := func(text string) string { return text }
	var others *writer
	for _, b := range readTour(t, document) {
		switch b.do {
		case "":
			b.run(t, guide, func(command string) string { return there.Replace(shell(command)) }, same)
		case "config":
			config, err := os.ReadFile(filepath.Join("testdata", "guide.yaml"))
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(s.config, config, 0o600); err != nil {
				t.Fatal(err)
			}
		case "serve":
			s.start(exec.Command(testenv.Program(t), "serve", "--config", s.config), addresses...)
			s.connected()
		case "others write":
			others = startWriter(t, as(owner))
		case "others stop":
			eventually(t, "others change rows", func() bool { return others.changed.Load() >= 50 })
			others.stop(t)
			eventually(t, "Redis is told of all changes", func() bool {
				return s.count(`SELECT count(*) FROM cacheproxy.meta WHERE change IS NOT NULL`) == 0 && s.phaseOf("report").Evidence.Journal == 0
			})
		case "reads": // more than the next step asks for
			c := s.client()
			for range 5 {
				for i := range 1000 {
					if err := c.Get(context.Background(), fmt.Sprintf("report:%d", 1+i)).Err(); err != nil {
						t.Fatal(err)
					}
				}
			}
		case "a minute passes": // since sidecars were seen in other phases
			execute(t, pg, `UPDATE cacheproxy.phases SET since = since - interval '61 seconds', last_seen = last_seen - interval '61 seconds'`)
		default:
			t.Fatalf("%s: nobody knows how to do %q", guide, b.do)
		}
	}
	if others == nil || others.changed.Load() == 0 {
		t.Errorf("%s: nobody has written the column beside the proxy", guide)
	}
}

// sqlOf is the block of SQL in a document that begins with some words.
func sqlOf(t *testing.T, document, begins string) string {
	t.Helper()
	text, err := os.ReadFile(document)
	if err != nil {
		t.Fatal(err)
	}
	m := regexp.MustCompile("(?s)```sql\n *(" + begins + ".*?)```").FindSubmatch(text)
	if m == nil {
		t.Fatalf("%s has no SQL that begins with %s", document, begins)
	}
	return string(m[1])
}

// count asks Postgres for a number.
func (s *site) count(sql string) (n int) {
	s.t.Helper()
	conn, err := pgx.Connect(context.Background(), s.postgresURL)
	if err != nil {
		s.t.Fatal(err)
	}
	defer conn.Close(context.Background())
	if err := conn.QueryRow(context.Background(), sql).Scan(&n); err != nil {
		s.t.Fatal(err)
	}
	return n
}

// writer is code that has not moved yet: it goes on writing the column with SQL, beside the proxy.
type writer struct {
	changed atomic.Int64 // rows
	cancel  context.CancelFunc
	ended   chan error
}

func startWriter(t *testing.T, url string) *writer {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	w := &writer{cancel: cancel, ended: make(chan error, 1)}
	conn, err := pgx.Connect(ctx, url)
	if err != nil {
		cancel()
		t.Fatal(err)
	}
	done := make(chan struct{})
	t.Cleanup(func() { cancel(); <-done }) // usually it has ended
	go func() {
		defer close(done)
		defer conn.Close(context.Background())
		for ctx.Err() == nil {
			// To its end, so that nothing is under way when it has stopped.
			tag, err := conn.Exec(context.Background(), `UPDATE reports SET analytics_cache = jsonb_build_object('views', floor(random() * 1000000))
				WHERE id = (SELECT 100 + floor(random() * 899)::bigint)`)
			if err != nil {
				w.ended <- err
				return
			}
			w.changed.Add(tag.RowsAffected())
			select {
			case <-ctx.Done():
			case <-time.After(20 * time.Millisecond):
			}
		}
		w.ended <- nil
	}()
	return w
}

// stop waits for the end of what is under way.
func (w *writer) stop(t *testing.T) {
	t.Helper()
	w.cancel()
	if err := <-w.ended; err != nil {
		t.Fatal("the code beside the proxy: ", err)
	}
}
