package fallback

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"cacheproxy/policy"

	"github.com/jackc/pgx/v5"
)

func template(t testing.TB, match string) *policy.Template {
	t.Helper()
	tpl, err := policy.ParseTemplate(match)
	must(t, err)
	return tpl
}

const reportsDDL = `
CREATE TABLE public.reports (id bigint PRIMARY KEY, title text NOT NULL DEFAULT '', analytics_cache jsonb, until timestamptz, changed timestamptz)`

// reports is the column of most tests.
func reports(t testing.TB) Column {
	return Column{Route: "legacy", Table: "public.reports", Keys: []string{"id"}, Value: "analytics_cache", Template: template(t, "report:{id}")}
}

// openColumns opens a store with columns of tables that ddl creates.
func openColumns(t testing.TB, ddl string, list ...Column) *Store {
	t.Helper()
	s := open(t)
	sql(t, s, ddl)
	must(t, s.SetColumns(list))
	must(t, s.UseColumns(testContext(t)))
	return s
}

func legacy(keys ...string) []policy.Ref { return refs("legacy", keys...) }

func one(key string) policy.Ref { return policy.Ref{Route: "legacy", Key: key} }

func del(key string) policy.Change  { return policy.Change{Ref: one(key), Op: policy.Delete} }
func drop(key string) policy.Change { return policy.Change{Ref: one(key), Op: policy.Drop} }

// stands is states with N for a key that has no row.
func stands(rows []policy.Row) string {
	var b strings.Builder
	for _, r := range rows {
		b.WriteByte("ATLN"[r.State])
	}
	return b.String()
}

func values(rows []policy.Row) []string {
	out := make([]string, len(rows))
	for i, r := range rows {
		out[i] = string(r.Value)
	}
	return out
}

func expectStands(t testing.TB, s *Store, want string, keys ...string) {
	t.Helper()
	if got := stands(read(t, s, legacy(keys...)...)); got != want {
		t.Errorf("%q stand as %s, want %s", keys, got, want)
	}
}

func TestColumn(t *testing.T) {
	t.Parallel()
	s := openColumns(t, reportsDDL+`;
		INSERT INTO reports (id, analytics_cache) VALUES (1, '{"b": 1, "a": [1.50, null]}'), (2, NULL), (3, 'null'), (-4, '"x"')`, reports(t))
	rows := read(t, s, legacy("report:1", "report:2", "report:3", "report:-4", "report:5", "report:1")...)
	if got := stands(rows); got != "LALLNL" {
		t.Fatalf("got %s", got)
	}
	for i, want := range map[int]string{0: `{"a": [1.50, null], "b": 1}`, 2: "null", 3: `"x"`, 5: `{"a": [1.50, null], "b": 1}`} {
		if string(rows[i].Value) != want || rows[i].TTL != -1 || rows[i].ExpiresAt != -1 {
			t.Errorf("row %d: %s %d %d, want %s", i, rows[i].Value, rows[i].TTL, rows[i].ExpiresAt, want)
		}
	}
	if &rows[0].Value[0] == &rows[5].Value[0] {
		t.Error("two answers share their bytes")
	}

	write(t, s, put(one("report:1"), ` {"n": 1e2} `), put(one("report:2"), "[]"), del("report:3"), put(one("report:5"), "5"), put(one("report:x"), "6"))
	expectStands(t, s, "LLTN", "report:1", "report:2", "report:3", "report:5")
	if got := ask[string](t, s, `SELECT string_agg(id || '=' || coalesce(analytics_cache::text, '-'), ' ' ORDER BY id) FROM reports`); got != `-4="x" 1={"n": 100} 2=[] 3=-` {
		t.Errorf("the table holds %s", got)
	}
	if n := ask[int](t, s, `SELECT count(*) FROM cacheproxy.entries`); n != 0 {
		t.Errorf("the proxy's own table has %d rows", n)
	}
	if n := ask[int](t, s, `SELECT count(*) FROM cacheproxy.meta WHERE key IN ('report:5', 'report:x')`); n != 0 {
		t.Errorf("keys without a row have %d rows of meta", n)
	}
	// Both kinds of route in one group.
	own := policy.Ref{Route: "own", Key: "k"}
	write(t, s, put(own, "bytes"), put(one("report:1"), "1"))
	if rows := read(t, s, one("report:1"), own, one("report:9")); stands(rows) != "LLN" || string(rows[0].Value) != "1" || string(rows[1].Value) != "bytes" {
		t.Errorf("got %s %q", stands(rows), values(rows))
	}
	// Values that are not wanted are not read.
	tx, err := s.Lock(testContext(t), legacy("report:1", "report:2"))
	must(t, err)
	if rows := tx.Rows(); stands(rows) != "LL" || len(rows[0].Value) != 0 {
		t.Errorf("%q", values(rows))
	}
	tx.Rollback()
}

// TestColumnDropped: what phase2 has taken out of a column is no delete.
func TestColumnDropped(t *testing.T) {
	t.Parallel()
	s := openColumns(t, reportsDDL+`; INSERT INTO reports (id, analytics_cache) VALUES (1, '1'), (2, NULL), (3, '3')`, reports(t))
	write(t, s, drop("report:1"), drop("report:2"), drop("report:9"))
	expectStands(t, s, "AALN", "report:1", "report:2", "report:3", "report:9")
	if got := ask[bool](t, s, `SELECT analytics_cache IS NULL FROM reports WHERE id = 1`); !got {
		t.Error("the column is not emptied")
	}
	// Once it is empty, further writes of phase2 do not touch the row.
	before := ask[string](t, s, `SELECT xmin::text || ctid::text FROM reports WHERE id = 1`)
	meta := ask[string](t, s, `SELECT xmin::text || ctid::text FROM cacheproxy.meta WHERE key = 'report:1'`)
	write(t, s, drop("report:1"))
	if after := ask[string](t, s, `SELECT xmin::text || ctid::text FROM reports WHERE id = 1`); after != before {
		t.Error("an empty column is written again")
	}
	if after := ask[string](t, s, `SELECT xmin::text || ctid::text FROM cacheproxy.meta WHERE key = 'report:1'`); after != meta {
		t.Error("its meta is written again")
	}
	write(t, s, del("report:1"))
	expectStands(t, s, "T", "report:1")
	write(t, s, drop("report:1"))
	expectStands(t, s, "A", "report:1")
	write(t, s, put(one("report:1"), "7"))
	expectStands(t, s, "L", "report:1")
	write(t, s, del("report:1"))
	expectStands(t, s, "T", "report:1")
}

