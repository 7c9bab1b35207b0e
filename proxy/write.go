package proxy

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"cacheproxy/internal/strcmd"
	"cacheproxy/policy"
)

// writeOp is one client's write on routed keys. All its keys share one write mode.
type writeOp struct {
	args   [][]byte // the command; owned by the caller until done is called
	keys   []policy.Ref
	routes []*policy.Route
	mode   policy.WriteMode
	proto  int
	until  time.Time // when it is refused rather than begun again
	// done is called once, from a goroutine of the writer. pass: the command is about a key that holds no
	// string; nothing was done, and it belongs to Redis as it is.
	done func(reply []byte, pass bool)
	// odd: the table has refused what only Redis has of a key, so that it cannot be brought there first.
	odd bool
}

func (op *writeOp) refuse(c *refusal) { op.done(c.reply(nil), false) }

// writer commits writes in groups: while one group is on its way, what arrives gathers into the next, so
// that many clients share one transaction and one script (docs/consistency.md, "A write in phase0 and phase1").
type writer struct {
	e     *engine
	mu    sync.Mutex
	cond  *sync.Cond    // signalled when queue grows, and when a committer need not wait for more
	queue []*writeOp    // guarded by mu
	busy  int           // guarded by mu: committers at work
	last  int           // guarded by mu: how many commands the last group had
	took  time.Duration // guarded by mu: how long it was under way
	most  time.Duration // static: to wait for more
	// slow holds commands whose key locks somebody else keeps: they wait one by one, in goroutines of their own, so that a
	// sidecar that hangs in the middle of a write holds up its keys and not everybody's.
	slow    []*writeOp           // guarded by mu
	stood   *sync.Cond           // signalled when slow grows
	stuck   map[string]time.Time // guarded by mu: keys whose lock was not to be had, until when they go to slow at once
	stopped bool                 // guarded by mu
	running sync.WaitGroup
}

const (
	// maxWriteQueue bounds what waits for a commit; beyond it writes are refused rather than queued without end.
	maxWriteQueue = 16384
	// maxGroup commands share a transaction: groups of 50 already bring most of the gain, and a larger one holds more
	// key locks for longer.
	maxGroup = 256
	// maxGroupBytes: one large value must not delay a group of small ones for long.
	maxGroupBytes = 4 << 20
	// committers: two groups at once, so that one's commit overlaps the other's scripts.
	committers = 2
	// gatherTime: a group of fifty takes some five milliseconds, and one that takes much longer waits for a store that is in trouble.
	gatherTime = 2 * time.Millisecond
	// slowCommitters serve what waits for locks. With the others they are as many as the store's concurrent writes.
	slowCommitters = 2
	// stuckTime: a lock that could not be had will hardly be free in the next moment; a sidecar that died gives it back within
	// seconds.
	stuckTime = 2 * time.Second
	// patience, in uses of the store: a command that finds its key marked, adopted or overtaken begins again. Every time
	// somebody else made progress, so it is time and not a count that ends it; longer, a client would have given up.
	patience = 2
)

func newWriter(e *engine) *writer {
	w := &writer{e: e, most: gatherTime, stuck: map[string]time.Time{}}
	w.cond, w.stood = sync.NewCond(&w.mu), sync.NewCond(&w.mu)
	return w
}

// submit queues op.
func (w *writer) submit(op *writeOp) {
	w.mu.Lock()
	if w.stopped || len(w.queue)+len(w.slow) >= maxWriteQueue {
		w.mu.Unlock()
		w.e.stats.shed.Add(1)
		// The caller may hold its session's lock.
		w.e.wg.Go(func() { op.refuse(unavailable(op.routes[0], "too many writes wait for the store")) })
		return
	}
	op.until = time.Now().Add(patience * w.e.cfg.StoreTimeout)
	if w.isStuck(op) {
		w.slow = append(w.slow, op)
		w.stood.Signal()
	} else {
		w.queue = append(w.queue, op)
		if len(w.queue) == 1 || w.enough() {
			w.cond.Signal()
		}
	}
	w.mu.Unlock()
}

// enough: a committer should go to work with what there is. While another is at work, whoever it answers will say more, and a group costs the
// two stores much the same whatever its size: it is better to wait for as many as there were last time. Caller holds mu.
func (w *writer) enough() bool { return len(w.queue) > 0 && (w.busy == 0 || len(w.queue) >= w.last) }

// isStuck tells whether op has a key whose lock could not be had lately. Caller holds mu.
func (w *writer) isStuck(op *writeOp) bool {
	if len(w.stuck) == 0 {
		return false
	}
	now, stuck := time.Now(), false
	for _, ref := range op.keys {
		if until, ok := w.stuck[ref.Key]; ok {
			if now.After(until) {
				delete(w.stuck, ref.Key)
			} else {
				stuck = true
			}
		}
	}
	return stuck
}

// notLocked handles commands whose key locks were not to be had in time.
func (w *writer) notLocked(ops []*writeOp) {
	if len(ops) > 1 { // one of them, or a few: each finds out by itself
		w.mu.Lock()
		w.slow = append(w.slow, ops...)
		w.mu.Unlock()
		w.stood.Broadcast()
		return
	}
	w.mu.Lock()
	if len(w.stuck) < maxWriteQueue {
		for _, ref := range ops[0].keys {
			w.stuck[ref.Key] = time.Now().Add(stuckTime)
		}
	}
	w.mu.Unlock()
	ops[0].refuse(unavailable(ops[0].routes[0], "another sidecar keeps the key locked"))
}

// nextSlow takes one command of slow, nil when the writer has stopped.
func (w *writer) nextSlow() *writeOp {
	w.mu.Lock()
	defer w.mu.Unlock()
	for len(w.slow) == 0 {
		if w.stopped {
			return nil
		}
		w.stood.Wait()
	}
	op := w.slow[0]
	w.slow[0] = nil // or the array would keep its values
	w.slow = w.slow[1:]
	return op
}

// again puts ops that must begin again before everything else.
func (w *writer) again(ops []*writeOp) {
	keep := ops[:0:0]
	for _, op := range ops {
		if time.Now().After(op.until) {
			op.refuse(unavailable(op.routes[0], "the key changes hands too often"))
			continue
		}
		keep = append(keep, op)
	}
	w.mu.Lock()
	w.queue = append(keep, w.queue...)
	w.mu.Unlock()
	w.cond.Broadcast()
}

