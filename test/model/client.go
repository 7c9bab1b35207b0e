package model

import (
	"math/bits"

	"cacheproxy/policy"
)

// client takes one step of sidecar s's client: it begins the next command of its program, or goes on with the present one.
func (m *model) client(st *state, s int) {
	sc := &st.sc[s]
	if !sc.alive {
		return
	}
	if sc.c.at != idle {
		m.goOn(st, s)
		return
	}
	if int(sc.c.op) >= len(m.cfg.Programs[s]) {
		return
	}
	n := *st
	m.begins(&n, s)
	m.goOn(&n, s)
}

// index is the number of the present command of sidecar s among all commands.
func (m *model) index(st *state, s int) int { return m.base[s] + int(st.sc[s].c.op) }

func (m *model) present(st *state, s int) operation { return m.hist.ops[m.index(st, s)] }

// begins decides where the next command goes first, as its phase says.
func (m *model) begins(n *state, s int) {
	op := m.present(n, s)
	if op.kind != opGet || !m.cfg.Letter {
		m.tell(n, s, evBegin, 0)
	}
	c := &n.sc[s].c
	for k := range maxKeys {
		if op.keys&bit(k) != 0 && m.excusedA(n, s, k) {
			c.excused |= bit(k)
		}
	}
	c.at = m.entry(n, s, op)
}

func (m *model) entry(n *state, s int, op operation) place {
	sc := &n.sc[s]
	rules := sc.phase.Rules()
	switch op.kind {
	case opFlush, opBack:
		return fenceLock
	case opGet:
		switch {
		case !rules.ReadsStore:
			return plain
		case !rules.ReadsRedis || !sc.trusted || m.staleInRedis(n, s)&op.keys != 0:
			return direct
		}
		return missGrant
	}
	switch {
	case rules.Write == policy.WriteRedisOnly:
		return plain
	case op.kind == opRun, op.kind == opTx:
		return runLock
	case rules.Write.KeepsRow():
		return begin
	}
	return lock2
}

// tell lets the histories of the command's keys know.
func (m *model) tell(n *state, s, ev int, arg uint8) {
	op := m.present(n, s)
	for k := range maxKeys {
		if op.keys&bit(k) != 0 {
			n.mon[k] = m.hist.step(n.mon[k], ev, m.index(n, s), arg)
		}
	}
}

// answers ends the present command with a reply.
func (m *model) answers(n *state, s int, res int8) {
	op := m.present(n, s)
	if op.kind == opGet && m.cfg.Letter {
		k := bits.TrailingZeros8(op.keys)
		if !m.hist.canRead(n.mon[k], res) && n.sc[s].c.seen>>uint(res)&1 == 0 {
			n.mon[k] = noExplanation
		}
		m.next(n, s)
		return
	}
	m.tell(n, s, evAnswer, uint8(res))
	m.next(n, s)
}

// refuses ends it with a clear no: nothing has been changed, and nothing will be. A read that got no answer is the same.
func (m *model) refuses(n *state, s int) {
	if m.present(n, s).kind != opGet || !m.cfg.Letter {
		m.tell(n, s, evForget, 0)
	}
	m.next(n, s)
}

// uncertain ends it with -UNCERTAIN: it may have an effect at any time, or never.
func (m *model) uncertain(n *state, s int) {
	if m.present(n, s).kind == opGet {
		m.refuses(n, s)
		return
	}
	m.next(n, s)
}

func (m *model) next(n *state, s int) {
	n.unlock(clientThread + int8(s))
	n.sc[s].c = client{op: n.sc[s].c.op + 1}
}

// restart begins the present command again from the start.
func (m *model) restart(n *state, s int) {
	n.unlock(clientThread + int8(s))
	m.clear(n, s)
	n.sc[s].c.at = m.entry(n, s, m.present(n, s))
}

// clear forgets what the present command has come to.
func (m *model) clear(n *state, s int) {
	c := &n.sc[s].c
	*c = client{op: c.op, excused: c.excused, seen: c.seen}
}

// staleInRedis are the keys whose copies in Redis must not be served, as far as sidecar s knows.
func (m *model) staleInRedis(n *state, s int) uint8 {
	sc := &n.sc[s]
	return n.named(sc.known) | sc.extra
}

// staleInStore: the store's copy of k must not be served, as far as sidecar s knows.
func (m *model) staleInStore(n *state, s, k int) bool {
	return n.sc[s].marks[k] != 0 || n.sc[s].mine[k].ver != 0
}

// onlyInRedis: some sidecar serves, or has served, the keys in a phase whose writes only Redis holds: no row says nothing.
func (m *model) onlyInRedis() bool { return m.weak }

// goOn takes the step at which the client's command stands.
func (m *model) goOn(st *state, s int) {
	c := &st.sc[s].c
	switch c.at {
	case missGrant, missLoad, missPromote, missAbsent, missHeld, missLock, missResolve, missLook, direct:
		m.read(st, s)
	case begin, invalidate, commit, fill, againLock, again, staleLock, staleCommit, putBack, giveUp, writeOn, awaitRepair, strikeOwn:
		m.write(st, s)
	case lock2, read2, write2, drop2, strike2, plain:
		m.overtake(st, s)
	case runLock, runPrepare, runAdopt, runExec:
		m.run(st, s)
	case queuedLoad, queuedForce, queuedExec:
		m.queued(st, s)
	case fenceLock, fenceFlush, fenceCommit, fenceOpen:
		m.fence(st, s)
	}
}
