package transfer_test

import (
	"context"
	"fmt"
	"runtime/debug"
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
