package proxy

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"time"

	"cacheproxy/internal/said"
	"cacheproxy/policy"

	"go.uber.org/zap"
)

// Store is the JSONB side as the data path needs it. Every method is bounded by its context and by the
// store's own deadline; none keeps a slice that it is given.
type Store interface {
	// Load reads the keys, in the order of refs. A row that has expired is a Tombstone.
	Load(ctx context.Context, refs []policy.Ref) ([]policy.Row, error)
	// Look is Load for a caller that needs no values: those of its rows are empty.
	Look(ctx context.Context, refs []policy.Ref) ([]policy.Row, error)
	// Begin opens a transaction that holds the key locks of refs, which are distinct.
	Begin(ctx context.Context, refs []policy.Ref) (Tx, error)
	// Lock is Begin for a caller that needs no values: those of its rows are empty.
	Lock(ctx context.Context, refs []policy.Ref) (Tx, error)
	// Poll reads what every sidecar must know: the clock, the phases in use, and a page of the journal: what lies behind the entry
	// named.
	Poll(ctx context.Context, after int64) (StorePoll, error)
	// Register notes that a route is served in a phase, before it is.
	Register(ctx context.Context, route, phase string) error
	// Forget takes a registered phase back.
	Forget(ctx context.Context, route, phase string) error
	// Seen notes that routes[i] is still served in phases[i].
	Seen(ctx context.Context, routes, phases []string) error
	// Standing tells what the store knows about a route's phases and rows, and the keys of at most so many live rows. With less than 0
	// no row is looked at: there may be no table any more.
	Standing(ctx context.Context, route string, rows int) (StoreStanding, error)
	// ChangedSince pages through the keys of rows and tombstones changed at or after since (zero: all), after the key named.
	ChangedSince(ctx context.Context, since time.Time, after string, limit int) ([]policy.Ref, error)
	// Fence makes all rows of scope (a route, or "" for all) dead, while during runs; nobody else writes meanwhile.
	Fence(ctx context.Context, scope string, during func(context.Context) error) error

	// Lift makes the next numbers higher than above: Postgres may have forgotten some in a crash, and Redis refuses lower ones. It tells
	// whether they were not already.
	Lift(ctx context.Context, above int64) (lifted bool, err error)

	// JSON tells whether a value can be stored as jsonb.
	JSON(value []byte) bool

	// Questions about errors of the above.
	Unavailable(err error) bool // the store cannot be reached or cannot work
	Uncertain(err error) bool   // a Commit may or may not have happened
	BadData(err error) bool     // the store refused a value as JSON
	Rejected(err error) bool    // a constraint or a trigger of the application's table refused a change
	Overloaded(err error) bool  // shed: too much is waiting
}

// Tx is a transaction that holds key locks.
type Tx interface {
	// Number is the rising fence number drawn under the locks.
	Number() int64
	// Rows are the rows as they were after the locks were taken, in the order of refs.
	Rows() []policy.Row
	// Commit applies the changes and commits, and with them a journal entry ("Redis is stale") for the keys in journal. known, if it
	// is not nil, names for each an entry that has it (0: none): a key whose entry is not struck needs no other. intent is 0 if
	// no entry was made.
	Commit(ctx context.Context, changes []policy.Change, journal []policy.Ref, known []int64, rawOnly bool) (intent int64, err error)
	// Strike removes entries as part of this transaction and returns those that were there. All their keys must be locked by it.
	// The rows of their keys count as changed now: ChangedSince must find what Redis was told because of them.
	Strike(ctx context.Context, ids []int64) ([]Intent, error)
	// Named tells which of keys, locked by this transaction, an entry of the journal names.
	Named(ctx context.Context, keys []string) (map[string]bool, error)
	// Recalls tells of keys, locked by this transaction, that have no row in their columns, whether the store knows something of one of them all the same: an entry names it,
	// or a row that somebody inserts would make it read as deleted. A change that drops the key has that forgotten.
	Recalls(ctx context.Context, keys []string) (bool, error)
	// Rollback gives the locks back; after Commit it does nothing.
	Rollback()
}

// StorePoll is what Store.Poll answers.
type StorePoll struct {
	Now     time.Time // the store's clock
	Intents []Intent  // oldest first
	More    bool      // there are more than these
	Phases  map[string][]string
}

// StoreStanding is what Store.Standing answers.
type StoreStanding struct {
	Phases  []PhaseSeen
	Longest time.Duration // the longest life that a row of the route has left, as an upper bound; 0: none has an end
	Keys    []string      // of live rows, as many as were asked for
	Partial bool          // they are fewer, and there may be more among rows that were not looked at
}

// PhaseSeen is a phase in which a route has been served: how long ago that was first said, and last.
type PhaseSeen struct {
	Phase       string
	Since, Seen time.Duration
}

// Intent is one journal entry: Redis's copies of these keys are stale.
type Intent struct {
	ID   int64
	Refs []policy.Ref
	Age  time.Duration
}