// TestColumnEmpty: NULL is a tombstone where something is known of the key; else it says nothing.
func TestColumnEmpty(t *testing.T) {
	t.Parallel()
	s := openColumns(t, reportsDDL+`; INSERT INTO reports (id, analytics_cache) VALUES (1, NULL), (2, NULL), (3, NULL), (4, '4'), (5, '5'), (6, '6'), (7, NULL), (8, '8')`, reports(t))
	record(t, s, reports(t))
	bare := func(want string, keys ...string) {
		t.Helper()
		got := ""
		for _, row := range read(t, s, legacy(keys...)...) {
			mark := ""
			if row.Bare {
				mark = "b"
			}
			got += stands([]policy.Row{row}) + mark
		}
		if got != want {
			t.Errorf("%q stand as %s, want %s", keys, got, want)
		}
	}
	bare("AbAbLN", "report:1", "report:2", "report:4", "report:9")
	// The proxy deletes one, also where there was nothing, and drops another.
	write(t, s, del("report:1"), drop("report:2"))
	bare("TA", "report:1", "report:2")
	// What others empty is deleted, if a trigger tells of it, or if the proxy has written the value.
	sql(t, s, `UPDATE reports SET analytics_cache = NULL WHERE id = 4`)
	write(t, s, put(one("report:5"), "55"))
	sql(t, s, `SET cacheproxy.own = 'on'; UPDATE reports SET analytics_cache = NULL WHERE id IN (5, 8); RESET cacheproxy.own`)
	bare("TTAb", "report:4", "report:5", "report:8")
	expectRecorded(t, s, "an UPDATE", "report:4")
	bare("T", "report:4") // struck, and still a tombstone
	// An entry of the journal names keys that nothing is known of; it is struck, which notes the time.
	keys := legacy("report:3", "report:6", "report:9")
	tx := begin(t, s, keys)
	id, err := tx.Commit(testContext(t), nil, CommitOptions{Journal: keys})
	must(t, err)
	tx = begin(t, s, keys)
	struck, err := tx.Strike(testContext(t), []int64{id})
	must(t, err)
	if len(struck) != 1 {
		t.Errorf("struck %v", struck)
	}
	_, err = tx.Commit(testContext(t), nil, CommitOptions{})
	must(t, err)
	bare("ALN", "report:3", "report:6", "report:9")
	sql(t, s, `INSERT INTO reports (id) VALUES (9)`)
	bare("A", "report:9")
	// Pages say the same.
	page, err := s.columnPage(testContext(t), s.columns.Load().list[0], policy.PageRequest{Route: "legacy"})
	must(t, err)
	got := ""
	for _, row := range page.Rows {
		got += stands([]policy.Row{{State: row.State}})
	}
	if got != "TAATTLAAA" {
		t.Errorf("the page says %s", got)
	}
	// Below a fence nothing is said either.
	must(t, s.Fence(testContext(t), "legacy", nothing))
	expectStands(t, s, "AAAAAA", "report:1", "report:2", "report:4", "report:6", "report:7", "report:9")
}

// TestColumnKeyIsOneRow: no two keys name one row.
func TestColumnKeyIsOneRow(t *testing.T) {
	t.Parallel()
	const id = "0a1b2c3d-0000-4000-8000-00000000000f"
	for typ, tt := range map[string]struct{ insert, good, bad string }{
		"smallint":         {"7", "7", "07 +7 7.0 40000 ７ 7e0 -0"},
		"integer":          {"-7", "-7", "-07 3000000000 99999999999999999999"},
		"bigint":           {"9223372036854775807", "9223372036854775807", "9223372036854775808 09223372036854775807"},
		"uuid":             {"'" + id + "'", id, strings.ToUpper(id) + " {" + id + "} " + strings.ReplaceAll(id, "-", "") + " x"},
		"text":             {"'a b'", "a b", "A\xcc\x88 a_b"},
		"varchar(3)":       {"'abc'", "abc", "abcd ABC"},
		`text COLLATE "C"`: {"'é'", "é", "e\u0301"},
	} {
		t.Run(typ, func(t *testing.T) {
			t.Parallel()
			s := openColumns(t, fmt.Sprintf(`CREATE TABLE public.reports (id %s PRIMARY KEY, analytics_cache jsonb); INSERT INTO reports VALUES (%s, '1')`, typ, tt.insert), reports(t))
			expectStands(t, s, "L", "report:"+tt.good)
			for _, bad := range strings.Fields(tt.bad) {
				expectStands(t, s, "N", "report:"+bad)
				write(t, s, put(one("report:"+bad), "2"))
			}
			expectStands(t, s, "N", "report:"+tt.good+" ")
			if rows := read(t, s, one("report:"+tt.good)); string(rows[0].Value) != "1" {
				t.Errorf("another key has changed the row: %s", rows[0].Value)
			}
			write(t, s, put(one("report:"+tt.good), "3"))
			all, err := s.ChangedSince(testContext(t), time.Time{}, "", 0)
			must(t, err)
			if !slices.Equal(all, legacy("report:"+tt.good)) {
				t.Errorf("listed are %v", all)
			}
		})
	}
}

func TestColumnOfSeveralKeys(t *testing.T) {
	t.Parallel()
	c := Column{Route: "legacy", Table: `"My App"."Rep.orts"`, Keys: []string{"tenant name", "id"}, Value: `va"lue`, Template: template(t, `u\*'\\:{tenant}:{id}`)}
	s := openColumns(t, `CREATE SCHEMA "My App"; CREATE TABLE "My App"."Rep.orts" (id int, "tenant name" text, "va""lue" jsonb, PRIMARY KEY (id, "tenant name"));
		INSERT INTO "My App"."Rep.orts" VALUES (1, 'a', '1'), (2, 'a', '2'), (1, 'b', '3'), (1, 'c:d', '4'), (1, '', '5')`, c)
	const p = `u*'\:`
	rows := read(t, s, legacy(p+"a:1", p+"a:2", p+"b:1", p+"b:2", p+"c:d:1", p+"a:01")...)
	if got := stands(rows); got != "LLLNNN" || string(rows[2].Value) != "3" {
		t.Errorf("%s %q", got, values(rows))
	}
	write(t, s, put(one(p+"b:1"), "33"), del(p+"a:2"))
	for _, since := range []time.Time{{}, time.Now().Add(-time.Hour)} {
		var got []string
		for after := ""; ; {
			page, err := s.ChangedSince(testContext(t), since, after, 1)
			must(t, err)
			if len(page) == 0 {
				break
			}
			after = page[len(page)-1].Key
			got = append(got, after)
		}
		slices.Sort(got)
		want := []string{p + "a:1", p + "a:2", p + "b:1"}
		if !since.IsZero() {
			want = want[1:]
		}
		if !slices.Equal(got, want) {
			t.Errorf("since %v: %q, want %q", since, got, want)
		}
	}
}

