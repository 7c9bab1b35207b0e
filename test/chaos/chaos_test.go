// Package chaos runs several real sidecars before a real Redis and a real Postgres, does harm to all of them, and judges what clients were told: of each key
// there must be an order of the commands, each between its call and its answer, in which Redis would have given these answers.
//
// chaos_test.go has the runs and their report, traffic_test.go what clients do, lives_test.go the keys that end, nemesis_test.go the harm, model_test.go what is
// judged by (model_check_test.go tries that), rerun_test.go how a run is repeated, and cluster_test.go the servers.
//
// Beside the histories stand: steps_test.go, a sidecar dies at each message of each protocol; traces_test.go, what sidecars say is what the model of the protocols
// says; outage_test.go, the death and the failover of Redis under many clients; and wrong_test.go, programs that break a rule are found out.
package chaos

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"cacheproxy/internal/testenv"

	"github.com/anishathalye/porcupine"
	"github.com/redis/go-redis/v9"
)

func TestMain(m *testing.M) {
	if d, err := chaosLength(); err == nil && d > 0 {
		time.AfterFunc(d+besides, func() {
			debug.SetTraceback("all")
			panic(fmt.Sprintf("not finished %v after the %v of CHAOS", besides, d))
		})
	}
	testenv.Main(m)
}

// besides is what everything but the histories may take: some four minutes, on a machine that is several times slower.
const besides = 30 * time.Minute

// chaosLength is what CHAOS says, 0 without it.
func chaosLength() (time.Duration, error) {
	v := os.Getenv("CHAOS")
	if v == "" {
		return 0, nil
	}
	d, err := time.ParseDuration(v)
	if err != nil {
		return 0, fmt.Errorf("CHAOS: %w", err)
	}
	return d, nil
}

// fleets are the phases that sidecars have beside each other: each, and each two adjacent ones.
var fleets = []fleet{
	{name: "phase0", phases: []string{"phase0", "phase0"}}, {name: "phase0+phase1", phases: []string{"phase0", "phase1"}}, {name: "phase1", phases: []string{"phase1", "phase1", "phase1"}},
	{name: strict, phases: []string{"phase1", "phase1"}, policy: "both"},
	{name: "phase1+phase2", phases: []string{"phase1", "phase2"}}, {name: "phase2", phases: []string{"phase2", "phase2"}}, {name: "phase2+drain", phases: []string{"phase2", "drain"}},
	{name: "drain", phases: []string{"drain", "drain"}}, {name: "drain+phase3", phases: []string{"drain", "phase3"}}, {name: "phase3", phases: []string{"phase3", "phase3"}},
	{name: "column, phase0+phase1", phases: []string{"phase0", "phase1"}, column: true}, {name: "column, phase1", phases: []string{"phase1", "phase1"}, column: true},
	{name: "column, phase1+phase2", phases: []string{"phase1", "phase2"}, column: true},
}

// strict is the fleet that acknowledges only what both stores have, so that no exception is for it: nothing is late, miscounted or lost.
const strict = "phase1, both"

// travellers go through all phases.
var travellers = fleet{name: "phases", phases: []string{"phase0", "phase0", "phase0"}}

type fleet struct {
	name   string
	phases []string
	policy string // write_policy; "": the default
	column bool   // the values stand in a column of the application's
}

// options are those of its sidecars. On the way through the phases no store fails, and a busy machine must not look as if one did.
func (f fleet) options(program string) options {
	return options{program: program, policy: f.policy, column: f.column, patient: f.name == travellers.name}
}

func (f fleet) has(phase string) bool { return slices.Contains(f.phases, phase) }

// redisAlone: what was written last may be in Redis alone.
func (f fleet) redisAlone() bool { return f.has("phase2") || f.has("drain") || f.has("phase3") }

// What the sidecars are configured with.
const (
	journalPoll = 500 * ms
	redisWait   = 250 * ms
	redisDial   = 500 * ms
	storeWait   = 2 * time.Second
	patientWait = 20 * time.Second
)

