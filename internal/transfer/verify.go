package transfer

import (
	"bytes"
	"context"
	"fmt"
	"hash/maphash"
	"io"
	"sync"
	"text/tabwriter"
	"time"

	"cacheproxy/internal/samejson"
	"cacheproxy/policy"
	"cacheproxy/proxy"
)

// Kind is a closed list: how two copies of a key differ.
type Kind string

// The first five break a promise in every phase that has a store. The last two are what a phase may bring with it: they count when both stores
// are to hold the same (VerifyOptions.Complete).
const (
	DiffValue   Kind = "value"            // the bytes differ, and are not the same JSON either
	DiffBytes   Kind = "bytes"            // the bytes differ, and are the same JSON: in an adopted column that is no difference
	DiffTTL     Kind = "ttl"              // the copies do not end together
	DiffType    Kind = "type"             // Redis has something there that is no string
	DiffDeleted Kind = "deleted"          // Redis has what the store knows to be deleted or expired
	NotInRedis  Kind = "missing_in_redis" // only the store has it
	NotInStore  Kind = "missing_in_store" // only Redis has it
)

// Kinds are all of them, in the order of reports.
func Kinds() []Kind {
	return []Kind{DiffValue, DiffBytes, DiffTTL, DiffType, DiffDeleted, NotInRedis, NotInStore}
}

// VerifyOptions say what is to be compared, and how.
type VerifyOptions struct {
	Route  *policy.Route
	Router *policy.Router
	// Share of the keys that are compared, chosen at random; from 0 (none) to 1. Sample, if it is not 0, is about how many instead.
	Share  float64
	Sample int64
	// Rounds is how often a key must be found different, with neither copy changed between, until it counts; Pause is what lies between them. It should be
	// longer than it takes the sidecars to repair what they know of.
	Rounds int
	Pause  time.Duration
	// Exact: equal as JSON is not enough. So it is where the store keeps bytes.
	Exact bool
	// Complete: a key that one of the stores lacks counts as a difference.
	Complete bool
	Repair   bool
	Workers  int
	Patience time.Duration
	Progress *Progress
}

// Difference is one key that differs, for people.
type Difference struct {
	Kind       Kind   `json:"kind"`
	Key        string `json:"key"`
	RedisBytes int    `json:"redis_bytes"`          // -1: Redis has none
	StoreBytes int    `json:"store_bytes"`          // -1: the store has none
	RedisEnds  string `json:"redis_ends,omitempty"` // "" never
	StoreEnds  string `json:"store_ends,omitempty"`
	Fate       string `json:"fate,omitempty"` // what became of its repair
}

// Verdict is what was found.
type Verdict struct {
	Route string `json:"route"`
	Phase string `json:"phase"`
	// OK is whether nothing that counts is left: it is the exit code.
	OK       bool    `json:"ok"`
	Complete bool    `json:"complete"` // whether what is missing in one store counts
	Share    float64 `json:"share"`    // of the keys that were compared
	Rounds   int     `json:"rounds"`

	StoreKeys int64 `json:"store_keys"` // live rows of the route that were compared
	RedisKeys int64 `json:"redis_keys"` // strings of the route in Redis that were looked for in the store
	Equal     int64 `json:"equal"`
	InFlight  int64 `json:"in_flight"` // differ, and are being written or wait for a repair
	NoRow     int64 `json:"no_row"`    // keys in Redis that an adopted column has no row for

	// Differences counts by kind; of kinds that do not count in this phase too.
	Differences map[Kind]int64 `json:"differences"`
	// Counted is the sum of those that count.
	Counted  int64        `json:"counted"`
	Repaired int64        `json:"repaired"`
	Examples []Difference `json:"examples"`

	SkewMS  float64 `json:"skew_ms"` // by how much ends may differ
	Seconds float64 `json:"seconds"`
}

// suspect is a key that has been found different. Digests stand for values, so that it costs the same however large they are.
type suspect struct {
	ref   policy.Ref
	kind  Kind // "": not compared yet
	state [2]copyState
}

