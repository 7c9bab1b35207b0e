package fallback

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"cacheproxy/internal/testenv"
	"cacheproxy/policy"
)

func TestWritersOfAKeyTakeTurns(t *testing.T) {
	one := open(t)
	two := twin(t, one, nil)
	k := refs("r", "k")
	first := begin(t, one, k)

	type opened struct {
		tx  *Tx
		err error
	}
	second := make(chan opened)
	go func() {
		tx, err := two.Begin(testContext(t), k)
		second <- opened{tx, err}
	}()
	blocked(t, one, 1)
	// Another key's writer passes (its lock is another one).
	if lockID("k") == lockID("j") {
		t.Fatal("choose other keys")
	}
	begin(t, two, refs("r", "j")).Rollback()

	_, err := first.Commit(testContext(t), []policy.Change{put(k[0], "from one")}, CommitOptions{})
	must(t, err)
	got := <-second
	must(t, got.err)
	defer got.tx.Rollback()
	if got.tx.Number() <= first.Number() {
		t.Errorf("the second writer drew %d after %d", got.tx.Number(), first.Number())
	}
	// The rows are read under the lock: the second sees what the first has committed.
	if rows := got.tx.Rows(); string(rows[0].Value) != "from one" {
		t.Errorf("the second writer sees %q", rows[0].Value)
	}
}

func TestBeginIsOneRoundTrip(t *testing.T) {
	var n counter
	s, err := newStore(Config{URL: testenv.Postgres(t), QueryTimeout: slow}, &n)
	must(t, err)
	t.Cleanup(s.Close)
	must(t, s.EnsureSchema(testContext(t)))
	r := refs("r", "a", "b", "c")

	n = counter{}
	tx := begin(t, s, r)
	if n != (counter{batches: 1, statements: 5}) {
		t.Errorf("Begin took %+v", n)
	}
	n = counter{}
	_, err = tx.Commit(testContext(t), []policy.Change{put(r[0], "1"), {Ref: r[1], Op: policy.Delete}, {Ref: r[2], Op: policy.Drop}},
		CommitOptions{Journal: r, Known: []int64{0, 1, 2}})
	must(t, err)
	if n != (counter{batches: 1, statements: 4}) {
		t.Errorf("Commit took %+v", n)
	}
	n = counter{}
	read(t, s, r...)
	if n != (counter{batches: 1, statements: 1}) {
		t.Errorf("Load of one route took %+v", n)
	}
	n = counter{}
	read(t, s, r[0], policy.Ref{Route: "q", Key: "z"})
	if n != (counter{batches: 1, statements: 2}) {
		t.Errorf("Load of two routes took %+v", n)
	}
	n = counter{}
	_, err = s.Poll(testContext(t), 0)
	must(t, err)
	if n.batches != 1 || n.queries != 0 {
		t.Errorf("Poll took %+v", n)
	}
}

// Random groups of several stores that increment counters: no deadlock, and no increment is lost.
func TestRandomGroupsNeitherBlockNorLose(t *testing.T) {
	one := open(t)
	stores := []*Store{one, twin(t, one, nil), twin(t, one, nil)}
	const keys, rounds = 12, 40
	var wg sync.WaitGroup
	errs := make(chan error, 6)
	var mu sync.Mutex
	committed := map[string]int{} // guarded by mu
	for w := range 6 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			rnd := rand.New(rand.NewPCG(uint64(w), 1))
			for range rounds {
				var group []policy.Ref
				for _, k := range rnd.Perm(keys)[:1+rnd.IntN(keys)] {
					group = append(group, policy.Ref{Route: "r", Key: fmt.Sprintf("k%d", k)})
				}
				tx, err := stores[w%3].Begin(testContext(t), group)
				if err != nil {
					errs <- err
					return
				}
				var changes []policy.Change
				for i, row := range tx.Rows() {
					changes = append(changes, put(group[i], string(row.Value)+"x"))
				}
				rnd.Shuffle(len(changes), func(i, j int) { changes[i], changes[j] = changes[j], changes[i] })
				if _, err := tx.Commit(testContext(t), changes, CommitOptions{}); err != nil {
					errs <- err
					return
				}
				mu.Lock()
				for _, c := range changes {
					committed[c.Ref.Key]++
				}
				mu.Unlock()
			}
		}()
	}
	wg.Wait()
	select {
	case err := <-errs:
		t.Fatal(err)
	default:
	}
	for i := range keys {
		k := fmt.Sprintf("k%d", i)
		if rows := read(t, one, policy.Ref{Route: "r", Key: k}); len(rows[0].Value) != committed[k] {
			t.Errorf("%s: %d of %d increments are left", k, len(rows[0].Value), committed[k])
		}
	}
}