// unseen is how old a read may be under exceptions (a) and (b) of P3: a sidecar looks into the journals so often, and it takes so long to notice that a
// connection, or a new one, leads nowhere.
const unseen = journalPoll + redisWait + redisDial

const clients = 12

// run is one fleet under one nemesis, for a while.
type run struct {
	traffic
	fleet
	nemesis
	redisAlone bool          // what was written last may be in Redis alone
	unkept     bool          // a history that fails is not kept, for it is meant to
	most       time.Duration // how long a write may be missed by reads: 0 but where exception (a) or (b) of P3 says so
	faults     atomic.Int64
}

// outcome is what a run, or all runs of one fleet and nemesis, found.
type outcome struct {
	runs                                       int
	commands, unsent, refused, unknown, faults int64
	keys                                       int
	lives                                      int           // reads of keys with a TTL
	stale                                      time.Duration // the longest that a read was behind
	excepted                                   int           // keys that only exceptions (a) and (b) explain
	repaired                                   time.Duration // the longest a journal took to become empty when all was well again
	unrepaired                                 time.Duration // the longest that a key stood in a journal, as the sidecars tell that repaired it
	illegal                                    int           // keys whose history has no explanation
	anomalies                                  []string
	reasons                                    []string
}

func (o *outcome) add(n outcome) {
	o.runs += n.runs
	o.commands += n.commands
	o.unsent += n.unsent
	o.refused += n.refused
	o.unknown += n.unknown
	o.faults += n.faults
	o.keys += n.keys
	o.lives += n.lives
	o.stale = max(o.stale, n.stale)
	o.excepted += n.excepted
	o.repaired = max(o.repaired, n.repaired)
	o.unrepaired = max(o.unrepaired, n.unrepaired)
	o.illegal += n.illegal
	o.anomalies = append(o.anomalies, n.anomalies...)
}

// done are the commands that were neither refused nor have an unknown outcome.
func (o *outcome) done() int64 { return o.commands - o.refused - o.unknown }

// cell is a line of the report.
type cell struct{ fleet, nemesis string }

// rerun names one run: CHAOS_RUN takes what its String is.
type rerun struct {
	fleet, nemesis string
	seed           uint64
}

func (r rerun) String() string { return fmt.Sprintf("%s/%s/%d", r.fleet, r.nemesis, r.seed) }

// parseRerun finds the fleet and the nemesis that s names.
func parseRerun(s string) (f fleet, n nemesis, seed uint64, err error) {
	parts := strings.Split(s, "/")
	if len(parts) != 3 {
		return f, n, 0, fmt.Errorf("%q is not fleet/nemesis/seed", s)
	}
	all, does := append(slices.Clone(fleets), travellers), append(slices.Clone(nemeses), journey)
	i := slices.IndexFunc(all, func(f fleet) bool { return f.name == parts[0] })
	j := slices.IndexFunc(does, func(n nemesis) bool { return n.name == parts[1] })
	if i < 0 || j < 0 {
		return f, n, 0, fmt.Errorf("%q: there is no such fleet or nemesis", s)
	}
	seed, err = strconv.ParseUint(parts[2], 10, 64)
	return all[i], does[j], seed, err
}

// fixedSeed is that of the first half of a run that is not told one, so that two such runs do the same there as far as the machine lets them.
const fixedSeed = 1

