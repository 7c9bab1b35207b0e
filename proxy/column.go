package proxy

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"slices"
	"strconv"

	"cacheproxy/internal/samejson"
	"cacheproxy/policy"
)

// Adopted columns. A route whose store is a column that the application has differs in three things, and every place that
// minds them asks here: the column holds JSON alone, it gives back the value and not the bytes, and it has no place for a key without a row.

// speaks: the store knows what the key holds, or that it holds nothing. Else Redis may be its only holder.
func speaks(row policy.Row) bool { return row.State == policy.Live || row.State == policy.Tombstone }

// dropped: a write whose truth is Redis has to take the row away, or to note that it has, for whoever deletes the row in SQL.
func dropped(row policy.Row) bool { return speaks(row) || row.Bare }

// onlyRedis: Redis may be the only holder of the key in a phase that does not read it there: an adopted column has no row for it, or nothing in the row.
func onlyRedis(r *policy.Route, row policy.Row) bool {
	return row.State == policy.NoRow || row.State == policy.Absent && r.Column()
}

// notJSON refuses a value that a column cannot hold. Nothing has been written.
func notJSON(r *policy.Route) *refusal { return notJSONBut(r, "nothing was written") }

func notJSONBut(r *policy.Route, done string) *refusal {
	return &refusal{"NOTJSON", fmt.Sprintf("the value is not JSON that a jsonb column can hold, and keys of route %s (%s) live in one; %s", r.Name, r.Phase, done)}
}

// denied refuses a change that the application's table does not take. Nothing has been written, and what the constraint or the trigger says may quote a value.
func denied(r *policy.Route) *refusal {
	return &refusal{"DENIED", fmt.Sprintf("a constraint or trigger of the application's table refuses the change, and keys of route %s (%s) live in one of its columns; nothing was written", r.Name, r.Phase)}
}

// notTaken is what to say of err, if the store has refused what it was told to store; nil if it is something else.
func (e *engine) notTaken(r *policy.Route, err error) *refusal {
	switch {
	case e.store.Rejected(err):
		return denied(r)
	case e.store.BadData(err):
		return notJSON(r)
	}
	return nil
}

// noRow refuses a change of a key that has no row while Redis, its only holder, cannot be reached.
func noRow(r *policy.Route) *refusal {
	return unavailable(r, "the column has no row for the key, so only redis could keep it, and redis cannot be reached")
}

// fits: the store of the route can hold the value. It is asked in every phase that has a store, also where the row only goes: the
// way back to a phase that keeps rows must stay open.
func (e *engine) fits(r *policy.Route, value []byte) bool {
	return !r.Column() || !r.Phase.Rules().UsesStore || e.store.JSON(value)
}

// inColumn: the key lives in an adopted column.
func (e *engine) inColumn(ref policy.Ref) bool {
	r := e.router.Load().Match([]byte(ref.Key))
	return r != nil && r.Column()
}

// fitsRef is fits for a key found in a journal.
func (e *engine) fitsRef(ref policy.Ref, value []byte) bool {
	r := e.router.Load().Match([]byte(ref.Key))
	return r == nil || e.fits(r, value)
}

// unfit finds the first key whose value, named in the command, its column cannot hold. Whether the command would write it in the end
// (NX, a key that is there) makes no difference.
func (s *session) unfit(sl *slot) *policy.Route {
	column := false
	for _, r := range sl.routes {
		column = column || r != nil && r.Column()
	}
	if !column {
		return nil
	}
	at := 0 // from a key to its value
	switch {
	case isOneOf(sl.args[0], "set", "mset", "msetnx", "msetex", "getset", "setnx"):
		at = 1
	case isOneOf(sl.args[0], "setex", "psetex"):
		at = 2
	default:
		return nil
	}
	for i, r := range sl.routes {
		if n := sl.keys[i].Arg + at; r != nil && n < len(sl.args) && !s.e.fits(r, sl.args[n]) {
			return r
		}
	}
	return nil
}

func isOneOf(name []byte, words ...string) bool {
	for _, w := range words {
		if foldEqual(name, w) {
			return true
		}
	}
	return false
}

