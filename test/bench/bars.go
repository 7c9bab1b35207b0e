//go:build linux

package main

import "slices"

// find is the series of a cell; nil: it was not measured.
func (r *Result) find(op string, conns, depth, size int) *Series {
	return findIn(r.Grid, op, conns, depth, size)
}

func findIn(all []*Series, op string, conns, depth, size int) *Series {
	for _, s := range all {
		if s.Op == op && s.Conns == conns && s.Depth == depth && s.Size == size {
			return s
		}
	}
	return nil
}

// bar is what the project demands of itself.
type bar struct {
	what     string
	measured func(r *Result) Spread
	bar, aim float64 // 0: none
	most     bool    // a bar that is not to be exceeded
	unit     string
}

var bars = []bar{
	{"GET hits, 50 connections, no pipeline, against direct", rates(bare, direct, 1), 0.75, 0.95, false, ""},
	{"the same against twemproxy", rates(bare, twem, 1), 0.95, 1.2, false, ""},
	{"the same: Redis's CPU per command, against direct", func(r *Result) Spread {
		return r.find("GET", 50, 1, 100).ratio(bare, redisCPU, direct, redisCPU)
	}, 0, 0.5, true, ""},
	{"GET hits, pipeline 16, against direct", rates(bare, direct, 16), 0.60, 0.80, false, ""},
	{"the same against twemproxy", rates(bare, twem, 16), 2, 3, false, ""},
	{"one connection, no pipeline, p50 latency against direct", func(r *Result) Spread {
		return r.Alone.ratio(bare, p50, direct, p50)
	}, 1.6, 1.3, true, ""},
	{"the proxy's CPU per command against Redis's own when asked directly, no pipeline", func(r *Result) Spread {
		return r.find("GET", 50, 1, 100).ratio(bare, proxyCPU, direct, redisCPU)
	}, 1.5, 1.1, true, ""},
	{"routed (phase1, all hits) against unrouted, no pipeline", rates(phase1, bare, 1), 0.95, 1, false, ""},
	// Two readings of the same bar: what a query per GET costs through the proxy, and what it costs an application that asks Postgres itself.
	{"GET answered from Postgres, pipelined by 50, against one query per GET, one key per command", func(r *Result) Spread {
		batched, single := findIn(r.Misses, "GET", 1, 50, 100), findIn(r.Misses, "GET", 1, 1, 100)
		if batched == nil || single == nil {
			return Spread{}
		}
		both := &Series{Runs: slices.Clone(batched.Runs)}
		for _, run := range single.Runs {
			run.Target += single.What
			both.Runs = append(both.Runs, run)
		}
		return both.ratio(phase1, rate, phase1+single.What, rate)
	}, 10, 15, false, ""},
	{"the same against prepared queries on one connection to Postgres", func(r *Result) Spread {
		return findIn(r.Misses, "GET", 1, 50, 100).ratio(phase1, rate, oneQuery, rate)
	}, 10, 15, false, ""},
	// Three readings: one client of the proxy, whose groups are of one, and pgbench on one connection and on fifty.
	{"phase1 SET, 50 clients, against one transaction per SET: one client", writeRate(oneClient), 10, 15, false, ""},
	{"the same against prepared statements on one connection to Postgres", writeRate(oneWriter), 10, 15, false, ""},
	{"the same on 50 connections, whose commits Postgres itself groups", writeRate(oneTransaction), 10, 15, false, ""},
	{"RSS, 1,000 idle connections", func(r *Result) Spread {
		for _, m := range r.Memory {
			if m.Target == bare {
				return spread([]float64{m.Idle})
			}
		}
		return Spread{}
	}, 40, 20, true, " MiB"},
}

// rates compares the throughput of hits by 50 connections.
func rates(a, b string, depth int) func(r *Result) Spread {
	return func(r *Result) Spread { return r.find("GET", 50, depth, 100).ratio(a, rate, b, rate) }
}

// writeRate compares phase1's SETs by 50 clients.
func writeRate(b string) func(r *Result) Spread {
	return func(r *Result) Spread { return r.Writes.ratio(phase1, rate, b, rate) }
}

// verdict says whether a median passes.
func (b bar) verdict(s Spread) string {
	reaches := func(line float64) bool { return line > 0 && (s.Median >= line) != b.most || s.Median == line }
	switch {
	case s.N == 0:
		return "not measured"
	case b.bar == 0 && b.aim == 0:
		return ""
	case reaches(b.aim):
		return "pass, and the aim"
	case b.bar == 0:
		return "misses the aim"
	case reaches(b.bar):
		return "pass"
	}
	return "**miss**"
}
