package proxy

import (
	"math/bits"
	"sync/atomic"
	"time"
)

// How long things take is counted where it happens, and gathered when somebody asks: a hit costs two additions to a line of memory that
// no other loop writes, and no look at a clock, because its loop and its lane have looked for everybody in their turn.

// monotonic is a clock that does not jump: nanoseconds since the process began.
func monotonic() int64 { return int64(time.Since(processStart)) }

// Bounds of histograms: each is twice the one before. A hit takes some 50 us, and who has waited for 8 s has given up.
const (
	firstBound = 15_625 // ns: the seventh is a millisecond
	numBounds  = 20
)

// histogram counts durations. The last of counts has those above all bounds.
type histogram struct {
	counts [numBounds + 1]atomic.Int64
	sum    atomic.Int64 // ns
}

// observe counts a duration in nanoseconds.
func (h *histogram) observe(ns int64) {
	i := 0
	if ns > firstBound {
		i = min(bits.Len64(uint64(ns-1)/firstBound), numBounds)
	}
	h.counts[i].Add(1)
	h.sum.Add(max(ns, 0))
}

// since observes the time since began, a reading of monotonic.
func (h *histogram) since(began int64) { h.observe(monotonic() - began) }

// Durations is a histogram as it is shown: how many took at most so many seconds.
type Durations struct {
	Count   uint64
	Sum     float64 // seconds
	Buckets map[float64]uint64
}

// durations adds up histograms of the same thing.
func durations(parts ...*histogram) Durations {
	d := Durations{Buckets: make(map[float64]uint64, numBounds)}
	for i := range numBounds + 1 {
		for _, h := range parts {
			d.Count += uint64(h.counts[i].Load())
		}
		if i < numBounds {
			d.Buckets[float64(int64(firstBound)<<i)/1e9] = d.Count
		}
	}
	for _, h := range parts {
		d.Sum += float64(h.sum.Load()) / 1e9
	}
	return d
}

// class is a closed list: what a command is to whoever waits for its reply.
type class uint8

const (
	classOther    class = iota // what the proxy answers itself, what stands in a transaction or needs a connection of its own
	classRead                  // a read-through command on keys of routes
	classWrite                 // a plain write on keys of routes
	classGeneric               // any other command on keys of routes
	classPlain                 // what Redis alone answers: keys of no route, or none
	classBlocking              // what waits for an event; counted, and not timed
	classes
)

func (c class) String() string {
	return [classes]string{"other", "read", "write", "generic", "plain", "blocking"}[c]
}

// verdict is a closed list: what the reply to a command was.
type verdict uint8

const (
	verdictOK      verdict = iota
	verdictError           // an error as Redis words it
	verdictRefused         // a refusal of the proxy's own
	verdicts
)

func (v verdict) String() string { return [verdicts]string{"ok", "error", "refused"}[v] }

// verdictOf tells what a reply is.
func verdictOf(reply []byte) verdict {
	switch {
	case !isError(reply):
		return verdictOK
	case isRefusal(reply):
		return verdictRefused
	}
	return verdictError
}

// commandTimes counts the commands of the clients that share connections to Redis: those of one loop, so that loops do not meet here.
type commandTimes struct {
	took [classes]histogram
	bad  [classes][verdicts]atomic.Int64 // of verdictOK nothing is counted: it is what remains
}

// answered counts a command that has its reply.
func (t *commandTimes) answered(c class, v verdict, ns int64) {
	t.took[c].observe(ns)
	if v != verdictOK {
		t.bad[c][v].Add(1)
	}
}

// operation is a closed list: what the proxy asks a store for on its own account.
type operation uint8

const (
	redisLook       operation = iota // a lease, a look at a key
	redisPromote                     // a value of Postgres
	redisInvalidate                  // a copy that is about to be old
	redisWrite                       // a value or a command of a client
	redisRepair                      // a key or a mark of the journal
	redisPoll                        // the journal
	redisCommand                     // anything else
	storeRead                        // rows
	storeLock                        // the beginning of a transaction: locks, and rows
	storeCommit                      // changes, and the end of it
	storePoll                        // the journal
	operations
)

// names are those of the store and of the operation.
func (o operation) names() (upstream, name string) {
	name = [operations]string{"look", "promote", "invalidate", "write", "repair", "poll", "command", "read", "lock", "commit", "poll"}[o]
	if o < storeRead {
		return "redis", name
	}
	return "postgres", name
}

// found is a closed list: what became of a key that Postgres was asked for.
type found uint8

const (
	foundRow    found = iota
	foundAbsent       // no row, or a dead one
	foundError
	foundTimeout
	foundShed // too many were waiting
	foundings
)

func (f found) String() string {
	return [foundings]string{"found", "absent", "error", "timeout", "shed"}[f]
}

// Timings is how long things have taken, and what became of them.
type Timings struct {
	Commands  []CommandTimes
	Upstreams []UpstreamTimes
	Fallback  Durations        // from a miss until it is known what Postgres has
	Fallbacks map[string]int64 // keys that Postgres was asked for, by what came of it
}

// CommandTimes is about the commands of one class.
type CommandTimes struct {
	Class    string
	Outcomes map[string]int64
	Took     *Durations // nil: not timed
}

// UpstreamTimes is about one thing that a store is asked for.
type UpstreamTimes struct {
	Upstream, Operation string
	Took                Durations
}

// Timings gathers what has been counted.
func (s *Server) Timings() Timings {
	e := s.e
	times := e.up.commandTimes()
	var out Timings
	for c := range classes {
		var parts []*histogram
		var bad [verdicts]int64
		for _, t := range times {
			parts = append(parts, &t.took[c])
			for v := range verdicts {
				bad[v] += t.bad[c][v].Load()
			}
		}
		d := durations(parts...)
		ct := CommandTimes{Class: c.String(), Outcomes: map[string]int64{}, Took: &d}
		bad[verdictOK] = int64(d.Count) - bad[verdictError] - bad[verdictRefused] // what was looked at last is the most
		for v := range verdicts {
			ct.Outcomes[v.String()] = bad[v]
		}
		if c == classBlocking {
			ct.Took = nil
		}
		out.Commands = append(out.Commands, ct)
	}
	for o := range operations {
		upstream, name := o.names()
		out.Upstreams = append(out.Upstreams, UpstreamTimes{upstream, name, durations(&e.stats.took[o])})
	}
	out.Fallback, out.Fallbacks = durations(&e.stats.fallback), map[string]int64{}
	for f := range foundings {
		out.Fallbacks[f.String()] = e.stats.found[f].Load()
	}
	return out
}
