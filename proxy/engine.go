package proxy

import (
	"context"
	"errors"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"cacheproxy/internal/said"
	"cacheproxy/policy"

	"go.uber.org/zap"
)

// Config says how the data path behaves; zero fields mean what their comment says.
type Config struct {
	Redis        RedisConfig
	Routes       []policy.Route
	Poll         time.Duration // how often both journals are looked at, at the least; 0: 500 ms
	Probe        time.Duration // first pause between attempts to reach a store that is down; 0: 100 ms
	ProbeMax     time.Duration // longest pause; 0: 1 s
	StoreTimeout time.Duration // bounds one use of the store; 0: 2 s
	MaxValue     int           // bytes of a value that is to have a copy in the store; 0: 32 MiB
	Window       time.Duration // how far back a failover may lose writes; 0: 1 h
	Sample       float64       // share of hits whose two copies are compared behind the clients' backs; 0: none
	Instance     string        // names this sidecar in leases and marks; unique in the fleet
	Log          *zap.Logger   // nil: none
}

func (c Config) withDefaults() Config {
	set := func(d *time.Duration, v time.Duration) {
		if *d <= 0 {
			*d = v
		}
	}
	set(&c.Poll, 500*time.Millisecond)
	set(&c.Probe, 100*time.Millisecond)
	set(&c.ProbeMax, time.Second)
	set(&c.StoreTimeout, 2*time.Second)
	set(&c.Window, time.Hour)
	if c.MaxValue <= 0 {
		c.MaxValue = 32 << 20
	}
	set(&c.Redis.Timeout, 250*time.Millisecond)
	set(&c.Redis.DialTimeout, time.Second)
	if c.Redis.Connections <= 0 {
		c.Redis.Connections = min(max(1, runtime.GOMAXPROCS(0)/2), maxConnections)
	}
	if c.Log == nil {
		c.Log = zap.NewNop()
	}
	return c
}

// maxConnections: more loops than three would each have too little to do to gather much, and Redis has one thread.
const maxConnections = 3

// engine is the data path behind the sessions: the relation to Redis and to the store, and the protocols of
// docs/consistency.md between them. Sessions hand it work and get answers as events.
type engine struct {
	cfg     Config
	id      string
	log     *zap.Logger
	up      *upstream
	store   *storeGuard // its Store is never nil; without one configured it is noStore
	journal *journal
	fill    *filler
	write   *writer
	generic *runner
	shadow  *shadow
	stats   *counters
	clocks  clocks
	router  atomic.Pointer[policy.Router]
	telling sync.Mutex                  // held while phases change, and while Postgres is told those in use
	deny    atomic.Pointer[policy.Deny] // nil denies nothing
	learned learned
	inPart  atomic.Pointer[partial] // nil: the data set that was verified last was so in whole
	wg      sync.WaitGroup
}

// partial is a data set that has been verified as far as it concerns sidecars with these routes (see repairWindow).
type partial struct {
	set    string
	router *policy.Router
}

var errOvertaken error = said.Sentence("overtaken by another writer")

func newEngine(cfg Config, store Store) (*engine, error) {
	cfg = cfg.withDefaults()
	d, err := newDialer(cfg.Redis)
	if err != nil {
		return nil, err
	}
	e := &engine{cfg: cfg, id: cfg.Instance, log: cfg.Log, stats: newCounters()}
	e.up = newUpstream(d, cfg.Redis.Timeout, cfg.Probe, cfg.ProbeMax, cfg.Redis.Connections, &e.stats.took, cfg.Log)
	e.up.recover = e.recover
	e.up.trustedAgain = func() { e.journal.kick() }
	e.store = newStoreGuard(store, &e.clocks.store, e.stats, cfg.Log)
	e.journal = newJournal(e)
	e.fill = newFiller(e)
	e.write = newWriter(e)
	e.generic = newRunner(e)
	e.shadow = newShadow(e)
	e.shadow.set(cfg.Sample)
	router, err := policy.NewRouter(cfg.Routes)
	if err != nil {
		return nil, err
	}
	for _, r := range router.Routes() {
		e.stats.begin(r.Name)
	}
	e.router.Store(router)
	breakRules(e)
	return e, nil
}

