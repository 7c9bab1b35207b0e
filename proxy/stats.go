package proxy

import (
	"sync"
	"sync/atomic"

	"cacheproxy/policy"
)

// counters is what this sidecar counts. Every field only grows.
type counters struct {
	promotions, refusedPromotions, failedPromotions atomic.Int64
	lostLeases, lifts                               atomic.Int64
	shed, uncertain, rawOnly, fences                atomic.Int64
	commands, unrouted, denied                      atomic.Int64
	repairs                                         [causes]atomic.Int64 // keys
	routes                                          sync.Map             // route's name: *routeStat; asked for every command, and hardly ever added to
	began                                           sync.Map             // route's name: what stood here when it entered its phase
	protocolErrors                                  atomic.Int64
	took                                            [operations]histogram
	fallback                                        histogram // from a miss until its load is over
	found                                           [foundings]atomic.Int64
	mu                                              sync.Mutex
	redisErrors                                     map[outage]int64 // guarded by mu
}

// cause is a closed list: why a key's copies were made equal again, and by what.
type cause uint8

const (
	redisStaleRow     cause = iota // an entry "Redis is stale": the row is right, and the key was deleted in Redis
	redisStaleNoRow                // such an entry of a key without a row: Redis is right
	bothStale                      // an entry and a mark: the row won
	storeStaleCopied               // a mark "store is stale": the row took what Redis holds
	storeStaleDropped              // such a mark where the phase keeps no rows, or of what can be none: the row went
	restarted                      // Redis was restarted or replaced, and the key deleted there because the row may be newer
	causes
)

func (c cause) String() string {
	return [causes]string{"redis_stale_row", "redis_stale_no_row", "both_stale", "store_stale_copied", "store_stale_dropped", "restart"}[c]
}

// routeStat is one route's reads and writes. A miss that was remembered is in negative, and not in misses.
type routeStat struct {
	redisHits, jsonbHits, misses, negative, writes, refused, noRow atomic.Int64

	verified, unverified atomic.Int64 // hits that were compared, and those that could not be
	mismatches           [mismatches]atomic.Int64
}

func newCounters() *counters {
	return &counters{redisErrors: map[outage]int64{}}
}

func (c *counters) redisError(why outage) {
	c.mu.Lock()
	c.redisErrors[why]++
	c.mu.Unlock()
}

// repaired tells how many keys were repaired for each cause.
func (c *counters) repaired() map[string]int64 {
	out := map[string]int64{}
	for i := range c.repairs {
		out[cause(i).String()] = c.repairs[i].Load()
	}
	return out
}

// unsure is the refusal of a command whose fate is unknown. Whoever makes one answers with it.
func (c *counters) unsure(r *policy.Route, why string) *refusal {
	c.uncertain.Add(1)
	return uncertain(r, why)
}

// route returns the counters of a route; callers keep the pointer.
func (c *counters) route(name string) *routeStat {
	s, ok := c.routes.Load(name)
	if !ok {
		s, _ = c.routes.LoadOrStore(name, &routeStat{})
	}
	return s.(*routeStat)
}

func (s *routeStat) read(from source) {
	switch from {
	case fromRedis:
		s.redisHits.Add(1)
	case fromStore:
		s.jsonbHits.Add(1)
	case fromNegative:
		s.negative.Add(1)
	default:
		s.misses.Add(1)
	}
}

// mismatched tells how many keys differed, by how.
func (s *routeStat) mismatched() map[string]int64 {
	out := map[string]int64{}
	for i := range s.mismatches {
		out[mismatch(i).String()] = s.mismatches[i].Load()
	}
	return out
}
