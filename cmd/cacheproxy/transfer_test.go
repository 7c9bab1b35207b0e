package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"cacheproxy/internal/devserver"
	"cacheproxy/internal/testenv"
	"cacheproxy/internal/transfer"

	"github.com/jackc/pgx/v5"
	"github.com/redis/go-redis/v9"
)

// tools are two stores, and tools of the built program that work on them.
type tools struct {
	*site
	ctx   context.Context
	redis *redis.Client // Redis itself
	db    *pgx.Conn
	srv   *devserver.Redis
}

func newTools(t *testing.T, phase string, more ...string) *tools {
	t.Helper()
	return newToolsAt(t, testenv.Redis(t), testenv.Postgres(t), phase, more...)
}

// newToolsAt is newTools with stores of one's own.
func newToolsAt(t *testing.T, srv *devserver.Redis, postgresURL, phase string, more ...string) *tools {
	t.Helper()
	x := &tools{site: newSite(t, srv.URL(), postgresURL), ctx: context.Background(), srv: srv}
	x.phase(phase, more...)
	x.redis = redis.NewClient(&redis.Options{Addr: srv.Addr(), MaxRetries: -1, DisableIdentity: true})
	t.Cleanup(func() { x.redis.Close() })
	var err error
	if x.db, err = pgx.Connect(x.ctx, x.postgresURL); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { x.db.Close(x.ctx) })
	if code, _, stderr := x.tool("check"); code != exitFine {
		t.Fatalf("check: %d %s", code, stderr)
	}
	return x
}

// phase sets the phase of the only route; more lines come behind it.
func (x *tools) phase(phase string, more ...string) {
	x.write(fmt.Sprintf("routes: [{name: all, match: '*', phase: %s}]\n%s", phase, strings.Join(more, "\n")))
}

// command is a command of the built program, which is not started yet.
func (x *tools) command(args ...string) *exec.Cmd {
	return exec.Command(testenv.Program(x.t), append(args, "--config", x.config)...)
}

// tool runs it to its end.
func (x *tools) tool(args ...string) (code int, stdout, stderr string) {
	x.t.Helper()
	cmd := x.command(args...)
	cmd.Env = append(x.env(), "PATH=/usr/bin:/bin")
	var out, errs output
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil && cmd.ProcessState == nil {
		x.t.Fatal(err)
	}
	return cmd.ProcessState.ExitCode(), out.String(), errs.String()
}

// background starts it; what it prints is in the outputs.
func (x *tools) background(args ...string) (p *program, out, errs *output) {
	x.t.Helper()
	out, errs = &output{}, &output{}
	cmd := x.command(args...)
	cmd.Stdout, cmd.Stderr = out, errs
	return x.start(cmd), out, errs
}

func (x *tools) sql(text string, args ...any) {
	x.t.Helper()
	if _, err := x.db.Exec(x.ctx, text, args...); err != nil {
		x.t.Fatal(err)
	}
}

func (x *tools) ask(text string, args ...any) (out string) {
	x.t.Helper()
	if err := x.db.QueryRow(x.ctx, "SELECT ("+text+")::text", args...).Scan(&out); err != nil {
		x.t.Fatal(err)
	}
	return out
}

func (x *tools) must(err error) {
	x.t.Helper()
	if err != nil {
		x.t.Fatal(err)
	}
}

// rows makes n rows called k:000001 and so on.
func (x *tools) rows(n int) {
	x.t.Helper()
	x.sql(`INSERT INTO cacheproxy.entries (key, value, route, generation, updated_at)
		SELECT to_char(i, '"k:"FM000000'), jsonb_build_object('n', i), 'all', (SELECT coalesce(max(generation), 0) FROM cacheproxy.generations), now() FROM generate_series(1, $1::int) i`, n)
}

// served leaves Redis as a sidecar does that has looked at what it holds.
func (x *tools) served() {
	x.t.Helper()
	info := map[string]string{}
	for line := range strings.SplitSeq(x.redis.Info(x.ctx, "server", "replication").Val(), "\r\n") {
		name, value, _ := strings.Cut(line, ":")
		info[name] = value
	}
	x.must(x.redis.Set(x.ctx, "cacheproxy:clock", fmt.Sprintf("%d %s %s", time.Now().UnixMilli(), info["run_id"], info["master_replid"]), 0).Err())
}

