package policy

import (
	"slices"
	"strings"
	"testing"
)

func TestPhaseWords(t *testing.T) {
	words := []string{"phase0", "phase1", "phase2", "drain", "phase3"}
	phases := Phases()
	if len(phases) != len(words) {
		t.Fatalf("Phases() has %d phases, want %d", len(phases), len(words))
	}
	for i, word := range words {
		p, err := ParsePhase(word)
		if err != nil || p != phases[i] {
			t.Errorf("ParsePhase(%q) = %v, %v, want %v", word, p, err, phases[i])
		}
		if p.String() != word {
			t.Errorf("String() = %q, want %q", p, word)
		}
	}
	for _, bad := range []string{"", "phase4", "Phase1", "DRAIN", "1", " phase1"} {
		_, err := ParsePhase(bad)
		if err == nil {
			t.Errorf("ParsePhase(%q) did not fail", bad)
			continue
		}
		for _, word := range words {
			if !strings.Contains(err.Error(), word) {
				t.Errorf("ParsePhase(%q): the error %q does not list %s", bad, err, word)
			}
		}
	}
}

func TestPhasesIsACopy(t *testing.T) {
	Phases()[0] = Phase3
	if Phases()[0] != Phase0 {
		t.Error("a caller changed the list of phases")
	}
}

func TestStep(t *testing.T) {
	tests := []struct {
		from, to Phase
		next     string // what the error must name; empty: allowed
	}{
		{Phase0, Phase0, ""}, {Phase0, Phase1, ""}, {Phase0, Phase2, "phase1"}, {Phase0, Drain, "phase1"}, {Phase0, Phase3, "phase1"},
		{Phase1, Phase0, ""}, {Phase1, Phase1, ""}, {Phase1, Phase2, ""}, {Phase1, Drain, "phase2"}, {Phase1, Phase3, "phase2"},
		{Phase2, Phase0, "phase1"}, {Phase2, Phase1, ""}, {Phase2, Phase2, ""}, {Phase2, Drain, ""}, {Phase2, Phase3, "drain"},
		{Drain, Phase0, "phase2"}, {Drain, Phase1, "phase2"}, {Drain, Phase2, ""}, {Drain, Drain, ""}, {Drain, Phase3, ""},
		{Phase3, Phase0, "drain"}, {Phase3, Phase1, "drain"}, {Phase3, Phase2, "drain"}, {Phase3, Drain, ""}, {Phase3, Phase3, ""},
	}
	for _, tt := range tests {
		err := Step(tt.from, tt.to)
		switch {
		case tt.next == "" && err != nil:
			t.Errorf("Step(%v, %v) = %v, want nil", tt.from, tt.to, err)
		case tt.next != "" && (err == nil || !strings.HasSuffix(err.Error(), ": "+tt.next+" comes next")):
			t.Errorf("Step(%v, %v) = %v, which does not say that %s comes next", tt.from, tt.to, err, tt.next)
		}
		if want := tt.next == "" && tt.from != tt.to; Adjacent(tt.from, tt.to) != want {
			t.Errorf("Adjacent(%v, %v) = %v, want %v", tt.from, tt.to, !want, want)
		}
	}
}

func TestStepOfNoPhase(t *testing.T) {
	for _, tt := range []struct{ from, to Phase }{{Phase3, 5}, {5, Phase3}, {9, 9}} {
		if err := Step(tt.from, tt.to); err == nil || !strings.HasSuffix(err.Error(), "no such phase") {
			t.Errorf("Step(%v, %v) = %v, want no such phase", tt.from, tt.to, err)
		}
		if Adjacent(tt.from, tt.to) {
			t.Errorf("Adjacent(%v, %v)", tt.from, tt.to)
		}
	}
}