// run commits until ctx ends and the queue is empty.
func (w *writer) run(ctx context.Context) {
	stop := context.AfterFunc(ctx, func() {
		w.mu.Lock()
		w.stopped = true
		w.mu.Unlock()
		w.cond.Broadcast()
		w.stood.Broadcast()
	})
	defer stop()
	for range committers {
		w.running.Add(1)
		go func() {
			defer w.running.Done()
			for {
				group := w.next()
				if group == nil {
					return
				}
				began := time.Now()
				w.commit(context.WithoutCancel(ctx), group)
				w.mu.Lock()
				w.busy--
				w.took = time.Since(began)
				w.mu.Unlock()
			}
		}()
	}
	for range slowCommitters {
		w.running.Add(1)
		go func() {
			defer w.running.Done()
			for op := w.nextSlow(); op != nil; op = w.nextSlow() {
				w.commit(context.WithoutCancel(ctx), []*writeOp{op})
			}
		}()
	}
	w.running.Wait()
}

// gather waits until there is enough, but once something is there no longer than a quarter of what the last group took, nor than gatherTime: that is
// what a client may wait longer whose companions do not come. false: there is nothing. Caller holds mu.
func (w *writer) gather() bool {
	if len(w.queue) == 0 || w.enough() {
		return len(w.queue) > 0
	}
	late := false
	timer := time.AfterFunc(min(w.took/4, w.most), func() {
		w.mu.Lock()
		late = true
		w.mu.Unlock()
		w.cond.Broadcast()
	})
	defer timer.Stop()
	for !late && !w.stopped && len(w.queue) > 0 && !w.enough() {
		w.cond.Wait()
	}
	return len(w.queue) > 0
}

// next takes the ops at the head of the queue that share a mode, nil when the writer has stopped. The caller is at work from then on.
func (w *writer) next() []*writeOp {
	w.mu.Lock()
	defer w.mu.Unlock()
	for !w.gather() {
		if w.stopped {
			return nil
		}
		w.cond.Wait()
	}
	w.busy++
	mode, size := w.queue[0].mode, 0
	var group, rest []*writeOp
	for i, op := range w.queue {
		if len(group) == maxGroup || size > maxGroupBytes {
			rest = append(rest, w.queue[i:]...)
			break
		}
		if op.mode != mode {
			rest = append(rest, op)
			continue
		}
		for _, a := range op.args {
			size += len(a)
		}
		group = append(group, op)
	}
	w.queue, w.last = rest, len(group)
	if len(rest) > 0 {
		w.cond.Signal()
	}
	return group
}

func (w *writer) commit(ctx context.Context, group []*writeOp) {
	// A transaction may wait for locks, talk to Redis twice and commit; each step has its own bound below this.
	ctx, cancel := context.WithTimeout(ctx, patience*w.e.cfg.StoreTimeout)
	defer cancel()
	if group[0].mode == policy.WriteRedisDropRow {
		w.redisFirst(ctx, group, true)
	} else {
		w.storeFirst(ctx, group, false)
	}
}

// keyState is one key of a group as the group's commands, one after the other, leave it.
type keyState struct {
	ref    policy.Ref
	route  *policy.Route
	row    policy.Row
	now    strcmd.Value
	kept   bool     // now ends when it did before
	dirty  bool     // some command changed it
	wait   bool     // this key's commands begin again
	failed *refusal // this key's commands are refused
	redis  keyReply // what Redis said
	on     bool     // written in Redis: it is marked there, because the store went away, or no row can hold it
	odd    bool     // Redis alone has it, and its row cannot: it came there without us, and is not JSON
	stays  bool     // and it is that still
	both   bool     // both journals name it, and the row wins
}

// alone: the store has no place for the key, or not for what it holds.
func (s *keyState) alone() bool { return s.row.State == policy.NoRow || s.stays }

// group indexes the keys of ops.
type group struct {
	ops    []*writeOp
	states []*keyState
	at     map[string]int
}

func newGroup(ops []*writeOp) *group {
	g := &group{ops: ops, at: map[string]int{}}
	for _, op := range ops {
		for i, ref := range op.keys {
			if _, ok := g.at[ref.Key]; !ok {
				g.at[ref.Key] = len(g.states)
				g.states = append(g.states, &keyState{ref: ref, route: op.routes[i], kept: true})
			}
		}
	}
	return g
}

func (g *group) refs() []policy.Ref {
	out := make([]policy.Ref, len(g.states))
	for i, s := range g.states {
		out[i] = s.ref
	}
	return out
}

func (g *group) keys() []string {
	out := make([]string, len(g.states))
	for i, s := range g.states {
		out[i] = s.ref.Key
	}
	return out
}

func (e *engine) rowValue(row policy.Row) strcmd.Value {
	if row.State != policy.Live {
		return strcmd.Value{TTL: -1, ExpireAt: -1}
	}
	return strcmd.Value{Exists: true, Data: row.Value, TTL: row.TTL, ExpireAt: e.clocks.toRedis(row.ExpiresAt)}
}

func (e *engine) replyValue(r keyReply) strcmd.Value {
	switch r.code {
	case keyValue:
		return strcmd.Value{Exists: true, Data: r.value, TTL: e.left(r.at), ExpireAt: r.at}
	case keyOther:
		return strcmd.Value{Exists: true, Other: true, OtherType: string(r.value), TTL: e.left(r.at), ExpireAt: r.at}
	}
	return strcmd.Value{TTL: -1, ExpireAt: -1}
}

// outcome is what a group's evaluation leaves to be said to one client.
type outcome struct {
	op      *writeOp
	reply   []byte
	pass    bool
	changed bool
}