func (x *tools) report(text string) (r transfer.Report) {
	x.t.Helper()
	if err := json.Unmarshal([]byte(text), &r); err != nil {
		x.t.Fatalf("%v:\n%s", err, text)
	}
	return r
}

func (x *tools) verdict(text string) (v transfer.Verdict) {
	x.t.Helper()
	if err := json.Unmarshal([]byte(text), &v); err != nil {
		x.t.Fatalf("%v:\n%s", err, text)
	}
	return v
}

// verify runs verify in two quick rounds.
func (x *tools) verify(args ...string) (int, transfer.Verdict) {
	x.t.Helper()
	code, stdout, stderr := x.tool(append([]string{"verify", "--json", "--rounds", "2", "--pause", "50ms"}, args...)...)
	if stdout == "" {
		x.t.Fatalf("exit code %d\n%s", code, stderr)
	}
	return code, x.verdict(stdout)
}

func TestMigrate(t *testing.T) {
	x := newTools(t, "phase1", "postgres: {max_value: 1MiB}")
	x.rows(3000)
	x.sql(`INSERT INTO cacheproxy.entries (key, value, raw, route, generation, expires_at, updated_at) VALUES
		('raw', NULL, '\x00ff', 'all', 0, NULL, now()),
		('ttl', '1', NULL, 'all', 0, now() + interval '1 h', now()),
		('expired', '1', NULL, 'all', 0, now() - interval '1 s', now()),
		('deleted', NULL, NULL, 'all', 0, NULL, now()),
		('there', '1', NULL, 'all', 0, NULL, now()),
		('marked', '1', NULL, 'all', 0, NULL, now()),
		('large', NULL, convert_to(repeat('x', 1048577), 'UTF8'), 'all', 0, NULL, now())`)
	x.served()
	x.must(x.redis.Set(x.ctx, "there", "mine", 0).Err())
	x.must(x.redis.HSet(x.ctx, "cacheproxy:journal", "marked", "v1").Err())

	want := transfer.Report{Route: "all", Rows: 3007, Copied: 3002, There: 1, Expired: 1, Deleted: 1, Marked: 1, TooLarge: 1}
	check := func(text string) transfer.Report {
		t.Helper()
		got := x.report(text)
		if got.Seconds <= 0 || len(got.Examples["too large"]) != 1 || got.Examples["too large"][0].Key != "large" {
			t.Errorf("%+v", got)
		}
		compare := got
		compare.Seconds, compare.Examples, compare.Bytes, compare.DryRun = 0, nil, 0, false
		if fmt.Sprintf("%+v", compare) != fmt.Sprintf("%+v", want) {
			t.Errorf("got  %+v\nwant %+v", compare, want)
		}
		return got
	}
	// A dry run says all this and touches nothing.
	before := x.redis.DBSize(x.ctx).Val()
	code, stdout, stderr := x.tool("migrate", "--dry-run", "--json")
	if r := check(stdout); code != exitNot || !r.DryRun {
		t.Errorf("a dry run: exit code %d\n%s", code, stderr)
	}
	if n := x.redis.DBSize(x.ctx).Val(); n != before {
		t.Errorf("a dry run has left %d keys", n-before)
	}
	code, stdout, stderr = x.tool("migrate", "--json")
	if r := check(stdout); code != exitNot || r.Bytes < 3000*8 { // a value is too large
		t.Errorf("exit code %d, %d bytes\n%s", code, r.Bytes, stderr)
	}
	for key, value := range map[string]string{"k:000001": `{"n": 1}`, "k:003000": `{"n": 3000}`, "raw": "\x00\xff", "there": "mine"} {
		if got := x.redis.Get(x.ctx, key).Val(); got != value {
			t.Errorf("%s is %q, want %q", key, got, value)
		}
	}
	if d := x.redis.TTL(x.ctx, "ttl").Val(); d < 50*time.Minute || d > time.Hour {
		t.Errorf("ttl lives for %s", d)
	}
	if n := x.redis.Exists(x.ctx, "marked", "expired", "deleted", "large").Val(); n != 0 {
		t.Errorf("%d keys that should not be there", n)
	}
	if keys := x.redis.Keys(x.ctx, "cacheproxy:lease:*").Val(); len(keys) > 0 {
		t.Errorf("leases are left: %q", keys)
	}
	if n := x.ask("SELECT count(*) FROM cacheproxy.transfers"); n != "0" {
		t.Errorf("%s checkpoints are left", n)
	}
	// For people, and once more: all is there.
	x.sql("DELETE FROM cacheproxy.entries WHERE key = 'large'")
	code, stdout, stderr = x.tool("migrate")
	if code != exitFine || !strings.Contains(stdout, "3003 were in redis already") || !strings.Contains(stdout, "rows a second") {
		t.Errorf("once more: exit code %d\n%s%s", code, stdout, stderr)
	}
}

