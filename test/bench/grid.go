//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strconv"
	"strings"
	"time"
)

// fillRedis makes every key that is asked for.
func (s *stack) fillRedis(p plan) error {
	c, err := dial(s.redis.Addr())
	if err != nil {
		return err
	}
	defer c.Close()
	done := map[string]bool{}
	for _, cell := range p.cells {
		for _, target := range cell.targets {
			at := pattern(target, cell.size)
			if done[at] {
				continue
			}
			done[at] = true
			v := value(cell.size)
			for i := 0; i < cell.keys; {
				n := min(cell.keys-i, 1+(1<<20)/cell.size/4)
				for range n {
					c.add("SET", keyOf(target, cell.size, i), v)
					i++
				}
				if err := c.replies(n); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// grid measures every cell with redis-benchmark.
func grid(ctx context.Context, s *stack, p plan, r *Result) error {
	for _, c := range p.cells {
		series := &Series{
			What: fmt.Sprintf("%s, %s, pipeline %d, %s", c.op, connections(c.conns), c.depth, size(c.size)),
			Op:   c.op, Conns: c.conns, Depth: c.depth, Size: c.size,
		}
		say("  %s", series.What)
		r.Grid = append(r.Grid, series)
		rounds := p.otherRounds
		if c.needsMoreTimes {
			rounds = p.rounds
		}
		if err := s.measure(ctx, series, c, rounds, p.slice); err != nil {
			return err
		}
	}
	return nil
}

// measure lets redis-benchmark run for about slice in each turn.
func (s *stack) measure(ctx context.Context, series *Series, c cell, rounds int, slice time.Duration) error {
	rates := map[string]float64{}
	for _, target := range c.targets { // the first run warms up, and tells how many commands fit into a slice
		run, err := s.redisBenchmark(ctx, series, target, c, max(1000, 4*c.conns*c.depth))
		if err != nil {
			return err
		}
		rates[target] = run.Rate
	}
	return series.inTurn(rounds, c.targets, func(target string) (Run, error) {
		n := max(int(rates[target]*slice.Seconds()), 2*c.conns*c.depth)
		run, err := s.redisBenchmark(ctx, series, target, c, n)
		if run.Rate > 0 {
			rates[target] = run.Rate
		}
		return run, err
	})
}

// redisBenchmark sends n commands. What the target answered wrongly is in the run; an error says that nothing could be measured at all.
func (s *stack) redisBenchmark(ctx context.Context, series *Series, target string, c cell, n int) (Run, error) {
	host, port, _ := net.SplitHostPort(s.addrs[target])
	args := []string{"-h", host, "-p", port, "--csv", "-n", strconv.Itoa(n), "-c", strconv.Itoa(c.conns), "-P", strconv.Itoa(c.depth),
		"-r", strconv.Itoa(c.keys), c.op, pattern(target, c.size)}
	if c.op == "SET" {
		args = append(args, value(c.size))
	}
	// redis-benchmark tries for ever to connect to who does not listen, and waits for ever for who does not answer.
	bounded, cancel := context.WithTimeout(ctx, 2*patience)
	defer cancel()
	cmd := command(bounded, s.programs["redis-benchmark"], args...)
	before, err := s.keyspaceMisses()
	if err != nil {
		return Run{}, err
	}
	m, err := s.meter(target)
	if err != nil {
		return Run{}, err
	}
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, failed := cmd.Output()
	if ctx.Err() != nil {
		return Run{}, ctx.Err()
	}
	run, err := parseCSV(string(out))
	if failed = errors.Join(failed, err); failed != nil {
		return series.failed(target, fmt.Errorf("%w: %s", failed, &stderr)), nil
	}
	if err := m.stop(&run, n); err != nil {
		return Run{}, err
	}
	after, err := s.keyspaceMisses()
	if c.op == "GET" && float64(after-before) > float64(n)*ownMisses {
		return series.failed(target, fmt.Errorf("%d of %d keys were not there", after-before, n)), err
	}
	return run, err
}

// ownMisses is the share of misses that may be the proxies' own: they look now and then for keys of their own.
const ownMisses = 0.001

// keyspaceMisses is how often Redis has not found a key: what is measured are hits.
func (s *stack) keyspaceMisses() (int64, error) {
	c, err := dial(s.redis.Addr())
	if err != nil {
		return 0, err
	}
	defer c.Close()
	return c.info("stats", "keyspace_misses")
}

// parseCSV reads what redis-benchmark prints with --csv: a head, and a line whose first field is the command, with quotes as they
// come. So the fields are counted from the end: rate, mean, least, p50, p95, p99, greatest.
func parseCSV(out string) (Run, error) {
	lines := strings.Split(strings.TrimSpace(out), "\n")
	last := lines[len(lines)-1]
	fields := strings.Split(strings.TrimSuffix(last, `"`), `","`)
	const counted = 7
	if len(fields) <= counted || !strings.HasPrefix(lines[0], `"test","rps",`) {
		return Run{}, fmt.Errorf("redis-benchmark printed %.200q", last)
	}
	fields = fields[len(fields)-counted:]
	var v [counted]float64
	for i, f := range fields {
		var err error
		if v[i], err = strconv.ParseFloat(f, 64); err != nil {
			return Run{}, err
		}
	}
	return Run{Rate: v[0], P50: v[3], P99: v[5]}, nil
}