// same: the two copies of a key hold the same. Of a column the bytes say nothing: Postgres prints JSON in its own way.
func same(r *policy.Route, redis, row []byte) bool {
	return bytes.Equal(redis, row) || r.Column() && samejson.Equal(redis, row)
}

// exact is what a key with a live row holds: the row's value, in the bytes that Redis has of it if they mean the same. A client that
// wrote 1.5e2 and reads it from Redis appends to that, and not to 150.
func exact(r *policy.Route, row policy.Row, redis keyReply) []byte {
	if r.Column() && redis.value != nil && redis.code != keyOther && samejson.Equal(redis.value, row.Value) {
		return redis.value
	}
	return row.Value
}

// columnInUse names a route with a column, in a phase that has a store: nothing of the proxy's may empty it.
func columnInUse(router *policy.Router) *policy.Route {
	for _, r := range router.Routes() {
		if r.Column() && r.Phase.Rules().UsesStore {
			return &r
		}
	}
	return nil
}

// keepsColumn refuses what would empty whole databases while rows of an adopted column would have to go with them.
func (s *session) keepsColumn(sl *slot) *refusal {
	r := columnInUse(s.e.router.Load())
	if r == nil {
		return nil
	}
	return notFlushed(r, string(bytes.ToUpper(sl.args[0])))
}

func notFlushed(r *policy.Route, name string) *refusal {
	return &refusal{"DENIED", fmt.Sprintf("%s would have to empty the application's own column of route %s (%s); delete its keys, or change its rows in SQL", name, r.Name, r.Phase)}
}

// ---- commands that only Redis can run ----

// source is the key that a RENAME would take from where there is no store into a column.
func (s *session) source(sl *slot) string {
	if len(sl.routes) == 2 && isOneOf(sl.args[0], "rename", "renamenx") &&
		(sl.routes[0] == nil || !sl.routes[0].Phase.Rules().UsesStore) && sl.routes[1] != nil && sl.routes[1].Column() {
		return string(sl.args[sl.keys[0].Arg])
	}
	return ""
}

// judged: it may write a key of a column, so what it leaves is looked at before anybody sees it.
func (st *running) judged() bool {
	for i, r := range st.routes {
		if st.writes[i] && r.Column() {
			return true
		}
	}
	return false
}

// before is what a key held in Redis when a command ran.
type before struct {
	op    string // "s" value, "d" nothing, "x" no string
	value []byte
	ends  int64 // in ms of Redis's clock, -1 never
	mark  string
	num   int64 // the highest number then
}

func beforeOf(k keyReply) before {
	b := before{op: "d", mark: k.mark, num: k.num}
	switch k.code {
	case keyValue:
		b.op, b.value, b.ends = "s", k.value, k.at
	case keyOther:
		b.op = "x"
	}
	return b
}

// asideTail is the script that ends a judged command.
func (st *running) asideTail(idx []int) []string {
	t := append([]string{"EVAL", scriptAside.body}, st.scriptArgs(idx)...)
	t = append(t, st.number, st.token, leaseMS, st.version)
	for _, i := range idx {
		b := st.before[i]
		t = append(t, b.op, string(b.value), strconv.FormatInt(b.ends, 10), b.mark, strconv.FormatInt(b.num, 10))
	}
	return t
}

// brings refuses a RENAME whose source has no store, and a value that its new place cannot hold: nothing could undo it. The source is
// watched, so that it is still that value when the command runs.
func (r *runner) brings(conn *runConn, st *running) (*refusal, error) {
	req := appendCommand(nil, "WATCH", st.source)
	fs, err := conn.ask(appendCommand(req, "GET", st.source), 2, r.e.cfg.Redis.Timeout)
	if err != nil {
		return nil, err
	}
	if err := errorOf(fs[0]); err != nil {
		return nil, err
	}
	value, ok := bulk(fs[1])
	for _, route := range st.routes {
		if ok && !isNull(fs[1]) && !r.e.fits(route, value) {
			return notJSON(route), nil
		}
	}
	return nil, nil
}

