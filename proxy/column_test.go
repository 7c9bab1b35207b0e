package proxy_test

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"testing"

	"cacheproxy/fallback"
	"cacheproxy/internal/samejson"
	"cacheproxy/internal/testenv"
	"cacheproxy/policy"
	"cacheproxy/proxy"

	"github.com/jackc/pgx/v5"
)

// reports is the route of a column that the application has.
func reports(phase policy.Phase) policy.Route {
	return policy.Route{Name: "legacy", Match: "report:{id}", Template: template("report:{id}"), Place: "column analytics_cache of table public.reports", Phase: phase}
}

func template(match string) *policy.Template {
	t, err := policy.ParseTemplate(match)
	if err != nil {
		panic(err)
	}
	return t
}

func reportsColumn() fallback.Column {
	return fallback.Column{Route: "legacy", Table: "public.reports", Keys: []string{"id"}, Value: "analytics_cache", Template: reports(policy.Phase1).Template}
}

// columnWorld is a world whose application has a table of ten reports, none of which has anything in its column.
func columnWorld(t *testing.T) *world {
	t.Helper()
	w := newWorld(t)
	w.makeReports(10)
	return w
}

// makeReports makes the table with reports 0 to n.
func (w *world) makeReports(n int) {
	w.t.Helper()
	w.exec("CREATE TABLE public.reports (id int PRIMARY KEY, title text NOT NULL DEFAULT 'untitled', analytics_cache jsonb)")
	w.exec("INSERT INTO public.reports (id) SELECT generate_series(0, " + strconv.Itoa(n) + ")")
}

func (w *world) exec(query string) {
	w.t.Helper()
	c, err := pgx.Connect(context.Background(), w.pgURL)
	if err != nil {
		w.t.Fatal(err)
	}
	defer c.Close(context.Background())
	if _, err := c.Exec(context.Background(), query); err != nil {
		w.t.Fatal(err)
	}
}

// inColumn is the column of a report as Postgres prints it.
func (w *world) inColumn(id int) string {
	return w.sql(fmt.Sprintf("SELECT analytics_cache::text FROM public.reports WHERE id = %d", id))
}

// column starts a sidecar whose route "legacy" lives in the column, and beside it one, "plain", in the proxy's own table.
func (w *world) column(phase policy.Phase, change func(*sidecarOptions)) *sidecar {
	w.t.Helper()
	o := sidecarOptions{
		routes:  []policy.Route{reports(phase), {Name: "plain", Match: "plain:*", Phase: policy.Phase1}},
		columns: []fallback.Column{reportsColumn()},
	}
	if change != nil {
		change(&o)
	}
	return w.start(o)
}

var columnPhases = []policy.Phase{policy.Phase0, policy.Phase1, policy.Phase2, policy.Drain}

// holds tells what must be found of a key in the column and in Redis after a write.
func (w *world) holds(phase policy.Phase, id int, value string) {
	w.t.Helper()
	key := fmt.Sprintf("report:%d", id)
	row, redis := "<nil>", "(nil)"
	if phase.Rules().Write.KeepsRow() {
		row = value
	}
	if phase.Rules().ReadsRedis {
		redis = value
	}
	if got := w.inColumn(id); got != row && !samejson.Equal([]byte(got), []byte(row)) {
		w.t.Errorf("%s: the column of %s holds %s, want %s", phase, key, got, row)
	}
	if got := w.raw.do("GET", key); got != redis && !samejson.Equal([]byte(got), []byte(redis)) {
		w.t.Errorf("%s: redis holds %s at %s, want %s", phase, got, key, redis)
	}
}

func wantSame(t testing.TB, c *conn, want string, args ...string) {
	t.Helper()
	if got := c.do(args...); !samejson.Equal([]byte(got), []byte(want)) {
		t.Errorf("%.80q: got %.200q, want %.200q", args, got, want)
	}
}

