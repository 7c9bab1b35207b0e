package fallback

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"cacheproxy/policy"
)

// record installs the triggers of c.
func record(t testing.TB, s *Store, c Column) {
	t.Helper()
	text, err := TriggerSQL(c)
	must(t, err)
	sql(t, s, text)
}

// recorded are the keys that a poll names, sorted, and the numbers that name them.
func recorded(t testing.TB, s *Store) (keys []string, ids []int64) {
	t.Helper()
	for after := int64(0); ; {
		p, err := s.Poll(testContext(t), after)
		must(t, err)
		for _, in := range p.Intents {
			for _, ref := range in.Refs {
				if ref.Route != "legacy" {
					t.Errorf("route %q", ref.Route)
				}
				keys = append(keys, ref.Key)
			}
			if in.Age < 0 {
				t.Errorf("age %v", in.Age)
			}
			ids, after = append(ids, in.ID), in.ID
		}
		if !p.More {
			slices.Sort(keys)
			return keys, ids
		}
	}
}

// expectRecorded compares what is recorded, and strikes it.
func expectRecorded(t testing.TB, s *Store, what string, want ...string) {
	t.Helper()
	keys, ids := recorded(t, s)
	slices.Sort(want)
	if !slices.Equal(keys, want) {
		t.Errorf("%s: recorded are %q, want %q", what, keys, want)
	}
	tx := begin(t, s, legacy(keys...))
	struck, err := tx.Strike(testContext(t), ids)
	must(t, err)
	n := 0
	for _, in := range struck {
		n += len(in.Refs)
	}
	if n != len(keys) {
		t.Errorf("%s: %d keys are struck, %d were recorded", what, n, len(keys))
	}
	_, err = tx.Commit(testContext(t), nil, CommitOptions{})
	must(t, err)
	if keys, _ := recorded(t, s); keys != nil {
		t.Errorf("%s: struck and still there: %q", what, keys)
	}
}

func TestTrigger(t *testing.T) {
	t.Parallel()
	c := reports(t)
	c.Expires = "until"
	s := openColumns(t, reportsDDL+`; INSERT INTO reports (id, analytics_cache) VALUES (1, '1'), (2, NULL), (3, '3')`, c)
	record(t, s, c)
	record(t, s, c) // may be repeated
	expectRecorded(t, s, "nothing")
	for _, step := range []struct {
		sql  string
		want []string
	}{
		{`INSERT INTO reports (id, analytics_cache) VALUES (4, '4'), (5, NULL), (6, 'null')`, []string{"report:4", "report:6"}},
		{`UPDATE reports SET title = 'x'`, nil},
		{`UPDATE reports SET analytics_cache = analytics_cache`, nil},
		{`UPDATE reports SET analytics_cache = '11', title = 'y' WHERE id IN (1, 2)`, []string{"report:1", "report:2"}},
		{`UPDATE reports SET analytics_cache = NULL WHERE id IN (2, 5)`, []string{"report:2"}},
		{`UPDATE reports SET until = now() + interval '1 hour' WHERE id = 3`, []string{"report:3"}},
		{`UPDATE reports SET until = now() + interval '1 hour' WHERE id IN (2, 5)`, nil}, // there is nothing that ends
		{`UPDATE reports SET id = 33 WHERE id = 3`, []string{"report:3", "report:33"}},
		{`UPDATE reports SET id = 55 WHERE id = 5`, nil},
		{`INSERT INTO reports (id, analytics_cache) VALUES (33, '0'), (7, '7') ON CONFLICT (id) DO UPDATE SET analytics_cache = excluded.analytics_cache`, []string{"report:33", "report:7"}},
		{`MERGE INTO reports r USING (VALUES (33), (1)) v(id) ON r.id = v.id WHEN MATCHED AND v.id = 1 THEN DELETE WHEN MATCHED THEN UPDATE SET analytics_cache = '"m"'`, []string{"report:1", "report:33"}},
		{`DELETE FROM reports WHERE id IN (4, 55)`, []string{"report:4"}},
		{`UPDATE reports SET analytics_cache = '1' WHERE false`, nil},
		{`TRUNCATE reports`, []string{"report:33", "report:6", "report:7"}},
		{`BEGIN; INSERT INTO reports (id, analytics_cache) VALUES (8, '8'); ROLLBACK`, nil},
		{`BEGIN; INSERT INTO reports (id, analytics_cache) VALUES (8, '8'); UPDATE reports SET analytics_cache = '9'; DELETE FROM reports; COMMIT`, []string{"report:8"}},
	} {
		if strings.HasPrefix(step.sql, "MERGE") && ask[int](t, s, `SELECT current_setting('server_version_num')::int`) < 150000 {
			t.Log("no MERGE here")
			continue
		}
		sql(t, s, step.sql)
		expectRecorded(t, s, step.sql, step.want...)
	}
	// What the proxy itself changes is not recorded.
	sql(t, s, `INSERT INTO reports (id) VALUES (1)`)
	write(t, s, put(one("report:1"), "1"))
	write(t, s, del("report:1"))
	write(t, s, put(one("report:1"), "2"))
	expectRecorded(t, s, "own writes")
	// And its setting ends with its transaction.
	sql(t, s, `UPDATE reports SET analytics_cache = '3'`)
	expectRecorded(t, s, "others on the same connections", "report:1")
}

