package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"cacheproxy/internal/testenv"
	"cacheproxy/proxy"

	"github.com/jackc/pgx/v5"
)

const routes = `
routes:
  - {name: user, match: "user:*", phase: phase1}
  - {name: report, match: "report:*", phase: phase2}
`

// count asks Postgres for a number.
func count(t *testing.T, url, sql string) (n int) {
	t.Helper()
	conn, err := pgx.Connect(context.Background(), url)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	if err := conn.QueryRow(context.Background(), sql).Scan(&n); err != nil {
		t.Fatal(err)
	}
	return n
}

func (s *site) do(args ...any) string {
	s.t.Helper()
	c := s.client()
	defer c.Close()
	v, err := c.Do(context.Background(), args...).Result()
	if err != nil {
		return err.Error()
	}
	return fmt.Sprint(v)
}

func TestServe(t *testing.T) {
	s := newSite(t, testenv.Redis(t).URL(), testenv.Postgres(t))
	s.write(routes)
	p := s.exec("--config", s.config) // serve is the default
	s.started()

	// The very first client finds both stores: nothing is refused and nothing is missed while they are being reached.
	if got := s.do("SET", "user:1", `{"a":1}`); got != "OK" {
		t.Fatalf("SET: %s", got)
	}
	if got := s.do("GET", "user:1"); got != `{"a":1}` {
		t.Errorf("GET: %s", got)
	}
	if n := count(t, s.postgresURL, `SELECT count(*) FROM cacheproxy.entries WHERE key = 'user:1' AND value = '{"a":1}'`); n != 1 {
		t.Errorf("%d rows in Postgres", n)
	}

	code, body := s.get("/cache/stats")
	var stats proxy.Stats
	if err := json.Unmarshal([]byte(body), &stats); code != http.StatusOK || err != nil || stats.Performance.RedisHits != 1 || stats.MigrationPhase != "mixed" {
		t.Errorf("/cache/stats: %d %v\n%s", code, err, body)
	}
	if code, body := s.get("/readyz"); code != http.StatusOK || !strings.Contains(body, "[+]redis ok\n[+]postgres ok\n") {
		t.Errorf("/readyz: %d\n%s", code, body)
	}
	if code, body := s.get("/healthz"); code != http.StatusOK || !strings.Contains(body, `"status": "ok"`) {
		t.Errorf("/healthz: %d\n%s", code, body)
	}
	if err := s.run("healthcheck"); err != nil {
		t.Errorf("healthcheck: %v", err)
	}
	if err := s.run("stats"); err != nil || !s.stdout.has("REDIS HITS", "user    phase1  1 ") {
		t.Errorf("stats: %v\n%s", err, s.stdout.String())
	}
	if err := s.run("stats", "--json"); err != nil || !s.stdout.has(`"migration_phase": "mixed"`) {
		t.Errorf("stats --json: %v", err)
	}

	p.signal(t, syscall.SIGTERM)
	if code := p.code(t); code != exitFine {
		t.Errorf("exit code %d after SIGTERM", code)
	}
	if !s.stderr.has(`"msg":"draining"`, `"msg":"stopped"`) {
		t.Error("the end is not in the log")
	}
	if _, err := os.Lstat(s.socket); err == nil {
		t.Error("the socket's file is left")
	}
}

func TestBothStoresDown(t *testing.T) {
	s := newSite(t, "", "")
	s.write(routes)
	s.exec("--config", s.config)
	s.started()
	if got := s.do("PING"); !strings.HasPrefix(got, "UNAVAILABLE") {
		t.Errorf("PING: %s", got)
	}
	if code, body := s.get("/livez"); code != http.StatusOK {
		t.Errorf("/livez: %d %s", code, body)
	}
	if code, body := s.get("/readyz"); code != http.StatusOK || !strings.Contains(body, "[-]redis down") || !strings.Contains(body, "[-]postgres down") {
		t.Errorf("/readyz: %d\n%s", code, body)
	}
	if code, body := s.get("/healthz"); code != http.StatusOK || strings.Count(body, `"status": "down"`) != 3 {
		t.Errorf("/healthz: %d\n%s", code, body)
	}
	s.write(routes + "health: {ready_requires: any}\n")
	eventually(t, "readiness demands a store", func() bool {
		code, _ := s.get("/readyz")
		return code == http.StatusServiceUnavailable
	})
}

