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
	mu                                        sync.Mutex
	redisErrors                               map[outage]int64      // guarded by mu
	routes                                    map[string]*routeStat // guarded by mu
}

// routeStat is one route's reads and writes.
type routeStat struct {
	redisHits, jsonbHits, misses, negative, writes, refused atomic.Int64
}

func newCounters() *counters {
	return &counters{redisErrors: map[outage]int64{}, routes: map[string]*routeStat{}}
}

func (c *counters) redisError(why outage) {
	c.mu.Lock()
	c.redisErrors[why]++
	c.mu.Unlock()
}

// route returns the counters of a route; callers keep the pointer.
func (c *counters) route(name string) *routeStat {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := c.routes[name]
	if s == nil {
		s = &routeStat{}
		c.routes[name] = s
	}
	return s
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
