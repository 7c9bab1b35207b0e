//go:build linux

package main

import (
	"fmt"
	"strings"
)

// markdown is the report; name is that of the files beside it.
func markdown(r *Result, name string) string {
	var b strings.Builder
	line := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	form := "full form"
	if r.Quick {
		form = "quick form"
	}
	line("# Benchmark of %s", r.Commit)
	line("")
	line("%s, %s, %d CPUs, %.0f seconds, slices of %.1f s. Medians of the rounds, with the least and the greatest; every round is in [%s.json](%[6]s.json).",
		r.At.Format("2006-01-02 15:04 MST"), form, r.CPUs, r.Seconds, r.Slice, name)
	line("Ratios are taken within each round. %s.", strings.Join(r.Versions, "; "))
	line("")
	line("![Throughput as a share of Redis asked directly](%s.svg)", name)
	line("")
	line("## Bars")
	line("")
	line("| | measured | bar | aim | |")
	line("|---|---|---|---|---|")
	for _, x := range bars {
		s := x.measured(r)
		line("| %s | %s%s | %s | %s | %s |", x.what, s, x.unit, x.limit(x.bar), x.limit(x.aim), x.verdict(s))
	}
	line("")
	line("## Throughput, as a share of Redis asked directly")
	line("")
	header(line, append([]string{"", "Redis, per second"}, everyone[1:]...))
	for _, s := range r.Grid {
		row := []string{s.What, fmt.Sprintf("%.0f", s.of(direct, rate).Median)}
		for _, t := range everyone[1:] {
			row = append(row, s.ratio(t, rate, direct, rate).String())
		}
		line("| %s |", strings.Join(row, " | "))
	}
	line("")
	line("## CPU per 1,000 commands in milliseconds: the proxy's + Redis's")
	line("")
	header(line, append([]string{""}, everyone...))
	for _, s := range r.Grid {
		row := []string{s.What}
		for _, t := range everyone {
			redis := s.of(t, redisCPU)
			switch {
			case redis.N == 0:
				row = append(row, "")
			case t == direct:
				row = append(row, fmt.Sprintf("%.1f", redis.Median))
			default:
				row = append(row, fmt.Sprintf("%.1f + %.1f", s.of(t, proxyCPU).Median, redis.Median))
			}
		}
		line("| %s |", strings.Join(row, " | "))
	}
	line("")
	line("## Latency in milliseconds")
	line("")
	if s := r.HalfLoad; s != nil {
		line("At half load: %s, the same for all, half of what the slowest of them can do.", s.What)
		line("")
		header(line, []string{"", "p50", "p99", "p50 added", "p99 added"})
		for _, t := range s.targets() {
			line("| %s | %s | %s | %s | %s |", t, s.of(t, p50), s.of(t, p99), s.more(t, direct, p50), s.more(t, direct, p99))
		}
		line("")
	}
	line("A hit, and the read of JSONB that it replaces, with one connection that does nothing else:")
	line("")
	header(line, []string{"", "p50", "p99"})
	one, read := r.Alone, findIn(r.Misses, "GET", 1, 1, 100)
	for _, row := range []struct {
		what, target string
		s            *Series
	}{
		{"Redis", direct, one}, {"a hit through phase1", phase1, one}, {"JSONB read from Postgres by its client", oneQuery, read},
		{"a miss through phase1, which reads it and fills Redis", phase1, read},
	} {
		line("| %s | %s | %s |", row.what, row.s.of(row.target, p50), row.s.of(row.target, p99))
	}
	line("")
	line("## Postgres")
	line("")
	header(line, []string{"", "without the proxy, per second", "phase1, per second", "ratio", "queries per GET"})
	for _, s := range append(append([]*Series(nil), r.Misses...), r.Writes) {
		if s == nil {
			continue
		}
		without := oneQuery
		if s == r.Writes {
			without = oneTransaction
		}
		line("| %s | %s | %s | %s | %s |", s.What, s.of(without, rate), s.of(phase1, rate), s.ratio(phase1, rate, without, rate), s.of(phase1, queries))
	}
	line("")
	if w := r.Writes; w != nil {
		line("One transaction per SET by one connection: %s per second; by one client through the proxy: %s. The disk syncs, for all.", w.of(oneWriter, rate), w.of(oneClient, rate))
		line("")
	}
	if len(r.Herd) > 0 {
		var n, ms []float64
		for _, h := range r.Herd {
			if h.Failed == "" {
				n, ms = append(n, float64(h.Queries)), append(ms, h.Seconds*1000)
			}
		}
		line("A herd of %d clients that miss one cold key: %s queries, and the last one is answered after %s ms.", r.Herd[0].Clients, spread(n), spread(ms))
		line("")
	}
	line("## Resident memory in MiB")
	line("")
	header(line, []string{"", "fresh", "with 1,000 idle connections", "after the load"})
	for _, m := range r.Memory {
		line("| %s | %.1f | %.1f | %.1f |", m.Target, m.Fresh, m.Idle, m.After)
	}
	if failed := r.failures(); len(failed) > 0 {
		line("")
		line("## What failed, and is in no figure above")
		line("")
		for _, f := range failed {
			line("- %s", f)
		}
	}
	return b.String()
}

func header(line func(string, ...any), columns []string) {
	line("| %s |", strings.Join(columns, " | "))
	line("|%s", strings.Repeat("---|", len(columns)))
}

// failures names every run that has no figures.
func (r *Result) failures() (all []string) {
	series := append(append([]*Series(nil), r.Grid...), r.Misses...)
	for _, s := range append(series, r.Alone, r.HalfLoad, r.Writes) {
		if s == nil {
			continue
		}
		for _, run := range s.Runs {
			if run.Failed != "" {
				all = append(all, fmt.Sprintf("%s, %s, round %d: %s", s.What, run.Target, run.Round, run.Failed))
			}
		}
	}
	for i, h := range r.Herd {
		if h.Failed != "" {
			all = append(all, fmt.Sprintf("herd %d: %s", i+1, strings.Join(strings.Fields(h.Failed), " ")))
		}
	}
	return all
}

func (b bar) limit(v float64) string {
	switch {
	case v == 0:
		return ""
	case b.most:
		return fmt.Sprintf("≤ %g%s", v, b.unit)
	}
	return fmt.Sprintf("≥ %g%s", v, b.unit)
}

// String is empty where nothing was measured.
func (s Spread) String() string {
	switch s.N {
	case 0:
		return ""
	case 1:
		return figure(s.Median)
	}
	return fmt.Sprintf("%s (%s–%s)", figure(s.Median), figure(s.Min), figure(s.Max))
}

// figure has three digits that mean something.
func figure(v float64) string {
	switch abs := max(v, -v); {
	case abs >= 100:
		return fmt.Sprintf("%.0f", v)
	case abs >= 10:
		return fmt.Sprintf("%.1f", v)
	case abs >= 0.1 || v == 0:
		return fmt.Sprintf("%.2f", v)
	}
	return fmt.Sprintf("%.3f", v)
}
