package fallback

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"cacheproxy/policy"

	"github.com/jackc/pgx/v5"
)

// walk pages through a route.
func walk(t testing.TB, s *Store, r policy.PageRequest) (rows []policy.PageRow, pages int) {
	t.Helper()
	for {
		page, err := s.Page(testContext(t), r)
		must(t, err)
		pages++
		if rows = append(rows, page.Rows...); page.Next == "" {
			return rows, pages
		}
		r.After = page.Next
	}
}

func keysOf(rows []policy.PageRow) (keys []string) {
	for _, r := range rows {
		keys = append(keys, r.Key)
	}
	return keys
}

func (s *Store) exec(t testing.TB, sql string, args ...any) {
	t.Helper()
	_, err := s.pool.Exec(testContext(t), sql, args...)
	must(t, err)
}

func TestPage(t *testing.T) {
	s := open(t)
	s.exec(t, `INSERT INTO cacheproxy.entries (key, value, raw, route, generation, expires_at, updated_at) VALUES
		('', '1', NULL, 'all', 0, NULL, now()),
		('user', '"short"', NULL, 'user', 0, NULL, now()),
		('user:1', '{"a": 1}', NULL, 'user', 0, NULL, now()),
		('user:2', NULL, NULL, 'user', 0, NULL, now()),
		('user:3', '3', NULL, 'user', 0, now() - interval '1 s', now()),
		('user:4', NULL, 'raw', 'was called otherwise', 0, now() + interval '1 h', now()),
		('user:5', '5', NULL, 'fenced', 0, NULL, now()),
		('user:'||chr(1114111), '6', NULL, 'user', 0, NULL, now()),
		('user;', '7', NULL, 'user', 0, NULL, now()),
		('zebra', '8', NULL, 'all', 0, NULL, now())`)
	s.exec(t, `INSERT INTO cacheproxy.generations VALUES ('fenced', 7)`)

	for limit := 1; limit <= 11; limit++ {
		rows, pages := walk(t, s, policy.PageRequest{Route: "all", Limit: limit})
		if want := []string{"", "user", "user:1", "user:2", "user:3", "user:4", "user:5", "user:\U0010FFFF", "user;", "zebra"}; !slices.Equal(keysOf(rows), want) {
			t.Errorf("limit %d: %q", limit, keysOf(rows))
		}
		if want := 10/limit + 1; pages != want {
			t.Errorf("limit %d: %d pages, want %d", limit, pages, want)
		}
		rows, _ = walk(t, s, policy.PageRequest{Route: "user", Prefix: "user:", Limit: limit})
		if want := []string{"user:1", "user:2", "user:3", "user:4", "user:5", "user:\U0010FFFF"}; !slices.Equal(keysOf(rows), want) {
			t.Errorf("limit %d with a prefix: %q", limit, keysOf(rows))
		}
	}
	rows, _ := walk(t, s, policy.PageRequest{Route: "user", Prefix: "user:"})
	want := []policy.PageRow{
		{Key: "user:1", State: policy.Live}, {Key: "user:2", State: policy.Tombstone}, {Key: "user:3", State: policy.Tombstone, Expired: true},
		{Key: "user:4", State: policy.Live, Size: 3}, {Key: "user:5", State: policy.Absent}, {Key: "user:\U0010FFFF", State: policy.Live},
	}
	for i, w := range want {
		got := rows[i]
		if w.Size == 0 {
			got.Size = 0
		}
		if got != w {
			t.Errorf("%+v, want %+v", got, w)
		}
	}
	n, err := s.Estimate(testContext(t), policy.PageRequest{Prefix: "user:"})
	if must(t, err); n != 6 {
		t.Errorf("estimated %d rows", n)
	}
}

func TestBehind(t *testing.T) {
	for prefix, want := range map[string]string{
		"": "", "a": "b", "az": "a{", "\u007f": "\u0080", "\uD7FF": "\uE000", "\U0010FFFF": "", "a\U0010FFFF": "b", "a\U0010FFFF\U0010FFFF": "b",
	} {
		if got := behind(prefix); got != want {
			t.Errorf("behind %q stands %q, want %q", prefix, got, want)
		}
	}
}

