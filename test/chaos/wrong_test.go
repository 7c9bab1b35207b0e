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
	{"no tombstone", "cut from redis", []string{"phase1", "phase1"}, 0},
	{"no repair after a restart", "old redis", []string{"phase1", "phase1"}, 6 * time.Second},
	{"a write in Redis expects nothing", "cut from postgres", []string{"phase2", "phase2"}, 0},
}

// patienceWithWrong is how soon a program that breaks a rule must be found out.
const patienceWithWrong = time.Minute

// A checker that cannot fail proves nothing: programs that break a rule are found out by the runs that the right one passes.
func TestWrongVariants(t *testing.T) {
	program := testenv.Program(t, "wrong")
	for _, w := range wrongs {
		t.Run(w.rule, func(t *testing.T) {
			n := nemeses[slices.IndexFunc(nemeses, func(n nemesis) bool { return n.name == w.nemesis })]
			length := max(w.length, length)
			c := newCluster(t, options{program: program, wrong: w.rule}, w.phases...)
			began := time.Now()
			for seed := uint64(1); time.Since(began) < patienceWithWrong; seed++ {
				r := newRun(t, c, fleet{name: w.rule, phases: w.phases}, n, seed)
				r.unkept = true
				if o := r.judge(length); len(o.anomalies) > 0 {
					t.Logf("found out after %v: %s", time.Since(began).Round(time.Second), o.anomalies[0])
					return
				}
			}
			t.Errorf("not found out in %v", patienceWithWrong)
		})
	}
}