// A Postgres that accepts and says nothing fails in several ways; it is reported once, and being stopped meanwhile is no error.
func TestSilentPostgres(t *testing.T) {
	silent, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	s := newSite(t, "", "postgres://"+silent.Addr().String()+"/app?sslmode=disable&connect_timeout=1")
	s.write(routes)
	stop := s.serve()
	time.Sleep(3 * time.Second) // the second attempt ends after some 2.5 s, the third begins two later
	if err := stop(); err != nil {
		t.Error(err)
	}
	if log := s.stderr.String(); strings.Count(log, "postgres cannot be reached") != 1 || strings.Contains(log, `"level":"error"`) {
		t.Errorf("logged:\n%s", log)
	}
	// The same during the very first attempt.
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if err := run(ctx, []string{"--config", s.config}, s.env(), &s.stdout, &s.stderr); err != nil {
		t.Error(err)
	}
	if log := s.stderr.String(); strings.Contains(log, `"level":"error"`) {
		t.Errorf("logged:\n%s", log)
	}
}

// A second signal must not wait for a drain that a client holds up.
func TestSecondSignal(t *testing.T) {
	redis := testenv.Redis(t)
	s := newSite(t, redis.URL(), "")
	s.write("routes: []\n")
	p := s.exec("--config", s.config)
	s.started()
	if got := s.do("PING"); got != "PONG" {
		t.Fatalf("PING: %s", got)
	}
	if err := redis.Pause(); err != nil {
		t.Fatal(err)
	}
	conn, err := net.Dial("unix", s.socket)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := conn.Write([]byte("LPUSH list a\r\n")); err != nil { // not routed: it waits for its answer as long as it takes
		t.Fatal(err)
	}
	eventually(t, "the command is on its way", func() bool {
		_, body := s.get("/cache/stats")
		return strings.Contains(body, `"clients": 1`)
	})
	p.signal(t, syscall.SIGINT)
	eventually(t, "the drain begins", func() bool {
		code, body := s.get("/readyz")
		return code == http.StatusServiceUnavailable && strings.Contains(body, "draining")
	})
	if got := s.scraped()["cacheproxy_draining"]; got != 1 {
		t.Errorf("cacheproxy_draining is %v", got)
	}
	p.signal(t, syscall.SIGINT)
	if code := p.code(t); code != exitNot {
		t.Errorf("exit code %d", code)
	}
}

