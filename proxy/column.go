package proxy

import (
	"bytes"
	"context"
	"fmt"

	"cacheproxy/internal/samejson"
	"cacheproxy/policy"
)

// Adopted columns. A route whose store is a column that the application has differs in three things, and every place that
// minds them asks here: the column holds JSON alone, it gives back the value and not the bytes, and it has no place for a key without a row.

// speaks: the store knows what the key holds, or that it holds nothing. Else Redis may be its only holder.
func speaks(row policy.Row) bool { return row.State == policy.Live || row.State == policy.Tombstone }

// notJSON refuses a value that a column cannot hold. Nothing has been written.
func notJSON(r *policy.Route) *refusal {
	return &refusal{"NOTJSON", fmt.Sprintf("the value is not JSON that a jsonb column can hold, and keys of route %s (%s) live in one; nothing was written", r.Name, r.Phase)}
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
	name := bytes.ToUpper(sl.args[0])
	return &refusal{"DENIED", fmt.Sprintf("%s would have to empty the application's own column of route %s (%s); delete its keys, or change its rows in SQL", name, r.Name, r.Phase)}
}

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

// writeAlone is the write of keys that only Redis can hold: under their locks and our leases, all of them or none, and before the
// COMMIT, which ends the locks:
//
//	1 we INCR k, to 1    2 our locks go with the COMMIT    3 another sidecar locks k, and reads what Redis has: 0    4 both answer 1
//
// false: some lease is not ours any more, and nothing was written.
func (w *writer) writeAlone(ctx context.Context, states []*keyState, h hold) (done bool, err error) {
	argv := []string{h.number, "", leaseMS}
	keys := make([]string, len(states))
	for i, s := range states {
		keys[i] = s.ref.Key
		op, ms, abs := "d", "-1", "0"
		if s.now.Exists {
			op = "s"
			ms, abs = s.redisLife()
		}
		argv = append(argv, op, string(s.now.Data), ms, abs, "t"+h.token, "", "0")
	}
	if w.e.up.epoch.Load() != h.epoch {
		return false, nil // another run of Redis: the leases are void
	}
	rs, err := w.e.up.script(ctx, scriptWrite, keys, argv...)
	if err != nil {
		return false, err
	}
	for _, r := range rs {
		if r.code != keyDone {
			return false, nil
		}
	}
	for _, s := range states {
		s.on = true
	}
	return true, nil
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
			if o.changed && g.states[g.at[ref.Key]].alone() {
				e.stats.route(o.op.routes[i].Name).noRow.Add(1)
			}
		}
	}
}
