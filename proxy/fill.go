package proxy

import (
	"context"
	"errors"
	"runtime"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"cacheproxy/policy"
)

// source is a closed list: who answered a read.
type source uint8

const (
	fromNone     source = iota // neither store has the key
	fromRedis                  // a hit
	fromStore                  // the JSONB answered
	fromNegative               // remembered as absent in both
)

func (s source) String() string { return [...]string{"none", "redis", "jsonb", "negative"}[s] }

// answer is what a key holds, found by a load. The bytes are shared by all waiters: read only.
type answer struct {
	from      source
	exists    bool
	other     string // the type, if it is not a string
	value     []byte
	ttl       int64    // ms remaining, -1 none
	expiresAt int64    // Unix ms, -1 none
	fail      *refusal // the key could not be told
}

// load is one look for one key, shared by everybody who misses it meanwhile.
type load struct {
	ref     policy.Ref
	route   *policy.Route
	direct  bool      // Redis is not asked: phase0, a stale copy, an outage
	since   int64     // when it was first asked for, monotonic
	again   time.Time // when it first began again because both journals name the key; zero: never
	waiters []func(answer)
}

// filler finds what Redis lacks: one load per key however many ask (P7), the loads of one batch in one query.
//
// A waiter may share a load that began before it asked only if something that happened after it asked
// proves the value: the promotion under our lease does, for every write takes the lease away.
//
//	1 load reads row v1    2 somebody writes v2 and is answered    3 a client asks, misses (evicted), joins
//	4 the load would answer v1: stale. The promotion in 4 finds the lease gone, so only those who joined before 1 get v1
//	  (they asked before v2 was acknowledged), and the others begin again.
type filler struct {
	e       *engine
	mu      sync.Mutex
	loads   map[string]*load // guarded by mu
	queue   []*load          // guarded by mu
	wake    chan struct{}    // capacity 1
	slots   chan struct{}    // one per batch in flight
	running sync.WaitGroup
	seq     atomic.Uint64
}

const (
	// maxLoads bounds the keys being looked for; beyond it reads are shed (P8). One takes about 200 bytes.
	maxLoads = 16384
	// maxBatch keys are one query and one script: large enough to make the round trips cheap, small enough that
	// the script occupies Redis for well under a millisecond.
	maxBatch = 256
	// maxBatches in flight: more than the store's concurrent reads would only wait there.
	maxBatches = 8
	// heldWait: how long a reader waits for another's promotion before it asks the store itself.
	heldWait = 100 * time.Millisecond
	// heldPoll: how often it looks. A load takes 1 to 5 ms.
	heldPoll = 2 * time.Millisecond
)

func newFiller(e *engine) *filler {
	return &filler{e: e, loads: map[string]*load{}, wake: make(chan struct{}, 1), slots: make(chan struct{}, maxBatches)}
}

// get looks for a key and calls done once, from another goroutine. direct: Redis is not to be asked.
func (f *filler) get(ref policy.Ref, route *policy.Route, direct bool, done func(answer)) {
	f.mu.Lock()
	name := ref.Key
	if direct {
		name = "\x00" + name // no routed key contains NUL: a direct load is another load
	}
	if l := f.loads[name]; l != nil {
		l.waiters = append(l.waiters, done)
		f.mu.Unlock()
		return
	}
	if len(f.loads) >= maxLoads {
		f.mu.Unlock()
		f.e.stats.shed.Add(1)
		f.e.stats.found[foundShed].Add(1)
		// The caller may hold its session's lock.
		f.e.wg.Go(func() { done(answer{fail: unavailable(route, "too many reads wait for the store")}) })
		return
	}
	l := &load{ref: ref, route: route, direct: direct, since: monotonic(), waiters: []func(answer){done}}
	f.loads[name] = l
	f.queue = append(f.queue, l)
	f.mu.Unlock()
	f.kick()
}

func (f *filler) kick() {
	select {
	case f.wake <- struct{}{}:
	default:
	}
}

// joined is how many wait for l now.
func (f *filler) joined(l *load) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(l.waiters)
}