func TestColumnWrites(t *testing.T) {
	for _, phase := range columnPhases {
		t.Run(phase.String(), func(t *testing.T) {
			w := columnWorld(t)
			s := w.column(phase, nil)
			c := s.dial(t)
			c.want("(nil)", "GET", "report:1")
			c.want("+OK", "SET", "report:1", `{"b":1, "a":[1e2]}`)
			wantSame(t, c, `{"a":[100],"b":1}`, "GET", "report:1")
			w.holds(phase, 1, `{"a": [100], "b": 1}`)
			c.want("+OK", "MSET", "report:2", "42", "report:3", `"text"`)
			c.want(":43", "INCR", "report:2")
			w.holds(phase, 2, "43")
			w.holds(phase, 3, `"text"`)
			c.want(":3", "APPEND", "report:2", "1")
			w.holds(phase, 2, "431")
			c.want(":1", "EXPIRE", "report:2", "1000")
			if ttl := c.do("TTL", "report:2"); ttl != ":1000" && ttl != ":999" {
				t.Errorf("TTL is %s", ttl)
			}
			c.want(":3", "SETRANGE", "report:2", "0", "9")
			w.holds(phase, 2, "931")
			if ttl := c.do("TTL", "report:2"); ttl != ":1000" && ttl != ":999" {
				t.Errorf("TTL is %s after SETRANGE", ttl)
			}
			c.want("931", "EVAL", "local v = redis.call('GET', KEYS[1]); redis.call('SET', KEYS[1], '[' .. v .. ']'); return v", "1", "report:2")
			w.holds(phase, 2, "[931]")
			c.want(":1", "COPY", "report:2", "report:4")
			w.holds(phase, 4, "[931]")
			c.want("+OK", "RENAME", "report:4", "report:5")
			w.holds(phase, 5, "[931]")
			c.want("(nil)", "GET", "report:4")
			c.want("+OK", "MULTI")
			c.want("+QUEUED", "SET", "report:6", "1")
			c.want("+QUEUED", "INCRBY", "report:6", "6")
			c.want("+QUEUED", "GET", "report:1")
			got := c.do("EXEC")
			if !strings.HasPrefix(got, "[+OK :7 {") {
				t.Errorf("EXEC answers %s", got)
			}
			w.holds(phase, 6, "7")
			c.want(":2", "DEL", "report:1", "report:6")
			c.want("(nil)", "GET", "report:1")
			if got := w.inColumn(1); got != "<nil>" {
				t.Errorf("after DEL the column holds %s", got)
			}
			c.want("(nil)", "GET", "report:6")
			c.want(":1", "SETNX", "report:7", `{}`)
			c.want(":0", "SETNX", "report:7", `[]`)
			w.holds(phase, 7, "{}")
			s.counts(t, `no_row_total{route="legacy"}`, 0)
			w.journalEmpty()
		})
	}
}

