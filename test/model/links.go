package model

// send sends a script to Redis on a connection of sidecar s. A connection may break before the script has run, after that, or leave it
// in the socket of a Redis that is paused, to run at some later time. A sidecar that gets no answer loses trust in Redis.
func (m *model) send(st *state, s int, c script, what string, then func(n *state, a answer)) {
	c.owner = int8(s)
	if !st.sc[s].link {
		n := *st
		then(&n, answer{})
		m.emit(&n, s, what, "redis cannot be reached")
		return
	}
	n := *st
	a := m.execute(&n, c)
	then(&n, a)
	m.emit(&n, s, what, words(a))
	room := -1
	for i := range st.socket {
		if st.socket[i].kind == scriptNone {
			room = i
			break
		}
	}
	if st.left.redisLink > 0 {
		lose := func(answered string, ran, inSocket bool) {
			n := *st
			n.left.redisLink--
			if ran {
				m.execute(&n, c)
			}
			if inSocket {
				n.socket[room] = c
			}
			m.lose(&n, s)
			then(&n, answer{})
			m.emit(&n, s, what, answered)
		}
		lose("the connection to redis breaks before it", false, false)
		if !c.kind.reads() {
			lose("the connection to redis breaks after it", true, false)
			if room >= 0 {
				lose("no answer in time: it sits in the socket", false, true)
			}
		}
	}
	if st.left.crash > 0 && room >= 0 && !c.kind.reads() {
		n := *st
		n.left.crash--
		m.crash(&n, s)
		c.owner = -1
		n.socket[room] = c
		m.emit(&n, s, what, "the sidecar crashes; it sits in the socket")
	}
}

// lose: sidecar s does not trust Redis any more.
func (m *model) lose(n *state, s int) {
	sc := &n.sc[s]
	if m.rules.TrustPaused {
		return
	}
	if sc.trusted {
		sc.c.void, sc.b.void = true, true
	}
	sc.link, sc.trusted = false, false
}

// words tells a trace what a script has answered.
func words(a answer) string {
	var list = [...]string{done: "done", marked: "marked", granted: "granted", held: "held by another", leaseLost: "the lease was lost",
		6: "no string", value: "a value", absentNow: "known to be absent", refused: "refused", changed: "changed"}
	for k := range maxKeys {
		if a.code[k] != 0 && a.code[k] != done {
			return list[a.code[k]]
		}
	}
	return ""
}
