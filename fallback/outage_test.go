package fallback

import (
	"context"
	"errors"
	"strings"
	"sync"
	"testing"
	"time"

	"cacheproxy/internal/testenv"
	"cacheproxy/policy"
)

// A server that was restarted leaves dead connections in the pool; nobody has to know.
func TestDeadPooledConnectionsAreNotSeen(t *testing.T) {
	s := open(t)
	k := refs("r", "k")
	kill := func() {
		// Several connections, all dead, without a sign to the pool.
		var txs []*Tx
		for _, name := range []string{"a", "b", "c"} {
			txs = append(txs, begin(t, s, refs("r", name)))
		}
		for _, tx := range txs {
			tx.Rollback()
		}
		killer := twin(t, s, nil)
		sql(t, killer, `SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()`)
		eventually(t, func() bool {
			return ask[int](t, killer, `SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND backend_type = 'client backend'`) == 1
		})
	}
	kill()
	read(t, s, k...)
	kill()
	begin(t, s, k).Rollback()
	kill()
	_, err := s.Poll(testContext(t), 0)
	must(t, err)
	kill()
	must(t, s.Fence(testContext(t), "", nothing))
	kill()
	must(t, s.EnsureSchema(testContext(t)))
	kill()
	must(t, s.Ping(testContext(t)))
}

func TestCommitOnADeadConnection(t *testing.T) {
	s := open(t)
	k := refs("r", "k")
	tx := begin(t, s, k)
	pid := tx.conn.Conn().PgConn().PID()
	if !ask[bool](t, s, `SELECT pg_terminate_backend($1::int, 20000)`, int64(pid)) {
		t.Fatal("the backend lives")
	}
	_, err := tx.Commit(testContext(t), []policy.Change{put(k[0], "v")}, CommitOptions{Journal: k})
	if err == nil || !Uncertain(err) && !Unavailable(err) {
		t.Fatal(err)
	}
	if got := states(read(t, s, k[0])); got != "A" {
		t.Error(got)
	}
	if st := s.Stats(); st.Writes.Busy != 0 {
		t.Errorf("%+v", st)
	}
}

// The connection breaks while COMMIT waits: the outcome is unknown, and said to be.
func TestACommitThatWasSentIsUncertain(t *testing.T) {
	pg := testenv.PostgresServer(t)
	link := testenv.NewLink(t, pg.Addr())
	s := openURL(t, Config{URL: pg.URLVia(link.Addr(), "postgres"), QueryTimeout: 3 * time.Second})
	must(t, s.EnsureSchema(testContext(t)))
	k := refs("r", "k")
	warm := begin(t, s, k)
	_, err := warm.Commit(testContext(t), []policy.Change{put(k[0], "first")}, CommitOptions{})
	must(t, err)

	tx := begin(t, s, k)
	link.Freeze()
	ctx, cancel := context.WithTimeout(testContext(t), 200*time.Millisecond)
	defer cancel()
	_, err = tx.Commit(ctx, []policy.Change{put(k[0], "second")}, CommitOptions{})
	if !Uncertain(err) || Retryable(err) || !Unavailable(err) || !strings.Contains(err.Error(), "unknown") {
		t.Error(err)
	}
	link.Heal()

	// Before anything was sent, an ended context is certain.
	tx = begin(t, s, k)
	gone, leave := context.WithCancel(testContext(t))
	leave()
	if _, err = tx.Commit(gone, []policy.Change{put(k[0], "third")}, CommitOptions{}); err == nil || Uncertain(err) {
		t.Error(err)
	}

	// A stopped server is an outage; after its return the store works without being told.
	must(t, pg.Stop())
	if _, err := s.Load(testContext(t), k); !Unavailable(err) || Uncertain(err) {
		t.Error(err)
	}
	if _, err := s.Begin(testContext(t), k); !Unavailable(err) {
		t.Error(err)
	}
	must(t, pg.Restart())
	s.Reset()
	eventually(t, func() bool { return s.Ping(testContext(t)) == nil })
	if got := states(read(t, s, k[0])); got != "L" {
		t.Error(got)
	}
}