// What is not JSON is refused, and everything is as it was before.
func TestColumnNotJSON(t *testing.T) {
	commands := []string{
		"SET report:1 hello", "SET report:1 hello NX", "SET report:1 hello GET KEEPTTL", "SETEX report:1 100 hello", "PSETEX report:1 100 hello", "GETSET report:1 hello",
		"SETNX report:3 hello", "SETNX report:1 hello", "MSET report:2 1 report:1 hello", "MSETNX report:4 1 report:5 hello", "MSET plain:1 x report:1 hello",
		"APPEND report:1 }", "APPEND report:3 hello", "SETRANGE report:1 0 x", "SETRANGE report:3 2 x", "SETBIT report:1 1 0", "SETBIT report:3 7 1",
		"SET report:1 007", "SET report:1 NaN", `SET report:1 {"a":1`, `SET report:1 "\u0000"`,
		"COPY plain:text report:1 REPLACE", "COPY plain:text report:3", "COPY elsewhere report:1 REPLACE", "RENAME plain:text report:1", "RENAME elsewhere report:1",
		"RENAMENX elsewhere report:3", "RENAME plain:text report:3", "PFADD report:3 a b", "BITOP NOT report:1 plain:text", "BITFIELD report:1 SET u8 0 1",
		"EVAL return(redis.call('SET',KEYS[1],'hello')) 1 report:1", "EVAL redis.call('DEL',KEYS[2]);return(redis.call('SET',KEYS[1],'hello')) 2 report:1 report:2",
		"EVAL redis.call('SET',KEYS[1],'hello');redis.call('SET',KEYS[2],'changed') 2 report:3 plain:1",
	}
	transactions := []string{
		"SET report:1 2|APPEND report:1 x", "SETBIT report:1 1 0", "SET plain:1 changed|SETRANGE report:3 3 x", "EVAL redis.call('SET',KEYS[1],'hello') 1 report:1|DEL report:2",
	}
	for _, phase := range columnPhases {
		t.Run(phase.String(), func(t *testing.T) {
			w := columnWorld(t)
			s := w.column(phase, nil)
			c := s.dial(t)
			c.want("+OK", "MSET", "report:1", `{"a":1}`, "report:2", "2", "plain:1", "one", "plain:text", "hello", "elsewhere", "hello")
			c.want(":1", "EXPIRE", "report:1", "100000")
			keys := []string{"report:1", "report:2", "report:3", "report:4", "report:5", "plain:1", "plain:text", "elsewhere"}
			look := func() (out []string) {
				for _, k := range keys {
					out = append(out, k+"="+c.do("GET", k), fmt.Sprint(c.do("TTL", k) > ":0"), "redis "+w.raw.do("GET", k), fmt.Sprint(w.raw.do("TTL", k) > ":0"))
				}
				for id := 1; id <= 5; id++ {
					out = append(out, fmt.Sprintf("column %d: %s", id, w.inColumn(id)))
				}
				return append(out, "table: "+w.sql("SELECT string_agg(key || '=' || coalesce(convert_from(raw, 'UTF8'), value::text, '-'), ' ' ORDER BY key) FROM cacheproxy.entries"))
			}
			before := strings.Join(look(), "\n")
			unchanged := func(what, got string) {
				t.Helper()
				if !strings.HasPrefix(got, "-NOTJSON ") || !strings.Contains(got, "route legacy ("+phase.String()+")") {
					t.Errorf("%s answers %q", what, got)
				}
				c.want("+PONG", "PING")
				if after := strings.Join(look(), "\n"); after != before {
					t.Fatalf("%s has left\n%s\nof\n%s", what, after, before)
				}
			}
			for _, cmd := range commands {
				unchanged(cmd, c.do(strings.Fields(cmd)...))
			}
			for _, tx := range transactions {
				c.want("+OK", "MULTI")
				for cmd := range strings.SplitSeq(tx, "|") {
					c.want("+QUEUED", strings.Fields(cmd)...)
				}
				unchanged("MULTI "+tx, c.do("EXEC"))
				watched := []string{"WATCH", "report:3", "plain:1"}
				if phase.Rules().ReadsRedis { // else a live row that is watched is loaded into Redis, where nobody looks
					watched = append(watched, "report:1")
				}
				c.want("+OK", watched...)
				c.want("+OK", "MULTI")
				for cmd := range strings.SplitSeq(tx, "|") {
					c.want("+QUEUED", strings.Fields(cmd)...)
				}
				unchanged("WATCH, MULTI "+tx, c.do("EXEC"))
			}
			c.want("+OK", "MULTI")
			c.want("+QUEUED", "SET", "report:2", "3")
			if got := c.do("SET", "report:1", "hello"); !strings.HasPrefix(got, "-NOTJSON ") {
				t.Errorf("in MULTI: %q", got)
			}
			c.want("-EXECABORT Transaction discarded because of previous errors.", "EXEC")
			if after := strings.Join(look(), "\n"); after != before {
				t.Errorf("an aborted transaction has left\n%s\nof\n%s", after, before)
			}
			if n := s.metric(t, `refused_total{route="legacy"}`); n == 0 {
				t.Error("refusals are not counted")
			}
			w.journalEmpty()
		})
	}
	t.Run("phase3", func(t *testing.T) {
		w := columnWorld(t)
		c := w.column(policy.Phase3, nil).dial(t)
		c.want("+OK", "SET", "report:1", "hello")
	})
}

