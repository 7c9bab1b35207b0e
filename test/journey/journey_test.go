// Package journey takes a table of 200,000 rows the way of docs/migration-guide.md, from a column that an application keeps with SQL to Redis alone, while
// readers and 500 writes a second never stop, and judges every read.
package journey

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/redis/go-redis/v9"

	"cacheproxy/internal/testenv"
)

func TestMain(m *testing.M) { testenv.Main(m) }

const (
	rows = 200_000
	// rate of writes a second, of all call sites together.
	rate    = 500
	writers = 8
	readers = 4
	// poll is journal.poll: by then Redis has been told of what SQL has written. noticed is what comes on top, for the sidecar that finds the record has to
	// repair it, on a machine that may be busy.
	poll    = 500 * time.Millisecond
	noticed = time.Second
	// rest is how long each phase lasts.
	rest = 10 * time.Second
	// patience bounds what the machine may take for anything else.
	patience = 2 * time.Minute
)

// report is one row as its application knows it. One writer at a time has it.
type report struct {
	writing sync.Mutex
	mu      sync.Mutex
	next    int64 // guarded by writing: the version that is written next
	begun   int64 // guarded by mu: the highest version that may be there
	acked   []ack // guarded by mu: the latest last
}

// ack is a version that was acknowledged, and by when every reader must see it.
type ack struct {
	version int64
	seen    time.Time
}

// least is the version that a read which begins at a time must see.
func (r *report) least(at time.Time) int64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	for i := len(r.acked) - 1; i >= 0; i-- {
		if !r.acked[i].seen.After(at) {
			return r.acked[i].version
		}
	}
	return 0
}

func (r *report) most() int64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.begun
}

// application is what must not notice anything.
type application struct {
	t       *testing.T
	reports []report
	pg      *pgxpool.Pool
	proxies []*redis.Client
	viaSQL  atomic.Int64 // of a thousand writes, so many are SQL
	stop    chan struct{}
	wg      sync.WaitGroup

	reads, writes, sqlWrites, late atomic.Int64
	latest                         atomic.Int64 // ns: how late a write of SQL was seen
	wrong                          atomic.Int64
}

func (a *application) mistake(format string, args ...any) {
	if n := a.wrong.Add(1); n <= 10 {
		a.t.Errorf(format, args...)
	}
}

