package proxy

import (
	"context"
	"hash/maphash"
	"math"
	"math/rand/v2"
	"sync/atomic"
	"time"

	"cacheproxy/policy"

	"go.uber.org/zap"
)

// shadow compares both copies of a share of the keys that Redis has answered for (verify.sample), behind the back of the clients: a hit
// costs them one look at share, and one that is drawn a place in a queue.
//
// The copies are read one after the other, so a difference says nothing by itself: somebody may be at work. It counts when it has been
// the same at several looks, over a longer time than a write or a repair takes, and no journal has named the key meanwhile.
type shadow struct {
	e     *engine
	share atomic.Uint64 // hits are drawn below it, of 2^64; 0: none
	queue chan policy.Ref
	said  map[string]bool // owned by run: route and kind that were logged
}

const (
	// maxShadow keys wait for their comparison: ten seconds of work. Of what was read longer ago little could be said, and the rest is
	// counted as dropped. With keys of 2,000 bytes they are 2 MB.
	maxShadow = 1024
	// shadowBatch keys every shadowEvery are a hundred a second, for each sidecar: one query and one script of 10 keys. That is noticed by neither
	// store, and in an hour finds what one key in a hundred thousand has.
	shadowBatch = 10
	shadowEvery = 100 * time.Millisecond
	// shadowBytes of values are compared at once, or one value. They come over the connection by whose answers Redis is judged: ten megabytes on a slow link would
	// pass for an outage. A value that has grown to twice as much since it was drawn (see largeReply) is not compared.
	shadowBytes = 1 << 20
	// shadowLooks at a difference must be the same, shadowPause or half a poll apart, so that they span more than a poll and more than clockSlack.
	shadowLooks = 4
	shadowPause = 500 * time.Millisecond
	// shadowTries looks at a key that is different each time are enough: it is written too often to be compared.
	shadowTries = 20
)

// mismatch is a closed list: how the copies of a key differ.
type mismatch uint8

const (
	missing   mismatch = iota // the store lacks what Redis serves, or calls it deleted
	otherData                 // they hold different values, or Redis something else than a string
	otherLife                 // they end at different times
	mismatches
	alike = mismatches
)

func (m mismatch) String() string { return [mismatches]string{"missing", "value", "ttl"}[m] }

func newShadow(e *engine) *shadow {
	return &shadow{e: e, queue: make(chan policy.Ref, maxShadow), said: map[string]bool{}}
}

// set changes the share, from 0 to 1.
func (sh *shadow) set(share float64) {
	switch {
	case !(share > 0):
		sh.share.Store(0)
	case share >= 1:
		sh.share.Store(math.MaxUint64)
	default:
		sh.share.Store(max(1, uint64(share*float64(1<<63)*2)))
	}
}

// SetSample replaces verify.sample: the share of hits, from 0 to 1, whose two copies are compared.
func (s *Server) SetSample(share float64) { s.e.shadow.set(share) }

// draw decides whether a hit is looked at.
func (sh *shadow) draw(share uint64) bool { return share == math.MaxUint64 || rand.Uint64() < share }

// sample draws from the keys that Redis has just answered for.
func (s *session) sample(sl *slot, share uint64) {
	if !isOneOf(sl.args[0], "get", "mget") {
		return // GET and MGET alone: what else reads a key may have been asked so as not to move a large value
	}
	for i, r := range sl.routes {
		if r != nil && r.Phase.Rules().UsesStore {
			s.e.shadow.take(share, r, sl.args[sl.keys[i].Arg])
		}
	}
}

// take draws one key. It may be called with the session's lock held, and waits for nobody.
func (sh *shadow) take(share uint64, r *policy.Route, key []byte) {
	if !sh.draw(share) {
		return
	}
	select {
	case sh.queue <- policy.Ref{Route: r.Name, Key: string(key)}:
	default:
		sh.e.stats.route(r.Name).unverified.Add(1)
	}
}

// suspect is a key whose copies seemed to differ.
type suspect struct {
	ref   policy.Ref
	kind  mismatch
	print uint64 // of both copies
	looks int    // that showed the same
	tries int    // all looks
	next  time.Time
}

// run compares until ctx ends.
func (sh *shadow) run(ctx context.Context) {
	var suspects []suspect
	wait := time.NewTimer(0)
	defer wait.Stop()
	for {
		var due <-chan time.Time
		if len(suspects) > 0 {
			due = wait.C
		}
		var batch []suspect
		select {
		case <-ctx.Done():
			return
		case ref := <-sh.queue:
			batch = append(batch, suspect{ref: ref, kind: alike})
		case <-due:
		}
		now := time.Now()
		for len(suspects) > 0 && len(batch) < shadowBatch && !suspects[0].next.After(now) {
			batch, suspects = append(batch, suspects[0]), suspects[1:]
		}
		for more := true; more && len(batch) < shadowBatch; {
			select {
			case ref := <-sh.queue:
				batch = append(batch, suspect{ref: ref, kind: alike})
			default:
				more = false
			}
		}
		for _, again := range sh.compare(ctx, batch) {
			if len(suspects) >= maxShadow {
				sh.e.stats.route(again.ref.Route).unverified.Add(1)
				continue
			}
			suspects = append(suspects, again) // all wait equally long, so they stay in order
		}
		// The rate is bounded here, however many keys wait.
		select {
		case <-ctx.Done():
			return
		case <-time.After(shadowEvery):
		}
		if len(suspects) > 0 {
			wait.Reset(max(0, time.Until(suspects[0].next)))
		}
	}
}

