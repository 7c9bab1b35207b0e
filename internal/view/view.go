// Package view shows the figures of a sidecar as they change: on a terminal as a screen that is drawn anew every interval,
// elsewhere as lines. It asks for figures through a function, counts nothing and knows no address.
//
// Read render.go for what is shown, which is a pure function of two snapshots, then watch.go for when, and terminal.go for
// what a terminal has to be told and given back.
package view

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"cacheproxy/proxy"
)

// Snapshot is what a sidecar said at a moment, or why it did not.
type Snapshot struct {
	At    time.Time
	Stats proxy.Stats
	Err   error // Stats says nothing then
}

// flow is what happened between two snapshots.
type flow struct {
	seconds float64 // 0: nothing can be said, as there is one snapshot only, or another process answers
	was     proxy.Stats
}

// between compares two snapshots. before may be nil.
func between(before, now *Snapshot) flow {
	if before == nil || before.Err != nil || now.Err != nil {
		return flow{}
	}
	seconds := now.At.Sub(before.At).Seconds()
	// A process that was started meanwhile counts from nothing.
	if seconds <= 0 || now.Stats.Proxy.Commands < before.Stats.Proxy.Commands || now.Stats.Proxy.UptimeSeconds < before.Stats.Proxy.UptimeSeconds {
		return flow{}
	}
	return flow{seconds, before.Stats}
}

// rate is how many a second; ok is false if it cannot be said.
func (f flow) rate(now, was int64) (perSecond float64, ok bool) {
	if f.seconds == 0 || now < was {
		return 0, false
	}
	return float64(now-was) / f.seconds, true
}

// route is a route's figures in the snapshot before, zero if it was not there.
func (f flow) route(name string) proxy.RouteStats {
	for i := range f.was.Routes {
		if f.was.Routes[i].Name == name {
			return f.was.Routes[i]
		}
	}
	return proxy.RouteStats{}
}

// Rates are what happened to a route in an interval. Without reads there are no shares.
type Rates struct {
	Route   string   `json:"route"`
	Phase   string   `json:"phase"`
	Reads   *float64 `json:"reads_per_second"`
	Redis   *float64 `json:"redis_hit_rate"`
	JSONB   *float64 `json:"jsonb_hit_rate"`
	Misses  *float64 `json:"miss_rate"`
	Writes  *float64 `json:"writes_per_second"`
	Refused *float64 `json:"refused_per_second"`
}

// rates are those of a route, or of several of which now and was are the sums.
func (f flow) rates(name, phase string, now, was proxy.RouteStats) Rates {
	r := Rates{Route: name, Phase: phase}
	set := func(to **float64, now, was int64) {
		if v, ok := f.rate(now, was); ok {
			*to = &v
		}
	}
	all := func(s proxy.RouteStats) int64 { return s.RedisHits + s.JSONBHits + s.CacheMisses }
	set(&r.Reads, all(now), all(was))
	set(&r.Writes, now.Writes, was.Writes)
	set(&r.Refused, now.Refused, was.Refused)
	if n := all(now) - all(was); r.Reads != nil && n > 0 {
		share := func(now, was int64) *float64 {
			v := float64(now-was) / float64(n)
			return &v
		}
		r.Redis, r.JSONB, r.Misses = share(now.RedisHits, was.RedisHits), share(now.JSONBHits, was.JSONBHits), share(now.CacheMisses, was.CacheMisses)
	}
	return r
}

// all are the rates of every route, and of all together.
func (f flow) all(now proxy.Stats) (routes []Rates, sum Rates) {
	add := func(to *proxy.RouteStats, s proxy.RouteStats) {
		to.RedisHits += s.RedisHits
		to.JSONBHits += s.JSONBHits
		to.CacheMisses += s.CacheMisses
		to.Writes += s.Writes
		to.Refused += s.Refused
	}
	var a, b proxy.RouteStats
	for _, r := range now.Routes {
		was := f.route(r.Name)
		add(&a, r)
		add(&b, was)
		routes = append(routes, f.rates(r.Name, r.Phase, r, was))
	}
	return routes, f.rates("all", now.MigrationPhase, a, b)
}

// Found is what a sidecar has found on a route since its start that most routes never have.
type Found struct {
	NoRow            int64            // writes of keys without a row
	Checked, Dropped int64            // hits whose copies were compared, and those that could not be
	Mismatches       map[string]int64 // those that differed, by kind
}

// FoundOf is what was found on a route.
func FoundOf(r proxy.RouteStats) Found {
	return Found{r.NoRow, r.Verified, r.Unverified, maps.Clone(r.Mismatches)}
}

func (f *Found) add(g Found) {
	f.NoRow += g.NoRow
	f.Checked += g.Checked
	f.Dropped += g.Dropped
	for kind, n := range g.Mismatches {
		if f.Mismatches == nil {
			f.Mismatches = map[string]int64{}
		}
		f.Mismatches[kind] += n
	}
}

// Any tells whether there is anything to say.
func (f Found) Any() bool { return f.NoRow+f.Checked+f.Dropped+f.Differing() > 0 }

// Differing is how many differed.
func (f Found) Differing() (sum int64) {
	for _, n := range f.Mismatches {
		sum += n
	}
	return sum
}

// Kinds says how they differed.
func (f Found) Kinds() string {
	var out []string
	for _, kind := range slices.Sorted(maps.Keys(f.Mismatches)) {
		if n := f.Mismatches[kind]; n > 0 {
			out = append(out, fmt.Sprintf("%s %d", kind, n))
		}
	}
	return strings.Join(out, ", ")
}

// words are fields for the end of a line, by the names that they have in /cache/stats; none for what is zero.
func (f Found) words() string {
	var b strings.Builder
	for _, field := range []struct {
		name string
		n    int64
	}{{"no_row", f.NoRow}, {"verify_checked", f.Checked}, {"verify_dropped", f.Dropped}, {"verify_mismatches", f.Differing()}} {
		if field.n > 0 {
			fmt.Fprintf(&b, " %s=%d", field.name, field.n)
		}
	}
	return b.String()
}
