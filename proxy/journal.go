package proxy

import (
	"context"
	"errors"
	"maps"
	"math/rand/v2"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"cacheproxy/policy"

	"go.uber.org/zap"
)

// journal is what this sidecar knows of the two journals: which keys are stale in Redis (the journal in Postgres)
// and which in the store (the journal in Redis). It remembers what it journaled itself until that is struck, and puts
// it back if it vanished.
type journal struct {
	e *engine

	// Read on the hot path, and zero almost always: whether the maps below need a look at all.
	someRedis, someStore atomic.Bool
	truncated            atomic.Bool // Redis's journal is longer than what is remembered of it
	overflow             atomic.Bool // and Postgres's: any copy in Redis may be stale

	polling sync.Mutex // one poll of Postgres at a time, so that none puts back what an earlier one saw
	mu      sync.RWMutex
	inRedis map[string]inEntries // guarded by mu: the keys of intents
	intents map[int64]entry      // guarded by mu: entries known
	young   map[int64]bool       // guarded by mu: entries of others that they may be repairing now
	left    map[int64]time.Time  // guarded by mu: entries that are for others to repair (see repairBatch), and when to look at them again
	leftBy  *policy.Router       // guarded by mu: the routes under which they are
	own     map[int64]uint64     // guarded by mu: entries that this process wrote to, and the poll before which it last did
	marks   map[string]string    // guarded by mu: key -> version, own and polled twice
	mine    map[string]mark      // guarded by mu: marks of this process, until struck
	seen    map[string]sight     // guarded by mu: what the last poll of Redis showed
	longest struct {             // guarded by mu: how long what was repaired here had stood
		entry, mark time.Duration
	}
	phases     map[string][]string // guarded by mu: phases registered per route
	polled     time.Time           // guarded by mu: last successful poll of Postgres
	polls      uint64              // guarded by mu: polls of Postgres begun
	anchor     string              // guarded by mu: of Redis's journal at the last poll
	redisPolls uint64              // guarded by mu: polls of Redis done
	registered bool                // guarded by mu: the phases in use stand in Postgres
	clock      time.Time           // guarded by mu: Postgres's time then
	tick       chan struct{}       // capacity 1: poll now
	seq        atomic.Uint64
}

// entry is one of the journal in Postgres.
type entry struct {
	refs  []policy.Ref
	since int64 // localNow when it was made
}

// sight is a mark in Redis as a poll saw it.
type sight struct {
	version string
	since   int64 // localNow when it was first seen
}

// inEntries tells which entries name a key: how many, and one of them (0: forgotten which).
type inEntries struct {
	n  int
	id int64
}

// mark is an entry of this process in Redis's journal.
type mark struct {
	version string
	left    bool   // its writer is done with it: a repair must strike it
	poll    uint64 // polls of Redis before it was left
	since   int64  // localNow when it was made, or the first of those that this process has left on the key
}

const (
	// maxJournal keys are remembered of a journal: 100,000 are some 20 MB, and all of it is read again at every poll. Beyond it every copy on that side may be
	// stale, so none is served without a look at the other until the journal is shorter. Keys are counted, and not entries: triggers name a hundred in one.
	maxJournal = 100_000
	// maxRepair keys share a transaction when they are repaired.
	maxRepair = 128
	// leftAgain is how soon an entry that is for others to repair is looked at again: a write may have taken its row away. Sooner would lock the rows
	// of the application's for nothing; later would leave the journal longer than it is.
	leftAgain = 10 * time.Second
	// markPage entries are read from Redis's journal at once.
	markPage = 1000
)

func newJournal(e *engine) *journal {
	return &journal{
		e: e, inRedis: map[string]inEntries{}, intents: map[int64]entry{}, own: map[int64]uint64{}, marks: map[string]string{}, mine: map[string]mark{},
		tick: make(chan struct{}, 1),
	}
}

// staleRedis: Redis's copy of key must not be served.
func (j *journal) staleRedis(key string) bool {
	if !j.someRedis.Load() {
		return false
	}
	j.mu.RLock()
	defer j.mu.RUnlock()
	return j.inRedis[key].n > 0 || j.overflow.Load()
}

// staleRedisBytes is staleRedis for the hot path: no allocation.
func (j *journal) staleRedisBytes(key []byte) bool {
	if !j.someRedis.Load() {
		return false
	}
	j.mu.RLock()
	defer j.mu.RUnlock()
	return j.inRedis[string(key)].n > 0 || j.overflow.Load()
}

