package fallback

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"cacheproxy/policy"
)

func sweep(t *testing.T, s *Store) int {
	t.Helper()
	n, err := s.Sweep(testContext(t))
	must(t, err)
	return n
}

func TestSweepRemovesOnlyWhatIsDead(t *testing.T) {
	s := open(t)
	ref := func(route, k string) policy.Ref { return policy.Ref{Route: route, Key: k} }
	write(t, s,
		put(ref("fenced", "below"), "v"), put(ref("r", "live"), "v"), lasting(put(ref("r", "later"), "v"), policy.ExpiresIn, 3_600_000),
		lasting(put(ref("r", "expired"), "v"), policy.ExpiresAt, 1), policy.Change{Ref: ref("r", "young"), Op: policy.Delete},
		policy.Change{Ref: ref("r", "old"), Op: policy.Delete}, lasting(put(ref("r", "locked"), "v"), policy.ExpiresAt, 1),
		lasting(put(ref("fenced", "both"), "v"), policy.ExpiresAt, 1))
	sql(t, s, `UPDATE cacheproxy.entries SET updated_at = now() - interval '61 minutes' WHERE key IN ('old', 'live', 'later', 'expired', 'locked')`)
	must(t, s.Fence(testContext(t), "fenced", nothing))
	write(t, s, put(ref("fenced", "above"), "v"))

	conn, err := s.pool.Acquire(testContext(t))
	must(t, err)
	defer conn.Release()
	tx, err := conn.Begin(testContext(t))
	must(t, err)
	_, err = tx.Exec(testContext(t), `SELECT FROM cacheproxy.entries WHERE key = 'locked' FOR UPDATE`)
	must(t, err)
	left := func() string {
		return ask[string](t, s, `SELECT string_agg(key, ' ' ORDER BY key) FROM cacheproxy.entries`)
	}
	if n := sweep(t, s); n != 4 || left() != "above later live locked young" {
		t.Errorf("removed %d, left %s", n, left())
	}
	must(t, tx.Rollback(testContext(t)))
	if n := sweep(t, s); n != 1 || left() != "above later live young" {
		t.Errorf("removed %d, left %s", n, left())
	}
	must(t, s.Fence(testContext(t), "", nothing))
	if n := sweep(t, s); n != 4 || sweep(t, s) != 0 {
		t.Errorf("removed %d", n)
	}
}

// What expired is remembered as deleted for Window after its last write or its end, whichever came later, and its
// value is not.
func TestSweepBuriesWhatHasExpired(t *testing.T) {
	s := open(t)
	keys := refs("r", "bytes", "ended", "json", "neither", "written")
	for _, k := range keys {
		v := `{"a":1}` // stored both as JSON and as bytes
		if k.Key == "bytes" {
			v = "\x00"
		}
		write(t, s, lasting(put(k, v), policy.ExpiresAt, 1))
	}
	sql(t, s, `
		UPDATE cacheproxy.entries SET updated_at = now() - interval '3 hours', expires_at = now() - interval '59 minutes' WHERE key = 'ended';
		UPDATE cacheproxy.entries SET updated_at = now() - interval '59 minutes', expires_at = now() - interval '3 hours' WHERE key = 'written';
		UPDATE cacheproxy.entries SET updated_at = now() - interval '2 hours', expires_at = now() - interval '61 minutes' WHERE key = 'neither'`)
	left := func() string {
		return ask[string](t, s, `SELECT coalesce(string_agg(key, ' ' ORDER BY key), '') FROM cacheproxy.entries`)
	}
	young := ask[time.Time](t, s, `SELECT updated_at FROM cacheproxy.entries WHERE key = 'json'`)
	ended := ask[time.Time](t, s, `SELECT expires_at FROM cacheproxy.entries WHERE key = 'ended'`)
	written := ask[time.Time](t, s, `SELECT updated_at FROM cacheproxy.entries WHERE key = 'written'`)

	if n := sweep(t, s); n != 5 || left() != "bytes ended json written" {
		t.Errorf("took %d, left %s", n, left())
	}
	if n := ask[int](t, s, `SELECT count(*) FROM cacheproxy.entries
		WHERE value IS NOT NULL OR raw IS NOT NULL OR expires_at IS NOT NULL`); n != 0 {
		t.Errorf("%d rows still hold something", n)
	}
	for key, want := range map[string]time.Time{"json": young, "ended": ended, "written": written} {
		if got := ask[time.Time](t, s, `SELECT updated_at FROM cacheproxy.entries WHERE key = $1`, key); !got.Equal(want) {
			t.Errorf("%s is of %v, want %v", key, got, want)
		}
	}
	if got := states(read(t, s, keys...)); got != "TTTAT" {
		t.Error(got)
	}
	if n := sweep(t, s); n != 0 {
		t.Errorf("took %d again", n)
	}
	sql(t, s, `UPDATE cacheproxy.entries SET updated_at = updated_at - interval '2 minutes'`)
	if n := sweep(t, s); n != 2 || left() != "bytes json" {
		t.Errorf("took %d, left %s", n, left())
	}
	sql(t, s, `UPDATE cacheproxy.entries SET updated_at = updated_at - interval '1 hour'`)
	if n := sweep(t, s); n != 2 || left() != "" {
		t.Errorf("took %d, left %s", n, left())
	}
}

