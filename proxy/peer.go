package proxy

import (
	"bufio"
	"context"
	"errors"
	"math"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"cacheproxy/policy"
)

// PeerStore is the part of Store that a Peer needs, and Look.
type PeerStore interface {
	Load(ctx context.Context, refs []policy.Ref) ([]policy.Row, error)
	// Look is Load for a caller that needs no values: those of its rows are empty.
	Look(ctx context.Context, refs []policy.Ref) ([]policy.Row, error)
	// Weigh tells how many bytes the values have that Load would return, -1 for a key that has none.
	Weigh(ctx context.Context, refs []policy.Ref) ([]int64, error)
	Lock(ctx context.Context, refs []policy.Ref) (Tx, error)
	Poll(ctx context.Context, after int64) (StorePoll, error)
	Lift(ctx context.Context, above int64) (lifted bool, err error)
	BadData(err error) bool
	Rejected(err error) bool
	// JSON tells whether a value can be stored where nothing but JSON can.
	JSON(value []byte) bool
}

// Peer keeps the protocols for a process that serves no clients: what copies one store into the other, or compares them, while sidecars serve
// both. To them it is one more reader that misses, one more writer, one more repair. It reads no journal and repairs nothing that stands in
// one: of a key that Redis's journal names it keeps clear.
//
// A sidecar avoids Redis's copy also of keys that the journal in Postgres names, and promotes none of those. Here that is not needed:
//
//	1 we have the lease of K and read its row    2 W, cut off from Redis, changes the row, with an entry
//	3 we promote what we have read: sidecars avoid it as soon as they know the entry, as any older copy of K that was there
//	4 its repair, under the key lock, deletes it; a lease of before is void then
type Peer struct {
	// Static after NewPeer.
	dialer  *dialer
	store   PeerStore
	timeout time.Duration
	max     int
	id      string

	seq    atomic.Uint64
	clocks clocks
}

// PeerConfig says what a Peer works with. Redis.Timeout bounds each question to Redis.
type PeerConfig struct {
	Redis    RedisConfig
	MaxValue int    // bytes of a value that is copied
	Instance string // unique in the fleet
}

// NewPeer allocates; Dial connects.
func NewPeer(cfg PeerConfig, store PeerStore) (*Peer, error) {
	d, err := newDialer(cfg.Redis)
	if err != nil {
		return nil, err
	}
	return &Peer{dialer: d, store: store, timeout: cfg.Redis.Timeout, max: cfg.MaxValue, id: cfg.Instance}, nil
}

// PeerLink is one connection of a Peer to Redis, for one goroutine. All steps of one key go over one of them: a lease is worth something only
// in the process that granted it, and a connection reaches one process. After an error that Broken is true of it is of no use.
type PeerLink struct {
	p      *Peer
	link   *link
	rd     *bufio.Reader
	broken bool
	spent  Spent
}

// Spent is how long a connection has waited for each store since Spent was asked last, and how often.
type Spent struct {
	Redis, Store   time.Duration
	Redises, Loads int
}

// Spent returns it and begins anew.
func (c *PeerLink) Spent() Spent {
	s := c.spent
	c.spent = Spent{}
	return s
}

// Dial connects to Redis.
func (p *Peer) Dial(ctx context.Context) (*PeerLink, error) {
	l, err := p.dialer.dial(ctx, 2, "cacheproxy-tools")
	if err != nil {
		return nil, err
	}
	return &PeerLink{p: p, link: l, rd: bufio.NewReaderSize(l, 64<<10)}, nil
}

// Close closes the connection.
func (c *PeerLink) Close() { c.link.Close() } //nolint:errcheck // nothing is left to be told

// Broken tells that the connection is of no use any more.
func (c *PeerLink) Broken() bool { return c.broken }

// RunID names the process that the connection reaches.
func (c *PeerLink) RunID() string { return c.link.runID }

// Info is what the server said of itself when the connection was made.
func (c *PeerLink) Info() map[string]string { return c.link.info }

// do asks Redis one thing. An error reply is an error.
func (c *PeerLink) do(ctx context.Context, args ...string) ([]byte, error) {
	frames, err := c.pipeline(ctx, [][]string{args})
	if err != nil {
		return nil, err
	}
	return frames[0], errorOf(frames[0])
}