// Routes share the table, and prefixes; the first that matches a key has it.
func TestMigrateOneRoute(t *testing.T) {
	x := newTools(t, "phase1")
	x.rows(300)
	// Without a sidecar that has looked at it, what Redis holds is dropped by the first that comes.
	x.must(x.redis.Set(x.ctx, "old", "1", 0).Err())
	if code, _, stderr := x.tool("migrate"); code != exitNot || !strings.Contains(stderr, "start one first") {
		t.Errorf("a redis that nobody has served: exit code %d\n%s", code, stderr)
	}
	x.must(x.redis.Del(x.ctx, "old").Err())
	x.write("routes:\n- {name: one, match: 'k:00000*', phase: phase1}\n- {name: some, match: 'k:0*', phase: phase1}\n- {name: late, match: '*', phase: phase3}")
	for _, c := range []struct {
		args []string
		code int
		says string
	}{
		{[]string{"migrate"}, exitUsage, "--route (one, some, late)"},
		{[]string{"migrate", "--route", "none"}, exitUsage, "no route none"},
		{[]string{"migrate", "--route", "some", "--rate", "-1"}, exitUsage, "--rate"},
		{[]string{"migrate", "--route", "some", "--workers", "0"}, exitUsage, "--workers"},
		{[]string{"migrate", "--route", "some", "--resume", "--dry-run"}, exitUsage, "--resume"},
		{[]string{"migrate", "--route", "late"}, exitNot, "no store"},
		{[]string{"verify", "--route", "late"}, exitNot, "nothing to compare"},
		{[]string{"verify", "--route", "some", "--sample", "0%"}, exitUsage, "--sample"},
		{[]string{"verify", "--route", "some", "--rounds", "0"}, exitUsage, "--rounds"},
	} {
		if code, _, stderr := x.tool(c.args...); code != c.code || !strings.Contains(stderr, c.says) {
			t.Errorf("%q: exit code %d, want %d and %q\n%s", c.args, code, c.code, c.says, stderr)
		}
	}
	code, stdout, stderr := x.tool("migrate", "--route", "some", "--json")
	if r := x.report(stdout); code != exitFine || r.Rows != 291 || r.Copied != 291 {
		t.Errorf("exit code %d: %+v\n%s", code, r, stderr)
	}
	if n := x.redis.Exists(x.ctx, "k:000009").Val(); n != 0 {
		t.Error("a key of another route was copied")
	}
	// What was copied into an empty Redis is still there when the first sidecar comes.
	s := x.exec("serve", "--config", x.config)
	x.started()
	eventually(t, "redis is trusted", func() bool {
		_, body := x.get("/healthz")
		return strings.Count(body, `"connected"`) == 2
	})
	if n := x.redis.DBSize(x.ctx).Val(); n != 293 {
		t.Errorf("%d keys are left", n)
	}
	s.signal(t, syscall.SIGTERM)
	s.code(t)
	x.phase("drain")
	for _, args := range [][]string{{"migrate"}, {"migrate", "--reverse"}} {
		if code, _, stderr := x.tool(args...); code != exitNot || !strings.Contains(stderr, "does not read the store") {
			t.Errorf("%q in drain: exit code %d\n%s", args, code, stderr)
		}
	}
	// Somebody served it without the store: nothing says that its rows are the newest.
	x.phase("phase2")
	x.sql("INSERT INTO cacheproxy.phases VALUES ('all', 'phase3', now(), now())")
	if code, _, stderr := x.tool("migrate"); code != exitNot || !strings.Contains(stderr, "served in phase3") {
		t.Errorf("after phase3: exit code %d\n%s", code, stderr)
	}
}