// staleStore: the store's copy of key must not be served. If Redis's journal is longer than what is remembered, that may be any.
func (j *journal) staleStore(key string) bool {
	if !j.someStore.Load() {
		return false
	}
	j.mu.RLock()
	defer j.mu.RUnlock()
	_, marked := j.marks[key]
	_, mine := j.mine[key]
	return marked || mine || j.truncated.Load()
}

// version names one write in Redis's journal: unique in the fleet.
func (j *journal) version() string {
	return j.e.id + "." + strconv.FormatUint(j.seq.Add(1), 36)
}

// publish tells the hot path whether there is anything to look for. Caller holds mu.
func (j *journal) publish() {
	j.someRedis.Store(len(j.intents) > 0 || j.overflow.Load())
	j.someStore.Store(len(j.marks) > 0 || len(j.mine) > 0 || j.truncated.Load())
}

// learn and unlearn keep inRedis in step with intents. Caller holds mu.
func (j *journal) learn(id int64, in entry) {
	j.unlearn(id)
	j.intents[id] = in
	for _, ref := range in.refs {
		j.inRedis[ref.Key] = inEntries{j.inRedis[ref.Key].n + 1, id}
	}
}

func (j *journal) unlearn(id int64) {
	for _, ref := range j.intents[id].refs {
		in := j.inRedis[ref.Key]
		if in.n--; in.n <= 0 {
			delete(j.inRedis, ref.Key)
			continue
		}
		if in.id == id {
			in.id = 0
		}
		j.inRedis[ref.Key] = in
	}
	delete(j.intents, id)
}

// entriesOf returns for each key an entry that is known to name it, 0 for none.
func (j *journal) entriesOf(refs []policy.Ref) []int64 {
	j.mu.RLock()
	defer j.mu.RUnlock()
	ids := make([]int64, len(refs))
	for i, ref := range refs {
		ids[i] = j.inRedis[ref.Key].id
	}
	return ids
}

// keepIntent remembers what a Commit wrote to the journal for refs: the entry id, and those that were known before. It is not told
// which of them a key is in, so for this sidecar it is in both until the next poll.
func (j *journal) keepIntent(id int64, refs []policy.Ref, known []int64) {
	j.mu.Lock()
	keep := func(id int64, refs []policy.Ref) {
		if id == 0 {
			return
		}
		have, there := j.intents[id]
		if !there {
			have.since = localNow()
		}
		for _, ref := range refs {
			if !slices.Contains(have.refs, ref) {
				have.refs = append(slices.Clip(have.refs), ref)
			}
		}
		j.learn(id, have)
		j.own[id] = j.polls
	}
	keep(id, refs)
	for i, id := range known {
		keep(id, refs[i:i+1])
	}
	j.publish()
	j.mu.Unlock()
	j.kick()
}

// keepMarks remembers marks of this process; they count from the moment the script is sent.
func (j *journal) keepMarks(refs []policy.Ref, version string) {
	j.mu.Lock()
	defer j.mu.Unlock()
	for _, ref := range refs {
		m := mark{version: version, since: localNow()}
		if before := j.mine[ref.Key]; before.left {
			m.since = before.since
		}
		j.mine[ref.Key] = m
	}
	j.publish()
}

// leaveMarks: the write stands in Redis, and its mark with it, until a repair.
func (j *journal) leaveMarks(refs []policy.Ref, version string) {
	j.mu.Lock()
	for _, ref := range refs {
		if m := j.mine[ref.Key]; m.version == version {
			m.left, m.poll = true, j.redisPolls
			j.mine[ref.Key] = m
		}
	}
	j.mu.Unlock()
	j.kick()
}

// forgetMarks: these marks are struck, or were never made.
func (j *journal) forgetMarks(refs []policy.Ref, version string) {
	j.mu.Lock()
	defer j.mu.Unlock()
	for _, ref := range refs {
		if j.mine[ref.Key].version == version {
			delete(j.mine, ref.Key)
		}
	}
	j.publish()
}

func (j *journal) kick() {
	select {
	case j.tick <- struct{}{}:
	default:
	}
}