// maxPeerReply bounds what one reply may make us hold: a batch of values, or one of the largest that Redis has.
const maxPeerReply = 1 << 30

// pipeline asks several things in one write. Error replies are among the frames.
func (c *PeerLink) pipeline(ctx context.Context, cmds [][]string) ([][]byte, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	fail := func(err error) ([][]byte, error) {
		c.broken = true
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		return nil, &outageError{why: classifyError(err)}
	}
	if err := c.link.SetDeadline(time.Now().Add(c.p.timeout)); err != nil {
		return fail(err)
	}
	stop := context.AfterFunc(ctx, func() { c.link.SetDeadline(time.Unix(1, 0)) }) //nolint:errcheck // it is closed already then
	defer stop()
	begun := time.Now()
	defer func() {
		c.spent.Redis += time.Since(begun)
		c.spent.Redises++
	}()
	var out []byte
	for _, args := range cmds {
		out = appendCommand(out, args...)
	}
	if _, err := c.link.Write(out); err != nil {
		return fail(err)
	}
	frames := make([][]byte, len(cmds))
	for i := range cmds {
		frame, err := readFrame(c.rd, maxPeerReply)
		if err != nil {
			return fail(err)
		}
		frames[i] = frame
	}
	return frames, nil
}

// script runs s for keys.
func (c *PeerLink) script(ctx context.Context, s *script, keys []string, argv ...string) ([]keyReply, error) {
	frame, err := s.eval(keyArgs(keys, argv), func(args ...string) ([]byte, error) { return c.do(ctx, args...) })
	if err != nil {
		return nil, err
	}
	return keyReplies(frame, len(keys))
}

// RedisTrouble says in a word why Redis did not do what it was asked ("timeout", "oom" …), "" if err says nothing about Redis.
func RedisTrouble(err error) string {
	o, ok := errors.AsType[*outageError](err)
	switch {
	case !ok:
		return ""
	case o.why == outOther && strings.Contains(o.reply, "OOM"): // before Redis 7 the code of an error in a script is ERR
		return string(outOOM)
	}
	return string(o.why)
}

// Measure looks at the clocks of both stores, and returns the phases in which each route was served. Until then the clocks are taken to be the same.
func (c *PeerLink) Measure(ctx context.Context) (phases map[string][]string, err error) {
	p := c.p
	if err := p.clocks.askRedis(func(args ...string) ([]byte, error) { return c.do(ctx, args...) }); err != nil {
		return nil, err
	}
	for i := 0; i <= askAgain && (i == 0 || p.clocks.store.doubtful()); i++ {
		asked := localNow()
		poll, err := p.store.Poll(ctx, math.MaxInt64) // of the journal, nothing
		if err != nil {
			return nil, err
		}
		p.clocks.store.saw(asked, localNow(), poll.Now.UnixMicro())
		phases = poll.Phases
	}
	return phases, nil
}

// Skew is by how much the two ends of one key may seem to differ although they are one moment: what remains open about the clocks, and
// the ten milliseconds of P6.
func (p *Peer) Skew() time.Duration {
	return 10*time.Millisecond + time.Duration(p.clocks.redis.doubt()+p.clocks.store.doubt())*time.Microsecond
}

// Trust is a closed list: what the clock in Redis says of the data there (see "Outages, restarts, failovers" in docs/consistency.md).
type Trust uint8

const (
	// Verified: some sidecar trusts it.
	Verified Trust = iota
	// Unverified: none has looked at it since it was restarted or replaced. It may hold an older memory.
	Unverified
	// Unknown: none has ever served it, and there are keys. The first that does drops every copy that has a row.
	Unknown
)

