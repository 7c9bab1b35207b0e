package transfer

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"cacheproxy/policy"
	"cacheproxy/proxy"
)

// Options say what is to be copied, and how.
type Options struct {
	Route  *policy.Route
	Router *policy.Router // to which Route belongs: a key that an earlier route matches is not Route's
	// Reverse copies what only Redis has into the store; otherwise it is what Redis lacks into Redis.
	Reverse bool
	DryRun  bool // touch nothing
	Resume  bool // go on where the last run ended
	Rate    int  // keys a second at most; 0: as fast as the stores allow
	Workers int  // batches under way at once
	// MaxValue is the largest value that is copied, in bytes.
	MaxValue int64
	// Patience is how long trouble may last without anything that works before the run gives up.
	Patience time.Duration
	// Store says what the route's store is: a checkpoint of another one is not gone on from.
	Store    string
	Progress *Progress
}

const (
	// saveEvery is how often the checkpoint is written. A run that dies repeats what it did since, which costs that much time and no more: what is there already is left alone.
	saveEvery = 5 * time.Second
	// stepGrace is what a step that is under way may take after an interrupt; nothing is lost without it, but leases and locks would
	// be left to lapse.
	stepGrace = 3 * time.Second
	// maxLater bounds the keys that somebody was at and that are tried again at the end. There are as many as writers are quick; more means that something else is wrong.
	maxLater = 50_000
	// laterPause and laterRounds are how often they are tried: longer in all than a lease that a crashed writer has left.
	laterPause  = 500 * time.Millisecond
	laterRounds = 16
	// triesAlone is how often a step may fail although both stores answer before its keys are taken to be the reason.
	triesAlone = 4
	// hopeless is how many keys may fail before one succeeds: what fails then is not the keys' fault.
	hopeless = 100
)

// checkpoint is what a run writes down.
type checkpoint struct {
	Match  string   `json:"match"`
	Store  string   `json:"store"`
	RunID  string   `json:"run_id"` // of Redis
	After  string   `json:"after"`
	Walked bool     `json:"walked"` // there is nothing behind After
	Later  []string `json:"later"`
	Sizes  []int64  `json:"sizes"` // of Later's values, about
	Report Report   `json:"report"`
}

// batch is some keys that go through the protocol together.
type batch struct {
	refs  []policy.Ref
	sizes []int64 // about how many bytes their values have
	sent  map[string]bool
	tries int
	slow  bool // of one key that takes longer to read than a lease lasts
}

func (b *batch) add(route, key string, size int64) {
	b.refs, b.sizes = append(b.refs, policy.Ref{Route: route, Key: key}), append(b.sizes, size)
}

// migration is one run.
type migration struct {
	opt    Options
	stores Stores
	feed   feed
	gate   *gate
	brake  *brake
	pace   pace
	say    func(format string, args ...any)
	stop   context.CancelCauseFunc
	work   chan *batch
	open   sync.WaitGroup // batches that are not done

	mu      sync.Mutex
	after   string           // guarded by mu: where the walk goes on; what lies before it is done, in under, or in later
	walked  bool             // guarded by mu: there is nothing behind after
	under   map[*batch]bool  // guarded by mu: under way
	later   map[string]int64 // guarded by mu: keys that somebody was at, and about how large their values are
	report  Report           // guarded by mu
	looked  int64            // guarded by mu: keys that are done, for the progress
	known   map[string]bool  // guarded by mu: which processes of Redis have been met
	earlier time.Duration    // what earlier runs took
	begun   time.Time
	total   int64     // guarded by mu once it runs: about how many keys there are
	saved   time.Time // guarded by mu: when the checkpoint that stands was written; zero: there is none
	runID   string    // of Redis, at the beginning
}

// Unsaved tells beside another error that the checkpoint could not be written.
type Unsaved struct {
	Err error
	// Before is when the one before it was written, which stands; zero: there is none.
	Before time.Time
}

func (e *Unsaved) Error() string {
	stands := "there is none before it: the next run begins at the beginning"
	if !e.Before.IsZero() {
		stands = "the one of " + e.Before.Local().Format(time.DateTime) + " stands, and --resume goes on from there"
	}
	return fmt.Sprintf("the checkpoint could not be written (%v); %s", e.Err, stands)
}

func (e *Unsaved) Unwrap() error { return e.Err }

// Refusal says why a route cannot be copied now.
type Refusal struct{ Why string }

func (e *Refusal) Error() string { return e.Why }

