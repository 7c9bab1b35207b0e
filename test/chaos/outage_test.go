package chaos

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"cacheproxy/internal/testenv"

	"github.com/jackc/pgx/v5"
	"github.com/redis/go-redis/v9"
)

const (
	// maxStore is what a sidecar may have open to Postgres at once: postgres.max_reads and max_writes by default, two for housekeeping and one for fences.
	maxStore = maxLoads + 2 + 1
	// maxLoads is how many queries may look for rows at once: of the reads, and under the locks of the writes.
	maxLoads = 8 + 4
	// maxPause is how long a client may wait for Redis's death, on a machine that lets none wait as long without.
	maxPause = 500 * ms
	// busy is how much longer than when nothing is wrong it may be on another.
	busy = 10
)

// load is how a query begins that looks for rows (fallback/load.go).
const load = "WITH clock AS MATERIALIZED (SELECT clock_timestamp() AS now)"

// Redis dies under many clients of a sidecar in phase1, and comes back empty. No client is told of it.
func TestRedisKill(t *testing.T) {
	c := newCluster(t, options{program: testenv.Program(t), query: patientWait}, "phase1") // a busy store is not to be another outage
	s := c.sidecars[0]
	const keysEach = 20
	var wg sync.WaitGroup
	var commands, errs, stale atomic.Int64
	var longest atomic.Int64 // ns
	var first sync.Once
	stop := make(chan struct{})
	for i := range 50 {
		wg.Go(func() {
			r := client(s.addr)
			defer r.Close()
			rng := rand.New(rand.NewPCG(1, uint64(i)))
			ctx := context.Background()
			var have [keysEach]string
			for n := 0; ; n++ {
				select {
				case <-stop:
					return
				default:
				}
				at := rng.IntN(keysEach)
				key := fmt.Sprintf("kill%d-%d", i, at)
				began := time.Now()
				var err error
				if rng.IntN(3) == 0 {
					value := fmt.Sprint(n)
					if err = r.Set(ctx, key, value, 0).Err(); err == nil {
						have[at] = value
					}
				} else {
					var got string
					got, err = r.Get(ctx, key).Result()
					if errors.Is(err, redis.Nil) {
						got, err = "", nil
					}
					if err == nil && got != have[at] {
						stale.Add(1)
						t.Errorf("%s reads %q, %q was written last", key, got, have[at])
					}
				}
				if err != nil {
					errs.Add(1)
					first.Do(func() { t.Errorf("%s: %v", key, err) })
				}
				commands.Add(1)
				for d := int64(time.Since(began)); ; {
					was := longest.Load()
					if d <= was || longest.CompareAndSwap(was, d) {
						break
					}
				}
			}
		})
	}
	var most, mostLoads int64
	wg.Go(func() {
		ctx := context.Background()
		db, err := pgx.Connect(ctx, c.pg.URL("app"))
		if err != nil {
			t.Error(err)
			return
		}
		defer db.Close(ctx) //nolint:errcheck // it was only read from
		for {
			select {
			case <-stop:
				return
			case <-time.After(2 * ms):
			}
			var n, loads int64
			if err := db.QueryRow(ctx, "SELECT count(*), count(*) FILTER (WHERE state = 'active' AND strpos(query, $1) > 0) FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()", load).Scan(&n, &loads); err != nil {
				t.Error(err)
				return
			}
			most, mostLoads = max(most, n), max(mostLoads, loads)
		}
	})
	info := client(s.addr)
	defer info.Close()
	hits := func() (n int) {
		text, err := info.Info(context.Background(), "cacheproxy").Result()
		_, rest, found := strings.Cut(text, "\nredis_hits:")
		if err == nil && !found {
			err = errors.New("no redis_hits in INFO")
		}
		if err == nil {
			n, err = strconv.Atoi(strings.Fields(rest)[0])
		}
		if err != nil {
			t.Error(err)
		}
		return n
	}
	time.Sleep(time.Second)
	calm, pause := time.Duration(longest.Swap(0)), time.Duration(0)
	for _, empty := range []bool{true, false} {
		if empty {
			if err := c.forget(c.redis()); err != nil {
				t.Error(err)
			}
		} else if _, err := ask(c.redis(), "SAVE"); err != nil {
			t.Error(err)
		}
		time.Sleep(300 * ms)
		if err := c.redis().Kill(); err != nil {
			t.Error(err)
		}
		time.Sleep(2 * time.Second)
		had := hits()
		if err := c.redis().Restart(); err != nil {
			t.Error(err)
		}
		soon(t, "Redis answers again", func() error {
			if n := hits() - had; n < 1000 {
				return fmt.Errorf("%d hits", n)
			}
			return nil
		})
		time.Sleep(time.Second)
		pause = max(pause, time.Duration(longest.Swap(0)))
		time.Sleep(time.Second)
		calm = max(calm, time.Duration(longest.Swap(0)))
	}
	close(stop)
	wg.Wait()
	took := c.journals(t)
	if errs.Load() > 0 || stale.Load() > 0 || most > maxStore || mostLoads > maxLoads || mostLoads == 0 {
		t.Errorf("%d errors, %d stale reads, at most %d connections to Postgres, of which %d are allowed, and %d queries for rows, of which %d are", errs.Load(), stale.Load(), most, maxStore, mostLoads, maxLoads)
	}
	if pause > max(maxPause, busy*calm) {
		t.Errorf("a client waited %v, and %v when nothing was wrong", pause, calm)
	}
	t.Logf("50 clients, %d commands, Redis killed twice: %d errors, %d stale reads, longest wait %v (%v when nothing was wrong), at most %d connections to Postgres and %d queries for rows, journals empty %v after the end",
		commands.Load(), errs.Load(), stale.Load(), pause.Round(ms), calm.Round(ms), most, mostLoads, took.Round(ms))
}