// run does the engine's background work until ctx ends, and returns when all of it has stopped.
func (e *engine) run(ctx context.Context) {
	start := func(f func(context.Context)) {
		e.wg.Add(1)
		go func() {
			defer e.wg.Done()
			f(ctx)
		}()
	}
	start(e.up.run)
	start(e.up.expireLoop)
	start(e.up.spareLoop)
	start(e.fill.run)
	start(e.write.run)
	if e.usesStore() {
		start(e.journal.run)
		start(e.shadow.run)
		start(e.beats)
	}
	e.wg.Wait()
	e.generic.close()
	e.up.closeLanes()
}

// usesStore: a store is configured.
func (e *engine) usesStore() bool { _, none := e.store.Store.(noStore); return !none }

// ref names a key found in a journal.
func (e *engine) ref(key string) policy.Ref {
	if r := e.router.Load().Match([]byte(key)); r != nil {
		return policy.Ref{Route: r.Name, Key: key}
	}
	return policy.Ref{Key: key}
}

// keepsRows: in the key's phase the store holds the value of every write.
func (e *engine) keepsRows(ref policy.Ref) bool {
	r := e.router.Load().Match([]byte(ref.Key))
	if r == nil {
		return false
	}
	return r.Phase.Rules().Write.KeepsRow()
}

// readsStore: the key's phase, if it has one, answers from the store. Where it does not, nothing in Redis changes because of a row.
func (e *engine) readsStore(ref policy.Ref) bool {
	r := e.router.Load().Match([]byte(ref.Key))
	return r == nil || r.Phase.Rules().ReadsStore
}

// readsStores: some route's phase answers from the store.
func (e *engine) readsStores() bool {
	return slices.ContainsFunc(e.router.Load().Routes(), func(r policy.Route) bool { return r.Phase.Rules().ReadsStore })
}

// mayBeInRedis: some sidecar serves or served the route in a phase whose writes only Redis holds, or the key may have been written before it had a row, so a
// missing row says nothing. A phase that does not read Redis was not entered before the store had everything.
func (e *engine) mayBeInRedis(r *policy.Route) bool {
	if r.Column() {
		return true
	}
	if !r.Phase.Rules().ReadsRedis {
		return false
	}
	redisOnly := func(p policy.Phase) bool { return !p.Rules().Write.KeepsRow() }
	if redisOnly(r.Phase) {
		return true
	}
	e.journal.mu.Lock()
	words := e.journal.phases[r.Name]
	e.journal.mu.Unlock()
	for _, w := range words {
		if p, err := policy.ParsePhase(w); err == nil && redisOnly(p) {
			return true
		}
	}
	return false
}

// unknown is the answer to a read that missed Redis while the store could not be asked.
func (e *engine) unknown(r *policy.Route, err error) answer {
	switch {
	case e.store.Overloaded(err):
		e.stats.shed.Add(1)
		return answer{fail: unavailable(r, "too many reads wait for the store")}
	case r.OnUnknown == policy.UnknownError:
		return answer{fail: unavailable(r, "postgres may hold the key and cannot be asked")}
	}
	return answer{ttl: -2}
}

// redisFailed draws the consequence of an error of Redis: a dead one opens the breaker.
func (e *engine) redisFailed(err error) {
	why := classifyError(err)
	e.stats.redisError(why)
	if why.dead() {
		e.up.suspect(why)
	}
}

// repairMarks repairs keys that a writer found marked, so that it need not wait for the next poll.
func (e *engine) repairMarks(ctx context.Context, refs []policy.Ref) {
	for len(refs) > 0 {
		n := min(len(refs), maxRepair)
		struck, err := e.journal.repairMarks(ctx, refs[:n])
		if err != nil || struck == 0 {
			time.Sleep(heldPoll) // the writer tries again, a bounded number of times; what both journals name waits for the repair of its entry
			return
		}
		refs = refs[n:]
	}
}

// recoveryMargin covers the time between the moment a row is stamped and the moment its write reaches Redis: no
// transaction outlives it (idle ones are ended by the server after 5 s).
const recoveryMargin = 15 * time.Second

// recoveryTime bounds one recovery; what is not done by then is begun again at the next attempt.
const recoveryTime = 60 * time.Second

