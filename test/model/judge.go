package model

import "math/bits"

// What P3 of docs/consistency.md excepts, and nothing else, is here, by its letter.

// excusedA: a hit of sidecar s, or the nil that a mark means, may miss a write whose entry "Redis is stale" s has not read yet: exception (a).
func (m *model) excusedA(st *state, s, k int) bool {
	return st.named(st.p.entries&^st.sc[s].known)&bit(k) != 0
}

// excusedB: a write was acknowledged while Postgres was down, and sidecar s cannot know of it: it is cut off from Redis, or is in phase0 and
// has not polled: exception (b).
func (m *model) excusedB(st *state, s, k int) bool {
	sc := &st.sc[s]
	if st.r.mark[k] == 0 || m.blind(st, s) {
		return false
	}
	return !sc.trusted || !sc.phase.Rules().ReadsRedis && sc.marks[k] == 0
}

// lostMarks: Redis has lost its journal. A write that only the journal spoke for may be missed: exception (b).
func (m *model) lostMarks(st, n *state) {
	for k := range maxKeys {
		if st.r.mark[k] != 0 && n.r.mark[k] != st.r.mark[k] {
			n.doubt |= bit(k)
		}
	}
}

// doubts: what exception (b) allows while a write that was lost, or what is left of it, may still be on its way: the key may hold
// what the row says, or nothing.
func (m *model) doubts(n *state) {
	for k := range maxKeys {
		if n.doubt&bit(k) == 0 {
			continue
		}
		m.may(n, k, 0, 0)
		m.may(n, k, max(m.row(n, k), 0), n.p.exp[k])
		over := n.r.mark[k] == 0
		for s := range m.sidecars {
			sc := &n.sc[s]
			over = over && sc.mine[k].ver == 0 && !(sc.b.at == putMarks && sc.b.keys&bit(k) != 0)
		}
		if over {
			n.doubt &^= bit(k)
		}
	}
}

// bothNamed: the row wins over a write that only Redis has, because the key is in both journals. docs/consistency.md lists it among what is not
// proved: it takes an outage of Postgres for one sidecar and one of Redis for another, at once. A row that is newer than the mark loses nothing.
func (m *model) bothNamed(n *state) {
	if m.cfg.Faults.PgLink+m.cfg.Faults.PgCrash == 0 {
		return
	}
	for k := range maxKeys {
		if n.r.mark[k] != 0 && n.named(n.p.entries)&bit(k) != 0 && !m.rules.WriteOverStale && !m.rules.EntryAlways && !m.rules.MarkWins {
			n.doubt |= bit(k)
		}
	}
}

// excuseC: from phase2 on, what Redis forgets is forgotten: it now holds val, and the key may: exception (c).
func (m *model) excuseC(n *state, k int, val, exp int8) {
	if m.weak {
		m.may(n, k, val, exp)
	}
}

// excuseD: what Redis forgets of the keys of a transaction between their load and EXEC is nil to its commands: exception (d). While
// Postgres is down for its sidecar, so is what others take out of Redis to write it, as docs/consistency.md says of what make chaos has found.
func (m *model) excuseD(n *state, k int) { m.may(n, k, 0, 0) }

// drains: a sidecar in drain does not read the store, and forgets what Redis forgets also where a row has it: exception (c).
func (m *model) drains(n *state) {
	for k := range maxKeys {
		if m.drain && n.val(k) == 0 && n.r.mark[k] == 0 && live(m.row(n, k)) {
			m.may(n, k, 0, 0)
			m.may(n, k, m.row(n, k), n.p.exp[k])
		}
	}
}

// sees remembers what reads under way may answer by the letter of P3: every value that the key had since they began.
func (m *model) sees(n *state) {
	if !m.cfg.Letter {
		return
	}
	for s := range m.sidecars {
		c := &n.sc[s].c
		if c.at == idle {
			continue
		}
		if op := m.present(n, s); op.kind == opGet {
			c.seen |= m.hist.reads[n.mon[bits.TrailingZeros8(op.keys)]]
		}
	}
}

// may: the key may hold val from now on.
func (m *model) may(n *state, k int, val, exp int8) {
	if val == 0 || n.over(exp) {
		val, exp = 0, 0
	}
	n.mon[k] = m.hist.step(n.mon[k], evSet, 0, uint8(val)|uint8(exp)<<4)
}

// wrong tells what must not be seen in st: replies that no order of the commands explains, or what a read would answer that began and ended
// now; "" if all is well.
func (m *model) wrong(st *state) string {
	for k := range maxKeys {
		if m.keys&bit(k) == 0 {
			continue
		}
		if st.mon[k] == noExplanation {
			return "no order of the commands explains what was answered"
		}
		for s := range m.sidecars {
			if sc := &st.sc[s]; sc.alive {
				if why := m.wrongRead(st, s, k); why != "" {
					return why
				}
			}
		}
		if !m.weak && st.r.mark[k] == 0 && st.doubt&bit(k) == 0 && !st.ghost.on && !m.hist.canRead(st.mon[k], max(m.row(st, k), 0)) {
			return "P4: if Redis lost its memory now, an acknowledged write would be lost"
		}
	}
	return ""
}

// wrongRead is a read through s that takes no time.
func (m *model) wrongRead(st *state, s, k int) string {
	sc := &st.sc[s]
	rules := sc.phase.Rules()
	bad := func(val int8, why string) string {
		if m.hist.canRead(st.mon[k], max(val, 0)) {
			return ""
		}
		return why
	}
	if !rules.ReadsStore {
		if sc.link {
			return bad(st.val(k), "a read of Redis would be wrong")
		}
		return ""
	}
	row := m.row(st, k)
	if !rules.ReadsRedis || !sc.trusted || m.staleInRedis(st, s)&bit(k) != 0 {
		if !sc.postgres || m.staleInStore(st, s, k) && !m.blind(st, s) || row == 0 && m.onlyInRedis() && !m.rules.NilWithoutRedis || m.excusedB(st, s, k) || m.looksAtMark(st, s, k) {
			return ""
		}
		return bad(row, "a read of the store would be wrong")
	}
	if m.excusedA(st, s, k) {
		return ""
	}
	switch {
	case st.val(k) != 0:
		return bad(st.val(k), "a hit would be wrong")
	case st.r.mark[k] != 0 && !m.rules.IgnoreMarks:
		return bad(0, "nil because of a mark would be wrong")
	case st.r.tok[k] == negative:
		return bad(0, "a remembered nil would be wrong")
	case !sc.postgres:
		return ""
	case row == 0 && st.r.tok[k] != free && st.r.tok[k] != overtake:
		return "" // it waits for the holder of the lease
	}
	return bad(row, "a miss would be answered wrongly")
}
