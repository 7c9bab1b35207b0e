package model

import "cacheproxy/policy"

// work takes one step of sidecar s's polls, repairs and recovery.
func (m *model) work(st *state, s int) {
	sc := &st.sc[s]
	if !sc.alive {
		return
	}
	switch sc.b.at {
	case idle:
		m.reaches(st, s)
		switch {
		case !sc.phase.Rules().UsesStore:
			if !sc.trusted {
				n := *st
				n.sc[s].link, n.sc[s].trusted = true, true
				m.kill(&n, s)
				m.emit(&n, s, "recovery: connects; there is nothing to compare with", "")
			}
		case !sc.trusted:
			m.recovers(st, s)
		default:
			m.polls(st, s)
			m.repairsFor(st, s)
		}
	case pollStore, pollRedis:
		m.polls(st, s)
	case repairLock, repairDelete, repairStrike:
		m.repairEntries(st, s)
	case markLock, markRead, markCommit, markStrike:
		m.repairMarks(st, s)
	default:
		m.recovers(st, s)
	}
}

// reaches: Postgres can be had again.
func (m *model) reaches(st *state, s int) {
	if sc := &st.sc[s]; !sc.postgres && sc.phase.Rules().UsesStore {
		n := *st
		n.sc[s].postgres = true
		m.pollStore(&n, s)
		m.emit(&n, s, "poll: reaches postgres again", "")
	}
}

func (m *model) pollStore(n *state, s int) { n.sc[s].known, n.sc[s].extra = n.p.entries, 0 }

// polls is one poll: the journal in Postgres, then the one in Redis, then the repairs. One that would find nothing new and repair nothing is left
// out.
func (m *model) polls(st *state, s int) {
	sc := &st.sc[s]
	switch sc.b.at {
	case idle:
		if !sc.postgres || !m.news(st, s) {
			return
		}
		m.ask(st, s, 0, "poll: reads the journal in postgres", func(n *state, f fate) {
			if f == good {
				m.pollStore(n, s)
				n.sc[s].b.at = pollStore
			}
		})
	case pollStore:
		if !sc.trusted {
			n := *st
			m.rest(&n, s)
			m.emit(&n, s, "poll: redis is not trusted", "")
			return
		}
		m.send(st, s, m.pollScript(st, s, true), "poll: reads the journal in redis, sets the clock", func(n *state, a answer) {
			if !a.ok {
				m.rest(n, s)
				return
			}
			n.sc[s].b.at = pollRedis
			m.pollRedis(n, s, false)
			if n.sc[s].b.at == pollRedis && !m.due(n, s) {
				m.rest(n, s)
			}
		})
	case pollRedis:
		m.repairs(st, s)
	}
}

// news: a poll would learn or repair something.
func (m *model) news(st *state, s int) bool {
	try := *st
	m.pollStore(&try, s)
	if try.sc[s].trusted {
		m.execute(&try, m.pollScript(&try, s, true))
		m.pollRedis(&try, s, false)
	}
	return try != *st || m.due(&try, s)
}

// due: there is something to repair.
func (m *model) due(st *state, s int) bool {
	sc := &st.sc[s]
	return sc.trusted && (sc.known != 0 || sc.marks != [maxKeys]int8{})
}

func (m *model) pollScript(st *state, s int, stamp bool) script {
	c := script{kind: scriptPoll, ver: st.anchor + 1, op: st.run}
	if st.sc[s].part == st.run && st.r.dataSet != st.run {
		c.op = 0 // verified in part: the clock stays as it is
	}
	if stamp {
		c.arg[0] = st.time
	}
	return c
}