// TestTriggerMeta: what was known of a value goes with it.
func TestTriggerMeta(t *testing.T) {
	t.Parallel()
	s := openColumns(t, reportsDDL+`; INSERT INTO reports (id, analytics_cache) VALUES (1, '1'), (2, '2'), (3, NULL)`, reports(t))
	record(t, s, reports(t))
	write(t, s, lasting(put(one("report:1"), "1"), policy.ExpiresIn, 3_600_000), drop("report:2"), drop("report:3"))
	sql(t, s, `UPDATE reports SET analytics_cache = '9' WHERE id = 1; UPDATE reports SET analytics_cache = '1' WHERE id = 1`)
	if rows := read(t, s, one("report:1")); rows[0].TTL != -1 {
		t.Errorf("the life of another value, which looks the same: %+v", rows)
	}
	sql(t, s, `UPDATE reports SET analytics_cache = '2' WHERE id = 2; UPDATE reports SET analytics_cache = NULL WHERE id = 2`)
	expectStands(t, s, "TA", "report:2", "report:3")
	expectRecorded(t, s, "updates", "report:1", "report:2")
	// Redis alone holds what was dropped: a row that is deleted then has to be told of.
	sql(t, s, `DELETE FROM reports`)
	expectRecorded(t, s, "a delete", "report:1", "report:3")
	// After a fence, what others write is alive.
	sql(t, s, `INSERT INTO reports (id, analytics_cache) VALUES (1, '1'), (2, '2')`)
	must(t, s.Fence(testContext(t), "legacy", nothing))
	expectStands(t, s, "AA", "report:1", "report:2")
	sql(t, s, `UPDATE reports SET analytics_cache = '3' WHERE id = 1`)
	expectStands(t, s, "LA", "report:1", "report:2")
}

// TestTriggerAgain: a change that comes while an earlier one is repaired is not struck with it.
func TestTriggerAgain(t *testing.T) {
	t.Parallel()
	s := openColumns(t, reportsDDL+`; INSERT INTO reports (id, analytics_cache) VALUES (1, '1'), (2, '2')`, reports(t))
	record(t, s, reports(t))
	for range 100 { // however often, and no sidecar runs: one row for each key
		sql(t, s, `UPDATE reports SET analytics_cache = to_jsonb(analytics_cache::text::int + 1)`)
	}
	keys, first := recorded(t, s)
	if len(keys) != 2 || len(first) != 1 || ask[int](t, s, `SELECT count(*) FROM cacheproxy.meta`) != 2 {
		t.Fatalf("%q %v", keys, first)
	}
	// 1 a repair has read what is recorded    2 another change is committed    3 the repair strikes
	sql(t, s, `UPDATE reports SET analytics_cache = '0' WHERE id = 2`)
	tx := begin(t, s, legacy("report:1", "report:2"))
	struck, err := tx.Strike(testContext(t), first)
	must(t, err)
	if len(struck) != 1 || !slices.Equal(struck[0].Refs, legacy("report:1")) {
		t.Errorf("struck %v", struck)
	}
	named, err := tx.Named(testContext(t), []string{"report:1", "report:2"})
	must(t, err)
	if named["report:1"] || !named["report:2"] {
		t.Errorf("named are %v", named)
	}
	_, err = tx.Commit(testContext(t), nil, CommitOptions{})
	must(t, err)
	keys, second := recorded(t, s)
	if !slices.Equal(keys, []string{"report:2"}) {
		t.Errorf("left are %q", keys)
	}
	// A writer that cannot reach Redis needs no entry of its own for what is recorded already.
	tx = begin(t, s, legacy("report:2"))
	intent, err := tx.Commit(testContext(t), []policy.Change{put(one("report:2"), "5")}, CommitOptions{Journal: legacy("report:2"), Known: second})
	must(t, err)
	if intent != 0 {
		t.Errorf("entry %d", intent)
	}
	if n, err := s.Counts(testContext(t)); err != nil || n.Journal != 1 || n.Oldest <= 0 {
		t.Errorf("%+v %v", n, err)
	}
	must(t, s.Strike(testContext(t), second))
	if keys, _ := recorded(t, s); keys != nil {
		t.Errorf("left are %q", keys)
	}
}

