package model

// queued is runQueued of proxy/generic.go, of a transaction that cannot be queued again: the load, then EXEC.
func (m *model) queued(st *state, s int) {
	op := m.present(st, s)
	c := &st.sc[s].c
	ver := int8(m.index(st, s) + 1)
	reads := serves(st.sc[s].phase) || m.rules.DrainTakesRow
	rows := c.row
	if !reads {
		rows = [maxKeys]int8{}
	}
	keeps := st.sc[s].phase.Rules().Write.KeepsRow() && !c.unlocked
	switch c.at {
	case queuedLoad, queuedForce:
		p := script{kind: scriptLoad, keys: op.keys, num: c.num, arg: rows, exp: c.rex}
		what := "EXEC 1: loads"
		if c.at == queuedForce { // once: whoever marks a key from now on is newer
			p.both, p.looked = c.both, true
			what = "EXEC 1: loads where both journals name a key"
		}
		m.send(st, s, p, what, func(n *state, a answer) {
			c := &n.sc[s].c
			if !a.ok {
				m.refuses(n, s)
				return
			}
			if c.at == queuedLoad && reads && a.code[0] != refused && a.code[1] != refused {
				both, ok := m.bothName(n, s, clientThread+int8(s), a)
				if !ok {
					m.refuses(n, s)
					return
				}
				if both != 0 {
					c.at, c.both = queuedForce, both
					return
				}
			}
			c.at = queuedExec
			for k := range maxKeys {
				switch {
				case op.keys&bit(k) == 0:
				case a.code[k] == refused:
					m.lift(n, a)
					m.restart(n, s)
					return
				case keeps && a.mark[k] != 0:
					c.wait, c.code[k] = bit(k), marked
					m.finish(n, s)
					return
				case c.unlocked && a.mark[k] == 0 && a.val[k] == 0:
					m.refuses(n, s)
					return
				case keeps && a.val[k] != 0 && c.row[k] == 0:
					c.at, c.now[k], c.nex[k] = runAdopt, a.val[k], a.exp[k]
				}
			}
		})
	case queuedExec:
		p := script{kind: scriptQueued, keys: op.keys, op: int8(m.index(st, s)), num: c.num, tok: m.writerToken(st, s), ver: ver, force: !keeps, arg: rows, exp: c.rex}
		before := *st
		if !keeps {
			m.keepMarks(&before, s, op.keys, ver)
		}
		m.send(&before, s, p, "EXEC 2: runs, captures", func(n *state, a answer) {
			switch {
			case !a.ok:
				m.forgetMarks(n, s, op.keys, ver)
				m.uncertain(n, s)
			case a.code[0] == refused || a.code[1] == refused:
				m.uncertain(n, s) // somebody was faster: what is newer stands
			default:
				m.mirror(n, s, a, !keeps)
			}
		})
	}
}

// scriptLoad brings a row into Redis. arg is the row.
func (m *model) scriptLoad(st *state, c script, k int, a *answer) {
	r := &st.r
	if c.num > 0 && (m.low(st, c, k) || !c.looked && m.twice(st, c, k)) {
		a.one(k, refused, 0, 0)
		return
	}
	if c.num > 0 {
		st.put(k, c.num, free)
	}
	if c.both&bit(k) != 0 {
		r.mark[k] = 0
	}
	switch {
	case r.mark[k] != 0:
	case live(c.arg[k]):
		st.set(k, c.arg[k], c.exp[k])
	case c.arg[k] == tomb:
		st.set(k, 0, 0)
	}
	a.one(k, done, r.val[k], r.exp[k])
	a.mark[k] = r.mark[k]
}

// scriptQueued runs a transaction, and at its end scriptCapture or, with force, scriptOvertake.
func (m *model) scriptQueued(st *state, c script, k int, a *answer) {
	r := &st.r
	if r.val[k] == 0 && r.mark[k] == 0 && (live(c.arg[k]) || c.num == 0) {
		m.excuseD(st, k)
	}
	res, val, exp, same := m.hist.ops[c.op].apply(int(c.op), r.val[k], r.exp[k])
	if !same {
		st.set(k, val, exp)
	}
	a.one(k, done, r.val[k], r.exp[k])
	a.res = res
	switch {
	case c.force:
		r.mark[k] = c.ver
		st.put(k, max(c.num, r.num[k]), overtake)
	case c.num < r.num[k]:
		if r.mark[k] == 0 {
			if r.tok[k] >= writer {
				st.set(k, 0, 0)
			} else {
				r.mark[k] = c.ver
			}
		}
		a.one(k, refused, 0, 0)
	case r.mark[k] != 0 && !m.rules.CaptureMarked:
		r.mark[k] = c.ver
		st.put(k, c.num, overtake)
		a.one(k, refused, 0, 0)
	default:
		st.set(k, 0, 0)
		st.put(k, c.num, c.tok)
	}
}