// copyState is one copy in short: what changes when the copy does.
type copyState struct {
	there  bool
	digest uint64
	size   int
	ends   int64
	number int64
}

// maxSuspects are settled at a time: their rounds are made before the walk goes on, so that memory is the same however many keys differ.
const maxSuspects = 20_000

// verification is one run.
type verification struct {
	opt    VerifyOptions
	stores Stores
	gate   *gate
	brake  *brake
	seed   maphash.Seed
	keeps  bool // the phase keeps a row for every write: rows are the truth

	mu       sync.Mutex
	suspects []suspect // guarded by mu
	verdict  Verdict   // guarded by mu
}

// Verify compares both copies of the keys of a route. The verdict is also good beside an error, for what was compared until then.
func Verify(ctx context.Context, stores Stores, opt VerifyOptions) (Verdict, error) {
	begun := time.Now()
	v := &verification{opt: opt, stores: stores, seed: maphash.MakeSeed(), keeps: opt.Route.Phase.Rules().Write.KeepsRow()}
	v.verdict = Verdict{
		Route: opt.Route.Name, Phase: opt.Route.Phase.String(), Complete: opt.Complete, Rounds: opt.Rounds,
		Share: 1, Differences: map[Kind]int64{}, Examples: []Difference{},
	}
	for _, k := range Kinds() {
		v.verdict.Differences[k] = 0
	}
	v.gate = &gate{patience: opt.Patience, say: opt.Progress.say}
	v.brake = newBrake(opt.Workers, opt.Progress.say)
	err := v.run(ctx)
	opt.Progress.end()
	v.verdict.Seconds = time.Since(begun).Seconds()
	v.verdict.OK = err == nil && v.verdict.Counted == v.verdict.Repaired
	if err != nil && ctx.Err() != nil {
		err = ErrInterrupted
	}
	return v.verdict, err
}

// Comparable tells whether comparing the stores of a route says anything in its phase.
func Comparable(r *policy.Route) error {
	if !r.Phase.Rules().UsesStore {
		return &Refusal{fmt.Sprintf("route %s is in %s, which has no store: there is nothing to compare Redis with", r.Name, r.Phase)}
	}
	return nil
}

func (v *verification) run(ctx context.Context) error {
	if err := Comparable(v.opt.Route); err != nil {
		return err
	}
	rows := &rowFeed{rows: v.stores.Rows, route: v.opt.Route, router: v.opt.Router}
	keys := &scanFeed{peer: v.stores.Peer, route: v.opt.Route, router: v.opt.Router, say: v.opt.Progress.say}
	defer keys.close()
	var inStore, inRedis int64
	err := patiently(ctx, v.stores, v.gate, func() error {
		link, err := v.stores.Peer.Dial(ctx)
		if err != nil {
			return err
		}
		defer link.Close()
		phases, err := link.Measure(ctx)
		if err != nil {
			return err
		}
		if err := servedWithout(v.opt.Route, phases); err != nil {
			return err
		}
		if inStore, err = rows.total(ctx); err != nil {
			return err
		}
		inRedis, err = keys.total(ctx)
		return err
	})
	if err != nil {
		return err
	}
	v.verdict.SkewMS = float64(v.stores.Peer.Skew().Microseconds()) / 1000
	share := v.opt.Share
	if v.opt.Sample > 0 {
		share = min(float64(v.opt.Sample)/float64(max(inStore, 1)), 1)
	}
	v.verdict.Share = share
	v.opt.Progress.begin(0)

	for _, walk := range []struct {
		feed  feed
		total int64
		what  string
		each  func(ctx context.Context, link *proxy.PeerLink, rows []policy.PageRow) error
	}{
		{rows, inStore, "rows", v.compareRows},
		{keys, inRedis, "keys of redis", v.lookForKeys},
	} {
		if err := v.walk(ctx, walk.feed, share, walk.total, walk.what, walk.each); err != nil {
			return err
		}
	}
	return v.settle(ctx)
}

// chosen tells whether a key is one of the share.
func (v *verification) chosen(key string, share float64) bool {
	return share >= 1 || float64(maphash.String(v.seed, key)>>11)/(1<<53) < share
}