func TestColumnLife(t *testing.T) {
	t.Parallel()
	for _, expires := range []string{"", "until"} {
		t.Run("expires_column="+expires, func(t *testing.T) {
			t.Parallel()
			c := reports(t)
			c.Expires, c.Updated = expires, "changed"
			s := openColumns(t, reportsDDL+`; INSERT INTO reports (id, analytics_cache) SELECT i, '0' FROM generate_series(1, 9) i`, c)
			const hour = 3_600_000
			at := time.Now().Add(2 * time.Hour).UnixMilli()
			write(t, s, lasting(put(one("report:1"), "1"), policy.ExpiresIn, hour), lasting(put(one("report:2"), "2"), policy.ExpiresAt, at),
				lasting(put(one("report:3"), "3"), policy.ExpiresAt, 1000), put(one("report:4"), "4"))
			rows := read(t, s, legacy("report:1", "report:2", "report:3", "report:4")...)
			if stands(rows) != "LLTL" || rows[0].TTL <= hour-patience.Milliseconds() || rows[0].TTL > hour || rows[1].ExpiresAt != at || rows[3].TTL != -1 {
				t.Fatalf("%s %+v", stands(rows), rows)
			}
			if ask[bool](t, s, `SELECT changed IS NULL FROM reports WHERE id = 1`) {
				t.Error("updated_column is not set")
			}
			ends := rows[0].ExpiresAt
			write(t, s, lasting(put(one("report:1"), "10"), policy.KeepExpiry, 0), lasting(put(one("report:3"), "30"), policy.KeepExpiry, 0),
				lasting(put(one("report:4"), "40"), policy.KeepExpiry, 0))
			rows = read(t, s, legacy("report:1", "report:3", "report:4")...)
			if stands(rows) != "LLL" || rows[0].ExpiresAt != ends || rows[1].TTL != -1 || rows[2].TTL != -1 {
				t.Fatalf("kept: %s %+v", stands(rows), rows)
			}
			if expires != "" {
				sql(t, s, `UPDATE reports SET until = 'infinity' WHERE id = 1; UPDATE reports SET until = '-infinity' WHERE id = 2`)
				if rows := read(t, s, legacy("report:1", "report:2")...); stands(rows) != "LT" || rows[0].TTL != -1 {
					t.Errorf("infinite: %s %+v", stands(rows), rows)
				}
				write(t, s, lasting(put(one("report:1"), "1"), policy.KeepExpiry, 0))
				return
			}
			// A value that others have put there has not the life of the one before.
			sql(t, s, `UPDATE reports SET analytics_cache = '{"new": true}' WHERE id IN (1, 2)`)
			rows = read(t, s, legacy("report:1", "report:2")...)
			if stands(rows) != "LL" || rows[0].TTL != -1 || rows[1].TTL != -1 {
				t.Errorf("after others: %s %+v", stands(rows), rows)
			}
			write(t, s, lasting(put(one("report:1"), "1"), policy.KeepExpiry, 0))
			if rows := read(t, s, one("report:1")); rows[0].TTL != -1 {
				t.Errorf("kept the life of another value: %+v", rows)
			}
		})
	}
}

func TestColumnFence(t *testing.T) {
	t.Parallel()
	s := openColumns(t, reportsDDL+`; INSERT INTO reports (id, analytics_cache) SELECT i, '0' FROM generate_series(1, 9) i`, reports(t))
	fence := func(scope string) {
		t.Helper()
		must(t, s.Fence(testContext(t), scope, nothing))
	}
	write(t, s, put(one("report:1"), "1"))
	fence("")
	expectStands(t, s, "LL", "report:1", "report:2") // what flushes the table says nothing of a column
	fence("legacy")
	expectStands(t, s, "AA", "report:1", "report:2")
	write(t, s, put(one("report:1"), "2"), lasting(put(one("report:3"), "3"), policy.KeepExpiry, 0))
	expectStands(t, s, "LAL", "report:1", "report:2", "report:3")
	write(t, s, del("report:2"))
	expectStands(t, s, "T", "report:2")
	fence("legacy")
	expectStands(t, s, "AAA", "report:1", "report:2", "report:3")
	// A route of that name with the proxy's own table has fences of its own.
	must(t, s.SetColumns(nil))
	write(t, s, put(one("report:1"), "own"))
	must(t, s.SetColumns([]Column{reports(t)}))
	expectStands(t, s, "A", "report:1")
}

// TestColumnRefuses: what a column cannot hold changes nothing, and is told from an outage.
func TestColumnRefuses(t *testing.T) {
	t.Parallel()
	s := openColumns(t, strings.Replace(reportsDDL, "analytics_cache jsonb", "analytics_cache jsonb CHECK (analytics_cache <> '13')", 1)+
		`; INSERT INTO reports (id, analytics_cache) VALUES (1, '1')`, reports(t))
	for _, value := range []string{"hello", `"\u0000"`, "1e400", strings.Repeat("[", 600) + strings.Repeat("]", 600), "", "13", "007"} {
		for _, raw := range []bool{false, true} {
			tx := begin(t, s, legacy("report:1"))
			_, err := tx.Commit(testContext(t), []policy.Change{put(one("report:1"), value)}, CommitOptions{RawOnly: raw})
			if BadData(err) != (value != "13") || Rejected(err) != (value == "13") || Unavailable(err) || Uncertain(err) || strings.Contains(err.Error(), "13") && value == "13" {
				t.Errorf("%.20q: %v", value, err)
			}
			if want := value == "13"; JSON([]byte(value)) != want {
				t.Errorf("JSON(%.20q) is %v", value, !want)
			}
		}
	}
	if rows := read(t, s, one("report:1")); string(rows[0].Value) != "1" {
		t.Errorf("the column holds %s", rows[0].Value)
	}
	tx := begin(t, s, legacy("report:1"))
	_, err := tx.Commit(testContext(t), []policy.Change{put(one("report:1"), "2")}, CommitOptions{RawOnly: true})
	must(t, err)
	expectStands(t, s, "L", "report:1")
}

