package transfer

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"cacheproxy/proxy"
)

// Unreachable ends a transfer that has waited in vain.
type Unreachable struct{ Why string }

func (e *Unreachable) Error() string { return e.Why }

// ErrInterrupted ends what was told to stop.
var ErrInterrupted = errors.New("interrupted")

// redisWords say what keeps Redis from working, if it may pass.
var redisWords = map[string]string{
	"refused":     "redis refuses connections",
	"unreachable": "no answer from redis yet",
	"timeout":     "no answer from redis yet",
	"broken":      "the connection to redis broke",
	"loading":     "redis is loading its data",
	"readonly":    "redis is a replica and takes no writes",
	"masterdown":  "redis has lost its primary",
	"misconf":     "redis takes no writes: it cannot save them, or has too few replicas",
	"oom":         "redis has no memory left",
	"busy":        "redis is busy with a script",
}

// errUnverified: what Redis holds may be older than what was acknowledged. A sidecar repairs it as soon as it sees it.
var errUnverified = errors.New("redis has been restarted, and no sidecar has looked at it since")

// trouble says why a step failed if that may pass, "" otherwise.
func (s *Stores) trouble(err error) string {
	if errors.Is(err, errUnverified) {
		return err.Error()
	}
	if word := proxy.RedisTrouble(err); word != "" {
		return redisWords[word]
	}
	return s.Trouble(err)
}

// needsRoom tells that Redis answers and refuses what would change it: nobody's key is at fault.
func needsRoom(err error) bool {
	if errors.Is(err, errUnverified) {
		return true
	}
	switch proxy.RedisTrouble(err) {
	case "oom", "misconf", "readonly", "loading", "busy":
		return true
	}
	return false
}

const (
	// firstWait and longestWait are how long everybody pauses when a store is in trouble: soon again at first, as most trouble is over within a second, and
	// never so often that it adds to it.
	firstWait   = 250 * time.Millisecond
	longestWait = 5 * time.Second
)

// gate makes all workers wait for the same trouble, and says for what. It gives up when nothing has worked for too long.
type gate struct {
	patience time.Duration
	say      func(format string, args ...any)

	mu    sync.Mutex
	since time.Time     // guarded by mu: of the first failure since something worked; zero: all is well
	pause time.Duration // guarded by mu: the last one
	until time.Time     // guarded by mu: when to try again
	told  string        // guarded by mu
}

// worked notes that a step succeeded.
func (g *gate) worked() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.since.IsZero() {
		return
	}
	if g.told != "" {
		g.say("going on after %s", time.Since(g.since).Round(100*time.Millisecond))
	}
	g.since, g.pause, g.told = time.Time{}, 0, ""
}

// failed notes trouble and waits until it is time to try again. The error is that of ctx, or Unreachable.
func (g *gate) failed(ctx context.Context, why string) error {
	g.mu.Lock()
	now := time.Now()
	if g.since.IsZero() {
		g.since = now
	}
	if now.Sub(g.since) > g.patience {
		g.mu.Unlock()
		return &Unreachable{fmt.Sprintf("gave up after %s: %s", g.patience, why)}
	}
	if now.After(g.until) {
		g.pause = min(max(2*g.pause, firstWait), longestWait)
		g.until = now.Add(g.pause)
		// The first pause is a hiccup that nobody need know of.
		if g.pause > firstWait && (g.told != why || g.pause == longestWait) {
			g.told = why
			g.say("waiting for %s: %s", g.pause, why)
		}
	}
	wait := g.until.Sub(now)
	g.mu.Unlock()
	return sleep(ctx, wait)
}

// sleep waits, unless ctx ends first.
func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return nil
	}
}

// patiently repeats f while it meets trouble that may pass.
func patiently(ctx context.Context, s Stores, g *gate, f func() error) error {
	for {
		err := f()
		if err == nil {
			g.worked()
			return nil
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		why := s.trouble(err)
		if why == "" {
			return err
		}
		if err := g.failed(ctx, why); err != nil {
			return err
		}
	}
}

// linkHolder has a connection to Redis, and another one when that is broken. It belongs to one goroutine.
type linkHolder struct {
	peer     *proxy.Peer
	link     *proxy.PeerLink // nil: none
	measured time.Time       // when it last looked at the clocks
}

// measureEvery is how often the clocks of the stores are looked at. They may run apart by half a millisecond a second.
const measureEvery = 5 * time.Second

// get returns a connection.
func (h *linkHolder) get(ctx context.Context) (*proxy.PeerLink, error) {
	if h.link != nil && h.link.Broken() {
		h.close()
	}
	if h.link == nil {
		link, err := h.peer.Dial(ctx)
		if err != nil {
			return nil, err
		}
		h.link, h.measured = link, time.Time{}
	}
	if time.Since(h.measured) > measureEvery {
		if _, err := h.link.Measure(ctx); err != nil {
			return nil, err
		}
		h.measured = time.Now()
	}
	return h.link, nil
}

func (h *linkHolder) close() {
	if h.link != nil {
		h.link.Close()
		h.link = nil
	}
}

func (h *linkHolder) spent() proxy.Spent {
	if h.link == nil {
		return proxy.Spent{}
	}
	return h.link.Spent()
}
