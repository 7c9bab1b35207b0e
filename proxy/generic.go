package proxy

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"cacheproxy/policy"
)

// runner runs commands that only Redis can evaluate on routed keys: load, run, mirror (docs/consistency.md, "Commands that only Redis can run"). Each has a
// connection of its own while it runs, for it needs WATCH and MULTI.
type runner struct {
	e       *engine
	slots   chan struct{} // one per command in flight
	waiting atomic.Int64  // commands not done
	mu      sync.Mutex
	idle    [2][]*runConn // guarded by mu: by protocol version
	shut    bool          // guarded by mu
	wg      sync.WaitGroup
}

// runConn is a connection for the steps of one command: read and watch, then run.
type runConn struct {
	*link
	rd    *bufio.Reader
	idled bool // it lay idle before: Redis may have closed it (its timeout, a restart)
}

const (
	// maxRunners bounds the connections to Redis that load-run-mirror may hold.
	maxRunners = 32
	// maxIdleRunners stay open for the next command.
	maxIdleRunners = 4
	// maxRunQueue bounds the commands that wait for a connection.
	maxRunQueue = 4096
)

func newRunner(e *engine) *runner { return &runner{e: e, slots: make(chan struct{}, maxRunners)} }

// runOp is one command, or one transaction, to load, run and mirror.
type runOp struct {
	raw    []byte // the command; owned by the caller until done is called
	keys   []policy.Ref
	routes []*policy.Route // of keys
	writes []bool          // keys that it may change
	proto  int
	source string // a key without a store whose value it would move into a column; "": none
	done   func(reply []byte)

	// Of a transaction. raw is EXEC; its commands are queued on pin. watched are rows as they were at WATCH, of keys that have no
	// copy in Redis.
	pin     *pin
	queued  [][]byte // them again; nil if the client watches or tracks keys, or there are too many
	watched map[string]policy.Row
	flush   bool // it empties the database: the stores are fenced
	away    bool // it ends in another database than that of routed keys:
	db      int
}

// add names a key, once.
func (op *runOp) add(ref policy.Ref, route *policy.Route, write bool) {
	for i := range op.keys {
		if op.keys[i].Key == ref.Key {
			op.writes[i] = op.writes[i] || write
			return
		}
	}
	op.keys = append(op.keys, ref)
	op.routes = append(op.routes, route)
	op.writes = append(op.writes, write)
}

// route is the one that refusals name: the first key's; nil if there is none.
func (op *runOp) route() *policy.Route {
	if len(op.routes) == 0 {
		return nil
	}
	return op.routes[0]
}

// refuse answers with a clear no; a transaction is discarded.
func (op *runOp) refuse(c *refusal) []byte {
	op.discard()
	return c.reply(nil)
}

func (op *runOp) discard() {
	if op.pin != nil {
		_ = op.pin.send(appendCommand(nil, "DISCARD"), pending{cb: &call{done: make(chan result, 1)}}) // a lane that is down has discarded it
	}
}

// submit runs op in a goroutine of its own.
func (r *runner) submit(op *runOp) {
	r.wg.Add(1)
	tooMany := r.waiting.Add(1) > maxRunQueue
	go func() {
		defer r.wg.Done()
		defer r.waiting.Add(-1)
		if tooMany {
			r.e.stats.shed.Add(1)
			op.done(op.refuse(unavailable(op.route(), "too many commands wait to run")))
			return
		}
		ctx, cancel := context.WithTimeout(context.Background(), patience*r.e.cfg.StoreTimeout)
		defer cancel()
		select {
		case r.slots <- struct{}{}:
		case <-ctx.Done():
			r.e.stats.shed.Add(1)
			op.done(op.refuse(unavailable(op.route(), "too many commands wait to run")))
			return
		}
		defer func() { <-r.slots }()
		for ctx.Err() == nil {
			reply, err := r.run(ctx, op)
			if errors.Is(err, errOvertaken) {
				continue
			}
			op.done(reply)
			return
		}
		op.done(op.refuse(unavailable(op.route(), "the key changes hands too often")))
	}()
}

func (r *runner) close() {
	r.wg.Wait()
	r.mu.Lock()
	defer r.mu.Unlock()
	r.shut = true
	for _, l := range r.idle {
		for _, c := range l {
			c.Close() //nolint:errcheck // idle
		}
	}
}

func (r *runner) take(ctx context.Context, proto int) (*runConn, error) {
	r.mu.Lock()
	if l := r.idle[proto-2]; len(l) > 0 {
		c := l[len(l)-1]
		r.idle[proto-2] = l[:len(l)-1]
		r.mu.Unlock()
		c.idled = true
		return c, nil
	}
	r.mu.Unlock()
	l, err := r.e.up.dialer.dial(ctx, proto, "cacheproxy-run")
	if err != nil {
		return nil, err
	}
	return newRunConn(l), nil
}

func newRunConn(l *link) *runConn { return &runConn{link: l, rd: bufio.NewReaderSize(l, 16<<10)} }

func (r *runner) give(c *runConn) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.shut || len(r.idle[c.proto()-2]) >= maxIdleRunners {
		c.Close() //nolint:errcheck // not needed
		return
	}
	r.idle[c.proto()-2] = append(r.idle[c.proto()-2], c)
}

func (c *runConn) proto() int {
	if len(c.hello) > 0 && c.hello[0] == '%' {
		return 3
	}
	return 2
}