// A sweep and writers meet:
//  1. The sweep finds three expired rows.
//  2. Writers give the first a new value, the second one that has expired as well, and delete the third.
//  3. The sweep locks the rows: it sees what the writers left.
func TestSweepDecidesOnTheRowItHasLocked(t *testing.T) {
	s := open(t)
	keys := refs("r", "renewed", "expired", "deleted")
	for _, k := range keys {
		write(t, s, lasting(put(k, "old"), policy.ExpiresAt, 1))
	}
	sql(t, s, `UPDATE cacheproxy.entries SET updated_at = now() - interval '2 hours'`) // to be removed, as it stands
	// The generations are asked between the first step and the lock: there is the gate.
	sql(t, s, `
		ALTER TABLE cacheproxy.generations RENAME TO behind;
		CREATE FUNCTION cacheproxy.gate() RETURNS boolean VOLATILE LANGUAGE plpgsql AS $$
		BEGIN
			IF current_setting('application_name') = 'sweeper' THEN PERFORM pg_advisory_xact_lock_shared(42); END IF;
			RETURN true;
		END $$;
		CREATE VIEW cacheproxy.generations AS SELECT * FROM cacheproxy.behind WHERE cacheproxy.gate();
		INSERT INTO cacheproxy.behind VALUES ('', 0)`)
	sweeper := twin(t, s, func(c *Config) { c.URL = withParam(t, c.URL, "application_name", "sweeper") })
	gate, err := s.pool.Acquire(testContext(t))
	must(t, err)
	defer gate.Release()
	_, err = gate.Exec(testContext(t), `SELECT pg_advisory_lock(42)`)
	must(t, err)
	done := make(chan error)
	go func() {
		n, err := sweeper.Sweep(testContext(t))
		if err == nil && n != 1 {
			err = fmt.Errorf("took %d", n)
		}
		done <- err
	}()
	blocked(t, s, 1)
	write(t, s, put(keys[0], "new"), lasting(put(keys[1], "new"), policy.ExpiresAt, 2), policy.Change{Ref: keys[2], Op: policy.Delete})
	_, err = gate.Exec(testContext(t), `SELECT pg_advisory_unlock(42)`)
	must(t, err)
	must(t, <-done)
	if rows := read(t, s, keys...); states(rows) != "LTT" || string(rows[0].Value) != "new" {
		t.Errorf("%+v", rows)
	}
	if n := ask[int](t, s, `SELECT count(*) FROM cacheproxy.entries
		WHERE key = 'expired' AND raw IS NULL AND expires_at IS NULL AND updated_at > now() - interval '1 hour'`); n != 1 {
		t.Error("the second row is not the tombstone of what was written last")
	}
}

// The statement walks the indexes and never the table, which may be large while nothing in it is dead.
func TestSweepReadsNoTableFromEndToEnd(t *testing.T) {
	s := open(t)
	sql(t, s, `INSERT INTO cacheproxy.entries (key, value, route, generation, expires_at, updated_at)
		SELECT i::text, '1', 'r' || i % 3, 0, now() + interval '1 hour', now() FROM generate_series(1, 20000) i;
		ANALYZE cacheproxy.entries`)
	rows, err := s.pool.Query(testContext(t), "EXPLAIN "+sweepSQL, sweepBatch, 3_600_000)
	must(t, err)
	defer rows.Close()
	for rows.Next() {
		var line string
		must(t, rows.Scan(&line))
		if strings.Contains(line, "Seq Scan on entries") {
			t.Error(line)
		}
	}
	must(t, rows.Err())
}

func TestRunSweepsUntilItIsTold(t *testing.T) {
	s := open(t)
	core, logs := observer.New(zap.InfoLevel)
	s.cfg.Log = zap.New(core)
	s.sweepEvery = 5 * time.Millisecond
	// One in ten has just ended and becomes a tombstone, the others are too old for one.
	sql(t, s, fmt.Sprintf(`INSERT INTO cacheproxy.entries (key, value, route, generation, expires_at, updated_at)
		SELECT i::text, '1', 'r', 0, now() - CASE WHEN i %% 10 = 0 THEN interval '0' ELSE interval '2 hours' END, now() - interval '2 hours'
		FROM generate_series(1, %d) i`, 2*sweepBatch+10))
	ctx, stop := context.WithCancel(testContext(t))
	done := make(chan error)
	go func() { done <- s.Run(ctx) }()
	eventually(t, func() bool { return ask[int](t, s, `SELECT count(*) FROM cacheproxy.entries`) == (2*sweepBatch+10)/10 })
	sql(t, s, `ALTER TABLE cacheproxy.entries RENAME raw TO elsewhere`)
	eventually(t, func() bool { return logs.FilterMessageSnippet("fails").Len() == 1 })
	sql(t, s, `ALTER TABLE cacheproxy.entries RENAME elsewhere TO raw`)
	eventually(t, func() bool { return logs.FilterMessageSnippet("works again").Len() == 1 })
	// A table that has gone, as finalize leaves it, is no failure; nor does it end the sweeping.
	sql(t, s, `ALTER TABLE cacheproxy.entries RENAME TO elsewhere`)
	_, err := s.Sweep(testContext(t))
	if !undefinedTable(err) {
		t.Errorf("without a table: %v", err)
	}
	sql(t, s, `ALTER TABLE cacheproxy.elsewhere RENAME TO entries`)
	sql(t, s, `UPDATE cacheproxy.entries SET updated_at = now() - interval '2 hours'`)
	eventually(t, func() bool { return ask[int](t, s, `SELECT count(*) FROM cacheproxy.entries`) == 0 })
	stop()
	must(t, <-done)
	if logs.Len() != 2 {
		t.Errorf("%v", logs.All())
	}
}