// recover makes Redis's copies right before they are trusted (docs/consistency.md, "Outages, restarts, failovers").
func (e *engine) recover(ctx context.Context, l *link) error {
	if !e.storeInUse() {
		return nil
	}
	return e.verify(ctx, l)
}

// verify compares Redis's copies with what the store and the journals say.
func (e *engine) verify(ctx context.Context, l *link) error {
	ctx, cancel := context.WithTimeout(ctx, recoveryTime)
	defer cancel()
	pgErr := e.journal.pollStore(ctx, true)
	clock, set, err := e.readClock(ctx)
	if err != nil {
		return err
	}
	here := dataSet(l)
	part := e.inPart.Load()
	same := set == here || part != nil && part.set == here // as at the last connection
	switch {
	case set == here:
	case part != nil && *part == partial{here, e.router.Load()}, set == here+inPart && !e.readsStores():
		e.inPart.Store(&partial{here, e.router.Load()})
	default:
		if pgErr != nil {
			if empty, err := e.emptyRedis(ctx); err != nil || !empty {
				return &outageError{why: outOther, reply: "UNVERIFIED redis was restarted or replaced, and postgres cannot tell what its data lacks"}
			}
		} else if left, err := e.repairWindow(ctx, clock); err != nil {
			return err
		} else if left {
			e.inPart.Store(&partial{here, e.router.Load()})
		} else {
			e.inPart.Store(nil)
		}
	}
	// The journals: what they name is known before Redis is trusted, and its keys are kept from the side that is stale until they are
	// repaired. Without Postgres its entries cannot be read; those known from before still count.
	var stamp time.Time
	if pgErr == nil {
		e.journal.mu.Lock()
		stamp = e.journal.clock
		e.journal.mu.Unlock()
	}
	e.up.mu.Lock()
	e.up.runID, e.up.replID = l.runID, l.replID
	e.up.mu.Unlock()
	// Its data is verified by now, so the clock may name it: an attempt that fails from here on need not begin with the window again.
	return e.journal.pollRedis(ctx, stamp, here, !same)
}

// readClock returns Postgres's time as a sidecar last wrote it into Redis, and the data set it wrote it into.
func (e *engine) readClock(ctx context.Context) (time.Time, string, error) {
	frame, err := e.up.do(ctx, "GET", clockName)
	if err != nil {
		return time.Time{}, "", err
	}
	text, _ := bulk(frame)
	ms, set, _ := strings.Cut(string(text), " ")
	n, err := strconv.ParseInt(ms, 10, 64)
	if err != nil {
		return time.Time{}, "", nil // no clock: nobody knows how old the data is
	}
	return time.UnixMilli(n), set, nil
}

func (e *engine) emptyRedis(ctx context.Context) (bool, error) {
	frame, err := e.up.do(ctx, "DBSIZE")
	n, _ := parseInt(frame)
	return n == 0, err
}

// repairWindow deletes in Redis every key that the store has changed since the clock: Redis may have lost
// those writes. Without a clock, or with one older than the window for which deletes are remembered, every key
// that has a row goes.
//
// Where the store is not read its rows are no reason to delete anything: what phase3 has written, the store was not told. left: there are such keys, and sidecars
// in phase2 may read their rows. They must do this again, so the clock keeps its time:
//
//	1 phase2 deletes K in Redis because of an entry, and strikes it    2 Redis fails over to a replica that still has K
//	3 drain is the first to come, leaves K alone, and sets the clock    4 phase2 finds the clock set, and serves K, for ever
//
// Once phase3 was there, whoever reads rows again fences them first, and there is nothing left.
func (e *engine) repairWindow(ctx context.Context, clock time.Time) (left bool, err error) {
	if empty, err := e.emptyRedis(ctx); err != nil || empty {
		return false, err
	}
	var since time.Time
	e.journal.mu.Lock()
	now := e.journal.clock
	e.journal.mu.Unlock()
	if !clock.IsZero() && now.Sub(clock) < e.cfg.Window {
		since = clock.Add(-recoveryMargin)
	}
	n := int64(0)
	for after := ""; ; {
		refs, err := e.store.ChangedSince(ctx, since, after, maxRepair)
		if e.store.note("window", err) != nil {
			return false, err
		}
		if len(refs) == 0 {
			break
		}
		after = refs[len(refs)-1].Key
		done, others, err := e.repairPage(ctx, refs)
		if err != nil {
			return false, err
		}
		left = left || others
		e.stats.repairs[restarted].Add(done)
		n += done
	}
	e.log.Info("redis was restarted or replaced; its copies of changed keys were dropped", zap.Int64("keys", n), zap.Bool("clock", !since.IsZero()))
	return left, nil
}

