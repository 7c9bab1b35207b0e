package chaos

import (
	"context"
	"math/rand/v2"
	"time"

	"cacheproxy/internal/testenv"
)

// nemesis does harm until stop, and has mended it all when it returns. It counts what it did.
type nemesis struct {
	name string
	// unseen: while it is at work a sidecar may not reach Redis, so that others may miss what is written through it (exception (a) of P3).
	unseen bool
	do     func(r *run, rng *rand.Rand)
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

var nemeses = []nemesis{
	{"nothing", false, func(r *run, _ *rand.Rand) { <-r.stop }},
	{"evict", false, func(r *run, rng *rand.Rand) {
		c := client(r.c.redis.Addr())
		defer c.Close()
		for r.sleep(rng, ms, 4*ms) {
			k := r.key(rng)
			from := r.now()
			c.Del(context.Background(), k.name)
			if rng.IntN(20) == 0 {
				c.Del(context.Background(), "cacheproxy:lease:k:{"+k.name+"}")
			}
			r.forgotten(from, k)
			r.faults.Add(1)
		}
	}},
	{"kill redis", true, func(r *run, rng *rand.Rand) {
		for r.sleep(rng, 700*ms, 1500*ms) {
			from := r.now()
			r.restart(rng, r.c.redis)
			r.forgotten(from, r.all()...)
		}
	}},
	{"pause redis", true, func(r *run, rng *rand.Rand) {
		for r.sleep(rng, 500*ms, 1200*ms) {
			r.must(r.c.redis.Pause())
			r.sleep(rng, 0, 900*ms)
			r.must(r.c.redis.Resume())
			r.faults.Add(1)
		}
	}},
	{"kill postgres", false, func(r *run, rng *rand.Rand) {
		for r.sleep(rng, 700*ms, 1500*ms) {
			r.restart(rng, r.c.pg)
		}
	}},
	{"kill a sidecar", false, func(r *run, rng *rand.Rand) {
		for r.sleep(rng, 300*ms, 900*ms) {
			s := r.c.sidecars[rng.IntN(len(r.c.sidecars))]
			s.kill()
			r.sleep(rng, 0, 200*ms)
			s.start()
			r.faults.Add(1)
		}
	}},
	{"cut from redis", true, func(r *run, rng *rand.Rand) {
		r.links(rng, func(s *sidecar) *testenv.Link { return s.toRedis })
	}},
	{"cut from postgres", false, func(r *run, rng *rand.Rand) {
		r.links(rng, func(s *sidecar) *testenv.Link { return s.toStore })
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
	for r.sleep(rng, 300*ms, 900*ms) {
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

// forgotten notes what Redis may have lost, where it alone holds what was written.
func (r *run) forgotten(from int64, keys ...*key) {
	if r.redisAlone {
		r.lost(from, keys...)
	}
}

func (r *run) must(err error) {
	if err != nil {
		r.c.t.Errorf("nemesis: %v", err)
	}
}