// Allowed tells whether copying between the stores of a route makes sense in its phase.
func Allowed(r *policy.Route, reverse bool) error {
	rules := r.Phase.Rules()
	switch {
	case !rules.UsesStore:
		return &Refusal{fmt.Sprintf("route %s is in %s, which has no store: writes do not reach its rows, and what they hold is old", r.Name, r.Phase)}
	case !rules.ReadsStore && reverse:
		return &Refusal{fmt.Sprintf("route %s is in %s, which does not read the store, and on the way back all rows are fenced: go back to phase2 first, then copy", r.Name, r.Phase)}
	case !rules.ReadsStore:
		return &Refusal{fmt.Sprintf("route %s is in %s, which does not read the store: some sidecars may be in phase3 by now, whose writes do not reach the rows", r.Name, r.Phase)}
	}
	return nil
}

// servedWithout tells whether somebody has served the route in a phase without its store since the last fence: its rows may be old.
func servedWithout(r *policy.Route, phases map[string][]string) error {
	for _, word := range phases[r.Name] {
		if p, err := policy.ParsePhase(word); err == nil && !p.Rules().UsesStore {
			return &Refusal{fmt.Sprintf("route %s has been served in %s: its rows may be old, and the first sidecar that starts in %s makes them dead; start one first", r.Name, p, r.Phase)}
		}
	}
	return nil
}

// Migrate copies what one store has of a route and the other lacks. The report is also good beside an error: ErrInterrupted when ctx ended,
// *Unreachable, *Refusal, or what went wrong.
func Migrate(ctx context.Context, stores Stores, opt Options) (Report, error) {
	m := &migration{
		opt: opt, stores: stores, say: opt.Progress.say, begun: time.Now(),
		under: map[*batch]bool{}, later: map[string]int64{}, known: map[string]bool{},
		report: Report{Route: opt.Route.Name, Reverse: opt.Reverse, DryRun: opt.DryRun},
		pace:   pace{rate: float64(opt.Rate)},
		work:   make(chan *batch, opt.Workers),
	}
	m.gate = &gate{patience: opt.Patience, say: m.say}
	m.brake = newBrake(opt.Workers, m.say)
	if opt.Reverse {
		m.feed = &scanFeed{peer: stores.Peer, route: opt.Route, router: opt.Router, say: m.say}
	} else {
		m.feed = &rowFeed{rows: stores.Rows, route: opt.Route, router: opt.Router}
	}
	defer m.feed.close()
	err := m.run(ctx)
	m.mu.Lock()
	defer m.mu.Unlock()
	m.report.Seconds = m.spent().Seconds()
	return m.report, err
}

func (m *migration) spent() time.Duration { return m.earlier + time.Since(m.begun) }

func (m *migration) run(outer context.Context) error {
	if err := Allowed(m.opt.Route, m.opt.Reverse); err != nil {
		return err
	}
	if err := m.prepare(outer); err != nil {
		return m.ended(outer, err)
	}
	ctx, stop := context.WithCancelCause(outer)
	defer stop(nil)
	m.stop = stop
	m.opt.Progress.begin(m.looked)
	defer m.opt.Progress.end()
	if m.total > 0 {
		m.total = max(m.total, m.looked)
	}

	var workers, watch sync.WaitGroup
	for range m.opt.Workers {
		workers.Go(func() { m.worker(ctx) })
	}
	watching, unwatch := context.WithCancel(context.WithoutCancel(ctx))
	watch.Go(func() { m.watch(watching) })

	err := m.walk(ctx)
	close(m.work)
	m.brake.close()
	workers.Wait()
	unwatch()
	watch.Wait()
	if cause := context.Cause(ctx); cause != nil && outer.Err() == nil {
		err = cause // a worker gave up
	}
	if err == nil {
		return m.save(true)
	}
	return errors.Join(m.ended(outer, err), m.save(false))
}

// ended is how a run ended that did not finish.
func (m *migration) ended(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return ErrInterrupted
	}
	return err
}

// prepare looks at the stores, and for where to begin.
func (m *migration) prepare(ctx context.Context) error {
	return patiently(ctx, m.stores, m.gate, func() error {
		link, err := m.stores.Peer.Dial(ctx)
		if err != nil {
			return err
		}
		defer link.Close()
		m.runID = link.RunID()
		phases, err := link.Measure(ctx)
		if err != nil {
			return err
		}
		if err := servedWithout(m.opt.Route, phases); err != nil {
			return err
		}
		if err := m.met(ctx, link); err != nil {
			return err
		}
		if m.total, err = m.feed.total(ctx); err != nil {
			return err
		}
		return m.recall(ctx)
	})
}