// pollRedis is what a sidecar makes of the journal in Redis. Marks of its own that Redis has lost go back next.
func (m *model) pollRedis(n *state, s int, restarted bool) {
	sc := &n.sc[s]
	n.anchor = max(n.anchor, n.r.anchor)
	lost := restarted || sc.anchor != 0 && sc.anchor != n.r.anchor
	for k := range maxKeys {
		mine := &sc.mine[k]
		if mine.left && n.r.mark[k] == 0 {
			switch {
			case m.rules.PutBackAlways, lost && (sc.seen[k] == mine.ver || mine.young):
				sc.b.keys |= bit(k)
				sc.b.ver[k] = mine.ver
				sc.b.at = putMarks
			case !mine.young || lost:
				*mine = mark{}
			}
		}
		mine.young = false
		twice := sc.seen[k] == n.r.mark[k]
		sc.seen[k] = n.r.mark[k]
		sc.marks[k] = 0
		if twice {
			sc.marks[k] = n.r.mark[k]
		}
	}
	sc.anchor = n.r.anchor
}

// repairs begins with what the poll has found. What is left is found by the next one.
func (m *model) repairs(st *state, s int) {
	sc := &st.sc[s]
	if sc.known != 0 {
		n := *st
		n.sc[s].b = worker{at: repairLock, ids: sc.known, keys: st.named(sc.known)}
		m.repairEntries(&n, s)
	}
	keys := uint8(0)
	for k := range maxKeys {
		if sc.marks[k] != 0 {
			keys |= bit(k)
		}
	}
	if keys != 0 {
		n := *st
		n.sc[s].b = worker{at: markLock, keys: keys}
		m.repairMarks(&n, s)
	}
	n := *st
	m.rest(&n, s)
	m.emit(&n, s, "poll: repairs nothing now", "")
}

// repairsFor repairs marks that the sidecar's own writer has found.
func (m *model) repairsFor(st *state, s int) {
	sc := &st.sc[s]
	if sc.c.at != awaitRepair || !sc.trusted || !sc.postgres {
		return
	}
	keys := uint8(0)
	for k := range maxKeys {
		if m.present(st, s).keys&bit(k) != 0 && st.r.mark[k] != 0 {
			keys |= bit(k)
		}
	}
	if keys != 0 {
		n := *st
		n.sc[s].b = worker{at: markLock, keys: keys}
		m.repairMarks(&n, s)
	}
}

// rest ends what the worker was at.
func (m *model) rest(n *state, s int) {
	n.unlock(repairThread + int8(s))
	n.sc[s].b = worker{}
}

// repairEntries is repairBatch of proxy/journal.go: Redis is stale.
func (m *model) repairEntries(st *state, s int) {
	b := &st.sc[s].b
	me := repairThread + int8(s)
	switch b.at {
	case repairLock:
		found := func(n *state, f fate, num int8) {
			b := &n.sc[s].b
			if f != good {
				m.rest(n, s)
				return
			}
			b.num, b.at = num, repairDelete
			there := b.ids & n.p.entries
			if there == 0 && !m.rules.StrikeBlind {
				n.sc[s].known &^= b.ids
				m.rest(n, s)
				return
			}
			todo := n.named(there)
			if !serves(n.sc[s].phase) && m.anyRow(n, todo) { // for those to repair who read the store
				m.rest(n, s)
				return
			}
			if m.rules.StrikeBlind {
				todo = n.named(b.ids)
			}
			for k := range maxKeys {
				if m.row(n, k) == 0 {
					todo &^= bit(k)
				}
			}
			b.ids, b.keys = there, todo
			if todo == 0 {
				b.at = repairStrike
			}
		}
		if m.rules.StrikeUnlocked {
			m.ask(st, s, 0, "repair: takes no locks, looks whether the entry is there", func(n *state, f fate) {
				n.p.seq++
				found(n, f, n.p.seq)
			})
			return
		}
		m.locks(st, s, me, b.keys, &b.locked, "repair: locks, looks whether the entry is there", found)
	case repairDelete:
		m.send(st, s, script{kind: scriptRepair, keys: b.keys, num: b.num, force: !m.rules.MarkWins}, "repair: redis is stale, deletes there", func(n *state, a answer) {
			m.lift(n, a)
			if !a.ok || a.code[0] == refused || a.code[1] == refused {
				m.rest(n, s)
				return
			}
			n.sc[s].b.at = repairStrike
		})
	case repairStrike:
		if b.void && !m.rules.StrikeSilent {
			n := *st
			m.rest(&n, s)
			m.emit(&n, s, "repair: redis was lost meanwhile", "")
			return
		}
		m.commits(st, s, me, change{strike: b.ids}, "repair: strikes the entry, COMMIT", func(n *state, f fate, _ uint8) {
			sc := &n.sc[s]
			if f == good {
				sc.known &^= sc.b.ids
				if sc.known == 0 {
					sc.extra = 0
				}
			}
			m.rest(n, s)
		})
	}
}