// Trust looks at the clock. Where there is none because Redis is empty, it writes one, as a sidecar does: or what is copied now would be dropped by the first that
// comes.
func (c *PeerLink) Trust(ctx context.Context) (Trust, error) {
	frame, err := c.do(ctx, "GET", clockName)
	if err != nil {
		return Unverified, err
	}
	clock, _ := bulk(frame)
	switch _, set, _ := strings.Cut(string(clock), " "); {
	case strings.TrimSuffix(set, inPart) == dataSet(c.link):
		return Verified, nil
	case len(clock) > 0:
		return Unverified, nil
	}
	poll, err := c.p.store.Poll(ctx, math.MaxInt64)
	if err != nil {
		return Unverified, err
	}
	if n, err := c.Size(ctx); err != nil || n > 0 {
		return Unknown, err
	}
	_, err = scriptPoll.eval(func(dst []string) []string {
		return append(dst, "2", journalName, clockName, strconv.FormatInt(poll.Now.UnixMilli(), 10), c.p.version(), anchorField, dataSet(c.link))
	}, func(args ...string) ([]byte, error) { return c.do(ctx, args...) })
	return Verified, err
}

// version is a new one for a mark or an anchor.
func (p *Peer) version() string { return p.id + "-" + strconv.FormatUint(p.seq.Add(1), 36) }

// Fate is a closed list: what became of a key.
type Fate uint8

const (
	Promoted   Fate = iota // Redis has the row's value now
	Copied                 // the store has Redis's value now
	There                  // the other store has the key: it was left alone
	OtherType              // Redis has something there that is no string
	Marked                 // Redis's journal names the key: its row is stale, and the repair brings it
	Busy                   // somebody is at the key: try later
	Gone                   // it has been deleted or has expired since it was listed
	Deleted                // the store knows that the key was deleted: what Redis has is no value to copy
	TooLarge               // the value is larger than what is copied
	NotJSON                // the store keeps JSON only
	NoPlace                // the store has no row that could hold the key
	Remembered             // readers remember for negative_ttl that both stores lack it
	Repaired               // the copies differed, and do not any more
	Refused                // a constraint or a trigger of the table refuses the value
	Late                   // reading the rows took longer than their leases lasted: ask for fewer, or with time
)

var fateWords = [...]string{"promoted", "copied", "already there", "other type", "marked", "busy", "gone", "deleted", "too large", "not JSON", "no row to hold it", "remembered as absent", "repaired", "refused by the table", "too slow to read"}

func (f Fate) String() string { return fateWords[f] }

// Done is a key's fate and the bytes of the value that was copied, or was too large to be.
type Done struct {
	Fate Fate
	Size int
}

const (
	// peerLease is how long a Peer's lease of an absent key lasts. Its loads are larger than a reader's, and the database may be slow under them; whoever needs the key
	// waits 100 ms at most and answers from the store. Longer would keep keys from being promoted after a crash of this process.
	peerLease = 2 * time.Second
	// PatientLease is that of a key whose row alone took longer to read: longer than any question to the store is waited for.
	PatientLease = time.Minute
)

// Promote copies rows into Redis as a reader does that misses: see "A read" in docs/consistency.md. Nothing that Redis has is touched. sent, if it is not nil, remembers
// which keys were handed over before an error, so that they count as promoted when they are there the next time.
func (c *PeerLink) Promote(ctx context.Context, refs []policy.Ref, sent map[string]bool) ([]Done, error) {
	return c.promote(ctx, refs, sent, peerLease)
}

// PromoteSlow is Promote for a key that was Late, and waits as long as it takes.
func (c *PeerLink) PromoteSlow(ctx context.Context, ref policy.Ref, sent map[string]bool) ([]Done, error) {
	return c.promote(ctx, []policy.Ref{ref}, sent, PatientLease)
}

func (c *PeerLink) promote(ctx context.Context, refs []policy.Ref, sent map[string]bool, lease time.Duration) ([]Done, error) {
	token := "r" + c.p.id + strconv.FormatUint(c.p.seq.Add(1), 36)
	ends := time.Now().Add(lease) // none of them ends before
	rs, err := c.script(ctx, scriptGrant, keysOfRefs(refs), token, strconv.FormatInt(lease.Milliseconds(), 10), "1")
	if err != nil {
		return nil, err
	}
	out := make([]Done, len(refs))
	var mine []int
	for i, r := range rs {
		switch r.code {
		case keyValue:
			out[i].Fate = There
			if sent[refs[i].Key] {
				out[i].Fate = Promoted
			}
		case keyOther:
			out[i].Fate = OtherType
		case keyMarked:
			out[i].Fate = Marked
		case keyNegative:
			out[i].Fate = Remembered
		case keyGranted:
			mine = append(mine, i)
		default:
			out[i].Fate = Busy
		}
	}
	if len(mine) == 0 {
		return out, nil
	}
	return out, c.promoteGranted(ctx, refs, mine, token, ends, sent, out)
}