// ask writes requests and reads n replies. The wait is bounded.
func (c *runConn) ask(req []byte, n int, timeout time.Duration) ([][]byte, error) {
	if err := c.SetDeadline(time.Now().Add(timeout)); err != nil {
		return nil, err
	}
	if _, err := c.Write(req); err != nil {
		return nil, &outageError{why: classifyError(err)}
	}
	out := make([][]byte, 0, n)
	for len(out) < n {
		var f framer
		var b []byte
		for {
			part, err := c.rd.Peek(max(1, c.rd.Buffered()))
			if err != nil {
				return nil, &outageError{why: classifyError(err)}
			}
			have := len(b)
			b = append(b, part...)
			size, err := f.scan(b)
			if err != nil {
				return nil, err
			}
			if size == 0 {
				c.rd.Discard(len(part)) //nolint:errcheck // it was peeked
				continue
			}
			c.rd.Discard(size - have) //nolint:errcheck // it was peeked
			out = append(out, b[:size])
			break
		}
	}
	return out, nil
}

// runTimeout bounds a command that runs in Redis under key locks; it is not a read that could be answered elsewhere,
// and scripts may take a while, but the locks must not be held for long.
func (r *runner) runTimeout() time.Duration { return max(r.e.cfg.StoreTimeout, r.e.cfg.Redis.Timeout) }

// run is one attempt; errOvertaken: begin again.
func (r *runner) run(ctx context.Context, op *runOp) ([]byte, error) {
	e := r.e
	if !e.up.returns() {
		return op.refuse(unavailable(op.route(), "redis cannot be reached")), nil
	}
	st := &running{runOp: op, number: "0", first: make([]bool, len(op.keys)), token: "w" + e.id + strconv.FormatUint(e.fill.seq.Add(1), 36)}
	if op.flush {
		return r.runFlush(ctx, st)
	}
	tx, err := e.store.begin(ctx, op.keys)
	switch {
	case err == nil:
		defer tx.Rollback()
		st.tx, st.rows, st.number = tx, tx.Rows(), strconv.FormatInt(tx.Number(), 10)
		for i, route := range op.routes {
			st.first[i] = route.Phase.Rules().Write.KeepsRow() && st.rows[i].State != policy.NoRow
		}
		st.truth = st.rowsRead()
		st.named = e.recalls(ctx, tx, op.keys)
	case e.store.gone(err) && op.withoutStore() && e.namesStale(op.keys):
		return op.refuse(staleAndAlone(op.route())), nil
	case e.store.gone(err) && op.withoutStore():
		st.rows = make([]policy.Row, len(op.keys))
		st.truth = st.rows
	case e.store.Overloaded(err):
		return op.refuse(unavailable(op.route(), "too many writes wait for the store")), nil
	default:
		return op.refuse(unavailable(op.route(), "postgres cannot be reached")), nil
	}
	if op.pin != nil {
		return r.runQueued(ctx, st)
	}
	return r.runAlone(ctx, st)
}

// withoutStore: the command may run while Postgres is down.
func (op *runOp) withoutStore() bool { return needsStore(op.routes) == nil }

// running is one attempt at an op: under the key locks, unless Postgres is down.
type running struct {
	*runOp
	tx     Tx     // nil: Postgres is down
	number string // "0": the same
	token  string
	first  []bool          // keys whose truth is the store
	rows   []policy.Row    // as the locks found them
	truth  []policy.Row    // those of them that may be taken for what a key holds; the others are absent
	redis  []keyReply      // what Redis has of them
	both   map[string]bool // keys that both journals name: the row wins

	epoch   uint64
	version string     // of the marks
	after   []keyReply // what the command left of the keys of captured()

	// Of a command that may write a key of a column (column.go).
	named  bool       // the store knows something of a key that has no row
	odd    []bool     // keys whose value in Redis no row can hold; nil: none
	before []before   // what the keys held when it ran
	left   []keyReply // what it left of the keys of overtaken()
}

// rowsRead leaves out what phases find that do not read the store: phase3 may write beside them, and tells the store nothing.
func (st *running) rowsRead() []policy.Row {
	rows := slices.Clone(st.rows)
	for i, route := range st.routes {
		if !route.Phase.Rules().ReadsStore {
			rows[i] = policy.Row{}
		}
	}
	return rows
}

// captured are the keys whose result is committed in the store before it can be seen in Redis; overtaken are those whose truth
// is Redis, and which are marked there. Keys that are only read are neither.
func (st *running) captured() []int  { return st.written(true) }
func (st *running) overtaken() []int { return st.written(false) }

func (st *running) written(first bool) (idx []int) {
	for i := range st.keys {
		if st.writes[i] && st.first[i] == first {
			idx = append(idx, i)
		}
	}
	return idx
}

// pick returns the refs of some keys.
func (st *running) pick(idx []int) []policy.Ref {
	refs := make([]policy.Ref, len(idx))
	for j, i := range idx {
		refs[j] = st.keys[i]
	}
	return refs
}

// scriptArgs names keys to a script: each with its lease, behind the journal.
func (st *running) scriptArgs(idx []int) []string {
	args := []string{strconv.Itoa(1 + 2*len(idx)), journalName}
	for _, i := range idx {
		args = append(args, st.keys[i].Key, leaseName(st.keys[i].Key))
	}
	return args
}

func all(n int) []int {
	idx := make([]int, n)
	for i := range idx {
		idx[i] = i
	}
	return idx
}

var errMarked = errors.New("marked")

// refusalError carries a clear no out of a step.
type refusalError struct{ clear *refusal }

func (r *refusalError) Error() string { return r.clear.text }