// repairMarks is repairPart of proxy/journal.go: the store is stale.
func (m *model) repairMarks(st *state, s int) {
	b := &st.sc[s].b
	me := repairThread + int8(s)
	switch b.at {
	case markLock:
		m.locks(st, s, me, b.keys, &b.locked, "repair of a mark: locks", func(n *state, f fate, num int8) {
			if f != good {
				m.rest(n, s)
				return
			}
			n.sc[s].b.num, n.sc[s].b.at = num, markRead
		})
	case markRead:
		m.send(st, s, script{kind: scriptRead, keys: b.keys, num: b.num}, "repair of a mark: reads", func(n *state, a answer) {
			b := &n.sc[s].b
			m.lift(n, a)
			for k := range maxKeys {
				if b.keys&bit(k) == 0 {
					continue
				}
				named := m.staleInRedis(n, s)
				if !m.rules.RepairUnaware {
					named |= n.named(n.p.entries)
				}
				both := m.row(n, k) != 0 && named&bit(k) != 0
				if !a.ok || a.code[k] == refused || a.mark[k] == 0 || both && !m.rules.MarkWins {
					b.keys &^= bit(k)
					if a.ok && a.mark[k] == 0 {
						n.sc[s].marks[k] = 0
					}
				}
			}
			if b.keys == 0 {
				m.rest(n, s)
				return
			}
			b.val, b.exp, b.ver, b.at = a.val, a.exp, a.mark, markCommit
			if m.markChange(n, s).keys == 0 {
				n.unlock(me)
				b.at = markStrike
			}
		})
	case markCommit:
		m.commits(st, s, me, m.markChange(st, s), "repair of a mark: the row, COMMIT", func(n *state, f fate, _ uint8) {
			if f != good {
				m.rest(n, s)
				return
			}
			n.sc[s].b.at = markStrike
		})
	case markStrike:
		m.send(st, s, script{kind: scriptStrike, keys: b.keys, num: b.num, arg: b.ver}, "repair of a mark: strikes it", func(n *state, a answer) {
			sc := &n.sc[s]
			for k := range maxKeys {
				if !a.ok || sc.b.keys&bit(k) == 0 {
					continue
				}
				if sc.marks[k] == sc.b.ver[k] {
					sc.marks[k] = 0
				}
				if sc.mine[k].ver == sc.b.ver[k] {
					sc.mine[k] = mark{}
				}
			}
			m.rest(n, s)
		})
	}
}

// markChange is what the repair of marks writes into the rows.
func (m *model) markChange(st *state, s int) (c change) {
	sc := &st.sc[s]
	keeps := sc.phase.Rules().Write.KeepsRow()
	for k := range maxKeys {
		if sc.b.keys&bit(k) == 0 || !keeps && st.p.row[k] == 0 {
			continue
		}
		c.keys |= bit(k)
		if keeps {
			c.row[k], c.exp[k] = sc.b.val[k], sc.b.exp[k]
			if c.row[k] == 0 && !m.rules.NoTombstone {
				c.row[k] = tomb
			}
		}
	}
	return c
}

// anyRow: Postgres has a row, or a tombstone, of one of keys.
func (m *model) anyRow(st *state, keys uint8) bool {
	for k := range maxKeys {
		if keys&bit(k) != 0 && m.row(st, k) != 0 {
			return true
		}
	}
	return false
}

// serves: the sidecar reads the store for what Redis lacks.
func serves(p policy.Phase) bool { return p.Rules().ReadsStore }