func TestReload(t *testing.T) {
	s := newSite(t, testenv.Redis(t).URL(), testenv.Postgres(t))
	s.write(routes)
	p := s.exec("--config", s.config)
	s.started()
	reloaded := func(what, ttl string) {
		t.Helper()
		eventually(t, what, func() bool { return strings.Contains(s.do("CACHEPROXY", "ROUTES"), "ttl="+ttl) })
	}
	with := func(ttl string) string {
		return fmt.Sprintf("routes:\n  - {name: user, match: \"user:*\", phase: phase1, ttl: %s}\n", ttl)
	}
	s.write(with("1m"))
	reloaded("the file is watched", "1m0s")

	s.write("routes: [{name: user, match: \"user:*\", phase: phase9}]\n")
	if code, body := s.post("/reload"); code != http.StatusUnprocessableEntity || !strings.Contains(body, "phase9") {
		t.Errorf("a bad file: %d %s", code, body)
	}
	if got := s.do("CACHEPROXY", "RELOAD"); !strings.Contains(got, "phase9") {
		t.Errorf("RELOAD of a bad file: %s", got)
	}
	reloaded("the old routes stay", "1m0s")
	if err := s.run("healthcheck", "--observe", s.observe); err != nil {
		t.Errorf("healthcheck: %v", err)
	}

	s.write(with("2m") + "redis: {connections: 3}\n")
	if code, body := s.post("/reload"); code != http.StatusOK {
		t.Errorf("reload: %d %s", code, body)
	}
	reloaded("POST /reload", "2m0s")
	eventually(t, "what needs a restart is named", func() bool { return s.stderr.has(`"settings":["redis.connections"]`) })
	if got := s.do("CACHEPROXY", "CONFIG"); !strings.Contains(got, "connections: 0") || !strings.Contains(got, "ttl: 2m0s") {
		t.Errorf("CONFIG does not show what is in force:\n%s", got)
	}

	s.write(with("3m") + "log: {level: debug}\n")
	p.signal(t, syscall.SIGHUP)
	reloaded("SIGHUP", "3m0s")
	s.write(with("4m"))
	if got := s.do("CACHEPROXY", "RELOAD"); got != "OK" {
		t.Errorf("RELOAD: %s", got)
	}
	reloaded("CACHEPROXY RELOAD", "4m0s")

	for _, c := range []struct {
		query string
		code  int
	}{
		{"route=user&phase=phase2", http.StatusOK},
		{"route=user&phase=phase0", http.StatusConflict},
		{"route=nobody&phase=phase1", http.StatusNotFound},
		{"route=user&phase=phase9", http.StatusBadRequest},
		{"phase=phase1", http.StatusBadRequest},
	} {
		if code, body := s.post("/phase?" + c.query); code != c.code {
			t.Errorf("/phase?%s: %d %s", c.query, code, body)
		}
	}
	if got := s.do("CACHEPROXY", "PHASE"); !strings.Contains(got, "): phase2, ") {
		t.Errorf("PHASE: %s", got)
	}

	// What is in the file counts before a step, and the reload that follows does not undo it.
	s.write(strings.ReplaceAll(with("4m"), "phase1", "drain"))
	if got := s.do("CACHEPROXY", "PHASE", "user", "phase3"); got != "OK" {
		t.Errorf("a step from where the file leads: %s", got)
	}
	s.write(strings.ReplaceAll(with("5m"), "phase1", "drain"))
	reloaded("the file once more", "5m0s")
	if got := s.do("CACHEPROXY", "PHASE"); !strings.Contains(got, "): phase3, ") {
		t.Errorf("PHASE: %s", got)
	}
}

