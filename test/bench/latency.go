//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"slices"
	"sync"
	"syscall"
	"time"
)

const (
	idleClients = 1000
	// settled is how long memory is waited for after connections have come: their goroutines and buffers are there at once.
	settled = 500 * time.Millisecond
)

// memory looks at proxies that have done nothing yet, and then have clients that do nothing.
func memory(_ context.Context, s *stack, _ plan, r *Result) error {
	for _, target := range everyone[1:] {
		m := Memory{Target: target}
		var err error
		if m.Fresh, err = rss(s.pids[target]); err != nil {
			return err
		}
		_, closeAll, err := dialAll(s.addrs[target], idleClients, keyOf(target, 100, 0))
		if err != nil {
			return fmt.Errorf("%d clients of %s: %w", idleClients, target, err)
		}
		time.Sleep(settled)
		m.Idle, err = rss(s.pids[target])
		closeAll()
		if err != nil {
			return err
		}
		r.Memory = append(r.Memory, m)
	}
	return nil
}

// afterwards is what they hold when the load is over.
func afterwards(_ context.Context, s *stack, _ plan, r *Result) (err error) {
	for i := range r.Memory {
		if r.Memory[i].After, err = rss(s.pids[r.Memory[i].Target]); err != nil {
			return err
		}
	}
	return nil
}

// alone measures what one client waits for each answer, who has nothing else under way. redis-benchmark tells latencies by steps of
// 8 us, which is a third of such an answer.
func alone(ctx context.Context, s *stack, p plan, r *Result) error {
	r.Alone = &Series{What: "GET, one connection that waits for each answer, 100 B", Op: "GET", Conns: 1, Depth: 1, Size: 100}
	return r.Alone.inTurn(p.rounds, everyone, func(target string) (Run, error) {
		m, err := s.meter(target)
		if err != nil {
			return Run{}, err
		}
		begun := time.Now()
		took, err := oneByOne(ctx, s.addrs[target], target, p.slice)
		if ctx.Err() != nil {
			return Run{}, ctx.Err()
		}
		if err != nil {
			return r.Alone.failed(target, err), nil
		}
		run := Run{Rate: float64(len(took)) / time.Since(begun).Seconds(), P50: quantile(took, 0.5), P99: quantile(took, 0.99)}
		return run, m.stop(&run, len(took))
	})
}

// oneByOne asks for random keys and returns how long each answer took in ms, sorted. Its reads block, as those of a client in C: to be
// woken by Go's poller would cost a good part of what is measured.
func oneByOne(ctx context.Context, addr, target string, d time.Duration) ([]float64, error) {
	c, err := dial(addr)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	f, err := c.Conn.(*net.TCPConn).File()
	if err != nil {
		return nil, err
	}
	defer f.Close()
	fd := int(f.Fd()) // which makes it block
	bound := syscall.NsecToTimeval(patience.Nanoseconds())
	if err := syscall.SetsockoptTimeval(fd, syscall.SOL_SOCKET, syscall.SO_RCVTIMEO, &bound); err != nil {
		return nil, err
	}
	var took []float64
	reply := make([]byte, 4<<10)
	want := fmt.Sprintf("$100\r\n%s\r\n", value(100))
	for end := time.Now().Add(d); ctx.Err() == nil && time.Now().Before(end); {
		c.buf = c.buf[:0]
		c.add("GET", keyOf(target, 100, rand.IntN(keySpace)))
		since := time.Now()
		if _, err := syscall.Write(fd, c.buf); err != nil {
			return nil, err
		}
		for n := 0; n < len(want); {
			k, err := syscall.Read(fd, reply[n:])
			if errors.Is(err, syscall.EINTR) {
				continue
			}
			if err != nil {
				return nil, err
			}
			if n += k; k == 0 || n < len(want) && reply[0] != '$' || n >= len(want) && string(reply[:n]) != want {
				return nil, fmt.Errorf("the reply is %.100q", reply[:n])
			}
		}
		took = append(took, time.Since(since).Seconds()*1000)
	}
	slices.Sort(took)
	return took, nil
}

const halfLoadConns = 50

// halfLoad gives all targets the same load: half of what the slowest of them could do.
func halfLoad(ctx context.Context, s *stack, p plan, r *Result) error {
	top := r.find("GET", halfLoadConns, 1, 100)
	slowest := 0.0
	for _, target := range routed1 {
		if v := top.of(target, rate); v.N > 0 && (slowest == 0 || v.Median < slowest) {
			slowest = v.Median
		}
	}
	if slowest == 0 {
		return errors.New("no throughput is known")
	}
	r.HalfLoad = &Series{
		What: fmt.Sprintf("GET, %d connections, %.0f commands a second, 100 B", halfLoadConns, slowest/2),
		Op:   "GET", Conns: halfLoadConns, Depth: 1, Size: 100,
	}
	say("  %s", r.HalfLoad.What)
	return r.HalfLoad.inTurn(p.rounds, routed1, func(target string) (Run, error) {
		m, err := s.meter(target)
		if err != nil {
			return Run{}, err
		}
		took, err := paced(ctx, s.addrs[target], target, slowest/2, max(p.slice, time.Second))
		if ctx.Err() != nil {
			return Run{}, ctx.Err()
		}
		if err != nil {
			return r.HalfLoad.failed(target, err), nil
		}
		run := Run{Rate: float64(len(took)) / max(p.slice, time.Second).Seconds(), P50: quantile(took, 0.5), P99: quantile(took, 0.99)}
		return run, m.stop(&run, len(took))
	})
}

// paced asks for random keys at a rate, at random moments, and returns how long each answer took in ms, sorted. A question that had to
// wait for the answer before it has waited since its moment; the client's own lateness does not count.
func paced(ctx context.Context, addr, target string, perSecond float64, d time.Duration) ([]float64, error) {
	clients, closeAll, err := dialAll(addr, halfLoadConns, keyOf(target, 100, 0))
	if err != nil {
		return nil, err
	}
	defer closeAll()
	var (
		wg   sync.WaitGroup
		mu   sync.Mutex
		all  []float64 // guarded by mu
		errs []error   // guarded by mu
	)
	end := time.Now().Add(d)
	for _, c := range clients {
		wg.Go(func() {
			var took []float64
			var err error
			moment := func() time.Duration {
				return time.Duration(rand.ExpFloat64() * halfLoadConns / perSecond * float64(time.Second))
			}
			for next := time.Now().Add(moment()); next.Before(end) && ctx.Err() == nil && err == nil; next = next.Add(moment()) {
				since := next
				if wait := time.Until(next); wait > 0 {
					time.Sleep(wait)
					since = time.Now()
				}
				err = c.gets(keyOf(target, 100, rand.IntN(keySpace)))
				took = append(took, time.Since(since).Seconds()*1000)
			}
			mu.Lock()
			defer mu.Unlock()
			all, errs = append(all, took...), append(errs, err)
		})
	}
	wg.Wait()
	slices.Sort(all)
	return all, errors.Join(errs...)
}
