package proxy

import (
	"strconv"
	"sync"
	"sync/atomic"
	"time"
)

// clocks relates the clocks of both stores to one that runs evenly in this process, so that a moment on the one is known on the other:
// a key ends in both together (P6). The end of a key is decided once, on Redis's clock, which is also the one that clients see in
// EXPIRETIME, and told to both stores as a moment: what a large value takes to get there does not count.
//
// Everywhere in the data path but in rows and changes of the store a moment is one of Redis's.
type clocks struct {
	redis, store offset
}

var processStart = time.Now()

// localNow is this process's own clock in microseconds: the wall's at the start of the process, which does not jump after that.
func localNow() int64 { return processStart.UnixMicro() + time.Since(processStart).Microseconds() }

// redisNow is Redis's clock in Unix milliseconds.
func (c *clocks) redisNow() int64 { return (localNow() + c.redis.mid.Load()) / 1000 }

// toStore turns a moment of Redis's clock into one of the store's; never (-1) stays.
func (c *clocks) toStore(ms int64) int64 { return shift(ms, c.store.mid.Load()-c.redis.mid.Load()) }

// toRedis is the reverse.
func (c *clocks) toRedis(ms int64) int64 { return shift(ms, c.redis.mid.Load()-c.store.mid.Load()) }

// askRedis looks at Redis's clock.
func (c *clocks) askRedis(do func(args ...string) ([]byte, error)) error {
	for i := 0; i <= askAgain && (i == 0 || c.redis.doubtful()); i++ {
		asked := localNow()
		frame, err := do("TIME")
		if err != nil {
			return err
		}
		answered := localNow()
		parts, _ := elements(frame, nil)
		if len(parts) != 2 {
			return &outageError{why: outOther, reply: "TIME answered out of shape"}
		}
		var n [2]int64
		for i, p := range parts {
			text, _ := bulk(p)
			if n[i], err = strconv.ParseInt(string(text), 10, 64); err != nil {
				return &outageError{why: outOther, reply: "TIME answered no number"}
			}
		}
		c.redis.saw(asked, answered, n[0]*1_000_000+n[1])
	}
	return nil
}

func shift(ms, micros int64) int64 {
	if ms < 0 {
		return ms
	}
	return max(ms+(micros+500*sign(micros))/1000, 1) // 0 is no moment to Redis
}

func sign(n int64) int64 {
	if n < 0 {
		return -1
	}
	return 1
}

const (
	// maxDrift is what clocks may run apart, in millionths: NTP slews by 500 at most.
	maxDrift = 500
	// maxDoubt is how many microseconds the answer to "what time is it" may take before it is asked again, at most askAgain times. P6
	// leaves room for ten milliseconds, of which the doubt of each clock takes half of this.
	maxDoubt = 4000
	askAgain = 2
)

// offset is how far a store's clock is ahead of localNow. Every look at it gives bounds: it showed a time after it was asked
// and before the answer came. They hold together for as long as the clock runs evenly, so a quick answer outweighs many slow ones; bounds
// that contradict the others mean that the clock has jumped, or is another server's. Before the first look the clocks are taken
// to be the same.
type offset struct {
	mid    atomic.Int64 // the middle of the bounds, in microseconds
	mu     sync.Mutex
	known  bool  // guarded by mu
	lo, hi int64 // guarded by mu
	at     int64 // guarded by mu: localNow of the last look
}

// saw takes a look into account: asked and answered are localNow, shown is the store's clock, all in microseconds.
func (o *offset) saw(asked, answered, shown int64) {
	o.mu.Lock()
	defer o.mu.Unlock()
	lo, hi := shown-answered, shown-asked
	if o.known {
		drift := (answered - o.at) * maxDrift / 1_000_000
		if l, h := max(lo, o.lo-drift), min(hi, o.hi+drift); l <= h {
			lo, hi = l, h
		}
	}
	o.known, o.lo, o.hi, o.at = true, lo, hi, answered
	o.mid.Store((lo + hi) / 2)
}

// doubt is half of what the bounds leave open, in microseconds.
func (o *offset) doubt() int64 {
	o.mu.Lock()
	defer o.mu.Unlock()
	return (o.hi - o.lo) / 2
}

// doubtful: a quicker answer would help.
func (o *offset) doubtful() bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return !o.known || o.hi-o.lo > maxDoubt
}