// evaluate runs the commands of the group in order on the states. Commands on a key that waits are returned
// in again; refused ones are answered at once. The lives of what is written begin at this moment of Redis's clock.
func (g *group) evaluate(e *engine) (done []outcome, again []*writeOp) {
	now := e.clocks.redisNow()
	var values []strcmd.Value
	var effects []strcmd.Effect
next:
	for _, op := range g.ops {
		values = values[:0]
		env := strcmd.Env{NowMS: now, Proto: op.proto, DefaultTTL: make([]int64, len(op.keys))}
		other := false
		for i, ref := range op.keys {
			s := g.states[g.at[ref.Key]]
			if s.wait {
				again = append(again, op)
				continue next
			}
			if s.failed != nil {
				op.refuse(s.failed)
				continue next
			}
			values = append(values, s.now)
			other = other || s.now.Other
			env.DefaultTTL[i] = op.routes[i].DefaultTTL(rand.Float64()).Milliseconds()
		}
		if other && isLifeCommand(op.args[0]) {
			done = append(done, outcome{op: op, pass: true})
			continue
		}
		o := outcome{op: op}
		o.reply, effects = strcmd.Eval(nil, op.args, values, env, effects[:0])
		if no := e.holds(effects, values, op.routes); no != nil {
			op.refuse(no)
			continue next
		}
		for i, ef := range effects {
			s := g.states[g.at[op.keys[i].Key]]
			switch ef.Op {
			case strcmd.Put:
				s.put(ef, now)
				o.changed = true
			case strcmd.Delete:
				s.now = strcmd.Value{TTL: -1, ExpireAt: -1}
				s.kept = false
				s.dirty = true
				o.changed = true
			}
		}
		done = append(done, o)
	}
	return done, again
}

// holds refuses what the store cannot hold.
//
// What is too large Postgres could hardly take in the time that it has. Such a value would be accepted by Redis alone, again and again be tried to be
// copied, and each time keep Redis, whose one thread has to hand it over, from everybody.
func (e *engine) holds(effects []strcmd.Effect, values []strcmd.Value, routes []*policy.Route) *refusal {
	for i, ef := range effects {
		if ef.Op != strcmd.Put {
			continue
		}
		r := routes[i]
		if len(ef.Data) > e.cfg.MaxValue && r.Phase.Rules().Write.KeepsRow() {
			return &refusal{"DENIED", fmt.Sprintf("the value of %d bytes is larger than postgres.max_value allows for keys of route %s (%s)", len(ef.Data), r.Name, r.Phase)}
		}
		if !r.Column() || values[i].Exists && !values[i].Other && bytes.Equal(ef.Data, values[i].Data) {
			continue // EXPIRE and its kin leave the value, whatever it is
		}
		if !e.fits(r, ef.Data) {
			return notJSON(r)
		}
	}
	return nil
}

// isLifeCommand: EXPIRE and its kin work on every type, which only Redis can do.
func isLifeCommand(name []byte) bool {
	for _, n := range [...]string{"expire", "pexpire", "expireat", "pexpireat", "persist"} {
		if bytes.EqualFold(name, []byte(n)) {
			return true
		}
	}
	return false
}

func (s *keyState) put(ef strcmd.Effect, now int64) {
	s.dirty = true
	s.now.Exists, s.now.Other, s.now.Data = true, false, ef.Data
	switch ef.Expiry.Kind {
	case policy.KeepExpiry:
		return
	case policy.NoExpiry:
		s.now.TTL, s.now.ExpireAt = -1, -1
	case policy.ExpiresIn:
		s.now.TTL, s.now.ExpireAt = ef.Expiry.MS, now+ef.Expiry.MS
	case policy.ExpiresAt:
		s.now.TTL, s.now.ExpireAt = ef.Expiry.MS-now, ef.Expiry.MS
	}
	s.kept = false
}

// redisLife tells Redis's script when the key ends.
func (s *keyState) redisLife() (ms, abs string) {
	if s.now.ExpireAt < 0 {
		return "-1", "0"
	}
	return strconv.FormatInt(max(s.now.ExpireAt, 1), 10), "1"
}

// rowLife tells the store when a row ends that ends in Redis at the moment at, -1: never. What is to be kept is said in full like the
// rest: the row may expire before the COMMIT, and "keep" would then mean for ever.
func (e *engine) rowLife(at int64) policy.Expiry { return e.clocks.rowLife(at) }

func (c *clocks) rowLife(at int64) policy.Expiry {
	if at < 0 {
		return policy.Expiry{Kind: policy.NoExpiry}
	}
	return policy.Expiry{Kind: policy.ExpiresAt, MS: c.toStore(at)}
}