// walk takes batches of a feed to workers, and settles suspects whenever there are enough of them.
func (v *verification) walk(ctx context.Context, f feed, share float64, total int64, what string,
	each func(context.Context, *proxy.PeerLink, []policy.PageRow) error,
) error {
	var parts [][]policy.PageRow
	after, last := "", false
	walked := int64(0)
	var part found
	for !last {
		parts = parts[:0]
		for len(parts) < v.opt.Workers && !last {
			err := patiently(ctx, v.stores, v.gate, func() (err error) {
				part, err = f.next(ctx, after)
				return err
			})
			if err != nil {
				return err
			}
			after, last = part.after, part.last
			walked += int64(len(part.rows))
			parts = append(parts, v.batches(part.rows, share)...)
		}
		if err := v.spread(ctx, parts, each); err != nil {
			return err
		}
		v.opt.Progress.show(walked, part.expected(walked, total), what)
		if len(v.suspects) >= maxSuspects {
			if err := v.settle(ctx); err != nil {
				return err
			}
		}
	}
	return nil
}

// batches cuts what is chosen of a part into batches, by keys and by bytes.
func (v *verification) batches(rows []policy.PageRow, share float64) (out [][]policy.PageRow) {
	var b []policy.PageRow
	weight := int64(0)
	for _, row := range rows {
		if row.State == policy.Absent || !v.chosen(row.Key, share) {
			continue
		}
		if len(b) == batchKeys || len(b) > 0 && weight+row.Size > batchBytes {
			out, b, weight = append(out, b), nil, 0
		}
		b, weight = append(b, row), weight+row.Size
	}
	if len(b) > 0 {
		out = append(out, b)
	}
	return out
}

// spread has workers do each for all parts.
func (v *verification) spread(ctx context.Context, parts [][]policy.PageRow, each func(context.Context, *proxy.PeerLink, []policy.PageRow) error) error {
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	work := make(chan []policy.PageRow, len(parts))
	for _, p := range parts {
		work <- p
	}
	close(work)
	var wg sync.WaitGroup
	for range min(v.opt.Workers, len(parts)) {
		wg.Go(func() {
			l := linkHolder{peer: v.stores.Peer}
			defer l.close()
			for part := range work {
				v.brake.enter()
				begun := time.Now()
				err := patiently(ctx, v.stores, v.gate, func() error {
					link, err := l.get(ctx)
					if err != nil {
						return err
					}
					return each(ctx, link, part)
				})
				v.brake.leave(ctx, time.Since(begun), l.spent())
				if err != nil {
					stop(err)
					return
				}
			}
		})
	}
	wg.Wait()
	return context.Cause(ctx)
}

