package chaos

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strconv"
	"strings"
	"time"

	"cacheproxy/internal/testenv"

	"github.com/redis/go-redis/v9"
)

// nemesis does harm until r.stop, and has mended it all when it returns. It counts what it did.
type nemesis struct {
	name string
	// apart: while it is at work a sidecar may not reach Redis while others do, so that they may miss what is written through it (exception (a) of P3). That is so
	// too where all lose it at once: they do not find out at the same moment that it is back.
	apart bool
	// storeless: Postgres may not be reached, so that what is acknowledged stands in Redis alone (exception (b)).
	storeless bool
	// forgets: Redis forgets keys all the time.
	forgets bool
	// once: it ends by itself, and the run with it.
	once bool
	// flushes: it says FLUSHALL through sidecars.
	flushes bool
	do      func(r *run, rng *rand.Rand)
}

// sleep waits between min and max. false: it is over.
func (r *run) sleep(rng *rand.Rand, min, max time.Duration) bool {
	select {
	case <-r.stop:
		return false
	case <-time.After(min + time.Duration(rng.Int64N(int64(max-min)))):
		return true
	}
}

const ms = time.Millisecond

// calm is the nemesis that does no harm.
const calm = "nothing"

var nemeses = []nemesis{
	{name: calm, do: func(r *run, _ *rand.Rand) { <-r.stop }},
	{name: "evict", do: func(r *run, rng *rand.Rand) {
		c := client(r.c.redis().Addr())
		defer c.Close()
		for r.sleep(rng, ms, 4*ms) {
			k := r.key(rng)
			from := r.now()
			c.Del(context.Background(), k.name, r.lives.some(rng))
			if rng.IntN(20) == 0 {
				c.Del(context.Background(), "cacheproxy:lease:k:{"+k.name+"}")
			}
			r.forgotten(from, k)
			r.faults.Add(1)
		}
	}},
	{name: "no memory", forgets: true, do: func(r *run, rng *rand.Rand) {
		// Others fill Redis, which forgets what was used least, ours among it.
		c := client(r.c.redis().Addr())
		defer c.Close()
		ctx := context.Background()
		r.must(c.ConfigSet(ctx, "maxmemory-policy", "allkeys-lru").Err())
		info, err := c.Info(ctx, "memory").Result()
		r.must(err)
		_, rest, _ := strings.Cut(info, "used_memory:")
		used, err := strconv.Atoi(strings.Fields(rest)[0])
		r.must(err)
		r.must(c.ConfigSet(ctx, "maxmemory", fmt.Sprint(used+512<<10)).Err())
		junk := make([]byte, 4<<10)
		for i := 0; r.sleep(rng, ms, 2*ms); i++ {
			c.Set(ctx, fmt.Sprint("junk", i%1000), junk, 0)
			r.faults.Add(1)
		}
		r.must(c.ConfigSet(ctx, "maxmemory", "0").Err())
		if r.redisAlone {
			r.losses.add(0, never)
		}
	}},
	{name: "kill redis", apart: true, do: func(r *run, rng *rand.Rand) {
		for r.sleep(rng, 300*ms, 900*ms) {
			from := r.now()
			r.must(r.c.forget(r.c.redis()))
			r.restart(rng, r.c.redis())
			r.forgotten(from, r.all()...)
		}
	}},
	{name: "old redis", apart: true, do: func(r *run, rng *rand.Rand) {
		for r.sleep(rng, 100*ms, 400*ms) {
			from := r.now()
			if _, err := ask(r.c.redis(), "SAVE"); err != nil {
				r.must(err)
			}
			r.sleep(rng, 50*ms, 400*ms)
			r.restart(rng, r.c.redis())
			r.reverted(from)
		}
		r.must(r.c.forget(r.c.redis()))
	}},
	{name: "fail over", apart: true, do: func(r *run, rng *rand.Rand) {
		for r.sleep(rng, ms, 100*ms) {
			r.c.replicate(r.t)
			r.sleep(rng, 100*ms, 500*ms)
			from := r.now()
			old := r.c.redis()
			r.c.copies[r.c.inUse()].Cut()
			r.sleep(rng, ms, 200*ms) // what is acknowledged meanwhile is lost
			r.must(old.Kill())
			r.sleep(rng, ms, 200*ms)
			r.must(r.c.failOver())
			r.reverted(from)
			r.must(old.Restart())
			r.must(r.c.forget(old))
			r.faults.Add(1)
		}
	}},
	{name: "pause redis", apart: true, do: func(r *run, rng *rand.Rand) {
		for r.sleep(rng, 300*ms, 900*ms) {
			r.must(r.c.redis().Pause())
			r.sleep(rng, 0, 900*ms)
			r.must(r.c.redis().Resume())
			r.faults.Add(1)
		}
	}},
	{name: "kill postgres", storeless: true, do: func(r *run, rng *rand.Rand) {
		for r.sleep(rng, 300*ms, 900*ms) {
			r.restart(rng, r.c.pg)
		}
	}},
	{name: "pause postgres", storeless: true, do: func(r *run, rng *rand.Rand) {
		for r.sleep(rng, 300*ms, 900*ms) {
			r.must(r.c.pg.Pause())
			r.sleep(rng, 0, 900*ms)
			r.must(r.c.pg.Resume())
			r.faults.Add(1)
		}
	}},
	{name: "kill a sidecar", do: func(r *run, rng *rand.Rand) {
		for r.sleep(rng, 100*ms, 500*ms) {
			s := r.c.sidecars[rng.IntN(len(r.c.sidecars))]
			s.kill()
			r.sleep(rng, 0, 200*ms)
			s.start()
			r.faults.Add(1)
		}
	}},
	{name: "cut from redis", apart: true, do: func(r *run, rng *rand.Rand) {
		r.links(rng, func(s *sidecar) *testenv.Link { return s.toRedis })
	}},
	{name: "cut from postgres", storeless: true, do: func(r *run, rng *rand.Rand) {
		r.links(rng, func(s *sidecar) *testenv.Link { return s.toStore })
	}},
	{name: "half-open redis", apart: true, do: func(r *run, rng *rand.Rand) {
		r.halfOpen(rng, func(s *sidecar) *testenv.Link { return s.toRedis })
	}},
	{name: "half-open postgres", storeless: true, do: func(r *run, rng *rand.Rand) {
		r.halfOpen(rng, func(s *sidecar) *testenv.Link { return s.toStore })
	}},
	{name: "flush", flushes: true, do: func(r *run, rng *rand.Rand) {
		for r.sleep(rng, 50*ms, 200*ms) {
			r.flush(rng)
			r.faults.Add(1)
		}
	}},
}