// judge decides, from what Redis has of the keys, whether the command may run now. adopt is what must go into the store first, because
// Redis is its only holder.
func (st *running) judge(e *engine) (adopt []policy.Change, err error) {
	for i, k := range st.redis {
		switch {
		case st.first[i] && k.mark != "" && !st.both[st.keys[i].Key]:
			return nil, errMarked
		case st.tx == nil && k.mark == "" && k.code == keyDone:
			return nil, &refusalError{unavailable(st.routes[i], "the store may hold the key and cannot be asked")}
		case st.first[i] && k.code == keyValue && st.rows[i].State == policy.Absent && !e.fits(st.routes[i], k.value):
			if st.odd == nil {
				st.odd = make([]bool, len(st.keys))
			}
			st.first[i], st.odd[i] = false, true
		case st.first[i] && k.code == keyValue && st.rows[i].State == policy.Absent:
			adopt = append(adopt, policy.Change{Ref: st.keys[i], Op: policy.Put, Value: k.value, Expiry: e.rowLife(k.at)})
		}
	}
	return adopt, nil
}

// again does what must be done before the next attempt, and asks for it; or refuses.
func (r *runner) again(ctx context.Context, st *running, adopt []policy.Change, err error) ([]byte, error) {
	e := r.e
	var no *refusalError
	switch {
	case errors.As(err, &no):
		return st.refuse(no.clear), nil
	case errors.Is(err, errMarked):
		st.tx.Rollback() // the repair takes the same locks
		e.repairMarks(ctx, st.keys)
	case err != nil:
		return st.refuse(unavailable(st.route(), "redis cannot be asked")), nil
	case len(adopt) > 0:
		if _, err := st.tx.Commit(ctx, adopt, nil, nil, false); err != nil {
			e.store.note("commit", err) //nolint:errcheck // answered here
			if no := e.notTaken(columnOf(st.routes), err); no != nil && st.judged() {
				return st.refuse(no), nil
			}
			return st.refuse(unavailable(st.route(), "postgres refused the transaction")), nil
		}
	}
	return nil, errOvertaken
}

// runAlone runs one command, on a connection of the runner's.
func (r *runner) runAlone(ctx context.Context, st *running) ([]byte, error) {
	e := r.e
	conn, err := r.take(ctx, st.proto)
	if err != nil {
		e.redisFailed(err)
		return st.refuse(unavailable(st.route(), "redis cannot be reached")), nil
	}
	healthy := false
	defer func() {
		if healthy {
			r.give(conn)
			return
		}
		e.up.abandon(conn.link)
		conn.Close() //nolint:errcheck // given up
	}()
	if st.source != "" {
		if no, err := r.brings(conn, st); no != nil || err != nil {
			healthy = no != nil && conn.unwatch(e.cfg.Redis.Timeout) == nil
			if no == nil {
				e.redisFailed(err)
				no = unavailable(st.route(), "redis cannot be reached")
			}
			return st.refuse(no), nil
		}
	}
	var adopt []policy.Change
	err = r.prepare(ctx, conn, st)
	if err == nil {
		if no := r.bothName(ctx, st); no != nil {
			healthy = conn.unwatch(e.cfg.Redis.Timeout) == nil
			return st.refuse(no), nil
		}
		if adopt, err = st.judge(e); err != nil || len(adopt) > 0 {
			if conn.unwatch(e.cfg.Redis.Timeout) != nil {
				return nil, errOvertaken
			}
			healthy = true
			return r.again(ctx, st, adopt, err)
		}
	}
	if err != nil {
		if errors.Is(err, errOvertaken) {
			healthy = true
			return nil, err
		}
		if conn.idled && sent(err) {
			return nil, errOvertaken // nothing ran yet: another connection will do
		}
		e.redisFailed(err)
		if words := ownWords(err); words != nil {
			return words, nil
		}
		return st.refuse(unavailable(st.route(), "redis cannot be reached")), nil
	}
	reply, err := r.exec(conn, st)
	var said *refusedByRedis
	switch {
	case errors.Is(err, errOvertaken):
		healthy = true
		return nil, err
	case errors.As(err, &said):
		healthy = true
		return said.frame, nil
	case err != nil:
		e.redisFailed(err)
		return st.refuse(e.stats.unsure(st.route(), "the connection to Redis broke")), nil
	}
	healthy = true
	return r.settle(ctx, st, reply), nil
}

// prepare draws the number in Redis, looks at the keys and watches their leases: whoever overtakes us from now on makes EXEC fail.
func (r *runner) prepare(ctx context.Context, conn *runConn, st *running) error {
	e := r.e
	args := append([]string{"EVALSHA", scriptRead.sha}, st.scriptArgs(all(len(st.keys)))...)
	watch, mget := []string{"WATCH"}, []string{"MGET"}
	for _, k := range st.keys {
		watch, mget = append(watch, leaseName(k.Key)), append(mget, leaseName(k.Key))
	}
	req := appendCommand(nil, append(args, st.number)...)
	req = appendCommand(req, watch...)
	req = appendCommand(req, mget...)
	fs, err := conn.ask(req, 3, e.cfg.Redis.Timeout)
	if err != nil {
		return err
	}
	if bytes.HasPrefix(fs[0], []byte("-NOSCRIPT")) {
		if _, err := conn.ask(appendCommand(nil, "SCRIPT", "LOAD", scriptRead.body), 1, e.cfg.Redis.Timeout); err != nil {
			return err
		}
		return r.restart(conn)
	}
	for _, f := range fs {
		if err := errorOf(f); err != nil {
			return err
		}
	}
	if st.redis, err = keyReplies(fs[0], len(st.keys)); err != nil {
		return err
	}
	leases, _ := elements(fs[2], nil)
	if len(leases) != len(st.keys) {
		return &outageError{why: outOther, reply: "MGET answered out of shape"}
	}
	for i, k := range st.redis {
		if k.code == keyRefused {
			err := r.restart(conn)
			e.lift(ctx, st.tx, st.redis)
			return err
		}
		if st.tx != nil {
			l, _ := bulk(leases[i])
			if have, _, _ := bytes.Cut(l, []byte(":")); string(have) != st.number {
				return r.restart(conn)
			}
		}
	}
	return nil
}

