package model

import (
	"fmt"
	"hash/maphash"
	"slices"
)

// Step is one step of a sidecar, or of what is around them (-1): its name, by the numbers of docs/consistency.md, and what it found.
type Step struct {
	Sidecar int
	Name    string
	Answer  string
}

func (s Step) String() string {
	who := "-"
	if s.Sidecar >= 0 {
		who = string(rune('A' + s.Sidecar))
	}
	if s.Answer == "" {
		return who + " " + s.Name
	}
	return fmt.Sprintf("%s %s: %s", who, s.Name, s.Answer)
}

// Replay tells whether the model of a world admits a trace of the sidecars' steps, in their order; what is around them may happen in between as
// often as the world's faults allow. It returns how many steps it could follow: all of them if it admits the trace.
func Replay(cfg Config, trace []Step) (followed int) {
	return follow(cfg, len(trace), func(i int, s Step) bool { return s == trace[i] }, func(s Step) bool { return s.Sidecar < 0 })
}

// Message is what a sidecar said to a store: a script by its name, "row" for a read of rows, "lock" for the locks, "COMMIT", or "GET" for a hit.
type Message struct {
	Sidecar int
	Name    string
	Answer  int // the code that the script answered (proxy/scripts.go); 0 if that is not known
}

// messages are the steps that each is.
var messages = map[string][]string{
	"GET":        {"miss 1: looks, and asks for the lease"},
	"grant":      {"miss 1: looks, and asks for the lease"},
	"row":        {"miss 2: reads the row", "miss 4: has waited in vain, reads the row", "reads the row, without Redis"},
	"promote":    {"miss 3: promotes"},
	"absent":     {"miss 3: no row"},
	"lock":       {"write 1: locks, draws a number, reads the rows", "overtake 1: locks, draws a number, reads the rows", "run 1: locks, draws a number, reads the rows", "miss 4: locks the key, for no row is believed without", "write 4: the lease was lost: locks again", "repair of a mark: locks"},
	"invalidate": {"write 2: invalidates, takes the lease", "write 4: invalidates again"},
	"COMMIT":     {"write 3: COMMIT", "overtake 4: the rows go, COMMIT", "run 2: adopts, COMMIT", "repair of a mark: the row, COMMIT"},
	"fill":       {"write 4: puts the value into Redis"},
	"read":       {"overtake 2: reads", "run 2: brings the number, watches the leases", "miss 4: looks under the lock", "repair of a mark: reads"},
	"write":      {"overtake 3: marks and writes"},
	"strike":     {"overtake 5: strikes the marks", "repair of a mark: strikes it"},
	"load":       {"EXEC 1: loads", "EXEC 1: loads where both journals name a key"},
	"capture":    {"run 3: loads, runs, captures", "EXEC 2: runs, captures"},
	"overtake":   {"run 3: loads, runs, captures", "EXEC 2: runs, captures"},
}

// ReplayMessages is Replay for what passed between the sidecars and the stores; steps without a message may come in between.
func ReplayMessages(cfg Config, trace []Message) (followed int) {
	spoken := map[string]bool{}
	for _, names := range messages {
		for _, n := range names {
			spoken[n] = true
		}
	}
	is := func(i int, s Step) bool {
		m := trace[i]
		return s.Sidecar == m.Sidecar && slices.Contains(messages[m.Name], s.Name) && (m.Answer == 0 || s.Answer == words(answer{code: [maxKeys]int8{int8(m.Answer)}}))
	}
	return follow(cfg, len(trace), is, func(s Step) bool { return s.Sidecar < 0 || !spoken[s.Name] })
}

// follow looks for a path of n steps, each of which is the next of a trace, with silent ones in between.
func follow(cfg Config, n int, is func(int, Step) bool, silent func(Step) bool) (followed int) {
	m, start := newModel(cfg)
	seed := maphash.MakeSeed()
	here := []state{start}
	for followed < n {
		seen := map[uint64]bool{}
		var next []state
		for len(here) > 0 { // grows by what is silent
			st := here[len(here)-1]
			here = here[:len(here)-1]
			m.successors(&st)
			for _, o := range m.out {
				h := maphash.Comparable(seed, o)
				if seen[h] {
					continue
				}
				switch {
				case is(followed, o.step):
					seen[h] = true
					next = append(next, o.st)
				case silent(o.step):
					seen[h] = true
					here = append(here, o.st)
				}
			}
		}
		if len(next) == 0 {
			return followed
		}
		here, followed = next, followed+1
	}
	return followed
}
