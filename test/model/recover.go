package model

// recovers is attempt of proxy/upstream.go and verify of proxy/engine.go: Redis's copies are made right before they are trusted.
func (m *model) recovers(st *state, s int) {
	b := &st.sc[s].b
	me := repairThread + int8(s)
	switch b.at {
	case idle:
		m.connects(st, s)
	case recoverWindow:
		m.ask(st, s, 0, "recovery: lists what the store has changed since the clock", func(n *state, f fate) {
			b := &n.sc[s].b
			if f != good {
				m.giveUpRecovery(n, s)
				return
			}
			since := b.val[1]
			for k := range maxKeys {
				if n.p.row[k] != 0 && n.p.changed[k] >= since {
					b.keys |= bit(k)
				}
			}
			b.at = recoverLock
			if b.keys == 0 {
				b.at = recoverPoll
			}
		})
	case recoverLock:
		m.locks(st, s, me, b.keys, &b.locked, "recovery: locks them", func(n *state, f fate, num int8) {
			b := &n.sc[s].b
			if f != good {
				m.giveUpRecovery(n, s)
				return
			}
			for k := range maxKeys {
				if m.row(n, k) == 0 {
					b.keys &^= bit(k)
				}
			}
			if !serves(n.sc[s].phase) && b.keys != 0 { // for those to delete who read the store
				b.keys, n.sc[s].part = 0, n.run
			}
			b.num, b.at = num, recoverDelete
			if b.keys == 0 {
				n.unlock(me)
				b.at = recoverPoll
			}
		})
	case recoverDelete:
		m.send(st, s, script{kind: scriptRepair, keys: b.keys, num: b.num}, "recovery: deletes them in redis", func(n *state, a answer) {
			m.lift(n, a)
			if !a.ok || a.code[0] == refused || a.code[1] == refused {
				m.giveUpRecovery(n, s)
				return
			}
			n.unlock(me)
			n.sc[s].b.keys, n.sc[s].b.at = 0, recoverPoll
		})
	case recoverPoll:
		m.send(st, s, m.pollScript(st, s, b.ids != 0), "recovery: reads the journal in redis, sets the clock", func(n *state, a answer) {
			if !a.ok {
				m.giveUpRecovery(n, s)
				return
			}
			restarted := n.sc[s].b.val[0] == 1
			n.sc[s].b = worker{}
			m.pollRedis(n, s, restarted)
			if n.sc[s].b.at == idle {
				m.trusts(n, s)
			}
		})
	case putMarks:
		m.send(st, s, script{kind: scriptMark, keys: b.keys, arg: b.ver}, "poll: puts marks back that redis lost", func(n *state, a answer) {
			m.rest(n, s)
			if a.ok {
				m.trusts(n, s)
			}
		})
	}
}

func (m *model) trusts(n *state, s int) {
	if sc := &n.sc[s]; sc.link {
		sc.trusted = true
	}
}

func (m *model) giveUpRecovery(n *state, s int) {
	m.rest(n, s)
	n.sc[s].link = false
}

// kill ends what sidecar s has given up and may still sit in a socket.
func (m *model) kill(n *state, s int) {
	if m.rules.NoKill {
		return
	}
	for i := range n.socket {
		if n.socket[i].kind != scriptNone && n.socket[i].owner == int8(s) {
			n.socket[i] = script{}
		}
	}
}

// connects is the beginning of an attempt: the old connections are killed, the journal in Postgres is read, and the clock in Redis.
func (m *model) connects(st *state, s int) {
	n := *st
	sc := &n.sc[s]
	sc.link = true
	m.kill(&n, s)
	if sc.postgres {
		m.pollStore(&n, s)
		sc.b.ids = 1
	}
	sc.b.at = recoverPoll
	if n.r.dataSet != n.run && sc.part != n.run {
		sc.b.val[0] = 1
		empty := n.r == redis{}
		switch {
		case !sc.postgres && !empty:
			return // nobody can tell what its data lacks
		case !empty && !m.rules.NoWindow:
			sc.b.at, sc.b.val[1] = recoverWindow, n.r.clock
		}
		if m.rules.ClockAtOnce {
			m.execute(&n, m.pollScript(&n, s, sc.postgres))
		}
	}
	m.emit(&n, s, "recovery: connects, reads the journal in postgres and the clock in redis", "")
}