// A page is read through the primary key from where it begins to where it ends, also in a table that nobody has analysed: tombstones and rows of others do not
// make it longer.
func TestPageReadsItsRangeOnly(t *testing.T) {
	s := open(t)
	s.exec(t, `INSERT INTO cacheproxy.entries (key, value, route, generation, updated_at)
		SELECT p || to_char(i, 'FM000000'), CASE WHEN i % 2 = 0 THEN '1'::jsonb END, 'all', 0, now() FROM generate_series(1, 30000) i, unnest(array['a:', 'b:', 'c:']) p`)
	for _, analysed := range []bool{false, true} {
		if analysed {
			s.exec(t, `ANALYZE cacheproxy.entries`)
		}
		for _, c := range []struct {
			sql  string
			args []any
		}{
			{pageSQL + pageEndSQL, []any{"all", "b:", 100, "b;"}},
			{pageSQL + pageEndSQL, []any{"all", "b:029950", 100, "b;"}},
			{pageSQL + pageOpenSQL, []any{"all", "", 100}},
		} {
			rows, err := s.pool.Query(testContext(t), "EXPLAIN (ANALYZE, BUFFERS, TIMING OFF) "+c.sql, append([]any{pgx.QueryExecModeSimpleProtocol}, c.args...)...)
			must(t, err)
			lines, err := pgx.CollectRows(rows, pgx.RowTo[string])
			must(t, err)
			plan := strings.Join(lines, "\n")
			if !strings.Contains(plan, "using entries_pkey") || strings.Contains(plan, "Rows Removed by Filter") {
				t.Errorf("analysed: %t\n%s", analysed, plan)
			}
		}
	}
	n, err := s.Estimate(testContext(t), policy.PageRequest{Prefix: "b:"})
	if must(t, err); n < 15_000 || n > 60_000 {
		t.Errorf("estimated %d rows of 30000", n)
	}
}

func TestLook(t *testing.T) {
	s := open(t)
	s.exec(t, `INSERT INTO cacheproxy.entries (key, value, route, generation, updated_at) VALUES ('k', '1', 'all', 0, now()), ('gone', NULL, 'all', 0, now())`)
	rows, err := s.Look(testContext(t), []policy.Ref{{Route: "all", Key: "none"}, {Route: "all", Key: "k"}, {Route: "all", Key: "gone"}})
	must(t, err)
	for i, want := range []policy.State{policy.Absent, policy.Live, policy.Tombstone} {
		if rows[i].State != want || len(rows[i].Value) > 0 {
			t.Errorf("%d: %+v", i, rows[i])
		}
	}
}

