package model

import "cacheproxy/policy"

// write is storeFirst of proxy/write.go: a write in phase0 and phase1.
func (m *model) write(st *state, s int) {
	op := m.present(st, s)
	c := &st.sc[s].c
	me := clientThread + int8(s)
	switch c.at {
	case begin:
		m.locks(st, s, me, op.keys, &c.locked, "write 1: locks, draws a number, reads the rows", func(n *state, f fate, num int8) {
			if f != good {
				m.withoutStore(n, s)
				return
			}
			c := &n.sc[s].c
			c.num, c.void = num, false
			for k := range maxKeys {
				if op.keys&bit(k) != 0 {
					c.row[k], c.rex[k] = m.row(n, k), n.p.exp[k]
				}
			}
			c.at = invalidate
			if !n.sc[s].trusted {
				m.withoutRedis(n, s)
			}
		})
	case invalidate:
		m.invalidate(st, s)
	case commit:
		m.commit(st, s)
	case putBack, giveUp:
		m.putBack(st, s)
	case writeOn:
		m.writeOn(st, s)
	case fill:
		m.fill(st, s)
	case againLock:
		c.locked &= c.todo
		m.locks(st, s, me, c.todo, &c.locked, "write 4: the lease was lost: locks again", func(n *state, f fate, num int8) {
			c := &n.sc[s].c
			if f != good {
				m.mustTell(n, s)
				return
			}
			c.num, c.at = num, again
			for k := range maxKeys {
				c.row[k] = m.row(n, k)
			}
		})
	case again:
		m.send(st, s, script{kind: scriptInvalidate, keys: c.todo, num: c.num, tok: m.writerToken(st, s), arg: c.row}, "write 4: invalidates again", func(n *state, a answer) {
			n.unlock(me)
			if !a.ok {
				m.mustTell(n, s)
				return
			}
			m.finish(n, s)
		})
	case staleLock:
		m.locks(st, s, me, c.todo, &c.locked, "write 4 failed: locks, to journal what is still there", func(n *state, f fate, _ int8) {
			if f != good {
				m.uncertain(n, s)
				return
			}
			c := &n.sc[s].c
			for k := range maxKeys {
				mine := m.row(n, k) == c.now[k] || c.now[k] == 0 && m.row(n, k) == tomb ||
					!m.rules.JournalExpired && n.p.row[k] == c.now[k] && n.over(c.nex[k])
				if !mine {
					c.todo &^= bit(k)
				}
			}
			c.at = staleCommit
			if c.todo == 0 {
				m.finish(n, s)
			}
		})
	case staleCommit:
		journal := change{journal: c.todo, known: st.sc[s].known}
		m.commits(st, s, me, journal, "write 4 failed: the entry, COMMIT", func(n *state, f fate, entry uint8) {
			if f != good {
				m.uncertain(n, s)
				return
			}
			m.keep(n, s, entry, n.sc[s].c.todo)
			m.finish(n, s)
		})
	case awaitRepair:
		if sc := &st.sc[s]; st.r.mark[0]|st.r.mark[1] == 0 || !sc.link || !sc.postgres {
			n := *st
			m.restart(&n, s)
			m.emit(&n, s, "write 2: begins again after the repair", "")
		}
	case strikeOwn:
		m.commits(st, s, me, change{strike: c.entry}, "strikes its entry", func(n *state, f fate, _ uint8) {
			if f == good {
				n.sc[s].known &^= n.sc[s].c.entry
				n.sc[s].extra = 0
			}
			m.next(n, s)
		})
	}
}

func (m *model) writerToken(st *state, s int) int8 { return writer + int8(m.index(st, s)) }

// evaluate decides what the keys are to hold, given what they hold.
func (m *model) evaluate(n *state, s int, val, exp [maxKeys]int8) {
	op, c := m.present(n, s), &n.sc[s].c
	for k := range maxKeys {
		if op.keys&bit(k) == 0 {
			continue
		}
		v, e := max(val[k], 0), exp[k]
		if v == 0 {
			e = 0
		}
		var same bool
		c.res, c.now[k], c.nex[k], same = op.apply(m.index(n, s), v, e)
		if same {
			c.now[k], c.nex[k] = v, e
		} else {
			c.dirty |= bit(k)
		}
	}
}

