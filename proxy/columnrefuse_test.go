package proxy_test

import (
	"fmt"
	"strings"
	"testing"

	"cacheproxy/internal/testenv"
	"cacheproxy/policy"
)

// guardReports makes a constraint that refuses 13, and a trigger that refuses the change of report 10 to anything but 7 or 8, also to NULL.
func (w *world) guardReports() {
	w.t.Helper()
	w.exec(`UPDATE public.reports SET analytics_cache = '7' WHERE id = 10`)
	w.exec(`ALTER TABLE public.reports ADD CONSTRAINT lucky CHECK (analytics_cache <> '13')`)
	w.exec(`CREATE FUNCTION public.guard() RETURNS trigger LANGUAGE plpgsql AS $$
		BEGIN
			IF NEW.id = 10 AND coalesce(NEW.analytics_cache NOT IN ('7', '8'), true) THEN RAISE EXCEPTION 'secret %', NEW.analytics_cache; END IF;
			RETURN NEW;
		END $$;
		CREATE TRIGGER guard BEFORE UPDATE ON public.reports FOR EACH ROW EXECUTE FUNCTION public.guard()`)
}

// What a constraint or a trigger of the application's refuses is JSON all the same, and the client is told so.
func TestColumnTableRefuses(t *testing.T) {
	for _, phase := range []policy.Phase{policy.Phase0, policy.Phase1} {
		t.Run(phase.String(), func(t *testing.T) {
			w := columnWorld(t)
			w.guardReports()
			s := w.column(phase, nil)
			c := s.dial(t)
			c.want("+OK", "SET", "report:1", "12")
			refused := func(cmd string) {
				t.Helper()
				got := c.do(strings.Fields(cmd)...)
				if !strings.HasPrefix(got, "-DENIED ") || !strings.Contains(got, "legacy ("+phase.String()+")") || !strings.Contains(got, "constraint or trigger") || strings.Contains(got, "secret") || strings.Contains(got, "13") {
					t.Errorf("%s answers %q", cmd, got)
				}
			}
			for _, cmd := range []string{"SET report:1 13", "INCR report:1", "MSET report:2 1 report:1 13", "EVAL return(redis.call('INCR',KEYS[1])) 1 report:1", "SET report:10 9", "DEL report:10", "GETDEL report:10"} {
				refused(cmd)
			}
			c.want("12", "GET", "report:1")
			w.holds(phase, 1, "12")
			c.want("(nil)", "GET", "report:2")
			c.want("7", "GET", "report:10")
			c.want("+OK", "SET", "report:10", "8")
			w.journalEmpty()
			// Clients that write other keys at the same time are not refused.
			done := make(chan string, 20)
			for i := range 20 {
				go func() {
					c := s.dial(t)
					if i%2 == 0 {
						done <- c.do("SET", "report:1", "13")
					} else {
						done <- c.do("SET", fmt.Sprintf("report:%d", 2+i%8), "1")
					}
				}()
			}
			ok := 0
			for range 20 {
				if got := <-done; got == "+OK" {
					ok++
				} else if !strings.HasPrefix(got, "-DENIED ") {
					t.Errorf("SET answers %q", got)
				}
			}
			if ok != 10 {
				t.Errorf("%d of 10 writes are done", ok)
			}
			w.holds(phase, 1, "12")
			w.journalEmpty()
		})
	}
}

// What Redis alone has of a key, and the table refuses, does not keep the key from being written.
func TestColumnTableRefusesWhatRedisHas(t *testing.T) {
	w := columnWorld(t)
	w.guardReports()
	c := w.column(policy.Phase1, nil).dial(t)
	for id := 11; id < 16; id++ {
		c.want("+OK", "SET", fmt.Sprintf("report:%d", id), "13")
	}
	w.exec("INSERT INTO public.reports (id) SELECT generate_series(11, 15)")
	c.want("13", "GET", "report:11")
	for _, cmd := range []string{"EXPIRE report:11 1000", "SETRANGE report:11 1 3"} {
		if got := c.do(strings.Fields(cmd)...); !strings.HasPrefix(got, "-DENIED ") {
			t.Errorf("%s answers %q", cmd, got)
		}
	}
	c.want("13", "GET", "report:11")
	c.want("+OK", "SET", "report:11", "14")
	c.want("14", "GET", "report:11")
	c.want(":14", "INCR", "report:12")
	c.want("14", "GET", "report:12")
	c.want(":1", "DEL", "report:13")
	c.want("(nil)", "GET", "report:13")
	c.want("+OK", "MSET", "report:14", "1", "report:1", "1")
	c.want("[1 1]", "MGET", "report:14", "report:1")
	link := w.columnPeer()
	done, err := link.Copy(t.Context(), []policy.Ref{{Route: "legacy", Key: "report:15"}, {Route: "legacy", Key: "report:13"}}, nil)
	wantFates(t, done, err, "refused by the table", "deleted")
	c.want("13", "GET", "report:15")
	w.journalEmpty()
	for id, value := range map[int]string{11: "14", 12: "14", 13: "<nil>", 14: "1", 15: "<nil>"} {
		if got := w.inColumn(id); got != value {
			t.Errorf("the column of report:%d holds %s, want %s", id, got, value)
		}
	}
}

// What was written while Postgres was down, and the table refuses, stays in Redis, and nothing is tried for ever.
func TestColumnTableRefusesARepair(t *testing.T) {
	pg := testenv.PostgresServer(t)
	w := newWorldWith(t, testenv.Redis(t), pg.URL("postgres"))
	w.makeReports(10)
	w.guardReports()
	c := w.column(policy.Phase1, nil).dial(t)
	c.want("+OK", "MSET", "report:1", "1", "report:2", "2")
	kill(t, pg)
	w.until("a write is accepted", func() bool { return c.do("SET", "report:1", "13") == "+OK" })
	c.want("+OK", "SET", "report:2", "22")
	if err := pg.Restart(); err != nil {
		t.Fatal(err)
	}
	w.journalEmpty()
	c.want("13", "GET", "report:1")
	w.holds(policy.Phase1, 2, "22")
	if got := w.inColumn(1); got != "<nil>" {
		t.Errorf("the column holds %s", got)
	}
}

// A row that cannot be emptied does not count from phase2 on: its mark stands until it can.
func TestColumnTableKeepsARow(t *testing.T) {
	w := columnWorld(t)
	w.guardReports()
	c := w.column(policy.Phase2, nil).dial(t)
	c.want("7", "GET", "report:10")
	c.want("+OK", "SET", "report:10", "9")
	c.want("9", "GET", "report:10")
	c.want(":10", "INCR", "report:10")
	c.want(":1", "DEL", "report:10")
	c.want("(nil)", "GET", "report:10")
	if got := w.inColumn(10); got != "7" {
		t.Errorf("the column holds %s", got)
	}
	if got := w.raw.do("HEXISTS", "cacheproxy:journal", "report:10"); got != ":1" {
		t.Errorf("HEXISTS answers %s", got)
	}
	w.exec("DROP TRIGGER guard ON public.reports")
	w.journalEmpty()
	c.want("(nil)", "GET", "report:10")
	if got := w.inColumn(10); got != "<nil>" {
		t.Errorf("the column holds %s", got)
	}
}
