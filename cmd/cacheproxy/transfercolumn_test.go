package main

import (
	"fmt"
	"testing"
	"time"

	"cacheproxy/internal/transfer"
)

// column has the only route keep its values in a column of a table with n rows, of which all have one.
func (x *tools) column(phase string, n int) {
	x.t.Helper()
	x.sql(`CREATE TABLE IF NOT EXISTS public.reports (id bigint PRIMARY KEY, title text NOT NULL DEFAULT '', cache jsonb)`)
	x.sql(`INSERT INTO reports (id, cache) SELECT i, jsonb_build_object('n', i) FROM generate_series(1, $1::int) i ON CONFLICT DO NOTHING`, n)
	x.write(fmt.Sprintf(`
postgres: {max_value: 1MiB}
routes: [{name: all, match: "k:{id}", phase: %s, store: {kind: column, table: public.reports, key_column: id, value_column: cache}}]`, phase))
}

// life gives the value of a row one, in the way of the proxy.
func (x *tools) life(id int, left string) {
	x.t.Helper()
	x.sql(fmt.Sprintf(`INSERT INTO cacheproxy.meta (route, key, expires_at, digest, generation, updated_at)
		SELECT 'all', 'k:' || id, now() + interval '%s', sha256(convert_to(cache::text, 'UTF8')), 0, now() FROM reports WHERE id = %d`, left, id))
}

// empty empties a cell: the key was deleted, or dropped because Redis is to have the value.
func (x *tools) empty(id int, dropped bool) {
	x.t.Helper()
	x.sql(`UPDATE reports SET cache = NULL WHERE id = $1::bigint`, id)
	x.sql(`INSERT INTO cacheproxy.meta (route, key, dropped, generation, updated_at) VALUES ('all', 'k:' || $1::bigint, $2::bool, 0, now())`, id, dropped)
}

func (x *tools) cell(id int) string {
	x.t.Helper()
	return x.ask("SELECT coalesce((SELECT cache::text FROM reports WHERE id = $1::bigint), '')", id)
}

// sameReport compares what was counted.
func (x *tools) sameReport(what string, got, want transfer.Report) {
	x.t.Helper()
	got.Seconds, got.Examples, got.Bytes = 0, nil, 0
	if fmt.Sprintf("%+v", got) != fmt.Sprintf("%+v", want) {
		x.t.Errorf("%s:\ngot  %+v\nwant %+v", what, got, want)
	}
}

func TestMigrateColumn(t *testing.T) {
	x := newTools(t, "phase1")
	x.column("phase1", 1000)
	x.life(1, "1 h")
	x.life(2, "-1 s")
	x.empty(3, false)
	x.empty(4, true)
	x.sql(`UPDATE reports SET cache = to_jsonb(repeat('x', 1048577)) WHERE id = 8`)
	x.served()
	x.must(x.redis.Set(x.ctx, "k:5", `"mine"`, 0).Err())
	x.must(x.redis.HSet(x.ctx, "cacheproxy:journal", "k:6", "v1").Err())
	x.must(x.redis.HSet(x.ctx, "k:7", "f", "v").Err())

	want := transfer.Report{Route: "all", DryRun: true, Rows: 1000, Copied: 993, There: 1, Expired: 1, Deleted: 1, Dead: 1, Marked: 1, Other: 1, TooLarge: 1}
	want.Copied = want.Rows - 7
	before := x.redis.DBSize(x.ctx).Val()
	code, stdout, stderr := x.tool("migrate", "--dry-run", "--json")
	dry := x.report(stdout)
	if x.sameReport("a dry run", dry, want); code != exitNot || x.redis.DBSize(x.ctx).Val() != before {
		t.Errorf("a dry run: exit code %d\n%s", code, stderr)
	}
	want.DryRun = false
	code, stdout, stderr = x.tool("migrate", "--json")
	if r := x.report(stdout); code != exitNot || r.Bytes != dry.Bytes || r.Bytes == 0 {
		t.Errorf("exit code %d, %d bytes, %d expected\n%s", code, r.Bytes, dry.Bytes, stderr)
	} else {
		x.sameReport("migrate", r, want)
	}
	for key, value := range map[string]string{"k:1": `{"n": 1}`, "k:5": `"mine"`, "k:1000": `{"n": 1000}`} {
		if got := x.redis.Get(x.ctx, key).Val(); got != value {
			t.Errorf("%s is %q, want %q", key, got, value)
		}
	}
	if d := x.redis.TTL(x.ctx, "k:1").Val(); d < 50*time.Minute || d > time.Hour {
		t.Errorf("k:1 lives for %s", d)
	}
	if n := x.redis.Exists(x.ctx, "k:2", "k:3", "k:4", "k:6", "k:8").Val(); n != 0 {
		t.Errorf("%d keys that should not be there", n)
	}
	// Below a fence no row speaks, whatever it holds.
	x.sql(`INSERT INTO cacheproxy.generations VALUES ('column all', 7)`)
	code, stdout, _ = x.tool("migrate", "--json")
	if x.sameReport("below a fence", x.report(stdout), transfer.Report{Route: "all", Rows: 1000, Dead: 1000}); code != exitFine {
		t.Errorf("below a fence: exit code %d", code)
	}
}