// storeFirst is the write of phase0 and phase1 (docs/consistency.md):
//
//	1 lock the keys in Postgres and read their rows    2 invalidate in Redis and take the leases
//	3 change the rows and COMMIT, with a journal entry "Redis is stale" if step 2 failed
//	4 put the values into Redis if the leases are still ours
//
// Nobody sees a value in Redis before it is committed; a crash anywhere leaves the old state, or the new one with
// Redis empty, or a journal entry. If step 4 fails, the entry is made then, before the reply.
//
// An entry is made only where Redis may be stale, not for every write to be struck afterwards: one that outlived its
// write would let the row win over a later write that only Redis saw.
//
//	1 SET k v1 in both stores, entry not struck yet    2 Postgres dies    3 DEL k in Redis, marked, acknowledged
//	4 Postgres returns with the entry: both journals name k, the row wins, and v1 is back
func (w *writer) storeFirst(ctx context.Context, ops []*writeOp, rawOnly bool) {
	e := w.e
	g := newGroup(ops)
	tx, err := e.store.begin(ctx, g.refs())
	if err != nil {
		w.withoutStore(ctx, ops, err)
		return
	}
	defer tx.Rollback()
	number := strconv.FormatInt(tx.Number(), 10)
	for i, row := range tx.Rows() {
		s := g.states[i]
		s.row, s.now = row, e.rowValue(row)
	}
	began := time.Now()

	// Step 2.
	h := hold{number, "w" + e.id + strconv.FormatUint(e.fill.seq.Add(1), 36), e.up.epoch.Load()}
	lost := !e.up.trusted()
	var rs []keyReply
	if !lost {
		argv := []string{number, h.token, leaseMS}
		for _, s := range g.states {
			flag := rowFlag(s.row)
			if s.row.State == policy.Live && s.route.Column() && g.needs(s) {
				flag = "j"
			}
			argv = append(argv, flag)
		}
		if rs, err = e.up.script(ctx, scriptInvalidate, g.keys(), argv...); err != nil {
			lost = true
			e.redisFailed(err)
		}
	}
	var marked []*keyState
	var adopted []policy.Change
	for i, s := range g.states {
		if lost {
			s.withoutRedis(e, g)
			continue
		}
		s.redis = rs[i]
		switch rs[i].code {
		case keyMarked:
			s.wait = true
			marked = append(marked, s)
		case keyDone:
			if s.row.State == policy.Live {
				s.now.Data = exact(s.route, s.row, rs[i])
			}
		case keyValue:
			if s.odd = !s.alone() && (ops[0].odd || !e.fits(s.route, rs[i].value)); s.odd || s.alone() {
				s.now = e.replyValue(rs[i])
				break
			}
			// Redis was the only holder: the value goes into the row before anybody may delete it.
			s.wait = true
			adopted = append(adopted, policy.Change{Ref: s.ref, Op: policy.Put, Value: rs[i].value, Expiry: e.rowLife(rs[i].at)})
		case keyOther:
			s.now = e.replyValue(rs[i])
		case keyRefused:
			s.wait = true // another writer took the lock after this transaction had lost it
		}
	}
	outcomes, again := g.evaluate(e)
	defer func() {
		e.lift(ctx, tx, rs)
		if len(marked) > 0 {
			refs := make([]policy.Ref, len(marked))
			for i, s := range marked {
				refs[i] = s.ref
			}
			tx.Rollback() // the repair takes the same locks
			e.repairMarks(ctx, refs)
		}
		w.again(again)
	}()

	// Step 3.
	for _, s := range g.states {
		s.stays = s.odd && s.dirty && s.now.Exists && !e.fits(s.route, s.now.Data)
	}
	changes := adopted
	var stale, odd []policy.Ref
	for _, s := range g.states {
		if !s.dirty || s.alone() {
			continue
		}
		switch {
		case s.now.Exists:
			changes = append(changes, policy.Change{Ref: s.ref, Op: policy.Put, Value: s.now.Data, Expiry: e.rowLife(s.now.ExpireAt)})
		case s.row.State == policy.Absent && !lost && !s.odd:
			continue // it was in neither store, or it is not a string: no row speaks for it
		default:
			changes = append(changes, policy.Change{Ref: s.ref, Op: policy.Delete})
		}
		if stale = append(stale, s.ref); s.odd {
			odd = append(odd, s.ref)
		}
	}
	if time.Since(began) > leaseSafe && !lost {
		// The leases may lapse before the COMMIT: a reader could promote the old row after it. Nothing has changed yet.
		w.putBack(ctx, g.states, h)
		again = append(again, opsOf(outcomes)...)
		return
	}
	if alone := g.alone(); len(alone) > 0 {
		done, forget, err := w.writeAlone(ctx, tx, g, alone, h)
		switch {
		case err != nil:
			e.redisFailed(err)
			touched, rest := g.touching(outcomes)
			w.redisRefused(opsOf(touched), err, true)
			again = append(again, opsOf(rest)...)
			return
		case !done:
			w.putBack(ctx, g.states, h)
			again = append(again, opsOf(outcomes)...)
			return
		}
		e.countNoRow(g, outcomes)
		if len(forget) == 0 {
			outcomes = g.finishAlone(outcomes)
		}
		changes = append(changes, forget...) // which others may read by now, so that nobody is answered before
	}
	var intent int64
	var known []int64
	journaled := odd // it is in Redis until step 4
	if lost {
		journaled = stale
	}
	if len(journaled) > 0 {
		known = e.journal.entriesOf(journaled)
	}
	if len(changes) > 0 {
		intent, err = tx.Commit(ctx, changes, journaled, known, rawOnly)
		switch {
		case err == nil:
		case g.wroteAlone() && !e.store.Uncertain(err):
			// They are not to be run again.
			touched, rest := g.touching(outcomes)
			e.store.note("commit", err) //nolint:errcheck // answered here
			w.putBack(ctx, g.states, h)
			for _, o := range touched {
				o.op.refuse(e.stats.unsure(o.op.routes[0], "postgres refused the transaction, and what concerns keys without a row has been done"))
			}
			again = append(again, opsOf(rest)...)
			return
		case (e.store.BadData(err) || e.store.Rejected(err)) && !rawOnly && g.hasColumn():
			// The gate let something pass that this server refuses as JSON, or the table has rules of its own: each command finds out by itself whether it is the one.
			w.putBack(ctx, g.states, h)
			tx.Rollback()
			whole := slices.Concat(again, opsOf(outcomes))
			again = nil
			if len(whole) == 1 && (len(adopted) == 0 || whole[0].odd) {
				whole[0].refuse(e.notTaken(columnOf(whole[0].routes), err))
				return
			}
			if len(whole) == 1 {
				whole[0].odd = true // what is refused is perhaps not the command's, but what it would replace
			}
			for _, op := range whole {
				w.storeFirst(ctx, []*writeOp{op}, false)
			}
			return
		case e.store.BadData(err) && !rawOnly:
			// The gate let something pass that this server refuses as JSON. The bytes are kept all the same.
			e.stats.rawOnly.Add(1)
			w.putBack(ctx, g.states, h)
			whole := slices.Concat(again, opsOf(outcomes))
			again = nil
			w.storeFirst(ctx, whole, true)
			return
		default:
			e.store.note("commit", err) //nolint:errcheck // answered below
			if lost {
				w.commitFailed(outcomes, err)
			} else {
				w.notCommitted(ctx, g, outcomes, h, err)
			}
			return
		}
	}
	tx.Rollback() // after a COMMIT nothing; else the locks go

	// Step 4.
	bad := lost
	if !lost {
		bad = !w.fill(ctx, g, h)
	}
	if len(journaled) > 0 {
		e.journal.keepIntent(intent, journaled, known)
	}
	safe := !bad || lost || e.journalStale(ctx, g)
	for _, o := range outcomes {
		if o.changed && bad && !lost && (!safe || e.onlyInRedis(g, o.op)) {
			o.op.refuse(e.stats.unsure(o.op.routes[0], "the connection to Redis broke"))
			continue
		}
		o.op.done(o.reply, o.pass)
	}
}

// leaseSafe after step 2 a COMMIT is not begun any more: it and step 4 must end before leaseMS.
const leaseSafe = 2 * time.Second

