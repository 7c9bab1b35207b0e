package model

import "math/bits"

// read is GET as proxy/fill.go does it.
func (m *model) read(st *state, s int) {
	op := m.present(st, s)
	k := bits.TrailingZeros8(op.keys)
	c := &st.sc[s].c
	tok := reader + int8(m.index(st, s))
	switch c.at {
	case missGrant: // also the hit before it, which is the same to Redis
		if !st.sc[s].trusted && !(c.waited && m.rules.AwaitUntrusted) {
			m.skip(st, s, "miss 1: redis is not trusted", direct)
			return
		}
		m.send(st, s, script{kind: scriptGrant, keys: op.keys, tok: tok}, "miss 1: looks, and asks for the lease", func(n *state, a answer) {
			c := &n.sc[s].c
			switch {
			case !a.ok:
				c.at = direct
			case a.code[k] == value:
				m.hit(n, s, k, a.val[k])
			case a.code[k] == marked:
				m.hit(n, s, k, 0) // deleted, as Redis knows it
			case a.code[k] == absentNow:
				m.answers(n, s, 0)
			case a.code[k] == granted:
				c.at, c.void = missLoad, false
			default:
				c.at = missHeld
			}
		})
	case missLoad:
		m.ask(st, s, 0, "miss 2: reads the row", func(n *state, f fate) {
			c := &n.sc[s].c
			if f != good {
				m.refuses(n, s) // nil or an error: what is unknown is not judged. The lease lapses.
				return
			}
			c.row[k], c.rex[k] = m.row(n, k), n.p.exp[k]
			switch {
			case c.void && !m.rules.OldLease:
				c.at = direct
			case live(c.row[k]) && (m.staleInRedis(n, s)&bit(k) == 0 || m.rules.PromoteNXOnly):
				c.at = missPromote
			default:
				c.at = missAbsent
			}
		})
	case missPromote:
		p := script{kind: scriptPromote, keys: op.keys, tok: tok}
		p.arg[k], p.exp[k] = c.row[k], c.rex[k]
		if m.rules.FreshTTL {
			p.exp[k] = 0
		}
		if c.void && !m.rules.OldLease {
			m.skip(st, s, "miss 3: the lease is of an older run", direct)
			return
		}
		m.send(st, s, p, "miss 3: promotes", func(n *state, _ answer) { m.answers(n, s, n.sc[s].c.row[k]) })
	case missAbsent:
		if m.rules.BelieveNoRow {
			n := *st
			m.answers(&n, s, max(c.row[k], 0))
			m.emit(&n, s, "miss 3: believes that there is no row", "")
			return
		}
		if c.void && !m.rules.OldLease {
			m.skip(st, s, "miss 3: the lease is of an older run", direct)
			return
		}
		m.send(st, s, script{kind: scriptAbsent, keys: op.keys, tok: tok, force: !live(c.row[k])}, "miss 3: no row", func(n *state, a answer) {
			c := &n.sc[s].c
			switch {
			case live(c.row[k]), !a.ok && c.row[k] == tomb:
				m.answers(n, s, max(c.row[k], 0))
			case !a.ok:
				c.at = direct
			case a.code[k] == value:
				m.hit(n, s, k, a.val[k])
			case a.code[k] == held && c.row[k] == 0:
				c.at = missGrant
			default:
				m.answers(n, s, 0)
			}
		})
	case missHeld:
		m.held(st, s, k)
	case missLock:
		m.locks(st, s, clientThread+int8(s), op.keys, &c.locked, "miss 4: locks the key, for no row is believed without", func(n *state, f fate, num int8) {
			c := &n.sc[s].c
			if f != good {
				m.refuses(n, s)
				return
			}
			c.num, c.at = num, missResolve
			c.row[k] = m.row(n, k)
		})
	case missResolve:
		if !st.sc[s].trusted && !m.rules.AwaitUntrusted {
			n := *st
			n.unlock(clientThread + int8(s))
			m.clear(&n, s)
			n.sc[s].c.at = direct
			m.emit(&n, s, "miss 4: redis is not trusted", "")
			return
		}
		m.send(st, s, script{kind: scriptRead, keys: op.keys, num: c.num}, "miss 4: looks under the lock", func(n *state, a answer) {
			c := &n.sc[s].c
			switch {
			case !a.ok, a.code[k] == refused:
				n.unlock(clientThread + int8(s))
				m.lift(n, a)
				m.clear(n, s)
				c.at = missGrant
			case a.code[k] == value:
				m.hit(n, s, k, a.val[k])
			case a.mark[k] != 0:
				m.hit(n, s, k, 0)
			default:
				m.answers(n, s, max(c.row[k], 0))
			}
		})
	case missLook:
		if !st.sc[s].trusted && !m.rules.AwaitUntrusted {
			m.skip(st, s, "miss 4: redis is not trusted", direct)
			return
		}
		m.send(st, s, script{kind: scriptRead, keys: op.keys}, "miss 4: looks once more in Redis", func(n *state, a answer) {
			if a.ok && a.code[k] == value {
				m.hit(n, s, k, a.val[k])
				return
			}
			m.refuses(n, s)
		})
	case direct:
		m.direct(st, s, k)
	}
}

