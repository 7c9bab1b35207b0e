package proxy

import (
	"sync"
	"sync/atomic"
)

// counters is what this sidecar counts. Every field only grows.
type counters struct {
	promotions, refusedPromotions, lostLeases atomic.Int64
	shed, uncertain, rawOnly, fences          atomic.Int64
	commands, unrouted, denied                atomic.Int64
	routes                                    sync.Map // route's name: *routeStat; asked for every command, and hardly ever added to
	mu                                        sync.Mutex
	redisErrors                               map[outage]int64 // guarded by mu
}

// routeStat is one route's reads and writes.
type routeStat struct {
	redisHits, jsonbHits, misses, negative, writes, refused atomic.Int64
}

func newCounters() *counters {
	return &counters{redisErrors: map[outage]int64{}}
}

func (c *counters) redisError(why outage) {
	c.mu.Lock()
	c.redisErrors[why]++
	c.mu.Unlock()
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
		s.misses.Add(1)
	default:
		s.misses.Add(1)
	}
}
