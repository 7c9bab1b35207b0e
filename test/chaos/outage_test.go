package chaos

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"cacheproxy/internal/testenv"

	"github.com/jackc/pgx/v5"
	"github.com/redis/go-redis/v9"
)

// maxStore is what a sidecar may have open to Postgres at once: postgres.max_reads and max_writes by default, two for housekeeping and one for fences.
const maxStore = 8 + 4 + 2 + 1

// Redis dies under many clients of a sidecar in phase1, and comes back empty. No client is told of it.
func TestRedisKill(t *testing.T) {
	c := newCluster(t, options{program: testenv.Program(t)}, "phase1")
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
	var most int64
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
			var n int64
			if err := db.QueryRow(ctx, "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()").Scan(&n); err != nil {
				t.Error(err)
				return
			}
			most = max(most, n)
		}
	})
	time.Sleep(time.Second)
	before := time.Duration(longest.Load())
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
		if err := c.redis().Restart(); err != nil {
			t.Error(err)
		}
		time.Sleep(2 * time.Second)
	}
	close(stop)
	wg.Wait()
	took := c.journals(t)
	if errs.Load() > 0 || stale.Load() > 0 || most > maxStore {
		t.Errorf("%d errors, %d stale reads, at most %d connections to Postgres, of which %d are allowed", errs.Load(), stale.Load(), most, maxStore)
	}
	t.Logf("50 clients, %d commands, Redis killed twice: %d errors, %d stale reads, longest wait %v (before: %v), at most %d connections to Postgres, journals empty %v after the end",
		commands.Load(), errs.Load(), stale.Load(), time.Duration(longest.Load()).Round(ms), before.Round(ms), most, took.Round(ms))
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