// A failover loses writes that were acknowledged. In phase1 none of them is missing or stale, through any sidecar, from the first answer on.
func TestFailoverLosesNothing(t *testing.T) {
	c := newCluster(t, options{program: testenv.Program(t)}, "phase1", "phase1")
	const keys = 3000
	write := func(value string) {
		r := client(c.sidecars[0].addr)
		defer r.Close()
		for n := 0; n < keys; n += 100 {
			p := r.Pipeline()
			for i := range 100 {
				p.Set(context.Background(), fmt.Sprint("lost", n+i), value, 0)
			}
			if _, err := p.Exec(context.Background()); err != nil {
				t.Fatal(err)
			}
		}
	}
	c.replicate(t)
	write("old")
	replica := client(c.other().Addr())
	defer replica.Close()
	soon(t, "the replica has them", func() error {
		n, err := replica.Exists(context.Background(), fmt.Sprint("lost", keys-1)).Result()
		if err == nil && n == 0 {
			err = errors.New("not yet")
		}
		return err
	})
	c.copies[c.inUse()].Cut()
	write("new")
	dead := c.redis()
	if err := dead.Kill(); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	if err := c.failOver(); err != nil {
		t.Fatal(err)
	}
	if got, err := replica.Get(context.Background(), "lost0").Result(); err != nil || got != "old" {
		t.Fatalf("the replica has %q, %v: nothing was lost", got, err)
	}
	var reads, stale, refused int
	var last time.Duration
	conns := []*redis.Client{client(c.sidecars[0].addr), client(c.sidecars[1].addr)}
	defer conns[0].Close()
	defer conns[1].Close()
	for n := 0; time.Since(began) < 3*time.Second || n < 2*keys; n++ {
		got, err := conns[n%2].Get(context.Background(), fmt.Sprint("lost", n/2%keys)).Result()
		reads++
		switch {
		case err != nil && !errors.Is(err, redis.Nil):
			refused++
			last = time.Since(began)
		case got != "new":
			stale++
		}
	}
	if stale > 0 || last > 2*time.Second {
		t.Errorf("%d of %d reads were missing or stale; %d were refused, the last %v after the failover", stale, reads, refused, last)
	}
	c.ready(t)
	t.Logf("%d acknowledged writes lost by Redis; %d reads from the failover on, %d missing or stale, %d refused", keys, reads, stale, refused)
	if err := dead.Restart(); err != nil {
		t.Error(err)
	}
}
