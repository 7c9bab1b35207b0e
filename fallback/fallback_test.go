package fallback

import (
	"context"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"cacheproxy/internal/testenv"
	"cacheproxy/policy"
)

func TestMain(m *testing.M) { testenv.Main(m) }

// patience bounds what a test waits for; it is never reached where the code is right.
const patience = 30 * time.Second

// slow is a QueryTimeout that a loaded machine keeps.
const slow = 20 * time.Second

func testContext(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	t.Cleanup(cancel)
	return ctx
}

// openURL opens a store without a schema.
func openURL(t testing.TB, cfg Config) *Store {
	t.Helper()
	if cfg.QueryTimeout == 0 {
		cfg.QueryTimeout = slow
	}
	if !strings.Contains(cfg.URL, "idle_in_transaction_session_timeout") {
		// Ours is for a store that works in milliseconds; a loaded machine with the race detector may need longer than that for the
		// values of one commit.
		cfg.URL = withParam(t, cfg.URL, "idle_in_transaction_session_timeout", milliseconds(slow))
	}
	s, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s
}

// open opens a store with its schema on an empty database.
func open(t testing.TB) *Store {
	t.Helper()
	s := openURL(t, Config{URL: testenv.Postgres(t)})
	must(t, s.EnsureSchema(testContext(t)))
	return s
}

// twin opens a second store on the database of s, as another sidecar does.
func twin(t testing.TB, s *Store, change func(*Config)) *Store {
	t.Helper()
	cfg := s.cfg
	if change != nil {
		change(&cfg)
	}
	return openURL(t, cfg)
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// withParam returns rawURL with one parameter more.
func withParam(t testing.TB, rawURL, name, value string) string {
	t.Helper()
	u, err := url.Parse(rawURL)
	must(t, err)
	q := u.Query()
	q.Set(name, value)
	u.RawQuery = q.Encode()
	return u.String()
}

// sql runs statements as the owner of the database.
func sql(t testing.TB, s *Store, statements string) {
	t.Helper()
	conn, err := s.pool.Acquire(testContext(t))
	must(t, err)
	defer conn.Release()
	_, err = conn.Conn().PgConn().Exec(testContext(t), statements).ReadAll()
	must(t, err)
}

// ask returns the single value that a query answers.
func ask[T any](t testing.TB, s *Store, query string, args ...any) T {
	t.Helper()
	var v T
	must(t, s.pool.QueryRow(testContext(t), query, args...).Scan(&v))
	return v
}

func refs(route string, keys ...string) []policy.Ref {
	out := make([]policy.Ref, len(keys))
	for i, k := range keys {
		out[i] = policy.Ref{Route: route, Key: k}
	}
	return out
}

func put(ref policy.Ref, value string) policy.Change {
	return policy.Change{Ref: ref, Op: policy.Put, Value: []byte(value)}
}

func lasting(c policy.Change, kind policy.ExpiryKind, ms int64) policy.Change {
	c.Expiry = policy.Expiry{Kind: kind, MS: ms}
	return c
}

func begin(t testing.TB, s *Store, keys []policy.Ref) *Tx {
	t.Helper()
	tx, err := s.Begin(testContext(t), keys)
	must(t, err)
	t.Cleanup(tx.Rollback)
	return tx
}

func refsOf(changes []policy.Change) []policy.Ref {
	var keys []policy.Ref
	seen := map[string]bool{}
	for _, c := range changes {
		if !seen[c.Ref.Key] {
			seen[c.Ref.Key] = true
			keys = append(keys, c.Ref)
		}
	}
	return keys
}

// write commits changes in a transaction of their own.
func write(t testing.TB, s *Store, changes ...policy.Change) {
	t.Helper()
	tx := begin(t, s, refsOf(changes))
	_, err := tx.Commit(testContext(t), changes, CommitOptions{})
	must(t, err)
}

func read(t testing.TB, s *Store, keys ...policy.Ref) []policy.Row {
	t.Helper()
	rows, err := s.Load(testContext(t), keys)
	must(t, err)
	if len(rows) != len(keys) {
		t.Fatalf("%d rows for %d keys", len(rows), len(keys))
	}
	return rows
}

// states is a row of letters: A absent, T tombstone, L live.
func states(rows []policy.Row) string {
	var b strings.Builder
	for _, r := range rows {
		b.WriteByte("ATL"[r.State])
	}
	return b.String()
}

// blocked waits until n sessions of the database wait for an advisory lock.
func blocked(t testing.TB, s *Store, n int) {
	t.Helper()
	eventually(t, func() bool {
		return ask[int](t, s, `SELECT count(*) FROM pg_locks l JOIN pg_database d ON d.oid = l.database
			WHERE d.datname = current_database() AND l.locktype = 'advisory' AND NOT l.granted`) >= n
	})
}

func eventually(t testing.TB, is func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !is(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("it never came to be")
		}
	}
}

// counter is a tracer that counts what goes to the server.
type counter struct{ batches, statements, queries int }

func (c *counter) TraceQueryStart(ctx context.Context, _ *pgx.Conn, _ pgx.TraceQueryStartData) context.Context {
	c.queries++
	return ctx
}
func (c *counter) TraceQueryEnd(context.Context, *pgx.Conn, pgx.TraceQueryEndData) {}
func (c *counter) TraceBatchStart(ctx context.Context, _ *pgx.Conn, d pgx.TraceBatchStartData) context.Context {
	c.batches++
	c.statements += d.Batch.Len()
	return ctx
}
func (c *counter) TraceBatchQuery(context.Context, *pgx.Conn, pgx.TraceBatchQueryData) {}
func (c *counter) TraceBatchEnd(context.Context, *pgx.Conn, pgx.TraceBatchEndData)     {}