// write is one write of a call site.
func (a *application) write(ctx context.Context, rng *rand.Rand, proxy *redis.Client) error {
	id := 1 + rng.IntN(rows)
	r := &a.reports[id]
	r.writing.Lock()
	defer r.writing.Unlock()
	r.next++
	version := r.next
	r.mu.Lock()
	r.begun = version
	r.mu.Unlock()
	value := fmt.Sprintf(`{"version": %d, "text": %q}`, version, strings.Repeat("x", rng.IntN(400)))
	sql := rng.Int64N(1000) < a.viaSQL.Load()
	var err error
	if sql {
		a.sqlWrites.Add(1)
		_, err = a.pg.Exec(ctx, `UPDATE reports SET analytics_cache = $2::text::jsonb WHERE id = $1`, id, value)
	} else {
		err = proxy.Set(ctx, "report:"+strconv.Itoa(id), value, 0).Err()
	}
	if err != nil {
		return err
	}
	seen := time.Now()
	if sql {
		seen = seen.Add(poll + noticed)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.acked = append(r.acked, ack{version, seen})
	for len(r.acked) > 1 && r.acked[1].seen.Before(time.Now().Add(-time.Minute)) {
		r.acked = r.acked[1:]
	}
	return nil
}

func (a *application) writer(seed uint64) {
	rng := rand.New(rand.NewPCG(seed, 1))
	tick := time.NewTicker(time.Second * writers / rate)
	defer tick.Stop()
	for {
		select {
		case <-a.stop:
			return
		case <-tick.C:
		}
		if err := a.write(context.Background(), rng, a.proxies[rng.IntN(len(a.proxies))]); err != nil {
			a.mistake("a write fails: %v", err)
		}
		a.writes.Add(1)
	}
}

func (a *application) reader(seed uint64) {
	rng := rand.New(rand.NewPCG(seed, 2))
	for {
		select {
		case <-a.stop:
			return
		case <-time.After(time.Millisecond): // readers leave the machine to the others now and then
		}
		id := 1 + rng.IntN(rows)
		r := &a.reports[id]
		began := time.Now()
		text, err := a.proxies[rng.IntN(len(a.proxies))].Get(context.Background(), "report:"+strconv.Itoa(id)).Result()
		a.reads.Add(1)
		if errors.Is(err, redis.Nil) {
			a.mistake("report:%d is missing", id)
			continue
		} else if err != nil {
			a.mistake("a read fails: %v", err)
			continue
		}
		var got struct{ Version int64 }
		if err := json.Unmarshal([]byte(text), &got); err != nil {
			a.mistake("report:%d is %.60q", id, text)
			continue
		}
		if least := r.least(began); got.Version < least {
			a.mistake("report:%d is stale: version %d, and %d was to be seen", id, got.Version, least)
		}
		if most := r.most(); got.Version > most {
			a.mistake("report:%d has version %d, and nobody has written more than %d", id, got.Version, most)
		}
		// How late SQL was seen, within what is allowed.
		r.mu.Lock()
		for _, k := range r.acked {
			if k.version > got.Version {
				if late := began.Sub(k.seen.Add(-poll - noticed)); late > 0 && k.seen.After(began) {
					a.late.Add(1)
					for old := a.latest.Load(); int64(late) > old; old = a.latest.Load() {
						if a.latest.CompareAndSwap(old, int64(late)) {
							a.t.Logf("%s: SQL was seen %v late", began.UTC().Format("15:04:05.000"), late.Round(time.Millisecond))
						}
					}
				}
				break
			}
		}
		r.mu.Unlock()
	}
}

// sidecar is the built program, with a configuration of its own.
type sidecar struct {
	t                    *testing.T
	dir, config, addr    string
	observe, admin       string
	redisURL, postgresql string
}

func newSidecar(t *testing.T, redisURL, pgURL string) *sidecar {
	address := func() string { return fmt.Sprintf("127.0.0.1:%d", testenv.FreePort(t)) }
	dir := t.TempDir()
	s := &sidecar{t: t, dir: dir, config: filepath.Join(dir, "config.yaml"), addr: address(), observe: address(), admin: address(), redisURL: redisURL, postgresql: pgURL}
	s.write("phase0")
	return s
}

func (s *sidecar) write(phase string) {
	s.t.Helper()
	text := fmt.Sprintf(`
listen: {address: %q}
observe: {address: %q}
admin: {address: %q}
redis: {timeout: 10s, dial_timeout: 10s} # a busy machine is no outage
postgres: {timeout: 20s}
verify: {sample: 5%%}
routes:
  - name: report
    match: "report:{id}"
    phase: %s
    on_unknown: error
    store: {kind: column, table: public.reports, key_column: id, value_column: analytics_cache}
`, s.addr, s.observe, s.admin, phase)
	if err := os.WriteFile(s.config+".new", []byte(text), 0o600); err != nil {
		s.t.Fatal(err)
	}
	if err := os.Rename(s.config+".new", s.config); err != nil {
		s.t.Fatal(err)
	}
}

func (s *sidecar) command(args ...string) *exec.Cmd {
	cmd := exec.Command(testenv.Program(s.t), append(args, "--config", s.config)...)
	cmd.Env = []string{"HOME=" + s.dir, "REDIS_URL=" + s.redisURL, "DATABASE_URL=" + s.postgresql}
	return cmd
}

// run runs a command, which must end with a code, and returns what it prints.
func (s *sidecar) run(code int, args ...string) string {
	s.t.Helper()
	out, err := s.command(args...).CombinedOutput()
	got := 0
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		got = exit.ExitCode()
	} else if err != nil {
		s.t.Fatal(err)
	}
	if got != code {
		s.t.Fatalf("cacheproxy %s ends with %d:\n%s", strings.Join(args, " "), got, out)
	}
	s.t.Logf("$ cacheproxy %s\n%s", strings.Join(args, " "), out)
	return string(out)
}

// soon runs a command until it ends with 0.
func (s *sidecar) soon(args ...string) {
	s.t.Helper()
	for end := time.Now().Add(patience); ; time.Sleep(500 * time.Millisecond) {
		out, err := s.command(args...).CombinedOutput()
		if err == nil {
			s.t.Logf("$ cacheproxy %s\n%s", strings.Join(args, " "), out)
			return
		}
		if time.Now().After(end) {
			s.t.Fatalf("cacheproxy %s: %v\n%s", strings.Join(args, " "), err, out)
		}
	}
}

func (s *sidecar) serve() {
	cmd := s.command("serve")
	var log testenv.Output
	cmd.Stdout, cmd.Stderr = &log, &log
	if err := cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		late := time.AfterFunc(patience, func() { _ = cmd.Process.Kill() })
		defer late.Stop()
		if err := cmd.Wait(); err != nil {
			s.t.Errorf("the proxy ends with %v", err)
		}
		if s.t.Failed() {
			s.t.Logf("the proxy says:\n%s", log.Tail(10_000))
		}
	})
	s.soon("healthcheck")
}