// A client appends to the bytes that it has written, and not to those in which Postgres prints them.
func TestColumnKeepsTheBytesInRedis(t *testing.T) {
	for _, phase := range []policy.Phase{policy.Phase1, policy.Phase2} {
		t.Run(phase.String(), func(t *testing.T) {
			w := columnWorld(t)
			one, two := w.column(phase, nil), w.column(policy.Phase1, nil)
			c, other := one.dial(t), two.dial(t)
			other.want("+OK", "SET", "report:1", "1.50e2") // with a row, in both
			c.want(":7", "APPEND", "report:1", "0")
			c.want("1.50e20", "GET", "report:1")
			other.want("+OK", "SET", "report:2", ` {"a" : 1}`)
			c.want(":1", "EXPIRE", "report:2", "1000")
			c.want(` {"a" : 1}`, "GET", "report:2")
			if got := c.do("APPEND", "report:2", "]"); !strings.HasPrefix(got, "-NOTJSON") {
				t.Errorf("APPEND answers %q", got)
			}
			c.want(` {"a" : 1}`, "GET", "report:2")
			// A transaction that watches it does not see it change.
			for range 3 {
				c.want("+OK", "WATCH", "report:2")
				c.want("+OK", "MULTI")
				c.want("+QUEUED", "GET", "report:2")
				c.want("+QUEUED", "EXPIRE", "report:2", "1000")
				c.want(`[ {"a" : 1} :1]`, "EXEC")
			}
			c.want(`10`, "EVAL", "return #redis.call('GET', KEYS[1]) .. ''", "1", "report:2")
			c.want(` {"a" : 1}`, "GET", "report:2")
			// What is promoted is what Postgres prints.
			other.want("+OK", "SET", "report:3", ` {"a" : 1}`)
			w.raw.want(":1", "DEL", "report:3")
			c.want(`{"a": 1}`, "GET", "report:3")
			c.want(":8", "STRLEN", "report:3")
		})
	}
}

// A sidecar that dies when its command has run, and before the result is written, has changed nothing, and what it had done never was to be seen.
func TestColumnDiesBeforeItWrites(t *testing.T) {
	w := columnWorld(t)
	link := testenv.NewLink(t, w.redis.Addr())
	steps := testenv.NewSteps(link, nil)
	s := w.column(policy.Phase2, func(o *sidecarOptions) { o.redisURL = "redis://" + link.Addr() + "/0" })
	c := s.dial(t)
	c.want("+OK", "SET", "report:1", `{"a":1}`)
	w.raw.want(":1", "EXPIRE", "report:1", "1000")
	ran := false
	steps.At(func(step testenv.Step) bool {
		if step.Name == "aside" && step.Done {
			ran = true
			if got := w.raw.do("GET", "report:1"); got != `{"a":1}` {
				t.Errorf("when it had run, Redis held %s", got)
			}
		}
		return step.Name != "write" || step.Done
	})
	if got := c.do("EVAL", "return redis.call('SET', KEYS[1], '2')", "1", "report:1"); !strings.HasPrefix(got, "-UN") {
		t.Errorf("EVAL answers %q", got)
	}
	steps.At(nil)
	if !ran {
		t.Error("it has not run")
	}
	w.until("redis is trusted again", func() bool { return s.srv.Health().Redis.Status == "connected" })
	c.want(`{"a":1}`, "GET", "report:1")
	if ttl := w.raw.do("TTL", "report:1"); ttl != ":1000" && ttl != ":999" {
		t.Errorf("TTL is %s", ttl)
	}
	c.want("+OK", "EVAL", "return redis.call('SET', KEYS[1], '2')", "1", "report:1")
	c.want("2", "GET", "report:1")
	w.journalEmpty()
}