func (c *runConn) unwatch(timeout time.Duration) error {
	_, err := c.ask(appendCommand(nil, "UNWATCH"), 1, timeout)
	return err
}

func (r *runner) restart(conn *runConn) error {
	if err := conn.unwatch(r.e.cfg.Redis.Timeout); err != nil {
		return err
	}
	return errOvertaken
}

// exec loads, runs and captures in one MULTI.
func (r *runner) exec(conn *runConn, st *running) (reply []byte, err error) {
	req := appendCommand(nil, "MULTI")
	n := 1
	add := func(args ...string) {
		req = appendCommand(req, args...)
		n++
	}
	for i, k := range st.keys {
		row, red := st.truth[i], st.redis[i]
		// An unmarked row is the truth, also where Redis has a copy: that may be stale. So is one that both journals name.
		wins := red.mark == "" || st.both[k.Key]
		load := row.State == policy.Live && red.code != keyOther && wins
		b := beforeOf(red)
		if red.mark != "" && wins {
			add("HDEL", journalName, k.Key)
		}
		switch {
		case load:
			b.op, b.value, b.ends = "s", exact(st.routes[i], row, red), r.e.clocks.toRedis(row.ExpiresAt)
			if row.TTL >= 0 {
				add("SET", k.Key, string(b.value), "PXAT", strconv.FormatInt(b.ends, 10))
			} else {
				add("SET", k.Key, string(b.value))
			}
		case row.State == policy.Tombstone && red.code == keyValue && wins:
			b.op = "d"
			add("UNLINK", k.Key)
		}
		st.before = append(st.before, b)
	}
	at := n - 1
	req = append(req, st.raw...)
	n++
	tails := r.tails(st)
	for _, t := range tails {
		add(t...)
	}
	add("EXEC")
	st.epoch = r.e.up.epoch.Load()
	fs, err := conn.ask(req, n, r.runTimeout())
	if err != nil {
		r.unmark(st)
		return nil, err
	}
	exec := fs[n-1]
	if isNull(exec) { // a watched lease changed: somebody overtook us
		r.unmark(st)
		return nil, errOvertaken
	}
	if isError(exec) {
		r.unmark(st)
		if q := fs[at+1]; isError(q) { // the command was refused when it was queued: the client gets Redis's words
			exec = q
		}
		return nil, &refusedByRedis{bytes.Clone(exec)}
	}
	results, ok := elements(exec, nil)
	if !ok || len(results) != n-2 {
		r.unmark(st)
		return nil, &outageError{why: outOther, reply: "EXEC answered out of shape"}
	}
	return bytes.Clone(results[at]), r.took(st, results[at+1:])
}

// tails are the scripts that run behind the command, in the same transaction. By their text and not their digest: a client's SCRIPT
// FLUSH at the wrong moment would leave a command that ran and was not captured. The marks of this process count from now on.
func (r *runner) tails(st *running) (tails [][]string) {
	st.version = r.e.journal.version()
	if idx := st.captured(); len(idx) > 0 {
		t := append([]string{"EVAL", scriptCapture.body}, st.scriptArgs(idx)...)
		tails = append(tails, append(t, st.number, st.token, leaseMS, st.version))
	}
	if idx := st.overtaken(); len(idx) > 0 {
		if st.judged() {
			tails = append(tails, st.asideTail(idx))
		} else {
			t := append([]string{"EVAL", scriptOvertake.body}, st.scriptArgs(idx)...)
			tails = append(tails, append(t, st.number, st.version, leaseMS))
		}
		r.e.journal.keepMarks(st.pick(idx), st.version)
	}
	return tails
}

// queuedTails are the tails of a transaction as requests, and more commands behind them. They are about keys of the database that routes are for, wherever it ends.
func (r *runner) queuedTails(st *running, more ...[]string) (reqs [][]byte) {
	tails := append(r.tails(st), more...)
	if st.away && len(tails) > 0 {
		home := []string{"SELECT", strconv.Itoa(r.e.up.dialer.opt.DB)}
		tails = slices.Concat([][]string{home}, tails, [][]string{{"SELECT", strconv.Itoa(st.db)}})
	}
	for _, t := range tails {
		reqs = append(reqs, appendCommand(nil, t...))
	}
	return reqs
}

// unmark: nothing ran, or if it did all the same, its mark stands in Redis, and the polls find it there.
func (r *runner) unmark(st *running) { r.e.journal.forgetMarks(st.pick(st.overtaken()), st.version) }

// took reads the results of the tails.
func (r *runner) took(st *running, results [][]byte) (err error) {
	read := func(idx []int) (rs []keyReply, err error) {
		if err := errorOf(results[0]); err != nil {
			return nil, &captureError{err}
		}
		rs, err = keyReplies(results[0], len(idx))
		results = results[1:]
		return rs, err
	}
	if idx := st.captured(); len(idx) > 0 {
		if st.after, err = read(idx); err != nil {
			return err
		}
	}
	if idx := st.overtaken(); len(idx) > 0 && st.judged() {
		st.left, err = read(idx)
	}
	return err
}

// captureError: the command ran, and its result could not be taken out of Redis (which has no memory left, say).
type captureError struct{ error }

func (e *captureError) Unwrap() error { return e.error }

// refusedByRedis: nothing ran; the frame is the client's.
type refusedByRedis struct{ frame []byte }

func (r *refusedByRedis) Error() string { return "refused by redis" }