func TestJourney(t *testing.T) {
	ctx := context.Background()
	rd, pgURL := testenv.Redis(t), testenv.Postgres(t)
	pg, err := pgxpool.New(ctx, pgURL)
	if err != nil {
		t.Fatal(err)
	}
	defer pg.Close()
	sql := func(text string, args ...any) {
		t.Helper()
		if _, err := pg.Exec(ctx, text, args...); err != nil {
			t.Fatalf("%.100s: %v", text, err)
		}
	}
	sql(`CREATE TABLE public.reports (id bigint PRIMARY KEY, title text NOT NULL, analytics_cache jsonb)`)
	sql(`INSERT INTO public.reports SELECT i, 'report ' || i, jsonb_build_object('version', 0, 'text', repeat('x', 200)) FROM generate_series(1, $1::int) i`, rows)
	fleet := []*sidecar{newSidecar(t, rd.URL(), pgURL), newSidecar(t, rd.URL(), pgURL)}
	first := fleet[0]
	all := func(do func(*sidecar)) {
		for _, s := range fleet {
			do(s)
		}
	}
	// step moves the fleet on, one sidecar after the other, each as soon as nothing speaks against it, and writes the phase into their files.
	step := func(way, phase string) {
		t.Helper()
		all(func(s *sidecar) { s.soon("phase", "--route", "report", way); s.write(phase); time.Sleep(time.Second) })
	}

	// 1 adopt
	first.run(0, "check")
	triggers := first.command("schema", "--route", "report")
	text, err := triggers.Output()
	if err != nil {
		t.Fatal(err)
	}
	sql(string(text))
	if out := first.run(0, "check"); !strings.Contains(out, "changes that others make are recorded") {
		t.Errorf("check does not know of the triggers:\n%s", out)
	}

	// 2 phase0
	all((*sidecar).serve)
	a := &application{t: t, reports: make([]report, rows+1), pg: pg, stop: make(chan struct{})}
	for _, s := range fleet {
		a.proxies = append(a.proxies, redis.NewClient(&redis.Options{Addr: s.addr, DisableIdentity: true, ReadTimeout: patience, WriteTimeout: patience, PoolSize: 20, MaxRetries: -1}))
	}
	a.viaSQL.Store(1000)
	began := time.Now()
	for i := range writers {
		a.wg.Go(func() { a.writer(uint64(i)) })
	}
	for i := range readers {
		a.wg.Go(func() { a.reader(uint64(i)) })
	}
	time.Sleep(rest)

	// 3 warm
	first.run(0, "migrate", "--route", "report", "--dry-run")
	first.run(0, "migrate", "--route", "report")
	first.run(0, "verify", "--route", "report", "--sample", "20000")

	// 4 phase1: half of the call sites move, and the way back is tried
	step("--advance", "phase1")
	time.Sleep(rest)
	step("--rollback", "phase0") // no key is in Redis alone: those whose column others have emptied have a row too
	step("--advance", "phase1")
	a.viaSQL.Store(500)
	time.Sleep(rest)
	first.run(0, "verify", "--route", "report", "--sample", "20000")

	// 5 phase2: all have moved but a forgotten job
	a.viaSQL.Store(20)
	step("--advance", "phase2")
	time.Sleep(rest)
	step("--rollback", "phase1")
	first.run(0, "migrate", "--route", "report", "--reverse")
	step("--advance", "phase2")
	time.Sleep(rest)

	// 6 leave Postgres
	a.viaSQL.Store(0)
	time.Sleep(2 * (poll + noticed))
	first.run(0, "migrate", "--route", "report")
	first.soon("verify", "--route", "report", "--complete", "--sample", "20000")
	step("--advance", "drain")
	time.Sleep(rest)
	step("--advance", "phase3")
	time.Sleep(rest)

	// 7 finish
	first.soon("finalize", "--route", "report") // a minute after the last sidecar was seen in another phase
	first.run(0, "finalize", "--route", "report", "--yes")
	var left int
	if err := pg.QueryRow(ctx, `SELECT count(*) FROM information_schema.columns WHERE table_schema = 'public' AND table_name = 'reports' AND column_name = 'analytics_cache'`).Scan(&left); err != nil || left != 0 {
		t.Errorf("the column is still there: %d, %v", left, err)
	}
	time.Sleep(rest)
	close(a.stop)
	a.wg.Wait()
	lasted := time.Since(began)
	t.Logf("%d reads, %d writes with SQL and %d through the client, %.0f writes a second over %v; %d reads stale, missing or wrong; SQL was seen %v late at most (%d reads)",
		a.reads.Load(), a.sqlWrites.Load(), a.writes.Load()-a.sqlWrites.Load(), float64(a.writes.Load())/lasted.Seconds(), lasted.Round(time.Second), a.wrong.Load(),
		time.Duration(a.latest.Load()).Round(time.Millisecond), a.late.Load())
	if a.reads.Load() < 10_000 || a.sqlWrites.Load() < 1000 || float64(a.writes.Load()) < 0.9*rate*lasted.Seconds() {
		t.Error("too little happened, or too slowly, for all of this to say much")
	}
}