func TestTransfer(t *testing.T) {
	s := open(t)
	other := twin(t, s, func(*Config) {})
	ctx := testContext(t)
	one, err := s.OpenTransfer(ctx, "all", "forward")
	must(t, err)
	if _, err := other.OpenTransfer(ctx, "all", "forward"); !errors.Is(err, ErrTransferring) {
		t.Errorf("a second one: %v", err)
	}
	for _, free := range [][2]string{{"all", "reverse"}, {"user", "forward"}} {
		also, err := other.OpenTransfer(ctx, free[0], free[1])
		must(t, err)
		also.Close()
	}
	read := func(tr *Transfer) string {
		t.Helper()
		state, at, found, err := tr.Read(ctx)
		must(t, err)
		if found && time.Since(at).Abs() > time.Hour {
			t.Errorf("written at %s", at)
		}
		if found != (state != nil) {
			t.Errorf("found: %t, state: %q", found, state)
		}
		return string(state)
	}
	if got := read(one); got != "" {
		t.Errorf("before anything was written: %s", got)
	}
	must(t, one.Write(ctx, []byte(`{"n":1}`)))
	must(t, one.Write(ctx, []byte(`{"n":2}`)))
	if got := read(one); got != `{"n": 2}` {
		t.Errorf("read %s", got)
	}
	// The server ends the session: the right is gone with it, and is taken again.
	s.exec(t, `SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND classid = $1`, int64(TransferLockClass))
	for end := time.Now().Add(patience); one.Write(ctx, []byte(`{"n":3}`)) != nil; {
		if time.Now().After(end) {
			t.Fatal("the lock is not taken again")
		}
	}
	if _, err := other.OpenTransfer(ctx, "all", "forward"); !errors.Is(err, ErrTransferring) {
		t.Errorf("after the session was lost: %v", err)
	}
	one.Close()
	two, err := other.OpenTransfer(ctx, "all", "forward")
	for errors.Is(err, ErrTransferring) && ctx.Err() == nil { // the server notices a moment later
		two, err = other.OpenTransfer(ctx, "all", "forward")
	}
	must(t, err)
	defer two.Close()
	if got := read(two); got != `{"n": 3}` {
		t.Errorf("another process reads %s", got)
	}
	must(t, two.Write(ctx, nil))
	if got := read(two); got != "" {
		t.Errorf("after it was removed: %s", got)
	}
	// And somebody else may have it by the time it is wanted back.
	s.exec(t, `SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND classid = $1`, int64(TransferLockClass))
	three, err := s.OpenTransfer(ctx, "all", "forward")
	for errors.Is(err, ErrTransferring) && ctx.Err() == nil {
		three, err = s.OpenTransfer(ctx, "all", "forward")
	}
	must(t, err)
	defer three.Close()
	err = two.Write(ctx, nil)
	if err == nil || errors.Is(err, ErrTransferring) {
		t.Errorf("on a connection that is gone: %v", err)
	}
	if err := two.Write(context.WithoutCancel(ctx), nil); !errors.Is(err, ErrTransferring) {
		t.Errorf("when somebody else has it: %v", err)
	}
}

// Rows that are looked for in Redis are found among any number of others: older ones of another route, and empty ones that come first. If they are not, it is said.
func TestStandingFindsRows(t *testing.T) {
	s := open(t)
	s.exec(t, `INSERT INTO cacheproxy.entries (key, value, route, generation, updated_at) SELECT 'b' || i, '1', 'b', 0, now() - interval '1 h' FROM generate_series(1, 20000) i`)
	s.exec(t, `INSERT INTO cacheproxy.entries (key, value, route, generation, updated_at) SELECT 'a' || i, '1', 'a', 0, now() FROM generate_series(1, 1000) i`)
	for n, want := range map[int]int{500: 500, 5000: 1000} {
		if got, err := s.Standing(testContext(t), "a", n); err != nil || len(got.Keys) != want || got.Partial || got.Keys[0][0] != 'a' {
			t.Errorf("%d keys of the route asked for: %d, partial %v, %v", n, len(got.Keys), got.Partial, err)
		}
	}
	s.exec(t, `INSERT INTO cacheproxy.entries (key, route, generation, updated_at) SELECT 'c' || i, 'a', 0, now() FROM generate_series(1, 40000) i`)
	if got, err := s.Standing(testContext(t), "a", 5000); err != nil || !got.Partial {
		t.Errorf("%d keys, partial %v, %v", len(got.Keys), got.Partial, err)
	}

	c := openColumns(t, reportsDDL+`; INSERT INTO reports (id, analytics_cache) SELECT i, CASE WHEN i > 20000 THEN '0'::jsonb END FROM generate_series(1, 30000) i; ANALYZE reports`, reports(t))
	got, err := c.Standing(testContext(t), "legacy", 500)
	if err != nil || len(got.Keys) != 500 || got.Partial {
		t.Errorf("of a column: %d keys, partial %v, %v", len(got.Keys), got.Partial, err)
	}
	c.exec(t, `UPDATE reports SET analytics_cache = NULL WHERE id < 29990`)
	if got, err := c.Standing(testContext(t), "legacy", 500); err != nil || len(got.Keys) > 11 || !got.Partial {
		t.Errorf("of an empty column: %d keys, partial %v, %v", len(got.Keys), got.Partial, err)
	}
	c.exec(t, `DELETE FROM reports WHERE id < 29000`)
	if got, err := c.Standing(testContext(t), "legacy", 500); err != nil || len(got.Keys) != 11 || got.Partial {
		t.Errorf("of a small column: %d keys, partial %v, %v", len(got.Keys), got.Partial, err)
	}
}