// repairPage tells how many keys it has dropped: those that have a row and no mark. left: it has left some to others.
func (e *engine) repairPage(ctx context.Context, refs []policy.Ref) (dropped int64, left bool, err error) {
	tx, err := e.store.lock(ctx, refs)
	if err != nil {
		return 0, false, err
	}
	defer tx.Rollback()
	var keys []string
	for i, row := range tx.Rows() {
		switch {
		case !speaks(row): // an expired row is a tombstone: the value it replaced is gone too
		case e.readsStore(refs[i]):
			keys = append(keys, refs[i].Key)
		default:
			r := e.router.Load().Match([]byte(refs[i].Key))
			left = left || r != nil && r.Phase.Rules().UsesStore && !e.servedWithout(r)
		}
	}
	if len(keys) == 0 {
		return 0, left, nil
	}
	rs, err := e.up.script(ctx, scriptRepair, keys, strconv.FormatInt(tx.Number(), 10), "0", "1")
	if err != nil {
		return 0, false, err
	}
	for _, r := range rs {
		switch r.code {
		case keyRefused:
			e.lift(ctx, tx, rs)
			return 0, false, errOvertaken // the next attempt does this page again
		case keyDone:
			dropped++
		}
	}
	return dropped, left, nil
}

// noStore stands where no store is configured: every route is in phase3, or there are none.
type noStore struct{}

func (noStore) Load(context.Context, []policy.Ref) ([]policy.Row, error) { return nil, errStoreDown }
func (noStore) Look(context.Context, []policy.Ref) ([]policy.Row, error) { return nil, errStoreDown }
func (noStore) Begin(context.Context, []policy.Ref) (Tx, error)          { return nil, errStoreDown }
func (noStore) Lock(context.Context, []policy.Ref) (Tx, error)           { return nil, errStoreDown }
func (noStore) Poll(context.Context, int64) (StorePoll, error)           { return StorePoll{}, errStoreDown }
func (noStore) Register(context.Context, string, string) error           { return nil }
func (noStore) Forget(context.Context, string, string) error             { return nil }
func (noStore) Seen(context.Context, []string, []string) error           { return nil }
func (noStore) Standing(context.Context, string, int) (StoreStanding, error) {
	return StoreStanding{}, errStoreDown
}
func (noStore) ChangedSince(context.Context, time.Time, string, int) ([]policy.Ref, error) {
	return nil, errStoreDown
}
func (noStore) Fence(ctx context.Context, _ string, during func(context.Context) error) error {
	return during(ctx)
}
func (noStore) Lift(context.Context, int64) (bool, error) { return false, errStoreDown }
func (noStore) JSON([]byte) bool                          { return true }
func (noStore) Unavailable(err error) bool                { return errors.Is(err, errStoreDown) }
func (noStore) Uncertain(error) bool                      { return false }
func (noStore) BadData(error) bool                        { return false }
func (noStore) Rejected(error) bool                       { return false }
func (noStore) Overloaded(error) bool                     { return false }

// storeInUse: some route's phase has a store.
func (e *engine) storeInUse() bool { return usesStore(e.router.Load()) }

// flushTime bounds FLUSHALL and its kin: the store is locked meanwhile.
const flushTime = 8 * time.Second