// run polls and repairs until ctx ends. It polls twice in the time the configuration promises, so that an
// entry that is young at one poll is seen by the next in time.
func (j *journal) run(ctx context.Context) {
	tick := time.NewTicker(j.e.cfg.Poll / 2)
	defer tick.Stop()
	wait := time.NewTimer(0)
	defer wait.Stop()
	probe := j.e.cfg.Probe
	var retry time.Time
	for {
		polled := false
		select {
		case <-ctx.Done():
			return
		case <-j.tick:
		case <-tick.C:
			polled = true
		case <-j.e.store.wake:
			probe = j.e.cfg.Probe
			wait.Reset(probe)
			continue
		case <-wait.C:
			polled = true
		}
		if !polled && len(j.known()) == 0 {
			continue
		}
		if !j.e.storeInUse() { // phase3 everywhere: nothing to know, but a later phase2 must know of us
			if !j.isRegistered() && time.Now().After(retry) {
				retry = time.Now().Add(registerRetry)
				_ = j.e.register(ctx)
			}
			continue
		}
		if more := j.poll(ctx); more && j.e.store.up.Load() {
			wait.Reset(0)
		}
		if !j.e.store.up.Load() { // the probe of the open breaker: 100 ms, doubling to a second
			wait.Reset(probe)
			probe = min(2*probe, j.e.cfg.ProbeMax)
		}
	}
}

// registerRetry: how often a process that does not use the store tries to tell it so. Rare enough to bother nobody.
const registerRetry = 10 * time.Second

func (j *journal) isRegistered() bool {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.registered
}

// known returns the entries that are known and not struck.
func (j *journal) known() []int64 {
	j.mu.Lock()
	defer j.mu.Unlock()
	return slices.Collect(maps.Keys(j.intents))
}

// poll reads both journals and repairs what it can in the time until the next poll. more: something is left to repair.
func (j *journal) poll(ctx context.Context) (more bool) {
	trusted := j.e.up.trusted()
	if j.pollStore(ctx, trusted) != nil {
		return false // without Postgres nothing can be repaired, and reads of Redis look at the marks there
	}
	if !trusted {
		return false
	}
	j.mu.Lock()
	now := j.clock
	j.mu.Unlock()
	_, _, data := j.e.up.present()
	if err := j.pollRedis(ctx, now, data, false); err != nil {
		return false
	}
	more, err := j.repair(ctx)
	if err != nil {
		j.e.log.Debug("repair goes on later", zap.Error(err))
	}
	return more
}

// readIntents reads the journal in Postgres: all of it up to maxJournal keys, or a page.
func (j *journal) readIntents(ctx context.Context, whole bool) (StorePoll, error) {
	page := func(after int64) (StorePoll, error) {
		ctx, cancel := context.WithTimeout(ctx, j.e.cfg.StoreTimeout)
		defer cancel()
		p, err := j.e.store.Poll(ctx, after)
		return p, j.e.store.note("poll", err)
	}
	p, err := page(0)
	// The first of all includes a connection that is made and statements that are prepared: its time says little.
	for i := 0; i < askAgain && err == nil && j.e.clocks.store.doubtful(); i++ {
		p, err = page(0)
	}
	keys := countKeys(p.Intents)
	for err == nil && whole && p.More && keys < maxJournal {
		var next StorePoll
		next, err = page(p.Intents[len(p.Intents)-1].ID)
		p.Intents, p.More = append(p.Intents, next.Intents...), next.More
		keys += countKeys(next.Intents)
	}
	return p, err
}

// countKeys is how many keys the entries name.
func countKeys(entries []Intent) (n int) {
	for _, in := range entries {
		n += len(in.Refs)
	}
	return n
}

