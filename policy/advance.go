package policy

import (
	"encoding/json"
	"fmt"
	"slices"
	"time"
)

// Evidence is what is known about a route that may speak against its next step. Whoever gathers it does not judge it; whoever
// judges it (Against) asks nobody, so that the evidence of one sidecar and that of a fleet are judged alike.
type Evidence struct {
	Route string `json:"-"`
	Phase Phase  `json:"-"`
	// Redis and Store are the words of /healthz for the state of both stores, such as "connected".
	Redis string `json:"redis"`
	Store string `json:"store"`
	// InPhase is for how long the route has been served in this phase and no other, by all sidecars that Postgres knows of.
	InPhase time.Duration `json:"-"`
	// TTL is the route's ttl. LongestLife is the longest life that a row of the route has left; 0: none has an end.
	TTL         time.Duration `json:"-"`
	LongestLife time.Duration `json:"-"`
	// Reads of this sidecar since the phase began here, by who answered them.
	RedisHits   int64 `json:"redis_hits"`
	JSONBHits   int64 `json:"jsonb_hits"`
	CacheMisses int64 `json:"cache_misses"`
	// Journal counts the keys of the route in both journals; JournalOldest is how long the oldest has stood.
	Journal       int           `json:"journal"`
	JournalOldest time.Duration `json:"-"`
	// Compared are the hits whose other copy was looked at (verify.sample) since the phase began here, Differences those where it was another.
	Compared    int64 `json:"compared"`
	Differences int64 `json:"differences"`
	// Sampled are rows that were looked for in Redis just now, Missing those that it lacks.
	Sampled int `json:"rows_sampled"`
	Missing int `json:"rows_missing"`
	// Unseen: fewer rows were found than are looked for, and there may be more.
	Unseen bool `json:"rows_unseen,omitempty"`
	// MaxMemory and Eviction are Redis's maxmemory (0: no limit) and maxmemory-policy; "" is not known.
	MaxMemory int64  `json:"maxmemory"`
	Eviction  string `json:"maxmemory_policy"`
	// Others are the phases in which sidecars have served the route lately, this one's included.
	Others []Sighting `json:"sidecars"`
	// Unknown names what could not be found out.
	Unknown []string `json:"unknown,omitempty"`
}

// Sighting is a phase in which some sidecar serves a route, and how long ago it said so.
type Sighting struct {
	Phase Phase
	Ago   time.Duration
}

// sighting is a Sighting in JSON.
type sighting struct {
	Phase   Phase   `json:"phase"`
	Seconds float64 `json:"seconds_ago"`
}

// MarshalJSON writes the time in seconds.
func (s Sighting) MarshalJSON() ([]byte, error) {
	return json.Marshal(sighting{s.Phase, s.Ago.Seconds()})
}

// UnmarshalJSON reads what MarshalJSON writes.
func (s *Sighting) UnmarshalJSON(b []byte) error {
	var in sighting
	err := json.Unmarshal(b, &in)
	*s = Sighting{in.Phase, time.Duration(in.Seconds * float64(time.Second))}
	return err
}

// Doubt is a closed list: what can speak against a step.
type Doubt string

const (
	// DoubtRedis: Redis is not usable.
	DoubtRedis Doubt = "redis"
	// DoubtStore: Postgres is not usable.
	DoubtStore Doubt = "postgres"
	// DoubtTime: the phase has not lasted as long as values live.
	DoubtTime Doubt = "time_in_phase"
	// DoubtReads: there were too few reads to tell a rate.
	DoubtReads Doubt = "few_reads"
	// DoubtHitRate: Redis answers too few reads.
	DoubtHitRate Doubt = "hit_rate"
	// DoubtFallback: Postgres answers too many reads.
	DoubtFallback Doubt = "fallback_rate"
	// DoubtJournal: copies wait for a repair.
	DoubtJournal Doubt = "journal"
	// DoubtDifferences: both copies of some key were not the same.
	DoubtDifferences Doubt = "differences"
	// DoubtRows: Redis lacks rows that the next phase does not read.
	DoubtRows Doubt = "rows_missing"
	// DoubtEviction: Redis may evict what only it holds.
	DoubtEviction Doubt = "eviction"
	// DoubtSidecars: another sidecar is in a phase that is not adjacent to the next.
	DoubtSidecars Doubt = "sidecars"
	// DoubtUnknown: something could not be found out.
	DoubtUnknown Doubt = "unknown"
)

// Reason is one thing that speaks against a step, and what can be done about it.
type Reason struct {
	Doubt  Doubt  `json:"doubt"`
	Says   string `json:"says"`
	Remedy string `json:"remedy"`
}