// A key without a row lives in Redis alone.
func countsKeysWithoutARow(t *testing.T) {
	for _, phase := range columnPhases {
		t.Run(phase.String(), func(t *testing.T) {
			w := columnWorld(t)
			one, two := w.column(phase, nil), w.column(phase, nil)
			c, other := one.dial(t), two.dial(t)
			c.want("(nil)", "GET", "report:99")
			c.want("+OK", "SET", "report:99", `{"a":1}`, "PX", "100000")
			c.want(`{"a":1}`, "GET", "report:99")
			w.raw.want(`{"a":1}`, "GET", "report:99")
			other.want(`{"a":1}`, "GET", "report:99")
			if ttl := w.raw.do("TTL", "report:99"); ttl != ":100" && ttl != ":99" {
				t.Errorf("TTL is %s", ttl)
			}
			if got := w.sql("SELECT count(*) FROM public.reports WHERE id > 10"); got != "0" {
				t.Errorf("there are %s rows", got)
			}
			one.counts(t, `no_row_total{route="legacy"}`, 1)
			c.want(":1", "PERSIST", "report:99")
			c.want("+OK", "MSET", "report:1", "1", "report:98", "2", "report:97", "3")
			w.holds(phase, 1, "1")
			w.raw.want("2", "GET", "report:98")
			one.counts(t, `no_row_total{route="legacy"}`, 4)
			c.want("[1 2 3]", "MGET", "report:1", "report:98", "report:97")
			c.want(":2", "DEL", "report:1", "report:98")
			c.want("(nil)", "GET", "report:98")
			c.want("4", "EVAL", "redis.call('INCR', KEYS[1]); return redis.call('GET', KEYS[1])", "1", "report:97")
			c.want("+OK", "MULTI")
			c.want("+QUEUED", "INCR", "report:97")
			c.want("+QUEUED", "SET", "report:2", "7")
			c.want("[:5 +OK]", "EXEC")
			w.raw.want("5", "GET", "report:97")
			w.holds(phase, 2, "7")
			if got := c.do("SET", "report:97", "hello"); !strings.HasPrefix(got, "-NOTJSON") {
				t.Errorf("SET answers %q", got)
			}
			if got := c.do("EVAL", "redis.call('SET', KEYS[1], 'hello')", "1", "report:97"); !strings.HasPrefix(got, "-NOTJSON") {
				t.Errorf("EVAL answers %q", got)
			}
			c.want("5", "GET", "report:97")
			// Two sidecars take turns.
			var wg sync.WaitGroup
			for _, s := range []*sidecar{one, two, one, two} {
				wg.Go(func() {
					c := s.dial(t)
					for range 25 {
						if got := c.do("INCR", "report:96"); !strings.HasPrefix(got, ":") {
							t.Errorf("INCR answers %q", got)
						}
					}
				})
			}
			wg.Wait()
			c.want("100", "GET", "report:96")
			w.journalEmpty()
		})
	}
}

// While Redis is down nobody can keep a key that has no row.
func TestColumnWithoutARowInAnOutage(t *testing.T) {
	for _, phase := range columnPhases {
		t.Run(phase.String(), func(t *testing.T) {
			w := columnWorld(t)
			link := testenv.NewLink(t, w.redis.Addr())
			s := w.column(phase, func(o *sidecarOptions) { o.redisURL = "redis://" + link.Addr() + "/0" })
			c := s.dial(t)
			c.want("+OK", "SET", "report:99", "1")
			link.Cut()
			w.until("redis is given up", func() bool { return s.srv.Health().Redis.Status != "connected" })
			for _, cmd := range []string{"SET report:99 2", "DEL report:99", "INCR report:99", "MSET report:1 1 report:99 2"} {
				if got := c.do(strings.Fields(cmd)...); !strings.HasPrefix(got, "-UNAVAILABLE ") || !strings.Contains(got, "legacy") {
					t.Errorf("%s answers %q", cmd, got)
				}
			}
			if got := w.inColumn(1); got != "<nil>" {
				t.Errorf("MSET has written %s", got)
			}
			link.Heal()
			w.until("redis is trusted again", func() bool { return s.srv.Health().Redis.Status == "connected" })
			c.want("1", "GET", "report:99")
			c.want("+OK", "SET", "report:99", "2")
			w.journalEmpty()
		})
	}
}

func TestColumnIsNotFlushed(t *testing.T) {
	w := columnWorld(t)
	s := w.column(policy.Phase1, nil)
	c := s.dial(t)
	c.want("+OK", "SET", "report:1", "1")
	for _, cmd := range []string{"FLUSHALL", "FLUSHDB", "FLUSHALL ASYNC", "SWAPDB 0 1"} {
		if got := c.do(strings.Fields(cmd)...); !strings.HasPrefix(got, "-DENIED "+strings.Fields(cmd)[0]) || !strings.Contains(got, "legacy (phase1)") {
			t.Errorf("%s answers %q", cmd, got)
		}
	}
	c.want("+OK", "MULTI")
	if got := c.do("FLUSHALL"); !strings.HasPrefix(got, "-DENIED ") {
		t.Errorf("in MULTI: %q", got)
	}
	c.want("-EXECABORT Transaction discarded because of previous errors.", "EXEC")
	c.want("1", "GET", "report:1")
	w.holds(policy.Phase1, 1, "1")
	c.want("+OK", "SELECT", "1")
	c.want("+OK", "FLUSHDB") // another database
	c.want("+OK", "SELECT", "0")
	for _, phase := range []string{"phase2", "drain"} {
		c.want("+OK", "CACHEPROXY", "PHASE", "legacy", phase)
		if got := c.do("FLUSHALL"); !strings.HasPrefix(got, "-DENIED ") {
			t.Errorf("%s: %q", phase, got)
		}
	}
	c.want("+OK", "CACHEPROXY", "PHASE", "legacy", "phase3")
	c.want("+OK", "FLUSHALL")
	c.want("(nil)", "GET", "report:1")
}