// promoteGranted reads the rows under leases that are ours until they end, and promotes them.
func (c *PeerLink) promoteGranted(ctx context.Context, refs []policy.Ref, mine []int, token string, ends time.Time, sent map[string]bool, out []Done) error {
	asked := make([]policy.Ref, len(mine))
	for j, i := range mine {
		asked[j] = refs[i]
	}
	rows, err := c.load(ctx, asked)
	if err != nil {
		// Nobody should wait for a lease that promises nothing.
		_, _ = c.script(ctx, scriptAbsent, keysOfRefs(asked), token, "0")
		return err
	}
	argv := []string{token}
	var keys, rest []string
	var live []int
	for j, i := range mine {
		row := rows[j]
		switch {
		case row.State != policy.Live:
			out[i].Fate = Gone
		case len(row.Value) > c.p.max:
			out[i] = Done{TooLarge, len(row.Value)}
		default:
			out[i] = Done{Promoted, len(row.Value)}
			live, keys = append(live, i), append(keys, refs[i].Key)
			argv = append(argv, string(row.Value), strconv.FormatInt(c.p.clocks.toRedis(row.ExpiresAt), 10))
			continue
		}
		rest = append(rest, refs[i].Key)
	}
	if len(rest) > 0 {
		if _, err := c.script(ctx, scriptAbsent, rest, token, "0"); err != nil {
			return err
		}
	}
	if len(keys) == 0 {
		return nil
	}
	if sent != nil {
		for _, k := range keys {
			sent[k] = true
		}
	}
	rs, err := c.script(ctx, scriptPromote, keys, argv...)
	if err != nil {
		return err
	}
	refused := Busy
	if !time.Now().Before(ends) {
		refused = Late
	}
	for j, i := range live {
		if rs[j].code != keyDone {
			out[i] = Done{Fate: refused}
		}
	}
	return nil
}

// load is the store's Load, and how long it took.
func (c *PeerLink) load(ctx context.Context, refs []policy.Ref) ([]policy.Row, error) {
	begun := time.Now()
	defer func() {
		c.spent.Store += time.Since(begun)
		c.spent.Loads++
	}()
	return c.p.store.Load(ctx, refs)
}

func keysOfRefs(refs []policy.Ref) []string {
	keys := make([]string, len(refs))
	for i, ref := range refs {
		keys[i] = ref.Key
	}
	return keys
}

// Weigh tells how many bytes the values of rows have, -1 for a key that has none.
func (c *PeerLink) Weigh(ctx context.Context, refs []policy.Ref) ([]int64, error) {
	begun := time.Now()
	defer func() {
		c.spent.Store += time.Since(begun)
		c.spent.Loads++
	}()
	return c.p.store.Weigh(ctx, refs)
}

// Peek tells what Promote would do with keys that have a live row, and changes nothing anywhere, not even what scripts Redis remembers.
func (c *PeerLink) Peek(ctx context.Context, refs []policy.Ref) ([]Done, error) {
	cmds := make([][]string, 0, 2*len(refs))
	for _, ref := range refs {
		cmds = append(cmds, []string{"TYPE", ref.Key}, []string{"HEXISTS", journalName, ref.Key})
	}
	frames, err := c.pipeline(ctx, cmds)
	if err != nil {
		return nil, err
	}
	out := make([]Done, len(refs))
	var absent []int
	var asked []policy.Ref
	for i := range refs {
		for _, f := range frames[2*i : 2*i+2] {
			if err := errorOf(f); err != nil {
				return nil, err
			}
		}
		kind, _ := bulk(frames[2*i])
		marked, _ := parseInt(frames[2*i+1])
		switch {
		case string(kind) == "string":
			out[i].Fate = There
		case string(kind) != "none":
			out[i].Fate = OtherType
		case marked == 1:
			out[i].Fate = Marked
		default:
			absent, asked = append(absent, i), append(asked, refs[i])
		}
	}
	if len(absent) == 0 {
		return out, nil
	}
	sizes, err := c.Weigh(ctx, asked)
	if err != nil {
		return nil, err
	}
	for j, i := range absent {
		switch n := sizes[j]; {
		case n < 0:
			out[i].Fate = Gone
		case n > int64(c.p.max):
			out[i] = Done{TooLarge, int(n)}
		default:
			out[i] = Done{Promoted, int(n)}
		}
	}
	return out, nil
}