// Ctrl-C ends it with a checkpoint, kill -9 with one that is older; --resume goes on, and only one runs at a time.
func TestMigrateResumes(t *testing.T) {
	x := newTools(t, "phase1")
	const rows = 20_000
	x.rows(rows)
	copied := func() int64 { return x.redis.DBSize(x.ctx).Val() - 2 } // the clock and the journal
	p, _, errs := x.background("migrate", "--rate", "4000")
	eventually(t, "something is copied", func() bool { return copied() > 1000 })
	if code, _, stderr := x.tool("migrate"); code != exitNot || !strings.Contains(stderr, "another migrate") {
		t.Errorf("a second one: exit code %d\n%s", code, stderr)
	}
	p.signal(t, syscall.SIGINT)
	if code := p.code(t); code != exitInterrupted || !strings.Contains(errs.String(), "--resume goes on") {
		t.Errorf("after Ctrl-C: exit code %d\n%s", code, errs)
	}
	first := copied()
	if keys := x.redis.Keys(x.ctx, "cacheproxy:lease:*").Val(); len(keys) > 0 || first >= rows {
		t.Errorf("%d keys, leases are left: %q", first, keys)
	}
	if at := x.ask("SELECT state->'report'->>'copied' FROM cacheproxy.transfers"); at != strconv.FormatInt(first, 10) {
		t.Errorf("the checkpoint says %s of %d", at, first)
	}

	// From there on, and killed: what it did since its own checkpoint will be there already.
	p, _, errs = x.background("migrate", "--resume", "--rate", "1000")
	eventually(t, "a checkpoint is written", func() bool {
		return x.ask("SELECT (state->'report'->>'copied')::int > $1 FROM cacheproxy.transfers", first) == "true"
	})
	p.signal(t, syscall.SIGKILL)
	p.code(t)
	if !strings.Contains(errs.String(), "going on from the checkpoint") {
		t.Errorf("it does not say that it goes on:\n%s", errs)
	}
	var stdout, stderr string
	code := -1
	eventually(t, "the lock of the dead one is gone", func() bool {
		code, stdout, stderr = x.tool("migrate", "--resume", "--json")
		return !strings.Contains(stderr, "another migrate")
	})
	r := x.report(stdout)
	if code != exitFine || r.Rows != rows || r.Copied+r.There != rows || copied() != rows {
		t.Errorf("exit code %d, %d keys: %+v\n%s", code, copied(), r, stderr)
	}
	if r.There > rows/2 {
		t.Errorf("%d of %d rows were copied twice", r.There, rows)
	}
	if n := x.ask("SELECT count(*) FROM cacheproxy.transfers"); n != "0" {
		t.Errorf("%s checkpoints are left", n)
	}

	// An interrupted run that goes on repeats nothing.
	x.must(x.redis.FlushAll(x.ctx).Err())
	args := []string{"migrate", "--rate", "6000", "--json"}
	for n := 0; ; n++ {
		p, out, _ := x.background(args...)
		was := copied()
		eventually(t, "it goes on, or ends", func() bool {
			select {
			case <-p.ended:
				return true
			default:
				return n < 3 && copied() > was+2000
			}
		})
		if n < 3 {
			_ = p.Process.Signal(syscall.SIGTERM) // it may have ended
		}
		code := p.code(t)
		if args = []string{"migrate", "--json", "--resume", "--rate", "6000"}; code == exitInterrupted {
			continue
		}
		if r := x.report(out.String()); code != exitFine || r.Rows != rows || r.Copied != rows || n == 0 {
			t.Errorf("exit code %d after %d interrupts: %+v", code, n, r)
		}
		break
	}
}