func TestRules(t *testing.T) {
	tests := []struct {
		phase Phase
		reads string // whom a read asks, in order; "promote" if what the store answers is promoted
		store bool
		write WriteMode
		// redis down: read, write; store down: read, write
		outages [4]Outage
	}{
		{Phase0, "store", true, WriteStoreOnly, [4]Outage{NoEffect, NoEffect, Refuse, Refuse}},
		{Phase1, "redis store promote", true, WriteBoth, [4]Outage{FromStore, ToStoreAndJournal, FromRedis, ToRedisAndJournal}},
		{Phase2, "redis store promote", true, WriteRedisDropRow, [4]Outage{FromStore, Refuse, FromRedis, ToRedisAndJournal}},
		{Drain, "redis", true, WriteRedisDropRow, [4]Outage{RedisError, RedisError, NoEffect, ToRedisAndJournal}},
		{Phase3, "redis", false, WriteRedisOnly, [4]Outage{RedisError, RedisError, NoEffect, NoEffect}},
	}
	for _, tt := range tests {
		r := tt.phase.Rules()
		if got, want := r.Write.KeepsRow(), tt.phase == Phase0 || tt.phase == Phase1; got != want {
			t.Errorf("%s: keeps a row: %t", tt.phase, got)
		}
		var reads []string
		if r.ReadsRedis {
			reads = append(reads, "redis")
		}
		if r.ReadsStore {
			reads = append(reads, "store")
		}
		if r.Promotes {
			reads = append(reads, "promote")
		}
		if got := strings.Join(reads, " "); got != tt.reads {
			t.Errorf("%v: a read asks %q, want %q", tt.phase, got, tt.reads)
		}
		if r.UsesStore != tt.store || r.Write != tt.write {
			t.Errorf("%v: UsesStore %v, Write %v, want %v, %v", tt.phase, r.UsesStore, r.Write, tt.store, tt.write)
		}
		if got := [4]Outage{r.RedisDownRead, r.RedisDownWrite, r.StoreDownRead, r.StoreDownWrite}; got != tt.outages {
			t.Errorf("%v: outages %v, want %v", tt.phase, got, tt.outages)
		}
	}
}

// TestRulesAgree holds what must be true of any line of the table.
func TestRulesAgree(t *testing.T) {
	reads := []Outage{NoEffect, FromStore, FromRedis, Refuse, RedisError}
	writes := []Outage{NoEffect, ToStoreAndJournal, ToRedisAndJournal, Refuse, RedisError}
	for _, p := range Phases() {
		r := p.Rules()
		for what, wrong := range map[string]bool{
			"asks nobody":                           !r.ReadsRedis && !r.ReadsStore,
			"reads a store it does not use":         r.ReadsStore && !r.UsesStore,
			"promotes without two stores":           r.Promotes && !(r.ReadsRedis && r.ReadsStore),
			"does not use the store it writes":      r.UsesStore != (r.Write != WriteRedisOnly),
			"suffers from a store it does not use":  !r.UsesStore && (r.StoreDownRead != NoEffect || r.StoreDownWrite != NoEffect),
			"suffers from a store it does not read": !r.ReadsStore && r.StoreDownRead != NoEffect,
			"reads a Redis that is down":            r.RedisDownRead == FromRedis || r.RedisDownWrite == ToRedisAndJournal,
			"reads a store that is down":            r.StoreDownRead == FromStore || r.StoreDownWrite == ToStoreAndJournal,
			"has a read outage for writes":          !slices.Contains(reads, r.RedisDownRead) || !slices.Contains(reads, r.StoreDownRead),
			"has a write outage for reads":          !slices.Contains(writes, r.RedisDownWrite) || !slices.Contains(writes, r.StoreDownWrite),
		} {
			if wrong {
				t.Errorf("%v %s: %+v", p, what, r)
			}
		}
	}
}

func TestRulesOfNoPhase(t *testing.T) {
	defer func() {
		if recover() == nil {
			t.Error("Rules of a phase that does not exist did not panic")
		}
	}()
	Phase(len(Phases())).Rules()
}

func TestEnumWords(t *testing.T) {
	tests := map[string]string{
		WriteStoreOnly.String():    "store-only",
		WriteBoth.String():         "both",
		WriteRedisDropRow.String(): "redis-drop-row",
		WriteRedisOnly.String():    "redis-only",
		WriteMode(4).String():      "WriteMode(4)",
		NoEffect.String():          "no-effect",
		FromStore.String():         "from-store",
		ToStoreAndJournal.String(): "to-store-and-journal",
		FromRedis.String():         "from-redis",
		ToRedisAndJournal.String(): "to-redis-and-journal",
		Refuse.String():            "refuse",
		RedisError.String():        "redis-error",
		Outage(7).String():         "Outage(7)",
		Phase(5).String():          "Phase(5)",
		UnknownMiss.String():       "miss",
		UnknownError.String():      "error",
		OnUnknown(2).String():      "OnUnknown(2)",
		WriteAny.String():          "any",
		WriteBothStores.String():   "both",
		WritePolicy(2).String():    "WritePolicy(2)",
		LoadRunMirror.String():     "load-run-mirror",
		ReadThrough.String():       "read-through",
		Write.String():             "write",
		LoadPass.String():          "load-pass",
		Flush.String():             "flush",
		Keyspace.String():          "keyspace",
		Session.String():           "session",
		Pinning.String():           "pinning",
		Own.String():               "own",
		Passthrough.String():       "passthrough",
		Class(10).String():         "Class(10)",
	}
	for got, want := range tests {
		if got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}