// journalStale makes the entry "Redis is stale" for the rows that a write has committed and could not put into Redis,
// before it is acknowledged. Under the key lock, and only where the row is still the one that the write left: a later
// write has seen to Redis itself.
func (e *engine) journalStale(ctx context.Context, g *group) bool {
	var refs, stale []policy.Ref
	var states []*keyState
	for _, s := range g.states {
		if s.dirty && !s.wait && !s.alone() {
			refs, states = append(refs, s.ref), append(states, s)
		}
	}
	if len(refs) == 0 {
		return true
	}
	tx, err := e.store.begin(ctx, refs)
	if err != nil {
		return false
	}
	defer tx.Rollback()
	for i, row := range tx.Rows() {
		s := states[i]
		if s.left(row, e.clocks.redisNow()) {
			stale = append(stale, refs[i])
		}
	}
	if len(stale) == 0 {
		return true
	}
	known := e.journal.entriesOf(stale)
	id, err := tx.Commit(ctx, nil, stale, known, false)
	if e.store.note("journal", err) != nil {
		return false
	}
	e.journal.keepIntent(id, stale, known)
	return true
}

// left: row is what the write has left, by all one can tell. It may have expired since, and then reads as if somebody had deleted it.
func (s *keyState) left(row policy.Row, now int64) bool {
	if s.now.Exists && row.State == policy.Live {
		return same(s.route, s.now.Data, row.Value)
	}
	expired := s.now.ExpireAt >= 0 && s.now.ExpireAt <= now+clockSlack
	return (!s.now.Exists || expired) && row.State == policy.Tombstone
}

// clockSlack: what a moment that was told in Postgres's time may differ, in ms, from what it is in that now.
const clockSlack = 1000

// onlyInRedis: the command deleted a key that is not a string, which no journal can do later.
func (e *engine) onlyInRedis(g *group, op *writeOp) bool {
	for _, ref := range op.keys {
		s := g.states[g.at[ref.Key]]
		if s.dirty && !s.on && !s.now.Exists && s.redis.code == keyOther && s.row.State != policy.Live {
			return true
		}
	}
	return false
}

// rowFlag tells scriptInvalidate what the store has.
func rowFlag(row policy.Row) string {
	return [...]string{policy.Absent: "0", policy.Live: "1", policy.Tombstone: "t", policy.NoRow: "0"}[row.State]
}

// withoutRedis decides what may be assumed of a key while Redis cannot be asked.
func (s *keyState) withoutRedis(e *engine, g *group) {
	switch {
	case s.alone():
		s.failed = noRow(s.route)
	case s.route.WritePolicy == policy.WriteBothStores && s.route.Phase.Rules().RedisDownWrite == policy.ToStoreAndJournal:
		s.failed = unavailable(s.route, "write_policy both: redis cannot be reached")
	case !g.needs(s):
	case e.journal.staleStore(s.ref.Key):
		s.failed = unavailable(s.route, "the store's copy is stale and redis cannot be reached")
	case s.row.State == policy.Absent && e.mayBeInRedis(s.route):
		s.failed = unavailable(s.route, "redis may hold the key and cannot be reached")
	}
}

// hold is what a writer has in Redis after step 2: the leases of its keys, under its number and token, if Redis still runs as it did.
type hold struct {
	number, token string
	epoch         uint64
}

// notCommitted ends a group that has done step 2 and whose COMMIT did not succeed: the keys are not in Redis, and must not be missing
// there for as long as Postgres is away.
//
// If it is certain that nothing was stored, the rows that were read under the lock are the truth: they go back, and if Postgres is
// gone the commands begin again as the phase says for that. If it is not certain, see writeOn.
func (w *writer) notCommitted(ctx context.Context, g *group, outcomes []outcome, h hold, err error) {
	e := w.e
	var changed []outcome
	for _, o := range outcomes {
		if o.changed {
			changed = append(changed, o)
		} else {
			o.op.done(o.reply, o.pass)
		}
	}
	if !e.store.Uncertain(err) {
		w.putBack(ctx, g.states, h)
		if e.store.gone(err) {
			w.withoutStore(ctx, opsOf(changed), err)
		} else {
			w.commitFailed(changed, err)
		}
		return
	}
	w.writeOn(ctx, g, h)
	for _, o := range changed {
		if needsStore(o.op.routes) == nil && g.isOn(o.op.keys) {
			o.op.done(o.reply, o.pass)
			continue
		}
		o.op.refuse(e.stats.unsure(o.op.routes[0], "the connection to Postgres broke"))
	}
}

// putBack undoes step 2 for keys whose rows are certain to be as they were: their values go back into Redis, and the leases are given
// up. Only under the leases: whoever took one since is newer.
func (w *writer) putBack(ctx context.Context, states []*keyState, h hold) {
	e := w.e
	var back, free []string
	argv := []string{h.token}
	for _, s := range states {
		if s.row.State == policy.Live && s.redis.code == keyDone && s.route.Phase.Rules().Write == policy.WriteBoth {
			back = append(back, s.ref.Key)
			argv = append(argv, string(exact(s.route, s.row, s.redis)), strconv.FormatInt(e.clocks.toRedis(s.row.ExpiresAt), 10))
		} else if s.redis.code != keyRefused && s.redis.code != keyMarked {
			free = append(free, s.ref.Key)
		}
	}
	run := func(s *script, keys []string, argv ...string) {
		if len(keys) == 0 || e.up.epoch.Load() != h.epoch {
			return // another run of Redis: the leases are void
		}
		if _, err := e.up.script(ctx, s, keys, argv...); err != nil {
			e.redisFailed(err)
		}
	}
	run(scriptPromote, back, argv...)
	run(scriptAbsent, free, h.token, "0")
}