// recall reads the checkpoint.
func (m *migration) recall(ctx context.Context) error {
	if m.stores.Ledger == nil || m.opt.DryRun {
		return nil
	}
	text, at, found, err := m.stores.Ledger.Read(ctx)
	if err != nil {
		return err
	}
	switch {
	case !found && m.opt.Resume:
		m.say("there is no checkpoint: beginning at the beginning")
		return nil
	case !found:
		return nil
	case !m.opt.Resume:
		m.saved = at
		m.say("the checkpoint of %s is given up; --resume would have gone on from it", at.Local().Format(time.DateTime))
		return nil
	}
	var c checkpoint
	if err := json.Unmarshal(text, &c); err != nil {
		return &Refusal{"the checkpoint cannot be read: run without --resume"}
	}
	if c.Match != m.opt.Route.Match || c.Store != m.opt.Store {
		return &Refusal{fmt.Sprintf("the checkpoint of %s is of another pattern or store of this route: run without --resume", at.Local().Format(time.DateTime))}
	}
	m.say("going on from the checkpoint of %s: %d rows are done", at.Local().Format(time.DateTime), c.Report.Rows-int64(len(c.Later)))
	if c.RunID != m.runID {
		if m.opt.Reverse {
			m.say("redis has been restarted since: its keys are looked through from the beginning")
			return nil
		}
		m.say("redis has been restarted since: what it has lost of the rows before the checkpoint is not copied again; run without --resume for that")
	}
	if f, ok := m.feed.(*scanFeed); ok {
		f.runID = c.RunID
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.after, m.walked, m.report, m.saved = c.After, c.Walked, c.Report, at
	if c.RunID != m.runID {
		m.lost()
	}
	m.earlier = time.Duration(c.Report.Seconds * float64(time.Second))
	for i, key := range c.Later {
		m.later[key] = unknownSize
		if len(c.Sizes) == len(c.Later) {
			m.later[key] = c.Sizes[i]
		}
	}
	m.looked = c.Report.Rows - int64(len(c.Later))
	return nil
}

// save writes the checkpoint, or removes it when all is done. What is under way counts as not done: its keys are named.
func (m *migration) save(done bool) error {
	if m.stores.Ledger == nil || m.opt.DryRun {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), 2*saveEvery)
	defer cancel()
	if done {
		return m.stores.Ledger.Write(ctx, nil)
	}
	m.mu.Lock()
	c := checkpoint{Match: m.opt.Route.Match, Store: m.opt.Store, RunID: m.runID, After: m.after, Walked: m.walked, Report: m.report}
	note := func(key string, size int64) { c.Later, c.Sizes = append(c.Later, key), append(c.Sizes, size) }
	for key, size := range m.later {
		note(key, size)
	}
	for b := range m.under {
		for i, ref := range b.refs {
			if _, named := m.later[ref.Key]; !named {
				note(ref.Key, b.sizes[i])
			}
		}
	}
	c.Report.Seconds = m.spent().Seconds()
	text, err := json.Marshal(c)
	m.mu.Unlock()
	if err != nil {
		return err
	}
	err = m.stores.Ledger.Write(ctx, text)
	m.mu.Lock()
	defer m.mu.Unlock()
	if err != nil {
		return &Unsaved{err, m.saved}
	}
	m.saved = time.Now()
	return nil
}

// watch shows the progress and writes checkpoints until ctx ends. Workers that wait for a store hold up neither.
func (m *migration) watch(ctx context.Context) {
	draw := time.NewTicker(drawEvery)
	defer draw.Stop()
	what := "rows"
	if m.opt.Reverse {
		what = "keys"
	}
	saved := time.Now()
	failed := false
	for {
		select {
		case <-ctx.Done():
			return
		case <-draw.C:
		}
		m.mu.Lock()
		looked, total := m.looked, m.total
		m.mu.Unlock()
		m.opt.Progress.show(looked, total, what)
		if time.Since(saved) < saveEvery {
			continue
		}
		saved = time.Now()
		switch err := m.save(false); {
		case err == nil:
			failed = false
		case m.stores.Taken(err):
			m.stop(err)
		case !failed:
			failed = true
			m.say("%v", err)
		}
	}
}

// walk hands out batches until there are no more, and those that are not done come once more.
func (m *migration) walk(ctx context.Context) error {
	m.mu.Lock()
	after, walked := m.after, m.walked
	m.mu.Unlock()
	for !walked {
		var part found
		err := patiently(ctx, m.stores, m.gate, func() (err error) {
			part, err = m.feed.next(ctx, after)
			return err
		})
		if err != nil {
			return err
		}
		after, walked = part.after, part.last
		for _, b := range m.take(part) {
			if err := m.hand(ctx, b); err != nil {
				return err
			}
		}
	}
	for round := 0; ; round++ {
		m.open.Wait()
		if ctx.Err() != nil {
			return ctx.Err()
		}
		batches := m.again(round == laterRounds)
		if len(batches) == 0 {
			return nil
		}
		if err := sleep(ctx, laterPause); err != nil {
			return err
		}
		for _, b := range batches {
			if err := m.hand(ctx, b); err != nil {
				return err
			}
		}
	}
}