func TestAReadOnlyServerIsRecognised(t *testing.T) {
	s := open(t)
	standby := twin(t, s, func(c *Config) { c.URL = withParam(t, c.URL, "default_transaction_read_only", "on") })
	_, err := standby.Begin(testContext(t), refs("r", "k"))
	if !ReadOnly(err) || Unavailable(err) || Retryable(err) {
		t.Error(err)
	}
	standby.Reset()
	if err := standby.Fence(testContext(t), "", nothing); !ReadOnly(err) {
		t.Error(err)
	}
	if got := states(read(t, standby, refs("r", "k")...)); got != "A" {
		t.Error(got)
	}
}

// Above the cap a bounded number waits; the others are told at once. Housekeeping has its own connections.
func TestAboveTheCapRequestsAreShed(t *testing.T) {
	s := open(t)
	small := twin(t, s, func(c *Config) { c.MaxWrites, c.MaxReads = 1, 1 })
	tx := begin(t, small, refs("r", "k"))
	must(t, small.reads.acquire(testContext(t)))

	var wg sync.WaitGroup
	ctx, stop := context.WithCancel(testContext(t))
	for range waitFactor {
		wg.Add(2)
		go func() {
			defer wg.Done()
			if _, err := small.Begin(ctx, refs("r", "other")); !Overloaded(err) || !errors.Is(err, context.Canceled) {
				t.Error(err)
			}
		}()
		go func() {
			defer wg.Done()
			if _, err := small.Load(ctx, refs("r", "other")); !Overloaded(err) {
				t.Error(err)
			}
		}()
	}
	eventually(t, func() bool {
		st := small.Stats()
		return st.Writes.Waiting == waitFactor && st.Reads.Waiting == waitFactor
	})
	if _, err := small.Begin(testContext(t), refs("r", "x")); !Overloaded(err) || Unavailable(err) || Uncertain(err) {
		t.Error(err)
	}
	if _, err := small.Load(testContext(t), refs("r", "x")); !Overloaded(err) || Unavailable(err) {
		t.Error(err)
	}
	_, err := small.Poll(testContext(t), 0)
	must(t, err)
	must(t, small.Register(testContext(t), "r", "phase1"))
	stop()
	wg.Wait()
	tx.Rollback()
	small.reads.release()
	begin(t, small, refs("r", "x")).Rollback()
	read(t, small, refs("r", "x")...)
	if st := small.Stats(); st.Writes.Shed != waitFactor+1 || st.Writes.Waiting != 0 || st.Writes.Cap != 1 || st.MaxOpen != 5 {
		t.Errorf("%+v", st)
	}
}

func TestNewNeitherConnectsNorTalks(t *testing.T) {
	s := openURL(t, Config{URL: "postgres://user:secret@192.0.2.1:1/db?sslmode=disable"})
	if st := s.Stats(); st.Open != 0 || st.Dialed != 0 {
		t.Errorf("%+v", st)
	}
	if _, err := New(Config{URL: "postgres://user:secret@host:port/db"}); err == nil || strings.Contains(err.Error(), "secret") {
		t.Error(err)
	}
	d := Config{}.withDefaults()
	if d.MaxReads != 8 || d.MaxWrites != 4 || d.QueryTimeout != 2*time.Second || d.Window != time.Hour || d.Log == nil {
		t.Errorf("%+v", d)
	}
	several := openURL(t, Config{URL: "postgres://a,b/db"})
	if several.pool.Config().ConnConfig.ValidateConnect == nil {
		t.Error("a standby would do")
	}
	if s.pool.Config().ConnConfig.ValidateConnect != nil {
		t.Error("a single host is asked what it is")
	}
}

func TestNothingListens(t *testing.T) {
	s := openURL(t, Config{URL: "postgres:///db?host=" + t.TempDir()})
	for name, err := range map[string]error{
		"ping":   s.Ping(testContext(t)),
		"schema": s.EnsureSchema(testContext(t)),
		"fence":  s.Fence(testContext(t), "", nothing),
		"strike": s.Strike(testContext(t), []int64{1}),
	} {
		if !Unavailable(err) || Overloaded(err) || Uncertain(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, question := range []func(error) bool{Unavailable, Uncertain, BadData, Overloaded, Retryable, ReadOnly} {
		if question(nil) || question(errors.New("something")) {
			t.Error("an error of nobody's is classified")
		}
	}
}