// writeOn ends what a COMMIT of unknown fate has begun: what the group's changed keys were to hold goes into Redis, marked "store is
// stale". So it does not matter whether the row holds it: the mark keeps the row from being read, and the repair writes it. It is the
// result that is written, not the command that is repeated, and only under the lease of step 2:
//
//	1 our COMMIT is sent, the connection breaks    2 B locks K, reads the row as our COMMIT has left it, and takes the lease
//	3 we find the lease gone and write nothing: the answer is -UNCERTAIN
//
//	1 our COMMIT is sent, the connection breaks    2 we write K, marked    3 B locks K, finds the mark, repairs, begins again
//
//	1 our COMMIT sits in a socket, and we write K, marked    2 a client writes K in Redis, marked    3 our COMMIT arrives: an old row
//	4 the mark keeps it from being read, and the repair, which needs the lock that our COMMIT held, writes over it
//
// A key that is journaled as stale in Redis is left alone: its row would win over what is written. So are phase0's, which Redis does
// not hold; their leases lapse, since a row may yet change that a reader could promote before.
func (w *writer) writeOn(ctx context.Context, g *group, h hold) {
	e := w.e
	var same, dirty []*keyState
	for _, s := range g.states {
		switch {
		case !s.dirty:
			same = append(same, s)
		case s.alone(): // done, or not to be done
		case !s.wait && s.route.Phase.Rules().Write == policy.WriteBoth && !s.both && !e.journal.staleRedis(s.ref.Key):
			dirty = append(dirty, s)
		}
	}
	w.putBack(ctx, same, h)
	version := e.journal.version()
	for len(dirty) > 0 && e.up.epoch.Load() == h.epoch {
		var refs []policy.Ref
		var keys []string
		argv := []string{h.number, version, leaseMS}
		for _, s := range dirty {
			op, ms, abs := "d", "-1", "0"
			switch {
			case s.now.Other:
				op = "x"
			case s.now.Exists:
				op = "s"
				ms, abs = s.redisLife()
			}
			refs, keys = append(refs, s.ref), append(keys, s.ref.Key)
			argv = append(argv, op, string(s.now.Data), ms, abs, "t"+h.token, "", "0")
		}
		e.journal.keepMarks(refs, version)
		rs, err := e.up.script(ctx, scriptWrite, keys, argv...)
		if err != nil {
			e.journal.forgetMarks(refs, version) // if it ran all the same, its marks stand in Redis
			e.redisFailed(err)
			return
		}
		ours := dirty[:0:0]
		for i, r := range rs {
			if r.code == keyDone {
				ours = append(ours, dirty[i])
			}
		}
		if len(ours) == len(dirty) {
			for _, s := range ours {
				s.on = true
			}
			e.journal.leaveMarks(refs, version)
			return
		}
		e.journal.forgetMarks(refs, version)
		dirty = ours
	}
}

// isOn: what the group changed of these keys stands in Redis, marked.
func (g *group) isOn(keys []policy.Ref) bool {
	for _, ref := range keys {
		if s := g.states[g.at[ref.Key]]; s.dirty && !s.on {
			return false
		}
	}
	return true
}

func (g *group) allOn() bool { return g.isOn(g.refs()) }

// needsStore returns the first route whose writes are refused while Postgres is down, nil if there is none.
func needsStore(routes []*policy.Route) *policy.Route {
	for _, r := range routes {
		if r.Phase.Rules().StoreDownWrite != policy.ToRedisAndJournal || r.WritePolicy == policy.WriteBothStores {
			return r
		}
	}
	return nil
}

// commitFailed answers a group whose COMMIT did not succeed.
func (w *writer) commitFailed(outcomes []outcome, err error) {
	unknown := w.e.store.Uncertain(err)
	for _, o := range outcomes {
		switch {
		case !o.changed:
			o.op.done(o.reply, o.pass)
		case unknown:
			o.op.refuse(w.e.stats.unsure(o.op.routes[0], "the connection to Postgres broke"))
		default:
			o.op.refuse(unavailable(o.op.routes[0], "postgres refused the transaction"))
		}
	}
}

// fill is step 4. false: Redis may hold stale copies, the journal entry must stay.
func (w *writer) fill(ctx context.Context, g *group, h hold) bool {
	e := w.e
	var keys []string
	var states []*keyState
	argv := []string{h.number, h.token, leaseMS}
	for _, s := range g.states {
		if s.wait || s.redis.code == keyRefused || s.alone() && s.on {
			continue
		}
		op, ms, abs, value := "x", "-1", "0", ""
		switch {
		case s.alone(), s.odd && !s.dirty: // it never left
		case s.route.Phase.Rules().Write == policy.WriteStoreOnly:
			if s.dirty && (s.row.State == policy.Live || s.now.Exists || s.redis.code == keyOther) {
				op = "n"
			}
		case s.now.Exists && !s.now.Other:
			op, value = "s", string(s.now.Data)
			ms, abs = s.redisLife()
		case (s.redis.code == keyOther || s.odd) && s.dirty:
			op = "d"
		}
		keys, states = append(keys, s.ref.Key), append(states, s)
		argv = append(argv, op, value, ms, abs)
	}
	if len(keys) == 0 {
		return true
	}
	var lost []*keyState
	if e.up.epoch.Load() != h.epoch { // run_id may have changed since step 2: the leases are void
		lost = states
	} else {
		rs, err := e.up.script(ctx, scriptFill, keys, argv...)
		if err != nil {
			e.redisFailed(err)
			return false
		}
		for i, r := range rs {
			if r.code == keyLost {
				lost = append(lost, states[i])
			}
		}
	}
	if len(lost) == 0 {
		return true
	}
	e.stats.lostLeases.Add(int64(len(lost)))
	return e.invalidateAgain(ctx, lost, h.token)
}

// lift helps a Postgres that crashed and forgot the last numbers it had drawn: Redis remembers them and refuses what comes
// with a lower one, so the next ones must be higher.
func (e *engine) lift(ctx context.Context, tx Tx, rs []keyReply) {
	above := refusedAbove(rs)
	if above == 0 || tx == nil {
		return
	}
	tx.Rollback() // Lift waits for open transactions
	lifted, err := e.store.Lift(ctx, above)
	if err != nil {
		e.store.note("lift", err) //nolint:errcheck // the writers begin again, a bounded number of times
	} else if lifted {
		e.stats.lifts.Add(1)
	}
}

// refusedAbove is the highest number that Redis refused a lower one for, 0 if it refused none.
func refusedAbove(rs []keyReply) (above int64) {
	for _, r := range rs {
		if r.code == keyRefused {
			above = max(above, r.at)
		}
	}
	return above
}

// invalidateAgain deletes keys in Redis under their key locks: the lease of a write had lapsed, so somebody
// may have promoted what it replaced.
func (e *engine) invalidateAgain(ctx context.Context, states []*keyState, token string) bool {
	refs := make([]policy.Ref, len(states))
	for i, s := range states {
		refs[i] = s.ref
	}
	tx, err := e.store.lock(ctx, refs)
	if err != nil {
		return false
	}
	defer tx.Rollback()
	argv := []string{strconv.FormatInt(tx.Number(), 10), token, leaseMS}
	keys := make([]string, len(refs))
	for i, row := range tx.Rows() {
		keys[i] = refs[i].Key
		argv = append(argv, rowFlag(row))
	}
	// A mark or a value without a row means that Redis holds a newer write: it stays.
	if _, err := e.up.script(ctx, scriptInvalidate, keys, argv...); err != nil {
		e.redisFailed(err)
		return false
	}
	return true
}