// refused: somebody has brought a higher number for one of the keys, or the same before.
func refused(rs []keyReply) bool {
	return slices.ContainsFunc(rs, func(k keyReply) bool { return k.code == keyRefused })
}

// runQueued runs the EXEC of a transaction that is queued on a client's own connection. Its commands stand there already, so the keys
// are loaded before it: a client that watches one sees it change if the row was not what Redis had. If the client watches none they are queued once
// more, behind a load, a WATCH of ours, and a load that changes nothing:
//
//	1 k is loaded, and watched    2 Redis evicts k    3 it is loaded again, or not    4 EXEC is refused, for k has changed, and all begins again
//	1 k is loaded    2 Redis evicts k    3 k is watched    4 it is loaded again: the same
//
// Where that cannot be done the transaction finds nothing at k: exception (d) of P3 in docs/consistency.md.
func (r *runner) runQueued(ctx context.Context, st *running) ([]byte, error) {
	e := r.e
	if st.tx != nil && st.changed(st.rows) {
		st.discard()
		return appendNullArray(nil, st.proto), nil
	}
	keys := make([]string, len(st.keys))
	for i, k := range st.keys {
		keys[i] = k.Key
	}
	var err error
	var own []string // the number is there, and ours
	had := make([]keyReply, len(keys))
	if slices.ContainsFunc(st.routes, (*policy.Route).Column) {
		if had, err = e.up.script(ctx, scriptRead, keys, st.number); err != nil {
			return r.notLoaded(st, err), nil
		}
		if refused(had) {
			e.lift(ctx, st.tx, had)
			return nil, errOvertaken
		}
		own = []string{"own"}
	}
	argv := []string{st.number}
	for i, row := range st.truth {
		first := "0"
		if st.first[i] {
			first = "1"
		}
		// A client that watches the key would see it change if its bytes were replaced by others that mean the same.
		argv = append(argv, first, rowFlag(row), string(exact(st.routes[i], row, had[i])), strconv.FormatInt(e.clocks.toRedis(row.ExpiresAt), 10))
	}
	if st.redis, err = e.up.script(ctx, scriptLoad, keys, append(slices.Clip(argv), own...)...); err != nil {
		return r.notLoaded(st, err), nil
	}
	if refused(st.redis) {
		e.lift(ctx, st.tx, st.redis)
		return nil, errOvertaken
	}
	if no := r.bothName(ctx, st); no != nil {
		return st.refuse(no), nil
	}
	if len(st.both) > 0 {
		// Once: whoever marks a key from now on is newer.
		forced := slices.Clone(argv)
		for i, k := range st.keys {
			if st.both[k.Key] {
				forced[2+4*i] += "!"
			}
		}
		if st.redis, err = e.up.script(ctx, scriptLoad, keys, append(forced, "own")...); err != nil {
			return r.notLoaded(st, err), nil
		}
		if refused(st.redis) {
			return nil, errOvertaken
		}
	}
	if adopt, err := st.judge(e); err != nil || len(adopt) > 0 {
		return r.again(ctx, st, adopt, err)
	}
	if st.judged() {
		if had, err = e.up.script(ctx, scriptRead, keys, st.number, "own"); err != nil {
			return r.notLoaded(st, err), nil
		}
		if refused(had) {
			return nil, errOvertaken
		}
		for _, k := range had {
			st.before = append(st.before, beforeOf(k))
		}
	}

	var reqs [][]byte
	if st.queued != nil {
		load := appendCommand(nil, append(append([]string{"EVAL", scriptLoad.body}, st.scriptArgs(all(len(st.keys)))...), append(argv, "own")...)...)
		reqs = append(reqs, appendCommand(nil, "DISCARD"), load, appendCommand(nil, append([]string{"WATCH"}, keys...)...), load)
		if st.tx == nil {
			if reply, err := r.lookAgain(ctx, st, reqs); reply != nil || err != nil {
				return reply, err
			}
			reqs = nil
		}
		reqs = append(append(reqs, appendCommand(nil, "MULTI")), st.queued...)
	}
	again := len(reqs)
	reqs = append(reqs, r.queuedTails(st)...)
	st.epoch = e.up.epoch.Load()
	fs, err := st.pin.ask(r.runTimeout(), append(reqs, st.raw)...)
	if err != nil {
		r.unmark(st)
		return r.broke(st, err), nil
	}
	reply, results := r.split(st, fs[again:])
	switch {
	case again > 0 && isError(fs[again-len(st.queued)-1]): // of MULTI: its user may not say it any more, and the commands ran one by one
		r.dropCaptured(ctx, st)
		return e.stats.unsure(st.route(), "redis refused the transaction").reply(nil), nil
	case again > 0 && isNull(reply): // the client watches nothing, so it was evicted
		return nil, errOvertaken
	case results == nil:
		return reply, nil
	}
	if err := r.took(st, results); err != nil {
		r.dropCaptured(ctx, st)
		return e.stats.unsure(st.route(), "redis refused the end of the transaction").reply(nil), nil
	}
	return r.settle(ctx, st, reply), nil
}

// bothName finds the keys of a run that both journals name. It is refused if Postgres cannot tell.
func (r *runner) bothName(ctx context.Context, st *running) (no *refusal) {
	if st.tx == nil {
		return nil
	}
	var err error
	if st.both, err = r.e.bothName(ctx, st.tx, st.keys, st.redis); err != nil {
		return unavailable(st.route(), "postgres cannot be reached")
	}
	for i, route := range st.routes {
		if !route.Phase.Rules().ReadsStore { // see rowsRead
			delete(st.both, st.keys[i].Key)
		}
	}
	return nil
}