// What one store has missed it learns afterwards.
func TestColumnOutages(t *testing.T) {
	t.Run("redis", func(t *testing.T) {
		w := columnWorld(t)
		link := testenv.NewLink(t, w.redis.Addr())
		s := w.column(policy.Phase1, func(o *sidecarOptions) { o.redisURL = "redis://" + link.Addr() + "/0" })
		c := s.dial(t)
		c.want("+OK", "MSET", "report:1", "1", "report:2", "2")
		link.Cut()
		c.want("+OK", "SET", "report:1", "[1e1]")
		c.want("[10]", "GET", "report:1")
		c.want(":3", "INCR", "report:2")
		if got := c.do("APPEND", "report:2", "x"); !strings.HasPrefix(got, "-NOTJSON") {
			t.Errorf("APPEND answers %q", got)
		}
		c.want(":1", "DEL", "report:2")
		link.Heal()
		w.until("redis is trusted again", func() bool { return s.srv.Health().Redis.Status == "connected" })
		w.journalEmpty()
		w.until("the new value is there", func() bool { c.want("[10]", "GET", "report:1"); return w.raw.do("GET", "report:1") == "[10]" })
		c.want("(nil)", "GET", "report:2")
	})
	for _, phase := range []policy.Phase{policy.Phase1, policy.Phase2} {
		t.Run("postgres/"+phase.String(), func(t *testing.T) {
			pg := testenv.PostgresServer(t)
			w := newWorldWith(t, testenv.Redis(t), pg.URL("postgres"))
			w.makeReports(10)
			s := w.column(phase, nil)
			c := s.dial(t)
			c.want("+OK", "MSET", "report:1", "1", "report:2", "2", "report:99", "3")
			kill(t, pg)
			w.until("a write is accepted", func() bool { return c.do("SET", "report:1", "[1e1]") == "+OK" })
			c.want("[1e1]", "GET", "report:1")
			c.want(":4", "INCR", "report:99")
			for _, cmd := range []string{"SET report:1 hello", "APPEND report:2 x", "EVAL redis.call('SET',KEYS[1],'hello') 1 report:2"} {
				if got := c.do(strings.Fields(cmd)...); !strings.HasPrefix(got, "-NOTJSON") {
					t.Errorf("%s answers %q", cmd, got)
				}
			}
			c.want("2", "GET", "report:2")
			c.want("+OK", "EVAL", "return redis.call('SET', KEYS[1], '5')", "1", "report:2")
			if err := pg.Restart(); err != nil {
				t.Fatal(err)
			}
			w.journalEmpty()
			w.holds(phase, 1, "[10]")
			w.holds(phase, 2, "5")
			c.want("4", "GET", "report:99")
			c.want("[1e1]", "GET", "report:1")
		})
	}
}

// What legacy code changes in SQL reaches Redis, if the trigger is there.
func TestColumnLegacyWriter(t *testing.T) {
	w := columnWorld(t)
	s := w.column(policy.Phase1, nil)
	trigger, err := fallback.TriggerSQL(reportsColumn())
	if err != nil {
		t.Fatal(err)
	}
	w.exec(trigger)
	c := s.dial(t)
	c.want("+OK", "MSET", "report:1", "1", "report:2", "2", "report:3", "3", "report:99", "9")
	w.exec("UPDATE public.reports SET analytics_cache = '[\"legacy\"]' WHERE id = 1")
	w.exec("UPDATE public.reports SET analytics_cache = NULL WHERE id = 2")
	w.exec("DELETE FROM public.reports WHERE id = 3")
	w.exec("INSERT INTO public.reports (id, analytics_cache) VALUES (99, '{}')")
	w.until("readers see what was changed in SQL", func() bool {
		return c.do("MGET", "report:1", "report:2", "report:3", "report:99") == `[["legacy"] (nil) (nil) {}]`
	})
	w.until("redis has what was changed in SQL", func() bool {
		c.do("MGET", "report:1", "report:2", "report:3", "report:99")
		return w.raw.do("GET", "report:1") == `["legacy"]` && w.raw.do("GET", "report:3") == "(nil)" && w.raw.do("GET", "report:99") == "{}"
	})
	// A key whose row was deleted, and that is written before Redis has heard of it, stays.
	for id := 4; id < 8; id++ {
		key := fmt.Sprintf("report:%d", id)
		c.want("+OK", "SET", key, "1")
		w.exec(fmt.Sprintf("DELETE FROM public.reports WHERE id = %d", id))
		c.want("+OK", "SET", key, "2")
		w.until("nothing of it is journaled", func() bool {
			return w.sql("SELECT count(*) FROM cacheproxy.meta WHERE change IS NOT NULL") == "0" && w.raw.do("HLEN", "cacheproxy:journal") == ":1"
		})
		c.want("2", "GET", key)
	}
	w.journalEmpty()
}