// flush runs a FLUSHALL, FLUSHDB or SWAPDB while the store is fenced: nobody writes between the two, and nothing is promoted (see scriptGrant).
func (e *engine) flush(raw []byte) []byte {
	ctx, cancel := context.WithTimeout(context.Background(), flushTime)
	defer cancel()
	var reply []byte
	closing := e.journal.version()
	sentIt := false
	err := e.store.Fence(ctx, "", func(ctx context.Context) error {
		// A fresh connection: one that lay idle may be dead, and nobody could tell whether the flush had run.
		l, err := e.up.dialer.dial(ctx, 2, "cacheproxy-flush")
		if err != nil {
			e.redisFailed(err)
			return err
		}
		conn := newRunConn(l)
		sentIt = true
		fs, err := conn.ask(appendCommand(nil, append([]string{"EVAL", scriptFlush.body, "1", closedName, closing, closedMS}, argvOf(raw)...)...), 1, flushTime)
		if err != nil {
			e.up.abandon(conn.link)
			conn.Close() //nolint:errcheck // given up
			e.redisFailed(err)
			return nil // it may run yet: the rows must be dead then
		}
		conn.Close() //nolint:errcheck // it has answered
		ran, ok := elements(fs[0], nil)
		if !ok || len(ran) != 2 {
			reply = fs[0]
			return errorOf(reply)
		}
		if isError(ran[1]) {
			return nil // it has run, and readers may promote what it was to end
		}
		reply = ran[0]
		return errorOf(reply)
	})
	e.reopen(ctx, closing, err)
	if err == nil {
		e.stats.fences.Add(1)
	}
	switch {
	case reply != nil && (err == nil || isError(reply)):
		if err == nil {
			e.journal.flushed()
		}
		return reply
	case sentIt:
		return e.stats.unsure(nil, "the flush was not confirmed").reply(nil)
	case e.store.gone(err):
		return unavailable(nil, "postgres cannot be reached, and its rows would survive the flush").reply(nil)
	}
	return unavailable(nil, "redis cannot be reached").reply(nil)
}

// argvOf are the words of a command.
func argvOf(raw []byte) (argv []string) {
	words, _ := elements(raw, nil)
	for _, w := range words {
		b, _ := bulk(w)
		argv = append(argv, string(b))
	}
	return argv
}

// closes is the command by which a transaction that has emptied Redis keeps readers from promoting, until reopen.
func closes(value string) []string { return []string{"SET", closedName, value, "PX", closedMS} }

// reopen lets readers promote again after a fence that ended with err. If its fate is unknown the rows may die yet, and it stays closed until that can no longer be.
func (e *engine) reopen(ctx context.Context, value string, err error) {
	if e.store.Uncertain(err) {
		return
	}
	// What fails is cured by time.
	_, _ = e.up.eval(ctx, scriptOpen, func(dst []string) []string { return append(dst, "1", closedName, value) })
}

// flushed: Redis's journal is empty by command.
func (j *journal) flushed() {
	j.mu.Lock()
	defer j.mu.Unlock()
	clear(j.marks)
	clear(j.mine)
	j.seen = nil
	j.publish()
	j.kick()
}

// peek reads a key that no store knows.
func (e *engine) peek(key string, r *policy.Route) answer {
	rs, err := e.up.script(context.Background(), scriptRead, []string{key}, "0")
	if err != nil {
		return answer{fail: unavailable(r, "redis cannot be reached")}
	}
	if rs[0].code == keyDone {
		return answer{ttl: -2}
	}
	return e.redisAnswer(rs[0])
}

// countable is how many keys are counted in one step, which keeps Redis busy for some three milliseconds. More would be felt by
// others; fewer would make DBSIZE inexact where somebody may look at it closely.
const countable = 10_000

// dbSize is DBSIZE without the proxy's keys; n is Redis's. Many keys are counted while their number changes:
//
//	1 DBSIZE n    2 the clock is set, a lease is taken    3 SCAN finds one more of ours than n has
func (e *engine) dbSize(n int64) int64 {
	if n <= countable {
		frame, err := e.up.eval(context.Background(), scriptSize, func(dst []string) []string { return append(dst, "0") })
		if exact, ok := parseInt(frame); err == nil && ok {
			return exact
		}
	}
	return max(0, n-e.ownKeys())
}

// ownKeys counts the proxy's keys in Redis, to hide them from DBSIZE.
func (e *engine) ownKeys() (n int64) {
	for cursor := "0"; ; {
		frame, err := e.up.do(context.Background(), "SCAN", cursor, "MATCH", reserved+"*", "COUNT", "10000")
		if err != nil {
			return n
		}
		cols, _ := elements(frame, nil)
		if len(cols) != 2 {
			return n
		}
		names, _ := elements(cols[1], nil)
		n += int64(len(names))
		next, _ := bulk(cols[0])
		if cursor = string(next); cursor == "0" {
			return n
		}
	}
}
