package model

// run is runAlone of proxy/generic.go: load, run, mirror.
func (m *model) run(st *state, s int) {
	op := m.present(st, s)
	c := &st.sc[s].c
	me := clientThread + int8(s)
	reads := serves(st.sc[s].phase) || m.rules.DrainTakesRow
	switch c.at {
	case runLock:
		if !st.sc[s].trusted {
			n := *st
			m.refuses(&n, s)
			m.emit(&n, s, "run: redis is not trusted", "")
			return
		}
		m.locks(st, s, me, op.keys, &c.locked, "run 1: locks, draws a number, reads the rows", func(n *state, f fate, num int8) {
			c := &n.sc[s].c
			c.ran = true
			if f != good {
				m.withoutStore(n, s)
				return
			}
			c.num, c.at = num, runPlace(op)
			for k := range maxKeys {
				c.row[k], c.rex[k] = m.row(n, k), n.p.exp[k]
			}
		})
	case runPrepare:
		m.send(st, s, script{kind: scriptRead, keys: op.keys, num: c.num}, "run 2: brings the number, watches the leases", func(n *state, a answer) {
			c := &n.sc[s].c
			if !a.ok {
				m.refuses(n, s)
				return
			}
			both, ok := m.bothName(n, s, me, a)
			if !ok {
				m.refuses(n, s)
				return
			}
			c.at, c.touched, c.void, c.both = runExec, 0, false, 0
			if reads {
				c.both = both
			}
			for k := range maxKeys {
				if op.keys&bit(k) == 0 {
					continue
				}
				rows := n.sc[s].phase.Rules().Write.KeepsRow() && !c.unlocked
				switch {
				case a.code[k] == refused:
					m.lift(n, a)
					m.restart(n, s)
					return
				case rows && a.mark[k] != 0 && c.both&bit(k) == 0:
					c.wait, c.code[k] = bit(k), marked
					m.finish(n, s)
					return
				case c.unlocked && a.mark[k] == 0 && a.code[k] == done:
					m.refuses(n, s)
					return
				case rows && a.code[k] == value && c.row[k] == 0:
					c.at, c.now[k], c.nex[k] = runAdopt, a.val[k], a.exp[k]
				}
			}
		})
	case runAdopt:
		adopt := change{keys: op.keys, row: c.now, exp: c.nex}
		m.commits(st, s, me, adopt, "run 2: adopts, COMMIT", func(n *state, f fate, _ uint8) {
			if f != good {
				m.refuses(n, s)
				return
			}
			m.restart(n, s)
		})
	case runExec:
		m.exec(st, s)
	}
}

// runPlace is where a command goes under the locks: a transaction is queued already, so that its keys are loaded before it.
func runPlace(op operation) place {
	if op.kind == opTx {
		return queuedLoad
	}
	return runPrepare
}

func (m *model) exec(st *state, s int) {
	op, c := m.present(st, s), &st.sc[s].c
	ver := int8(m.index(st, s) + 1)
	overtakes := c.unlocked || !st.sc[s].phase.Rules().Write.KeepsRow()
	p := script{kind: scriptRun, keys: op.keys, op: int8(m.index(st, s)), num: c.num, tok: m.writerToken(st, s), ver: ver, force: overtakes,
		arg: c.row, exp: c.rex, touched: c.touched, both: c.both}
	if !serves(st.sc[s].phase) && !m.rules.DrainTakesRow {
		p.arg = [maxKeys]int8{}
	}
	before := *st
	if overtakes {
		m.keepMarks(&before, s, op.keys, ver)
	}
	m.send(&before, s, p, "run 3: loads, runs, captures", func(n *state, a answer) {
		switch {
		case !a.ok:
			m.forgetMarks(n, s, op.keys, ver)
			if st.sc[s].link {
				m.uncertain(n, s)
			} else {
				m.refuses(n, s)
			}
			return
		case a.code[0] == changed || a.code[1] == changed:
			m.forgetMarks(n, s, op.keys, ver)
			m.restart(n, s)
			return
		}
		if a.code[0] == refused || a.code[1] == refused {
			m.uncertain(n, s)
			return
		}
		m.mirror(n, s, a, overtakes)
	})
}

// mirror goes on with what a command has left of its keys.
func (m *model) mirror(n *state, s int, a answer, overtakes bool) {
	op, c := m.present(n, s), &n.sc[s].c
	c.res, c.now, c.nex, c.dirty = a.res, a.val, a.exp, op.keys
	c.code = [maxKeys]int8{done, done}
	c.void = false
	switch {
	case c.unlocked:
		m.leaveMarks(n, s, op.keys, int8(m.index(n, s)+1))
		m.answers(n, s, c.res)
	case overtakes:
		m.dropRows(n, s)
	default:
		c.at = commit
		if m.stored(n, s).keys == 0 {
			n.unlock(clientThread + int8(s))
			m.afterCommit(n, s)
		}
	}
}