func TestAHugeGroupTakesTheWholeStore(t *testing.T) {
	s := open(t)
	var keys []policy.Ref
	var changes []policy.Change
	for i := range 3000 {
		keys = append(keys, policy.Ref{Route: "r", Key: fmt.Sprint("key", i)})
		changes = append(changes, put(keys[i], "v"))
	}
	tx := begin(t, s, keys)
	if n := ask[int](t, s, `SELECT count(*) FROM pg_locks l JOIN pg_database d ON d.oid = l.database
		WHERE d.datname = current_database() AND locktype = 'advisory'`); n != 1 {
		t.Errorf("%d locks are held", n)
	}
	done := make(chan error)
	go func() {
		tx, err := s.Begin(testContext(t), refs("r", "another"))
		if err == nil {
			tx.Rollback()
		}
		done <- err
	}()
	blocked(t, s, 1)
	_, err := tx.Commit(testContext(t), changes, CommitOptions{Journal: keys})
	must(t, err)
	must(t, <-done)
	if got := states(read(t, s, keys...)); got != strings.Repeat("L", len(keys)) {
		t.Error("rows are missing")
	}
}

func TestLockIDsAscendWithoutRepetition(t *testing.T) {
	var keys []policy.Ref
	for i := range 20_000 {
		keys = append(keys, policy.Ref{Key: fmt.Sprint(i)})
	}
	ids := lockIDs(keys)
	if len(ids) < keyLocks*9/10 || len(ids) > keyLocks || !slices.IsSorted(ids) || ids[0] < 0 || ids[len(ids)-1] >= keyLocks {
		t.Errorf("%d ids from %d to %d", len(ids), ids[0], ids[len(ids)-1])
	}
	// Sidecars of all versions must agree on these.
	for key, want := range map[string]int32{"": 0xcd9, "a": 0xd20, "emg_analysis:1": 0xcdd, "ключ": 0xc25} {
		if id := lockID(key); id != want {
			t.Errorf("the lock of %q is %#x", key, id)
		}
	}
}

func TestLastChangeOfAKeyWins(t *testing.T) {
	s := open(t)
	a, b, c := policy.Ref{Route: "r", Key: "a"}, policy.Ref{Route: "r", Key: "b"}, policy.Ref{Route: "r", Key: "c"}
	write(t, s, lasting(put(c, "old"), policy.ExpiresIn, 3_600_000))
	changes := []policy.Change{
		put(b, "1"), put(a, "1"), put(b, "2"), {Ref: a, Op: policy.Delete},
		{Ref: c, Op: policy.Delete}, lasting(put(c, "new"), policy.KeepExpiry, 0),
		lasting(put(b, "3"), policy.ExpiresIn, 60_000), lasting(put(b, "4"), policy.KeepExpiry, 0),
	}
	write(t, s, changes...)
	rows := read(t, s, a, b, c)
	if states(rows) != "TLL" || string(rows[1].Value) != "4" || rows[1].TTL <= 0 || rows[1].TTL > 60_000 ||
		string(rows[2].Value) != "new" || rows[2].TTL != -1 {
		t.Errorf("%+v", rows)
	}
	if string(changes[0].Value) != "1" || changes[0].Ref != b {
		t.Error("the caller's slice was changed")
	}
}

func TestDeleteLeavesATombstoneAndDropNothing(t *testing.T) {
	s := open(t)
	a, b := policy.Ref{Route: "r", Key: "a"}, policy.Ref{Route: "r", Key: "b"}
	write(t, s, lasting(put(a, "{}"), policy.ExpiresIn, 60_000), put(b, "x"))
	write(t, s, policy.Change{Ref: a, Op: policy.Delete}, policy.Change{Ref: b, Op: policy.Drop})
	rows := read(t, s, a, b)
	if states(rows) != "TA" || rows[0].Value != nil || rows[0].TTL != -1 || rows[0].ExpiresAt != -1 {
		t.Errorf("%+v", rows)
	}
	if n := ask[int](t, s, `SELECT count(*) FROM cacheproxy.entries`); n != 1 {
		t.Errorf("%d rows", n)
	}
}