// pollStore reads the journal in Postgres, the whole of it if Redis is trusted or about to be: what it calls stale there must be known.
// Else a page is enough to know that Postgres is well.
func (j *journal) pollStore(ctx context.Context, whole bool) error {
	j.polling.Lock()
	defer j.polling.Unlock()
	j.mu.Lock()
	j.polls++
	this := j.polls
	j.mu.Unlock()
	p, err := j.readIntents(ctx, whole)
	if err != nil {
		return err
	}
	if !j.isRegistered() {
		if err := j.e.register(ctx); err != nil {
			return err // its rows may have to be fenced before they are read
		}
	}
	j.e.store.ok()
	j.mu.Lock()
	defer j.mu.Unlock()
	fresh, now := map[int64]entry{}, localNow()
	j.young = map[int64]bool{}
	for _, in := range p.Intents {
		since := now - in.Age.Microseconds() // too late by what the answer took
		if before, ok := j.intents[in.ID]; ok {
			since = min(since, before.since)
		}
		fresh[in.ID] = entry{in.Refs, since}
		if _, own := j.own[in.ID]; !own && in.Age < j.e.cfg.Poll*2/5 {
			j.young[in.ID] = true
		}
	}
	if whole {
		j.overflow.Store(p.More)
	}
	if p.More { // what lies behind is still known from before
		keys := countKeys(p.Intents)
		for id, in := range j.intents {
			if _, ok := fresh[id]; !ok && keys < maxJournal {
				fresh[id] = in
				keys += len(in.refs)
			}
		}
	}
	for id, made := range j.own {
		if _, ok := fresh[id]; ok {
			continue
		}
		if made >= this { // made while this poll was on its way
			fresh[id] = j.intents[id]
		} else {
			delete(j.own, id)
		}
	}
	maps.DeleteFunc(j.left, func(id int64, _ time.Time) bool { _, ok := fresh[id]; return !ok })
	j.intents, j.inRedis = map[int64]entry{}, map[string]inEntries{}
	for id, in := range fresh {
		j.learn(id, in)
	}
	j.phases, j.polled, j.clock = p.Phases, time.Now(), p.Now
	j.publish()
	return nil
}

// pollRedis reads the journal in Redis, writes Postgres's time beside it, and puts back what Redis lost. data names the data set
// that has been verified; "" for none writes no time. One that was verified in part is named as such.
// A mark seen at two polls is no writer at work.
func (j *journal) pollRedis(ctx context.Context, now time.Time, data string, restarted bool) error {
	e := j.e
	if err := e.askRedisTime(ctx); err != nil {
		e.redisFailed(err)
		return err
	}
	stamp := ""
	if !now.IsZero() {
		stamp = strconv.FormatInt(now.UnixMilli(), 10)
	}
	if part := e.inPart.Load(); part != nil && part.set == data {
		data += inPart
	}
	frame, err := e.up.eval(ctx, scriptPoll, func(dst []string) []string {
		return append(dst, "2", journalName, clockName, stamp, j.version(), anchorField, data)
	})
	if err != nil {
		e.redisFailed(err)
		return err
	}
	cols, _ := elements(frame, nil)
	if len(cols) != 3 {
		return &outageError{why: outOther, reply: "script answered out of shape"}
	}
	anchor, _ := bulk(cols[0])
	n, _ := parseInt(cols[1])
	marks := map[string]string{}
	if n > 0 {
		if marks, err = j.readMarks(ctx); err != nil {
			e.redisFailed(err)
			return err
		}
	}
	j.mu.Lock()
	var lostKeys, lostVersions []string
	// A mark of our own that is not there was struck by somebody's repair, unless Redis lost its journal: then there is
	// another anchor, or another run. What was struck must not come back:
	//
	//	1 we leave a mark on K    2 another sidecar repairs K and strikes it    3 a writer deletes K in Redis, to fill it after its COMMIT
	//	4 we put the mark back    5 the fill leaves a marked key alone: K is absent and marked, so it reads as deleted
	//
	// So after a loss only those are put back that the last poll still saw, or that are younger than it.
	lost := restarted || j.anchor != "" && j.anchor != string(anchor)
	whole := len(marks) < maxJournal
	j.truncated.Store(!whole)
	for k, v := range j.mine {
		if _, ok := marks[k]; ok || !v.left || !whole {
			continue // a writer at work brings its mark with its script
		}
		if lost && (j.seen[k].version == v.version || v.poll == j.redisPolls) {
			lostKeys, lostVersions = append(lostKeys, k), append(lostVersions, v.version)
		} else if v.poll < j.redisPolls {
			delete(j.mine, k)
		}
	}
	j.anchor = string(anchor)
	j.redisPolls++
	seen, twice := make(map[string]sight, len(marks)), map[string]string{}
	for k, v := range marks {
		s := sight{v, localNow()}
		before := j.seen[k]
		if before.version == v {
			twice[k] = v
		}
		if _, counts := j.marks[k]; counts || before.version == v { // also when it has been written again since: the row is stale all that time
			s.since = before.since
		}
		seen[k] = s
	}
	j.seen, j.marks = seen, twice
	j.publish()
	j.mu.Unlock()
	return j.putBack(ctx, lostKeys, lostVersions)
}

// askRedisTime looks at Redis's clock.
func (e *engine) askRedisTime(ctx context.Context) error {
	return e.clocks.askRedis(func(args ...string) ([]byte, error) { return e.up.do(ctx, args...) })
}

