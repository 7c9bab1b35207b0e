package proxy_test

import (
	"context"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"cacheproxy/internal/testenv"
	"cacheproxy/policy"
	"cacheproxy/proxy"
)

// ends tells when a key ends in each store: there is but one clock on this machine.
func (w *world) ends(key string) (redis, store int64) {
	w.t.Helper()
	return number(w.raw.do("PEXPIRETIME", key)),
		number(":" + w.sql("SELECT coalesce((extract(epoch FROM expires_at) * 1000)::bigint, -1)::text FROM cacheproxy.entries WHERE key = $1", key))
}

// Both copies end together however long a value takes on its way: when it is written, promoted, computed by Redis, adopted from it, and
// repaired after an outage.
func TestLargeValuesEndTogether(t *testing.T) {
	pg := testenv.PostgresServer(t)
	w := newWorldWith(t, testenv.Redis(t), pg.URL("postgres"))
	s := w.start(sidecarOptions{routes: []policy.Route{route(policy.Phase1)}, storeTimeout: 20 * time.Second})
	c := s.dial(t)
	large := `{"k": "` + strings.Repeat("x", 1<<20) + `"}`
	same := func(what, key string) {
		t.Helper()
		redis, store := w.ends(key)
		if d := redis - store; d < -10 || d > 10 || redis < 0 {
			t.Errorf("%s: it ends %d ms later in Redis", what, d)
		}
	}
	promoted := func(what, key string) {
		t.Helper()
		w.raw.want(":1", "DEL", key)
		c.do("STRLEN", key)
		same(what+", promoted", key)
	}
	for i := range 5 {
		key := fmt.Sprint("k", i)
		c.want("+OK", "SET", key, large, "PX", "60000")
		same("SET", key)
		promoted("SET", key)
		c.want(fmt.Sprint(":", len(large)+1), "APPEND", key, " ")
		same("APPEND", key)
		c.want(fmt.Sprint(":", len(large)+1), "SETRANGE", key, "3", "y")
		same("SETRANGE", key)
		promoted("SETRANGE", key)
		c.want(":1", "PEXPIRE", key, "50000")
		same("PEXPIRE", key)
		w.raw.want("+OK", "SET", key+"a", large, "PX", "60000") // Redis alone has it, as from before the proxy
		c.want(fmt.Sprint(":", len(large)+1), "APPEND", key+"a", " ")
		same("adopted", key+"a")
	}
	kill(t, pg)
	w.until("a write is accepted", func() bool { return c.do("SET", "k0", large, "PX", "60000") == "+OK" })
	c.want("+OK", "SET", "k1", large, "PX", "60000")
	if err := pg.Restart(); err != nil {
		t.Fatal(err)
	}
	w.journalEmpty()
	same("repaired", "k0")
	same("repaired", "k1")
}

// shiftedStore is a Postgres whose clock is ahead of Redis's.
type shiftedStore struct {
	proxy.Store
	ahead atomic.Int64 // ms
}

func (s *shiftedStore) rows(rows []policy.Row) []policy.Row {
	for i := range rows {
		if rows[i].ExpiresAt >= 0 {
			rows[i].ExpiresAt += s.ahead.Load()
		}
	}
	return rows
}

func (s *shiftedStore) Load(ctx context.Context, refs []policy.Ref) ([]policy.Row, error) {
	rows, err := s.Store.Load(ctx, refs)
	return s.rows(rows), err
}

func (s *shiftedStore) Poll(ctx context.Context, after int64) (proxy.StorePoll, error) {
	p, err := s.Store.Poll(ctx, after)
	p.Now = p.Now.Add(time.Duration(s.ahead.Load()) * time.Millisecond)
	return p, err
}

func (s *shiftedStore) Begin(ctx context.Context, refs []policy.Ref) (proxy.Tx, error) {
	tx, err := s.Store.Begin(ctx, refs)
	if err != nil {
		return nil, err
	}
	return shiftedTx{tx, s, s.rows(tx.Rows())}, nil
}

func (s *shiftedStore) Lock(ctx context.Context, refs []policy.Ref) (proxy.Tx, error) {
	tx, err := s.Store.Lock(ctx, refs)
	if err != nil {
		return nil, err
	}
	return shiftedTx{tx, s, s.rows(tx.Rows())}, nil
}

type shiftedTx struct {
	proxy.Tx
	s    *shiftedStore
	rows []policy.Row
}

func (t shiftedTx) Rows() []policy.Row { return t.rows }

func (t shiftedTx) Commit(ctx context.Context, changes []policy.Change, journal []policy.Ref, known []int64, rawOnly bool) (int64, error) {
	for i := range changes {
		if changes[i].Expiry.Kind == policy.ExpiresAt {
			changes[i].Expiry.MS -= t.s.ahead.Load()
		}
	}
	return t.Tx.Commit(ctx, changes, journal, known, rawOnly)
}

// The clocks of the stores' hosts need not agree, and one that is set while the proxy runs is followed from the next poll on.
func TestClocksThatDiffer(t *testing.T) {
	w := newWorld(t)
	shifted := &shiftedStore{}
	shifted.ahead.Store(3_600_000)
	s := w.start(sidecarOptions{routes: []policy.Route{route(policy.Phase1)}, store: func(s proxy.Store) proxy.Store { shifted.Store = s; return shifted }})
	c := s.dial(t)
	same := func(what, key string) {
		t.Helper()
		redis, store := w.ends(key)
		if d := redis - store; d < -10 || d > 10 || redis < 0 {
			t.Errorf("%s: it ends %d ms later in Redis", what, d)
		}
	}
	check := func(key string) {
		t.Helper()
		at := fmt.Sprint(time.Now().UnixMilli() + 90_000) // the clock that clients see is Redis's
		for _, cmd := range []string{"SET %s v PX 60000", "PEXPIREAT %s " + at, "SET %s w KEEPTTL", "APPEND %s x", "SETRANGE %s 0 y"} {
			if got := c.do(strings.Fields(fmt.Sprintf(cmd, key))...); got[0] == '-' {
				t.Fatalf("%s: %s", cmd, got)
			}
			same(cmd, key)
			w.raw.want(":1", "DEL", key)
			if ms := number(c.do("PTTL", key)); ms < 50_000 || ms > 90_000 {
				t.Errorf("%s: %d ms are left", cmd, ms)
			}
			same(cmd+", promoted", key)
		}
		w.raw.want(":1", "DEL", key)
		// The row ends on Postgres's clock, which is known as well as the last poll could tell.
		if got, want := number(c.do("PEXPIRETIME", key)), number(":"+at); got < want-10 || got > want+10 {
			t.Errorf("PEXPIRETIME %s: %d, want %d", key, got, want)
		}
	}
	check("k")
	shifted.ahead.Store(-30_000)
	w.until("the clock is looked at", func() bool {
		c.want("+OK", "SET", "k1", "v", "PX", "60000")
		redis, store := w.ends("k1")
		return redis-store >= -10 && redis-store <= 10
	})
	check("k2")
}