// keepsCopies: the phase writes both stores.
func (m *model) keepsCopies(n *state, s int) bool {
	return n.sc[s].phase.Rules().Write == policy.WriteBoth
}

// withoutStore: Postgres cannot be had. The phase says what becomes of a write then.
func (m *model) withoutStore(n *state, s int) {
	sc := &n.sc[s]
	op := m.present(n, s)
	ran := sc.c.ran
	n.unlock(clientThread + int8(s))
	m.clear(n, s)
	sc.c.unlocked = true
	switch {
	case sc.phase.Rules().StoreDownWrite != policy.ToRedisAndJournal || m.cfg.BothStores,
		!sc.trusted,
		m.staleInRedis(n, s)&op.keys != 0 && !m.rules.WriteOverStale:
		m.refuses(n, s)
	case ran:
		sc.c.ran, sc.c.at = true, runPlace(op)
	case op.looks():
		sc.c.at = read2
	default:
		sc.c.at = write2
		m.evaluate(n, s, sc.c.row, sc.c.rex)
		sc.c.want = [maxKeys]int8{-1, -1}
	}
}

// withoutRedis decides what may be assumed while Redis cannot be asked.
func (m *model) withoutRedis(n *state, s int) {
	op, c := m.present(n, s), &n.sc[s].c
	c.lost, c.at = true, commit
	for k := range maxKeys {
		if op.keys&bit(k) == 0 {
			continue
		}
		if m.cfg.BothStores && m.keepsCopies(n, s) || op.needs() && (m.staleInStore(n, s, k) || c.row[k] == 0 && m.onlyInRedis()) {
			m.refuses(n, s)
			return
		}
	}
	m.evaluate(n, s, c.row, c.rex)
}

func (m *model) invalidate(st *state, s int) {
	op, c := m.present(st, s), &st.sc[s].c
	p := script{kind: scriptInvalidate, keys: op.keys, num: c.num, tok: m.writerToken(st, s), arg: c.row}
	for k := range maxKeys {
		_, p.want[k], _, _ = op.apply(m.index(st, s), max(c.row[k], 0), c.rex[k])
	}
	m.send(st, s, p, "write 2: invalidates, takes the lease", func(n *state, a answer) {
		c := &n.sc[s].c
		if !a.ok {
			m.withoutRedis(n, s)
			return
		}
		m.lift(n, a)
		c.code = a.code
		for k := range maxKeys {
			if op.keys&bit(k) != 0 && a.code[k] != done {
				c.wait |= bit(k)
			}
		}
		c.at = commit
		if c.wait == 0 {
			m.evaluate(n, s, c.row, c.rex)
		}
		for k := range maxKeys {
			if op.keys&bit(k) == 0 || c.wait == 0 {
				continue
			}
			c.now[k], c.nex[k] = max(c.row[k], 0), c.rex[k]
			if a.code[k] == value { // it goes into the row first
				c.now[k], c.nex[k] = a.val[k], a.exp[k]
			}
		}
		if m.stored(n, s).keys == 0 {
			n.unlock(clientThread + int8(s))
			m.afterCommit(n, s)
		}
	})
}

// stored is what the COMMIT of a write brings.
func (m *model) stored(n *state, s int) (c change) {
	w := &n.sc[s].c
	op := m.present(n, s)
	for k := range maxKeys {
		adopts := w.code[k] == value && w.wait&bit(k) != 0
		if op.keys&bit(k) == 0 || w.dirty&bit(k) == 0 && !adopts || w.now[k] == 0 && w.row[k] == 0 && !w.lost {
			continue
		}
		c.keys |= bit(k)
		c.row[k], c.exp[k] = w.now[k], w.nex[k]
		if c.row[k] == 0 && !m.rules.NoTombstone {
			c.row[k] = tomb
		}
		if m.rules.KeepTTL && op.kind == opAppend {
			c.keep |= bit(k)
		}
	}
	if w.lost && !m.rules.NoEntry && !m.rules.TrustPaused || m.rules.EntryAlways {
		c.journal, c.known = c.keys, n.sc[s].known
	}
	return c
}