func TestMigrateReverseColumn(t *testing.T) {
	x := newTools(t, "phase1")
	x.column("phase1", 10)
	for _, id := range []int{2, 3, 6, 7} {
		x.empty(id, true)
	}
	x.empty(4, false)
	for key, value := range map[string]string{
		"k:1": `"other"`, "k:2": `{"r": 2}`, "k:3": "\x00\xff", "k:4": `4`, "k:999": `5`, "k:6": `6`, "k:007": "no key of this table", "title": "of no route",
	} {
		x.must(x.redis.Set(x.ctx, key, value, 0).Err())
	}
	x.must(x.redis.Set(x.ctx, "k:7", `{"r": 7}`, time.Hour).Err())
	x.must(x.redis.HSet(x.ctx, "cacheproxy:journal", "k:6", "v1").Err())
	x.served()
	want := transfer.Report{Route: "all", Reverse: true, DryRun: true, Rows: 8, Copied: 2, There: 1, Deleted: 1, Marked: 1, NotJSON: 1, NoRow: 2}
	code, stdout, stderr := x.tool("migrate", "--reverse", "--dry-run", "--json")
	if x.sameReport("a dry run", x.report(stdout), want); code != exitNot || x.cell(2) != "" {
		t.Errorf("a dry run: exit code %d\n%s", code, stderr)
	}
	want.DryRun = false
	code, stdout, stderr = x.tool("migrate", "--reverse", "--json")
	r := x.report(stdout)
	if x.sameReport("migrate --reverse", r, want); code != exitNot || r.Bytes != 16 || r.Examples["not JSON"][0].Key != "k:3" {
		t.Errorf("exit code %d: %+v\n%s", code, r, stderr)
	}
	for id, value := range map[int]string{1: `{"n": 1}`, 2: `{"r": 2}`, 3: "", 4: "", 6: "", 7: `{"r": 7}`} {
		if got := x.cell(id); got != value {
			t.Errorf("row %d has %q, want %q", id, got, value)
		}
	}
	if n := x.ask(`SELECT count(*) FROM cacheproxy.meta WHERE key = 'k:7' AND expires_at BETWEEN now() + interval '50 min' AND now() + interval '1 h'`); n != "1" {
		t.Error("the row does not know the life of its value")
	}
	if n := x.ask("SELECT count(*) FROM cacheproxy.entries"); n != "0" {
		t.Errorf("%s values went into the proxy's own table", n)
	}
}

