package proxy_test

import (
	"context"
	"fmt"
	"strings"
	"testing"

	"cacheproxy/fallback"
	"cacheproxy/internal/bridge"
	"cacheproxy/internal/testenv"
	"cacheproxy/policy"
	"cacheproxy/proxy"

	"github.com/jackc/pgx/v5"
)

// writeUnseen writes keys while the transaction that inserts their rows is not committed, and commits it: nobody has ever written to their column.
func (w *world) writeUnseen(c *conn, ids ...int) {
	w.t.Helper()
	pg, err := pgx.Connect(context.Background(), w.pgURL)
	if err != nil {
		w.t.Fatal(err)
	}
	defer pg.Close(context.Background())
	tx, err := pg.Begin(context.Background())
	if err != nil {
		w.t.Fatal(err)
	}
	for _, id := range ids {
		if _, err := tx.Exec(context.Background(), "INSERT INTO public.reports (id) VALUES ($1)", id); err != nil {
			w.t.Fatal(err)
		}
		c.want("+OK", "SET", fmt.Sprintf("report:%d", id), "5")
	}
	if err := tx.Commit(context.Background()); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) record() {
	w.t.Helper()
	trigger, err := fallback.TriggerSQL(reportsColumn())
	if err != nil {
		w.t.Fatal(err)
	}
	w.exec(trigger)
}

// A row that comes later, with nothing in its column, does not say that the key was deleted.
func TestColumnRowThatComesLater(t *testing.T) {
	for _, phase := range columnPhases {
		t.Run(phase.String(), func(t *testing.T) {
			w := columnWorld(t)
			s := w.column(phase, nil)
			w.record()
			c := s.dial(t)
			w.writeUnseen(c, 21, 22, 23, 24, 25, 26, 27, 28, 29)
			for _, step := range []struct{ want, cmd string }{
				{"5", "GET report:21"}, {":1", "STRLEN report:21"}, {"[5 5 (nil)]", "MGET report:21 report:22 report:1"}, {":2", "EXISTS report:21 report:22"}, {":-1", "TTL report:21"},
				{":6", "INCR report:21"}, {":7", "INCR report:21"}, {"7", "GET report:21"},
				{":0", "SETNX report:22 9"}, {":1", "EXPIRE report:22 1000"}, {"5", "GET report:22"},
				{"5", "GETSET report:23 8"}, {"8", "GET report:23"},
				{":1", "DEL report:24"}, {"(nil)", "GET report:24"},
				{"5", "EVAL return(redis.call('GET',KEYS[1])) 1 report:25"}, {":6", "EVAL return(redis.call('INCR',KEYS[1])) 1 report:25"}, {"6", "GET report:25"},
				{"+OK", "SET report:26 [1]"}, {"[1]", "GET report:26"},
				{"+OK", "MULTI"}, {"+QUEUED", "GET report:27"}, {"+QUEUED", "INCR report:27"}, {"[5 :6]", "EXEC"}, {"6", "GET report:27"},
			} {
				c.want(step.want, strings.Fields(step.cmd)...)
			}
			// The key's writes go where the phase says from now on.
			for id, value := range map[int]string{21: "7", 23: "8", 25: "6", 26: "[1]", 27: "6"} {
				w.holds(phase, id, value)
			}
			// A value that others write speaks for the key.
			w.exec(`UPDATE public.reports SET analytics_cache = '"theirs"' WHERE id = 28`)
			w.until("readers see what was written in SQL", func() bool { return phase == policy.Drain || c.do("GET", "report:28") == `"theirs"` })
			// So does that they have deleted it.
			w.exec(`UPDATE public.reports SET analytics_cache = '1' WHERE id = 29; UPDATE public.reports SET analytics_cache = NULL WHERE id = 29`)
			w.until("readers see what was deleted in SQL", func() bool { return phase == policy.Drain || c.do("GET", "report:29") == "(nil)" })
			w.journalEmpty()
			if phase != policy.Drain {
				c.want(":1", "INCR", "report:29")
			}
		})
	}
}

// What only Redis holds is copied into an empty column, is no difference to be repaired away, and keeps a step from losing it.
func TestColumnRowThatComesLaterIsCopied(t *testing.T) {
	w := columnWorld(t)
	s := w.sampled(policy.Phase1)
	c := s.dial(t)
	w.writeUnseen(c, 21, 22)
	s.verified(t, c, "report:21", "report:22")
	s.counts(t, `verify_mismatches_total{kind="missing",route="legacy"}`, 0)
	c.want("+OK", "SET", "report:1", "1")
	c.want(":1", "DEL", "report:1")
	w.raw.want("+OK", "SET", "report:1", "old")
	w.raw.want("+OK", "SET", "report:99", "1") // no row
	for _, key := range []string{"report:21", "report:22"} {
		if got := c.do("CACHEPROXY", "EXPLAIN", key); !strings.Contains(got, "nothing has been written to its column") || !strings.Contains(got, "answered by redis") {
			t.Error(got)
		}
		if got := c.do("CACHEPROXY", "DIFF", key); !strings.Contains(got, "only in redis: 1 bytes") {
			t.Error(got)
		}
	}
	if got := c.do("CACHEPROXY", "PHASE", "legacy", "phase0"); !strings.Contains(got, "2 keys of the route are only in Redis") {
		t.Errorf("PHASE answers %q", got)
	}
	link := w.columnPeer()
	keys := []policy.Ref{{Route: "legacy", Key: "report:1"}, {Route: "legacy", Key: "report:21"}, {Route: "legacy", Key: "report:99"}}
	done, err := link.PreferStore(context.Background(), keys)
	wantFates(t, done, err, "repaired", "gone", "gone")
	w.raw.want("(nil)", "GET", "report:1")
	w.raw.want("5", "GET", "report:21")
	w.raw.want("1", "GET", "report:99")
	done, err = link.Copy(context.Background(), keys, nil)
	wantFates(t, done, err, "deleted", "copied", "no row to hold it")
	if got := w.inColumn(21); got != "5" {
		t.Errorf("the column holds %s", got)
	}
}