func (m *model) commit(st *state, s int) {
	c := m.stored(st, s)
	m.commits(st, s, clientThread+int8(s), c, "write 3: COMMIT", func(n *state, f fate, entry uint8) {
		w := &n.sc[s].c
		switch {
		case f == good:
			m.keep(n, s, entry, c.journal)
			if m.rules.EntryAlways {
				w.entry = entry
			}
			m.afterCommit(n, s)
		case w.lost && f == unknown:
			m.uncertain(n, s)
		case w.lost:
			m.refuses(n, s)
		case w.wait != 0:
			w.at, w.then = putBack, begin
		case m.rules.PutBackUnknown && f == unknown:
			w.at, w.then = putBack, idle
		case m.rules.RepeatUnknown && f == unknown:
			m.withoutStore(n, s)
		case f == unknown:
			w.at, w.todo = writeOn, w.dirty&^m.staleInRedis(n, s)
		case w.ran && !m.cfg.BothStores && m.keepsCopies(n, s): // load, run, mirror does not begin again: it has run
			w.at, w.todo = writeOn, w.dirty&^m.staleInRedis(n, s)
		default:
			w.at, w.then = putBack, lock2
		}
	})
}

// afterCommit is where a write goes whose rows are stored.
func (m *model) afterCommit(n *state, s int) {
	c := &n.sc[s].c
	op := m.present(n, s)
	switch {
	case c.lost:
		m.finish(n, s)
	case op.keys&^c.wait == 0:
		m.finish(n, s)
	case c.void:
		m.leaseLost(n, s, op.keys&^c.wait)
	default:
		c.at = fill
	}
}

// keep remembers an entry of the sidecar's own.
func (m *model) keep(n *state, s int, entry, keys uint8) {
	if keys == 0 {
		return
	}
	n.sc[s].known |= entry
	n.sc[s].extra |= keys
}

func (m *model) fill(st *state, s int) {
	op, c := m.present(st, s), &st.sc[s].c
	if c.void && !m.rules.OldLease {
		n := *st
		m.leaseLost(&n, s, op.keys&^c.wait)
		m.emit(&n, s, "write 4: the lease is of an older run", "")
		return
	}
	p := script{kind: scriptFill, keys: op.keys &^ c.wait, num: c.num, tok: m.writerToken(st, s)}
	if m.keepsCopies(st, s) {
		p.arg, p.exp = c.now, c.nex
	}
	m.send(st, s, p, "write 4: puts the value into Redis", func(n *state, a answer) {
		lost := uint8(0)
		for k := range maxKeys {
			if a.code[k] == leaseLost {
				lost |= bit(k)
			}
		}
		switch {
		case !a.ok:
			m.mustTell(n, s)
		case lost != 0:
			m.leaseLost(n, s, lost)
		default:
			m.finish(n, s)
		}
	})
}

// leaseLost: somebody may have promoted what this write has replaced.
func (m *model) leaseLost(n *state, s int, keys uint8) {
	c := &n.sc[s].c
	if m.rules.NoSecondLook {
		m.finish(n, s)
		return
	}
	c.at, c.todo, c.locked = againLock, keys, 0
}

// mustTell: step 4 failed, so the other sidecars must be told before the reply.
func (m *model) mustTell(n *state, s int) {
	c := &n.sc[s].c
	n.unlock(clientThread + int8(s))
	c.at, c.todo, c.locked = staleLock, c.dirty&^c.wait, 0
	if c.todo == 0 || m.rules.NoEntry || m.rules.TrustPaused {
		m.finish(n, s)
	}
}

// finish answers a write that is done, or begins it again.
func (m *model) finish(n *state, s int) {
	c := &n.sc[s].c
	marks := false
	for k := range maxKeys {
		marks = marks || c.wait&bit(k) != 0 && c.code[k] == marked
	}
	switch {
	case marks:
		n.unlock(clientThread + int8(s))
		m.clear(n, s)
		c.at = awaitRepair
	case c.wait != 0:
		m.restart(n, s)
	case m.rules.EntryAlways && c.entry != 0:
		m.tell(n, s, evAnswer, uint8(c.res))
		n.unlock(clientThread + int8(s))
		c.at = strikeOwn
	default:
		m.answers(n, s, c.res)
	}
}