// TestColumnRowsAreLocked: others write the table too, without key locks.
func TestColumnRowsAreLocked(t *testing.T) {
	t.Parallel()
	s := openColumns(t, reportsDDL+`; INSERT INTO reports (id, analytics_cache) VALUES (1, '1'), (2, '2')`, reports(t))
	tx := begin(t, s, legacy("report:2", "report:1"))
	done := make(chan error, 1)
	go func() {
		_, err := s.pool.Exec(testContext(t), `UPDATE reports SET analytics_cache = '"legacy"' WHERE id = 1`)
		done <- err
	}()
	eventually(t, func() bool {
		return ask[int](t, s, `SELECT count(*) FROM pg_locks l WHERE NOT l.granted AND l.locktype IN ('tuple', 'transactionid')
			AND l.pid IN (SELECT pid FROM pg_stat_activity WHERE datname = current_database())`) > 0
	})
	if string(tx.Rows()[1].Value) != "1" {
		t.Errorf("read %s", tx.Rows()[1].Value)
	}
	_, err := tx.Commit(testContext(t), []policy.Change{put(one("report:1"), "10")}, CommitOptions{})
	must(t, err)
	must(t, <-done)
	if rows := read(t, s, one("report:1")); string(rows[0].Value) != `"legacy"` {
		t.Errorf("the later write is lost: %s", rows[0].Value)
	}
}

// TestColumnYields: where the proxy and other code would wait for each other for ever, the proxy gives up.
//
//	1 their transaction changes row 2    2 we lock row 1, and wait for row 2    3 theirs comes to row 1
func TestColumnYields(t *testing.T) {
	t.Parallel()
	s := openColumns(t, reportsDDL+`; INSERT INTO reports (id, analytics_cache) VALUES (1, '1'), (2, '2')`, reports(t))
	conn, err := s.pool.Acquire(testContext(t))
	must(t, err)
	defer conn.Release()
	_, err = conn.Conn().PgConn().Exec(testContext(t), `BEGIN; SET LOCAL lock_timeout = 0; UPDATE reports SET analytics_cache = '20' WHERE id = 2`).ReadAll()
	must(t, err)
	began := make(chan error, 1)
	go func() {
		tx, err := s.Begin(testContext(t), legacy("report:2", "report:1"))
		if err == nil {
			tx.Rollback()
		}
		began <- err
	}()
	eventually(t, func() bool {
		return len(began) > 0 || ask[int](t, s, `SELECT count(*) FROM pg_locks l WHERE NOT l.granted AND l.locktype IN ('tuple', 'transactionid')
			AND l.pid IN (SELECT pid FROM pg_stat_activity WHERE datname = current_database())`) > 0
	})
	_, err = conn.Conn().PgConn().Exec(testContext(t), `UPDATE reports SET analytics_cache = '10' WHERE id = 1; COMMIT`).ReadAll()
	must(t, err)
	if err := <-began; !Retryable(err) {
		t.Errorf("Begin: %v", err)
	}
	// One row is waited for as long as any lock.
	_, err = conn.Conn().PgConn().Exec(testContext(t), `BEGIN; UPDATE reports SET analytics_cache = '20' WHERE id = 2`).ReadAll()
	must(t, err)
	go func() {
		tx, err := s.Begin(testContext(t), legacy("report:2"))
		if err == nil {
			tx.Rollback()
		}
		began <- err
	}()
	eventually(t, func() bool {
		return len(began) > 0 || ask[bool](t, s, `SELECT coalesce(max(clock_timestamp() - waitstart) > interval '600 ms', false) FROM pg_locks l WHERE NOT l.granted
			AND l.pid IN (SELECT pid FROM pg_stat_activity WHERE datname = current_database())`)
	})
	_, err = conn.Exec(testContext(t), `COMMIT`)
	must(t, err)
	must(t, <-began)
}

// TestColumnStatements: a column costs no round trip more than the table.
func TestColumnStatements(t *testing.T) {
	t.Parallel()
	s := openColumns(t, reportsDDL+`; INSERT INTO reports (id, analytics_cache) VALUES (1, '1')`, reports(t))
	n := &counter{}
	traced, err := newStore(s.cfg, n)
	must(t, err)
	t.Cleanup(traced.Close)
	must(t, traced.SetColumns([]Column{reports(t)}))
	must(t, traced.UseColumns(testContext(t)))
	*n = counter{}
	both := append(legacy("report:1", "report:2"), refs("own", "a")...)
	read(t, traced, both...)
	tx := begin(t, traced, both)
	_, err = tx.Commit(testContext(t), []policy.Change{put(both[0], "1"), put(both[2], "2")}, CommitOptions{Journal: both[:1]})
	must(t, err)
	if n.batches != 3 || n.queries != 0 {
		t.Errorf("%d batches and %d queries for a read, a begin and a commit", n.batches, n.queries)
	}
}

func TestColumnLargeValues(t *testing.T) {
	t.Parallel()
	s := openColumns(t, reportsDDL+`; INSERT INTO reports (id) SELECT i FROM generate_series(1, 5) i`, reports(t))
	large := `"` + strings.Repeat("x", chunkBytes/2) + `"`
	var changes []policy.Change
	for i := range 5 {
		changes = append(changes, put(one(fmt.Sprintf("report:%d", i+1)), large))
	}
	write(t, s, changes...)
	for _, row := range read(t, s, refsOf(changes)...) {
		if string(row.Value) != large {
			t.Errorf("%d bytes", len(row.Value))
		}
	}
}