// A sidecar that began without the store and steps back to it learns of what others write from then on, without being asked for a key first.
func TestColumnStepsBack(t *testing.T) {
	w := columnWorld(t)
	first := w.column(policy.Phase1, nil)
	w.record()
	first.dial(t).want("+OK", "MSET", "report:1", "1", "report:2", "2")
	first.stop()
	s := w.column(policy.Phase3, func(o *sidecarOptions) { o.columns[0].Unused = true })
	c := s.dial(t)
	c.want("1", "GET", "report:1")
	for _, phase := range []string{"drain", "phase2"} {
		c.want("+OK", "CACHEPROXY", "PHASE", "legacy", phase)
	}
	c.want("1", "GET", "report:1")
	w.exec(`UPDATE public.reports SET analytics_cache = '"theirs"' WHERE id = 1`)
	w.until("redis has no copy of what was changed in SQL", func() bool { return w.raw.do("GET", "report:1") == "(nil)" })
	c.want(`"theirs"`, "GET", "report:1")
	w.journalEmpty()
	// And back: a column that is not used any more may go.
	for _, phase := range []string{"drain", "phase3"} {
		c.want("+OK", "CACHEPROXY", "PHASE", "legacy", phase)
	}
	w.exec("DROP TABLE public.reports")
	c.want("+OK", "SET", "plain:1", "x")
	if got := c.do("CACHEPROXY", "PHASE", "legacy", "drain"); !strings.HasPrefix(got, "-") || !strings.Contains(got, "registered") {
		t.Errorf("PHASE answers %q", got)
	}
	c.want("2", "GET", "report:2")
	w.until("the other route is served", func() bool { return c.do("SET", "plain:1", "y") == "+OK" })
	w.until("postgres is used", func() bool { return s.srv.Health().Postgres.Status == "connected" })
	w.journalEmpty()
}

func TestColumnExplained(t *testing.T) {
	w := columnWorld(t)
	s := w.column(policy.Phase1, nil)
	c := s.dial(t)
	c.want("+OK", "SET", "report:1", `{"a":1}`)
	c.want("+OK", "SET", "report:99", `{"a":1}`)
	says := func(got string, words ...string) {
		t.Helper()
		for _, word := range words {
			if !strings.Contains(got, word) {
				t.Errorf("%s\ndoes not say %q", got, word)
			}
		}
	}
	says(c.do("CACHEPROXY", "EXPLAIN", "report:1"), "route: legacy", "store: column analytics_cache of table public.reports: 8 bytes as Postgres prints the JSON", "redis: 7 bytes")
	says(c.do("CACHEPROXY", "EXPLAIN", "report:2"), "the row is there, and nothing has been written to its column")
	c.want("+OK", "SET", "report:3", "1")
	c.want(":1", "DEL", "report:3")
	says(c.do("CACHEPROXY", "EXPLAIN", "report:3"), "the row is there, and its value was deleted or has expired")
	says(c.do("CACHEPROXY", "EXPLAIN", "report:99"), "the table has no row for this key", "Redis alone", "writes go to: Redis only", "answered by redis")
	says(c.do("CACHEPROXY", "DIFF", "report:1"), "same as JSON")
	says(c.do("CACHEPROXY", "DIFF", "report:99"), "only in redis, and nowhere else to be")
	says(c.do("CACHEPROXY", "ROUTES"), "store=column", "store=table")
	w.raw.want("+OK", "SET", "report:1", `{"a":2}`)
	says(c.do("CACHEPROXY", "DIFF", "report:1"), "different value")
}

