package model

// environment breaks something, lets something late arrive, or lets time pass.
func (m *model) environment(st *state) {
	m.redisForgets(st)
	m.timePasses(st)
	for i, c := range st.socket {
		if c.kind != scriptNone {
			n := *st
			n.socket[i] = script{}
			m.execute(&n, c)
			m.emit(&n, -1, "a request that sat in a socket runs in redis", c.kind.String())
		}
	}
	if st.ghost.on {
		n := *st
		n.ghost = change{}
		m.apply(&n, st.ghost)
		n.unlock(ghostThread)
		m.emit(&n, -1, "a COMMIT that sat in a socket arrives", "")
		n = *st
		n.ghost = change{}
		n.unlock(ghostThread)
		m.emit(&n, -1, "postgres gives up waiting for a COMMIT and rolls back", "")
	}
	for s := range m.sidecars {
		sc := &st.sc[s]
		if st.left.crash > 0 && sc.alive && (sc.c.at != idle || sc.b.at != idle) {
			n := *st
			n.left.crash--
			m.crash(&n, s)
			m.emit(&n, s, "crashes", "")
		}
		if st.left.back > 0 && !sc.alive {
			n := *st
			n.left.back--
			n.sc[s].alive, n.sc[s].postgres = true, true
			n.sc[s].known = n.p.entries
			m.emit(&n, s, "starts again", "")
		}
	}
	if st.left.pgCrash > 0 {
		for _, forgets := range []bool{false, true} {
			if forgets && !m.cfg.Faults.Forgets {
				break
			}
			n := *st
			n.left.pgCrash--
			n.p.lock = [maxKeys]int8{}
			n.ghost = change{}
			if forgets {
				n.p.seq = 0
			}
			for s := range n.sc {
				n.sc[s].postgres = false
			}
			m.emit(&n, -1, "postgres crashes", map[bool]string{true: "it forgets the numbers that it has given"}[forgets])
		}
	}
}

// crash ends sidecar s: its transactions are rolled back, and what it knew is gone. Its command may have an effect or not.
func (m *model) crash(n *state, s int) {
	n.unlock(clientThread + int8(s))
	n.unlock(repairThread + int8(s))
	n.unlock(fenceThread + int8(s))
	sc := &n.sc[s]
	op := sc.c.op
	if sc.c.at != idle {
		op++
	}
	for i := range n.socket {
		if n.socket[i].kind != scriptNone && n.socket[i].owner == int8(s) {
			n.socket[i].owner = -1
		}
	}
	*sc = sidecar{phase: sc.phase, c: client{op: op}}
}

// redisForgets: eviction, restart, failover.
func (m *model) redisForgets(st *state) {
	for k := range maxKeys {
		if m.cfg.Faults.Evict && st.r.val[k] != 0 {
			n := *st
			n.set(k, 0, 0)
			m.excuseC(&n, k, 0, 0)
			m.emit(&n, -1, "redis evicts the key", "")
		}
		if st.left.journal > 0 && st.r.mark[k] != 0 {
			n := *st
			n.left.journal--
			n.r.mark, n.r.anchor = [maxKeys]int8{}, 0
			m.lostMarks(st, &n)
			m.emit(&n, -1, "redis evicts its journal", "")
		}
	}
	if st.left.restart > 0 {
		n := *st
		n.left.restart--
		n.r = redis{}
		m.otherRun(st, &n)
		m.emit(&n, -1, "redis restarts empty", "")
	}
	if st.left.failover > 0 {
		for i, back := range st.past {
			if back == st.r || i == 1 && back == st.past[0] {
				continue
			}
			n := *st
			n.left.failover--
			n.r = back
			m.otherRun(st, &n)
			m.emit(&n, -1, "redis fails over", []string{"its last write is lost", "its last two writes are lost"}[i])
		}
	}
}

// otherRun: every connection to Redis breaks, and what sat in their sockets is gone.
func (m *model) otherRun(st, n *state) {
	n.run++
	n.socket = [maxSockets]script{}
	if n.left.failover == 0 {
		n.past = [2]redis{}
	} else {
		n.past = [2]redis{n.r, n.r}
	}
	for s := range n.sc {
		if n.sc[s].trusted {
			n.sc[s].c.void, n.sc[s].b.void = true, true
		}
		n.sc[s].link, n.sc[s].trusted = false, false
	}
	m.lostMarks(st, n)
	for k := range maxKeys {
		m.excuseC(n, k, n.val(k), n.r.exp[k])
	}
}

// timePasses: leases lapse, keys expire, and the clock moves on.
func (m *model) timePasses(st *state) {
	for k := range maxKeys {
		tok := st.r.tok[k]
		if st.left.lapse > 0 && tok != free && (!m.committing(st, tok) || m.rules.CommitLate) {
			n := *st
			n.left.lapse--
			n.r.tok[k] = free
			m.emit(&n, -1, "a lease lapses", "")
		}
	}
	for moment := int8(1); moment <= first; moment++ {
		if st.over(moment) || m.moments>>uint(moment)&1 == 0 {
			continue
		}
		n := *st
		n.passed |= bit(int(moment))
		for k := range maxKeys {
			n.mon[k] = m.hist.step(n.mon[k], evPass, 0, uint8(moment))
		}
		m.emit(&n, -1, "a key's time is over", "")
	}
	if st.left.stamp > 0 && !m.storing(st) {
		n := *st
		n.left.stamp--
		n.time++
		m.emit(&n, -1, "time passes: more than the margin", "")
	}
}

// committing: the writer whose lease it is has not committed yet, or its COMMIT is on its way. It begins no COMMIT once the lease may
// have lapsed.
func (m *model) committing(st *state, tok int8) bool {
	if tok < writer {
		return false
	}
	if st.ghost.on {
		return true
	}
	for s := range m.sidecars {
		sc := &st.sc[s]
		if sc.alive && sc.c.at == commit && m.writerToken(st, s) == tok {
			return true
		}
	}
	return false
}

// storing: somebody's row is stored and not yet seen to in Redis. No such write lasts as long as the margin.
func (m *model) storing(st *state) bool {
	for s := range m.sidecars {
		switch st.sc[s].c.at {
		case fill, againLock, again, staleLock, staleCommit, writeOn, putBack, giveUp:
			return true
		}
	}
	return st.ghost.on
}

var scriptWords = [...]string{"", "GET", "grant", "promote", "absent", "invalidate", "fill", "read", "write", "strike", "repair", "poll", "mark", "run", "load", "EXEC", "command", "flush"}

func (c scriptKind) String() string { return scriptWords[c] }