func TestColumnChangedSince(t *testing.T) {
	t.Parallel()
	c := reports(t)
	c.Updated = "changed"
	s := openColumns(t, reportsDDL+`; INSERT INTO reports (id, analytics_cache, changed)
		SELECT i, CASE WHEN i % 2 = 0 THEN '1'::jsonb END, CASE WHEN i = 50 THEN now() END FROM generate_series(1, 100) i;
		INSERT INTO reports (id, analytics_cache) VALUES (-5, '1')`, c)
	write(t, s, put(policy.Ref{Route: "own", Key: "a"}, "1"), put(policy.Ref{Route: "own", Key: "report:z"}, "1"), put(policy.Ref{Route: "own", Key: "z"}, "1"),
		put(one("report:2"), "2"), del("report:3"), drop("report:4"))
	// What another configuration has left of a key that a column may have.
	sql(t, s, `INSERT INTO cacheproxy.entries (key, value, route, generation, updated_at) VALUES ('report:6', '1', 'own', 0, now())`)
	list := func(since time.Time, limit int) []string {
		t.Helper()
		var got []string
		for after := ""; ; {
			page, err := s.ChangedSince(testContext(t), since, after, limit)
			must(t, err)
			if len(page) > limit {
				t.Fatalf("%d keys, at most %d were asked for", len(page), limit)
			}
			if len(page) == 0 {
				return got
			}
			for _, ref := range page {
				got = append(got, ref.Route+"/"+ref.Key)
			}
			after = page[len(page)-1].Key
		}
	}
	want := []string{"legacy/report:-5", "legacy/report:3", "own/a", "own/report:z", "own/z"}
	for i := 2; i <= 100; i += 2 {
		want = append(want, fmt.Sprintf("legacy/report:%d", i))
	}
	slices.Sort(want)
	for _, limit := range []int{1, 2, 3, 7, 1000} {
		got := list(time.Time{}, limit)
		slices.Sort(got)
		if !slices.Equal(got, want) {
			t.Errorf("all by %d: %q, want %q", limit, got, want)
		}
	}
	want = []string{"legacy/report:2", "legacy/report:3", "legacy/report:4", "legacy/report:50", "own/a", "own/report:z", "own/z"}
	for _, limit := range []int{1, 2, 1000} {
		got := list(time.Now().Add(-time.Minute), limit)
		slices.Sort(got)
		if !slices.Equal(got, want) {
			t.Errorf("recent by %d: %q, want %q", limit, got, want)
		}
	}
	if got := list(time.Now().Add(time.Hour), 1000); got != nil {
		t.Errorf("in the future: %q", got)
	}
	// What is struck counts as changed.
	sql(t, s, `UPDATE cacheproxy.meta SET updated_at = now() - interval '1 day'; UPDATE reports SET changed = NULL; DELETE FROM cacheproxy.entries`)
	tx := begin(t, s, legacy("report:2", "report:8"))
	intent, err := tx.Commit(testContext(t), nil, CommitOptions{Journal: legacy("report:2", "report:8", "report:2")})
	must(t, err)
	tx = begin(t, s, legacy("report:2", "report:8"))
	struck, err := tx.Strike(testContext(t), []int64{intent})
	must(t, err)
	if len(struck) != 1 {
		t.Errorf("struck %v", struck)
	}
	_, err = tx.Commit(testContext(t), nil, CommitOptions{})
	must(t, err)
	if got := list(time.Now().Add(-time.Minute), 1000); !slices.Equal(got, []string{"legacy/report:2", "legacy/report:8"}) {
		t.Errorf("after a strike: %q", got)
	}
	expectStands(t, s, "LL", "report:2", "report:8")
}

// TestColumnAgainstTheCatalogue: what cannot be used is told at start, with what to do about it.
func TestColumnAgainstTheCatalogue(t *testing.T) {
	t.Parallel()
	const table = `CREATE TABLE public.reports (id bigint PRIMARY KEY, analytics_cache jsonb, at timestamptz, local timestamp, must timestamptz NOT NULL DEFAULT now())`
	tests := []struct {
		name, ddl string
		change    func(*Column)
		problem   string
		remedy    string
		warning   bool
	}{
		{name: "no schema", change: func(c *Column) { c.Table = "app.reports" }, problem: `no schema "app"`},
		{name: "no table", problem: `no table "public"."reports"`},
		{name: "case", ddl: `CREATE TABLE public."Reports" (id int)`, problem: `did you mean "public"."Reports"?`},
		{name: "view", ddl: `CREATE VIEW public.reports AS SELECT 1 AS id`, problem: "is a view"},
		{name: "materialized view", ddl: `CREATE MATERIALIZED VIEW public.reports AS SELECT 1 AS id`, problem: "is a view"},
		{name: "sequence", ddl: `CREATE SEQUENCE public.reports`, problem: "is no table"},
		{name: "foreign", ddl: `CREATE EXTENSION postgres_fdw; CREATE SERVER x FOREIGN DATA WRAPPER postgres_fdw; CREATE FOREIGN TABLE public.reports (id int) SERVER x`, problem: "foreign table"},
		{name: "parent", ddl: table + `; CREATE TABLE public.child () INHERITS (reports)`, problem: "inherit"},
		{name: "rule", ddl: table + `; CREATE RULE r AS ON UPDATE TO reports DO INSTEAD NOTHING`, problem: "rules"},
		{name: "no column", ddl: table, change: func(c *Column) { c.Value = "Analytics_Cache" }, problem: `no column "Analytics_Cache"`, remedy: "did you mean analytics_cache?"},
		{name: "no key", ddl: table, change: func(c *Column) { c.Keys = []string{"nr"} }, problem: `no column "nr"`, remedy: "key_column"},
		{name: "numeric", ddl: `CREATE TABLE public.reports (id numeric PRIMARY KEY, analytics_cache jsonb)`, problem: "several spellings"},
		{name: "char", ddl: `CREATE TABLE public.reports (id char(5) PRIMARY KEY, analytics_cache jsonb)`, problem: "trailing blanks"},
		{name: "collation", ddl: `CREATE COLLATION ci (provider = icu, locale = 'und-u-ks-level2', deterministic = false); CREATE TABLE public.reports (id text COLLATE ci PRIMARY KEY, analytics_cache jsonb)`, problem: "collation"},
		{name: "text", ddl: `CREATE TABLE public.reports (id int PRIMARY KEY, analytics_cache text)`, problem: "is text", remedy: "jsonb"},
		{name: "json", ddl: `CREATE TABLE public.reports (id int PRIMARY KEY, analytics_cache json)`, problem: "is json", remedy: `ALTER COLUMN "analytics_cache" TYPE jsonb;`},
		{name: "generated", ddl: `CREATE TABLE public.reports (id int PRIMARY KEY, analytics_cache jsonb GENERATED ALWAYS AS ('1'::jsonb) STORED)`, problem: "generated"},
		{name: "not null", ddl: `CREATE TABLE public.reports (id int PRIMARY KEY, analytics_cache jsonb NOT NULL)`, problem: "NOT NULL", remedy: `ALTER COLUMN "analytics_cache" DROP NOT NULL;`},
		{name: "check", ddl: `CREATE TABLE public.reports (id int PRIMARY KEY, analytics_cache jsonb CONSTRAINT full_of CHECK (analytics_cache IS NOT NULL)); INSERT INTO reports VALUES (1, '1')`, problem: `"full_of" refuses NULL`, remedy: "DROP CONSTRAINT"},
		{name: "raising", ddl: table + `; INSERT INTO reports VALUES (1, '1'); CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RAISE EXCEPTION ''no''; END'; CREATE TRIGGER t BEFORE UPDATE ON reports FOR EACH ROW EXECUTE FUNCTION f()`, problem: "is refused"},
		{name: "trigger", ddl: table + `; CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END'; CREATE TRIGGER t BEFORE UPDATE ON reports FOR EACH ROW EXECUTE FUNCTION f()`, problem: "before every UPDATE", warning: true},
		{name: "no index", ddl: `CREATE TABLE public.reports (id int, analytics_cache jsonb)`, problem: "no unique index", remedy: `CREATE UNIQUE INDEX CONCURRENTLY ON "public"."reports" ("id");`},
		{name: "partial index", ddl: `CREATE TABLE public.reports (id int, analytics_cache jsonb); CREATE UNIQUE INDEX ON reports (id) WHERE id > 0`, problem: "partial"},
		{name: "wider index", ddl: `CREATE TABLE public.reports (id int, b int, analytics_cache jsonb, UNIQUE (id, b))`, problem: "no unique index"},
		{name: "deferrable", ddl: `CREATE TABLE public.reports (id int UNIQUE DEFERRABLE, analytics_cache jsonb)`, problem: "deferrable"},
		{name: "expression", ddl: `CREATE TABLE public.reports (id text, analytics_cache jsonb); CREATE UNIQUE INDEX ON reports (lower(id))`, problem: "no unique index"},
		{name: "plain index", ddl: `CREATE TABLE public.reports (id int, analytics_cache jsonb); CREATE INDEX ON reports (id)`, problem: "no unique index"},
		{name: "expires", ddl: table, change: func(c *Column) { c.Expires = "local" }, problem: "without time zone", remedy: "TYPE timestamptz"},
		{name: "expires not null", ddl: table, change: func(c *Column) { c.Expires = "must" }, problem: "NOT NULL", remedy: "DROP NOT NULL"},
		{name: "updated", ddl: table, change: func(c *Column) { c.Updated = "id" }, problem: "is bigint", remedy: "timestamptz"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			s := open(t)
			if tt.ddl != "" {
				sql(t, s, tt.ddl)
			}
			c := reports(t)
			if tt.change != nil {
				tt.change(&c)
			}
			must(t, s.SetColumns([]Column{c}))
			found, err := s.CheckColumns(testContext(t))
			must(t, err)
			ok := false
			for _, f := range found[0].Findings {
				ok = ok || strings.Contains(f.Problem, tt.problem) && strings.Contains(f.Remedy, tt.remedy) && f.Remedy != "" && f.Warning == tt.warning
			}
			if !ok {
				t.Errorf("found %+v, want %q and %q", found[0].Findings, tt.problem, tt.remedy)
			}
			err = s.UseColumns(testContext(t))
			if _, refused := errors.AsType[*ColumnError](err); refused == tt.warning {
				t.Errorf("UseColumns: %v", err)
			}
			if !tt.warning {
				if _, err := s.Load(testContext(t), legacy("report:1")); err == nil {
					t.Error("a column that cannot be used is read")
				}
				if _, err := s.Poll(testContext(t), 0); err == nil {
					t.Error("and the poll, which tells whether the store is fit for use, finds it fit")
				}
			}
		})
	}
}