// notLoaded refuses a transaction whose keys could not be loaded.
func (r *runner) notLoaded(st *running, err error) []byte {
	r.e.redisFailed(err)
	if words := ownWords(err); words != nil {
		st.discard()
		return words
	}
	return st.refuse(unavailable(st.route(), "redis cannot be reached"))
}

// lookAgain watches the keys of a transaction without the key locks, and judges once more what they are: nothing can be loaded then, and a sidecar that
// reaches Postgres may have taken one out of Redis since, to put it back after its COMMIT. What does so from now on makes EXEC fail.
func (r *runner) lookAgain(ctx context.Context, st *running, reqs [][]byte) ([]byte, error) {
	fs, err := st.pin.ask(r.e.cfg.Redis.Timeout, reqs...)
	if err != nil {
		return r.broke(st, err), nil
	}
	look := fs[len(fs)-1]
	if err = errorOf(look); err == nil {
		if st.redis, err = keyReplies(look, len(st.keys)); err == nil {
			if _, err = st.judge(r.e); err == nil {
				return nil, nil
			}
		}
	}
	if _, err := st.pin.ask(r.e.cfg.Redis.Timeout, appendCommand(nil, "UNWATCH")); err != nil {
		return r.broke(st, err), nil
	}
	if words := ownWords(err); words != nil {
		return words, nil
	}
	return r.again(ctx, st, nil, err)
}

// broke gives a client's connection up, which leaves open what became of its transaction.
func (r *runner) broke(st *running, err error) []byte {
	r.e.up.abandonPin(st.pin)
	st.pin.drop(err)
	return r.e.stats.unsure(st.route(), "the connection to Redis broke").reply(nil)
}

// changed: a row that the client watches is not as it was. rows are those of keys.
func (op *runOp) changed(rows []policy.Row) bool {
	for i, k := range op.keys {
		was, ok := op.watched[k.Key]
		if row := rows[i]; ok && (row.State != was.State || !bytes.Equal(row.Value, was.Value) || row.ExpiresAt != was.ExpiresAt) {
			return true
		}
	}
	return false
}

// split takes the results of the tails off the reply to EXEC; nil if nothing ran.
func (r *runner) split(st *running, fs [][]byte) (reply []byte, results [][]byte) {
	tails := len(fs) - 1
	exec := fs[tails]
	if isNull(exec) || isError(exec) { // a watched key changed, or something was refused when it was queued
		r.unmark(st)
		for _, q := range fs[:tails] {
			if string(errorCode(q)) == "NOPERM" {
				return (&refusal{"DENIED", "a transaction on routed keys ends with scripts of the proxy's, which the client's user may not run"}).reply(nil), nil
			}
		}
		return exec, nil
	}
	all, ok := elements(exec, nil)
	if !ok || len(all) < tails {
		r.unmark(st)
		return r.e.stats.unsure(st.route(), "EXEC answered out of shape").reply(nil), nil
	}
	n := len(all) - tails
	reply = appendArray(make([]byte, 0, len(exec)), n)
	for _, f := range all[:n] {
		reply = append(reply, f...)
	}
	results = append(make([][]byte, 0, tails), all[n:]...)
	if st.away && tails > 0 {
		results = results[1 : tails-1] // what SELECT answered
	}
	return reply, results
}

// runFlush runs a transaction that empties the database, while the stores are fenced: nobody else writes, and all rows are dead with
// it. What it leaves of routed keys is marked in Redis and repaired before the reply, as after an outage of Postgres.
func (r *runner) runFlush(ctx context.Context, st *running) ([]byte, error) {
	e := r.e
	if route := columnInUse(e.router.Load()); route != nil { // since it was queued
		return st.refuse(notFlushed(route, "EXEC")), nil
	}
	r.promoted(st)
	var reply []byte
	var ran, sentIt bool
	closing := e.journal.version()
	err := e.store.Fence(ctx, "", func(ctx context.Context) error {
		if len(st.watched) > 0 {
			rows, err := e.store.load(ctx, st.keys)
			if err != nil {
				return err
			}
			if st.changed(rows) {
				st.discard()
				reply = appendNullArray(nil, st.proto)
				return errOvertaken
			}
		}
		sentIt = true
		fs, err := st.pin.ask(flushTime, append(r.queuedTails(st, closes(closing)), st.raw)...)
		if err != nil {
			e.up.abandonPin(st.pin)
			st.pin.drop(err)
			return nil // it may run yet: the rows must be dead then
		}
		var results [][]byte
		if reply, results = r.split(st, fs); results == nil {
			return errOvertaken // nothing ran, nothing is fenced
		}
		ran = true
		return nil
	})
	if sentIt {
		e.reopen(ctx, closing, err)
	}
	if err == nil {
		e.stats.fences.Add(1)
	}
	idx := st.overtaken()
	switch {
	case ran && err == nil:
		e.journal.flushed()
		e.journal.keepMarks(st.pick(idx), st.version)
		e.journal.leaveMarks(st.pick(idx), st.version)
		e.repairMarks(ctx, st.pick(idx))
		return reply, nil
	case reply != nil && !ran:
		return reply, nil
	case sentIt:
		r.unmark(st)
		return e.stats.unsure(st.route(), "the flush was not confirmed").reply(nil), nil
	}
	return st.refuse(unavailable(st.route(), "postgres cannot be reached, and its rows would survive the flush")), nil
}

// promoted loads keys into Redis as a read does.
func (r *runner) promoted(st *running) {
	var wg sync.WaitGroup
	for i, route := range st.routes {
		if rules := route.Phase.Rules(); rules.ReadsRedis && rules.ReadsStore {
			wg.Add(1)
			r.e.fill.get(st.keys[i], route, false, func(answer) { wg.Done() })
		}
	}
	wg.Wait()
}