// While Redis is away, an empty column is no answer: it may hold the key.
func TestColumnEmptyInAnOutage(t *testing.T) {
	for _, phase := range []policy.Phase{policy.Phase0, policy.Phase1} {
		t.Run(phase.String(), func(t *testing.T) {
			w := columnWorld(t)
			link := testenv.NewLink(t, w.redis.Addr())
			s := w.column(phase, func(o *sidecarOptions) {
				o.redisURL = "redis://" + link.Addr() + "/0"
				o.routes[0].OnUnknown = policy.UnknownError
			})
			c := s.dial(t)
			w.writeUnseen(c, 21, 22)
			c.want("+OK", "SET", "report:1", "1")
			c.want(":1", "DEL", "report:1")
			link.Cut()
			w.until("redis is given up", func() bool { return s.srv.Health().Redis.Status != "connected" })
			for _, cmd := range []string{"GET report:21", "INCR report:21", "SET report:21 1 NX"} {
				if got := c.do(strings.Fields(cmd)...); !strings.HasPrefix(got, "-UNAVAILABLE ") || !strings.Contains(got, "legacy") {
					t.Errorf("%s answers %q", cmd, got)
				}
			}
			c.want("+OK", "SET", "report:22", "7") // depends on nothing
			c.want("7", "GET", "report:22")
			c.want("(nil)", "GET", "report:1") // is known to be deleted
			c.want(":1", "INCR", "report:1")
			link.Heal()
			w.until("redis is trusted again", func() bool { return s.srv.Health().Redis.Status == "connected" })
			c.want(":6", "INCR", "report:21")
			c.want("7", "GET", "report:22")
			c.want("1", "GET", "report:1")
			w.journalEmpty()
		})
	}
}

// columnPeer is a connection of a Peer whose route "legacy" lives in the column.
func (w *world) columnPeer() *proxy.PeerLink {
	w.t.Helper()
	fs, err := fallback.New(fallback.Config{URL: w.pgURL, QueryTimeout: peerPatience, Columns: []fallback.Column{reportsColumn()}})
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(fs.Close)
	link, store := w.peer()
	store.PeerStore = bridge.Peer(fs)
	return link
}

// What was known of a row goes with it: a row that is made anew does not say that the key was deleted, which was written in between.
func TestColumnRowThatIsMadeAnew(t *testing.T) {
	for _, phase := range columnPhases {
		t.Run(phase.String(), func(t *testing.T) {
			w := columnWorld(t)
			s := w.column(phase, nil)
			w.record()
			c := s.dial(t)
			again := func(id int, want, write string) {
				t.Helper()
				key := fmt.Sprintf("report:%d", id)
				c.want(want, strings.Fields(strings.ReplaceAll(write, "@", key))...)
				c.want("5", "GET", key)
				w.exec(fmt.Sprintf("INSERT INTO public.reports (id) VALUES (%d)", id))
				c.want("5", "GET", key)
				c.want(":6", "INCR", key)
				w.journalEmpty()
				w.holds(phase, id, "6")
				c.want("6", "GET", key)
				c.want(":7", "INCR", key)
			}
			// The key was deleted through the proxy, and then its row.
			first := w.column(policy.Phase1, nil)
			for id := 1; id < 5; id++ {
				first.dial(t).want("+OK", "SET", fmt.Sprintf("report:%d", id), "1")
				first.dial(t).want(":1", "DEL", fmt.Sprintf("report:%d", id))
			}
			first.stop()
			w.exec("DELETE FROM public.reports WHERE id < 5")
			again(1, "+OK", "SET @ 5")
			again(2, ":5", "EVAL return(redis.call('INCRBY',KEYS[1],5)) 1 @")
			if !phase.Rules().ReadsStore {
				return // what others do to a row concerns nobody there, and its record stays
			}
			// The row was deleted with its value, and the record of it is repaired.
			c.want("+OK", "SET", "report:5", "1")
			w.exec("DELETE FROM public.reports WHERE id = 5")
			w.until("the record is struck", func() bool { return w.sql("SELECT count(*) FROM cacheproxy.meta WHERE change IS NOT NULL") == "0" })
			c.want("(nil)", "GET", "report:5")
			again(5, "+OK", "SET @ 5")
			// It is not yet.
			c.want("+OK", "SET", "report:6", "1")
			w.exec("DELETE FROM public.reports WHERE id = 6")
			again(6, "+OK", "SET @ 5")
			c.want("+OK", "SET", "report:7", "1")
			w.exec("DELETE FROM public.reports WHERE id = 7")
			again(7, ":5", "EVAL redis.call('SET',KEYS[1],4);return(redis.call('INCR',KEYS[1])) 1 @")
		})
	}
}
