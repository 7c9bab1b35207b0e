package model

// overtake is redisFirst of proxy/write.go: a write in phase2 and drain, and in phase1 while Postgres is down; and what phase3 does.
func (m *model) overtake(st *state, s int) {
	op := m.present(st, s)
	c := &st.sc[s].c
	me := clientThread + int8(s)
	ver := int8(m.index(st, s) + 1)
	switch c.at {
	case plain:
		m.send(st, s, script{kind: scriptPlain, keys: op.keys, op: int8(m.index(st, s))}, "passes the command to Redis", func(n *state, a answer) {
			switch {
			case a.ok:
				m.answers(n, s, m.only(op, a.val))
			case st.sc[s].link:
				m.uncertain(n, s)
			default:
				m.refuses(n, s)
			}
		})
	case lock2:
		if m.rules.UnlockedWrite {
			n := *st
			n.sc[s].c.at = write2
			m.evaluate(&n, s, c.row, c.rex)
			n.sc[s].c.want = [maxKeys]int8{-1, -1}
			m.emit(&n, s, "overtake 1: takes no locks", "")
			return
		}
		m.locks(st, s, me, op.keys, &c.locked, "overtake 1: locks, draws a number, reads the rows", func(n *state, f fate, num int8) {
			if f != good {
				m.withoutStore(n, s)
				return
			}
			c := &n.sc[s].c
			if !n.sc[s].trusted {
				m.refuses(n, s)
				return
			}
			c.num = num
			for k := range maxKeys {
				c.row[k], c.rex[k] = m.row(n, k), n.p.exp[k]
			}
			c.at = read2
			if !op.looks() {
				c.at = write2
				m.evaluate(n, s, c.row, c.rex)
				c.want = [maxKeys]int8{-1, -1}
			}
		})
	case read2:
		m.send(st, s, script{kind: scriptRead, keys: op.keys, num: c.num}, "overtake 2: reads", func(n *state, a answer) { m.compute(n, s, a) })
	case write2:
		before := *st
		m.keepMarks(&before, s, c.dirty, ver)
		p := script{kind: scriptWrite, keys: c.dirty, num: c.num, ver: ver, arg: c.now, exp: c.nex, want: c.want, looked: op.looks()}
		if op.looks() && !m.rules.ValueOnly {
			p.compares, p.wmark, p.wnum = true, c.wmark, c.wnum
		}
		m.send(&before, s, p, "overtake 3: marks and writes", func(n *state, a answer) {
			c := &n.sc[s].c
			switch {
			case !a.ok:
				m.forgetMarks(n, s, c.dirty, ver)
				if st.sc[s].link {
					m.uncertain(n, s)
				} else {
					m.refuses(n, s)
				}
			case a.code[0] > done || a.code[1] > done:
				m.forgetMarks(n, s, c.dirty, ver)
				m.lift(n, a)
				m.restart(n, s)
			case c.unlocked:
				m.leaveMarks(n, s, c.dirty, ver)
				m.answers(n, s, c.res)
			default:
				m.dropRows(n, s)
			}
		})
	case drop2:
		d := change{keys: m.rowsOf(c)}
		m.commits(st, s, me, d, "overtake 4: the rows go, COMMIT", func(n *state, f fate, _ uint8) {
			c := &n.sc[s].c
			switch {
			case f == good:
				c.at = strike2
			case m.staleInRedis(n, s)&op.keys != 0:
				m.leaveMarks(n, s, c.dirty, ver)
				m.uncertain(n, s)
			default:
				m.leaveMarks(n, s, c.dirty, ver)
				m.answers(n, s, c.res)
			}
		})
	case strike2:
		m.send(st, s, script{kind: scriptStrike, keys: c.dirty, num: c.num, arg: [maxKeys]int8{ver, ver}}, "overtake 5: strikes the marks", func(n *state, a answer) {
			c := &n.sc[s].c
			if a.ok {
				m.forgetMarks(n, s, c.dirty, ver)
			} else {
				m.leaveMarks(n, s, c.dirty, ver)
			}
			m.answers(n, s, c.res)
		})
	}
}

// only is the answer for an operation of one key.
func (m *model) only(op operation, val [maxKeys]int8) int8 {
	if op.keys == bit(1) {
		return val[1]
	}
	return val[0]
}

// compute decides from what Redis has of the keys, and the rows if they are locked, what they are to hold.
func (m *model) compute(n *state, s int, a answer) {
	op, c := m.present(n, s), &n.sc[s].c
	if !a.ok {
		m.refuses(n, s)
		return
	}
	both, ok := m.bothName(n, s, clientThread+int8(s), a)
	if !ok {
		m.withoutStore(n, s)
		return
	}
	val, exp := a.val, a.exp
	for k := range maxKeys {
		if op.keys&bit(k) == 0 {
			continue
		}
		locked := !c.unlocked && (serves(n.sc[s].phase) || m.rules.DrainTakesRow)
		c.want[k], c.wmark[k], c.wnum[k] = a.val[k], a.mark[k], a.num[k]
		switch {
		case a.code[k] == refused:
			m.lift(n, a)
			m.restart(n, s)
			return
		case locked && a.mark[k] == 0 && c.row[k] != 0, locked && both&bit(k) != 0:
			val[k], exp[k] = c.row[k], c.rex[k]
		case c.unlocked && a.val[k] == 0 && a.mark[k] == 0 && op.needs():
			m.refuses(n, s) // the store may hold it
			return
		}
	}
	m.evaluate(n, s, val, exp)
	c.at = write2
	if c.dirty == 0 {
		m.answers(n, s, c.res)
	}
}

// bothName tells which keys of the present command, whose rows are locked, both journals name: there the row wins, a tombstone too. The entries are
// those of the moment; nobody makes or strikes one that names the keys while they are locked. false: Postgres cannot tell.
func (m *model) bothName(n *state, s int, thread int8, a answer) (both uint8, ok bool) {
	op, c := m.present(n, s), &n.sc[s].c
	if c.unlocked || m.rules.BothBlind {
		return 0, true
	}
	for k := range maxKeys {
		if op.keys&bit(k) != 0 && a.mark[k] != 0 && c.row[k] != 0 {
			both |= bit(k)
		}
	}
	if both != 0 && (!n.sc[s].postgres || !n.holds(thread) && !m.lockless()) {
		return 0, false
	}
	return both & n.named(n.p.entries), true
}

// rowsOf are the keys that have a row, of those that are written.
func (m *model) rowsOf(c *client) (keys uint8) {
	for k := range maxKeys {
		if c.dirty&bit(k) != 0 && c.row[k] != 0 {
			keys |= bit(k)
		}
	}
	return keys
}

// dropRows goes on where the rows go, if there are any.
func (m *model) dropRows(n *state, s int) {
	c := &n.sc[s].c
	c.at = drop2
	if m.rules.UnlockedWrite {
		c.row = [maxKeys]int8{first, first}
	}
	if m.rules.KeepRow || m.rowsOf(c) == 0 {
		c.at = strike2
	}
}
