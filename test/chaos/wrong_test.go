package chaos

import (
	"slices"
	"testing"
	"time"

	"cacheproxy/internal/testenv"
)

// wrongs are rules of the protocols, each with a fleet and a nemesis that need it. What only reads that are late would show must last longer than they may be late.
var wrongs = []struct {
	rule, nemesis string
	phases        []string
	length        time.Duration // 0: as ever
}{
	{"promotion with NX only", "evict", []string{"phase1", "phase1"}, 0},
	{"phase2 without invalidation", "evict", []string{"phase1", "phase2"}, 0},
	{"Redis before the commit", "kill a sidecar", []string{"phase1", "phase1"}, 0},
	{"trust in a paused Redis", "pause redis", []string{"phase1", "phase1"}, 6 * time.Second},
	{"trust before recovery", "old redis", []string{"phase1", "phase1"}, 6 * time.Second},
	{"no tombstone", "cut from redis", []string{"phase1", "phase1"}, 0},
	{"no repair after a restart", "old redis", []string{"phase1", "phase1"}, 6 * time.Second},
	{"a write in Redis expects nothing", "cut from postgres", []string{"phase2", "phase2"}, 0},
}

// A program that breaks a rule must be found out within a minute, or in as many commands as a machine does in one that is busy with nothing else.
const (
	patienceWithWrong = time.Minute
	commandsWithWrong = 100_000
)

// A checker that cannot fail proves nothing: programs that break a rule are found out by the runs that the right one passes, and by this alone that no order of the
// commands explains what clients were told. A history that is not finished in time, or a key that ends late, is none of the rule's doing.
func TestWrongVariants(t *testing.T) {
	program := testenv.Program(t, "wrong")
	for _, w := range wrongs {
		t.Run(w.rule, func(t *testing.T) {
			n := nemeses[slices.IndexFunc(nemeses, func(n nemesis) bool { return n.name == w.nemesis })]
			length := max(w.length, length)
			c := newCluster(t, options{program: program, wrong: w.rule}, w.phases...)
			began := time.Now()
			var sum outcome
			for seed := uint64(1); sum.illegal == 0; seed++ {
				r := newRun(t, c, fleet{name: w.rule, phases: w.phases}, n, seed)
				r.unkept = true
				sum.add(r.judge(length))
				if time.Since(began) > patienceWithWrong && sum.commands > commandsWithWrong {
					t.Fatalf("not found out in %v and %d commands, or only then; other anomalies: %q", time.Since(began).Round(time.Second), sum.commands, sum.anomalies)
				}
			}
			t.Logf("found out after %v and %d commands: %q", time.Since(began).Round(time.Second), sum.commands, sum.anomalies)
		})
	}
}