// A store in trouble is waited for, and it says for what; not for ever.
func TestMigrateWaits(t *testing.T) {
	x := newTools(t, "phase1")
	x.rows(2000)
	for _, c := range []struct {
		name, says  string
		break_, end func()
	}{
		{"no memory", "redis has no memory left",
			func() { x.must(x.redis.ConfigSet(x.ctx, "maxmemory", "1").Err()) },
			func() { x.must(x.redis.ConfigSet(x.ctx, "maxmemory", "0").Err()) }},
		{"redis is gone", "redis",
			func() { x.must(x.srv.Kill()) },
			func() { x.must(x.srv.Restart()) }},
		{"a table that is locked", "somebody holds a lock in postgres",
			func() { x.sql("BEGIN"); x.sql("LOCK TABLE cacheproxy.entries") },
			func() { x.sql("COMMIT") }},
	} {
		t.Run(c.name, func(t *testing.T) {
			x.must(x.redis.FlushAll(x.ctx).Err())
			c.break_()
			was := x.postgresURL
			x.postgresURL += "&lock_timeout=200"
			p, out, errs := x.background("migrate", "--json")
			x.postgresURL = was
			eventually(t, "it says what it waits for", func() bool { return errs.has("waiting for", c.says) })
			c.end()
			if code := p.code(t); code != exitFine || x.redis.DBSize(x.ctx).Val() != 2002 {
				t.Errorf("exit code %d\n%s%s", code, out, errs)
			}
			if r := x.report(out.String()); r.Copied != 2000 || r.Failed != 0 {
				t.Errorf("%+v", r)
			}
		})
	}
	x.must(x.srv.Pause())
	code, _, stderr := x.tool("migrate", "--patience", "1ms")
	x.must(x.srv.Resume())
	if code != exitUnreachable || !strings.Contains(stderr, "gave up") {
		t.Errorf("with little patience: exit code %d\n%s", code, stderr)
	}
	x.redisURL, x.postgresURL = "redis://127.0.0.1:1", "postgres://127.0.0.1:1/app"
	for _, args := range [][]string{{"migrate", "--patience", "1ms"}, {"migrate", "--dry-run", "--patience", "1ms"}, {"verify", "--patience", "1ms"}} {
		if code, _, stderr := x.tool(args...); code != exitUnreachable {
			t.Errorf("%q without stores: exit code %d\n%s", args, code, stderr)
		}
	}
}

// Whoever makes a store slow, migrate makes room, and takes it again.
func TestMigrateBrakes(t *testing.T) {
	srv, pg := testenv.Redis(t), testenv.PostgresServer(t)
	x := newToolsAt(t, srv, pg.URL("postgres"), "phase1")
	const rows = 100_000
	x.rows(rows)
	toRedis, toPostgres := testenv.NewLink(t, srv.Addr()), testenv.NewLink(t, pg.Addr())
	x.redisURL, x.postgresURL = "redis://"+toRedis.Addr(), pg.URLVia(toPostgres.Addr(), "postgres")
	for _, c := range []struct {
		store string
		link  *testenv.Link
		late  time.Duration // each way: more than a store may always take
	}{{"redis", toRedis, 25 * time.Millisecond}, {"postgres", toPostgres, 75 * time.Millisecond}} {
		t.Run(c.store, func(t *testing.T) {
			x.must(x.redis.FlushAll(x.ctx).Err())
			p, _, errs := x.background("migrate", "--rate", "4000")
			eventually(t, "some are copied", func() bool { return x.redis.DBSize(x.ctx).Val() > 4000 })
			if errs.has("slowing down") {
				t.Errorf("slow without a reason:\n%s", errs)
			}
			c.link.Delay(c.late)
			eventually(t, "it makes room", func() bool { return errs.has("slowing down: " + c.store + " takes ") })
			c.link.Delay(0)
			eventually(t, "it goes on as before", func() bool { return errs.has("the stores answer as before: full speed") })
			p.signal(t, syscall.SIGINT)
			if code, n := p.code(t), x.redis.DBSize(x.ctx).Val(); code != exitInterrupted || n >= rows {
				t.Errorf("exit code %d, %d keys in Redis\n%s", code, n, errs)
			}
		})
	}
}