// TestChaos takes CHAOS, how long all of it is to last, and CHAOS_SEED. Without them it takes three minutes, half of it with a seed of its own. With CHAOS_RUN it
// repeats one run, as often as CHAOS has time for, or once.
func TestChaos(t *testing.T) {
	which := os.Getenv("CHAOS_RUN")
	told, err := chaosLength()
	if err != nil {
		t.Fatal(err)
	}
	total := cmp.Or(told, 3*time.Minute)
	program := testenv.Program(t)
	all := map[cell]*outcome{}
	if which != "" {
		f, n, seed, err := parseRerun(which)
		if err != nil {
			t.Fatalf("CHAOS_RUN: %v", err)
		}
		c := newCluster(t, f.options(program), f.phases...)
		for began, once := time.Now(), true; once || time.Since(began) < told && !t.Failed(); once = false {
			chaos(t, c, f, n, seed, all)
		}
		t.Log("\n" + report(all))
		return
	}
	seeds := []uint64{fixedSeed, uint64(time.Now().UnixNano())}
	if v := os.Getenv("CHAOS_SEED"); v != "" {
		n, err := strconv.ParseUint(v, 10, 64)
		if err != nil {
			t.Fatalf("CHAOS_SEED: %v", err)
		}
		seeds = []uint64{n}
	}
	t.Logf("seeds: %d", seeds)
	share := total / time.Duration(len(fleets)+1) / time.Duration(len(seeds))
	for _, seed := range seeds {
		for i, f := range fleets {
			t.Run(f.name, func(t *testing.T) {
				c := newCluster(t, f.options(program), f.phases...)
				rng := rand.New(rand.NewPCG(seed, uint64(i)))
				for end := time.Now().Add(share); time.Now().Before(end) && !t.Failed(); {
					chaos(t, c, f, rarest(f, rng, all), rng.Uint64(), all)
				}
			})
		}
		t.Run(journey.name, func(t *testing.T) {
			rng := rand.New(rand.NewPCG(seed, uint64(len(fleets))))
			for end := time.Now().Add(share); time.Now().Before(end) && !t.Failed(); {
				chaos(t, newCluster(t, travellers.options(program), travellers.phases...), travellers, journey, rng.Uint64(), all)
			}
		})
	}
	t.Log("\n" + report(all))
	if strings.Contains(flag.Lookup("test.run").Value.String(), "/") {
		return // only some of it is wanted
	}
	for _, what := range shortfalls(all) {
		t.Error(what)
	}
}

// rarest is the nemesis that a fleet has met least; of several, the one that all have.
func rarest(f fleet, rng *rand.Rand, all map[cell]*outcome) (n nemesis) {
	least := math.MaxInt
	for _, i := range rng.Perm(len(nemeses)) {
		if nemeses[i].flushes && f.column { // which is refused there
			continue
		}
		runs := 0
		for at, o := range all {
			if at.nemesis == nemeses[i].name {
				runs += o.runs
				if at.fleet == f.name {
					runs += o.runs * manyRuns
				}
			}
		}
		if runs < least {
			least, n = runs, nemeses[i]
		}
	}
	return n
}

// manyRuns are more than there will be.
const manyRuns = 1 << 30

// What a run must have done, or it shows nothing.
const (
	minDefinite = 80 // percent of the commands
	minDone     = 50 // percent of them, with those that could not be sent
)

// shortfalls are what was not tried, or hardly.
func shortfalls(all map[cell]*outcome) (bad []string) {
	share := func(n, of int64) int64 { return 100 * n / max(of, 1) }
	met := map[string]bool{}
	var sum outcome
	for at, o := range all {
		sum.add(*o)
		met[at.fleet], met[at.nemesis] = true, true
		if o.faults == 0 && at.nemesis != calm {
			bad = append(bad, fmt.Sprintf("%s under %q: no fault", at.fleet, at.nemesis))
		}
		if o.done() == 0 {
			bad = append(bad, fmt.Sprintf("%s under %q: no command was done", at.fleet, at.nemesis))
		}
	}
	for _, f := range append(slices.Clone(fleets), travellers) {
		if !met[f.name] {
			bad = append(bad, f.name+" never ran")
		}
	}
	for _, n := range append(slices.Clone(nemeses), journey) {
		if !met[n.name] {
			bad = append(bad, n.name+" was never at work")
		}
	}
	if definite := share(sum.commands-sum.unknown, sum.commands); definite < minDefinite {
		bad = append(bad, fmt.Sprintf("%d %% of the commands have a definite outcome, %d %% must", definite, minDefinite))
	}
	if done := share(sum.done(), sum.commands+sum.unsent); done < minDone {
		bad = append(bad, fmt.Sprintf("%d %% of the commands were done, %d %% must be", done, minDone))
	}
	slices.Sort(bad)
	return bad
}

