package proxy

import (
	"bytes"
	"context"
	"slices"
	"strings"

	"cacheproxy/policy"
)

// Transactions. MULTI, what follows it and EXEC go to Redis on the client's own connection: Redis checks every command as it is queued,
// watches keys, and runs all of it at once. What we add is what keeps the promises of routed keys: EXEC of a transaction
// that names some is loaded before and mirrored after, like any command that only Redis can run (generic.go).

// transaction is what a client has queued since MULTI, as far as it concerns us.
type transaction struct {
	dirty      bool     // we refused a command of it, so EXEC refuses the whole
	doomed     bool     // Redis refused one, and will refuse the whole, in its own words
	lost       bool     // Redis could not be told of it: nothing is queued, and EXEC says why
	flush      bool     // it has a FLUSHALL or the like, and the stores are fenced with it
	queued     int      // by Redis
	raws       [][]byte // what it has queued, to be queued again; nil if that was too much
	size       int      // of raws; more than maxQueued: too much
	subscribes bool     // a SUBSCRIBE or its like is among it
	fixes      []fix
	dbs        []int // databases selected in it, the last one is where its next command is
	keys       []txKey
	at         map[string]int // key -> its place in keys
}

// txKey is a routed key that a queued command names.
type txKey struct {
	ref   policy.Ref
	route *policy.Route
	write bool
}

// maxQueued bytes of a transaction's commands are kept, which is less than what Redis keeps of them.
const maxQueued = 1 << 20

// keep remembers a command that Redis has queued.
func (t *transaction) keep(raw []byte) {
	if t.size += len(raw); t.size > maxQueued {
		t.raws = nil
		return
	}
	t.raws = append(t.raws, bytes.Clone(raw))
}

// fix is what has to be done with the result of one command when EXEC brings it: it may say something about the session, or
// be ours to give.
type fix struct {
	at int // the command's place in the transaction
	do func(result []byte) []byte
}

// name notes the keys of a queued command that a store knows.
func (t *transaction) name(sl *slot) {
	for i, r := range sl.routes {
		if r == nil || !r.Phase.Rules().UsesStore || !sl.keys[i].Write && !r.Phase.Rules().ReadsStore {
			continue
		}
		key := string(sl.args[sl.keys[i].Arg])
		n, ok := t.at[key]
		if !ok {
			if t.at == nil {
				t.at = map[string]int{}
			}
			n = len(t.keys)
			t.at[key] = n
			t.keys = append(t.keys, txKey{ref: policy.Ref{Route: r.Name, Key: key}, route: r})
		}
		t.keys[n].write = t.keys[n].write || sl.keys[i].Write
	}
}

// beginMulti opens a transaction.
func (s *session) beginMulti(sl *slot) {
	s.takePin()
	sl.then = func(frame []byte) {
		if !isError(frame) {
			s.tx = &transaction{}
		}
		s.finish(sl, frame)
	}
	sl.local = func() {
		s.tx = &transaction{lost: true}
		s.answer(sl, "+OK\r\n")
	}
	s.sendOn(s.pin.lane, sl, false)
}

// queueLost takes a command of a transaction that Redis does not know of. Were MULTI refused instead, what a client has sent behind it in one
// write would run command by command.
func (s *session) queueLost(sl *slot) {
	switch strings.ToLower(string(sl.args[0])) {
	case "exec":
		s.ended()
		s.answerClear(sl, unavailable(nil, "redis cannot be reached"))
	case "discard":
		s.ended()
		s.answer(sl, "+OK\r\n")
	case "multi":
		s.answer(sl, "-ERR MULTI calls can not be nested\r\n")
	case "watch":
		s.answer(sl, "-ERR WATCH inside MULTI is not allowed\r\n")
	default:
		s.answer(sl, "+QUEUED\r\n")
	}
}