// putBack undoes step 2 of keys whose rows are certain to be as they were.
func (m *model) putBack(st *state, s int) {
	op, c := m.present(st, s), &st.sc[s].c
	var back, up uint8
	for k := range maxKeys {
		switch {
		case op.keys&bit(k) == 0:
		case live(c.row[k]) && c.code[k] == done && m.keepsCopies(st, s):
			back |= bit(k)
		case c.code[k] != refused && c.code[k] != marked:
			up |= bit(k)
		}
	}
	go2 := func(n *state) {
		switch c := &n.sc[s].c; c.then {
		case lock2:
			m.withoutStore(n, s)
		case begin:
			m.restart(n, s)
		default:
			m.uncertain(n, s)
		}
	}
	tok := m.writerToken(st, s)
	switch {
	case c.void || back|up == 0 || c.at == giveUp && up == 0:
		n := *st
		go2(&n)
		m.emit(&n, s, "COMMIT failed: nothing to put back", "")
	case c.at == putBack && back != 0:
		m.send(st, s, script{kind: scriptPromote, keys: back, tok: tok, arg: c.row, exp: c.rex}, "COMMIT failed: puts the old value back", func(n *state, _ answer) {
			n.sc[s].c.at = giveUp
			if up == 0 {
				go2(n)
			}
		})
	default:
		m.send(st, s, script{kind: scriptAbsent, keys: up, tok: tok}, "COMMIT failed: gives the lease up", func(n *state, _ answer) { go2(n) })
	}
}

// writeOn: the fate of the COMMIT is unknown. What the keys were to hold goes into Redis, marked, under the lease.
func (m *model) writeOn(st *state, s int) {
	c := &st.sc[s].c
	if c.todo == 0 || c.void || !m.keepsCopies(st, s) {
		n := *st
		m.uncertain(&n, s)
		m.emit(&n, s, "COMMIT unknown: leaves it", "")
		return
	}
	before := *st
	ver := int8(m.index(st, s) + 1)
	p := script{kind: scriptWrite, keys: c.todo, num: c.num, ver: ver, tok: m.writerToken(st, s), arg: c.now, exp: c.nex, want: [maxKeys]int8{-1, -1}}
	m.keepMarks(&before, s, c.todo, ver)
	m.send(&before, s, p, "COMMIT unknown: writes on in Redis, marked", func(n *state, a answer) {
		c := &n.sc[s].c
		ours := uint8(0)
		for k := range maxKeys {
			if a.code[k] == done {
				ours |= bit(k)
			}
		}
		switch {
		case !a.ok:
			m.forgetMarks(n, s, c.todo, ver)
			m.uncertain(n, s)
		case ours == c.todo:
			m.leaveMarks(n, s, c.todo, ver)
			if c.todo == c.dirty && !m.cfg.BothStores {
				m.answers(n, s, c.res)
			} else {
				m.uncertain(n, s)
			}
		default:
			m.forgetMarks(n, s, c.todo, ver)
			c.todo = ours
		}
	})
}

func (m *model) keepMarks(n *state, s int, keys uint8, ver int8) {
	for k := range maxKeys {
		if keys&bit(k) != 0 {
			n.sc[s].mine[k] = mark{ver: ver}
		}
	}
}

func (m *model) leaveMarks(n *state, s int, keys uint8, ver int8) {
	for k := range maxKeys {
		if keys&bit(k) != 0 && n.sc[s].mine[k].ver == ver {
			n.sc[s].mine[k] = mark{ver: ver, left: true, young: true}
		}
	}
}

func (m *model) forgetMarks(n *state, s int, keys uint8, ver int8) {
	for k := range maxKeys {
		if keys&bit(k) != 0 && n.sc[s].mine[k].ver == ver {
			n.sc[s].mine[k] = mark{}
		}
	}
}