const (
	// minReads: with a thousand reads, a hit rate that is measured as 90 % is one with two percent of error.
	minReads = 1000
	// minHitRate is the share of reads that Redis must answer before it becomes the primary.
	minHitRate = 0.90
	// maxFallback is the share of reads that Postgres may answer when its rows are about to be read no more: each of them
	// would be a miss then.
	maxFallback = 0.01
	// settled is how long an entry of a journal may have stood: a repair takes one or two polls, and a poll is at most a minute
	// and by default half a second.
	settled = 10 * time.Second
	// maxJournal entries are what a busy fleet has under way at once.
	maxJournal = 1000
)

// Against returns what speaks against going from e.Phase to the phase named, which is one step away. Nothing does if it is empty.
func Against(e Evidence, to Phase) []Reason {
	j := judge{e: e, to: to}
	j.neighbours()
	if to > e.Phase {
		j.stores()
		j.journal()
		j.age()
		j.rates()
		j.copies()
		for _, what := range e.Unknown {
			j.add(DoubtUnknown, what+" could not be found out", "ask again when both stores answer")
		}
	}
	return j.reasons
}

type judge struct {
	e       Evidence
	to      Phase
	reasons []Reason
}

func (j *judge) add(d Doubt, says, remedy string) {
	j.reasons = append(j.reasons, Reason{d, says, remedy})
}

// command is a command line for the route.
func (j *judge) command(name string) string {
	line := "cacheproxy " + name
	if j.e.Route != "" {
		line += " --route " + j.e.Route
	}
	return line
}

// leavesStore: rows are read now and not any more after the step.
func (j *judge) leavesStore() bool { return j.e.Phase.Rules().ReadsStore && !j.to.Rules().ReadsStore }

// leavesRows: the store has the value of every write now, and not any more after the step.
func (j *judge) leavesRows() bool {
	return j.e.Phase.Rules().Write.KeepsRow() && !j.to.Rules().Write.KeepsRow()
}

func (j *judge) neighbours() {
	for _, s := range j.e.Others {
		if s.Phase == j.to || Adjacent(s.Phase, j.to) {
			continue
		}
		j.add(DoubtSidecars,
			fmt.Sprintf("a sidecar served the route in %s %s ago, and %s beside %s breaks the promises", s.Phase, Short(s.Ago), s.Phase, j.to),
			fmt.Sprintf("move all sidecars to %s first; one that has left %s is forgotten after %s", j.e.Phase, s.Phase, Short(Lately)))
	}
}

func (j *judge) stores() {
	if j.e.Redis != "connected" {
		j.add(DoubtRedis, "Redis is "+orUnknown(j.e.Redis)+", and the next phase depends on it", "see why in /healthz; wait until it says connected")
	}
	if j.e.Phase.Rules().UsesStore && j.e.Store != "connected" {
		j.add(DoubtStore, "Postgres is "+orUnknown(j.e.Store)+": the journal and the other sidecars are not known", "see why in /healthz; wait until it says connected")
	}
}

func orUnknown(word string) string {
	if word == "" {
		return "in an unknown state"
	}
	return word
}

func (j *judge) journal() {
	e := j.e
	switch {
	case !j.to.Rules().UsesStore && e.Phase.Rules().UsesStore && e.Journal > 0:
		j.add(DoubtJournal, fmt.Sprintf("%d keys wait for a repair, and in %s nobody repairs them", e.Journal, j.to),
			"wait until CACHEPROXY JOURNAL is empty; what an entry says of a row is only repaired by sidecars in "+Phase2.String())
	case e.Journal > maxJournal:
		j.add(DoubtJournal, fmt.Sprintf("%d keys wait for a repair", e.Journal), "wait until CACHEPROXY JOURNAL is short; while it grows, a store is in trouble")
	case e.Journal > 0 && e.JournalOldest > settled:
		j.add(DoubtJournal, fmt.Sprintf("%d keys wait for a repair, the oldest for %s", e.Journal, Short(e.JournalOldest)),
			"see CACHEPROXY JOURNAL; what is not repaired within seconds needs a look at the log")
	}
}

// age asks for as much time in the phase as a value lives: then everything was written or fetched while it lasted.
func (j *judge) age() {
	if !j.e.Phase.Rules().Promotes {
		return
	}
	longest, whose := j.e.TTL, "the route's ttl"
	if j.e.LongestLife > longest {
		longest, whose = j.e.LongestLife, "what a row has left to live"
	}
	if j.e.InPhase < longest {
		j.add(DoubtTime, fmt.Sprintf("%s for %s, and values live up to %s (%s)", j.e.Phase, Short(j.e.InPhase), Short(longest), whose),
			"wait "+Short(longest-j.e.InPhase)+" more")
	}
}