func TestExpiry(t *testing.T) {
	s := open(t)
	k := policy.Ref{Route: "r", Key: "k"}
	now := func() int64 {
		return ask[int64](t, s, `SELECT floor(extract(epoch FROM clock_timestamp()) * 1000)::bigint`)
	}

	before := now()
	write(t, s, lasting(put(k, "v"), policy.ExpiresIn, 123_456))
	after := now()
	row := read(t, s, k)[0]
	if row.ExpiresAt < before+123_456 || row.ExpiresAt > after+123_456 || row.TTL <= 0 || row.TTL > 123_456 {
		t.Errorf("in: %+v between %d and %d", row, before, after)
	}
	for _, at := range []int64{4_102_444_800_123, 4_102_444_799_999, 253_402_300_799_001} {
		write(t, s, lasting(put(k, "v"), policy.ExpiresAt, at))
		if row = read(t, s, k)[0]; row.ExpiresAt != at || row.TTL > at-after || row.TTL < at-now() {
			t.Errorf("at %d: %+v", at, row)
		}
		write(t, s, lasting(put(k, "w"), policy.KeepExpiry, 0))
		if row = read(t, s, k)[0]; row.ExpiresAt != at || string(row.Value) != "w" {
			t.Errorf("kept %d: %+v", at, row)
		}
	}
	// What Redis allows and timestamptz cannot hold lasts as long as it can.
	for _, kind := range []policy.ExpiryKind{policy.ExpiresIn, policy.ExpiresAt} {
		write(t, s, lasting(put(k, "v"), kind, 1<<62))
		if row = read(t, s, k)[0]; row.State != policy.Live || row.TTL < maxExpiry/2 {
			t.Errorf("far away: %+v", row)
		}
	}
	// The past, however it is said, is past; and it keeps nothing.
	for _, c := range []policy.Expiry{{Kind: policy.ExpiresAt, MS: 1}, {Kind: policy.ExpiresAt, MS: -5}, {Kind: policy.ExpiresIn, MS: 0}, {Kind: policy.ExpiresIn, MS: -1}} {
		write(t, s, lasting(put(k, "v"), c.Kind, c.MS))
		if got := states(read(t, s, k)); got != "T" {
			t.Errorf("%+v: %s", c, got)
		}
	}
	write(t, s, lasting(put(k, "v"), policy.KeepExpiry, 0))
	if row = read(t, s, k)[0]; row.State != policy.Live || row.ExpiresAt != -1 {
		t.Errorf("kept from an expired row: %+v", row)
	}
	write(t, s, policy.Change{Ref: k, Op: policy.Delete})
	write(t, s, lasting(put(k, "v"), policy.KeepExpiry, 0))
	if row = read(t, s, k)[0]; row.State != policy.Live || row.ExpiresAt != -1 {
		t.Errorf("kept from a tombstone: %+v", row)
	}
	// A short life ends.
	write(t, s, lasting(put(k, "v"), policy.ExpiresIn, 30))
	eventually(t, func() bool { return states(read(t, s, k)) == "T" })
}

// Whoever asks is told that the key is gone, and not that nothing is known of it.
func TestAnExpiredRowReadsAsATombstone(t *testing.T) {
	s := open(t)
	text, bytes, empty := policy.Ref{Route: "r", Key: "text"}, policy.Ref{Route: "q", Key: "bytes"}, policy.Ref{Route: "r", Key: "empty"}
	keys := []policy.Ref{text, bytes, empty, {Route: "r", Key: "never"}}
	write(t, s, lasting(put(text, `{"a": 1}`), policy.ExpiresAt, 1), lasting(put(bytes, "\x00"), policy.ExpiresAt, 1),
		lasting(put(empty, ""), policy.ExpiresAt, 1))
	look := func(want string) {
		t.Helper()
		tx := begin(t, s, keys)
		defer tx.Rollback()
		for _, rows := range [][]policy.Row{read(t, s, keys...), tx.Rows()} {
			if got := states(rows); got != want {
				t.Errorf("%s, want %s", got, want)
			}
			for i, row := range rows {
				if row.Value != nil || row.TTL != -1 || row.ExpiresAt != -1 {
					t.Errorf("%s: %+v", keys[i].Key, row)
				}
			}
		}
	}
	look("TTTA")
	// A fence kills it like every other row.
	must(t, s.Fence(testContext(t), "q", nothing))
	look("TATA")
	if n := sweep(t, s); n != 3 {
		t.Errorf("swept %d", n)
	}
	look("TATA")
}

func TestRollbackChangesNothingAndMayBeRepeated(t *testing.T) {
	s := open(t)
	k := refs("r", "k")
	ctx, cancel := context.WithCancel(testContext(t))
	tx, err := s.Begin(ctx, k)
	must(t, err)
	cancel() // a dead context keeps nobody from giving the connection back
	tx.Rollback()
	tx.Rollback()
	if _, err := tx.Commit(testContext(t), []policy.Change{put(k[0], "v")}, CommitOptions{}); !errors.Is(err, errEnded) || Uncertain(err) {
		t.Error(err)
	}
	if st := s.Stats(); st.InUse != 0 || st.Writes.Busy != 0 || st.Open != 1 {
		t.Errorf("%+v", st)
	}
	tx = begin(t, s, k)
	_, err = tx.Commit(testContext(t), nil, CommitOptions{})
	must(t, err)
	tx.Rollback()
	if st := s.Stats(); st.InUse != 0 || st.Writes.Busy != 0 || st.Open != 1 {
		t.Errorf("%+v", st)
	}
	if got := states(read(t, s, k[0])); got != "A" {
		t.Error(got)
	}
}