// Scan returns a part of Redis's keys that hold strings, and where to go on: "0" begins, and ends. A key may come more than once.
func (c *PeerLink) Scan(ctx context.Context, cursor string, count int) (next string, keys []string, err error) {
	frame, err := c.do(ctx, "SCAN", cursor, "COUNT", strconv.Itoa(count), "TYPE", "string")
	if err != nil {
		return "", nil, err
	}
	cols, _ := elements(frame, nil)
	if len(cols) != 2 {
		return "", nil, &outageError{why: outOther, reply: "SCAN answered out of shape"}
	}
	at, _ := bulk(cols[0])
	names, _ := elements(cols[1], nil)
	for _, f := range names {
		name, _ := bulk(f)
		keys = append(keys, string(name))
	}
	return string(at), keys, nil
}

// Size is how many keys Redis has, its own and ours included.
func (c *PeerLink) Size(ctx context.Context) (int64, error) {
	frame, err := c.do(ctx, "DBSIZE")
	n, _ := parseInt(frame)
	return n, err
}

// lengths tells how long the strings are.
func (c *PeerLink) lengths(ctx context.Context, keys []string) ([]int64, error) {
	cmds := make([][]string, len(keys))
	for i, k := range keys {
		cmds[i] = []string{"STRLEN", k}
	}
	frames, err := c.pipeline(ctx, cmds)
	if err != nil {
		return nil, err
	}
	out := make([]int64, len(keys))
	for i, f := range frames {
		out[i], _ = parseInt(f) // no string any more: it is looked at again under the lock
	}
	return out, nil
}

// lacking tells which of keys the store lacks, by their place, and what is known of the others.
func (c *PeerLink) lacking(ctx context.Context, refs []policy.Ref, sent map[string]bool) (out []Done, absent []int, err error) {
	rows, err := c.p.store.Look(ctx, refs)
	if err != nil {
		return nil, nil, err
	}
	out = make([]Done, len(refs))
	for i, row := range rows {
		switch row.State {
		case policy.Absent:
			absent = append(absent, i)
		case policy.Tombstone:
			out[i].Fate = Deleted
		case policy.Live:
			out[i].Fate = There
			if sent[refs[i].Key] {
				out[i].Fate = Copied
			}
		default:
			out[i].Fate = NoPlace
		}
	}
	return out, absent, nil
}

// PeekCopy tells what Copy would do, and changes nothing anywhere. json says that the store keeps nothing but JSON.
func (c *PeerLink) PeekCopy(ctx context.Context, refs []policy.Ref, json bool) ([]Done, error) {
	out, absent, err := c.lacking(ctx, refs, nil)
	if err != nil || len(absent) == 0 {
		return out, err
	}
	cmds := make([][]string, 0, 3*len(absent))
	for _, i := range absent {
		cmds = append(cmds, []string{"TYPE", refs[i].Key}, []string{"HEXISTS", journalName, refs[i].Key}, []string{"STRLEN", refs[i].Key})
	}
	frames, err := c.pipeline(ctx, cmds)
	if err != nil {
		return nil, err
	}
	for j, i := range absent {
		kind, _ := bulk(frames[3*j])
		marked, _ := parseInt(frames[3*j+1])
		size, _ := parseInt(frames[3*j+2])
		switch {
		case errorOf(frames[3*j]) != nil:
			return nil, errorOf(frames[3*j])
		case marked == 1:
			out[i].Fate = Marked
		case string(kind) == "none":
			out[i].Fate = Gone
		case string(kind) != "string":
			out[i].Fate = OtherType
		case size > int64(c.p.max):
			out[i] = Done{TooLarge, int(size)}
		default:
			out[i] = Done{Copied, int(size)}
		}
	}
	if json {
		return out, c.peekJSON(ctx, refs, absent, out)
	}
	return out, nil
}