func (j *judge) rates() {
	e := j.e
	if !e.Phase.Rules().Promotes {
		return
	}
	reads := e.RedisHits + e.JSONBHits + e.CacheMisses
	if reads < minReads {
		j.add(DoubtReads, fmt.Sprintf("%d reads since the phase began in this sidecar: too few to tell a rate", reads),
			fmt.Sprintf("wait until there are %d", minReads))
		return
	}
	share := func(n int64) float64 { return float64(n) / float64(reads) }
	if share(e.RedisHits) <= minHitRate {
		remedy := "wait until Redis is warm, or copy the store into it: " + j.command("migrate")
		if share(e.CacheMisses) >= 1-minHitRate {
			remedy = "most of the rest is in neither store, which no phase changes: if that is how the application reads, go on with --force"
		}
		j.add(DoubtHitRate, fmt.Sprintf("Redis answers %s of the reads; over %s are asked for", Percent(share(e.RedisHits)), Percent(minHitRate)), remedy)
	}
	if j.leavesStore() && share(e.JSONBHits) > maxFallback {
		j.add(DoubtFallback, fmt.Sprintf("Postgres answers %s of the reads, which in %s would find nothing; at most %s are allowed", Percent(share(e.JSONBHits)), j.to, Percent(maxFallback)),
			"copy the store into Redis: "+j.command("migrate"))
	}
}

func (j *judge) copies() {
	e := j.e
	if !j.leavesRows() && !j.leavesStore() {
		return
	}
	if e.Differences > 0 {
		j.add(DoubtDifferences, fmt.Sprintf("of %d hits that were compared, %d had another copy in Postgres", e.Compared, e.Differences), j.command("verify")+" --repair")
	}
	if e.MaxMemory > 0 && Evicts(e.Eviction) {
		j.add(DoubtEviction, "Redis evicts with "+e.Eviction+" also what it is then the only holder of",
			"weigh it: noeviction keeps all, and refuses writes when the memory is full; volatile-lru keeps what has no TTL, and evicts what has one; if the application can make any value again, go on with --force")
	}
	if !j.leavesStore() {
		return
	}
	if e.Missing > 0 {
		j.add(DoubtRows, fmt.Sprintf("of %d rows that were looked for, Redis lacks %d; in %s they would not be found", e.Sampled, e.Missing, j.to),
			"copy the store into Redis: "+j.command("migrate")+", then "+j.command("verify"))
	}
	if e.Unseen {
		j.add(DoubtUnknown, fmt.Sprintf("only %d live rows were found among those looked at, and whether Redis has the others could not be found out", e.Sampled),
			"look at all: "+j.command("verify")+" --complete; if it finds no difference, go on with --force")
	}
}

// Evicts tells whether a maxmemory-policy may evict keys that have no TTL.
func Evicts(eviction string) bool { return len(eviction) > 8 && eviction[:8] == "allkeys-" }

// Lately is how long a sidecar counts as serving in a phase after it last said so. Sidecars say so every Lately/4: one that is slow
// is not taken for gone, and after a step nobody waits long for what was before.
const Lately = 20 * time.Second

// Next is the phase one step on, Previous that one step back; false: there is none.
func (p Phase) Next() (Phase, bool) { return p + 1, (p + 1).valid() }

// Previous is the phase one step back; false: there is none.
func (p Phase) Previous() (Phase, bool) {
	if p == Phase0 {
		return p, false
	}
	return p - 1, true
}

// Percent writes a share as people read it.
func Percent(share float64) string { return fmt.Sprintf("%.1f %%", 100*share) }

// Short writes a duration with its two largest units, such as 2d3h or 4m10s.
func Short(d time.Duration) string {
	if d < time.Second {
		return d.Round(time.Millisecond).String()
	}
	var out string
	units := 0
	for _, u := range []struct {
		d    time.Duration
		name string
	}{{24 * time.Hour, "d"}, {time.Hour, "h"}, {time.Minute, "m"}, {time.Second, "s"}} {
		n := d / u.d
		if n == 0 {
			if units > 0 {
				break
			}
			continue
		}
		out += fmt.Sprintf("%d%s", n, u.name)
		d -= n * u.d
		if units++; units == 2 {
			break
		}
	}
	return out
}

// InPhase is how long a route has been in a phase and in no other: since it was entered, or since the last sighting of any other. own is how long
// ago it was entered.
func InPhase(phase Phase, own time.Duration, others []Sighting) time.Duration {
	for _, s := range others {
		if s.Phase != phase {
			own = min(own, s.Ago)
		}
	}
	return max(own, 0)
}

// Recent are the sightings that count.
func Recent(all []Sighting) []Sighting {
	return slices.DeleteFunc(slices.Clone(all), func(s Sighting) bool { return s.Ago > Lately })
}