// withoutStore sends a group to where the phase says while Postgres cannot be had.
func (w *writer) withoutStore(ctx context.Context, ops []*writeOp, err error) {
	e := w.e
	if !e.store.gone(err) {
		if !e.store.Overloaded(err) {
			w.notLocked(ops)
			return
		}
		for _, op := range ops {
			e.stats.shed.Add(1)
			op.refuse(unavailable(op.routes[0], "too many writes wait for the store"))
		}
		return
	}
	var rest []*writeOp
	for _, op := range ops {
		if r := needsStore(op.routes); r != nil {
			op.refuse(unavailable(r, "postgres cannot be reached"))
		} else {
			rest = append(rest, op)
		}
	}
	if len(rest) > 0 {
		w.redisFirst(ctx, rest, false)
	}
}

// redisFirst is the write whose truth is Redis: phase2 and drain under the key locks, and any phase while Postgres
// is down, without them. One script marks the keys "store is stale" and writes them; then the rows go, and
// the marks. Whatever breaks in between leaves the mark, and every sidecar repairs what is marked.
func (w *writer) redisFirst(ctx context.Context, ops []*writeOp, locked bool) {
	e := w.e
	if !e.up.trusted() {
		for _, op := range ops {
			op.refuse(unavailable(op.routes[0], "redis cannot be reached"))
		}
		return
	}
	g := newGroup(ops)
	number := "0"
	var tx Tx
	if locked {
		var err error
		if tx, err = e.store.begin(ctx, g.refs()); err != nil {
			w.withoutStore(ctx, ops, err)
			return
		}
		defer tx.Rollback()
		number = strconv.FormatInt(tx.Number(), 10)
		for i, row := range tx.Rows() {
			g.states[i].row = row
		}
	} else {
		for _, s := range g.states {
			if e.journal.staleRedis(s.ref.Key) {
				s.failed = staleAndAlone(s.route)
			}
		}
	}
	var rs []keyReply
	if g.looks() {
		var err error
		if rs, err = e.readUnheld(ctx, g.keys(), number, locked); err != nil {
			w.redisRefused(ops, err, false)
			return
		}
		for i, s := range g.states {
			s.redis = rs[i]
		}
		var named map[string]bool
		if locked {
			if named, err = e.bothName(ctx, tx, g.refs(), rs); err != nil {
				w.withoutStore(ctx, ops, err)
				return
			}
		}
		for _, s := range g.states {
			s.both = named[s.ref.Key]
			s.fromRedis(e, g, locked)
		}
	}
	outcomes, again := g.evaluate(e)
	defer func() {
		e.lift(ctx, tx, rs)
		w.again(again)
	}()

	version := e.journal.version()
	var keys []string
	var drop []policy.Change
	var dirty []policy.Ref
	argv := []string{number, version, leaseMS}
	for _, s := range g.states {
		if !s.dirty || s.wait {
			continue
		}
		op, ms, abs := "d", "-1", "0"
		if s.now.Exists {
			op = "s"
			if s.kept && s.redis.code == keyValue {
				ms = "k"
			} else {
				ms, abs = s.redisLife()
			}
		}
		want := ""
		switch {
		case s.blind(g):
		case s.redis.code == keyValue:
			want = "=" + string(s.redis.value)
		case s.redis.code == keyDone:
			want = "!"
		}
		keys = append(keys, s.ref.Key)
		dirty = append(dirty, s.ref)
		argv = append(argv, op, string(s.now.Data), ms, abs, want, s.redis.mark, strconv.FormatInt(s.redis.num, 10))
		if dropped(s.row) {
			drop = append(drop, policy.Change{Ref: s.ref, Op: policy.Drop})
		}
	}
	named := locked && len(keys) > 0 && e.recalls(ctx, tx, g.refs())
	for _, s := range g.states {
		if named && s.dirty && !s.wait && s.row.State == policy.NoRow {
			drop = append(drop, policy.Change{Ref: s.ref, Op: policy.Drop})
		}
	}
	if len(keys) > 0 {
		e.journal.keepMarks(dirty, version)
		written, err := e.up.script(ctx, scriptWrite, keys, argv...)
		if err != nil {
			// If it ran all the same, its mark stands in Redis, and the polls find it there.
			e.journal.forgetMarks(dirty, version)
			e.redisFailed(err)
			w.redisRefused(opsOf(outcomes), err, true)
			return
		}
		for _, r := range written {
			if r.code != keyDone {
				// Somebody without the lock was faster (phase3, or cut off from Postgres): compute again.
				e.journal.forgetMarks(dirty, version)
				e.lift(ctx, tx, written)
				again = append(again, opsOf(outcomes)...)
				return
			}
		}
	}
	e.countNoRow(g, outcomes)
	struck := len(keys) == 0
	ok := true
	if locked && len(keys) > 0 {
		if len(drop) > 0 {
			if _, err := tx.Commit(ctx, drop, nil, nil, false); err != nil {
				e.store.note("commit", err) //nolint:errcheck // the mark stays
				ok = false
			}
		}
		if ok && !named {
			argv := []string{number}
			for range keys {
				argv = append(argv, version)
			}
			if _, err := e.up.script(ctx, scriptStrike, keys, argv...); err != nil {
				e.redisFailed(err)
			}
			// The rows are gone: a mark that still stands calls for a repair, which will find nothing to do, but it need not outlive Redis's memory.
			//
			//	1 K is written and marked, its row goes, and Redis dies before the mark is struck    2 Redis is back, empty: K is forgotten, as phase2 allows
			//	3 a sidecar in phase1 that does not trust Redis yet commits a row for K    4 we put the mark back, and K reads as absent
			e.journal.forgetMarks(dirty, version)
			struck = true
		}
		tx.Rollback()
	}
	if !struck {
		e.journal.leaveMarks(dirty, version)
	}
	for _, o := range outcomes {
		if o.changed && !ok && (e.namesStale(o.op.keys) || g.both(o.op.keys)) {
			o.op.refuse(e.stats.unsure(o.op.routes[0], "the connection to Postgres broke"))
			continue
		}
		o.op.done(o.reply, o.pass)
	}
}