// readMarks pages through Redis's journal.
func (j *journal) readMarks(ctx context.Context) (map[string]string, error) {
	marks := map[string]string{}
	for cursor := "0"; ; {
		frame, err := j.e.up.do(ctx, "HSCAN", journalName, cursor, "COUNT", strconv.Itoa(markPage))
		if err != nil {
			return nil, err
		}
		cols, _ := elements(frame, nil)
		if len(cols) != 2 {
			return nil, &outageError{why: outOther, reply: "HSCAN answered out of shape"}
		}
		next, _ := bulk(cols[0])
		items, _ := elements(cols[1], nil)
		for i := 0; i+1 < len(items) && len(marks) < maxJournal; i += 2 {
			k, _ := bulk(items[i])
			v, _ := bulk(items[i+1])
			if string(k) != anchorField {
				marks[string(k)] = string(v)
			}
		}
		cursor = string(next)
		if cursor == "0" || len(marks) >= maxJournal {
			return marks, nil
		}
	}
}

func (j *journal) putBack(ctx context.Context, keys, versions []string) error {
	for len(keys) > 0 {
		n := min(len(keys), maxBatch)
		if _, err := j.e.up.script(ctx, scriptMark, keys[:n], versions[:n]...); err != nil {
			j.e.redisFailed(err)
			return err
		}
		keys, versions = keys[n:], versions[n:]
	}
	return nil
}

// repair makes the copies of journaled keys equal again (docs/consistency.md, "Journals and repair"). It ends when the next poll is due, and tells whether there is
// more to do: what is written while a long journal is worked off must be known as soon as anything else. Each of the two journals has half of the time.
func (j *journal) repair(ctx context.Context) (more bool, _ error) {
	j.mu.Lock()
	marks := maps.Clone(j.marks)
	j.mu.Unlock()
	more, failed := j.repairIntents(ctx)
	end := time.Now().Add(j.e.cfg.Poll / 4)
	var refs []policy.Ref
	for _, key := range slices.Sorted(maps.Keys(marks)) {
		refs = append(refs, j.e.ref(key))
	}
	// Every sidecar does so, see repairIntents.
	parts := slices.Collect(slices.Chunk(refs, maxRepair))
	rand.Shuffle(len(parts), func(a, b int) { parts[a], parts[b] = parts[b], parts[a] })
	for i, part := range parts {
		n, err := j.repairMarks(ctx, part)
		switch {
		case err != nil:
			return more, err
		case n == 0 && len(parts) > 1 && !j.e.namesStale(part): // what an entry names too waits for its repair, in drain for long
			j.kick()
			return more, failed
		case i < len(parts)-1 && time.Now().After(end):
			return true, failed
		}
	}
	return more, failed
}

// repairIntents repairs what the journal in Postgres names: entries that share keys, or are small, go together. Every sidecar does so,
// and after an outage at the same moment, therefore in an order of its own; one that finds that others were faster reads the
// journal again instead of following them through all of it.
func (j *journal) repairIntents(ctx context.Context) (more bool, failed error) {
	end := time.Now().Add(j.e.cfg.Poll / 4)
	batches := j.batches()
	rand.Shuffle(len(batches), func(a, b int) { batches[a], batches[b] = batches[b], batches[a] })
	for i, b := range batches {
		struck, left, err := j.repairBatch(ctx, b)
		switch {
		case err != nil:
			failed = err // a lock that somebody keeps holds up these keys and no others
			if !j.e.up.trusted() || !j.e.store.up.Load() {
				return false, failed
			}
		case struck+left == 0:
			j.kick()
			return false, failed
		}
		if i < len(batches)-1 && time.Now().After(end) {
			return true, failed
		}
	}
	return false, failed
}

// batch is what one repair takes on: whole entries, and all their keys.
type batch struct {
	ids  []int64
	refs []policy.Ref
}

