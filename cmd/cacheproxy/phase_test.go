package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"testing"

	"cacheproxy/internal/testenv"
	"cacheproxy/proxy"

	"github.com/jackc/pgx/v5"
)

// command runs the program as a process and returns its exit code and all that it printed.
func (s *site) command(args ...string) (int, string) {
	s.t.Helper()
	before := len(s.stdout.String())
	code := s.exec(append(args, "--config", s.config)...).code(s.t)
	return code, s.stdout.String()[before:]
}

// phaseOf is what GET /phase says of a route.
func (s *site) phaseOf(route string) proxy.Standing {
	s.t.Helper()
	code, body := s.get("/phase?route=" + route)
	var out []proxy.Standing
	if err := json.Unmarshal([]byte(body), &out); code != http.StatusOK || err != nil || len(out) != 1 {
		s.t.Fatalf("/phase: %d %v\n%s", code, err, body)
	}
	return out[0]
}

// connected waits until the proxy has started and trusts both stores.
func (s *site) connected() {
	s.t.Helper()
	s.started()
	eventually(s.t, "the stores are connected", func() bool {
		_, body := s.get("/healthz")
		return strings.Count(body, `"connected"`) == 2
	})
}

// doubts are the words of what speaks against a step.
func doubts(m *proxy.Move) string {
	var words []string
	for _, r := range m.Against {
		words = append(words, string(r.Doubt))
	}
	return strings.Join(words, " ")
}

// execSQL changes something in Postgres.
func execSQL(t *testing.T, url, sql string, args ...any) {
	t.Helper()
	conn, err := pgx.Connect(context.Background(), url)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	if _, err := conn.Exec(context.Background(), sql, args...); err != nil {
		t.Fatal(err)
	}
}

// forget makes it long ago that a sidecar was seen in another phase. One that still serves in it says so again.
func (s *site) forget(but string) {
	execSQL(s.t, s.postgresURL, `UPDATE cacheproxy.phases SET last_seen = last_seen - interval '1 hour' WHERE phase <> $1`, but)
}

func TestPhaseCommandUsage(t *testing.T) {
	s := newSite(t, testenv.Redis(t).URL(), testenv.Postgres(t))
	s.write(routes)
	for _, c := range []struct {
		name string
		args []string
		code int
		says string
	}{
		{"no proxy", []string{"phase"}, exitUnreachable, "connection refused"},
		{"both ways", []string{"phase", "--advance", "--rollback"}, exitUsage, "exclude each other"},
		{"force for nothing", []string{"phase", "--force"}, exitUsage, "--force is for"},
		{"an argument", []string{"phase", "user"}, exitUsage, ""},
	} {
		if code, _ := s.command(c.args...); code != c.code || !s.stderr.has(c.says) {
			t.Errorf("%s: exit code %d\n%s", c.name, code, s.stderr.String())
		}
	}
	s.exec("--config", s.config)
	s.started()
	for _, c := range []struct {
		name string
		args []string
		code int
		says string
	}{
		{"a route that there is not", []string{"phase", "--route", "nobody"}, exitUsage, "the proxy has no route nobody"},
		{"a step of two routes", []string{"phase", "--advance"}, exitUsage, "name one route with --route: user, report"},
		{"without a configuration", []string{"phase", "--observe", s.observe}, exitFine, ""},
	} {
		if code, _ := s.command(c.args...); code != c.code || !s.stderr.has(c.says) {
			t.Errorf("%s: exit code %d\n%s", c.name, code, s.stderr.String())
		}
	}
}

