package model

import "cacheproxy/policy"

// fence is FLUSHALL (flush of proxy/engine.go), and one step back of a phase (enter of proxy/phases.go). Both make the rows of the store
// dead while nobody writes.
func (m *model) fence(st *state, s int) {
	op := m.present(st, s)
	me := fenceThread + int8(s)
	c := &st.sc[s].c
	switch c.at {
	case fenceLock:
		if op.kind == opBack && (m.rules.NoFence || !m.readsAgain(st, s)) {
			n := *st
			m.stepBack(&n, s)
			m.emit(&n, s, "goes one phase back", "without a fence")
			return
		}
		if op.kind == opFlush && m.rules.FlushUnfenced {
			n := *st
			n.sc[s].c.at = fenceFlush
			m.emit(&n, s, "fence 1: locks nothing", "")
			return
		}
		if st.sc[s].postgres && st.p.lock != [maxKeys]int8{} {
			return
		}
		m.ask(st, s, me, "fence 1: waits until nobody writes", func(n *state, f fate) {
			if f != good {
				m.refuses(n, s)
				return
			}
			n.p.lock = [maxKeys]int8{me, me}
			n.sc[s].c.at = fenceCommit
			if op.kind == opFlush {
				n.sc[s].c.at = fenceFlush
			}
		})
	case fenceFlush:
		m.send(st, s, script{kind: scriptFlush, keys: op.keys}, "fence 2: empties Redis, and closes it to promotions", func(n *state, a answer) {
			c := &n.sc[s].c
			c.lost = !a.ok
			c.at = fenceCommit
			if !a.ok && !st.sc[s].link {
				n.unlock(me)
				m.refuses(n, s)
			}
		})
	case fenceCommit:
		dead := change{keys: bit(0) | bit(1)}
		m.commits(st, s, me, dead, "fence 3: the rows are dead, COMMIT", func(n *state, f fate, _ uint8) {
			sc := &n.sc[s]
			switch {
			case op.kind == opBack && f == good:
				m.stepBack(n, s)
			case op.kind == opBack:
				m.next(n, s)
			case f != good || sc.c.lost:
				m.uncertain(n, s)
			default:
				n.unlock(me)
				sc.c.at = fenceOpen
			}
		})
	case fenceOpen: // if it fails, time opens it
		m.send(st, s, script{kind: scriptOpen, keys: op.keys}, "fence 4: opens Redis to promotions", func(n *state, _ answer) { m.flushed(n, s) })
	}
}

// flushed: Redis's journal is empty by command.
func (m *model) flushed(n *state, s int) {
	sc := &n.sc[s]
	n.unlock(fenceThread + int8(s))
	sc.marks, sc.seen, sc.mine = [maxKeys]int8{}, [maxKeys]int8{}, [maxKeys]mark{}
	m.answers(n, s, 0)
}

// readsAgain: the step back is from a phase that does not read the store to one that does.
func (m *model) readsAgain(st *state, s int) bool {
	p := st.sc[s].phase
	return !serves(p) && p > 0 && serves(p-1)
}

func (m *model) stepBack(n *state, s int) {
	if n.sc[s].phase > policy.Phase0 {
		n.sc[s].phase--
	}
	m.next(n, s)
}