// finish answers the first upto waiters; those who joined later begin again.
func (f *filler) finish(l *load, a answer, upto int) {
	name := l.ref.Key
	if l.direct {
		name = "\x00" + name
	}
	f.mu.Lock()
	now, later := l.waiters[:upto:upto], l.waiters[upto:]
	if len(later) > 0 {
		next := &load{ref: l.ref, route: l.route, direct: l.direct, since: monotonic(), waiters: later}
		f.loads[name] = next
		f.queue = append(f.queue, next)
	} else {
		delete(f.loads, name)
	}
	f.mu.Unlock()
	if len(later) > 0 {
		f.kick()
	}
	if len(now) > 0 {
		f.e.stats.fallback.since(l.since)
	}
	for _, done := range now {
		done(a)
	}
}

// run hands batches to goroutines until ctx ends, then waits for them.
func (f *filler) run(ctx context.Context) {
	defer f.running.Wait()
	for {
		select {
		case <-ctx.Done():
			f.flush()
			return
		case <-f.wake:
		}
		runtime.Gosched() // let the other misses of this moment join the batch
		for {
			select {
			case f.slots <- struct{}{}:
			case <-ctx.Done():
				f.flush()
				return
			}
			f.mu.Lock()
			n := min(len(f.queue), maxBatch)
			batch := append([]*load(nil), f.queue[:n]...)
			clear(f.queue[:n]) // or the array would keep whoever waits for them
			f.queue = f.queue[n:]
			f.mu.Unlock()
			if n == 0 {
				<-f.slots
				break
			}
			f.running.Add(1)
			go func() {
				defer f.running.Done()
				defer func() { <-f.slots }()
				f.batch(context.WithoutCancel(ctx), batch)
			}()
		}
	}
}

// flush fails what is still queued when the process ends.
func (f *filler) flush() {
	f.mu.Lock()
	queue := f.queue
	f.queue = nil
	f.mu.Unlock()
	for _, l := range queue {
		f.finish(l, answer{fail: unavailable(l.route, "the proxy is stopping")}, f.joined(l))
	}
}

func (f *filler) batch(ctx context.Context, batch []*load) {
	ctx, cancel := context.WithTimeout(ctx, f.e.cfg.StoreTimeout)
	defer cancel()
	var direct, ask []*load
	for _, l := range batch {
		if l.direct || !f.e.up.trusted() {
			direct = append(direct, l)
		} else {
			ask = append(ask, l)
		}
	}
	if len(ask) > 0 {
		direct = append(direct, f.viaRedis(ctx, ask)...)
	}
	if len(direct) > 0 {
		f.fromStore(ctx, direct)
	}
}

func keysOf(loads []*load) (keys []string, refs []policy.Ref) {
	for _, l := range loads {
		keys = append(keys, l.ref.Key)
		refs = append(refs, l.ref)
	}
	return keys, refs
}

// viaRedis is the protocol of a miss (docs/consistency.md, "A read"). It returns the loads that must do without Redis.
func (f *filler) viaRedis(ctx context.Context, loads []*load) (direct []*load) {
	e := f.e
	for try := 0; len(loads) > 0; try++ {
		if ctx.Err() != nil {
			for _, l := range loads {
				f.finish(l, answer{fail: unavailable(l.route, "another sidecar holds the key's lease for too long")}, f.joined(l))
			}
			return direct
		}
		if try > 0 && !e.up.trusted() {
			return append(direct, loads...)
		}
		token, epoch, granted, held, err := f.grant(ctx, loads)
		if err != nil {
			return append(direct, loads...)
		}
		loads = loads[:0:0]
		if len(granted) > 0 {
			again, gone := f.promote(ctx, granted, token, epoch)
			loads, direct = append(loads, again...), append(direct, gone...)
		}
		if len(held) > 0 {
			// Others' loads must not delay ours, nor ours theirs. They are as many as there are loads, which is bounded.
			f.running.Add(1)
			go func() {
				defer f.running.Done()
				ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), e.cfg.StoreTimeout) // the batch may end before it
				defer cancel()
				if rest := f.await(ctx, held); len(rest) > 0 {
					f.requeue(rest)
				}
			}()
		}
	}
	return direct
}