// watch loads the keys that Redis lacks, and watches them there. Every write of a routed key changes it in Redis sooner or later, and at
// the latest EXEC itself does, which loads a row that differs:
//
//	1 WATCH k    2 another client's SET k is committed in the store, not yet put into Redis
//	3 EXEC holds k's lock, finds that the row is not what Redis has, and loads it: Redis sees k change and refuses EXEC
//
// In a phase that keeps no copy in Redis the row itself is remembered, and compared under the lock.
func (s *session) watch(sl *slot) {
	n := len(sl.args) - 1
	then := func(frame []byte) {
		if !isError(frame) {
			s.watching = true
			s.watched += n
		}
		s.finish(sl, frame)
	}
	s.takePin()
	send := func() {
		sl.then = then
		s.sendOn(s.pin.lane, sl, false)
	}
	s.locate(sl)
	var rows []policy.Ref
	load := false
	for i, r := range sl.routes {
		if r == nil || !r.Phase.Rules().ReadsStore {
			continue
		}
		ref := policy.Ref{Route: r.Name, Key: string(sl.args[sl.keys[i].Arg])}
		s.watches = append(s.watches, txKey{ref: ref, route: r})
		if r.Phase.Rules().ReadsRedis {
			load = true
		} else {
			rows = append(rows, ref)
		}
	}
	switch {
	case len(rows) > 0:
		s.watchRows(sl, rows, send)
	case load:
		s.load(sl, send)
	default:
		send()
	}
}

// watchName is a key that nobody writes: what is watched where there is nothing to watch.
const watchName = reserved + "watch"

// watchRows remembers rows as they are now, for keys that have no copy in Redis.
func (s *session) watchRows(sl *slot, refs []policy.Ref, then func()) {
	s.begin(sl)
	tag := sl.tag
	s.e.wg.Go(func() {
		ctx, cancel := context.WithTimeout(context.Background(), s.e.cfg.StoreTimeout)
		defer cancel()
		rows, err := s.e.store.load(ctx, refs)
		s.event(sl, tag, func() {
			sl.tag++
			if err != nil {
				s.answerClear(sl, unavailable(firstRoute(sl.routes), "postgres cannot be asked"))
				return
			}
			if s.rows == nil {
				s.rows = map[string]policy.Row{}
			}
			names := append([]string{}, string(sl.args[0]))
			for _, a := range sl.args[1:] {
				names = append(names, string(a))
			}
			for i, ref := range refs {
				if _, ok := s.rows[ref.Key]; !ok {
					s.rows[ref.Key] = rows[i]
				}
				if rows[i].State == policy.Live {
					// EXEC loads it for its commands to find, and Redis would take that for a change.
					names = slices.DeleteFunc(names, func(n string) bool { return n == ref.Key })
				}
			}
			if len(names) == 1 {
				names = append(names, watchName)
			}
			s.held -= len(sl.raw)
			sl.raw = appendCommand(sl.raw[:0], names...)
			s.held += len(sl.raw)
			then()
		})
	})
}

func endsMulti(args [][]byte) bool {
	return foldEqual(args[0], "quit") || foldEqual(args[0], "reset") && len(args) == 1
}

// queue handles a command inside MULTI; false: it must wait.
func (s *session) queue(sl *slot) bool {
	if s.walls > 0 {
		return false
	}
	if s.tx.lost {
		s.queueLost(sl)
		return true
	}
	if sl.info != nil && !sl.info.ArityOK(len(sl.args)) {
		s.enqueue(sl, nil) // Redis refuses it, and then the transaction
		return true
	}
	name := strings.ToLower(string(sl.args[0]))
	var do func(result []byte) []byte // what its result means to us
	switch name {
	case "exec", "discard":
		if s.begun > 0 {
			return false
		}
		sl.wall = true
		s.endMulti(sl, name == "exec")
		return true
	case "multi", "watch":
		s.send(sl, false) // Redis refuses them in its own words
		return true
	case "cacheproxy":
		s.deny(sl, "CACHEPROXY cannot be used in MULTI")
		return true
	case "auth":
		if s.password != "" {
			s.deny(sl, "AUTH cannot be used in MULTI")
			return true
		}
		args := cloneArgs(sl.args)
		do = func(result []byte) []byte {
			if own, _ := s.e.up.dialer.credentials(); !isError(result) && len(args) > 1 {
				s.user = &credentials{"default", string(args[len(args)-1])}
				if len(args) == 3 {
					s.user.user = string(args[1])
				}
				if s.user.user == own {
					s.user = nil
				}
			}
			return result
		}
	case "hello":
		if len(sl.args) > 2 {
			s.deny(sl, "HELLO with AUTH or SETNAME cannot be used in MULTI")
			return true
		}
		do = s.greeted
	case "select":
		if s.begun > 0 {
			return false // which database the next one speaks of must be known
		}
		sl.wall = true
	case "subscribe", "psubscribe", "ssubscribe", "unsubscribe", "punsubscribe", "sunsubscribe":
		if len(sl.args) != 2 {
			s.deny(sl, "in MULTI "+strings.ToUpper(name)+" takes one channel")
			return true
		}
		s.tx.subscribes = true
		do = func(result []byte) []byte { return s.subscribedInMulti(name, result) }
	case "keys", "scan", "randomkey":
		if s.atHome() {
			do = func(result []byte) []byte { return hidden(name, result, s.proto) }
		}
	case "client":
		var done bool
		if do, done = s.queueClient(sl); done {
			return true
		}
	}
	if sl.info == nil && s.e.storeInUse() && s.atHome() {
		s.askKeys(sl, func(bool) { s.enqueue(sl, do) })
		return true
	}
	s.locate(sl)
	if no := s.forbids(sl); no != nil {
		s.tx.dirty = true
		s.answerClear(sl, no)
		return true
	}
	s.enqueue(sl, do)
	return true
}