// Each kind of difference that a column can have is found, and repaired as the phase says.
func TestVerifyColumn(t *testing.T) {
	for _, phase := range []string{"phase0", "phase1", "phase2", "drain"} {
		t.Run(phase, func(t *testing.T) {
			x := newTools(t, "phase1")
			x.column("phase1", 300)
			if code, _, stderr := x.tool("migrate"); code != exitFine {
				t.Fatalf("migrate: %d\n%s", code, stderr)
			}
			x.column(phase, 0)
			if code, v := x.verify("--complete"); code != exitFine || !v.OK || v.StoreKeys != 300 || v.RedisKeys != 300 || v.Equal != 300 || v.Counted != 0 {
				t.Errorf("equal copies: exit code %d: %+v", code, v)
			}

			x.must(x.redis.Set(x.ctx, "k:1", `{"n": -1}`, 0).Err())
			x.must(x.redis.Set(x.ctx, "k:2", `{ "n":2.0 }`, 0).Err()) // the same JSON
			x.must(x.redis.PExpire(x.ctx, "k:3", time.Hour).Err())
			x.empty(4, false)
			x.must(x.redis.Del(x.ctx, "k:5", "k:6").Err())
			x.must(x.redis.HSet(x.ctx, "k:6", "f", "v").Err())
			x.must(x.redis.Set(x.ctx, "k:7", "0", 0).Err())
			x.must(x.redis.HSet(x.ctx, "cacheproxy:journal", "k:7", "v1").Err())
			x.must(x.redis.Set(x.ctx, "k:8", "0", 0).Err())
			x.sql("INSERT INTO cacheproxy.journal (keys, routes) VALUES ('{k:8}', '{all}')")
			x.empty(9, true)
			x.life(10, "1 h")
			x.must(x.redis.PExpire(x.ctx, "k:10", time.Hour+time.Second).Err())
			x.empty(11, true)
			x.must(x.redis.Set(x.ctx, "k:11", "\x00\xff", 0).Err())
			x.life(12, "-1 s")
			x.must(x.redis.Set(x.ctx, "k:999", "0", 0).Err()) // no row

			want := map[transfer.Kind]int64{
				transfer.DiffValue: 1, transfer.DiffTTL: 2, transfer.DiffDeleted: 2, transfer.DiffType: 1, transfer.NotInRedis: 1, transfer.NotInStore: 2,
			}
			same := func(v transfer.Verdict) {
				t.Helper()
				for _, k := range transfer.Kinds() {
					if v.Differences[k] != want[k] {
						t.Errorf("%d of the kind %s, want %d: %+v", v.Differences[k], k, want[k], v)
					}
				}
				if v.InFlight != 2 || v.NoRow != 1 {
					t.Errorf("%d are in flight, want 2; %d have no row, want 1", v.InFlight, v.NoRow)
				}
			}
			code, v := x.verify()
			if same(v); code != exitNot || v.OK || v.Counted != 6 {
				t.Errorf("exit code %d: %+v", code, v)
			}
			keeps := phase == "phase0" || phase == "phase1"
			counted, left := int64(7), int64(1) // a hash that took the place of a key stays
			if keeps {
				counted, left = 9, 2 // and what is not JSON
			}
			code, v = x.verify("--complete")
			if same(v); code != exitNot || v.Counted != counted {
				t.Errorf("complete: exit code %d: %+v", code, v)
			}
			code, v = x.verify("--complete", "--repair")
			if same(v); code != exitNot || v.Repaired != counted-left {
				t.Errorf("repair: exit code %d: %+v", code, v)
			}
			x.must(x.redis.Del(x.ctx, "k:6", "k:11").Err())
			if code, v = x.verify("--complete"); code != exitNot || v.Counted != 1 || v.Differences[transfer.NotInRedis] != 1 || v.InFlight != 2 {
				t.Errorf("after the repair: exit code %d: %+v", code, v)
			}
			for id, is := range map[int][2]string{ // in Redis and in the column
				1: {`{"n": 1}`, `{"n": 1}`}, 2: {`{ "n":2.0 }`, `{"n": 2}`}, 3: {`{"n": 3}`, `{"n": 3}`}, 4: {"", ""}, 5: {`{"n": 5}`, `{"n": 5}`}, 9: {`{"n": 9}`, `{"n": 9}`},
				10: {`{"n": 10}`, `{"n": 10}`}, 12: {"", `{"n": 12}`},
			} {
				if !keeps {
					is = map[int][2]string{
						1: {`{"n": -1}`, ""}, 2: {`{ "n":2.0 }`, `{"n": 2}`}, 3: {`{"n": 3}`, ""}, 4: {`{"n": 4}`, ""}, 5: {`{"n": 5}`, `{"n": 5}`}, 9: {`{"n": 9}`, ""},
						10: {`{"n": 10}`, ""}, 12: {`{"n": 12}`, ""},
					}[id]
				}
				if got := [2]string{x.redis.Get(x.ctx, fmt.Sprintf("k:%d", id)).Val(), x.cell(id)}; got != is {
					t.Errorf("k:%d is %q, want %q", id, got, is)
				}
			}
			switch ttl := x.redis.PTTL(x.ctx, "k:3").Val(); {
			case keeps && ttl != -1, !keeps && ttl < 50*time.Minute:
				t.Errorf("k:3 lives for %s", ttl)
			}
			if got := x.redis.Get(x.ctx, "k:999").Val(); got != "0" {
				t.Errorf("a key without a row is %q", got)
			}
		})
	}
}