// take counts a part of the walk and makes batches of what is to be copied. From here on the walk stands behind it: whatever becomes of the batches, their keys are
// remembered.
func (m *migration) take(part found) (out []*batch) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.after, m.walked = part.after, part.last
	var b batcher
	for _, row := range part.rows {
		m.report.Rows++
		switch {
		case row.State == policy.Tombstone && row.Expired:
			m.report.Expired++
		case row.State == policy.Tombstone:
			m.report.Deleted++
		case row.State == policy.Absent:
			m.report.Dead++
		default:
			b.add(m, row.Key, row.Size)
			continue
		}
		m.looked++
	}
	m.total = part.expected(m.report.Rows, m.total)
	return b.out
}

// batcher makes batches of keys, by their number and by what their values weigh. m.mu is held.
type batcher struct {
	out    []*batch
	weight int64 // of the last one
}

func (a *batcher) add(m *migration, key string, size int64) {
	if n := len(a.out); n == 0 || len(a.out[n-1].refs) >= m.pace.size() || a.weight+size > batchBytes {
		b := &batch{sent: map[string]bool{}}
		m.under[b] = true
		m.open.Add(1)
		a.out, a.weight = append(a.out, b), 0
	}
	a.out[len(a.out)-1].add(m.opt.Route.Name, key, size)
	a.weight += size
}

// hand gives a batch to a worker. After an error the batch stays under way, to be written down.
func (m *migration) hand(ctx context.Context, b *batch) error {
	err := m.pace.wait(ctx, len(b.refs))
	if err == nil {
		select {
		case m.work <- b:
			return nil
		case <-ctx.Done():
			err = ctx.Err()
		}
	}
	m.open.Done()
	return err
}

// again makes batches of the keys that somebody was at. The last time they fail.
func (m *migration) again(last bool) (out []*batch) {
	m.mu.Lock()
	defer m.mu.Unlock()
	defer clear(m.later)
	var b batcher
	for _, key := range slices.Sorted(maps.Keys(m.later)) {
		if last {
			m.report.note(key, proxy.Done{Fate: proxy.Busy})
			m.looked++
			continue
		}
		b.add(m, key, m.later[key])
	}
	return b.out
}

// worker takes batches through the protocol until there are no more.
func (m *migration) worker(ctx context.Context) {
	// A step that has begun is ended in order when ctx ends, if it can be.
	steps, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	defer context.AfterFunc(ctx, func() { time.AfterFunc(stepGrace, cancel) })()
	w := &worker{linkHolder{peer: m.stores.Peer}, m}
	defer w.close()
	for b := range m.work {
		m.brake.enter()
		begun := time.Now()
		if ctx.Err() == nil {
			if err := w.batch(ctx, steps, b); err != nil && ctx.Err() == nil {
				m.stop(err)
			}
		}
		m.brake.leave(ctx, time.Since(begun), w.spent())
		m.open.Done()
	}
}

// worker has a connection to Redis.
type worker struct {
	linkHolder
	m *migration
}

