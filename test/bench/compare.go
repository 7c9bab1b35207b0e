//go:build linux

package main

import (
	"encoding/json"
	"fmt"
	"os"
	"strings"
)

// load reads what write has written.
func load(file string) (*Result, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	r := new(Result)
	if err := json.Unmarshal(b, r); err != nil {
		return nil, fmt.Errorf("%s is no result of a benchmark: %w", file, err)
	}
	if len(r.Grid) == 0 {
		return nil, fmt.Errorf("%s is no result of a benchmark: it has no figures", file)
	}
	return r, nil
}

// comparison puts two results beside each other, as Markdown: the bars, and of each point of the grid what is the proxy's. Each is a ratio within its
// own run already, so that two runs on one machine may be compared even if it was not equally quick.
func comparison(before, after *Result) string {
	var b strings.Builder
	line := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	line("# Benchmark of %s beside %s", after.Commit, before.Commit)
	line("")
	if before.Quick != after.Quick || before.CPUs != after.CPUs {
		line("They are not of the same form or machine (quick %t and %t, %d and %d CPUs): little can be read from them.", before.Quick, after.Quick, before.CPUs, after.CPUs)
		line("")
	}
	line("Better and worse are said where both have %d rounds at least, and no round of one lies among those of the other.", leastRounds)
	line("")
	columns := []string{"", before.Commit, after.Commit, "change", ""}
	header(line, columns)
	row := func(what, unit string, x, y Spread, most bool) {
		switch {
		case x.N > 0 && y.N > 0:
			line("| %s | %s%s | %s%[3]s | %+.0[5]f %% | %[6]s |", what, x, unit, y, 100*(y.Median/x.Median-1), judge(x, y, most))
		case x.N+y.N > 0:
			line("| %s | %s%s | %s%[3]s |  | not in both |", what, x, unit, y)
		}
	}
	for _, bar := range bars {
		row(bar.what, bar.unit, bar.measured(before), bar.measured(after), bar.most)
	}
	line("")
	line("## Throughput, as a share of Redis asked directly")
	line("")
	header(line, columns)
	for _, s := range after.Grid {
		for _, t := range []string{bare, phase1, phase2, phase3} {
			old := before.find(s.Op, s.Conns, s.Depth, s.Size)
			row(s.What+", "+t, "", old.ratio(t, rate, direct, rate), s.ratio(t, rate, direct, rate), false)
		}
	}
	line("")
	line("## The proxy's CPU per command, beside Redis's own when asked directly")
	line("")
	header(line, columns)
	for _, s := range after.Grid {
		for _, t := range []string{bare, phase1} {
			old := before.find(s.Op, s.Conns, s.Depth, s.Size)
			row(s.What+", "+t, "", old.ratio(t, proxyCPU, direct, redisCPU), s.ratio(t, proxyCPU, direct, redisCPU), true)
		}
	}
	return b.String()
}

// leastRounds: of two runs of the same program with three rounds each, one in ten would be told apart by chance; with five, one in a hundred.
const leastRounds = 5

// judge tells what changed from x to y; most: less is better.
func judge(x, y Spread, most bool) string {
	switch {
	case min(x.N, y.N) < leastRounds:
		return ""
	case y.Min > x.Max && !most, y.Max < x.Min && most:
		return "better"
	case y.Max < x.Min && !most, y.Min > x.Max && most:
		return "**worse**"
	}
	return ""
}
