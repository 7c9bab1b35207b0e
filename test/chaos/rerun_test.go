package chaos

import (
	"encoding/json"
	"maps"
	"os"
	"slices"
	"testing"

	"github.com/anishathalye/porcupine"
)

// What a kept history says of its run is enough to draw the same commands again, and it lies beside an earlier one of the same run.
func TestRerun(t *testing.T) {
	t.Chdir(t.TempDir())
	for _, f := range append(slices.Clone(fleets), travellers) {
		for _, n := range append(slices.Clone(nemeses), journey) {
			r := newRun(t, nil, f, n, 1<<63+uint64(len(n.name)))
			k := &key{name: r.prefix + "k0", ops: []porcupine.Operation{op(1, 0, 1, set, "a", "OK")}}
			file, again := keep(t, r.name(), k), keep(t, r.name(), k)
			if file == again {
				t.Fatalf("%s was written twice", file)
			}
			text, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			var h history
			if err := json.Unmarshal(text, &h); err != nil {
				t.Fatal(err)
			}
			fleet, nemesis, seed, err := parseRerun(h.Run)
			if err != nil || fleet.name != f.name || nemesis.name != n.name || !slices.Equal(fleet.phases, f.phases) {
				t.Fatalf("%s names %s under %s, %v", h.Run, fleet.name, nemesis.name, err)
			}
			for n := 1; n <= clients; n++ {
				first, second := clientRand(r.seed, n), clientRand(seed, n)
				for i := range 200 {
					if a, b := draw(first, n, i, len(f.phases)), draw(second, n, i, len(fleet.phases)); a != b {
						t.Fatalf("%s: client %d draws %+v, and %+v when it is repeated", h.Run, n, a, b)
					}
				}
			}
		}
	}
	for _, bad := range []string{"", "phase1", "phase1/nothing", "phase9/nothing/1", "phase1/anything/1", "phase1/nothing/x", "phase1/nothing/1/2"} {
		if _, _, _, err := parseRerun(bad); err == nil {
			t.Errorf("%q is taken", bad)
		}
	}
}

// A run in which nothing is done, or nothing happens, is no proof.
func TestShortfalls(t *testing.T) {
	full := func() map[cell]*outcome {
		all := map[cell]*outcome{{travellers.name, journey.name}: {runs: 1, commands: 100, faults: 1}}
		rng := clientRand(1, 1)
		for range nemeses {
			for _, f := range fleets {
				n := rarest(f, rng, all)
				if n.flushes && f.column {
					t.Fatalf("%s is under %q", f.name, n.name)
				}
				at := cell{f.name, n.name}
				if all[at] != nil {
					if f.column { // which one is not for
						continue
					}
					t.Fatalf("%s is under %q again before it was under all", f.name, n.name)
				}
				all[at] = &outcome{runs: 1, commands: 100, faults: 1}
			}
		}
		return all
	}
	if bad := shortfalls(full()); len(bad) > 0 {
		t.Errorf("a full run: %q", bad)
	}
	for name, spoil := range map[string]func(map[cell]*outcome){
		"all are refused": func(all map[cell]*outcome) {
			for _, o := range all {
				o.refused = 51
			}
		},
		"all are uncertain": func(all map[cell]*outcome) {
			for _, o := range all {
				o.unknown = 21
			}
		},
		"none can be sent": func(all map[cell]*outcome) {
			for _, o := range all {
				o.unsent = 101
			}
		},
		"one has no fault": func(all map[cell]*outcome) { all[cell{"phase1", "evict"}].faults = 0 },
		"one does nothing": func(all map[cell]*outcome) { all[cell{"phase1", "evict"}].refused = 100 },
		"no journey":       func(all map[cell]*outcome) { delete(all, cell{travellers.name, journey.name}) },
		"a fleet is missing": func(all map[cell]*outcome) {
			maps.DeleteFunc(all, func(at cell, _ *outcome) bool { return at.fleet == "drain" })
		},
		"so is a nemesis": func(all map[cell]*outcome) {
			maps.DeleteFunc(all, func(at cell, _ *outcome) bool { return at.nemesis == "flush" })
		},
	} {
		all := full()
		spoil(all)
		if len(shortfalls(all)) == 0 {
			t.Errorf("%s, and nobody minds", name)
		}
	}
}