// grant looks once more for keys that Redis lacked, answers what it finds, and asks for leases of the rest: some are ours under
// token, granted in epoch, others are held by somebody.
func (f *filler) grant(ctx context.Context, loads []*load) (token string, epoch uint64, granted, held []*load, err error) {
	token = "r" + f.e.id + strconv.FormatUint(f.seq.Add(1), 36)
	epoch = f.e.up.epoch.Load()
	keys, _ := keysOf(loads)
	upto := make([]int, len(loads))
	for i, l := range loads {
		upto[i] = f.joined(l)
	}
	rs, err := f.ask(ctx, epoch, scriptGrant, keys, token, readMS)
	if err != nil {
		return "", 0, nil, nil, err
	}
	for i, r := range rs {
		l := loads[i]
		switch r.code {
		case keyValue, keyOther:
			f.finish(l, f.e.redisAnswer(r), upto[i])
		case keyMarked:
			f.finish(l, answer{ttl: -2}, upto[i]) // the store is stale: a miss, and it is not asked
		case keyNegative:
			f.finish(l, answer{from: fromNegative, ttl: -2}, upto[i])
		case keyGranted:
			granted = append(granted, l)
		default:
			held = append(held, l)
		}
	}
	return token, epoch, granted, held, nil
}

// ask runs a script on behalf of a reader. What a Redis says that has been lost since epoch counts for nothing: it may be another, or an older one, and is not
// verified yet.
func (f *filler) ask(ctx context.Context, epoch uint64, s *script, keys []string, argv ...string) ([]keyReply, error) {
	up := f.e.up
	if !up.trusted() {
		return nil, errLost
	}
	rs, err := up.script(ctx, s, keys, argv...)
	if err == nil && up.epoch.Load() != epoch {
		return nil, errLost
	}
	return rs, err
}

// requeue begins loads again from the start.
func (f *filler) requeue(loads []*load) {
	f.mu.Lock()
	f.queue = append(f.queue, loads...)
	f.mu.Unlock()
	f.kick()
}

func (e *engine) redisAnswer(r keyReply) answer {
	a := answer{from: fromRedis, exists: true, ttl: e.left(r.at), expiresAt: r.at}
	if r.code == keyOther {
		a.other = string(r.value)
	} else {
		a.value = r.value
	}
	return a
}

func (e *engine) rowAnswer(row policy.Row) answer {
	if row.State != policy.Live {
		return answer{ttl: -2}
	}
	return answer{from: fromStore, exists: true, value: row.Value, ttl: row.TTL, expiresAt: e.clocks.toRedis(row.ExpiresAt)}
}

// left is what remains until a moment of Redis's clock; -1 is never.
func (e *engine) left(at int64) int64 {
	if at < 0 {
		return -1
	}
	return max(at-e.clocks.redisNow(), 0)
}

