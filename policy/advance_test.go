package policy

import (
	"encoding/json"
	"slices"
	"strings"
	"testing"
	"time"
)

// well is a route in a phase that nothing speaks against leaving.
func well(p Phase) Evidence {
	return Evidence{
		Phase: p, Redis: "connected", Store: "connected",
		InPhase: 25 * time.Hour, TTL: 24 * time.Hour, LongestLife: time.Hour,
		RedisHits: 9900, JSONBHits: 50, CacheMisses: 50,
		Compared: 100, Sampled: 500, MaxMemory: 1 << 30, Eviction: "volatile-lru",
		Others: []Sighting{{p, time.Second}},
	}
}

func TestNothingSpeaksAgainst(t *testing.T) {
	for _, p := range Phases() {
		for _, step := range []func() (Phase, bool){p.Next, p.Previous} {
			to, ok := step()
			if !ok {
				continue
			}
			if got := Against(well(p), to); len(got) > 0 {
				t.Errorf("%s to %s: %v", p, to, got)
			}
		}
	}
	if _, ok := Phase3.Next(); ok {
		t.Error("there is a phase after phase3")
	}
	if _, ok := Phase0.Previous(); ok {
		t.Error("there is a phase before phase0")
	}
}

// Each piece of evidence, made bad alone, speaks against the steps named and no other.
func TestAgainst(t *testing.T) {
	const on01, on12, on2d, ond3 = "phase0 to phase1", "phase1 to phase2", "phase2 to drain", "drain to phase3"
	const back10, back21, backd2, back3d = "phase1 to phase0", "phase2 to phase1", "drain to phase2", "phase3 to drain"
	for _, c := range []struct {
		name  string
		spoil func(*Evidence)
		doubt Doubt
		says  string
		steps []string
	}{
		{"redis is down", func(e *Evidence) { e.Redis = "down" }, DoubtRedis, "Redis is down", []string{on01, on12, on2d, ond3}},
		{"redis is not known", func(e *Evidence) { e.Redis = "" }, DoubtRedis, "in an unknown state", []string{on01, on12, on2d, ond3}},
		{"postgres is down", func(e *Evidence) { e.Store = "down" }, DoubtStore, "Postgres is down", []string{on01, on12, on2d, ond3}},
		{"too early for the ttl", func(e *Evidence) { e.InPhase = 23 * time.Hour }, DoubtTime, "values live up to 1d (the route's ttl)", []string{on12, on2d}},
		{"exactly as long as the ttl", func(e *Evidence) { e.InPhase = 24 * time.Hour }, "", "", nil},
		{"too early for a row", func(e *Evidence) { e.LongestLife = 72 * time.Hour }, DoubtTime, "what a row has left to live", []string{on12, on2d}},
		{"no ttl at all", func(e *Evidence) { e.InPhase, e.TTL, e.LongestLife = 0, 0, 0 }, "", "", nil},
		{"few reads", func(e *Evidence) { e.RedisHits, e.JSONBHits, e.CacheMisses = 999, 0, 0 }, DoubtReads, "999 reads", []string{on12, on2d}},
		{"just enough reads", func(e *Evidence) { e.RedisHits, e.JSONBHits, e.CacheMisses = 1000, 0, 0 }, "", "", nil},
		{"a hit rate of 90 % is not over 90 %", func(e *Evidence) { e.RedisHits, e.JSONBHits, e.CacheMisses = 9000, 50, 950 }, DoubtHitRate, "90.0 %", []string{on12, on2d}},
		{"a hit rate over it", func(e *Evidence) { e.RedisHits, e.JSONBHits, e.CacheMisses = 9001, 50, 949 }, "", "", nil},
		{"a fallback rate over 1 %", func(e *Evidence) { e.RedisHits, e.JSONBHits, e.CacheMisses = 9899, 101, 0 }, DoubtFallback, "Postgres answers 1.0 %", []string{on2d}},
		{"a fallback rate of 1 %", func(e *Evidence) { e.RedisHits, e.JSONBHits, e.CacheMisses = 9900, 100, 0 }, "", "", nil},
		{"a young journal", func(e *Evidence) { e.Journal, e.JournalOldest = 3, time.Second }, DoubtJournal, "3 keys wait for a repair, and in phase3 nobody", []string{ond3}},
		{"an old journal", func(e *Evidence) { e.Journal, e.JournalOldest = 1, time.Minute }, DoubtJournal, "1 keys wait for a repair", []string{on01, on12, on2d, ond3}},
		{"a long journal", func(e *Evidence) { e.Journal, e.JournalOldest = 1001, time.Second }, DoubtJournal, "1001 keys", []string{on01, on12, on2d, ond3}},
		{"differences", func(e *Evidence) { e.Differences = 2 }, DoubtDifferences, "of 100 hits that were compared, 2", []string{on12, on2d}},
		{"rows that Redis lacks", func(e *Evidence) { e.Missing = 4 }, DoubtRows, "of 500 rows that were looked for, Redis lacks 4", []string{on2d}},
		{"rows that nobody has seen", func(e *Evidence) { e.Sampled, e.Unseen = 7, true }, DoubtUnknown, "only 7 live rows were found", []string{on2d}},
		{"redis evicts", func(e *Evidence) { e.Eviction = "allkeys-lru" }, DoubtEviction, "allkeys-lru", []string{on12, on2d}},
		{"redis would evict, but has no limit", func(e *Evidence) { e.Eviction, e.MaxMemory = "allkeys-lru", 0 }, "", "", nil},
		{"something is not known", func(e *Evidence) { e.Unknown = []string{"the weather"} }, DoubtUnknown, "the weather could not be found out", []string{on01, on12, on2d, ond3}},
		{"a sidecar in phase0", func(e *Evidence) { e.Others = append(e.Others, Sighting{Phase0, 3 * time.Second}) }, DoubtSidecars, "in phase0 3s ago", []string{on12, on2d, ond3}},
		{"a sidecar in phase3", func(e *Evidence) { e.Others = append(e.Others, Sighting{Phase3, 0}) }, DoubtSidecars, "in phase3", []string{on01, on12, back10, back21, backd2}},
	} {
		t.Run(c.name, func(t *testing.T) {
			for _, p := range Phases() {
				for _, step := range []func() (Phase, bool){p.Next, p.Previous} {
					to, ok := step()
					if !ok {
						continue
					}
					name := p.String() + " to " + to.String()
					e := well(p)
					c.spoil(&e)
					got := Against(e, to)
					if c.name == "a sidecar in phase0" && to < p {
						continue // the next case has the way back
					}
					switch want := slices.Contains(c.steps, name); {
					case !want && len(got) > 0:
						t.Errorf("%s: %v", name, got)
					case want && (len(got) != 1 || got[0].Doubt != c.doubt || !strings.Contains(got[0].Says, c.says) || got[0].Remedy == ""):
						t.Errorf("%s: %v, want %s: %s", name, got, c.doubt, c.says)
					}
				}
			}
		})
	}
}