// settle ends a run: what it left is judged, and mirrored.
func (r *runner) settle(ctx context.Context, st *running, reply []byte) []byte {
	if !st.judged() {
		return r.mirror(ctx, st, reply)
	}
	if no := st.unfit(r.e); no != nil {
		r.takeBack(ctx, st)
		return no.reply(nil)
	}
	done, err := r.writeLeft(ctx, st)
	switch {
	case err != nil:
		r.e.redisFailed(err)
		r.takeBack(ctx, st)
		return r.e.stats.unsure(st.route(), "the connection to Redis broke").reply(nil)
	case !done:
		// It is not run again: what a script has done to other keys has remained.
		r.takeBack(ctx, st)
		return r.e.stats.unsure(st.route(), "somebody else has written the key meanwhile").reply(nil)
	}
	return r.mirror(ctx, st, reply)
}

// unfit finds a key whose column cannot hold what the command has left of it.
func (st *running) unfit(e *engine) *refusal {
	look := func(idx []int, rs []keyReply) *refusal {
		for j, i := range idx {
			if rs[j].code == keyValue && !bytes.Equal(rs[j].value, st.before[i].value) && !e.fits(st.routes[i], rs[j].value) {
				return notJSONBut(st.routes[i], "what it did to keys that have a store is undone")
			}
		}
		return nil
	}
	if no := look(st.captured(), st.after); no != nil {
		return no
	}
	return look(st.overtaken(), st.left)
}

// takeBack leaves the keys as they were before the command. Those whose truth is Redis are so already, and wait for nothing but their leases.
func (r *runner) takeBack(ctx context.Context, st *running) {
	e := r.e
	var states []*keyState
	var free, other []string
	for j, i := range st.captured() {
		row := st.rows[i]
		switch k := st.after[j]; {
		case k.code == keyRefused:
		case k.code == keyOther && row.State == policy.Live:
			other = append(other, st.keys[i].Key)
		default:
			states = append(states, &keyState{ref: st.keys[i], route: st.routes[i], row: row, redis: keyReply{code: keyDone, value: st.before[i].value}})
		}
	}
	e.write.putBack(ctx, states, hold{st.number, st.token, st.epoch})
	for _, i := range st.overtaken() {
		free = append(free, st.keys[i].Key)
	}
	r.unmark(st)
	run := func(s *script, keys []string, argv ...string) {
		if len(keys) == 0 {
			return
		}
		if _, err := e.up.script(ctx, s, keys, argv...); err != nil {
			e.redisFailed(err) // the leases lapse
		}
	}
	run(scriptRepair, other, st.number, "0", "0") // a list, say, where the row still has a string: it is promoted again
	run(scriptAbsent, free, st.token, "0")
}

// writeLeft puts into Redis what the command has left of the keys whose truth is there: like the write of a value, under the leases.
func (r *runner) writeLeft(ctx context.Context, st *running) (done bool, err error) {
	var keys []string
	argv := []string{st.number, st.version, leaseMS}
	for j, i := range st.overtaken() {
		k := st.left[j]
		op, ms, abs := "d", "-1", "0"
		switch k.code {
		case keyValue:
			if op = "s"; k.at >= 0 {
				ms, abs = strconv.FormatInt(max(k.at, 1), 10), "1"
			}
		case keyOther, keyRefused:
			continue // the script has left it there, marked
		default:
			k.value = nil
		}
		keys = append(keys, st.keys[i].Key)
		argv = append(argv, op, string(k.value), ms, abs, "t"+st.token, "", "0")
	}
	if len(keys) == 0 {
		return true, nil
	}
	if r.e.up.epoch.Load() != st.epoch {
		return false, nil // another run of Redis: the leases are void
	}
	rs, err := r.e.up.script(ctx, scriptWrite, keys, argv...)
	if err != nil {
		return false, err
	}
	return !slices.ContainsFunc(rs, func(k keyReply) bool { return k.code != keyDone }), nil
}