// compare looks at both copies of each key and returns what must be looked at again.
func (sh *shadow) compare(ctx context.Context, batch []suspect) (again []suspect) {
	e := sh.e
	router := e.router.Load()
	var keys []string
	var routes []*policy.Route
	var asked []suspect
	for _, s := range batch {
		r := router.Match([]byte(s.ref.Key))
		if r == nil || r.Name != s.ref.Route || !r.Phase.Rules().UsesStore || !r.Phase.Rules().ReadsRedis {
			continue // the routes or phases have changed
		}
		keys, routes, asked = append(keys, s.ref.Key), append(routes, r), append(asked, s)
	}
	if len(asked) == 0 {
		return nil
	}
	drop := func() {
		for _, s := range asked {
			e.stats.route(s.ref.Route).unverified.Add(1)
		}
	}
	if !e.up.trusted() || !e.store.up.Load() {
		drop()
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, e.cfg.StoreTimeout)
	defer cancel()
	weights, err := e.up.script(ctx, scriptWeigh, keys)
	if err != nil {
		e.redisFailed(err)
		drop()
		return nil
	}
	all, were := asked, routes
	keys, routes, asked = nil, nil, nil
	var refs []policy.Ref
	size := int64(0)
	for i, s := range all {
		switch weight := weights[i].at; {
		case weight > 2*shadowBytes:
			e.stats.route(s.ref.Route).unverified.Add(1)
		case size > 0 && size+weight > shadowBytes:
			s.next = time.Now().Add(sh.pause())
			again = append(again, s)
		default:
			size += weight
			keys, refs, routes, asked = append(keys, s.ref.Key), append(refs, s.ref), append(routes, were[i]), append(asked, s)
		}
	}
	if len(asked) == 0 {
		return again
	}
	reds, err := e.up.script(ctx, scriptRead, keys, "0")
	if err != nil {
		e.redisFailed(err)
		drop()
		return again
	}
	rows, err := e.store.load(ctx, refs)
	if err != nil {
		drop()
		return again
	}
	for i, s := range asked {
		stat := e.stats.route(s.ref.Route)
		kind := e.differs(routes[i], reds[i], rows[i])
		if kind == alike || reds[i].mark != "" || e.journal.staleRedis(s.ref.Key) || e.journal.staleStore(s.ref.Key) {
			stat.verified.Add(1)
			continue
		}
		if print := printOf(reds[i], rows[i]); kind == s.kind && print == s.print {
			s.looks++
		} else {
			s.kind, s.print, s.looks = kind, print, 1
		}
		s.tries++
		switch {
		case s.looks >= shadowLooks:
			stat.verified.Add(1)
			stat.mismatches[kind].Add(1)
			if what := s.ref.Route + "\x00" + kind.String(); !sh.said[what] {
				sh.said[what] = true
				e.log.Warn("the copies of a key differ; metrics count what follows, and CACHEPROXY DIFF compares", zap.String("route", s.ref.Route), zap.Stringer("kind", kind))
			}
		case s.tries >= shadowTries:
			stat.unverified.Add(1)
		default:
			s.next = time.Now().Add(sh.pause())
			again = append(again, s)
		}
	}
	return again
}

// pause is the time between two looks at a key.
func (sh *shadow) pause() time.Duration { return max(sh.e.cfg.Poll/2, shadowPause) }

var printSeed = maphash.MakeSeed()

// printOf is a print of what both stores have of a key: another one means that somebody has written it.
func printOf(redis keyReply, row policy.Row) uint64 {
	var h maphash.Hash
	h.SetSeed(printSeed)
	maphash.WriteComparable(&h, [5]int64{redis.code, redis.num, int64(len(redis.value)), int64(row.State), row.ExpiresAt})
	_, _ = h.Write(redis.value) // never fails
	_, _ = h.Write(row.Value)
	return h.Sum64()
}

// differs tells whether two copies that nobody is writing contradict each other in the phase of their route.
//
//   - Where rows are kept, what Redis has must be there, and the same. Without a row it may still be Redis's alone, if some sidecar serves or served the
//     route in a phase that keeps none.
//   - Where they go, a row may still stand that no one has written since: then it is the same. One that differs would come back when Redis forgets the key.
//   - Where they are not read, somebody may serve the route without them, who tells the store nothing; its rows will be fenced.
func (e *engine) differs(r *policy.Route, redis keyReply, row policy.Row) mismatch {
	rules := r.Phase.Rules()
	switch {
	case redis.code != keyValue && redis.code != keyOther:
		return alike // it has gone since: a read asks the store
	case row.State == policy.NoRow:
		return alike
	case row.State == policy.Absent:
		if rules.Write.KeepsRow() && redis.code == keyValue && !e.mayBeInRedis(r) {
			return missing
		}
		return alike
	case !rules.ReadsStore && e.servedWithout(r):
		return alike
	case row.State == policy.Tombstone:
		if redis.code == keyOther {
			return alike // a list, say, made since
		}
		return missing
	case redis.code == keyOther || !same(r, redis.value, row.Value):
		return otherData
	}
	if ends := e.clocks.toRedis(row.ExpiresAt); (redis.at < 0) != (ends < 0) || redis.at >= 0 && abs(redis.at-ends) > clockSlack {
		return otherLife
	}
	return alike
}

// servedWithout: some sidecar serves or served the route without its store, since the last fence.
func (e *engine) servedWithout(r *policy.Route) bool {
	e.journal.mu.Lock()
	words := e.journal.phases[r.Name]
	e.journal.mu.Unlock()
	for _, w := range words {
		if p, err := policy.ParsePhase(w); err == nil && !p.Rules().UsesStore {
			return true
		}
	}
	return false
}