// promote reads the store under leases that are ours and writes what it finds into Redis. again: begin
// again; direct: Redis went away.
func (f *filler) promote(ctx context.Context, loads []*load, token string, epoch uint64) (again, direct []*load) {
	e := f.e
	keys, refs := keysOf(loads)
	early := make([]int, len(loads))
	for i, l := range loads {
		early[i] = f.joined(l)
	}
	rows, err := e.store.load(ctx, refs)
	if err != nil {
		for _, l := range loads {
			f.finish(l, e.unknown(l.route, err), f.joined(l))
		}
		// Nobody should wait for a lease that promises nothing.
		_, _ = f.ask(ctx, epoch, scriptAbsent, keys, token, "0")
		return nil, nil
	}
	var live, absent []int
	argv := []string{token}
	for i, row := range rows {
		if row.State == policy.Live && !e.journal.staleRedis(keys[i]) {
			live = append(live, i)
			argv = append(argv, string(row.Value), strconv.FormatInt(e.clocks.toRedis(row.ExpiresAt), 10))
		} else {
			absent = append(absent, i)
		}
	}
	// A lease that another run of Redis granted is void: what a restart brought back may carry its token.
	if e.up.epoch.Load() != epoch {
		e.stats.refusedPromotions.Add(int64(len(live)))
		return nil, loads
	}
	if len(live) > 0 {
		upto := f.mark(loads, live)
		rs, err := f.ask(ctx, epoch, scriptPromote, pick(keys, live), argv...)
		for j, i := range live {
			n := early[i]
			switch {
			case err != nil:
				e.stats.failedPromotions.Add(1)
			case rs[j].code == keyDone:
				n = upto[j]
				e.stats.promotions.Add(1)
			default:
				e.stats.refusedPromotions.Add(1)
			}
			f.finish(loads[i], f.e.rowAnswer(rows[i]), n)
		}
	}
	// One script per negative_ttl; almost always there is one.
	for len(absent) > 0 {
		neg := loads[absent[0]].route.NegativeTTL
		var same, rest []int
		for _, i := range absent {
			if loads[i].route.NegativeTTL == neg {
				same = append(same, i)
			} else {
				rest = append(rest, i)
			}
		}
		absent = rest
		upto := f.mark(loads, same)
		rs, err := f.ask(ctx, epoch, scriptAbsent, pick(keys, same), token, strconv.FormatInt(neg.Milliseconds(), 10))
		for j, i := range same {
			l := loads[i]
			switch {
			case rows[i].State == policy.Live: // journaled: the row is right, Redis is not asked
				f.finish(l, f.e.rowAnswer(rows[i]), early[i])
			case err != nil && rows[i].State == policy.Tombstone:
				f.finish(l, answer{ttl: -2}, early[i])
			case err != nil:
				direct = append(direct, l)
			case rs[j].code == keyValue || rs[j].code == keyOther:
				f.finish(l, f.e.redisAnswer(rs[j]), upto[j])
			case rs[j].code == keyDone || rs[j].code == keyMarked:
				f.finish(l, answer{ttl: -2}, upto[j])
			case rows[i].State == policy.Tombstone:
				f.finish(l, answer{ttl: -2}, early[i])
			default:
				again = append(again, l)
			}
		}
	}
	return again, direct
}

func (f *filler) mark(loads []*load, idx []int) []int {
	out := make([]int, len(idx))
	for j, i := range idx {
		out[j] = f.joined(loads[i])
	}
	return out
}

func pick(keys []string, idx []int) []string {
	out := make([]string, len(idx))
	for j, i := range idx {
		out[j] = keys[i]
	}
	return out
}

// await waits for keys whose lease somebody else has, and returns those that must begin again.
func (f *filler) await(ctx context.Context, loads []*load) (again []*load) {
	e := f.e
	end := time.Now().Add(heldWait)
	for len(loads) > 0 && time.Now().Before(end) && ctx.Err() == nil {
		time.Sleep(heldPoll)
		token, epoch, granted, still, err := f.grant(ctx, loads)
		if err != nil {
			return append(again, loads...)
		}
		if len(granted) > 0 {
			more, gone := f.promote(ctx, granted, token, epoch)
			again = append(again, more...)
			again = append(again, gone...)
		}
		loads = still
	}
	if len(loads) == 0 {
		return again
	}
	// The holder is slow or dead: ask the store, promote nothing. "No row" is not believed without the
	// lease, for a write in Redis may have removed it since the miss.
	keys, refs := keysOf(loads)
	early := make([]int, len(loads))
	for i, l := range loads {
		early[i] = f.joined(l)
	}
	rows, err := e.store.load(ctx, refs)
	if err != nil {
		f.lookAgain(ctx, loads, keys, err)
		return again
	}
	var doubt []*load
	for i, l := range loads {
		switch {
		case e.journal.staleStore(keys[i]):
			doubt = append(doubt, l)
		case speaks(rows[i]):
			f.finish(l, f.e.rowAnswer(rows[i]), early[i])
		default:
			doubt = append(doubt, l)
		}
	}
	if len(doubt) > 0 {
		again = append(again, f.resolve(ctx, doubt)...)
	}
	return again
}