// A store that calls a JSON value that the gate has let through no JSON refuses that value, and nobody else's.
type picky struct{ proxy.Store }

type pickyTx struct{ proxy.Tx }

type noJSON struct{ error }

func (p picky) BadData(err error) bool { _, bad := err.(noJSON); return bad || p.Store.BadData(err) }

func (p picky) Begin(ctx context.Context, refs []policy.Ref) (proxy.Tx, error) {
	tx, err := p.Store.Begin(ctx, refs)
	if err != nil {
		return nil, err
	}
	return pickyTx{tx}, nil
}

func (p pickyTx) Commit(ctx context.Context, changes []policy.Change, journal []policy.Ref, known []int64, rawOnly bool) (int64, error) {
	for _, c := range changes {
		if strings.Contains(string(c.Value), "odd") {
			return 0, noJSON{fmt.Errorf("refused")}
		}
	}
	return p.Tx.Commit(ctx, changes, journal, known, rawOnly)
}

func TestColumnThatTheServerRefuses(t *testing.T) {
	w := columnWorld(t)
	s := w.column(policy.Phase1, func(o *sidecarOptions) { o.store = func(s proxy.Store) proxy.Store { return picky{s} } })
	var wg sync.WaitGroup
	for i := range 20 {
		wg.Go(func() {
			c := s.dial(t)
			for n := range 10 {
				key := fmt.Sprintf("report:%d", i%10+1)
				if i < 10 {
					c.want("+OK", "SET", key, fmt.Sprint(n))
					continue
				}
				// Where others set the key too, they may be in the same group, of which the server sees the last value alone.
				alone := i == 19
				if alone {
					key = "report:0"
				}
				got := c.do("SET", key, `"odd"`, "GET")
				if !strings.HasPrefix(got, "-NOTJSON") && (alone || strings.Contains(got, "odd")) {
					t.Errorf("SET answers %q", got)
				}
			}
		})
	}
	wg.Wait()
	c := s.dial(t)
	for i := range 10 {
		c.want("9", "GET", fmt.Sprintf("report:%d", i+1))
	}
	if got := c.do("EVAL", `redis.call('SET', KEYS[1], '"odd"')`, "1", "report:1"); !strings.HasPrefix(got, "-NOTJSON") {
		t.Errorf("EVAL answers %q", got)
	}
	c.want("9", "GET", "report:1")
	w.holds(policy.Phase1, 1, "9")
	w.journalEmpty()
}

// What came into Redis without the proxy and is no JSON stays there until it is overwritten.
func TestColumnForeignValue(t *testing.T) {
	w := columnWorld(t)
	first := w.column(policy.Phase2, nil)
	for id := 1; id < 6; id++ {
		first.dial(t).want("+OK", "SET", fmt.Sprintf("report:%d", id), "1") // its row is dropped: Redis speaks for it
	}
	first.stop()
	s := w.column(policy.Phase1, nil)
	c := s.dial(t)
	for id := 1; id < 6; id++ {
		w.raw.want("+OK", "SET", fmt.Sprintf("report:%d", id), "foreign")
	}
	c.want("foreign", "GET", "report:1")
	c.want("+OK", "SET", "report:1", "2")
	c.want("2", "GET", "report:1")
	c.want(":1", "EXPIRE", "report:2", "1000")
	c.want("foreign", "GET", "report:2")
	c.want(":1", "DEL", "report:3")
	c.want("(nil)", "GET", "report:3")
	if got := c.do("APPEND", "report:4", "x"); !strings.HasPrefix(got, "-NOTJSON") {
		t.Errorf("APPEND answers %q", got)
	}
	c.want("foreign", "GET", "report:4")
	c.want("+OK", "EVAL", "return redis.call('SET', KEYS[1], '3')", "1", "report:5")
	c.want("3", "GET", "report:5")
	w.journalEmpty()
	w.until("the new value is promoted", func() bool { c.want("2", "GET", "report:1"); return w.raw.do("GET", "report:1") == "2" })
	w.holds(policy.Phase1, 1, "2")
	w.until("the repair has copied it", func() bool { return w.inColumn(5) == "3" })
}
