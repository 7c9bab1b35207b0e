package transfer_test

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"cacheproxy/internal/testenv"
	"cacheproxy/internal/transfer"
	"cacheproxy/policy"
	"cacheproxy/proxy"
)

// seen is a store that remembers how much it was asked for at once.
type seen struct {
	proxy.PeerStore
	before func(refs []policy.Ref) // each Load; nil: nothing

	mu    sync.Mutex
	bytes int // guarded by mu: of the values of the largest load
	loads int // guarded by mu
}

func (s *seen) Load(ctx context.Context, refs []policy.Ref) ([]policy.Row, error) {
	if s.before != nil {
		s.before(refs)
	}
	rows, err := s.PeerStore.Load(ctx, refs)
	n := 0
	for _, row := range rows {
		n += len(row.Value)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.bytes, s.loads = max(s.bytes, n), s.loads+1
	return rows, err
}

const insertRows = `INSERT INTO cacheproxy.entries (key, value, route, generation, updated_at)
	SELECT 'k:' || i, %s, 'all', 0, now() FROM generate_series(1, %d) i`

func (x *lab) sql(t testing.TB, text string) {
	t.Helper()
	if _, err := x.conn.Exec(context.Background(), text); err != nil {
		t.Fatal(err)
	}
}

// Values that Postgres has compressed are many times as large when they are read. However well they compress, what is held at once stays as small.
func TestCompressedRows(t *testing.T) {
	const rows, value, most = 120, 900_000, 8 << 20
	for method, sql := range map[string]string{"pglz": "", "lz4": "ALTER TABLE cacheproxy.entries ALTER value SET COMPRESSION lz4; "} {
		t.Run(method, func(t *testing.T) {
			x := newLab(t, testenv.Redis(t).URL(), policy.Phase1)
			x.sql(t, sql+fmt.Sprintf(insertRows, fmt.Sprintf("to_jsonb(repeat('abcdefghi', %d))", value/9), rows))
			defer debug.SetGCPercent(debug.SetGCPercent(25))
			stop := heap()
			opt := x.options()
			opt.DryRun = true
			dry, err := transfer.Migrate(context.Background(), x.stores, opt)
			if err != nil || dry.Copied != rows || dry.Bytes != rows*(value+2) {
				t.Errorf("dry: %+v, %v", dry, err)
			}
			r, err := transfer.Migrate(context.Background(), x.stores, x.options())
			if err != nil || r.Copied != rows || r.Bytes != rows*(value+2) {
				t.Errorf("%+v, %v", r, err)
			}
			v, err := transfer.Verify(context.Background(), x.stores, x.verifyOptions())
			if err != nil || v.Equal != rows {
				t.Errorf("%+v, %v", v, err)
			}
			if x.seen.bytes > most {
				t.Errorf("%d bytes were loaded at once, after at most %d", x.seen.bytes, most)
			}
			// Four batches, each as values, as arguments and as what is sent.
			if grown := stop(); grown > 96<<20 {
				t.Errorf("the heap has grown by %d MiB", grown>>20)
			}
		})
	}
}

// Redis's copies may be larger than the rows are.
func TestVerifyLargeCopies(t *testing.T) {
	const rows, value = 200, 900_000
	x := newLab(t, testenv.Redis(t).URL(), policy.Phase2)
	x.sql(t, fmt.Sprintf(insertRows, "'1'", rows))
	for i := range rows {
		if err := x.redis.Set(context.Background(), fmt.Sprintf("k:%d", i+1), strings.Repeat("x", value), 0).Err(); err != nil {
			t.Fatal(err)
		}
	}
	defer debug.SetGCPercent(debug.SetGCPercent(25))
	stop := heap()
	v, err := transfer.Verify(context.Background(), x.stores, x.verifyOptions())
	if err != nil || v.Differences[transfer.DiffValue] != rows || v.Counted != rows {
		t.Errorf("%+v, %v", v, err)
	}
	if grown := stop(); grown > 96<<20 {
		t.Errorf("the heap has grown by %d MiB", grown>>20)
	}
}

// A value larger than postgres.max_value is not even read, however small it is kept; one that is kept larger than it is read is copied.
func TestTooLargeRows(t *testing.T) {
	x := newLab(t, testenv.Redis(t).URL(), policy.Phase1)
	x.sql(t, fmt.Sprintf(insertRows, "to_jsonb(repeat('abcdefghi', 1000000))", 3))
	// A number takes a dozen bytes, and one is written.
	x.sql(t, `INSERT INTO cacheproxy.entries (key, value, route, generation, updated_at)
		SELECT 'wide', jsonb_agg(i % 10), 'all', 0, now() FROM generate_series(1, 150000) i`)
	x.sql(t, `ALTER TABLE cacheproxy.entries ALTER value SET STORAGE EXTERNAL`)
	x.sql(t, `INSERT INTO cacheproxy.entries (key, value, route, generation, updated_at)
		SELECT 'wider', jsonb_agg(i % 10), 'all', 0, now() FROM generate_series(1, 150000) i`)
	for _, dry := range []bool{true, false} {
		opt := x.options()
		opt.DryRun = dry
		r, err := transfer.Migrate(context.Background(), x.stores, opt)
		if err != nil || r.Copied != 2 || r.TooLarge != 3 || r.Bytes != 2*3*150_000 || r.Examples["too large"][0].Why != "9000002 bytes" {
			t.Errorf("dry %v: %+v, %v", dry, r, err)
		}
	}
	if x.seen.bytes > 2*3*150_000 {
		t.Errorf("%d bytes were loaded at once", x.seen.bytes)
	}
}

// A database that needs longer than a lease lasts is no reason to blame the keys: fewer are asked for at once, and one alone is waited for.
func TestSlowLoads(t *testing.T) {
	x := newLab(t, testenv.Redis(t).URL(), policy.Phase1)
	x.sql(t, fmt.Sprintf(insertRows, "'1'", 4))
	x.seen.before = func(refs []policy.Ref) {
		for _, ref := range refs {
			if ref.Key == "k:1" {
				time.Sleep(2500 * time.Millisecond)
			}
		}
		time.Sleep(time.Duration(len(refs)) * 700 * time.Millisecond)
	}
	r, err := transfer.Migrate(context.Background(), x.stores, x.options())
	if err != nil || r.Copied != 4 || r.Failed != 0 {
		t.Errorf("%+v, %v", r, err)
	}
}

// ledger is one that may fail.
type ledger struct {
	mu    sync.Mutex
	state []byte
	at    time.Time
	err   error
}

func (l *ledger) Read(context.Context) ([]byte, time.Time, bool, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.state, l.at, l.state != nil, nil
}

func (l *ledger) Write(_ context.Context, state []byte) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.err == nil {
		l.state, l.at = state, time.Now()
	}
	return l.err
}