// TestTriggerMeetsARepair: a change that is not committed yet keeps a repair of its key waiting.
//
//	1 T changes K, which an earlier change has recorded    2 a repair of K begins
//	3 it must see T's value, or leave T's record
func TestTriggerMeetsARepair(t *testing.T) {
	t.Parallel()
	s := openColumns(t, reportsDDL+`; INSERT INTO reports (id, analytics_cache) VALUES (1, '1')`, reports(t))
	record(t, s, reports(t))
	sql(t, s, `UPDATE reports SET analytics_cache = '2'`)
	_, ids := recorded(t, s)
	conn, err := s.pool.Acquire(testContext(t))
	must(t, err)
	defer conn.Release()
	_, err = conn.Conn().PgConn().Exec(testContext(t), `BEGIN; UPDATE reports SET analytics_cache = '3'`).ReadAll()
	must(t, err)
	type repair struct {
		tx  *Tx
		err error
	}
	began := make(chan repair, 1)
	go func() {
		tx, err := s.Lock(testContext(t), legacy("report:1"))
		began <- repair{tx, err}
	}()
	eventually(t, func() bool {
		return ask[int](t, s, `SELECT count(*) FROM pg_locks l WHERE NOT l.granted AND l.locktype IN ('tuple', 'transactionid')
			AND l.pid IN (SELECT pid FROM pg_stat_activity WHERE datname = current_database())`) > 0
	})
	select {
	case <-began:
		t.Fatal("the repair did not wait")
	default:
	}
	_, err = conn.Exec(testContext(t), `COMMIT`)
	must(t, err)
	r := <-began
	must(t, r.err)
	defer r.tx.Rollback()
	struck, err := r.tx.Strike(testContext(t), ids)
	must(t, err)
	if len(struck) != 0 {
		t.Errorf("the earlier record strikes the later change: %v", struck)
	}
}