// lookAgain answers loads whose store is gone, while somebody had the lease: a writer that learned of the same outage may have put its
// keys back since.
func (f *filler) lookAgain(ctx context.Context, loads []*load, keys []string, gone error) {
	upto := f.mark(loads, all(len(loads)))
	rs, err := f.ask(ctx, f.e.up.epoch.Load(), scriptRead, keys, "0")
	for i, l := range loads {
		if err == nil && (rs[i].code == keyValue || rs[i].code == keyOther) {
			f.finish(l, f.e.redisAnswer(rs[i]), upto[i])
		} else {
			f.finish(l, f.e.unknown(l.route, gone), f.joined(l))
		}
	}
}

// resolve tells what keys are whose lease somebody holds too long and that have no row: under their key locks nobody is
// writing, so a writer that still seems to hold the lease is dead, and its lease goes.
func (f *filler) resolve(ctx context.Context, loads []*load) (again []*load) {
	e := f.e
	keys, refs := keysOf(loads)
	tx, err := e.store.begin(ctx, refs)
	if err != nil {
		for _, l := range loads {
			f.finish(l, e.unknown(l.route, err), f.joined(l))
		}
		return nil
	}
	defer tx.Rollback()
	upto := make([]int, len(loads))
	for i, l := range loads {
		upto[i] = f.joined(l)
	}
	rs, err := f.ask(ctx, e.up.epoch.Load(), scriptRead, keys, strconv.FormatInt(tx.Number(), 10))
	if err != nil {
		if !errors.Is(err, errLost) {
			e.redisFailed(err)
		}
		return loads
	}
	for i, r := range rs {
		row := tx.Rows()[i]
		switch {
		case r.code == keyRefused:
			again = append(again, loads[i])
		case r.code == keyValue || r.code == keyOther:
			f.finish(loads[i], f.e.redisAnswer(r), upto[i])
		case r.mark != "":
			f.finish(loads[i], answer{ttl: -2}, upto[i])
		default:
			f.finish(loads[i], f.e.rowAnswer(row), upto[i])
		}
	}
	e.lift(ctx, tx, rs)
	return again
}

// fromStore answers without Redis.
func (f *filler) fromStore(ctx context.Context, loads []*load) {
	e := f.e
	keys, refs := keysOf(loads)
	early := make([]int, len(loads))
	for i, l := range loads {
		early[i] = f.joined(l)
	}
	marked, polled := f.markedSince(ctx, loads, keys)
	rows, gone := e.store.load(ctx, refs)
	others := f.otherTypes(ctx, loads, keys, rows)
	if err := f.moved(ctx, loads, rows, others); err != nil {
		gone = err
	}
	for i, l := range loads {
		err := gone
		if err == nil && marked[i] { // what is not marked does not depend on that poll
			err = polled
		}
		switch {
		case marked[i] && err == nil:
			f.beginAgain(l)
		case others[i].code == keyOther, others[i].code == keyValue && err == nil && onlyRedis(l.route, rows[i]):
			f.finish(l, f.e.redisAnswer(others[i]), early[i])
		case err != nil:
			why := unavailable(l.route, "neither store can be asked")
			if e.store.Overloaded(err) {
				e.stats.shed.Add(1)
				why = unavailable(l.route, "too many reads wait for the store")
			} else if !l.route.Phase.Rules().ReadsRedis {
				why = unavailable(l.route, "postgres cannot be asked")
			}
			f.finish(l, answer{fail: why}, early[i])
		case e.journal.staleStore(keys[i]):
			f.finish(l, answer{fail: unavailable(l.route, "the store's copy is stale and Redis cannot be asked")}, early[i])
		case others[i].code == 0 && (rows[i].State == policy.NoRow || rows[i].State == policy.Absent && e.mayBeInRedis(l.route)):
			if l.route.OnUnknown == policy.UnknownError {
				f.finish(l, answer{fail: unavailable(l.route, "redis may hold the key and cannot be asked")}, early[i])
			} else {
				f.finish(l, answer{ttl: -2}, early[i])
			}
		default:
			f.finish(l, f.e.rowAnswer(rows[i]), early[i])
		}
	}
}