// peekJSON reads the values that Copy would copy, and tells which of them a store would refuse that keeps nothing but JSON.
func (c *PeerLink) peekJSON(ctx context.Context, refs []policy.Ref, absent []int, out []Done) error {
	for len(absent) > 0 {
		var cmds [][]string
		n, weight := 0, 0
		for ; n < len(absent); n++ {
			d := out[absent[n]]
			if weight += d.Size; d.Fate == Copied && len(cmds) > 0 && weight > repairBytes {
				break
			}
			if d.Fate == Copied {
				cmds = append(cmds, []string{"GET", refs[absent[n]].Key})
			}
		}
		if len(cmds) == 0 {
			return nil // none is left
		}
		frames, err := c.pipeline(ctx, cmds)
		if err != nil {
			return err
		}
		for _, i := range absent[:n] {
			if out[i].Fate != Copied {
				continue
			}
			value, ok := bulk(frames[0])
			switch {
			case !ok: // gone, or another type by now
				out[i] = Done{Fate: Gone}
			case !c.p.store.JSON(value):
				out[i] = Done{Fate: NotJSON}
			}
			frames = frames[1:]
		}
		absent = absent[n:]
	}
	return nil
}

// Copy copies what only Redis has into the store, as a write does that finds no row but a value (step 2 in docs/consistency.md): under the
// key locks, and only if the key is not marked. Nothing changes in Redis.
func (c *PeerLink) Copy(ctx context.Context, refs []policy.Ref, sent map[string]bool) ([]Done, error) {
	out, absent, err := c.lacking(ctx, refs, sent)
	if err != nil || len(absent) == 0 {
		return out, err
	}
	keys := make([]string, len(absent))
	for j, i := range absent {
		keys[j] = refs[i].Key
	}
	sizes, err := c.lengths(ctx, keys)
	if err != nil {
		return nil, err
	}
	var part []int
	weight := int64(0)
	flush := func() error {
		defer func() { part, weight = nil, 0 }()
		return c.copyPart(ctx, refs, part, sent, out)
	}
	for j, i := range absent {
		switch {
		case sizes[j] > int64(c.p.max):
			out[i] = Done{TooLarge, int(sizes[j])}
			continue
		case weight > 0 && weight+sizes[j] > repairBytes, len(part) == maxRepair:
			if err := flush(); err != nil {
				return nil, err
			}
		}
		part, weight = append(part, i), weight+sizes[j]
	}
	return out, flush()
}

// copyPart copies some keys in one transaction. A value that the store refuses has one to itself, and one more attempt as bytes.
func (c *PeerLink) copyPart(ctx context.Context, refs []policy.Ref, part []int, sent map[string]bool, out []Done) error {
	if len(part) == 0 {
		return nil
	}
	err := c.copyLocked(ctx, refs, part, sent, out, false)
	switch {
	case err == nil || !c.p.store.BadData(err) && !c.p.store.Rejected(err):
		return err
	case len(part) > 1:
		for _, i := range part {
			if err := c.copyPart(ctx, refs, []int{i}, sent, out); err != nil {
				return err
			}
		}
		return nil
	}
	if c.p.store.BadData(err) {
		err = c.copyLocked(ctx, refs, part, sent, out, true)
	}
	switch {
	case err == nil:
	case c.p.store.BadData(err):
		out[part[0]].Fate, err = NotJSON, nil
	case c.p.store.Rejected(err):
		out[part[0]].Fate, err = Refused, nil
	}
	return err
}