var errStoreDown error = said.Sentence("postgres is down")

// storeGuard is the breaker in front of the store. While it is open nobody waits: calls fail at once, and the
// journal's poll is the probe that closes it again.
type storeGuard struct {
	Store
	clock *offset
	stats *counters
	log   *zap.Logger
	up    atomic.Bool
	mu    sync.Mutex
	why   string    // guarded by mu
	since time.Time // guarded by mu
	opens int64     // guarded by mu
	wake  chan struct{}
}

func newStoreGuard(s Store, clock *offset, stats *counters, log *zap.Logger) *storeGuard {
	return &storeGuard{Store: s, clock: clock, stats: stats, log: log, since: time.Now(), wake: make(chan struct{}, 1)}
}

// note opens the breaker if err says that the store cannot be had, and returns err.
func (g *storeGuard) note(op string, err error) error {
	if err == nil || !g.Unavailable(err) {
		return err
	}
	g.mu.Lock()
	was := g.why
	g.why = op
	if g.up.Swap(false) {
		g.opens++
		g.since = time.Now()
		was = ""
	}
	g.mu.Unlock()
	if was == "" {
		g.log.Warn("postgres is not usable", zap.String("operation", op), zap.Error(err))
	}
	select {
	case g.wake <- struct{}{}:
	default:
	}
	return err
}

// ok closes the breaker.
func (g *storeGuard) ok() {
	if g.up.Load() {
		return
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if !g.up.Swap(true) {
		g.why, g.since = "", time.Now()
		g.log.Info("postgres is usable")
	}
}

// Poll is the store's, and a look at its clock.
func (g *storeGuard) Poll(ctx context.Context, after int64) (StorePoll, error) {
	asked, began := localNow(), monotonic()
	p, err := g.Store.Poll(ctx, after)
	g.took(storePoll, began, err)
	if err == nil {
		g.clock.saw(asked, localNow(), p.Now.UnixMicro())
	}
	return p, err
}

func (g *storeGuard) load(ctx context.Context, refs []policy.Ref) ([]policy.Row, error) {
	if err := ctx.Err(); err != nil {
		return nil, err // the caller's time is over, which says nothing about the store
	}
	if !g.up.Load() {
		g.stats.found[foundError].Add(int64(len(refs)))
		return nil, errStoreDown
	}
	began := monotonic()
	rows, err := g.Load(ctx, refs)
	g.took(storeRead, began, err)
	g.found(refs, rows, err)
	return rows, g.note("read", err)
}

func (g *storeGuard) begin(ctx context.Context, refs []policy.Ref) (Tx, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if !g.up.Load() {
		return nil, errStoreDown
	}
	began := monotonic()
	tx, err := g.Begin(ctx, refs)
	g.took(storeLock, began, err)
	return g.timed(tx, g.note("begin", err))
}

func (g *storeGuard) lock(ctx context.Context, refs []policy.Ref) (Tx, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if !g.up.Load() {
		return nil, errStoreDown
	}
	began := monotonic()
	tx, err := g.Lock(ctx, refs)
	g.took(storeLock, began, err)
	return g.timed(tx, g.note("lock", err))
}

// took counts how long the store has taken. A call that was shed has not reached it.
func (g *storeGuard) took(op operation, began int64, err error) {
	if err == nil || !g.Overloaded(err) {
		g.stats.took[op].since(began)
	}
}

// found counts what came of keys that the store was asked for.
func (g *storeGuard) found(refs []policy.Ref, rows []policy.Row, err error) {
	count := func(f found, n int) { g.stats.found[f].Add(int64(n)) }
	switch {
	case err == nil:
		there := 0
		for _, row := range rows {
			if row.State != policy.Absent && row.State != policy.Tombstone {
				there++
			}
		}
		count(foundRow, there)
		count(foundAbsent, len(refs)-there)
	case g.Overloaded(err):
		count(foundShed, len(refs))
	case errors.Is(err, context.DeadlineExceeded):
		count(foundTimeout, len(refs))
	default:
		count(foundError, len(refs))
	}
}

// timed is tx, whose commit is timed.
func (g *storeGuard) timed(tx Tx, err error) (Tx, error) {
	if err != nil {
		return nil, err
	}
	return timedTx{tx, g}, nil
}

type timedTx struct {
	Tx
	g *storeGuard
}

func (t timedTx) Commit(ctx context.Context, changes []policy.Change, journal []policy.Ref, known []int64, rawOnly bool) (int64, error) {
	began := monotonic()
	intent, err := t.Tx.Commit(ctx, changes, journal, known, rawOnly)
	t.g.took(storeCommit, began, err)
	return intent, err
}

// gone tells whether err means that the store could not be had at all.
func (g *storeGuard) gone(err error) bool {
	return errors.Is(err, errStoreDown) || g.Unavailable(err)
}