func TestMigrateOnTerminal(t *testing.T) {
	x := newTools(t, "phase1")
	x.rows(10_000)
	const width = 80
	p := newTerminal(t, width, 24, x.env(), "migrate", "--rate", "5000", "--config", x.config)
	bar := regexp.MustCompile(`\r\x1b\[K\[#*\.*\] +[0-9]+ %  [0-9]+ of about [0-9]+ rows, [0-9]+/s, [0-9a-z]+ left`)
	eventually(t, "a bar is drawn", func() bool { return bar.MatchString(p.screen.String()) })
	<-p.ended
	if code := p.cmd.ProcessState.ExitCode(); code != exitFine {
		t.Errorf("exit code %d", code)
	}
	eventually(t, "the report is printed", func() bool {
		return strings.Contains(p.screen.String(), "10000") && strings.HasSuffix(p.screen.String(), "\n")
	})
	text := p.screen.String()
	drawn := strings.Split(text[:strings.LastIndex(text, "\r\x1b[K")], "\r\x1b[K")
	if len(drawn) < 4 {
		t.Errorf("drawn %d times in two seconds", len(drawn))
	}
	for _, line := range drawn {
		if len(line) >= width {
			t.Errorf("%q wraps", line)
		}
	}
	if last := text[strings.LastIndex(text, "\r\x1b[K"):]; strings.Contains(last, "[#") {
		t.Errorf("the bar stays: %q", last)
	}
}

func TestMigrateReverse(t *testing.T) {
	x := newTools(t, "phase1")
	x.rows(10)
	x.must(x.redis.Set(x.ctx, "k:000001", "mine", 0).Err())
	for i := range 3000 {
		x.must(x.redis.Set(x.ctx, fmt.Sprintf("r:%04d", i), fmt.Sprintf(`{"r": %d}`, i), time.Hour).Err())
	}
	x.must(x.redis.Set(x.ctx, "bytes", "\x00\xff", 0).Err())
	x.must(x.redis.HSet(x.ctx, "hash", "f", "v").Err())
	code, stdout, stderr := x.tool("migrate", "--reverse", "--dry-run")
	if code != exitFine || !strings.Contains(stdout, "3001 would be copied into the store") || x.ask("SELECT count(*) FROM cacheproxy.entries") != "10" {
		t.Errorf("a dry run: exit code %d\n%s%s", code, stdout, stderr)
	}
	p, _, _ := x.background("migrate", "--reverse", "--rate", "500")
	eventually(t, "something is copied", func() bool { return x.ask("SELECT count(*) > 100 FROM cacheproxy.entries") == "true" })
	p.signal(t, syscall.SIGINT)
	if code := p.code(t); code != exitInterrupted {
		t.Errorf("after Ctrl-C: exit code %d", code)
	}
	code, stdout, stderr = x.tool("migrate", "--reverse", "--resume", "--json")
	if r := x.report(stdout); code != exitFine || r.Copied != 3001 || r.There != 1 || r.Rows != 3002 {
		t.Errorf("exit code %d: %+v\n%s", code, r, stderr)
	}
	if got := x.ask("SELECT encode(raw, 'hex') FROM cacheproxy.entries WHERE key = 'bytes'"); got != "00ff" {
		t.Errorf("bytes: %s", got)
	}
	if n := x.ask("SELECT count(*) FROM cacheproxy.entries WHERE expires_at BETWEEN now() + interval '50 min' AND now() + interval '1 h'"); n != "3000" {
		t.Errorf("%s rows have the life of their key", n)
	}
	// Now nothing is left that only Redis has, and the step back is allowed.
	s := x.exec("serve", "--config", x.config)
	x.started()
	c := x.client()
	if err := c.Do(x.ctx, "CACHEPROXY", "PHASE", "all", "phase0").Err(); err != nil {
		t.Errorf("back to phase0: %v", err)
	}
	if got := c.Get(x.ctx, "r:0042").Val(); got != `{"r": 42}` {
		t.Errorf("in phase0 it reads %q", got)
	}
	s.signal(t, syscall.SIGTERM)
	s.code(t)
}