// scriptAside ends a command that may write a column, for keys whose truth is Redis: it tells what the command has left of each, and
// puts back what was there before. So nobody sees it until it is judged, and a sidecar that dies meanwhile has changed nothing. The lease is then
// the caller's. What has become another type, or was one, stays as the command left it, marked; so does a key that somebody has written since it was looked
// at, for what was there before is older. ARGV: number, token, lease ms, version, then per key what it held: op ("s" set, "d" nothing, "x" no string), value,
// when it ends (ms, -1 never), its mark and number.
var scriptAside = newScript("aside", redisWrite, `
local r = {}
for i = 2, #KEYS, 2 do
  local K, L = KEYS[i], KEYS[i+1]
  local a = 5 + (i/2 - 1) * 5
  local f = get(L)
  local ty = kind(K)
  local newer = f > math.max(tonumber(ARGV[1]), tonumber(ARGV[a+4])) or (redis.call('HGET', J, K) or '') ~= ARGV[a+3]
  if newer or ARGV[a] == 'x' or ty ~= 'string' and ty ~= 'none' then
    redis.call('HSET', J, K, ARGV[4])
    put(L, f, 'o', tonumber(ARGV[3]))
    if newer then r[#r+1] = {9, '', f} else r[#r+1] = {6, ty, -1} end
  else
    if ty == 'string' then r[#r+1] = {7, redis.call('GET', K), ends(K)} else r[#r+1] = {1, '', -2} end
    if ARGV[a] == 's' then set(K, ARGV[a+1], ARGV[a+2], '1')
    elseif ty ~= 'none' then redis.call('UNLINK', K) end
    put(L, f, ARGV[2], tonumber(ARGV[3]))
  end
end
return r`)

// ---- keys without a row ----

// alone are the keys that the group has changed and the store has no place for.
func (g *group) alone() (states []*keyState) {
	for _, s := range g.states {
		if s.alone() && s.dirty && !s.wait {
			states = append(states, s)
		}
	}
	return states
}

// recalls: the store knows something of one of the keys that have no row. If somebody has deleted the row behind the proxy's back, and an entry says so, the repair
// will delete the key in Redis, but not what is written there from now on: it stays marked until then.
//
//	1 k's row is deleted in SQL, which makes an entry    2 SET k goes to Redis alone, acknowledged    3 the entry is repaired: without a mark k would go
//
// If the key was deleted before its row was, that outlives the row, and has to be forgotten. Until it is, the mark says what is right:
//
//	1 DEL k    2 k's row is deleted in SQL    3 SET k goes to Redis alone, acknowledged    4 k's row is inserted again, empty: it would read as a tombstone
func (e *engine) recalls(ctx context.Context, tx Tx, refs []policy.Ref) bool {
	var keys []string
	for i, row := range tx.Rows() {
		if row.State == policy.NoRow {
			keys = append(keys, refs[i].Key)
		}
	}
	if len(keys) == 0 {
		return false
	}
	recalls, err := tx.Recalls(ctx, keys)
	return e.store.note("named", err) != nil || recalls // in doubt it stays marked
}

// writeAlone is the write of keys that only Redis can hold: under their locks and our leases, all of them or none, and before the
// COMMIT, which ends the locks:
//
//	1 we INCR k, to 1    2 our locks go with the COMMIT    3 another sidecar locks k, and reads what Redis has: 0    4 both answer 1
//
// false: some lease is not ours any more, and nothing was written.
//
// forget are changes for that COMMIT: what the store knew of the keys.
func (w *writer) writeAlone(ctx context.Context, tx Tx, g *group, states []*keyState, h hold) (done bool, forget []policy.Change, err error) {
	e := w.e
	version := ""
	if e.recalls(ctx, tx, g.refs()) {
		for _, s := range states {
			if s.row.State == policy.NoRow {
				forget = append(forget, policy.Change{Ref: s.ref, Op: policy.Drop})
			}
		}
		version = e.journal.version()
	}
	argv := []string{h.number, version, leaseMS}
	keys, refs := make([]string, len(states)), make([]policy.Ref, len(states))
	for i, s := range states {
		keys[i], refs[i] = s.ref.Key, s.ref
		op, ms, abs := "d", "-1", "0"
		if s.now.Exists {
			op = "s"
			ms, abs = s.redisLife()
		}
		argv = append(argv, op, string(s.now.Data), ms, abs, "t"+h.token, "", "0")
	}
	if e.up.epoch.Load() != h.epoch {
		return false, nil, nil // another run of Redis: the leases are void
	}
	if version != "" {
		e.journal.keepMarks(refs, version)
		defer func() {
			if done {
				e.journal.leaveMarks(refs, version)
			} else {
				e.journal.forgetMarks(refs, version)
			}
		}()
	}
	rs, err := e.up.script(ctx, scriptWrite, keys, argv...)
	if err != nil {
		return false, nil, err
	}
	for _, r := range rs {
		if r.code != keyDone {
			return false, nil, nil
		}
	}
	for _, s := range states {
		s.on = true
	}
	return true, forget, nil
}