// readUnheld is scriptRead. Without the key locks somebody who has them, a sidecar that still reaches Postgres, may be at work: between the steps of its
// write Redis lacks the key. That is waited for as long as a reader does, and no longer: the writer may have died.
//
//	1 a sidecar takes k out of Redis, to put it back after its COMMIT    2 we, cut off from Postgres, DEL k: it seems not to be there, and is counted as 0
func (e *engine) readUnheld(ctx context.Context, keys []string, number string, locked bool) ([]keyReply, error) {
	for end := time.Now().Add(heldWait); ; time.Sleep(heldPoll) {
		rs, err := e.up.script(ctx, scriptRead, keys, number)
		if err != nil || locked || !anyHeld(rs) || time.Now().After(end) {
			return rs, err
		}
	}
}

func anyHeld(rs []keyReply) bool {
	return slices.ContainsFunc(rs, func(r keyReply) bool { return r.held && r.mark == "" })
}

// staleAndAlone refuses a write that only Redis could take, of a key whose copy there is stale. Were it accepted, both journals would
// name the key, and the row win over it.
func staleAndAlone(r *policy.Route) *refusal {
	return unavailable(r, "redis's copy is stale and postgres cannot be reached")
}

// both: both journals name one of the keys.
func (g *group) both(keys []policy.Ref) bool {
	return slices.ContainsFunc(keys, func(ref policy.Ref) bool { return g.states[g.at[ref.Key]].both })
}

// namesStale: the copy in Redis of one of the keys is journaled as stale.
func (e *engine) namesStale(keys []policy.Ref) bool {
	return slices.ContainsFunc(keys, func(ref policy.Ref) bool { return e.journal.staleRedis(ref.Key) })
}

func opsOf(outcomes []outcome) []*writeOp {
	ops := make([]*writeOp, len(outcomes))
	for i, o := range outcomes {
		ops[i] = o.op
	}
	return ops
}

// blind: no command of the group looks at what the key holds.
func (s *keyState) blind(g *group) bool {
	return !g.any(s, func(op *writeOp) bool { return !strcmd.Unconditional(op.args) })
}

// looks: some command of the group depends on what a key holds.
func (g *group) looks() bool {
	for _, op := range g.ops {
		if !strcmd.Unconditional(op.args) {
			return true
		}
	}
	return false
}

// needs: what becomes of the key depends on what it holds. Of DEL only the count does.
func (g *group) needs(s *keyState) bool {
	return g.any(s, func(op *writeOp) bool {
		return !strcmd.Unconditional(op.args) && !bytes.EqualFold(op.args[0], []byte("del")) && !bytes.EqualFold(op.args[0], []byte("unlink"))
	})
}

func (g *group) any(s *keyState, is func(*writeOp) bool) bool {
	for _, op := range g.ops {
		for _, ref := range op.keys {
			if ref.Key == s.ref.Key && is(op) {
				return true
			}
		}
	}
	return false
}

// bothName tells which of keys, whose rows are locked, both journals name: there the row wins, a deleted one too. The entries are those of the moment, and not
// of the last poll: a mark that was struck may be back.
//
//	1 SET k in phase2 marks k, drops its row, strikes the mark    2 Redis fails over to a replica that has the SET and not the strike
//	3 a sidecar in phase1 that does not trust Redis yet commits DEL k, with an entry    4 to us, in phase2, k is marked, and Redis has what was deleted
func (e *engine) bothName(ctx context.Context, tx Tx, refs []policy.Ref, reds []keyReply) (map[string]bool, error) {
	var keys []string
	for i, row := range tx.Rows() {
		if reds[i].mark != "" && speaks(row) {
			keys = append(keys, refs[i].Key)
		}
	}
	if len(keys) == 0 {
		return nil, nil
	}
	named, err := tx.Named(ctx, keys)
	return named, e.store.note("named", err)
}

// fromRedis decides what a key holds when Redis is the truth unless an unmarked row says otherwise.
func (s *keyState) fromRedis(e *engine, g *group, locked bool) {
	s.now = e.replyValue(s.redis)
	absent := s.redis.code == keyDone
	// Where the store is not read, phase3 may write beside us, which tells the store nothing: the row may be older than what Redis has.
	row := locked && s.route.Phase.Rules().ReadsStore
	switch {
	case s.redis.code == keyRefused:
		s.wait = true
	case s.redis.code == keyOther && s.row.State != policy.Live:
		// a list, say, made after the string was deleted
	case row && s.redis.mark == "" && speaks(s.row):
		s.now = e.rowValue(s.row) // not yet promoted, or Redis's copy is stale: the row is the truth
		if s.now.Exists {
			s.now.Data = exact(s.route, s.row, s.redis)
		}
	case row && s.both:
		s.now = e.rowValue(s.row)
	case !locked && absent && s.redis.mark == "" && g.needs(s):
		// The store may hold the key and cannot be asked. What does not depend on it may go on.
		s.failed = unavailable(s.route, "the store may hold the key and cannot be asked")
	}
}

// redisRefused answers a group that Redis did not run (or may have run, if wrote).
func (w *writer) redisRefused(ops []*writeOp, err error, wrote bool) {
	for _, op := range ops {
		words := ownWords(err)
		switch {
		case words != nil:
			op.done(words, false)
		case wrote && sent(err):
			op.refuse(w.e.stats.unsure(op.routes[0], "the connection to Redis broke"))
		default:
			op.refuse(unavailable(op.routes[0], "redis cannot be reached"))
		}
	}
}

// ownWords is Redis's own error reply where it refused a write and is otherwise well: it has the right words. What it adds about
// the script that ran into it is not the client's.
func ownWords(err error) []byte {
	var oe *outageError
	if !errors.As(err, &oe) || oe.reply == "" || oe.why.dead() {
		return nil
	}
	text, _, _ := strings.Cut(oe.reply, " script: ")
	return appendError(nil, text)
}

// sent tells whether a script that failed with err may have run.
func sent(err error) bool {
	var oe *outageError
	return !errors.As(err, &oe) || oe.reply == "" && (oe.why == outTimeout || oe.why == outBroken)
}
