//go:build linux

package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
)

// What the proxy is compared with where Postgres is part of it: an application that keeps JSONB in a table of its own, with no index
// but its key, and speaks to Postgres itself. pgbench plays it.
const (
	oneQuery       = "one query per GET"
	oneTransaction = "one transaction per SET"
	oneWriter      = "one transaction per SET, one connection"
	// oneClient writes through the proxy, and nobody else does: its groups are of one.
	oneClient = "phase1, one client"

	// \gset fails unless there is one row.
	selectScript = `\set k random(0, 99999)
SELECT value FROM app WHERE key = 'app:' || lpad(:k::text, 12, '0') \gset
`
	upsertScript = `\set k random(0, 99999)
INSERT INTO app VALUES ('app:' || lpad(:k::text, 12, '0'), '%s') ON CONFLICT (key) DO UPDATE SET value = excluded.value;
`
)

// cold is the size in the names of keys that only Postgres has.
const cold = 0

// fillPostgres makes the rows of both.
func (s *stack) fillPostgres(ctx context.Context) error {
	return s.sql(ctx, func(c *pgx.Conn) error {
		for _, sql := range []string{
			"CREATE EXTENSION IF NOT EXISTS pg_stat_statements",
			"CREATE TABLE app (key text PRIMARY KEY, value jsonb NOT NULL)",
			fmt.Sprintf("INSERT INTO app SELECT 'app:' || lpad(i::text, 12, '0'), '%s' FROM generate_series(0, %d) i", value(100), keySpace-1),
			fmt.Sprintf(`INSERT INTO cacheproxy.entries (key, value, route, generation, updated_at)
				SELECT '%s%06d:' || lpad(i::text, 12, '0'), '%s', '%s', (SELECT coalesce(max(generation), 0) FROM cacheproxy.generations), now()
				FROM generate_series(0, %d) i`, prefix(phase1), cold, value(100), phase1, keySpace-1),
			"VACUUM ANALYZE",
			"CHECKPOINT",
		} {
			if _, err := c.Exec(ctx, sql); err != nil {
				return fmt.Errorf("fill postgres: %w", err)
			}
		}
		return nil
	})
}

func (s *stack) sql(ctx context.Context, f func(c *pgx.Conn) error) error {
	c, err := pgx.Connect(ctx, s.pgURL)
	if err != nil {
		return err
	}
	return errors.Join(f(c), c.Close(ctx))
}

// counted tells how often Postgres was asked for rows while f ran.
func (s *stack) counted(ctx context.Context, f func() error) (n int, err error) {
	return n, s.sql(ctx, func(c *pgx.Conn) error {
		if _, err := c.Exec(ctx, "SELECT pg_stat_statements_reset()"); err != nil {
			return err
		}
		if err := f(); err != nil {
			return err
		}
		return c.QueryRow(ctx, `SELECT coalesce(sum(calls), 0)::int FROM pg_stat_statements
			WHERE query LIKE '%cacheproxy.entries e%' AND query LIKE '%e.key = ANY%'`).Scan(&n)
	})
}

// forget takes keys out of Redis, as its memory limit would.
func (s *stack) forget(keys []string) error {
	c, err := dial(s.redis.Addr())
	if err != nil {
		return err
	}
	defer c.Close()
	for part := range slices.Chunk(keys, 1000) {
		c.add(append([]string{"UNLINK"}, part...)...)
		if err := c.replies(1); err != nil {
			return err
		}
	}
	return nil
}