// The whole way on the binary: what is asked for before each step, the step, and what is said of the file.
func TestPhaseJourney(t *testing.T) {
	redis := testenv.Redis(t)
	s := newSite(t, redis.URL(), testenv.Postgres(t))
	file := func(phase string) string {
		return fmt.Sprintf("routes: [{name: user, match: 'user:*', phase: %s}]\n", phase)
	}
	s.write(file("phase0"))
	s.exec("--config", s.config)
	s.connected()
	if got := s.do("SET", "user:0", "0"); got != "OK" {
		t.Fatal(got)
	}

	if code, out := s.command("phase"); code != exitFine || !strings.Contains(out, "user (match user:*): phase0, Postgres alone\n") ||
		!strings.Contains(out, "next: phase1, and nothing speaks against it") {
		t.Errorf("phase: %d\n%s", code, out)
	}
	if code, out := s.command("phase", "--advance"); code != exitFine || !strings.Contains(out, "user: phase0 to phase1") ||
		!strings.Contains(out, `Write "phase: phase1"`) || !strings.Contains(out, s.config) {
		t.Errorf("advance: %d\n%s", code, out)
	}
	if code, out := s.command("phase"); code != exitFine || !strings.Contains(out, `the configuration says phase0, and a restart goes by it: write "phase: phase1" there`) {
		t.Errorf("phase: %d\n%s", code, out)
	}

	// Another change of the file does not undo the step; a phase that the file then names is taken.
	s.write(file("phase0") + "log: {level: debug}\n")
	eventually(t, "the reload", func() bool { return s.stderr.has("the configuration was reloaded") })
	if got := s.phaseOf("user"); got.Phase != "phase1" || got.Configured != "phase0" {
		t.Errorf("a reload has changed the phase to %s", got.Phase)
	}
	s.write(file("phase1"))
	eventually(t, "the file says phase1", func() bool { return s.phaseOf("user").Configured == "phase1" })

	// Few reads speak against phase2, and reads of the phase before do not count.
	if code, out := s.command("phase", "--advance", "--json"); code != exitNot || !strings.Contains(out, `"doubt": "few_reads"`) || !strings.Contains(out, `"moved": false`) {
		t.Errorf("advance: %d\n%s", code, out)
	}
	c := s.client()
	read := func(n int) {
		t.Helper()
		for range n {
			if err := c.Get(context.Background(), "user:0").Err(); err != nil {
				t.Fatal(err)
			}
		}
	}
	read(1100)
	if got := doubts(s.phaseOf("user").Next); got != "sidecars" { // this one's, a moment ago
		t.Errorf("against phase2: %s", got)
	}
	s.forget("phase1")
	if got := doubts(s.phaseOf("user").Next); got != "" {
		t.Errorf("against phase2: %s", got)
	}
	if code, out := s.command("phase", "--route", "user", "--advance"); code != exitFine {
		t.Fatalf("advance: %d\n%s", code, out)
	}
	if got := s.phaseOf("user"); got.Phase != "phase2" || got.Evidence.RedisHits != 0 || !strings.Contains(doubts(got.Next), "few_reads") {
		t.Errorf("in phase2: %+v", got)
	}

	// A row that Redis lacks, and one that lives long, speak against drain.
	execSQL(t, s.postgresURL, `INSERT INTO cacheproxy.entries (key, value, route, generation, updated_at, expires_at)
		SELECT 'user:only', '1', 'user', coalesce(max(generation), 0), now(), now() + interval '1 hour' FROM cacheproxy.generations`)
	read(1100)
	got := s.phaseOf("user")
	if !strings.Contains(doubts(got.Next), "time_in_phase") || !strings.Contains(doubts(got.Next), "rows_missing") || got.Evidence.Missing != 1 || got.Seconds.LongestLife < 3000 {
		t.Errorf("against drain: %+v", got)
	}
	code, out := s.command("phase", "--advance")
	if code != exitNot || !strings.Contains(out, "user stays in phase2. Against drain:\n") || !strings.Contains(out, "remedy: ") || !strings.Contains(out, "With --force") {
		t.Errorf("advance: %d\n%s", code, out)
	}
	if code, out := s.command("phase", "--advance", "--force"); code != exitFine || !strings.Contains(out, "overruled: rows_missing: of ") {
		t.Errorf("advance --force: %d\n%s", code, out)
	}
	if code, _ := s.command("phase", "--advance", "--force"); code != exitFine {
		t.Errorf("to phase3: %d", code)
	}
	if code, _ := s.command("phase", "--advance"); code != exitNot || !s.stderr.has("there is no next phase") {
		t.Errorf("beyond phase3: %d", code)
	}

	// And back.
	for _, to := range []string{"drain", "phase2", "phase1"} {
		if code, out := s.command("phase", "--rollback", "--force"); code != exitFine || s.phaseOf("user").Phase != to {
			t.Errorf("back to %s: %d\n%s", to, code, out)
		}
	}
	if got := s.do("CONFIG", "SET", "maxmemory", "64mb"); got != "OK" {
		t.Fatal(got)
	}
	s.do("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
	if ev := s.phaseOf("user").Evidence; ev.Eviction != "allkeys-lru" || ev.MaxMemory != 64<<20 {
		t.Errorf("memory: %+v", ev)
	}
	// user:0 was promoted and its row is dead since the fence: only Redis has it.
	s.forget("phase1")
	if got := doubts(s.phaseOf("user").Back); got != "" {
		t.Errorf("against phase0: %s", got)
	}
	code, out = s.command("phase", "--rollback")
	if code != exitNot || !strings.Contains(out, "only in Redis") || !strings.Contains(out, "cacheproxy migrate --reverse --route user") {
		t.Errorf("back to phase0: %d\n%s", code, out)
	}
	if code, out := s.command("phase", "--rollback", "--force"); code != exitFine || s.phaseOf("user").Phase != "phase0" {
		t.Errorf("back to phase0 by force: %d\n%s", code, out)
	}
	if code, _ := s.command("phase", "--rollback"); code != exitNot || !s.stderr.has("there is no previous phase") {
		t.Errorf("before phase0: %d", code)
	}
}

// Two sidecars: one that is two phases away speaks against the step, until it has moved.
func TestPhaseSeesOtherSidecars(t *testing.T) {
	redis, pg := testenv.Redis(t), testenv.Postgres(t)
	var sites [2]*site
	for i, phase := range []string{"phase0", "phase1"} {
		s := newSite(t, redis.URL(), pg)
		s.write(fmt.Sprintf("routes: [{name: all, match: '*', phase: %s}]\n", phase))
		s.exec("--config", s.config)
		s.connected()
		sites[i] = s
	}
	behind, ahead := sites[0], sites[1]
	if got := doubts(ahead.phaseOf("all").Next); !strings.Contains(got, "sidecars") {
		t.Errorf("against phase2 with a sidecar in phase0: %s", got)
	}
	// It is seen for as long as it serves, not only when it has started.
	ahead.forget("")
	eventually(t, "the sidecar says again in which phase it is", func() bool {
		return strings.Contains(doubts(ahead.phaseOf("all").Next), "sidecars")
	})
	if code, out := behind.command("phase", "--advance"); code != exitFine {
		t.Fatalf("advance: %d\n%s", code, out)
	}
	eventually(t, "it is forgotten in phase0", func() bool {
		ahead.forget("phase1")
		return !strings.Contains(doubts(ahead.phaseOf("all").Next), "sidecars")
	})
}

// Without its stores the proxy still tells where it stands, and nothing goes on by mistake.
func TestPhaseDuringOutage(t *testing.T) {
	s := newSite(t, "", "")
	s.write(routes)
	s.exec("--config", s.config)
	s.started()
	code, out := s.command("phase", "--route", "user")
	if code != exitFine || !strings.Contains(out, "redis down") || !strings.Contains(out, "postgres down") {
		t.Errorf("phase: %d\n%s", code, out)
	}
	if code, out := s.command("phase", "--route", "user", "--advance"); code != exitNot || !strings.Contains(out, "Redis is down") || !strings.Contains(out, "Postgres is down") {
		t.Errorf("advance: %d\n%s", code, out)
	}
}