// forbids refuses a command of a transaction for what it says, as it would be alone, and with it the transaction: nothing of it has run.
func (s *session) forbids(sl *slot) *refusal {
	if r := s.unfit(sl); r != nil {
		return notJSON(r)
	}
	if s.fences(sl) {
		return s.keepsColumn(sl)
	}
	return nil
}

// enqueue gives Redis a command of the transaction. It counts when Redis has taken it.
func (s *session) enqueue(sl *slot, do func(result []byte) []byte) {
	sl.then = func(frame []byte) {
		if t := s.tx; t != nil && string(frame) == "+QUEUED\r\n" {
			if n, ok := selects(sl.args); ok {
				t.dbs = append(t.dbs, n)
				do = func(result []byte) []byte {
					if !isError(result) {
						s.db = n
					}
					return result
				}
			}
			if do != nil {
				t.fixes = append(t.fixes, fix{t.queued, do})
			}
			t.queued++
			if s.e.storeInUse() {
				t.keep(sl.raw)
			}
			t.flush = t.flush || s.fences(sl)
			t.name(sl)
		} else if t != nil && isError(frame) {
			t.doomed = true
		}
		s.finish(sl, frame)
	}
	s.send(sl, false)
}

func selects(args [][]byte) (db int, ok bool) {
	if len(args) != 2 || !foldEqual(args[0], "select") {
		return 0, false
	}
	n, ok := parseDecimal(args[1])
	return int(n), ok
}

// queueClient handles CLIENT in MULTI. What the proxy answers itself has its place kept by a command of Redis's that
// changes nothing, and its result given when EXEC comes back. done: it was answered.
func (s *session) queueClient(sl *slot) (do func(result []byte) []byte, done bool) {
	if sl.info == nil || !sl.info.ArityOK(len(sl.args)) {
		return nil, false // Redis has the words
	}
	args := cloneArgs(sl.args)
	switch sl.info.Name {
	case "client|reply", "client|tracking", "client|caching":
		s.deny(sl, "CLIENT "+strings.ToUpper(string(sl.args[1]))+" cannot be used in MULTI")
		return nil, true
	case "client|kill", "client|list", "client|unblock":
		s.deny(sl, "CLIENT "+strings.ToUpper(string(sl.args[1]))+" cannot be used in MULTI")
		return nil, true
	case "client|pause", "client|unpause":
		return func(result []byte) []byte {
			if !isError(result) {
				s.e.up.paused(args)
			}
			return result
		}, false
	case "client|no-evict", "client|no-touch":
		do = func(result []byte) []byte { s.sticky = true; return result }
	case "client|setname", "client|setinfo":
		do = func(result []byte) []byte {
			if !isError(result) {
				s.describeAs(args)
			}
			return result
		}
	case "client|id", "client|info", "client|getredir":
		s.held -= len(sl.raw)
		sl.raw = appendCommand(sl.raw[:0], "CLIENT", "ID")
		s.held += len(sl.raw)
		do = func([]byte) []byte { return s.aboutItself(string(bytes.ToLower(args[1]))) }
	}
	return do, false
}

