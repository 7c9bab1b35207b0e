package model

// change is what a COMMIT brings.
type change struct {
	on      bool // of a ghost: there is one
	keys    uint8
	row     [maxKeys]int8 // 0: the row goes
	exp     [maxKeys]int8
	keep    uint8 // keys whose TTL is kept by the store: only if that rule is broken
	journal uint8 // keys that Redis's copy is stale of
	known   uint8 // entries that may name them already
	strike  uint8 // entries
}

// fate is what a sidecar learns of a message to Postgres.
type fate uint8

const (
	good fate = iota
	gone      // it is certain that nothing was stored
	unknown
)

// apply makes a change lasting. It returns the entry that it made, 0 if none.
func (m *model) apply(st *state, c change) (entry uint8) {
	p := &st.p
	for k := range maxKeys {
		if c.keys&bit(k) == 0 {
			continue
		}
		exp := c.exp[k]
		if c.keep&bit(k) != 0 && st.over(p.exp[k]) {
			exp = 0
		}
		p.row[k], p.exp[k], p.changed[k] = c.row[k], exp, st.time
		if p.row[k] <= 0 {
			p.exp[k] = 0
		}
	}
	if named := st.named(c.strike); !m.rules.StrikeSilent {
		for k := range maxKeys {
			if named&bit(k) != 0 {
				p.changed[k] = st.time
			}
		}
	}
	p.entries &^= c.strike
	known := c.known
	if !m.rules.KnownUnchecked {
		known &= p.entries
	}
	journal := c.journal &^ st.named(known)
	if journal != 0 {
		if int(p.made) == maxEntries {
			m.full = true
			return 0
		}
		entry = bit(int(p.made))
		p.names[p.made] = journal
		p.entries |= entry
		p.made++
	}
	return entry
}

// unlock gives the locks of a thread back: its transaction has ended.
func (st *state) unlock(thread int8) {
	for k := range maxKeys {
		if st.p.lock[k] == thread {
			st.p.lock[k] = 0
		}
	}
}

// holds: the thread's transaction is still there.
func (st *state) holds(thread int8) bool {
	for k := range maxKeys {
		if st.p.lock[k] == thread {
			return true
		}
	}
	return false
}

// lockless: a rule is broken that asks for locks.
func (m *model) lockless() bool {
	r := &m.rules
	return r.StrikeUnlocked || r.UnlockedWrite || r.FlushUnfenced || r.EntryAlways
}

// named are the keys that some entries name.
func (st *state) named(ids uint8) (keys uint8) {
	for id, of := range st.p.names {
		if ids&bit(id) != 0 {
			keys |= of
		}
	}
	return keys
}

// ask sends a message to Postgres that changes nothing there but locks. If it fails, the transaction of the thread has ended.
func (m *model) ask(st *state, s int, thread int8, what string, then func(n *state, f fate)) {
	if !st.sc[s].postgres {
		n := *st
		n.unlock(thread)
		then(&n, gone)
		m.emit(&n, s, what, "postgres cannot be reached")
		return
	}
	n := *st
	then(&n, good)
	m.emit(&n, s, what, "")
	if st.left.pgLink > 0 {
		n = *st
		n.left.pgLink--
		n.sc[s].postgres = false
		n.unlock(thread)
		then(&n, gone)
		m.emit(&n, s, what, "the connection to postgres breaks")
	}
}

// commits sends changes and COMMIT. Whatever its fate, the thread's transaction has ended for the sidecar; a COMMIT that still sits in a
// socket keeps the locks until it arrives or the server gives up waiting for it.
func (m *model) commits(st *state, s int, thread int8, c change, what string, then func(n *state, f fate, entry uint8)) {
	if !st.sc[s].postgres {
		n := *st
		n.unlock(thread)
		then(&n, gone, 0)
		m.emit(&n, s, what, "postgres cannot be reached")
		return
	}
	if !st.holds(thread) && !m.lockless() {
		for _, f := range []fate{gone, unknown} {
			n := *st
			then(&n, f, 0)
			m.emit(&n, s, what, "the server has ended the transaction")
		}
		return
	}
	n := *st
	entry := m.apply(&n, c)
	n.unlock(thread)
	then(&n, good, entry)
	m.emit(&n, s, what, "")
	if st.left.pgLink > 0 {
		lose := func(answer string, f fate, stored, inSocket bool) {
			n := *st
			n.left.pgLink--
			n.sc[s].postgres = false
			if stored {
				m.apply(&n, c)
			}
			if inSocket {
				n.ghost, n.ghost.on = c, true
				for k := range maxKeys {
					if n.p.lock[k] == thread {
						n.p.lock[k] = ghostThread
					}
				}
			}
			n.unlock(thread)
			then(&n, f, 0)
			m.emit(&n, s, what, answer)
		}
		lose("the connection to postgres breaks before it is sent", gone, false, false)
		lose("the connection to postgres breaks; it has not been done", unknown, false, false)
		lose("the connection to postgres breaks; it has been done", unknown, true, false)
		if !st.ghost.on {
			lose("the connection to postgres breaks; it sits in the socket", unknown, false, true)
		}
	}
	if st.left.crash > 0 && !st.ghost.on {
		n := *st
		n.left.crash--
		n.ghost, n.ghost.on = c, true
		for k := range maxKeys {
			if n.p.lock[k] == thread {
				n.p.lock[k] = ghostThread
			}
		}
		m.crash(&n, s)
		m.emit(&n, s, what, "the sidecar crashes; it sits in the socket")
	}
}

// locks takes the next key lock that a thread lacks, in ascending order, and calls then when it has all. It draws the number.
func (m *model) locks(st *state, s int, thread int8, keys uint8, locked *uint8, what string, then func(n *state, f fate, num int8)) {
	next := -1
	for k := range maxKeys {
		if keys&bit(k) != 0 && *locked&bit(k) == 0 {
			next = k
			break
		}
	}
	if next >= 0 && st.sc[s].postgres && st.p.lock[next] != 0 {
		return
	}
	last := next < 0 || *locked|bit(next) == keys
	had := *locked
	m.ask(st, s, thread, what, func(n *state, f fate) {
		if f != good {
			then(n, f, 0)
			return
		}
		if next >= 0 {
			n.p.lock[next] = thread
			set := had | bit(next)
			if thread < repairThread {
				n.sc[s].c.locked = set
			} else {
				n.sc[s].b.locked = set
			}
		}
		if last {
			n.p.seq++
			then(n, good, n.p.seq)
		}
	})
}

// lift helps a Postgres that has forgotten numbers: the next ones are above what Redis refused with.
func (m *model) lift(n *state, a answer) {
	for k := range maxKeys {
		if a.code[k] == refused {
			n.p.seq = max(n.p.seq, n.r.num[k])
		}
	}
}
