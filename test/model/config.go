package model

import "cacheproxy/policy"

// Config is one world to explore: who serves in which phase, what they are asked, and what may go wrong.
type Config struct {
	Phases   []policy.Phase // of the sidecars
	Programs []string       // of their clients: letters as in history.go
	Redis    int8           // what the first key holds there in the beginning: 0 or First
	Store    int8           // the same of the store
	Second   bool           // the second key begins as the first; else it is absent in both
	Marked   bool           // Redis's journal marks the first key, whose writer is gone
	Apart    bool           // the first sidecar does not trust Redis yet
	Mortal   bool           // they end, at some time
	Holds    int8           // what it held in the eyes of clients; only if it is Unlike the two
	Unlike   bool
	Faults   Faults

	Negative   bool // "absent in both" is remembered
	BothStores bool // write_policy both
	Letter     bool // reads are judged by the letter of P3: none is older than what was acknowledged before it began, but they need no common order

	Rules Rules
	Limit int // of states, 0: none
}

// First is the value that keys have in the beginning.
const First = first

// Faults is how often each thing may go wrong.
type Faults struct {
	Evict     bool // at any time
	Crash     int8 // of a sidecar
	Back      int8 // of one that has crashed, as a new process
	RedisLink int8 // a connection of a sidecar to Redis
	PgLink    int8 // a connection of a sidecar to Postgres
	Lapse     int8 // of a lease
	Restart   int8 // of Redis, which comes back empty
	Failover  int8 // of Redis, which loses its last write or its last two
	Journal   int8 // Redis evicts its journal
	PgCrash   int8 // of Postgres
	Forgets   bool // and then it may forget the numbers that it has given
	Hours     int8 // so much time passes that the clock in Redis moves on
}

// model explores one Config.
type model struct {
	cfg      Config
	rules    Rules
	hist     *history
	base     [maxSidecars]int // of its commands among all
	sidecars int
	keys     uint8 // that are in use
	moments  uint8 // at which something ends
	weak     bool  // some sidecar is in a phase whose writes only Redis holds
	drain    bool  // some sidecar uses the store and does not read it
	full     bool  // a bound of the model was reached
	out      []successor
}

// successor is a state after a step.
type successor struct {
	st   state
	step Step
}

// emit adds a successor, after what exceptions allow in it.
func (m *model) emit(n *state, s int, what, answer string) {
	m.bothNamed(n)
	m.doubts(n)
	m.drains(n)
	m.sees(n)
	n.renumber(n.left.failover > 0)
	m.out = append(m.out, successor{*n, Step{Sidecar: s, Name: what, Answer: answer}})
}

func newModel(cfg Config) (*model, state) {
	m := &model{cfg: cfg, rules: cfg.Rules, sidecars: len(cfg.Phases)}
	var ops [maxOps]operation
	n := 0
	for s, program := range cfg.Programs {
		m.base[s] = n
		for i := range len(program) {
			ops[n] = newOperation(program[i])
			m.keys |= ops[n].keys
			if k := ops[n].kind; k == opSetTTL || k == opExpire {
				m.moments |= bit(n + 1)
			}
			n++
		}
	}
	m.keys |= bit(0)
	for _, p := range cfg.Phases {
		r := p.Rules()
		m.weak = m.weak || !r.Write.KeepsRow()
		m.drain = m.drain || r.UsesStore && !r.ReadsStore && !cfg.Unlike
	}
	end := int8(0)
	if cfg.Mortal {
		end = first
		m.moments |= bit(int(first))
	}
	holds := max(cfg.Redis, cfg.Store, 0)
	if cfg.Marked {
		holds = cfg.Redis
	}
	if cfg.Unlike {
		holds = cfg.Holds
	}
	st := state{run: 1, anchor: 1, time: 1, r: redis{anchor: 1, clock: 1, dataSet: 1}}
	var start, none int32
	m.hist, start = newHistory(ops, holds, end*min(holds, 1))
	none = m.hist.intern([]uint64{0})
	st.mon = [maxKeys]int32{start, none}
	if cfg.Second {
		st.mon[1] = start
	}
	for k := range maxKeys {
		if k > 0 && !cfg.Second {
			continue
		}
		st.set(k, cfg.Redis, end)
		st.p.row[k] = cfg.Store
		if cfg.Store > 0 {
			st.p.exp[k] = end
		}
	}
	if cfg.Marked {
		st.r.mark[0] = first
	}
	for s, p := range cfg.Phases {
		st.sc[s] = sidecar{alive: true, phase: p, link: true, trusted: true, postgres: true, anchor: 1}
	}
	if cfg.Apart {
		st.sc[0].link, st.sc[0].trusted = false, false
	}
	f := cfg.Faults
	st.left = budget{crash: f.Crash, back: f.Back, redisLink: f.RedisLink, pgLink: f.PgLink, lapse: f.Lapse, restart: f.Restart,
		failover: f.Failover, journal: f.Journal, pgCrash: f.PgCrash, stamp: f.Hours}
	if f.Failover > 0 {
		st.past = [2]redis{st.r, st.r}
	}
	return m, st
}