// TestColumnPartitions: a partitioned table is one table.
func TestColumnPartitions(t *testing.T) {
	t.Parallel()
	s := openColumns(t, `CREATE TABLE public.reports (id int PRIMARY KEY, analytics_cache jsonb) PARTITION BY RANGE (id);
		CREATE TABLE public.low PARTITION OF reports FOR VALUES FROM (0) TO (10); CREATE TABLE public.high PARTITION OF reports FOR VALUES FROM (10) TO (20);
		INSERT INTO reports VALUES (1, '1'), (11, '11')`, reports(t))
	write(t, s, put(one("report:1"), "2"), put(one("report:11"), "3"), put(one("report:30"), "3"))
	expectStands(t, s, "LLN", "report:1", "report:11", "report:30")
}

// TestColumnBecomesUsable: what was mended is used without a restart.
func TestColumnBecomesUsable(t *testing.T) {
	t.Parallel()
	s := open(t)
	must(t, s.SetColumns([]Column{reports(t)}))
	if _, err := s.Poll(testContext(t), 0); err == nil {
		t.Fatal("there is no table")
	}
	sql(t, s, reportsDDL)
	if _, err := s.Poll(testContext(t), 0); err != nil {
		t.Fatal(err)
	}
	expectStands(t, s, "N", "report:1")
}

// TestColumnRights: each refusal names the statement that helps, and the statement does help.
func TestColumnRights(t *testing.T) {
	owner := openColumns(t, `CREATE SCHEMA app; CREATE TABLE app.reports (id int PRIMARY KEY, title text, analytics_cache jsonb, until timestamptz);
		INSERT INTO app.reports VALUES (1, 'x', '1')`)
	s, role := stranger(t, owner)
	st, err := s.schemaState(testContext(t))
	must(t, err)
	sql(t, owner, st.grants())
	c := reports(t)
	c.Table, c.Expires = "app.reports", "until"
	must(t, s.SetColumns([]Column{c}))
	for _, want := range []string{`GRANT USAGE ON SCHEMA "app" TO "` + role + `";`, `GRANT UPDATE ("analytics_cache", "until") ON "app"."reports" TO "` + role + `";`,
		`GRANT SELECT ON "app"."reports" TO "` + role + `";`} {
		found, err := s.CheckColumns(testContext(t))
		must(t, err)
		named := false
		for _, f := range found[0].Findings {
			if _, statement, ok := strings.Cut(f.Remedy, "run: "); ok && statement == want {
				sql(t, owner, statement)
				named = true
			}
		}
		if !named {
			t.Errorf("found %+v, want %s", found[0].Findings, want)
		}
	}
	write(t, s, lasting(put(one("report:1"), "2"), policy.ExpiresIn, 3_600_000))
	expectStands(t, s, "LN", "report:1", "report:2")

	sql(t, owner, `ALTER TABLE app.reports ENABLE ROW LEVEL SECURITY; CREATE POLICY p ON app.reports USING (true)`)
	found, err := s.CheckColumns(testContext(t))
	must(t, err)
	if f := found[0].Findings; len(f) != 1 || !strings.Contains(f[0].Problem, "row-level security") || !strings.Contains(f[0].Remedy, "BYPASSRLS") {
		t.Errorf("found %+v", f)
	}
}