// batches are the entries that are due. An entry with more than maxRepair keys has a batch to itself.
func (j *journal) batches() (out []batch) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if router := j.e.router.Load(); j.leftBy != router {
		j.left, j.leftBy = map[int64]time.Time{}, router
	}
	now := time.Now()
	var b batch
	seen := map[string]bool{}
	for _, id := range slices.Sorted(maps.Keys(j.intents)) {
		if j.young[id] || now.Before(j.left[id]) {
			continue
		}
		n := 0
		for _, ref := range j.intents[id].refs {
			if !seen[ref.Key] {
				n++
			}
		}
		if len(b.refs) > 0 && len(b.refs)+n > maxRepair {
			out, b = append(out, b), batch{}
			clear(seen)
		}
		b.ids = append(b.ids, id)
		for _, ref := range j.intents[id].refs {
			if !seen[ref.Key] {
				seen[ref.Key] = true
				b.refs = append(b.refs, ref)
			}
		}
	}
	if len(b.ids) > 0 {
		out = append(out, b)
	}
	return out
}

// errLost: Redis was lost while a repair was under way, and perhaps what it had deleted: its entries stay.
var errLost = errors.New("redis was lost meanwhile")

// errOtherKeys: an entry names other keys than it did when it was read. The next poll knows them.
var errOtherKeys = errors.New("an entry names keys that are not locked")

// repairBatch: Redis is stale. With a row, K is deleted in Redis; without one Redis is right. The entries are struck first, in the
// same transaction: what others have repaired meanwhile is left alone. It tells how many there were.
//
//	1 we read entry E, which names K    2 another sidecar repairs K and strikes E    3 Postgres dies, and K is deleted in Redis, marked,
//	  and that is acknowledged          4 Postgres is back; to repair K because of E would bring the row back
//
// An entry is struck only under the locks of all its keys. That is what allows a writer to leave it at an entry that is there
// already (Tx.Commit, known):
//
//	1 W, which cannot reach Redis, locks K    2 R repairs K because of E: it waits    3 W finds E there and commits without an entry of its own
//	4 R deletes K in Redis and strikes E: what is promoted from now on is W's row
//
//	1 R locks K, deletes it in Redis, strikes E    2 W locks K, finds E gone and commits with an entry of its own
//
// Without the lock R might delete K before W's commit, a reader promote the row that W replaces, and E go: nobody would know.
//
// Where the store is not read, its row is no reason to touch Redis, and the entry is left to those who read it:
//
//	1 K's row is changed, with an entry    2 K is written through phase3, which tells the store nothing    3 drain deletes K: nobody has it any more
//
//	1 K's row is changed, with an entry    2 drain strikes it and leaves K alone    3 phase2, which has not polled yet, serves what Redis has, for ever
//
// It tells how many entries were struck, and how many are left.
func (j *journal) repairBatch(ctx context.Context, b batch) (struck, left int, err error) {
	e := j.e
	ctx, cancel := context.WithTimeout(ctx, e.cfg.StoreTimeout)
	defer cancel()
	epoch := e.up.epoch.Load()
	tx, err := e.store.lock(ctx, b.refs)
	if err != nil {
		return 0, 0, err
	}
	defer tx.Rollback()
	rows := map[string]policy.Row{}
	for i, row := range tx.Rows() {
		rows[b.refs[i].Key] = row
	}
	others := func(ref policy.Ref) bool { return rows[ref.Key].State != policy.Absent && !e.readsStore(ref) }
	ids := j.leave(b.ids, others)
	if left = len(b.ids) - len(ids); len(ids) == 0 {
		return 0, left, nil
	}
	there, err := tx.Strike(ctx, ids)
	if e.store.note("strike", err) != nil {
		return 0, 0, err
	}
	todo := map[string]bool{}
	var remain []policy.Ref // of entries that also name keys that are ours to repair
	for _, in := range there {
		for _, ref := range in.Refs {
			row, locked := rows[ref.Key]
			if !locked {
				return 0, 0, errOtherKeys
			}
			if others(ref) {
				if !slices.Contains(remain, ref) {
					remain = append(remain, ref)
				}
				continue
			}
			todo[ref.Key] = speaks(row)
		}
	}
	named := len(todo)
	maps.DeleteFunc(todo, func(_ string, has bool) bool { return !has })
	if err := j.dropRowless(ctx, tx, b.refs, there); err != nil {
		return 0, 0, err
	}
	marked := 0
	for keys := range slices.Chunk(slices.Sorted(maps.Keys(todo)), maxRepair) {
		// Both journals may name a key: with a row Postgres wins, so the mark goes too.
		rs, err := e.up.script(ctx, scriptRepair, keys, strconv.FormatInt(tx.Number(), 10), "1", "0")
		if err != nil {
			e.redisFailed(err)
			return 0, 0, err
		}
		for _, r := range rs {
			if r.code != keyDone {
				e.lift(ctx, tx, rs)
				return 0, 0, errOvertaken
			}
			marked += int(r.at)
		}
	}
	if e.up.epoch.Load() != epoch {
		return 0, 0, errLost
	}
	if len(there) > 0 {
		if _, err := tx.Commit(ctx, nil, remain, nil, false); e.store.note("strike", err) != nil {
			return 0, 0, err // the entries are there, or their keys are repaired
		}
	}
	tx.Rollback()
	e.stats.repairs[redisStaleNoRow].Add(int64(named - len(todo)))
	e.stats.repairs[bothStale].Add(int64(marked))
	e.stats.repairs[redisStaleRow].Add(int64(len(todo) - marked))
	j.mu.Lock()
	defer j.mu.Unlock()
	for _, in := range there {
		if known, ok := j.intents[in.ID]; ok {
			j.longest.entry = max(j.longest.entry, stood(known.since))
		}
	}
	for _, id := range ids {
		j.unlearn(id)
		delete(j.own, id)
	}
	j.publish()
	return len(there), left, nil
}