// skip goes on elsewhere without a message.
func (m *model) skip(st *state, s int, what string, to place) {
	n := *st
	n.sc[s].c.at = to
	m.emit(&n, s, what, "")
}

// hit answers a read with what Redis has.
func (m *model) hit(n *state, s, k int, val int8) {
	if m.excusedA(n, s, k) || n.sc[s].c.excused&bit(k) != 0 {
		m.refuses(n, s)
		return
	}
	m.answers(n, s, val)
}

// held: somebody else has the lease. It may be free again, or the reader has waited for it in vain.
func (m *model) held(st *state, s, k int) {
	if !st.sc[s].trusted && !m.rules.AwaitUntrusted {
		m.skip(st, s, "miss 4: redis is not trusted", direct)
		return
	}
	if tok := st.r.tok[k]; st.sc[s].link && (tok == free || tok == overtake || tok == negative || st.val(k) != 0 || st.r.mark[k] != 0) {
		n := *st
		m.clear(&n, s)
		n.sc[s].c.at, n.sc[s].c.waited = missGrant, true
		m.emit(&n, s, "miss 4: waits", "the lease is free, or the key is there")
		return
	}
	m.ask(st, s, 0, "miss 4: has waited in vain, reads the row", func(n *state, f fate) {
		c := &n.sc[s].c
		switch {
		case f != good:
			c.at = missLook
		case !m.staleInStore(n, s, k) && m.row(n, k) != 0:
			m.answers(n, s, max(m.row(n, k), 0))
		default:
			c.at = missLock
		}
	})
}

// direct answers from the store alone.
func (m *model) direct(st *state, s, k int) {
	m.ask(st, s, 0, "reads the row, without Redis", func(n *state, f fate) {
		row := m.row(n, k)
		switch {
		case f != good, m.staleInStore(n, s, k) && !m.blind(n, s),
			row == 0 && m.onlyInRedis() && !m.rules.NilWithoutRedis,
			m.excusedB(n, s, k), m.looksAtMark(n, s, k):
			m.refuses(n, s)
		default:
			m.answers(n, s, max(row, 0))
		}
	})
}

// blind: this sidecar's phase does not look at Redis's journal, because that rule is broken.
func (m *model) blind(n *state, s int) bool {
	return m.rules.Phase0Blind && !n.sc[s].phase.Rules().ReadsRedis
}

// looksAtMark: the sidecar trusts Redis and only avoids this key's copy there, which is marked.
func (m *model) looksAtMark(n *state, s, k int) bool {
	return !m.rules.StaleBlind && n.sc[s].trusted && n.sc[s].phase.Rules().ReadsRedis && n.r.mark[k] != 0
}