// A checkpoint that cannot be written is not promised: it is said what stands.
func TestUnsaved(t *testing.T) {
	x := newLab(t, testenv.Redis(t).URL(), policy.Phase1)
	x.sql(t, fmt.Sprintf(insertRows, "'1'", 10))
	broken := errors.New("disk full")
	l := &ledger{}
	x.stores.Ledger = l
	interrupted := func() error {
		ctx, cancel := context.WithCancel(context.Background())
		defer cancel()
		x.seen.before = func([]policy.Ref) { cancel() }
		opt := x.options()
		opt.Workers, opt.Rate = 1, 10 // one key a batch
		_, err := transfer.Migrate(ctx, x.stores, opt)
		if !errors.Is(err, transfer.ErrInterrupted) {
			t.Fatal(err)
		}
		if err := x.redis.FlushAll(context.Background()).Err(); err != nil {
			t.Fatal(err)
		}
		return err
	}
	l.err = broken
	if err := interrupted(); !errors.Is(err, broken) || !strings.Contains(err.Error(), "begins at the beginning") {
		t.Errorf("nothing stands: %v", err)
	}
	l.err = nil
	if _, ok := errors.AsType[*transfer.Unsaved](interrupted()); ok || l.state == nil {
		t.Error("it was not written")
	}
	l.err = broken
	if err := interrupted(); !strings.Contains(err.Error(), "--resume goes on from there") {
		t.Errorf("one stands: %v", err)
	}
}

// What a restart of Redis may have cost is in the report, and not everything is where it should be then.
func TestRestartIsReported(t *testing.T) {
	srv := testenv.Redis(t)
	x := newLab(t, srv.URL(), policy.Phase1)
	x.stores.Trouble = func(error) string { return "" }
	x.sql(t, fmt.Sprintf(insertRows, "'1'", 40))
	n := 0
	x.seen.before = func([]policy.Ref) {
		if n++; n == 20 {
			if err := srv.Restart(); err != nil {
				t.Error(err)
			}
			x.redis.FlushAll(context.Background())
		}
	}
	opt := x.options()
	opt.Workers, opt.Rate = 1, 10
	r, err := transfer.Migrate(context.Background(), x.stores, opt)
	if err != nil || r.Rows != 40 || r.Restarts != 1 || r.OK() {
		t.Errorf("%+v, %v", r, err)
	}
	x.seen.before = nil
	if r, err := transfer.Migrate(context.Background(), x.stores, x.options()); err != nil || r.Restarts != 0 || !r.OK() || r.Copied == 0 {
		t.Errorf("once more: %+v, %v", r, err)
	}
}

// The keys of others are no part of how far a walk over Redis has come.
func TestScanProgress(t *testing.T) {
	x := newLab(t, testenv.Redis(t).URL(), policy.Phase1)
	const own, others = 12_000, 48_000
	pipe := x.redis.Pipeline()
	for i := range own + others {
		name := "other:"
		if i%5 == 0 {
			name = "own:"
		}
		pipe.Set(context.Background(), name+strconv.Itoa(i), "1", 0)
	}
	if _, err := pipe.Exec(context.Background()); err != nil {
		t.Fatal(err)
	}
	var err error
	if x.router, err = policy.NewRouter([]policy.Route{{Name: "all", Match: "own:*", Phase: policy.Phase1}}); err != nil {
		t.Fatal(err)
	}
	x.route = &x.router.Routes()[0]
	for walk, run := range map[string]func(p *transfer.Progress) error{
		"keys": func(p *transfer.Progress) error {
			opt := x.options()
			opt.Reverse, opt.DryRun, opt.Rate, opt.Progress = true, true, 15_000, p
			r, err := transfer.Migrate(context.Background(), x.stores, opt)
			if r.Copied != own {
				t.Errorf("%+v", r)
			}
			return err
		},
		"keys of redis": func(p *transfer.Progress) error {
			opt := x.verifyOptions()
			opt.Progress = p
			_, err := transfer.Verify(context.Background(), x.stores, opt)
			return err
		},
	} {
		var out strings.Builder
		p := transfer.NewProgress(&out, nil)
		p.Every(0)
		if err := run(p); err != nil {
			t.Fatal(err)
		}
		lines := regexp.MustCompile(`\d+ of about (\d+) `+walk+`,`).FindAllStringSubmatch(out.String(), -1)
		if len(lines) == 0 {
			t.Errorf("nothing is told of %s:\n%s", walk, out.String())
		}
		for _, line := range lines {
			if n, _ := strconv.Atoi(line[1]); n < own*8/10 || n > own*12/10 {
				t.Errorf("%s: %s", walk, line[0])
			}
		}
	}
}