func (c *PeerLink) copyLocked(ctx context.Context, refs []policy.Ref, part []int, sent map[string]bool, out []Done, rawOnly bool) error {
	locked := make([]policy.Ref, len(part))
	for j, i := range part {
		locked[j] = refs[i]
	}
	tx, err := c.p.store.Lock(ctx, locked)
	if err != nil {
		return err
	}
	defer tx.Rollback()
	rs, err := c.script(ctx, scriptRead, keysOfRefs(locked), strconv.FormatInt(tx.Number(), 10))
	if err != nil {
		return err
	}
	var changes []policy.Change
	for j, r := range rs {
		d := Done{}
		switch row := tx.Rows()[j]; {
		case row.State == policy.Live:
			d.Fate = There
			if sent[locked[j].Key] {
				d.Fate = Copied
			}
		case row.State == policy.Tombstone:
			d.Fate = Deleted
		case row.State != policy.Absent:
			d.Fate = NoPlace
		case r.code == keyRefused:
			d.Fate = Busy
		case r.mark != "":
			d.Fate = Marked
		case r.code == keyOther:
			d.Fate = OtherType
		case r.code != keyValue:
			d.Fate = Gone
		case len(r.value) > c.p.max:
			d = Done{TooLarge, len(r.value)}
		default:
			d = Done{Copied, len(r.value)}
			changes = append(changes, policy.Change{Ref: locked[j], Op: policy.Put, Value: r.value, Expiry: c.p.clocks.rowLife(r.at)})
		}
		out[part[j]] = d
	}
	if len(changes) > 0 {
		if sent != nil {
			for _, ch := range changes {
				sent[ch.Ref.Key] = true
			}
		}
		if _, err := tx.Commit(ctx, changes, nil, nil, rawOnly); err != nil {
			return err
		}
	}
	tx.Rollback()
	return c.lift(ctx, rs)
}

// lift makes the next numbers higher than what Redis refused ours for. No transaction of ours may be open.
func (c *PeerLink) lift(ctx context.Context, rs []keyReply) error {
	above := refusedAbove(rs)
	if above == 0 {
		return nil
	}
	_, err := c.p.store.Lift(ctx, above)
	return err
}

// Pair is both copies of a key at about one moment.
type Pair struct {
	Row policy.Row
	// RowEnds is when the row ends, on Redis's clock; -1 is never.
	RowEnds int64
	Kind    string // what Redis has: "" nothing, "string", or another type
	Value   []byte // of a string
	Ends    int64  // when it ends, on Redis's clock; -1 is never
	Number  int64  // the highest number of a writer that Redis has seen
	Marked  bool   // Redis's journal names it
	Held    bool   // a writer is at work
}

// maxPending bounds what Pending remembers.
const maxPending = 100_000

// Pending are the keys that the journal in Postgres names: Redis's copy is stale, and its repair will come. Of a longer journal it is a part.
func (c *PeerLink) Pending(ctx context.Context) (map[string]bool, error) {
	keys := map[string]bool{}
	for after := int64(0); ; {
		p, err := c.p.store.Poll(ctx, after)
		if err != nil {
			return nil, err
		}
		for _, in := range p.Intents {
			after = in.ID
			for _, ref := range in.Refs {
				keys[ref.Key] = true
			}
		}
		if !p.More || len(keys) > maxPending {
			return keys, nil
		}
	}
}

// compareBytes of Redis's values are read at once by Compare; a larger one alone.
const compareBytes = repairBytes

// Compare reads both copies of the first of keys, of as many as Redis's values allow, and changes nothing.
func (c *PeerLink) Compare(ctx context.Context, refs []policy.Ref) ([]Pair, error) {
	sizes, err := c.lengths(ctx, keysOfRefs(refs))
	if err != nil {
		return nil, err
	}
	weight := int64(0)
	for i, n := range sizes {
		if weight += n; i > 0 && weight > compareBytes {
			refs = refs[:i]
			break
		}
	}
	rs, err := c.script(ctx, scriptRead, keysOfRefs(refs), "0")
	if err != nil {
		return nil, err
	}
	rows, err := c.load(ctx, refs)
	if err != nil {
		return nil, err
	}
	out := make([]Pair, len(refs))
	for i, r := range rs {
		p := Pair{Row: rows[i], RowEnds: c.p.clocks.toRedis(rows[i].ExpiresAt), Ends: -1, Number: r.num, Marked: r.mark != "", Held: r.held}
		switch r.code {
		case keyValue:
			p.Kind, p.Value, p.Ends = "string", r.value, r.at
		case keyOther:
			p.Kind = string(r.value)
		}
		out[i] = p
	}
	return out, nil
}

// Look tells which of keys the store knows, and changes nothing.
func (c *PeerLink) Look(ctx context.Context, refs []policy.Ref) ([]policy.Row, error) {
	return c.p.store.Look(ctx, refs)
}

