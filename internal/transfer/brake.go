package transfer

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"cacheproxy/proxy"
)

const (
	// brakeEvery is how often the brake judges: a few dozen steps when all is well, and soon enough to matter when it is not.
	brakeEvery = 500 * time.Millisecond
	// slower times its own best is what a store may take before it counts as loaded: our own workers account for some of it.
	slower = 4
	// What a step may always take. A script over a batch occupies Redis for a millisecond or two, and others wait for it; a load of a
	// batch takes a few milliseconds of a database that is well.
	redisFine = 20 * time.Millisecond
	storeFine = 80 * time.Millisecond
)

// brake decides how many batches are under way at once. While both stores answer about as fast as they did at best there are more and more; when one of them
// slows down, whoever causes it, they are halved, down to one with a rest after it.
type brake struct {
	most int
	say  func(format string, args ...any)

	mu     sync.Mutex
	cond   *sync.Cond
	limit  float64 // guarded by mu
	busy   int     // guarded by mu
	closed bool    // guarded by mu
	rest   float64 // guarded by mu: times its own duration that a batch rests, when even one at a time is too much
	judged time.Time
	redis  pulse // guarded by mu
	store  pulse // guarded by mu
	braked bool  // guarded by mu
}

// pulse is how fast one store answers.
type pulse struct {
	seen []time.Duration
	best time.Duration
}

// beat returns the median of what was seen since the last beat, and whether it is too slow.
func (p *pulse) beat(fine time.Duration) (now time.Duration, slow bool) {
	if len(p.seen) == 0 {
		return 0, false
	}
	slices.Sort(p.seen)
	now = p.seen[len(p.seen)/2]
	p.seen = p.seen[:0]
	if p.best == 0 || now < p.best {
		p.best = now
	}
	return now, now > max(fine, slower*p.best)
}

func newBrake(most int, say func(string, ...any)) *brake {
	b := &brake{most: most, limit: float64(most), say: say, judged: time.Now()}
	b.cond = sync.NewCond(&b.mu)
	return b
}

// enter waits for leave to begin a batch.
func (b *brake) enter() {
	b.mu.Lock()
	defer b.mu.Unlock()
	for !b.closed && b.busy >= max(int(b.limit), 1) {
		b.cond.Wait()
	}
	b.busy++
}

// close lets everybody in.
func (b *brake) close() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.closed = true
	b.cond.Broadcast()
}

// leave ends a batch that took so long, and rests if the stores need it.
func (b *brake) leave(ctx context.Context, took time.Duration, s proxy.Spent) {
	b.mu.Lock()
	b.busy--
	if s.Redises > 0 {
		b.redis.seen = append(b.redis.seen, s.Redis/time.Duration(s.Redises))
	}
	if s.Loads > 0 {
		b.store.seen = append(b.store.seen, s.Store/time.Duration(s.Loads))
	}
	if time.Since(b.judged) > brakeEvery {
		b.judge()
	}
	rest := time.Duration(b.rest * float64(took))
	b.cond.Broadcast()
	b.mu.Unlock()
	if rest > 0 {
		_ = sleep(ctx, min(rest, longestWait)) // whoever comes next sees that ctx has ended
	}
}

// judge sets the limit. Caller holds mu.
func (b *brake) judge() {
	b.judged = time.Now()
	redis, slowRedis := b.redis.beat(redisFine)
	store, slowStore := b.store.beat(storeFine)
	if !slowRedis && !slowStore {
		if b.rest > 0 {
			b.rest = max(b.rest/2-0.1, 0)
		} else {
			b.limit = min(b.limit+1, float64(b.most))
		}
		if b.braked && b.limit == float64(b.most) {
			b.braked = false
			b.say("the stores answer as before: full speed")
		}
		return
	}
	if b.limit > 1 {
		b.limit = max(b.limit/2, 1)
	} else {
		b.rest = min(2*b.rest+0.5, 8)
	}
	if !b.braked {
		b.braked = true
		why := ""
		if slowStore {
			why = fmt.Sprintf("postgres takes %s for what took %s", round(store), round(b.store.best))
		} else {
			why = fmt.Sprintf("redis takes %s for what took %s", round(redis), round(b.redis.best))
		}
		b.say("slowing down: %s", why)
	}
}

func round(d time.Duration) time.Duration { return d.Round(100 * time.Microsecond) }

// pace keeps a rate: whoever wants n waits until they are due. It belongs to one goroutine.
type pace struct {
	rate float64 // per second; 0: none
	due  time.Time
}

func (p *pace) wait(ctx context.Context, n int) error {
	if p.rate <= 0 {
		return ctx.Err()
	}
	now := time.Now()
	if p.due.Before(now) {
		p.due = now // what was not used is not made up for: a pause would end in a burst
	}
	wait := p.due.Sub(now)
	p.due = p.due.Add(time.Duration(float64(n) / p.rate * float64(time.Second)))
	return sleep(ctx, wait)
}

// size is how many keys a batch has, so that a slow rate is kept evenly and not in bursts.
func (p *pace) size() int {
	if p.rate <= 0 {
		return batchKeys
	}
	return min(max(int(p.rate/10), 1), batchKeys)
}