// TestColumnIsDropped: the store is of no use until somebody has mended the table, and then without a restart.
func TestColumnIsDropped(t *testing.T) {
	t.Parallel()
	s := openColumns(t, reportsDDL+`; INSERT INTO reports (id, analytics_cache) VALUES (1, '1')`, reports(t))
	expectStands(t, s, "L", "report:1")
	sql(t, s, `ALTER TABLE reports RENAME analytics_cache TO other`)
	if _, err := s.Load(testContext(t), legacy("report:1")); err == nil {
		t.Fatal("a column that is gone is read")
	}
	_, err := s.Poll(testContext(t), 0)
	if _, ok := errors.AsType[*ColumnError](err); !ok {
		t.Errorf("the poll says %v", err)
	}
	sql(t, s, `ALTER TABLE reports RENAME other TO analytics_cache`)
	_, err = s.Poll(testContext(t), 0)
	must(t, err)
	expectStands(t, s, "L", "report:1")
}

// TestColumnUnused: a column that was removed with its route in phase3 is no outage of the other routes, nor of what asks for it later.
func TestColumnUnused(t *testing.T) {
	t.Parallel()
	s := open(t)
	c := reports(t)
	c.Unused = true
	must(t, s.SetColumns([]Column{c}))
	must(t, s.UseColumns(testContext(t)))
	if found, err := s.CheckColumns(testContext(t)); err != nil || len(found) != 0 {
		t.Errorf("%v %v", found, err)
	}
	own := policy.Ref{Route: "own", Key: "k"}
	write(t, s, put(own, "v"))
	_, err := s.Poll(testContext(t), 0)
	must(t, err)
	all, err := s.ChangedSince(testContext(t), time.Time{}, "", 0)
	must(t, err)
	if len(all) != 1 {
		t.Errorf("listed are %v", all)
	}
	var at metaPlace
	must(t, s.sweepMeta(testContext(t), &at))
	_, err = s.Load(testContext(t), append(legacy("report:1"), own))
	if _, ok := errors.AsType[*ColumnError](err); !ok {
		t.Errorf("Load: %v", err)
	}
	// The way back.
	sql(t, s, reportsDDL+`; INSERT INTO reports (id, analytics_cache) VALUES (1, '1')`)
	expectStands(t, s, "LN", "report:1", "report:2")
	write(t, s, put(one("report:1"), "2"))
	record(t, s, c)
	sql(t, s, `UPDATE reports SET analytics_cache = '3'`)
	expectRecorded(t, s, "a change after the way back", "report:1")
}

// TestSchemaOfAnEarlierVersion: what it lacks is made, and what it holds stays.
func TestSchemaOfAnEarlierVersion(t *testing.T) {
	t.Parallel()
	s := open(t)
	write(t, s, put(policy.Ref{Route: "own", Key: "k"}, "v"))
	sql(t, s, `DROP TABLE cacheproxy.meta`)
	must(t, s.EnsureSchema(testContext(t)))
	must(t, s.SetColumns([]Column{reports(t)}))
	sql(t, s, reportsDDL+`; INSERT INTO reports (id, analytics_cache) VALUES (1, '1')`)
	write(t, s, put(one("report:1"), "2"))
	if rows := read(t, s, one("report:1"), policy.Ref{Route: "own", Key: "k"}); stands(rows) != "LL" {
		t.Error(stands(rows))
	}
}

// TestColumnSweep: what is known of a key goes when it says nothing any more, and what keys read as stays, but for the tombstones whose time is over.
func TestColumnSweep(t *testing.T) {
	t.Parallel()
	s := openColumns(t, reportsDDL+`; INSERT INTO reports (id, analytics_cache) SELECT i, '0' FROM generate_series(1, 9) i`, reports(t))
	record(t, s, reports(t))
	write(t, s, put(one("report:1"), "1"), lasting(put(one("report:2"), "2"), policy.ExpiresIn, 3_600_000), lasting(put(one("report:3"), "3"), policy.ExpiresAt, 1000),
		del("report:4"), drop("report:5"), put(one("report:6"), "6"), put(one("report:7"), "7"))
	sql(t, s, `SET cacheproxy.own = 'on'; DELETE FROM reports WHERE id = 6; RESET cacheproxy.own; UPDATE reports SET analytics_cache = '8' WHERE id = 8`)
	sql(t, s, `UPDATE cacheproxy.meta SET updated_at = now() - interval '1 day' WHERE key <> 'report:7'`)
	all := []string{"report:1", "report:2", "report:3", "report:4", "report:5", "report:6", "report:7", "report:8"}
	expectStands(t, s, "LLTTANLL", all...)
	var at metaPlace
	must(t, s.sweepMeta(testContext(t), &at))
	expectStands(t, s, "LLTAANLL", all...)
	if got := ask[string](t, s, `SELECT string_agg(key, ' ' ORDER BY key) FROM cacheproxy.meta`); got != "report:2 report:3 report:5 report:7 report:8" {
		t.Errorf("left are %s", got)
	}
	// Below a fence the generation counts.
	must(t, s.Fence(testContext(t), "legacy", nothing))
	write(t, s, put(one("report:1"), "1"))
	sql(t, s, `UPDATE cacheproxy.meta SET updated_at = now() - interval '1 day'`)
	must(t, s.sweepMeta(testContext(t), &at))
	expectStands(t, s, "LA", "report:1", "report:9")
}

// The triggers lock what is known of keys in an order, and for as long as the application's transaction lasts: the sweep waits for none of it.
func TestColumnSweepPassesOverWhatIsLocked(t *testing.T) {
	t.Parallel()
	s := openColumns(t, reportsDDL+`; INSERT INTO reports (id, analytics_cache) SELECT i, '0' FROM generate_series(1, 3) i`, reports(t))
	write(t, s, put(one("report:1"), "1"), put(one("report:2"), "2"), put(one("report:3"), "3"))
	sql(t, s, `DELETE FROM reports; UPDATE cacheproxy.meta SET updated_at = now() - interval '1 day'`)
	tx, err := s.pool.Begin(testContext(t))
	must(t, err)
	defer tx.Rollback(t.Context()) //nolint:errcheck // it has only locked
	_, err = tx.Exec(testContext(t), `SELECT FROM cacheproxy.meta WHERE key = 'report:2' FOR UPDATE`)
	must(t, err)
	var at metaPlace
	must(t, s.sweepMeta(testContext(t), &at))
	if got := ask[string](t, s, `SELECT string_agg(key, ' ' ORDER BY key) FROM cacheproxy.meta`); got != "report:2" {
		t.Errorf("left are %s", got)
	}
}