// misses are GETs that only Postgres can answer.
func misses(ctx context.Context, s *stack, p plan, r *Result) error {
	order := make([]string, keySpace)
	for i, k := range rand.Perm(keySpace) {
		order[i] = keyOf(phase1, cold, k)
	}
	for _, c := range []struct{ conns, depth int }{{1, 1}, {1, 50}, {8, 50}} {
		series := &Series{
			What: fmt.Sprintf("GET from Postgres, %s, pipeline %d", connections(c.conns), c.depth),
			Op:   "GET", Conns: c.conns, Depth: c.depth, Size: 100,
		}
		say("  %s", series.What)
		r.Misses = append(r.Misses, series)
		d := max(p.slice, time.Second) // pgbench knows only whole seconds
		used := keySpace
		err := series.inTurn(p.otherRounds, []string{oneQuery, phase1}, func(target string) (Run, error) {
			if target == oneQuery {
				return s.pgbench(ctx, selectScript, c.conns, d)
			}
			if err := s.forget(order[:used]); err != nil {
				return Run{}, err
			}
			var run Run
			m, err := s.meter(target)
			if err != nil {
				return run, err
			}
			n, err := s.counted(ctx, func() (err error) {
				run, used, err = ask(ctx, s.addrs[target], order, c.conns, c.depth, d)
				return err
			})
			if ctx.Err() != nil {
				return run, ctx.Err()
			}
			if err != nil {
				used = keySpace
				return series.failed(target, err), nil
			}
			run.Queries = float64(n) / float64(used)
			return run, m.stop(&run, used)
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// ask gets each key once, in pipelines of depth, until d is over or there are no more keys, and tells how many of them it asked for. The
// latency is that of a pipeline.
func ask(ctx context.Context, addr string, keys []string, conns, depth int, d time.Duration) (run Run, used int, err error) {
	clients, closeAll, err := dialAll(addr, conns, keyOf(phase1, 100, 0))
	if err != nil {
		return run, 0, err
	}
	defer closeAll()
	var (
		wg   sync.WaitGroup
		mu   sync.Mutex
		took []float64 // guarded by mu
		errs []error   // guarded by mu
	)
	begun := time.Now()
	for _, c := range clients {
		wg.Go(func() {
			for ctx.Err() == nil && time.Since(begun) < d {
				mu.Lock()
				if used+depth > len(keys) || len(errs) > 0 {
					mu.Unlock()
					return
				}
				mine := keys[used : used+depth]
				used += depth
				mu.Unlock()
				since := time.Now()
				err := c.gets(mine...)
				mu.Lock()
				took = append(took, time.Since(since).Seconds()*1000)
				if err != nil {
					errs = append(errs, err)
				}
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	run.Rate = float64(used) / time.Since(begun).Seconds()
	slices.Sort(took)
	run.P50, run.P99 = quantile(took, 0.5), quantile(took, 0.99)
	return run, used, errors.Join(errs...)
}

// writes are SETs that are in Postgres when they are acknowledged.
func writes(ctx context.Context, s *stack, p plan, r *Result) error {
	c := cell{op: "SET", conns: 50, depth: 1, size: 100, keys: keySpace}
	d := max(p.slice, time.Second)
	r.Writes = &Series{What: "SET, 50 connections, durable in Postgres", Op: c.op, Conns: c.conns, Depth: c.depth, Size: c.size}
	n := map[string]int{phase1: 5000, oneClient: 500}
	return r.Writes.inTurn(p.rounds, []string{oneTransaction, oneWriter, oneClient, phase1}, func(target string) (Run, error) {
		switch target {
		case oneTransaction:
			return s.pgbench(ctx, fmt.Sprintf(upsertScript, value(c.size)), c.conns, d)
		case oneWriter:
			return s.pgbench(ctx, fmt.Sprintf(upsertScript, value(c.size)), 1, d)
		}
		c := c
		if target == oneClient {
			c.conns = 1
		}
		run, err := s.redisBenchmark(ctx, r.Writes, phase1, c, n[target])
		if run.Rate > 0 {
			n[target] = max(2*c.conns, int(run.Rate*d.Seconds()))
		}
		return run, err
	})
}

const herdClients = 500

// herd lets many clients miss one key.
func herd(ctx context.Context, s *stack, p plan, r *Result) error {
	clients, closeAll, err := dialAll(s.addrs[phase1], herdClients, keyOf(phase1, 100, 0))
	if err != nil {
		return err
	}
	defer closeAll()
	for i := range p.rounds {
		h := Herd{Clients: herdClients}
		key := keyOf(phase1, cold, i)
		if err := s.forget([]string{key}); err != nil {
			return err
		}
		h.Queries, err = s.counted(ctx, func() error {
			begun := time.Now()
			for _, c := range clients { // all are under way before the first answer is read
				c.add("GET", key)
				if err := c.flush(); err != nil {
					return err
				}
			}
			var errs []error
			for _, c := range clients {
				errs = append(errs, c.reply())
			}
			h.Seconds = time.Since(begun).Seconds()
			return errors.Join(errs...)
		})
		if err != nil {
			h.Failed = fmt.Sprintf("%.300s", err.Error())
		}
		r.Herd = append(r.Herd, h)
	}
	return ctx.Err()
}

// pgbench runs a script on conns connections. Postgres is as durable as for the proxy: it is the same one.
func (s *stack) pgbench(ctx context.Context, script string, conns int, d time.Duration) (Run, error) {
	dir, err := os.MkdirTemp(s.dir, "pgbench-")
	if err != nil {
		return Run{}, err
	}
	defer os.RemoveAll(dir)
	file := filepath.Join(dir, "script.sql")
	if err := os.WriteFile(file, []byte(script), 0o600); err != nil {
		return Run{}, err
	}
	cmd := command(ctx, s.programs["pgbench"], "-n", "-M", "prepared", "-c", strconv.Itoa(conns), "-j", strconv.Itoa(min(2, conns)),
		"-T", strconv.Itoa(int((d+time.Second-1)/time.Second)), "-l", "--log-prefix", filepath.Join(dir, "log"), "-f", file, s.pgURL)
	out, err := cmd.CombinedOutput()
	if err != nil {
		return Run{}, errors.Join(ctx.Err(), fmt.Errorf("pgbench: %w\n%s", err, out))
	}
	run := Run{}
	if run.Rate, err = parsePgbench(string(out)); err != nil {
		return run, err
	}
	logs, err := filepath.Glob(filepath.Join(dir, "log.*"))
	if err != nil {
		return run, err
	}
	var took []float64
	for _, log := range logs {
		if took, err = readLog(took, log); err != nil {
			return run, err
		}
	}
	slices.Sort(took)
	run.P50, run.P99 = quantile(took, 0.5), quantile(took, 0.99)
	return run, nil
}

// parsePgbench reads the transactions per second that pgbench prints.
func parsePgbench(out string) (float64, error) {
	_, rest, ok := strings.Cut(out, "\ntps = ")
	v, _, _ := strings.Cut(rest, " ")
	if !ok {
		return 0, fmt.Errorf("pgbench printed %.500q", out)
	}
	return strconv.ParseFloat(strings.TrimSpace(v), 64)
}

// readLog adds the milliseconds of each transaction: the third field of a line, in us.
func readLog(took []float64, file string) ([]float64, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		fields := strings.Fields(lines.Text())
		if len(fields) < 3 {
			continue // the last line of a log may be cut off
		}
		us, err := strconv.ParseFloat(fields[2], 64)
		if err != nil {
			return nil, err
		}
		took = append(took, us/1000)
	}
	return took, lines.Err()
}
