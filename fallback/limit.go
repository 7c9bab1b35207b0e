package fallback

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"
)

// waitFactor times the cap may wait for a slot. A Postgres that takes 5 ms serves a queue of sixty-four rounds in a third of a second, well
// within one QueryTimeout, and two hundred clients that all write at once fit. What stands behind it would only wait to be refused, so it is
// refused at once.
const waitFactor = 64

// errShed is what Overloaded recognises.
var errShed = errors.New("too many requests at once")

// limiter lets a fixed number in and a bounded number wait.
type limiter struct {
	slots   chan struct{} // one token for each that is in
	maxWait int64
	waiting atomic.Int64
	shed    atomic.Int64 // how many were turned away since the start
	waits   atomic.Int64 // how many have waited, also in vain
	waited  atomic.Int64 // for how long together, in nanoseconds
}

func newLimiter(n int) *limiter {
	return &limiter{slots: make(chan struct{}, n), maxWait: int64(n) * waitFactor}
}

// acquire takes a slot, waiting for one until ctx ends. The error is errShed, alone when the queue was full
// and joined with the cause when ctx ended first: in both cases nothing was asked of Postgres.
func (l *limiter) acquire(ctx context.Context) error {
	select {
	case l.slots <- struct{}{}:
		return nil
	default:
	}
	defer l.waiting.Add(-1)
	if l.waiting.Add(1) > l.maxWait {
		l.shed.Add(1)
		return errShed
	}
	began := time.Now()
	defer func() {
		l.waits.Add(1)
		l.waited.Add(int64(time.Since(began)))
	}()
	select {
	case l.slots <- struct{}{}:
		return nil
	case <-ctx.Done():
		l.shed.Add(1)
		return fmt.Errorf("%w: %w", errShed, ctx.Err())
	}
}

// release gives back what acquire took.
func (l *limiter) release() { <-l.slots }

// LimitStats is one limiter at a moment.
type LimitStats struct {
	Cap     int   // how many may be in at once
	Busy    int   // how many are in
	Waiting int   // how many wait for a slot
	Shed    int64 // how many were turned away since the start
}

func (l *limiter) stats() LimitStats {
	return LimitStats{Cap: cap(l.slots), Busy: len(l.slots), Waiting: int(l.waiting.Load()), Shed: l.shed.Load()}
}