// chaos is one run, as a test of its own.
func chaos(t *testing.T, c *cluster, f fleet, n nemesis, seed uint64, all map[cell]*outcome) {
	t.Run(n.name, func(t *testing.T) {
		r := newRun(t, c, f, n, seed)
		o := r.judge(length)
		for _, a := range o.anomalies {
			t.Errorf("%s; CHAOS_RUN='%s'", a, r.name())
		}
		if t.Failed() {
			t.Log(strings.Join(o.reasons, "\n"))
		}
		at := cell{f.name, n.name}
		if all[at] == nil {
			all[at] = &outcome{}
		}
		all[at].add(o)
	})
}

// length is how long a run takes.
const length = 1500 * ms

var runs atomic.Int64

func newRun(t *testing.T, c *cluster, f fleet, n nemesis, seed uint64) *run {
	r := &run{fleet: f, nemesis: n, redisAlone: f.redisAlone()}
	if f.name != strict && f.has("phase1") && (n.apart || n.storeless && f.has("phase0")) {
		r.most = unseen
	}
	r.traffic = traffic{c: c, t: t, prefix: fmt.Sprintf("r%d", runs.Add(1)), numeric: f.column, seed: seed, began: time.Now(), stop: make(chan struct{}), forgetful: n.forgets && r.redisAlone,
		uncounted: f.name != strict && (n.storeless || n.apart && r.redisAlone && f.has("phase1"))}
	return r
}

// name is what CHAOS_RUN repeats it by.
func (r *run) name() rerun { return rerun{r.fleet.name, r.nemesis.name, r.seed} }

// judge lets clients and the nemesis work for a time, and says what it found.
func (r *run) judge(length time.Duration) (o outcome) {
	if r.column {
		r.c.rows(r.t, r.prefix)
	}
	var wg sync.WaitGroup
	for i := range clients {
		wg.Go(func() { r.client(i + 1) })
	}
	for i := range 4 {
		wg.Go(func() { r.live(i) })
	}
	ended := make(chan struct{})
	wg.Go(func() {
		r.do(r, rand.New(rand.NewPCG(r.seed, 1000)))
		close(ended)
	})
	if r.once {
		<-ended
	} else {
		time.Sleep(length)
		for began := time.Now(); r.faults.Load() == 0 && r.nemesis.name != calm && time.Since(began) < patience; { // a busy machine
			time.Sleep(ms)
		}
	}
	close(r.stop)
	wg.Wait()
	r.c.ready(r.t)
	o.repaired = r.c.journals(r.t)
	o.unrepaired = r.c.unrepaired(r.t)
	r.last()
	o.runs, o.commands, o.unsent, o.refused, o.unknown = 1, r.commands.Load(), r.unsent.Load(), r.refused.Load(), r.unknown.Load()
	o.faults, o.keys = r.faults.Load(), len(r.keys)
	r.judgeLives()
	for _, k := range r.keys {
		v := check(k.ops, r.most)
		if v.result == porcupine.Illegal {
			o.illegal++
		}
		switch {
		case v.result != porcupine.Ok:
			where := ""
			if !r.unkept {
				where = ", the history is in " + keep(r.t, r.name(), k)
			}
			o.anomalies = append(o.anomalies, fmt.Sprintf("%s: %s%s", k.name, v.result, where))
		case v.slack > 0:
			o.excepted++
			o.stale = max(o.stale, v.slack)
		}
	}
	o.lives = len(r.lives.reads)
	o.anomalies = append(o.anomalies, r.lives.wrong...)
	r.reasons.Range(func(what, n any) bool {
		o.reasons = append(o.reasons, fmt.Sprintf("%6d times %s", n.(*atomic.Int64).Load(), what))
		return true
	})
	return o
}

// last reads what is left through every sidecar, when all is well again. Where the store has a copy of everything, Redis loses its whole memory in between (P4).
func (r *run) last() {
	r.readAll()
	if !r.redisAlone && r.nemesis.name != journey.name {
		if _, err := ask(r.c.redis(), "FLUSHALL"); err != nil {
			r.t.Error(err)
		}
		r.readAll()
	}
}