func TestCommitRefusesAKeyThatIsNotLocked(t *testing.T) {
	s := open(t)
	tx := begin(t, s, refs("r", "mine"))
	_, err := tx.Commit(testContext(t), []policy.Change{put(policy.Ref{Route: "r", Key: "yours"}, "v")}, CommitOptions{})
	if !errors.Is(err, errNotLocked) || strings.Contains(err.Error(), "yours") {
		t.Error(err)
	}
	if st := s.Stats(); st.InUse != 0 || st.Writes.Busy != 0 {
		t.Errorf("%+v", st)
	}
}

// A transaction that idles gives its locks back. What its Commit says depends on how far the news of the end has
// come: the server's own word, or a connection that broke before or after something was sent.
func TestAnIdleTransactionIsEnded(t *testing.T) {
	one := open(t)
	dead := twin(t, one, func(c *Config) { c.URL = withParam(t, c.URL, "idle_in_transaction_session_timeout", "50") })
	k := refs("r", "k")
	tx := begin(t, dead, k)
	begin(t, one, k).Rollback() // waits until the server has ended the other
	_, err := tx.Commit(testContext(t), []policy.Change{put(k[0], "late")}, CommitOptions{})
	if err == nil || !Retryable(err) && !Uncertain(err) && !Unavailable(err) {
		t.Error(err)
	}
	if got := states(read(t, one, k[0])); got != "A" {
		t.Error(got)
	}
}

func TestALockNotHadInTimeIsRetryable(t *testing.T) {
	one := open(t)
	hasty := twin(t, one, func(c *Config) { c.URL = withParam(t, c.URL, "lock_timeout", "20") })
	k := refs("r", "k")
	tx := begin(t, one, k)
	_, err := hasty.Begin(testContext(t), k)
	if !Retryable(err) || Unavailable(err) || Uncertain(err) {
		t.Error(err)
	}
	tx.Rollback()
	begin(t, hasty, k).Rollback()
}

func TestTheCallersDeadlineHolds(t *testing.T) {
	s := open(t)
	k := refs("r", "k")
	tx := begin(t, s, k)
	ctx, cancel := context.WithTimeout(testContext(t), 50*time.Millisecond)
	defer cancel()
	_, err := s.Begin(ctx, k)
	if !errors.Is(err, context.DeadlineExceeded) || !Unavailable(err) {
		t.Error(err)
	}
	gone, leave := context.WithCancel(testContext(t))
	leave()
	if _, err := s.Load(gone, k); !errors.Is(err, context.Canceled) || Unavailable(err) {
		t.Error(err)
	}
	tx.Rollback()
	eventually(t, func() bool { return s.Stats().InUse == 0 })
}

func TestQueryTimeoutHoldsWithoutADeadline(t *testing.T) {
	s := open(t)
	quick := twin(t, s, func(c *Config) { c.QueryTimeout = 300 * time.Millisecond })
	conn, err := s.pool.Acquire(testContext(t))
	must(t, err)
	defer conn.Release()
	tx, err := conn.Begin(testContext(t))
	must(t, err)
	_, err = tx.Exec(testContext(t), `LOCK TABLE cacheproxy.entries IN ACCESS EXCLUSIVE MODE`)
	must(t, err)
	_, err = quick.Load(context.Background(), refs("r", "k"))
	if err == nil || !Unavailable(err) && !Retryable(err) {
		t.Error(err)
	}
	must(t, tx.Rollback(testContext(t)))
}

// A plan outdated by a change of the schema is made again behind the caller's back.
func TestAnOutdatedPlanIsTriedAgain(t *testing.T) {
	s := openURL(t, Config{URL: testenv.Postgres(t), MaxReads: 1})
	must(t, s.EnsureSchema(testContext(t)))
	sql(t, s, `CREATE TABLE w (a int)`)
	f := func(ctx context.Context, c *pgx.Conn) error {
		rows, err := c.Query(ctx, `SELECT * FROM w`)
		if err != nil {
			return err
		}
		rows.Close()
		return rows.Err()
	}
	must(t, s.do(testContext(t), s.reads, "look", f))
	sql(t, s, `ALTER TABLE w ADD COLUMN b int`)
	must(t, s.do(testContext(t), s.reads, "look", f))
}