func TestReloadWithoutFile(t *testing.T) {
	s := newSite(t, "", "")
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	env := append(s.env(), "CACHEPROXY_OBSERVE="+s.observe, "CACHEPROXY_ADMIN="+s.admin, "CACHEPROXY_LISTEN=unix://"+s.socket)
	go func() { ended <- run(ctx, nil, env, &s.stdout, &s.stderr) }()
	s.started()
	if code, body := s.post("/reload"); code != http.StatusUnprocessableEntity || !strings.Contains(body, "without a configuration file") {
		t.Errorf("reload: %d %s", code, body)
	}
	if got := s.do("CACHEPROXY", "RELOAD"); !strings.Contains(got, "without a file") {
		t.Errorf("RELOAD: %s", got)
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

func ended(p *program) bool {
	select {
	case <-p.ended:
		return true
	default:
		return false
	}
}

func TestPostgresComesLater(t *testing.T) {
	postgres := testenv.PostgresServer(t)
	s := newSite(t, testenv.Redis(t).URL(), postgres.URL("postgres"))
	if err := postgres.Stop(); err != nil {
		t.Fatal(err)
	}
	s.write(routes)
	stop := s.serve()
	if got := s.do("GET", "user:1"); got != "redis: nil" {
		t.Errorf("GET while Postgres is down: %s", got)
	}
	if err := postgres.Restart(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the schema is made", func() bool { return s.stderr.has("the schema is ready") })
	eventually(t, "writes go to both stores", func() bool {
		return s.do("SET", "user:1", "1") == "OK" &&
			count(t, s.postgresURL, "SELECT count(*) FROM cacheproxy.entries WHERE value IS NOT NULL") == 1
	})
	if err := stop(); err != nil {
		t.Error(err)
	}
	if n := strings.Count(s.stderr.String(), "postgres cannot be reached"); n != 1 {
		t.Errorf("the outage was reported %d times", n)
	}
}

// A change of phase that cannot be registered is made as soon as it can: nobody may be there to ask again.
func TestReloadDuringOutage(t *testing.T) {
	postgres := testenv.PostgresServer(t)
	s := newSite(t, testenv.Redis(t).URL(), postgres.URL("postgres"))
	s.write(routes)
	stop := s.serve()
	if err := postgres.Stop(); err != nil {
		t.Fatal(err)
	}
	s.write(strings.Replace(routes, "phase1", "phase2", 1))
	eventually(t, "the change is refused", func() bool { return s.stderr.has("was not reloaded") })
	if got := s.do("CACHEPROXY", "PHASE"); !strings.Contains(got, "): phase1, ") {
		t.Errorf("PHASE: %s", got)
	}
	if err := postgres.Restart(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the change is made", func() bool { return !strings.Contains(s.do("CACHEPROXY", "PHASE"), "): phase1, ") })
	if err := stop(); err != nil {
		t.Error(err)
	}
}

func TestRightsAreMissing(t *testing.T) {
	owner := testenv.Postgres(t)
	conn, err := pgx.Connect(context.Background(), owner)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	for _, sql := range []string{"CREATE ROLE weak LOGIN", "REVOKE CREATE ON DATABASE " + pgx.Identifier{conn.Config().Database}.Sanitize() + " FROM public"} {
		if _, err := conn.Exec(context.Background(), sql); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() {
		conn, err := pgx.Connect(context.Background(), owner)
		if err == nil {
			_, err = conn.Exec(context.Background(), "DROP ROLE weak")
			conn.Close(context.Background())
		}
		if err != nil {
			t.Error(err)
		}
	})
	s := newSite(t, testenv.Redis(t).URL(), strings.Replace(owner, "cacheproxy@", "weak@", 1))
	s.write(routes)
	stop := s.serve()
	eventually(t, "the statement is logged", func() bool {
		return s.stderr.has(`"run_once":"CREATE SCHEMA cacheproxy AUTHORIZATION \"weak\";"`)
	})
	// A store without its tables is an outage: what does not need it goes on.
	if got := s.do("SET", "report:1", "x"); got != "OK" {
		t.Errorf("SET: %s", got)
	}
	if err := s.run("check"); exitCode(err, &s.stderr) != exitNot || !s.stdout.has("CREATE SCHEMA cacheproxy") {
		t.Errorf("check: %v", err)
	}
	if err := stop(); err != nil {
		t.Error(err)
	}
}

func TestManagedMemory(t *testing.T) {
	server := testenv.Redis(t)
	s := newSite(t, server.URL(), "")
	s.write("routes: []\nredis: {max_memory: 64mb, manage_memory: true}\n")
	stop := s.serve()
	eventually(t, "the limit is set", func() bool {
		return s.do("CONFIG", "GET", "maxmemory*") != "" && strings.Contains(s.do("CONFIG", "GET", "maxmemory"), "67108864") &&
			strings.Contains(s.do("CONFIG", "GET", "maxmemory-policy"), managedPolicy)
	})
	if err := stop(); err != nil {
		t.Error(err)
	}
}

func TestMemoryIsWatched(t *testing.T) {
	s := newSite(t, testenv.Redis(t, "--maxmemory", "10mb", "--maxmemory-policy", "allkeys-lfu").URL(), testenv.Postgres(t))
	s.write(routes + "redis: {max_memory: 64mb}\n")
	stop := s.serve()
	eventually(t, "both warnings", func() bool {
		return s.stderr.has("another memory limit", `"maxmemory_policy":"allkeys-lfu"`)
	})
	if err := stop(); err != nil {
		t.Error(err)
	}
}

func TestAddressInUse(t *testing.T) {
	s := newSite(t, "", "")
	ln, err := net.Listen("tcp", s.observe)
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	s.write(routes)
	err = s.run("serve")
	if code := exitCode(err, &s.stderr); code != exitNot || !s.stderr.has("observe.address", "is in use") {
		t.Errorf("exit code %d: %v", code, err)
	}
	if _, err := os.Lstat(s.socket); err == nil {
		t.Error("the socket's file is left")
	}
}

func TestStatsWatch(t *testing.T) {
	s := newSite(t, "", "")
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	watched := make(chan error, 1)
	go func() {
		watched <- run(ctx, []string{"stats", "--watch", "--observe", s.observe}, s.env(), &s.stdout, &s.stderr)
	}()
	eventually(t, "it says that nobody answers", func() bool { return s.stdout.has("no cacheproxy answers") })
	s.write(routes)
	s.serve()
	eventually(t, "it finds the proxy", func() bool { return s.stdout.has("reads/s=") })
	cancel()
	if err := <-watched; err != nil {
		t.Error(err)
	}
}