func (r *run) readAll() {
	for _, s := range r.c.sidecars {
		c := client(s.addr)
		for _, k := range r.keys {
			var said string
			var call int64
			soon(r.t, k.name+" can be read", func() (err error) {
				call = r.now()
				said, err = c.Do(context.Background(), "GET", k.name).Text()
				if errors.Is(err, redis.Nil) {
					said, err = "(nil)", nil
				}
				return err
			})
			k.note(porcupine.Operation{ClientId: clients + 1, Input: input{verb: get, forgetful: r.forgetful}, Call: call, Output: output{true, said}, Return: r.now()})
		}
		c.Close()
	}
}

// history is the file of one.
type history struct {
	Run      string // what CHAOS_RUN repeats it by
	Key      string
	Commands []line
}

// line is a command of it.
type line struct {
	Client    int
	From, To  float64 // ms; To is -1 if it never returned
	Verb      verb
	How, Arg  string
	Forgetful bool   `json:",omitempty"`
	Uncounted bool   `json:",omitempty"`
	Got       string // "?": nobody knows
}

// keep writes the history of a key that was judged wrong, as JSON and as a page to look at, and returns where. What was kept before stays.
func keep(t *testing.T, of rerun, k *key) string {
	t.Helper()
	h := history{Run: of.String(), Key: k.name}
	for _, op := range k.ops {
		got := "?"
		if o := op.Output.(output); o.known {
			got = o.text
		}
		to := float64(op.Return) / 1e6
		if op.Return == never {
			to = -1
		}
		in := op.Input.(input)
		h.Commands = append(h.Commands, line{op.ClientId, float64(op.Call) / 1e6, to, in.verb, in.how, in.arg, in.forgetful, in.uncounted, got})
	}
	b, err := json.MarshalIndent(h, "", " ")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll("failures", 0o755); err != nil {
		t.Fatal(err)
	}
	f, err := os.CreateTemp("failures", strings.NewReplacer("/", "-", " ", "_").Replace(h.Run)+"-"+k.name+"-*.json")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.Write(b); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	_, info := porcupine.CheckOperationsVerbose(model, k.ops, checkTime)
	if err := porcupine.VisualizePath(model, info, strings.TrimSuffix(f.Name(), "json")+"html"); err != nil {
		t.Log(err)
	}
	return f.Name()
}

// report is what was done and found.
func report(all map[cell]*outcome) string {
	var b strings.Builder
	var sum outcome
	fmt.Fprintf(&b, "%-14s %-18s %5s %9s %8s %8s %8s %7s %6s %7s %9s %9s %9s %10s\n", "fleet", "nemesis", "runs", "commands", "refused", "unknown", "unsent", "faults", "keys", "ttl", "excepted", "stale ≤", "repaired", "unrepaired")
	line := func(at cell, o *outcome) {
		fmt.Fprintf(&b, "%-14s %-18s %5d %9d %8d %8d %8d %7d %6d %7d %9d %9v %9v %10v\n", at.fleet, at.nemesis, o.runs, o.commands, o.refused, o.unknown, o.unsent, o.faults, o.keys, o.lives, o.excepted,
			o.stale, o.repaired.Round(ms), o.unrepaired.Round(ms))
	}
	for _, f := range append(slices.Clone(fleets), travellers) {
		for _, n := range append(slices.Clone(nemeses), journey) {
			at := cell{f.name, n.name}
			if o := all[at]; o != nil {
				line(at, o)
				sum.add(*o)
			}
		}
	}
	line(cell{"all", ""}, &sum)
	fmt.Fprintf(&b, "stale: how late a read was, by exception (a) or (b). repaired: how long the journals took to become empty after the last fault. unrepaired: how long a key stood in one, the outage included.\n")
	if sum.commands > 0 {
		fmt.Fprintf(&b, "%d commands, %.1f %% with a definite outcome (%.1f %% done, the others refused), and %d that could not be sent; %d keys judged, %d of them by exceptions (a) and (b) of P3; %d reads of keys with a TTL; %d anomalies\n",
			sum.commands, 100*float64(sum.commands-sum.unknown)/float64(sum.commands), 100*float64(sum.done())/float64(sum.commands), sum.unsent, sum.keys, sum.excepted, sum.lives, len(sum.anomalies))
	}
	return b.String()
}