// leave takes out of ids the entries all of whose keys are for others to repair, and remembers them.
func (j *journal) leave(ids []int64, others func(policy.Ref) bool) (mine []int64) {
	j.mu.Lock()
	defer j.mu.Unlock()
	for _, id := range ids {
		if in := j.intents[id]; len(in.refs) > 0 && !slices.ContainsFunc(in.refs, func(ref policy.Ref) bool { return !others(ref) }) {
			j.left[id] = time.Now().Add(leftAgain)
			continue
		}
		mine = append(mine, id)
	}
	return mine
}

// repairBytes of values go through one repair at once; a larger one goes alone.
const repairBytes = 4 << 20

// repairMarks: the store is stale. Redis's value goes into the row where the phase keeps rows, else the row goes. What the values
// weigh decides how many keys share a transaction; one that fails keeps its mark and holds up no other. It tells how many marks were
// struck.
func (j *journal) repairMarks(ctx context.Context, refs []policy.Ref) (struck int, failed error) {
	e := j.e
	keys := make([]string, len(refs))
	for i, ref := range refs {
		keys[i] = ref.Key
	}
	weights, err := e.up.script(ctx, scriptWeigh, keys)
	if err != nil {
		e.redisFailed(err)
		return 0, err
	}
	var part []policy.Ref
	size := int64(0)
	flush := func(read bool) {
		if len(part) == 0 {
			return
		}
		n, err := j.repairPart(ctx, part, read)
		if err != nil {
			failed = err
		}
		struck += n
		part, size = nil, 0
	}
	for i, ref := range refs {
		weight := int64(0)
		if e.keepsRows(ref) {
			weight = weights[i].at
		}
		if size > 0 && size+weight > repairBytes {
			flush(true)
		}
		part, size = append(part, ref), size+weight
		if weight > int64(e.cfg.MaxValue)+repairBytes {
			flush(false)
		}
	}
	flush(true)
	return struck, failed
}

