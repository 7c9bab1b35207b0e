package chaos

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/redis/go-redis/v9"
)

// Keys with a TTL that ends (P6). Each is written once, so that what may be read is plain: its value until it ends, and nothing from then on.

// lateness is how much sooner or later than it should a key may end: the promise is some 10 ms, and a busy machine may sleep through as much again and more
// between the moment that a store looks at its clock and the moment that it answers.
const lateness = 150 * time.Millisecond

// lives are the keys that are read just now, and what was wrong.
type lives struct {
	mu    sync.Mutex
	names []string   // guarded by mu: the last ones
	reads []lifeRead // guarded by mu
	wrong []string   // of judgeLives
}

// lifeRead is one read, between from and to, of a key that was set between call and back.
type lifeRead struct {
	name                 string
	ttl                  time.Duration
	call, back, from, to int64
	there                bool
}

// some is one of the keys, or a name that is none.
func (l *lives) some(rng *rand.Rand) string {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.names) == 0 {
		return "none"
	}
	return l.names[rng.IntN(len(l.names))]
}

// spans are times in which something happened.
type spans struct {
	mu  sync.Mutex
	all [][2]int64 // guarded by mu
}

func (s *spans) add(from, to int64) {
	s.mu.Lock()
	s.all = append(s.all, [2]int64{from, to})
	s.mu.Unlock()
}

// meet: one of them overlaps with a time.
func (s *spans) meet(from, to int64) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, a := range s.all {
		if a[0] <= to && from <= a[1] {
			return true
		}
	}
	return false
}

// live writes keys one after the other, and reads each through all sidecars until it has ended.
func (r *run) live(n int) {
	rng := rand.New(rand.NewPCG(r.seed, uint64(5000+n)))
	conns := r.conns()
	defer func() {
		for _, c := range conns {
			c.Close()
		}
	}()
	ctx := context.Background()
	for i := 0; r.sleep(rng, ms, 5*ms); i++ {
		name, ttl := fmt.Sprintf("%st%d-%d", r.prefix, n, i), time.Duration(50+rng.IntN(400))*ms
		r.lives.mu.Lock()
		r.lives.names = append(r.lives.names[max(0, len(r.lives.names)-3):], name)
		r.lives.mu.Unlock()
		call := r.now()
		if conns[rng.IntN(len(conns))].Do(ctx, "SET", name, "v", "PX", ttl.Milliseconds()).Err() != nil {
			continue // or it was set, and nobody knows from when on
		}
		back := r.now()
		for r.now() < back+int64(ttl+2*lateness) && r.sleep(rng, ms, 20*ms) {
			from := r.now()
			err := conns[rng.IntN(len(conns))].Get(ctx, name).Err()
			to := r.now()
			if err == nil || errors.Is(err, redis.Nil) {
				r.lives.mu.Lock()
				r.lives.reads = append(r.lives.reads, lifeRead{name, ttl, call, back, from, to, err == nil})
				r.lives.mu.Unlock()
			}
		}
	}
}

// judgeLives judges all reads, when it is known what was lost meanwhile.
func (r *run) judgeLives() {
	for _, x := range r.lives.reads {
		late := x.from - x.back - int64(x.ttl+lateness)
		early := x.call + int64(x.ttl-lateness) - x.to
		switch {
		case x.there && late > 0:
			r.lives.wrong = append(r.lives.wrong, fmt.Sprintf("%s, that was to live %v, is there %v too long", x.name, x.ttl, time.Duration(late)+lateness))
		case x.there || early <= 0 || r.losses.meet(x.call, x.to):
		case time.Duration(x.from-x.back) < r.most: // not seen yet
		default:
			r.lives.wrong = append(r.lives.wrong, fmt.Sprintf("%s, that was to live %v, is gone %v too soon", x.name, x.ttl, time.Duration(early)+lateness))
		}
	}
}