// Each kind of difference is found, and repaired as the phase says.
func TestVerify(t *testing.T) {
	for _, phase := range []string{"phase0", "phase1", "phase2", "drain"} {
		t.Run(phase, func(t *testing.T) {
			x := newTools(t, phase)
			x.rows(1000)
			if phase != "drain" {
				if code, _, stderr := x.tool("migrate"); code != exitFine {
					t.Fatalf("migrate: %d\n%s", code, stderr)
				}
			} else {
				x.phase("phase2")
				x.tool("migrate")
				x.phase("drain")
			}
			if code, v := x.verify("--complete"); code != exitFine || !v.OK || v.StoreKeys != 1000 || v.RedisKeys != 1000 || v.Equal != 1000 || v.Counted != 0 {
				t.Errorf("equal copies: exit code %d: %+v", code, v)
			}
			if code, v := x.verify("--sample", "10%"); code != exitFine || v.StoreKeys < 20 || v.StoreKeys > 300 {
				t.Errorf("a tenth: exit code %d: %+v", code, v)
			}
			if code, v := x.verify("--sample", "100"); code != exitFine || v.StoreKeys < 20 || v.StoreKeys > 300 {
				t.Errorf("a hundred: exit code %d: %+v", code, v)
			}

			x.sql(`INSERT INTO cacheproxy.entries (key, value, route, generation, expires_at, updated_at) VALUES ('long', '1', 'all', 0, now() + interval '1 h', now())`)
			x.sql("UPDATE cacheproxy.entries SET value = NULL WHERE key = 'k:000004'")
			x.must(x.redis.Set(x.ctx, "k:000001", `{"n": -1}`, 0).Err())
			x.must(x.redis.Set(x.ctx, "k:000002", `{ "n":2.0 }`, 0).Err())
			x.must(x.redis.PExpire(x.ctx, "k:000003", time.Hour).Err())
			x.must(x.redis.Set(x.ctx, "long", "1", time.Hour+time.Second).Err())
			x.must(x.redis.Del(x.ctx, "k:000005").Err())
			x.must(x.redis.Set(x.ctx, "only", `1`, 0).Err())
			x.must(x.redis.Del(x.ctx, "k:000006").Err())
			x.must(x.redis.HSet(x.ctx, "k:000006", "f", "v").Err())
			// What a journal names is being looked after.
			x.must(x.redis.Set(x.ctx, "k:000007", "0", 0).Err())
			x.must(x.redis.HSet(x.ctx, "cacheproxy:journal", "k:000007", "v1").Err())
			x.must(x.redis.Set(x.ctx, "k:000008", "0", 0).Err())
			x.sql("INSERT INTO cacheproxy.journal (keys, routes) VALUES ('{k:000008}', '{all}')")

			want := map[transfer.Kind]int64{
				transfer.DiffValue: 1, transfer.DiffBytes: 1, transfer.DiffTTL: 2, transfer.DiffDeleted: 1, transfer.DiffType: 1, transfer.NotInRedis: 1, transfer.NotInStore: 1,
			}
			same := func(v transfer.Verdict) {
				t.Helper()
				for _, k := range transfer.Kinds() {
					if v.Differences[k] != want[k] {
						t.Errorf("%d of the kind %s, want %d: %+v", v.Differences[k], k, want[k], v)
					}
				}
				if v.InFlight != 2 {
					t.Errorf("%d are in flight, want 2", v.InFlight)
				}
			}
			code, v := x.verify()
			if same(v); code != exitNot || v.OK || v.Counted != 6 || len(v.Examples) != 6 {
				t.Errorf("exit code %d: %+v", code, v)
			}
			code, v = x.verify("--complete")
			keeps := phase == "phase0" || phase == "phase1"
			counted := int64(7)
			if keeps {
				counted = 8
			}
			if same(v); code != exitNot || v.Counted != counted {
				t.Errorf("complete: exit code %d: %+v", code, v)
			}
			if code, stdout, _ := x.tool("verify", "--rounds", "1", "--pause", "1ms"); code != exitNot || !strings.Contains(stdout, `value: "k:000001": redis 9 bytes, store 8 bytes`) {
				t.Errorf("for people: exit code %d\n%s", code, stdout)
			}
			// A hash that took the place of a key is nobody's copy: it stays.
			code, v = x.verify("--complete", "--repair")
			if same(v); code != exitNot || v.Repaired != counted-1 {
				t.Errorf("repair: exit code %d: %+v", code, v)
			}
			x.must(x.redis.Del(x.ctx, "k:000006").Err())
			delete(want, transfer.DiffType)
			code, v = x.verify("--complete")
			if code != exitNot || v.Counted != 1 || v.Differences[transfer.NotInRedis] != 1 || v.InFlight != 2 {
				t.Errorf("after the repair: exit code %d: %+v", code, v)
			}
			for key, is := range map[string][2]string{ // in redis and in the store
				"k:000001": {`{"n": 1}`, `{"n": 1}`},
				"k:000002": {`{"n": 2}`, `{"n": 2}`},
				"k:000004": {"", ""},
				"k:000005": {`{"n": 5}`, `{"n": 5}`},
				"only":     {"1", "1"},
			} {
				if !keeps {
					is = map[string][2]string{
						"k:000001": {`{"n": -1}`, ""}, "k:000002": {`{ "n":2.0 }`, ""}, "k:000004": {`{"n": 4}`, ""}, "k:000005": {`{"n": 5}`, `{"n": 5}`}, "only": {"1", ""},
					}[key]
				}
				got := [2]string{x.redis.Get(x.ctx, key).Val(), x.ask("SELECT coalesce((SELECT value::text FROM cacheproxy.entries WHERE key = $1), '')", key)}
				if got != is {
					t.Errorf("%s is %q, want %q", key, got, is)
				}
			}
		})
	}
}