// repairPart repairs some keys in one transaction. read: with their values, where rows are kept; without, the rows go: what is too large for a row, or no JSON
// for a column, and came into Redis without us, is Redis's alone.
func (j *journal) repairPart(ctx context.Context, refs []policy.Ref, read bool) (struck int, failed error) {
	e := j.e
	ctx, cancel := context.WithTimeout(ctx, e.cfg.StoreTimeout)
	defer cancel()
	tx, err := e.store.lock(ctx, refs)
	if err != nil {
		return 0, err
	}
	defer tx.Rollback()
	number := strconv.FormatInt(tx.Number(), 10)
	keys := make([]string, len(refs))
	for i, ref := range refs {
		keys[i] = ref.Key
	}
	look := scriptLook
	for _, ref := range refs {
		if read && e.keepsRows(ref) {
			look = scriptRead
		}
	}
	rs, err := e.up.script(ctx, look, keys, number)
	if err != nil {
		e.redisFailed(err)
		return 0, err
	}
	// Which entries are there now, and not at the last poll:
	//
	//	1 K is marked    2 another sidecar, cut off from Redis, commits a new row for K, with an entry
	//	3 for want of the entry, what Redis has of K would go into the row, or the row go
	named, err := tx.Named(ctx, keys)
	if e.store.note("repair", err) != nil {
		return 0, err
	}
	var changes []policy.Change
	var strike []string
	copied := 0
	argv := []string{number}
	for i, r := range rs {
		if r.code == keyRefused || r.mark == "" {
			continue
		}
		row := tx.Rows()[i]
		if row.State != policy.Absent && named[keys[i]] {
			continue // both journals: repairBatch decides
		}
		c := policy.Change{Ref: refs[i], Op: policy.Drop}
		if e.keepsRows(refs[i]) {
			switch r.code {
			case keyValue:
				if e.fitsRef(refs[i], r.value) { // else Redis alone holds it
					c.Op, c.Value = policy.Put, r.value
					c.Expiry = e.rowLife(r.at)
				}
			case keyDone:
				c.Op = policy.Delete
			}
		}
		if row.State == policy.NoRow {
			c.Op = policy.Drop
		}
		if c.Op != policy.Drop {
			copied++
		}
		if c.Op != policy.Drop || dropped(row) || row.State == policy.NoRow {
			changes = append(changes, c)
		}
		strike = append(strike, keys[i])
		argv = append(argv, r.mark)
	}
	if len(changes) > 0 {
		_, err := tx.Commit(ctx, changes, nil, nil, false)
		switch {
		case err == nil || !e.store.BadData(err) && !e.store.Rejected(err):
		case len(refs) > 1: // one of them, and each finds out by itself
			tx.Rollback()
			for i := range refs {
				n, one := j.repairPart(ctx, refs[i:i+1], read)
				struck, failed = struck+n, errors.Join(failed, one)
			}
			return struck, failed
		case read && e.inColumn(refs[0]): // the gate let something pass that this server refuses as JSON, or the table has rules of its own
			tx.Rollback()
			return j.repairPart(ctx, refs, false)
		default:
			if e.store.Rejected(err) { // the row says what is not so, and the mark keeps it from being read
				e.log.Warn("a constraint or trigger of the application's table refuses that its column is emptied; the key's mark stays until it does not", zap.String("route", refs[0].Route))
			}
			return 0, err // the next poll finds the mark again
		}
		if e.store.note("repair", err) != nil {
			return 0, err
		}
	}
	tx.Rollback()
	e.lift(ctx, tx, rs)
	if len(strike) == 0 {
		return 0, nil
	}
	if _, err := e.up.script(ctx, scriptStrike, strike, argv...); err != nil {
		e.redisFailed(err)
		return 0, err
	}
	e.stats.repairs[storeStaleCopied].Add(int64(copied))
	e.stats.repairs[storeStaleDropped].Add(int64(len(strike) - copied))
	j.mu.Lock()
	defer j.mu.Unlock()
	for i, k := range strike {
		if since, known := j.markedSince(k); known {
			j.longest.mark = max(j.longest.mark, stood(since))
		}
		if j.marks[k] == argv[i+1] {
			delete(j.marks, k)
		}
		if j.mine[k].version == argv[i+1] {
			delete(j.mine, k)
		}
	}
	j.publish()
	return len(strike), nil
}

// stood is how long what was made then has stood by now.
func stood(since int64) time.Duration {
	return time.Duration(max(localNow()-since, 0)) * time.Microsecond
}

// markedSince tells since when this process knows that a key's row is stale. Redis's journal has no times. Caller holds mu.
func (j *journal) markedSince(key string) (since int64, known bool) {
	m := j.mine[key]
	_, counts := j.marks[key]
	switch {
	case m.left && counts:
		return min(m.since, j.seen[key].since), true
	case m.left:
		return m.since, true
	}
	return j.seen[key].since, counts
}

// state is how long both journals are, and the ages of what stands there longest. It looks at what the polls have read, which is
// bounded by maxJournal.
func (j *journal) state() (out JournalStats) {
	j.mu.RLock()
	defer j.mu.RUnlock()
	now := localNow()
	entry, mark := now, now // the oldest
	for _, in := range j.intents {
		entry = min(entry, in.since)
	}
	for k := range j.staleStoreKeys() {
		out.StoreStale++
		since, _ := j.markedSince(k)
		mark = min(mark, since)
	}
	seconds := func(since int64) float64 { return float64(now-since) / 1e6 }
	out.RedisStale = len(j.intents)
	out.OldestSeconds, out.RedisStaleOldest, out.StoreStaleOldest = seconds(min(entry, mark)), seconds(entry), seconds(mark)
	out.RedisStaleLongest, out.StoreStaleLongest = j.longest.entry.Seconds(), j.longest.mark.Seconds()
	return out
}