// TestTriggerKeys: keys are made in SQL as Template.Join makes them.
func TestTriggerKeys(t *testing.T) {
	t.Parallel()
	for i, match := range []string{"{a}", "{a}:{b}", `r'\\::{a}::{b}.`, `\{{a}\}-{b}-{a2}`, "cacheproxy:{a}", "x{a}$cache$"} {
		tpl := template(t, match)
		names := tpl.Names()
		columns := make([]string, len(names))
		for j, n := range names {
			columns[j] = "C " + n
		}
		c := Column{Route: "legacy", Table: fmt.Sprintf("t%d", i), Keys: columns, Value: "v", Template: tpl}
		var defs, quotes []string
		for _, n := range columns {
			defs, quotes = append(defs, quoted(n)+" text"), append(quotes, quoted(n))
		}
		s := openColumns(t, fmt.Sprintf(`CREATE TABLE public.t%d (%s, v jsonb, UNIQUE (%s))`, i, strings.Join(defs, ", "), strings.Join(quotes, ", ")), c)
		record(t, s, c)
		texts := []string{"1", "", ":", "::", "a:", ":a", "a::", "-", ".", "a.", `\`, `'`, "é", "cacheproxy:x", "%", "}", strings.Repeat("k", policy.MaxKey-3)}
		var want []string
		var parts []string
		for _, a := range texts {
			for _, b := range texts[:len(texts)-1] {
				parts = []string{a, b, "z"}[:len(names)]
				if len(names) == 1 && b != "1" {
					continue
				}
				args := make([]any, len(parts))
				places := make([]string, len(parts))
				for j, p := range parts {
					args[j], places[j] = p, fmt.Sprintf("$%d", j+1)
				}
				_, err := s.pool.Exec(testContext(t), fmt.Sprintf(`INSERT INTO t%d VALUES (%s, '1')`, i, strings.Join(places, ", ")), args...)
				must(t, err)
				if key := tpl.Join(parts); key != "" {
					want = append(want, key)
				}
			}
		}
		slices.Sort(want)
		got, _ := recorded(t, s)
		if !slices.Equal(got, want) {
			t.Errorf("%s: recorded are %.300q, want %.300q", match, got, want)
		}
		all, err := s.ChangedSince(testContext(t), time.Time{}, "", 0)
		must(t, err)
		var listed []string
		for _, ref := range all {
			listed = append(listed, ref.Key)
		}
		slices.Sort(listed)
		if !slices.Equal(listed, want) {
			t.Errorf("%s: listed are %.300q, want %.300q", match, listed, want)
		}
	}
}

// TestTriggerNeedsNoRights: who changes the table need not know of the proxy.
func TestTriggerNeedsNoRights(t *testing.T) {
	s := openColumns(t, reportsDDL, reports(t))
	record(t, s, reports(t))
	other, role := stranger(t, s)
	sql(t, s, "GRANT SELECT, INSERT, UPDATE, DELETE, TRUNCATE ON reports TO "+role)
	sql(t, other, `CREATE TEMP TABLE meta (x int); INSERT INTO reports (id, analytics_cache) VALUES (1, '1'); SET search_path = pg_temp, public; UPDATE reports SET analytics_cache = '2'`)
	expectRecorded(t, s, "changes of a stranger", "report:1")
	sql(t, other, `TRUNCATE public.reports`)
	expectRecorded(t, s, "TRUNCATE of a stranger", "report:1")
}

func TestTriggerState(t *testing.T) {
	t.Parallel()
	s := openColumns(t, reportsDDL, reports(t))
	expect := func(what string, want TriggerState) {
		t.Helper()
		r, err := s.CheckColumns(testContext(t))
		must(t, err)
		if r[0].Trigger != want {
			t.Errorf("%s: %d, want %d", what, r[0].Trigger, want)
		}
	}
	expect("nothing", TriggerMissing)
	record(t, s, reports(t))
	expect("installed", TriggerInstalled)
	sql(t, s, `ALTER TABLE reports DISABLE TRIGGER "`+s.columns.Load().list[0].triggerNames()["update"]+`"`)
	expect("one is disabled", TriggerOutdated)
	record(t, s, reports(t))
	expect("installed again", TriggerInstalled)
	c := reports(t)
	c.Template = template(t, "r:{id}")
	must(t, s.SetColumns([]Column{c}))
	expect("another pattern", TriggerOutdated)
	record(t, s, c)
	expect("for the other pattern", TriggerInstalled)
	sql(t, s, `DROP FUNCTION cacheproxy.`+s.columns.Load().list[0].function()+` CASCADE`)
	expect("removed", TriggerMissing)
}

// TestTriggerInGroups: a statement that changes much leaves few entries, each as large as a repair takes on.
func TestTriggerInGroups(t *testing.T) {
	t.Parallel()
	s := openColumns(t, reportsDDL+`; INSERT INTO reports (id, analytics_cache) SELECT i, '1' FROM generate_series(1, 1050) i`, reports(t))
	record(t, s, reports(t))
	sql(t, s, `UPDATE reports SET analytics_cache = '2'`)
	p, err := s.Poll(testContext(t), 0)
	must(t, err)
	sizes := []int{}
	for _, in := range p.Intents {
		sizes = append(sizes, len(in.Refs))
	}
	slices.Sort(sizes)
	if len(sizes) != 11 || sizes[0] != 50 || sizes[1] != changeKeys || sizes[10] != changeKeys {
		t.Errorf("sizes %v", sizes)
	}
	keys, _ := recorded(t, s)
	if len(keys) != 1050 {
		t.Errorf("%d keys", len(keys))
	}
}

// BenchmarkTrigger is what an UPDATE of 20,000 rows costs the application, without the triggers and with them: for keys that
// are not recorded yet, for keys that are, and where the value column stays as it is.
func BenchmarkTrigger(b *testing.B) {
	const values = `UPDATE reports SET analytics_cache = jsonb_build_object('n', random(), 'text', repeat('x', 900))`
	s := openColumns(b, reportsDDL+`; INSERT INTO reports (id, analytics_cache) SELECT i, '{}' FROM generate_series(1, 20000) i`, reports(b))
	conn, err := s.pool.Acquire(context.Background())
	must(b, err)
	defer conn.Release()
	exec := func(statement string) {
		b.Helper()
		_, err := conn.Conn().PgConn().Exec(context.Background(), statement).ReadAll()
		must(b, err)
	}
	// The time of the processor that the server's process has taken: others may be at work on this machine.
	cpu := func() float64 {
		b.Helper()
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", conn.Conn().PgConn().PID()))
		must(b, err)
		fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
		user, err := strconv.ParseFloat(fields[11], 64)
		must(b, err)
		system, err := strconv.ParseFloat(fields[12], 64)
		must(b, err)
		return (user + system) * 10 // hundredths of a second
	}
	exec("SET statement_timeout = 0")
	run := func(name, before, statement string) {
		b.Run(name, func(b *testing.B) {
			total := 0.0
			for range b.N {
				b.StopTimer()
				exec("VACUUM reports")
				if before != "" {
					exec(before)
				}
				at := cpu()
				b.StartTimer()
				exec(statement)
				total += cpu() - at
			}
			b.ReportMetric(total/float64(b.N), "cpu-ms/op")
		})
	}
	run("without", "", values)
	run("without/other column", "", `UPDATE reports SET title = 'x'`)
	record(b, s, reports(b))
	run("with/new keys", "TRUNCATE cacheproxy.meta", values)
	run("with/known keys", "VACUUM cacheproxy.meta", values)
	run("with/other column", "", `UPDATE reports SET title = 'x'`)
}