// Clients read and write through two sidecars while rows are copied to and fro and compared: nothing stale is read, and no difference is found that is none.
func TestTransferBesideTraffic(t *testing.T) {
	for _, phase := range []string{"phase1", "phase2"} {
		t.Run(phase, func(t *testing.T) {
			x := newTools(t, phase)
			x.rows(2000)
			var wg sync.WaitGroup
			stop := make(chan struct{})
			for n := range 2 {
				s := newSite(t, x.redisURL, x.postgresURL)
				s.write(fmt.Sprintf("routes: [{name: all, match: '*', phase: %s}]", phase))
				s.exec("serve", "--config", s.config)
				s.started()
				c := s.client()
				// Each has keys of its own, and knows what they hold.
				for w := range 4 {
					wg.Go(func() {
						key := func(i int) string { return fmt.Sprintf("k:%06d", 1+n+2*w+8*(i%100)) }
						have := map[string]string{}
						for i := 0; ; i++ {
							select {
							case <-stop:
								return
							default:
							}
							k := key(i * 7)
							if got, err := c.Get(x.ctx, k).Result(); have[k] != "" && (err != nil || got != have[k]) {
								t.Errorf("%s is %q (%v), want %q", k, got, err, have[k])
								return
							}
							v := fmt.Sprintf(`{"w": %d}`, i)
							var err error
							switch i % 5 {
							case 0:
								x.redis.Del(x.ctx, k) // an eviction: from phase2 on that is Redis's to forget
								if phase == "phase2" {
									delete(have, k)
								}
								continue
							case 1:
								err = c.Set(x.ctx, k, v, time.Hour).Err()
							default:
								err = c.Set(x.ctx, k, v, 0).Err()
							}
							if err != nil {
								t.Error(err)
								return
							}
							have[k] = v
						}
					})
				}
			}
			for range 3 {
				for _, args := range [][]string{{"migrate"}, {"migrate", "--reverse"}, {"verify", "--json", "--rounds", "3", "--pause", "200ms"}} {
					code, stdout, stderr := x.tool(args...)
					if code != exitFine {
						t.Errorf("%q: exit code %d\n%s%s", args, code, stdout, stderr)
					}
				}
				x.must(x.redis.Del(x.ctx, "k:002000", "k:001999").Err())
			}
			close(stop)
			wg.Wait()
		})
	}
}