// restart is kill -9, and a start a little later.
func (r *run) restart(rng *rand.Rand, server interface {
	Kill() error
	Restart() error
}) {
	r.must(server.Kill())
	r.sleep(rng, 0, 500*ms)
	r.must(server.Restart())
	r.faults.Add(1)
}

// links cuts, freezes and slows one sidecar's link at a time.
func (r *run) links(rng *rand.Rand, of func(*sidecar) *testenv.Link) {
	for r.sleep(rng, 100*ms, 500*ms) {
		l := of(r.c.sidecars[rng.IntN(len(r.c.sidecars))])
		switch rng.IntN(3) {
		case 0:
			l.Cut()
		case 1:
			l.Freeze()
		case 2:
			l.Delay(time.Duration(1+rng.IntN(100)) * ms)
		}
		r.sleep(rng, 50*ms, 900*ms)
		l.Heal()
		r.faults.Add(1)
	}
}

// halfOpen loses for a while what one sidecar says, or what it is answered; its connections lead nowhere from then on, and nobody is told.
func (r *run) halfOpen(rng *rand.Rand, of func(*sidecar) *testenv.Link) {
	for r.sleep(rng, 100*ms, 500*ms) {
		l := of(r.c.sidecars[rng.IntN(len(r.c.sidecars))])
		l.Drop(rng.IntN(2) == 0)
		r.sleep(rng, 50*ms, 900*ms)
		l.Heal()
		r.faults.Add(1)
	}
}

// forgotten notes what Redis may have lost since from, where it alone holds what was written.
func (r *run) forgotten(from int64, keys ...*key) {
	if r.redisAlone {
		r.lost(from, gone, keys...)
	}
}

// reverted notes that Redis has another memory than it had at from, in which any key may be as it was at any time before.
func (r *run) reverted(from int64) {
	if r.redisAlone {
		r.lost(from, older, r.all()...)
	}
}

func (r *run) must(err error) {
	if err != nil {
		r.t.Errorf("nemesis: %v", err)
	}
}

// step moves the fleet by one phase, sidecar by sidecar.
func (r *run) step(rng *rand.Rand, phase string) {
	for _, i := range rng.Perm(len(r.c.sidecars)) {
		s := r.c.sidecars[i]
		s.configure(r.c, phase)
		soon(r.t, "the sidecar serves "+phase, s.serves)
		r.faults.Add(1)
		r.sleep(rng, 20*ms, 200*ms)
	}
}

// journey moves the fleet through all phases and back while clients go on. Before drain what only the store has is read, and so promoted; before phase0 what only
// Redis has is touched, and so copied into the store: what migrate and migrate --reverse are for.
var journey = nemesis{name: "phases", once: true, do: func(r *run, rng *rand.Rand) {
	for _, phase := range []string{"phase1", "phase2", "drain", "phase3", "drain", "phase2", "phase1", "phase0"} {
		switch phase {
		case "drain":
			r.each(r.names(), "GET")
			r.each(r.names(), "GET") // what was just being loaded by another was not promoted
		case "phase0":
			r.each(append(r.names(), r.lives.lasting()...), "EXPIRE", long)
		}
		r.step(rng, phase)
		r.sleep(rng, 500*ms, time.Second)
		if r.t.Failed() {
			return
		}
	}
}}

// names are those of all keys that there have been.
func (r *run) names() (names []string) {
	for _, k := range r.all() {
		names = append(names, k.name)
	}
	return names
}

// each says a command about every key.
func (r *run) each(names []string, command string, args ...any) {
	c := client(r.c.sidecars[0].addr)
	defer c.Close()
	for _, name := range names {
		soon(r.t, command+" "+name, func() error {
			err := c.Do(context.Background(), append([]any{command, name}, args...)...).Err()
			if errors.Is(err, redis.Nil) {
				err = nil
			}
			return err
		})
	}
}
