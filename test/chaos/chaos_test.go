// Package chaos runs several real sidecars before a real Redis and a real Postgres, does harm to all of them, and judges what clients were told: of each key
// there must be an order of the commands, each between its call and its answer, in which Redis would have given these answers.
//
// chaos_test.go has the runs and their report, traffic_test.go what clients do, nemesis_test.go the harm, model_test.go what is judged by, and
// cluster_test.go the servers.
package chaos

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"cacheproxy/internal/testenv"

	"github.com/anishathalye/porcupine"
)

func TestMain(m *testing.M) { testenv.Main(m) }

// fleets are the phases that sidecars have beside each other.
var fleets = [][]string{
	{"phase0", "phase0"}, {"phase0", "phase1"}, {"phase1", "phase1", "phase1"}, {"phase1", "phase2"}, {"phase2", "phase2"}, {"phase2", "drain"}, {"drain", "drain"},
}

// unseen is how old a read may be under exception (a) of P3: journal.poll is 500 ms, and it takes as long as redis.timeout, 250 ms, to notice an outage.
const unseen = 1600 * time.Millisecond

const clients = 12

// run is one fleet under one nemesis.
type run struct {
	traffic
	nemesis
	redisAlone bool // what was written last may be in Redis alone
	faults     atomic.Int64
}

// outcome is a line of the report.
type outcome struct {
	fleet, nemesis                     string
	commands, refused, unknown, faults int64
	keys                               int
	stale                              time.Duration // the longest that a read was behind
	excepted                           int           // keys that exception (a) explains
	repaired                           time.Duration // the longest a journal took to become empty
}

// TestChaos takes CHAOS, how long all of it is to last, and CHAOS_SEED. Without them it is a minute with a seed of its own.
func TestChaos(t *testing.T) {
	length := 56 * time.Second
	if v := os.Getenv("CHAOS"); v != "" {
		d, err := time.ParseDuration(v)
		if err != nil {
			t.Fatalf("CHAOS: %v", err)
		}
		length = d
	}
	seed := uint64(time.Now().UnixNano())
	if v := os.Getenv("CHAOS_SEED"); v != "" {
		n, err := strconv.ParseUint(v, 10, 64)
		if err != nil {
			t.Fatalf("CHAOS_SEED: %v", err)
		}
		seed = n
	}
	each := length / time.Duration(len(fleets)*len(nemeses))
	var all []outcome
	for _, fleet := range fleets {
		for _, n := range nemeses {
			name := strings.Join(slices.Compact(slices.Clone(fleet)), "+")
			t.Run(name+"/"+n.name, func(t *testing.T) {
				o := chaos(t, fleet, n, each, seed)
				o.fleet, o.nemesis = name, n.name
				all = append(all, o)
			})
		}
	}
	t.Log("\n" + report(all))
}

func chaos(t *testing.T, fleet []string, n nemesis, length time.Duration, seed uint64) (o outcome) {
	r := &run{nemesis: n, redisAlone: slices.ContainsFunc(fleet, func(p string) bool { return p == "phase2" || p == "drain" })}
	r.traffic = traffic{c: newCluster(t, fleet), seed: seed, began: time.Now(), stop: make(chan struct{})}
	var wg sync.WaitGroup
	for i := range clients {
		wg.Go(func() { r.run(i + 1) })
	}
	wg.Go(func() { n.do(r, rand.New(rand.NewPCG(seed, 1000))) })
	time.Sleep(length)
	close(r.stop)
	wg.Wait()
	r.c.ready()
	o.repaired = r.c.journals()
	r.last()
	o.commands, o.refused, o.unknown, o.faults, o.keys = r.commands.Load(), r.refused.Load(), r.unknown.Load(), r.faults.Load(), len(r.keys)
	most := time.Duration(0)
	if n.unseen {
		most = unseen
	}
	for _, k := range r.keys {
		v := check(k.ops, most)
		switch {
		case v.result != porcupine.Ok:
			t.Errorf("%s: %s; CHAOS_SEED=%d, the history is in %s", k.name, v.result, seed, keep(t, k, seed))
		case v.slack > 0:
			o.excepted++
			o.stale = max(o.stale, v.slack)
		}
	}
	if t.Failed() {
		r.reasons.Range(func(what, n any) bool {
			t.Logf("%6d times %s", n.(*atomic.Int64).Load(), what)
			return true
		})
	}
	return o
}

// last reads what is left through every sidecar, when all is well again.
func (r *run) last() {
	for _, s := range r.c.sidecars {
		c := client(s.addr)
		for _, k := range r.keys {
			call := r.now()
			said, err := c.Do(r.c.t.Context(), "GET", k.name).Text()
			if err != nil && err.Error() != "redis: nil" {
				r.c.t.Errorf("%s, when all is well again: %v", k.name, err)
				continue
			}
			if err != nil {
				said = "(nil)"
			}
			k.note(porcupine.Operation{ClientId: clients + 1, Input: input{verb: get}, Call: call, Output: output{true, said}, Return: r.now()})
		}
		c.Close()
	}
}

// keep writes a history that was judged wrong, as JSON and as a page to look at, and returns where.
func keep(t *testing.T, k *key, seed uint64) string {
	t.Helper()
	type line struct {
		Client   int
		From, To float64 // ms
		Did, Got string
	}
	var lines []line
	for _, op := range k.ops {
		got := "?"
		if o := op.Output.(output); o.known {
			got = o.text
		}
		to := float64(op.Return) / 1e6
		if op.Return == never {
			to = -1
		}
		lines = append(lines, line{op.ClientId, float64(op.Call) / 1e6, to, fmt.Sprint(op.Input.(input), " ", op.Input.(input).arg), got})
	}
	b, err := json.MarshalIndent(lines, "", " ")
	if err != nil {
		t.Fatal(err)
	}
	dir := "failures"
	file := filepath.Join(dir, fmt.Sprintf("%s-%d-%s.json", strings.ReplaceAll(strings.ReplaceAll(t.Name(), "/", "-"), " ", "_"), seed, k.name))
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, b, 0o644); err != nil {
		t.Fatal(err)
	}
	_, info := porcupine.CheckOperationsVerbose(model, k.ops, checkTime)
	if err := porcupine.VisualizePath(model, info, strings.TrimSuffix(file, "json")+"html"); err != nil {
		t.Log(err)
	}
	return file
}

// report is what was done and found.
func report(all []outcome) string {
	var b strings.Builder
	var sum outcome
	fmt.Fprintf(&b, "%-14s %-18s %8s %8s %8s %7s %6s %9s %9s %9s\n", "fleet", "nemesis", "commands", "refused", "unknown", "faults", "keys", "excepted", "stale ≤", "repaired")
	for _, o := range all {
		fmt.Fprintf(&b, "%-14s %-18s %8d %8d %8d %7d %6d %9d %9v %9v\n", o.fleet, o.nemesis, o.commands, o.refused, o.unknown, o.faults, o.keys, o.excepted, o.stale, o.repaired.Round(time.Millisecond))
		sum.commands += o.commands
		sum.refused += o.refused
		sum.unknown += o.unknown
		sum.faults += o.faults
		sum.keys += o.keys
		sum.excepted += o.excepted
	}
	if sum.commands > 0 {
		fmt.Fprintf(&b, "%d commands, %.1f %% with a definite outcome, %d faults, %d keys judged, %d of them by exception (a) of P3\n",
			sum.commands, 100*float64(sum.commands-sum.unknown-sum.refused)/float64(sum.commands), sum.faults, sum.keys, sum.excepted)
	}
	return b.String()
}