// dropCaptured deletes what a command left in Redis and could not be captured: the rows are the truth.
func (r *runner) dropCaptured(ctx context.Context, st *running) {
	var keys []string
	for _, i := range st.captured() {
		keys = append(keys, st.keys[i].Key)
	}
	if _, err := r.e.up.script(ctx, scriptRepair, keys, st.number, "0", "1"); err != nil {
		r.e.redisFailed(err) // trust is lost, or the lease is refused: the recovery, or the next writer, sees to it
	}
}

// mirror ends a run: what it left of the keys whose truth is the store goes into the rows, and only then back into Redis; the rows
// of the others go, and then their marks.
func (r *runner) mirror(ctx context.Context, st *running, reply []byte) []byte {
	e := r.e
	lost := st.overtaken()
	if st.tx == nil {
		e.journal.leaveMarks(st.pick(lost), st.version)
		return reply
	}
	g := &group{at: map[string]int{}}
	var changes []policy.Change
	large := false
	for j, i := range st.captured() {
		k := st.after[j]
		if k.code == keyRefused {
			continue // the script has left the newer writer's truth standing
		}
		s := &keyState{ref: st.keys[i], route: st.routes[i], row: st.rows[i], redis: keyReply{code: keyDone}, both: st.both[st.keys[i].Key]}
		g.at[s.ref.Key] = len(g.states)
		g.states = append(g.states, s)
		switch k.code {
		case keyValue:
			s.now = e.replyValue(k)
			ends := e.rowLife(k.at)
			if s.row.State == policy.Live && same(s.route, k.value, s.row.Value) && (s.row.ExpiresAt < 0) == (k.at < 0) && (k.at < 0 || abs(s.row.ExpiresAt-ends.MS) < clockSlack) {
				continue // it was only read: the row stays, and goes back into Redis
			}
			large = large || len(k.value) > e.cfg.MaxValue
			changes = append(changes, policy.Change{Ref: s.ref, Op: policy.Put, Value: k.value, Expiry: ends})
			s.dirty = true
		case keyOther:
			s.now.Other, s.now.Exists = true, true
			if speaks(s.row) {
				changes = append(changes, policy.Change{Ref: s.ref, Op: policy.Drop})
			}
		default:
			if s.row.State == policy.Live {
				changes = append(changes, policy.Change{Ref: s.ref, Op: policy.Delete})
				s.dirty = true
			}
		}
	}
	for _, i := range lost {
		if st.rows[i].State == policy.NoRow {
			e.stats.route(st.routes[i].Name).noRow.Add(1)
		}
		if dropped(st.rows[i]) || st.named && st.rows[i].State == policy.NoRow {
			changes = append(changes, policy.Change{Ref: st.keys[i], Op: policy.Drop})
		}
	}
	if len(changes) > 0 {
		err := errTooLarge
		if !large {
			_, err = st.tx.Commit(ctx, changes, nil, nil, false)
		}
		if err != nil {
			e.journal.leaveMarks(st.pick(lost), st.version)
			return r.notCommitted(ctx, st, g, reply, err)
		}
	}
	if st.odd != nil || st.named {
		// What a column could not hold may have become something that it can: the repair brings it there.
		e.journal.leaveMarks(st.pick(lost), st.version)
		lost = nil
	}
	r.strike(ctx, st, lost) // before the locks go, if there was nothing to commit
	st.tx.Rollback()
	if len(g.states) > 0 && !e.write.fill(ctx, g, hold{st.number, st.token, st.epoch}) && !e.journalStale(ctx, g) || st.lockLost() {
		return e.stats.unsure(st.route(), "the connection to Redis broke").reply(nil)
	}
	return reply
}

// notCommitted answers a run whose changes the store did not take, or may not have taken. What only Redis had to know stands there,
// marked. What the store had to know first was taken out of Redis: it goes back as it was, or, if the fate of the COMMIT is unknown
// or the phase lets Redis alone take it, as the command left it, marked (see writeOn).
func (r *runner) notCommitted(ctx context.Context, st *running, g *group, reply []byte, err error) []byte {
	e := r.e
	if !errors.Is(err, errTooLarge) {
		e.store.note("commit", err) //nolint:errcheck // answered here
	}
	h := hold{st.number, st.token, st.epoch}
	on := e.store.Uncertain(err) || e.store.gone(err) && st.withoutStore()
	for _, s := range g.states {
		if s.now.Other && speaks(s.row) {
			s.dirty, on = true, true // the string has become something else, which is in Redis already
		}
	}
	if on {
		e.write.writeOn(ctx, g, h)
	} else {
		e.write.putBack(ctx, g.states, h)
	}
	switch {
	case len(g.states) > 0 && on && st.withoutStore() && g.allOn() && !st.lockLost():
		return reply
	case len(g.states) > 0 && on:
		return e.stats.unsure(st.route(), "the connection to Postgres broke").reply(nil)
	case len(g.states) == 0 && len(st.both) == 0 && !e.namesStale(st.pick(st.overtaken())):
		return reply
	case e.store.Uncertain(err):
		return e.stats.unsure(st.route(), "the connection to Postgres broke").reply(nil)
	case st.pin != nil || len(st.overtaken()) > 0:
		return e.stats.unsure(st.route(), "postgres refused the values, and what concerns other keys has been done").reply(nil)
	case errors.Is(err, errTooLarge):
		return (&refusal{"DENIED", fmt.Sprintf("the value would be larger than postgres.max_value allows for keys of route %s", st.route().Name)}).reply(nil)
	case st.judged() && e.notTaken(columnOf(st.routes), err) != nil:
		return e.notTaken(columnOf(st.routes), err).reply(nil)
	case e.store.BadData(err):
		return unavailable(st.route(), "postgres refused the value").reply(nil)
	}
	return unavailable(st.route(), "postgres refused the transaction").reply(nil)
}