// batch copies a batch, waiting for as long as there is trouble. After an error it stays under way.
func (w *worker) batch(ctx, steps context.Context, b *batch) error {
	m := w.m
	for {
		done, err := w.step(steps, b)
		if err == nil {
			m.gate.worked()
			return w.batches(ctx, steps, m.settle(b, done))
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if _, ok := errors.AsType[*Refusal](err); ok {
			return err
		}
		b.tries++
		why := m.stores.trouble(err)
		fault := why == "" || b.tries >= triesAlone && !needsRoom(err) && w.alive(steps)
		if len(b.refs) > 1 && fault {
			// One key may spoil it for the others: a value that takes too long, or that cannot be read.
			return w.batches(ctx, steps, m.split(b))
		}
		if fault {
			if err := m.failed(b, err); err != nil {
				return err
			}
			return nil
		}
		if err := m.gate.failed(ctx, why); err != nil {
			return err
		}
	}
}

// batches copies what is left of a batch.
func (w *worker) batches(ctx, steps context.Context, parts []*batch) error {
	for _, part := range parts {
		if err := w.batch(ctx, steps, part); err != nil {
			return err
		}
	}
	return nil
}

// alive tells that both stores answer small questions.
func (w *worker) alive(ctx context.Context) bool {
	if err := w.connect(ctx); err != nil {
		return false
	}
	_, err := w.link.Measure(ctx)
	return err == nil
}

// connect sees to it that there is a connection.
func (w *worker) connect(ctx context.Context) error {
	link, err := w.get(ctx)
	if err != nil {
		return err
	}
	return w.m.met(ctx, link)
}

// step takes a batch through the protocol once.
func (w *worker) step(ctx context.Context, b *batch) (done []proxy.Done, err error) {
	if err := w.connect(ctx); err != nil {
		return nil, err
	}
	opt := &w.m.opt
	switch {
	case opt.Reverse && opt.DryRun:
		return w.link.PeekCopy(ctx, b.refs, opt.Route.Column())
	case opt.Reverse:
		return w.link.Copy(ctx, b.refs, b.sent)
	case opt.DryRun:
		return w.link.Peek(ctx, b.refs)
	}
	if len(b.refs) == 1 && b.sizes[0] > opt.MaxValue {
		// What need not be read is not: there may be gigabytes in it.
		sizes, err := w.link.Weigh(ctx, b.refs)
		if err != nil {
			return nil, err
		}
		if sizes[0] > opt.MaxValue {
			return []proxy.Done{{Fate: proxy.TooLarge, Size: int(sizes[0])}}, nil
		}
	}
	if b.slow {
		return w.link.PromoteSlow(ctx, b.refs[0], b.sent)
	}
	return w.link.Promote(ctx, b.refs, b.sent)
}

// met looks at a Redis that was not met before: what is copied there must be good for something.
func (m *migration) met(ctx context.Context, link *proxy.PeerLink) error {
	m.mu.Lock()
	known := m.known[link.RunID()]
	m.mu.Unlock()
	if known || m.opt.DryRun {
		return nil
	}
	switch trust, err := link.Trust(ctx); {
	case err != nil:
		return err
	case trust == proxy.Unverified:
		return errUnverified
	case trust == proxy.Unknown && !m.opt.Reverse:
		return &Refusal{"redis has keys, and no sidecar has served it yet: the first that starts drops every copy that has a row, and what is copied now with them; start one first"}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.known) > 0 && !m.opt.Reverse {
		m.say("redis has been restarted: what it has lost of the rows that were copied is not copied again; run once more afterwards")
		m.lost()
	}
	m.known[link.RunID()] = true
	return nil
}

// lost notes that Redis was restarted, and may lack again what was there or was copied. Caller holds mu.
func (m *migration) lost() {
	if m.report.Copied+m.report.There > 0 {
		m.report.Restarts++
	}
}

// settle counts what became of a batch, and returns what is to be tried again at once: keys whose leases were over before they were read,
// fewer at a time.
func (m *migration) settle(b *batch, done []proxy.Done) (rest []*batch) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.under, b)
	late := &batch{sent: b.sent}
	for i, d := range done {
		key := b.refs[i].Key
		switch {
		case d.Fate == proxy.Late && !b.slow:
			late.add(m.opt.Route.Name, key, b.sizes[i])
			continue
		case d.Fate == proxy.Busy && len(m.later) < maxLater:
			m.later[key] = b.sizes[i]
			continue
		}
		m.report.note(key, d)
		m.looked++
	}
	switch {
	case len(late.refs) == 0:
		return nil
	case len(b.refs) == 1:
		late.slow = true
		rest = []*batch{late}
	case len(late.refs) == 1:
		rest = []*batch{late}
	default:
		rest = late.halves()
	}
	for _, p := range rest {
		m.under[p] = true
	}
	return rest
}

// split makes two batches of one.
func (m *migration) split(b *batch) []*batch {
	m.mu.Lock()
	defer m.mu.Unlock()
	parts := b.halves()
	delete(m.under, b)
	for _, p := range parts {
		m.under[p] = true
	}
	return parts
}

func (b *batch) halves() []*batch {
	half := len(b.refs) / 2
	return []*batch{{refs: b.refs[:half], sizes: b.sizes[:half], sent: b.sent}, {refs: b.refs[half:], sizes: b.sizes[half:], sent: b.sent}}
}

// failed counts a batch of one key that cannot be copied. The error ends the run, if no key can.
func (m *migration) failed(b *batch, err error) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.report.Failed >= hopeless && m.report.Copied+m.report.There == 0 {
		return err
	}
	delete(m.under, b)
	m.report.fail(b.refs[0].Key, err.Error())
	m.looked++
	return nil
}