// markedSince tells which keys Redis's journal names, of those whose copy in a Redis that is trusted was avoided because of an entry. The entry may have been struck
// since the last poll:
//
//	1 K's entry is known here; another sidecar repairs K and strikes it    2 Postgres dies; K is written in Redis, marked, and that is acknowledged
//	3 Postgres is back, and we read the row
//
// The marks are looked at before the row is read: a repair may copy what is marked into the row, and strike the mark. What the journal in Postgres says now is known before
// such loads begin again. err: it cannot be asked.
func (f *filler) markedSince(ctx context.Context, loads []*load, keys []string) (marked []bool, err error) {
	marked = make([]bool, len(loads))
	var idx []int
	for i, l := range loads {
		if l.direct && l.route.Phase.Rules().ReadsRedis {
			idx = append(idx, i)
		}
	}
	if len(idx) == 0 {
		return marked, nil
	}
	rs, err := f.ask(ctx, f.e.up.epoch.Load(), scriptLook, pick(keys, idx), "0")
	if err != nil {
		return marked, nil // Redis is lost by now: its marks are not known, as in any such outage
	}
	some := false
	for j, i := range idx {
		marked[i] = rs[j].mark != ""
		some = some || marked[i]
	}
	if !some {
		return marked, nil
	}
	time.Sleep(heldPoll) // a key that both journals name is asked for again until the repair, which comes with the next poll
	return marked, f.e.journal.pollStore(ctx, true)
}

// beginAgain finds a key anew for everybody who waits for l, on the way that is right by now. While both journals name it that is this one, until it is repaired.
func (f *filler) beginAgain(l *load) {
	if l.again.IsZero() {
		l.again = time.Now()
	}
	if f.e.journal.staleRedis(l.ref.Key) || !f.e.up.trusted() {
		if time.Since(l.again) > f.e.cfg.StoreTimeout {
			f.finish(l, answer{fail: unavailable(l.route, "both copies are stale and not repaired yet")}, f.joined(l))
			return
		}
		f.requeue([]*load{l})
		return
	}
	f.mu.Lock()
	waiters := l.waiters
	delete(f.loads, "\x00"+l.ref.Key)
	f.mu.Unlock()
	for _, done := range waiters {
		f.get(l.ref, l.route, false, done)
	}
}

// moved reads the rows anew of keys that Redis may have been the only holder of, and that somebody has written there of late:
//
//	1 we read that the column is empty    2 INCR k finds k in Redis, and brings it into the column    3 k is deleted in Redis, and we find none there
func (f *filler) moved(ctx context.Context, loads []*load, rows []policy.Row, others []keyReply) error {
	var refs []policy.Ref
	var idx []int
	for i, l := range loads {
		if i < len(rows) && others[i].code == keyDone && others[i].num > 0 && onlyRedis(l.route, rows[i]) {
			refs, idx = append(refs, l.ref), append(idx, i)
		}
	}
	if len(refs) == 0 {
		return nil
	}
	again, err := f.e.store.load(ctx, refs)
	if err != nil {
		return err
	}
	for j, i := range idx {
		rows[i] = again[j]
	}
	return nil
}

// otherTypes looks in Redis for keys without a live row where the phase does not read strings there: a key that holds
// something else is not the store's, and Redis speaks for it; so it does for a key that an adopted column has no row for, or nothing in it.
func (f *filler) otherTypes(ctx context.Context, loads []*load, keys []string, rows []policy.Row) []keyReply {
	out := make([]keyReply, len(loads))
	var idx []int
	for i, l := range loads {
		if i < len(rows) && rows[i].State != policy.Live && !l.route.Phase.Rules().ReadsRedis {
			idx = append(idx, i)
		}
	}
	if len(idx) == 0 || !f.e.up.trusted() {
		return out
	}
	rs, err := f.e.up.script(ctx, scriptRead, pick(keys, idx), "0")
	if err != nil {
		f.e.redisFailed(err)
		return out
	}
	for j, i := range idx {
		out[i] = rs[j]
	}
	return out
}