func cloneArgs(args [][]byte) [][]byte {
	out := make([][]byte, len(args))
	for i, a := range args {
		out[i] = bytes.Clone(a)
	}
	return out
}

// deny refuses a command of a transaction, and with it the transaction.
func (s *session) deny(sl *slot, why string) {
	s.tx.dirty = true
	s.answerClear(sl, &refusal{"DENIED", why})
}

// endMulti sends EXEC or DISCARD.
func (s *session) endMulti(sl *slot, exec bool) {
	t := s.tx
	if s.pin != nil {
		s.pin.besides.Store(exec && s.subs.any() && !t.subscribes)
	}
	routed := len(t.keys)+len(s.watches) > 0 || t.flush
	if exec && !t.dirty && !t.doomed && routed && len(sl.args) == 1 {
		s.execRouted(sl)
		return
	}
	raw := sl.raw
	if exec && t.dirty {
		sl.raw = appendCommand(nil, "DISCARD")
	}
	sl.then = func(frame []byte) {
		switch {
		case exec && t.dirty:
			s.ended()
			s.answer(sl, "-EXECABORT Transaction discarded because of previous errors.\r\n")
		case exec && t.doomed && routed && !isError(frame):
			// Redis has run what it had refused a part of, which no Redis does, and nothing has kept the copies right.
			s.ended()
			s.answerClear(sl, s.e.stats.unsure(nil, "redis ran a transaction of which it had refused a command"))
		case isError(frame) && (!exec || string(errorCode(frame)) != "EXECABORT"):
			s.finish(sl, frame) // the transaction is still there
		case exec:
			s.executed(sl, frame)
		default:
			s.ended()
			s.finish(sl, frame)
		}
	}
	s.send(sl, false)
	sl.raw = raw
}

// ended: the transaction is over, and what was watched for it.
func (s *session) ended() {
	s.tx = nil
	s.unwatched()
}

// unwatched: nothing is watched any more.
func (s *session) unwatched() { s.watching, s.watched, s.watches, s.rows = false, 0, nil, nil }

// execRouted runs a transaction that names routed keys.
func (s *session) execRouted(sl *slot) {
	t := s.tx
	sl.write = true
	s.begin(sl)
	op := &runOp{raw: sl.raw, proto: s.proto, pin: s.pin, watched: s.rows, flush: t.flush}
	if op.away = !s.atHome(); op.away {
		op.db = t.dbs[len(t.dbs)-1]
	}
	// What CLIENT CACHING said of the transaction would be gone with the DISCARD. In another database there is nothing to load.
	if !s.watching && !s.tracking.on && s.db == s.e.up.dialer.opt.DB && len(t.raws) == t.queued {
		op.queued = t.raws
	}
	for _, k := range t.keys {
		op.add(k.ref, k.route, k.write)
		if k.write {
			s.e.stats.route(k.route.Name).writes.Add(1)
		}
	}
	for _, k := range s.watches {
		op.add(k.ref, k.route, false)
	}
	tag := sl.tag
	op.done = func(reply []byte) {
		s.event(sl, tag, func() {
			sl.tag++
			s.noteRefusal(op.route(), reply)
			s.executed(sl, reply)
		})
	}
	s.e.generic.submit(op)
}

// executed ends a transaction with the reply to EXEC.
func (s *session) executed(sl *slot, frame []byte) {
	fixes := s.tx.fixes
	s.ended()
	results, ok := elements(frame, nil)
	if !ok || len(fixes) == 0 {
		s.finish(sl, frame)
		return
	}
	for _, f := range fixes {
		if f.at < len(results) {
			results[f.at] = f.do(results[f.at])
		}
	}
	b := appendArray(sl.reply_[:0], len(results))
	for _, r := range results {
		b = append(b, r...)
	}
	sl.reply_ = b
	s.close(sl)
}

// subscribedInMulti learns from the confirmation that stands among EXEC's results.
func (s *session) subscribedInMulti(word string, result []byte) []byte {
	if cols, ok := elements(result, nil); ok && len(cols) == 3 {
		name, _ := bulk(cols[1])
		s.subs.note(word, name, isNull(cols[1]))
		if s.pin != nil {
			s.pin.listens.Store(s.subs.any())
		}
	}
	return result
}
