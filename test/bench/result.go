//go:build linux

package main

import (
	"fmt"
	"slices"
	"strings"
	"time"
)

// Result is everything that was seen: each round of each target, and nothing that can be computed from it.
type Result struct {
	At       time.Time `json:"at"`
	Commit   string    `json:"commit"`
	Versions []string  `json:"versions"`
	CPUs     int       `json:"cpus"`
	Quick    bool      `json:"quick"`
	Rounds   int       `json:"rounds"`
	Slice    float64   `json:"slice_seconds"`
	Seconds  float64   `json:"seconds"`

	Grid     []*Series `json:"grid"`
	Alone    *Series   `json:"alone"`
	HalfLoad *Series   `json:"half_load"`
	Misses   []*Series `json:"misses"`
	Writes   *Series   `json:"writes"`
	Herd     []Herd    `json:"herd"`
	Memory   []Memory  `json:"memory"`
}

// Series is one thing that several targets did in turn.
type Series struct {
	What  string `json:"what"`
	Op    string `json:"op,omitempty"`
	Conns int    `json:"connections,omitempty"`
	Depth int    `json:"pipeline,omitempty"`
	Size  int    `json:"bytes,omitempty"`
	Runs  []Run  `json:"runs"`
}

// Run is one target's turn in one round. Without a Rate it failed, and Failed says how.
type Run struct {
	Round    int     `json:"round"`
	Target   string  `json:"target"`
	Rate     float64 `json:"per_second"`
	P50      float64 `json:"p50_ms,omitempty"`
	P99      float64 `json:"p99_ms,omitempty"`
	ProxyCPU float64 `json:"proxy_us_per_command,omitempty"` // CPU time, of user and system
	RedisCPU float64 `json:"redis_us_per_command,omitempty"`
	Queries  float64 `json:"queries_per_command,omitempty"` // that Postgres saw, where they were counted
	Failed   string  `json:"failed,omitempty"`
}

// Herd is many clients who miss the same cold key at once.
type Herd struct {
	Clients int     `json:"clients"`
	Queries int     `json:"queries"`
	Seconds float64 `json:"seconds"`
	Failed  string  `json:"failed,omitempty"`
}

// Memory is a proxy's resident memory in MiB.
type Memory struct {
	Target string  `json:"target"`
	Fresh  float64 `json:"fresh_mib"`
	Idle   float64 `json:"with_1000_idle_mib"`
	After  float64 `json:"afterwards_mib"`
}

// inTurn lets every target have its turn in every round, each round beginning with another one, so that what the machine does
// meanwhile hits them all alike.
func (s *Series) inTurn(rounds int, targets []string, turn func(target string) (Run, error)) error {
	for round := range rounds {
		for i := range targets {
			target := targets[(round+i)%len(targets)]
			run, err := turn(target)
			if err != nil {
				return err
			}
			run.Round, run.Target = round+1, target
			s.Runs = append(s.Runs, run)
		}
	}
	return nil
}

// failed is a run that has no figures: it is shown at once and in the report.
func (s *Series) failed(target string, err error) Run {
	say("    %s, %s: %.300s", s.What, target, err)
	return Run{Failed: fmt.Sprintf("%.300s", strings.Join(strings.Fields(err.Error()), " "))}
}

// targets are those of the series, in the order in which they are shown.
func (s *Series) targets() []string {
	var all []string
	for _, r := range s.Runs {
		if !slices.Contains(all, r.Target) {
			all = append(all, r.Target)
		}
	}
	slices.SortStableFunc(all, func(a, b string) int { return slices.Index(everyone, a) - slices.Index(everyone, b) })
	return all
}

// Figures of a run. Zero means that there is none.
func rate(r Run) float64     { return r.Rate }
func p50(r Run) float64      { return r.P50 }
func p99(r Run) float64      { return r.P99 }
func proxyCPU(r Run) float64 { return r.ProxyCPU }
func redisCPU(r Run) float64 { return r.RedisCPU }
func queries(r Run) float64  { return r.Queries }

// values are a target's figures, by round.
func (s *Series) values(target string, of func(Run) float64) map[int]float64 {
	m := map[int]float64{}
	if s == nil {
		return m
	}
	for _, r := range s.Runs {
		if v := of(r); r.Target == target && r.Failed == "" && v > 0 {
			m[r.Round] = v
		}
	}
	return m
}

// of is the median of a target's figure and its spread.
func (s *Series) of(target string, of func(Run) float64) Spread {
	var all []float64
	for _, v := range s.values(target, of) {
		all = append(all, v)
	}
	return spread(all)
}

// ratio divides figure by figure within each round, which takes out what the machine was busy with.
func (s *Series) ratio(a string, ofA func(Run) float64, b string, ofB func(Run) float64) Spread {
	as, bs := s.values(a, ofA), s.values(b, ofB)
	var all []float64
	for round, v := range as {
		if w, ok := bs[round]; ok {
			all = append(all, v/w)
		}
	}
	return spread(all)
}

// more is by how much a's figure exceeds b's, within each round.
func (s *Series) more(a, b string, of func(Run) float64) Spread {
	as, bs := s.values(a, of), s.values(b, of)
	var all []float64
	for round, v := range as {
		if w, ok := bs[round]; ok {
			all = append(all, v-w)
		}
	}
	return spread(all)
}

// Spread is a median with the least and the greatest value.
type Spread struct {
	Median, Min, Max float64
	N                int // of how many values; 0: nothing was measured
}

func spread(v []float64) Spread {
	if len(v) == 0 {
		return Spread{}
	}
	v = slices.Sorted(slices.Values(v))
	n := len(v)
	return Spread{(v[(n-1)/2] + v[n/2]) / 2, v[0], v[n-1], n}
}

// quantile of sorted values: the least that the share q does not exceed.
func quantile(sorted []float64, q float64) float64 {
	if len(sorted) == 0 {
		return 0
	}
	return sorted[min(len(sorted)-1, int(q*float64(len(sorted))))]
}

func connections(n int) string {
	if n == 1 {
		return "1 connection"
	}
	return fmt.Sprintf("%d connections", n)
}

func size(n int) string {
	if n >= 1<<10 {
		return fmt.Sprintf("%d KiB", n>>10)
	}
	return fmt.Sprintf("%d B", n)
}
