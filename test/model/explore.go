package model

import (
	"fmt"
	"hash/maphash"
	"strings"
)

// Result is what an exploration has found.
type Result struct {
	Config Config
	States int
	Whole  bool   // every state was seen
	Wrong  string // what must not be seen, and can be; "" if there is nothing
	Trace  []Line // the shortest way there
}

// Line is one step of a trace, and what the stores hold after it.
type Line struct {
	Step
	State string
}

func (r Result) String() string {
	var b strings.Builder
	c := r.Config
	fmt.Fprintf(&b, "%v %q redis %d store %d: ", c.Phases, c.Programs, c.Redis, c.Store)
	if r.Wrong == "" {
		fmt.Fprintf(&b, "holds, %d states", r.States)
		if !r.Whole {
			b.WriteString(", not all of them")
		}
		return b.String()
	}
	fmt.Fprintf(&b, "%s\n", r.Wrong)
	for i, l := range r.Trace {
		fmt.Fprintf(&b, "%3d %-58s %s\n", i+1, l.Step, l.State)
	}
	return b.String()
}

// origin is how a state was reached: from which, by which of its successors.
type origin struct {
	from int32
	step int16
}

// Explore goes through all states of a world, breadth first, so that what it finds is a shortest way to what is wrong. Of the states that it
// has seen it keeps a hash of 64 bits: of ten million, two share one with a probability of one in three hundred thousand.
func Explore(cfg Config) Result {
	m, start := newModel(cfg)
	start.renumber(true)
	seed := maphash.MakeSeed()
	seen := map[uint64]struct{}{maphash.Comparable(seed, start): {}}
	origins := []origin{{from: -1}}
	level, next := []state{start}, []state(nil)
	res := Result{Config: cfg, Whole: true}
	for at := int32(0); len(level) > 0; {
		for i := range level {
			if why := m.wrong(&level[i]); why != "" {
				res.Wrong, res.States = why, len(origins)
				res.Trace = m.trace(start, origins, at)
				return res
			}
			m.successors(&level[i])
			for j := range m.out {
				h := maphash.Comparable(seed, m.out[j].st)
				if _, ok := seen[h]; ok {
					continue
				}
				seen[h] = struct{}{}
				next = append(next, m.out[j].st)
				origins = append(origins, origin{at, int16(j)}) //nolint:gosec // a state has some dozens of successors
			}
			at++
			if cfg.Limit > 0 && len(origins) > cfg.Limit {
				res.States, res.Whole = len(origins), false
				return res
			}
		}
		level, next = next, level[:0]
	}
	res.States = len(origins)
	res.Whole = !m.full
	return res
}

// successors fills out with every step that can be taken in st.
func (m *model) successors(st *state) {
	m.out = m.out[:0]
	for s := range m.sidecars {
		m.client(st, s)
		m.work(st, s)
	}
	m.environment(st)
}

// trace repeats the way to a state.
func (m *model) trace(start state, origins []origin, at int32) []Line {
	var way []int16
	for ; origins[at].from >= 0; at = origins[at].from {
		way = append(way, origins[at].step)
	}
	var lines []Line
	st := start
	for i := len(way) - 1; i >= 0; i-- {
		m.successors(&st)
		o := m.out[way[i]]
		st = o.st
		lines = append(lines, Line{o.step, m.describe(&st)})
	}
	return lines
}

// describe tells what both stores hold of the keys in use.
func (m *model) describe(st *state) string {
	var b strings.Builder
	for k := range maxKeys {
		if m.keys&bit(k) == 0 {
			continue
		}
		fmt.Fprintf(&b, "redis %s", worth(st.val(k)))
		if st.r.tok[k] != 0 || st.r.num[k] != 0 {
			fmt.Fprintf(&b, " lease %d:%s", st.r.num[k], token(st.r.tok[k]))
		}
		if st.r.mark[k] != 0 {
			fmt.Fprintf(&b, " mark %d", st.r.mark[k])
		}
		fmt.Fprintf(&b, ", row %s", worth(m.row(st, k)))
		if st.p.lock[k] != 0 {
			b.WriteString(" locked")
		}
		if st.named(st.p.entries)&bit(k) != 0 {
			b.WriteString(" entry")
		}
		b.WriteString("; ")
	}
	return strings.TrimSuffix(b.String(), "; ")
}

func worth(v int8) string {
	switch v {
	case 0:
		return "-"
	case tomb:
		return "tombstone"
	}
	return fmt.Sprintf("v%d", v)
}

func token(t int8) string {
	switch {
	case t == free:
		return ""
	case t == negative:
		return "n"
	case t == overtake:
		return "o"
	case isReader(t):
		return fmt.Sprintf("r%d", t-reader+1)
	}
	return fmt.Sprintf("w%d", t-writer+1)
}