// compareRows compares rows of the store with Redis.
func (v *verification) compareRows(ctx context.Context, link *proxy.PeerLink, rows []policy.PageRow) error {
	refs := make([]policy.Ref, len(rows))
	for i, row := range rows {
		refs[i] = policy.Ref{Route: v.opt.Route.Name, Key: row.Key}
	}
	// Nothing is counted before all is compared: after an error it is compared again.
	var live, equal, missing int64
	var suspects []suspect
	for len(refs) > 0 {
		pairs, err := link.Compare(ctx, refs)
		if err != nil {
			return err
		}
		for i := range pairs {
			p := &pairs[i]
			if p.Row.State == policy.Live {
				live++
			}
			switch kind := v.judge(p); {
			case kind == "":
				if p.Row.State == policy.Live {
					equal++
				}
			case kind == NotInStore: // it has gone from the store since: the walk over Redis finds it
			case kind == NotInRedis && !v.counts(kind):
				// They may be as many as there are rows, and to say so needs no second look; only what is to be repaired gets one.
				missing++
			default:
				suspects = append(suspects, v.suspect(refs[i], kind, p))
			}
		}
		refs = refs[len(pairs):]
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	v.verdict.StoreKeys += live
	v.verdict.Equal += equal
	v.verdict.Differences[NotInRedis] += missing
	v.suspects = append(v.suspects, suspects...)
	return nil
}

// lookForKeys looks in the store for keys that Redis has.
func (v *verification) lookForKeys(ctx context.Context, link *proxy.PeerLink, rows []policy.PageRow) error {
	refs := make([]policy.Ref, len(rows))
	for i, row := range rows {
		refs[i] = policy.Ref{Route: v.opt.Route.Name, Key: row.Key}
	}
	known, err := link.Look(ctx, refs)
	if err != nil {
		return err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	v.verdict.RedisKeys += int64(len(rows))
	for i, row := range known {
		switch row.State {
		case policy.Live, policy.Tombstone: // compared with the rows
		case policy.Absent:
			if v.counts(NotInStore) {
				v.suspects = append(v.suspects, suspect{ref: refs[i]})
			} else {
				v.verdict.Differences[NotInStore]++
			}
		default:
			v.verdict.NoRow++
		}
	}
	return nil
}

// judge tells how the copies of a key differ, "" if they do not.
func (v *verification) judge(p *proxy.Pair) Kind {
	switch {
	case p.Row.State == policy.Live && p.Kind == "":
		return NotInRedis
	case p.Row.State == policy.Live && p.Kind != "string":
		return DiffType
	case p.Kind != "string":
		return ""
	case p.Row.State == policy.Absent:
		return NotInStore
	case p.Row.State == policy.Tombstone:
		return DiffDeleted
	case p.Row.State != policy.Live:
		return ""
	case !bytes.Equal(p.Row.Value, p.Value):
		if !samejson.Equal(p.Row.Value, p.Value) {
			return DiffValue
		}
		if v.opt.Exact {
			return DiffBytes
		}
	}
	if !sameMoment(p.RowEnds, p.Ends, v.stores.Peer.Skew().Milliseconds()) {
		return DiffTTL
	}
	return ""
}

// sameMoment tells whether two moments in Unix ms are one, give or take skew; -1 is never.
func sameMoment(a, b, skew int64) bool {
	if a < 0 || b < 0 {
		return a < 0 && b < 0
	}
	return max(a, b)-min(a, b) <= skew
}

// counts tells whether a kind is a difference in this phase. From phase2 on a key that only Redis has is what the phase is for.
func (v *verification) counts(k Kind) bool {
	switch k {
	case NotInRedis:
		return v.opt.Complete
	case NotInStore:
		return v.opt.Complete && v.keeps
	}
	return true
}

func (v *verification) suspect(ref policy.Ref, kind Kind, p *proxy.Pair) suspect {
	s := suspect{ref: ref, kind: kind}
	if p.Row.State == policy.Live {
		s.state[0] = copyState{there: true, digest: maphash.Bytes(v.seed, p.Row.Value), size: len(p.Row.Value), ends: p.Row.ExpiresAt}
	}
	s.state[1] = copyState{there: p.Kind != "", digest: maphash.Bytes(v.seed, p.Value), size: len(p.Value), ends: p.Ends, number: p.Number}
	return s
}

// same tells whether nothing has changed since: the ends of one copy may be counted a few milliseconds apart.
func (s *suspect) same(t *suspect) bool {
	if s.kind != t.kind {
		return false
	}
	for i, a := range s.state {
		b := t.state[i]
		if a.there != b.there || a.digest != b.digest || a.size != b.size || a.number != b.number || !sameMoment(a.ends, b.ends, 10) {
			return false
		}
	}
	return true
}

// settle looks at the suspects again, round by round, until those are left that differ in every one although nobody touches them. What is being written, or waits for a
// repair that somebody knows of, is in flight.
func (v *verification) settle(ctx context.Context) error {
	suspects := v.suspects
	v.suspects = nil
	stable := make([]int, len(suspects)) // how often each was found as it is now
	rounds := max(v.opt.Rounds-1, 1)
	for i, s := range suspects {
		if s.kind != "" {
			stable[i] = 1
		} else {
			rounds = v.opt.Rounds // it has not been compared yet
		}
	}
	var flying map[string]bool
	for round := 1; len(suspects) > 0 && round <= rounds; round++ {
		v.opt.Progress.show(int64(round), int64(rounds), fmt.Sprintf("rounds over %d keys that differ", len(suspects)))
		if err := sleep(ctx, v.opt.Pause); err != nil {
			return err
		}
		flying = map[string]bool{}
		var next []suspect
		var times []int
		for i := 0; i < len(suspects); {
			n := v.fitting(suspects[i:])
			part := suspects[i : i+n]
			err := v.again(ctx, part, func(j int, p *proxy.Pair, pending map[string]bool) {
				kind := v.judge(p)
				if kind == "" || !v.counts(kind) && (kind == NotInRedis || kind == NotInStore) {
					v.verdict.Equal++
					return
				}
				now := v.suspect(part[j].ref, kind, p)
				count := 1
				if now.same(&part[j]) {
					count = stable[i+j] + 1
				}
				if p.Marked || p.Held || pending[now.ref.Key] {
					flying[now.ref.Key] = true
				}
				next, times = append(next, now), append(times, count)
			})
			if err != nil {
				return err
			}
			i += n
		}
		suspects, stable = next, times
	}
	byKind := map[Kind][]suspect{}
	for i, s := range suspects {
		if flying[s.ref.Key] || stable[i] < v.opt.Rounds {
			v.verdict.InFlight++
			continue
		}
		v.verdict.Differences[s.kind]++
		v.verdict.Counted++
		byKind[s.kind] = append(byKind[s.kind], s)
	}
	for _, k := range Kinds() {
		if err := v.conclude(ctx, byKind[k]); err != nil {
			return err
		}
	}
	return nil
}

// fitting is how many suspects make a batch.
func (v *verification) fitting(s []suspect) int {
	weight := 0
	for i := range s {
		weight += s[i].state[0].size + s[i].state[1].size
		if s[i].kind == "" {
			weight += unknownSize
		}
		if i == batchKeys || i > 0 && weight > batchBytes {
			return i
		}
	}
	return len(s)
}

// again compares suspects once more, and hands each pair to judge, with the keys that a journal names.
func (v *verification) again(ctx context.Context, part []suspect, judge func(i int, p *proxy.Pair, pending map[string]bool)) error {
	l := linkHolder{peer: v.stores.Peer}
	defer l.close()
	refs := refsOf(part)
	done := 0
	return patiently(ctx, v.stores, v.gate, func() error {
		link, err := l.get(ctx)
		if err != nil {
			return err
		}
		pending, err := link.Pending(ctx)
		if err != nil {
			return err
		}
		for done < len(refs) {
			pairs, err := link.Compare(ctx, refs[done:])
			if err != nil {
				return err
			}
			for i := range pairs {
				judge(done+i, &pairs[i], pending)
			}
			done += len(pairs)
		}
		return nil
	})
}

func refsOf(part []suspect) []policy.Ref {
	refs := make([]policy.Ref, len(part))
	for i, s := range part {
		refs[i] = s.ref
	}
	return refs
}

// conclude repairs differences of one kind, if that is wanted, and keeps a few as examples.
func (v *verification) conclude(ctx context.Context, all []suspect) error {
	l := linkHolder{peer: v.stores.Peer}
	defer l.close()
	kept := 0
	for len(all) > 0 {
		n := min(v.fitting(all), 100) // as many as a repair of the sidecars takes: key locks are held meanwhile
		part := all[:n]
		all = all[n:]
		var done []proxy.Done
		if v.opt.Repair {
			err := patiently(ctx, v.stores, v.gate, func() error {
				link, err := l.get(ctx)
				if err != nil {
					return err
				}
				switch trust, err := link.Trust(ctx); {
				case err != nil:
					return err
				case trust == proxy.Unverified:
					return errUnverified
				case trust == proxy.Unknown:
					return &Refusal{"redis has keys, and no sidecar has served it yet: the first that starts repairs them; start one first"}
				}
				done, err = v.repair(ctx, link, part)
				return err
			})
			if err != nil {
				return err
			}
		}
		for i, s := range part {
			d := difference(&s)
			if done != nil {
				d.Fate = done[i].Fate.String()
				switch done[i].Fate {
				case proxy.Repaired, proxy.Promoted, proxy.Copied, proxy.There, proxy.Gone:
					v.verdict.Repaired++
				}
			}
			if kept < maxExamples {
				kept++
				v.verdict.Examples = append(v.verdict.Examples, d)
			}
		}
	}
	return nil
}

// repair makes the copies of keys equal: with rows as the truth Redis's copy goes, and else the row does. What one of them lacks is copied.
func (v *verification) repair(ctx context.Context, link *proxy.PeerLink, part []suspect) ([]proxy.Done, error) {
	refs := refsOf(part)
	switch kind := part[0].kind; {
	case kind == NotInRedis:
		return link.Promote(ctx, refs, map[string]bool{})
	case kind == NotInStore:
		return link.Copy(ctx, refs, map[string]bool{})
	case kind == DiffType:
		// Redis's list or hash is no copy of anything, and whoever made it reads it there.
		done := make([]proxy.Done, len(refs))
		for i := range done {
			done[i].Fate = proxy.OtherType
		}
		return done, nil
	case v.keeps:
		return link.PreferStore(ctx, refs)
	}
	return link.PreferRedis(ctx, refs)
}

func difference(s *suspect) Difference {
	d := Difference{Kind: s.kind, Key: s.ref.Key, RedisBytes: -1, StoreBytes: -1}
	if s.state[0].there {
		d.StoreBytes, d.StoreEnds = s.state[0].size, moment(s.state[0].ends)
	}
	if s.state[1].there {
		d.RedisBytes, d.RedisEnds = s.state[1].size, moment(s.state[1].ends)
	}
	return d
}

func moment(ms int64) string {
	if ms < 0 {
		return ""
	}
	return time.UnixMilli(ms).UTC().Format("2006-01-02T15:04:05.000Z07:00")
}

// Print writes the verdict for people.
func (v *Verdict) Print(w io.Writer) {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	line := func(n int64, what string) { fmt.Fprintf(t, "%d\t %s\n", n, what) }
	line(v.StoreKeys, fmt.Sprintf("rows of the route %s (%s) compared, %.4g %% of them", v.Route, v.Phase, 100*v.Share))
	line(v.RedisKeys, "keys in redis looked for in the store")
	line(v.Equal, "equal")
	for _, k := range Kinds() {
		if n := v.Differences[k]; n > 0 {
			what := kindWords[k]
			if !v.Complete && (k == NotInRedis || k == NotInStore) {
				what += " (no difference; with --complete it is)"
			}
			line(n, what)
		}
	}
	if v.InFlight > 0 {
		line(v.InFlight, "are being written or wait for their repair")
	}
	if v.NoRow > 0 {
		line(v.NoRow, "keys in redis that the table has no row for")
	}
	if v.Repaired > 0 {
		line(v.Repaired, "repaired")
	}
	t.Flush() //nolint:errcheck // w's error shows in the lines below
	for _, d := range v.Examples {
		fmt.Fprintf(w, "%s: %q: redis %s, store %s", d.Kind, d.Key, side(d.RedisBytes, d.RedisEnds), side(d.StoreBytes, d.StoreEnds))
		if d.Fate != "" {
			fmt.Fprintf(w, ": %s", d.Fate)
		}
		fmt.Fprintln(w)
	}
	switch left := v.Counted - v.Repaired; {
	case left > 0:
		fmt.Fprintf(w, "%d differences in %.1fs\n", left, v.Seconds)
	default:
		fmt.Fprintf(w, "no difference in %.1fs\n", v.Seconds)
	}
}

var kindWords = map[Kind]string{
	DiffValue:   "differ in their value",
	DiffBytes:   "are equal as JSON only, and the store keeps bytes",
	DiffTTL:     "do not end together",
	DiffType:    "are of another type in redis",
	DiffDeleted: "are in redis and known to be deleted or expired",
	NotInRedis:  "are not in redis",
	NotInStore:  "are not in the store",
}

func side(size int, ends string) string {
	switch {
	case size < 0:
		return "none"
	case ends == "":
		return fmt.Sprintf("%d bytes", size)
	}
	return fmt.Sprintf("%d bytes until %s", size, ends)
}