// touching divides commands by whether they have changed, or would have, a key without a row.
func (g *group) touching(outcomes []outcome) (touched, rest []outcome) {
	for _, o := range outcomes {
		if o.changed && g.some(o.op.keys, (*keyState).alone) {
			touched = append(touched, o)
		} else {
			rest = append(rest, o)
		}
	}
	return touched, rest
}

// finishAlone answers the commands that changed nothing but keys without a row, and returns the others.
func (g *group) finishAlone(outcomes []outcome) (rest []outcome) {
	for _, o := range outcomes {
		if o.changed && !g.some(o.op.keys, func(s *keyState) bool { return !s.alone() }) {
			o.op.done(o.reply, o.pass)
		} else {
			rest = append(rest, o)
		}
	}
	return rest
}

func (g *group) some(keys []policy.Ref, is func(*keyState) bool) bool {
	for _, ref := range keys {
		if is(g.states[g.at[ref.Key]]) {
			return true
		}
	}
	return false
}

// wroteAlone: something of the group stands in Redis already.
func (g *group) wroteAlone() bool {
	for _, s := range g.states {
		if s.alone() && s.on {
			return true
		}
	}
	return false
}

func (g *group) hasColumn() bool {
	for _, s := range g.states {
		if s.route.Column() {
			return true
		}
	}
	return false
}

// columnOf is the first of the routes that has a column.
func columnOf(routes []*policy.Route) *policy.Route {
	for _, r := range routes {
		if r.Column() {
			return r
		}
	}
	return routes[0]
}

// countNoRow counts what was written to Redis alone because the column has no row for it.
func (e *engine) countNoRow(g *group, outcomes []outcome) {
	for _, o := range outcomes {
		for i, ref := range o.op.keys {
			if o.changed && g.states[g.at[ref.Key]].row.State == policy.NoRow {
				e.stats.route(o.op.routes[i].Name).noRow.Add(1)
			}
		}
	}
}

// dropRowless repairs keys that entries name and that have no row in their column: the row was deleted behind the proxy's back, and so is the
// key. What is marked was written in Redis since.
func (j *journal) dropRowless(ctx context.Context, tx Tx, refs []policy.Ref, entries []Intent) error {
	e := j.e
	rowless := map[string]bool{}
	for i, row := range tx.Rows() {
		rowless[refs[i].Key] = row.State == policy.NoRow && e.readsStore(refs[i])
	}
	gone := map[string]bool{}
	for _, in := range entries {
		for _, ref := range in.Refs {
			if rowless[ref.Key] {
				gone[ref.Key] = true
			}
		}
	}
	for keys := range slices.Chunk(slices.Sorted(maps.Keys(gone)), maxRepair) {
		rs, err := e.up.script(ctx, scriptRepair, keys, strconv.FormatInt(tx.Number(), 10), "0", "1")
		if err != nil {
			e.redisFailed(err)
			return err
		}
		for _, r := range rs {
			if r.code == keyRefused {
				e.lift(ctx, tx, rs)
				return errOvertaken
			}
		}
	}
	return nil
}