// Whoever looks at the phases keeps no poll waiting.
func TestStandingLeavesThePollsAlone(t *testing.T) {
	t.Parallel()
	s := open(t)
	for range housekeepers {
		must(t, s.house.acquire(testContext(t)))
		defer s.house.release()
	}
	_, err := s.Standing(testContext(t), "legacy", 10)
	must(t, err)
}

// What speaks against a step is looked for in the column too.
func TestColumnStanding(t *testing.T) {
	t.Parallel()
	for _, expires := range []string{"", "ends"} {
		c := reports(t)
		c.Expires = expires
		s := openColumns(t, `CREATE TABLE public.reports (id bigint PRIMARY KEY, title text, analytics_cache jsonb, ends timestamptz);
			INSERT INTO reports (id, analytics_cache) SELECT i, CASE WHEN i % 2 = 0 THEN '0'::jsonb END FROM generate_series(1, 3000) i`, c)
		got, err := s.Standing(testContext(t), "legacy", 3)
		must(t, err)
		if len(got.Keys) != 3 || got.Partial || got.Longest != 0 {
			t.Errorf("%+v", got)
		}
		write(t, s, lasting(put(one("report:2"), "2"), policy.ExpiresIn, 7_200_000), lasting(put(one("report:4"), "4"), policy.ExpiresAt, 1000), put(one("report:6"), "6"))
		if got, err = s.Standing(testContext(t), "legacy", 2000); err != nil || len(got.Keys) != 1499 || got.Longest < time.Hour || got.Longest > 3*time.Hour {
			t.Errorf("%d keys, the longest life is %v, %v", len(got.Keys), got.Longest, err)
		}
		if got, err = s.Standing(testContext(t), "legacy", -1); err != nil || len(got.Keys) > 0 || got.Longest != 0 {
			t.Errorf("without rows: %+v, %v", got, err)
		}
	}
}

func TestColumnPage(t *testing.T) {
	t.Parallel()
	c := Column{Route: "legacy", Table: "reports", Keys: []string{"tenant", "id"}, Value: "v", Template: template(t, "u:{tenant}:{id}")}
	s := openColumns(t, `CREATE TABLE public.reports (id int, tenant text, v jsonb, PRIMARY KEY (tenant, id));
		INSERT INTO reports SELECT i, t, CASE WHEN i % 3 > 0 THEN '{"n": 1}'::jsonb END FROM generate_series(-3, 12) i, unnest('{a,B,"c:d",é}'::text[]) t`, c)
	write(t, s, lasting(put(one("u:a:1"), "1"), policy.ExpiresAt, 1000), lasting(put(one("u:a:2"), "2"), policy.ExpiresIn, 3_600_000), drop("u:a:4"), del("u:a:5"))
	col := s.columns.Load().list[0]
	for _, limit := range []int{1, 5, 100} {
		states, expired := map[string]policy.State{}, ""
		after, last := "", ""
		for {
			p, err := s.columnPage(testContext(t), col, policy.PageRequest{Route: "legacy", After: after, Limit: limit})
			must(t, err)
			for _, row := range p.Rows {
				if _, twice := states[row.Key]; twice {
					t.Fatalf("%s comes twice", row.Key)
				}
				states[row.Key], last = row.State, row.Key
				if row.Expired {
					expired += row.Key
				}
				if (row.Size > 0) != (row.State == policy.Live || row.Expired) {
					t.Errorf("%+v", row)
				}
			}
			if after = p.Next; after == "" {
				break
			}
		}
		if len(states) != 48 || expired != "u:a:1" { // those of the tenant c:d have no key
			t.Errorf("by %d: %d rows, expired %q, last %s", limit, len(states), expired, last)
		}
		var keys []string
		for key := range states {
			keys = append(keys, key)
		}
		for i, row := range read(t, s, legacy(keys...)...) {
			if row.State != states[keys[i]] {
				t.Errorf("%s: %d on the page, %d when read", keys[i], states[keys[i]], row.State)
			}
		}
	}
	for _, place := range []string{"x", `["a"]`, `["a", "1x"]`, `["a", "01"]`} {
		if _, err := s.columnPage(testContext(t), col, policy.PageRequest{Route: "legacy", After: place}); err == nil {
			t.Errorf("it goes on from %s", place)
		}
	}
	if n, err := s.columnEstimate(testContext(t), col); err != nil || n != 64 {
		t.Errorf("%d %v", n, err)
	}
	sql(t, s, `INSERT INTO reports SELECT i, 'x', NULL FROM generate_series(1, 20000) i; ANALYZE reports`)
	if n, err := s.columnEstimate(testContext(t), col); err != nil || n < 15000 || n > 25000 {
		t.Errorf("%d %v", n, err)
	}
}

// A plan is made while cacheproxy.meta is empty, and used long after: what is known of a key is looked up by key all the same, and not read whole for each.
func TestColumnPlansDoNotReadAllOfMeta(t *testing.T) {
	t.Parallel()
	s := openColumns(t, reportsDDL+`; INSERT INTO reports (id, analytics_cache) SELECT i, '0' FROM generate_series(1, 1000) i; ANALYZE reports`, reports(t))
	c := s.columns.Load().list[0]
	conn, err := s.pool.Acquire(testContext(t))
	must(t, err)
	defer conn.Release()
	const none = "'{}'"
	for name, q := range map[string]struct {
		text string
		args []string
	}{
		"load":  {c.load, []string{none, none, "'reports'", "'column reports'", "1::smallint"}},
		"walk":  {c.begin, []string{"'reports'", "'column reports'", "1000"}},
		"write": {c.write, []string{none, none, none, none, none, none, "'reports'", "'column reports'"}},
	} {
		for _, text := range []string{"SET plan_cache_mode = force_generic_plan", "PREPARE " + name + "_plan AS " + q.text} {
			_, err := conn.Exec(testContext(t), text, pgx.QueryExecModeSimpleProtocol)
			must(t, err)
		}
		rows, err := conn.Query(testContext(t), "EXPLAIN EXECUTE "+name+"_plan("+strings.Join(q.args, ", ")+")", pgx.QueryExecModeSimpleProtocol)
		must(t, err)
		lines, err := pgx.CollectRows(rows, pgx.RowTo[string])
		must(t, err)
		plan := strings.Join(lines, "\n")
		if _, cond, ok := strings.Cut(plan, " using meta_pkey on meta o"); !ok || !strings.Contains(strings.SplitN(cond, "\n", 3)[1], "(key = ") {
			t.Errorf("%s:\n%s", name, plan)
		}
	}
}