// Misses of what nobody has are not a Redis that is cold, and the remedy says so.
func TestHitRateRemedy(t *testing.T) {
	e := well(Phase1)
	e.RedisHits, e.JSONBHits, e.CacheMisses = 800, 0, 200
	if got := Against(e, Phase2); len(got) != 1 || !strings.Contains(got[0].Remedy, "neither store") {
		t.Errorf("%v", got)
	}
	e.RedisHits, e.JSONBHits, e.CacheMisses = 800, 200, 0
	e.Route = "user"
	if got := Against(e, Phase2); len(got) != 1 || !strings.HasSuffix(got[0].Remedy, "cacheproxy migrate --route user") {
		t.Errorf("%v", got)
	}
}

func TestInPhase(t *testing.T) {
	for _, c := range []struct {
		own, want time.Duration
		others    []Sighting
	}{
		{time.Hour, time.Hour, nil},
		{time.Hour, time.Hour, []Sighting{{Phase1, time.Second}, {Phase0, 2 * time.Hour}}},
		{time.Hour, time.Minute, []Sighting{{Phase1, time.Second}, {Phase0, time.Minute}, {Phase2, time.Hour}}}, // somebody was elsewhere a minute ago
		{-time.Second, 0, nil},
	} {
		if got := InPhase(Phase1, c.own, c.others); got != c.want {
			t.Errorf("InPhase(%v, %v) = %v, want %v", c.own, c.others, got, c.want)
		}
	}
	if got := Recent([]Sighting{{Phase0, Lately + 1}, {Phase1, Lately}}); len(got) != 1 || got[0].Phase != Phase1 {
		t.Errorf("Recent: %v", got)
	}
}

func TestShort(t *testing.T) {
	for d, want := range map[time.Duration]string{
		0: "0s", 12 * time.Millisecond: "12ms", time.Second: "1s", 61 * time.Second: "1m1s", time.Hour: "1h", time.Hour + time.Second: "1h",
		51*time.Hour + 59*time.Minute: "2d3h", 24 * time.Hour: "1d",
	} {
		if got := Short(d); got != want {
			t.Errorf("Short(%v) = %q, want %q", d, got, want)
		}
	}
}

func TestSightingJSON(t *testing.T) {
	in := Sighting{Drain, 1500 * time.Millisecond}
	b, err := json.Marshal(in)
	if err != nil || string(b) != `{"phase":"drain","seconds_ago":1.5}` {
		t.Fatalf("%s, %v", b, err)
	}
	var out Sighting
	if err := json.Unmarshal(b, &out); err != nil || out != in {
		t.Errorf("%v, %v", out, err)
	}
	if json.Unmarshal([]byte(`{"phase":"phase9"}`), &out) == nil {
		t.Error("a phase that there is not was read")
	}
}