var errTooLarge = errors.New("larger than postgres.max_value")

// lockLost: somebody else took the lock of a captured key while the command ran.
func (st *running) lockLost() bool {
	lost := func(k keyReply) bool { return k.code == keyRefused }
	return slices.ContainsFunc(st.after, lost) || slices.ContainsFunc(st.left, lost)
}

// strike ends the marks of keys whose rows are gone.
func (r *runner) strike(ctx context.Context, st *running, idx []int) {
	if len(idx) == 0 {
		return
	}
	e := r.e
	argv := []string{st.number}
	keys := make([]string, len(idx))
	for j, i := range idx {
		keys[j] = st.keys[i].Key
		argv = append(argv, st.version)
	}
	if _, err := e.up.script(ctx, scriptStrike, keys, argv...); err != nil {
		e.redisFailed(err)
	}
	// The rows are gone, so a mark that still stands may go by repair, or be lost with Redis's memory: to put it back would be wrong (redisFirst).
	e.journal.forgetMarks(st.pick(idx), st.version)
}

func abs(n int64) int64 { return max(n, -n) }

var (
	// scriptLoad brings rows into Redis before a transaction that is queued there already. A copy that is right stays untouched, or a
	// client that watches it would see it change. ARGV: number, then per key "1" if its truth is the store, its row ("0" none, "1"
	// live, "t" tombstone; with a "!" its mark goes, for both journals name it and the row wins), value and when it ends (ms, -1 never); at the end "own" if the number is there already, and the caller's. Answers what Redis has then: [1] nothing, [6] something, or [7] a value
	// that the store lacks.
	scriptLoad = newScript("load", redisWrite, `
local n = tonumber(ARGV[1])
local r = {}
for i = 2, #KEYS, 2 do
  local K, L = KEYS[i], KEYS[i+1]
  local a = 2 + (i/2 - 1) * 4
  local f = get(L)
  if n > 0 and (n < f or n == f and ARGV[#ARGV] ~= 'own') then r[#r+1] = {9, '', f, ''}
  else
    if n > 0 then put(L, n, '', 0) end
    local ty = kind(K)
    local row, v, ttl = ARGV[a+1], ARGV[a+2], ARGV[a+3]
    if string.sub(row, 2) == '!' then
      redis.call('HDEL', J, K)
      row = string.sub(row, 1, 1)
    end
    local m = redis.call('HGET', J, K) or ''
    if m == '' and row == '1' and (ty == 'none' or ty == 'string') then
      local left = ends(K)
      if ty == 'none' or redis.call('GET', K) ~= v or (left < 0) ~= (ttl == '-1') or left >= 0 and math.abs(left - tonumber(ttl)) > 1000 then
        set(K, v, ttl, '1')
      end
    elseif m == '' and row == 't' and ty == 'string' then redis.call('UNLINK', K) end
    if m == '' and row == '0' and ty == 'string' and ARGV[a] == '1' then
      r[#r+1] = {7, redis.call('GET', K), ends(K), m}
    elseif kind(K) == 'none' then r[#r+1] = {1, '', -2, m}
    else r[#r+1] = {6, ty, -1, m} end
  end
end
return r`)
	// scriptCapture: what a command left of the keys; strings leave Redis until they are committed. A key whose lock was lost while
	// the command ran has a newer writer. If that one is still at work, its row is the truth and the copy goes; else what Redis
	// holds is the newest there is, and is marked. So is a key that somebody has marked since it was loaded: it must not leave Redis, where absent and
	// marked means deleted. ARGV: number, token, lease ms, version.
	scriptCapture = newScript("capture", redisWrite, `
local n = tonumber(ARGV[1])
local r, newer = {}, {}
for i = 2, #KEYS, 2 do
  local f, t = get(KEYS[i+1])
  if n < f then newer[i] = {f, t}
  elseif redis.call('HEXISTS', J, KEYS[i]) == 1 then
    newer[i] = {n, ''}
    redis.call('HSET', J, KEYS[i], ARGV[4])
    put(KEYS[i+1], n, 'o', tonumber(ARGV[3]))
  else put(KEYS[i+1], n, ARGV[2], tonumber(ARGV[3])) end
end
for i = 2, #KEYS, 2 do
  local K = KEYS[i]
  local ty = kind(K)
  if newer[i] then
    if redis.call('HEXISTS', J, K) == 0 then
      if string.sub(newer[i][2], 1, 1) == 'w' then
        if ty == 'string' then redis.call('UNLINK', K) end
      elseif ty ~= 'none' then redis.call('HSET', J, K, ARGV[4]) end
    end
    r[#r+1] = {9, '', newer[i][1]}
  elseif ty == 'string' then
    r[#r+1] = {7, redis.call('GET', K), ends(K)}
    redis.call('UNLINK', K)
  elseif ty ~= 'none' then r[#r+1] = {6, ty, ends(K)}
  else r[#r+1] = {1, '', -2} end
end
return r`)
	// scriptOvertake: marks the keys of a command whose truth is Redis. ARGV: number, version, lease ms.
	scriptOvertake = newScript("overtake", redisInvalidate, `
local n = tonumber(ARGV[1])
for i = 2, #KEYS, 2 do
  local f = get(KEYS[i+1])
  if n > f then f = n end
  redis.call('HSET', J, KEYS[i], ARGV[2])
  put(KEYS[i+1], f, 'o', tonumber(ARGV[3]))
end
return {}`)
)