// PreferStore makes the copies of keys that have a row equal to it: Redis's copy is deleted under the key lock and through the number, as in the
// repair of an entry, and the row promoted. A key without a row stays as it is.
func (c *PeerLink) PreferStore(ctx context.Context, refs []policy.Ref) ([]Done, error) {
	tx, err := c.p.store.Lock(ctx, refs)
	if err != nil {
		return nil, err
	}
	defer tx.Rollback()
	out := make([]Done, len(refs))
	var keys []string
	var idx []int
	for i, row := range tx.Rows() {
		if !speaks(row) {
			out[i].Fate = Gone
			continue
		}
		keys, idx = append(keys, refs[i].Key), append(idx, i)
	}
	if len(keys) == 0 {
		return out, nil
	}
	rs, err := c.script(ctx, scriptRepair, keys, strconv.FormatInt(tx.Number(), 10), "0", "1")
	if err != nil {
		return nil, err
	}
	var live []policy.Ref
	for j, i := range idx {
		switch rs[j].code {
		case keyDone:
			out[i].Fate = Repaired
			if tx.Rows()[i].State == policy.Live {
				live = append(live, refs[i])
			}
		case keyMarked:
			out[i].Fate = Marked
		default:
			out[i].Fate = Busy
		}
	}
	tx.Rollback()
	if err := c.lift(ctx, rs); err != nil {
		return nil, err
	}
	if len(live) > 0 {
		// Whoever else gets there first promotes the same row.
		if _, err := c.Promote(ctx, live, nil); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// PreferRedis drops the rows of keys that Redis has a string for, as a write of phase2 does that changes nothing: the key is marked in the script that
// makes sure of its value, its row goes, and then the mark. A key that Redis lacks stays as it is. The Redis must be Verified: a row is all that is left of what one has
// forgotten that was restarted.
func (c *PeerLink) PreferRedis(ctx context.Context, refs []policy.Ref) ([]Done, error) {
	out := make([]Done, len(refs))
	for i, ref := range refs {
		d, err := c.preferRedis(ctx, ref)
		if err != nil {
			return nil, err
		}
		out[i] = d
	}
	return out, nil
}

// preferRedis is one key's: they are few, and the script is one for all or none.
func (c *PeerLink) preferRedis(ctx context.Context, ref policy.Ref) (Done, error) {
	tx, err := c.p.store.Lock(ctx, []policy.Ref{ref})
	if err != nil {
		return Done{}, err
	}
	defer tx.Rollback()
	if tx.Rows()[0].State == policy.Absent {
		return Done{Fate: Gone}, nil
	}
	key, number := []string{ref.Key}, strconv.FormatInt(tx.Number(), 10)
	rs, err := c.script(ctx, scriptRead, key, number)
	if err != nil {
		return Done{}, err
	}
	switch r := rs[0]; {
	case r.code == keyRefused:
		tx.Rollback()
		return Done{Fate: Busy}, c.lift(ctx, rs)
	case r.mark != "":
		return Done{Fate: Marked}, nil
	case r.code != keyValue:
		return Done{Fate: Gone}, nil
	}
	// An entry makes the row the truth, and may be younger than what the caller knows: see repairPart.
	named, err := tx.Named(ctx, key)
	if err != nil {
		return Done{}, err
	}
	if named[ref.Key] {
		return Done{Fate: Marked}, nil
	}
	version := c.p.version()
	rs, err = c.script(ctx, scriptWrite, key, number, version, leaseMS,
		"x", "", "", "0", "="+string(rs[0].value), "", strconv.FormatInt(rs[0].num, 10))
	if err != nil {
		return Done{}, err // if it ran, the mark stays, and any sidecar repairs it
	}
	if rs[0].code != keyDone {
		return Done{Fate: Busy}, nil
	}
	if _, err := tx.Commit(ctx, []policy.Change{{Ref: ref, Op: policy.Drop}}, nil, nil, false); err != nil {
		return Done{}, err // as above
	}
	if _, err := c.script(ctx, scriptStrike, key, number, version); err != nil {
		return Done{}, err // as above
	}
	return Done{Fate: Repaired}, nil
}
