package proxy

import (
	"context"
	"encoding/json"
	"fmt"
	"strconv"
	"time"

	"cacheproxy/policy"

	"go.uber.org/zap"
)

// Standing is what GET /phase tells of a route: where it stands, what was found, and what speaks against either step.
type Standing struct {
	Route string `json:"route"`
	Match string `json:"match"`
	Phase string `json:"phase"`
	// Configured is the phase that the configuration names: the route's after a restart.
	Configured string `json:"configured,omitempty"`
	// Since is when this sidecar entered the phase, or was started in it. The reads in Evidence are counted from then.
	Since      time.Time       `json:"since"`
	Seconds    Seconds         `json:"seconds"`
	Evidence   policy.Evidence `json:"evidence"`
	Next, Back *Move           `json:"-"`
}

// Move is a step and what speaks against it.
type Move struct {
	Phase   string          `json:"phase"`
	Against []policy.Reason `json:"against"`
}

// Seconds are the durations of the evidence.
type Seconds struct {
	InPhase       float64 `json:"in_phase"` // and in no other, for all sidecars that Postgres knows of
	TTL           float64 `json:"ttl"`
	LongestLife   float64 `json:"longest_life"`
	JournalOldest float64 `json:"journal_oldest"`
}

// MarshalJSON leaves out a step that there is not.
func (s Standing) MarshalJSON() ([]byte, error) {
	type plain Standing
	return json.Marshal(struct {
		plain
		Next *Move `json:"next,omitempty"`
		Back *Move `json:"back,omitempty"`
	}{plain(s), s.Next, s.Back})
}

// UnmarshalJSON reads what MarshalJSON writes.
func (s *Standing) UnmarshalJSON(b []byte) error {
	type plain Standing
	out := struct {
		*plain
		Next *Move `json:"next"`
		Back *Move `json:"back"`
	}{plain: (*plain)(s)}
	if err := json.Unmarshal(b, &out); err != nil {
		return err
	}
	s.Next, s.Back = out.Next, out.Back
	return nil
}

// Lines tell it to people.
func (s *Standing) Lines() []string {
	ev := &s.Evidence
	phase, _ := policy.ParsePhase(s.Phase)
	duration := func(seconds float64) string { return policy.Short(time.Duration(seconds * float64(time.Second))) }
	out := []string{
		fmt.Sprintf("%s (match %s): %s, %s", s.Route, s.Match, s.Phase, phase.Meaning()),
		"  for " + duration(s.Seconds.InPhase) + "; here since " + s.Since.Format("2006-01-02 15:04:05 MST"),
	}
	if s.Configured != "" && s.Configured != s.Phase {
		out = append(out, fmt.Sprintf("  the configuration says %s, and a restart goes by it: write \"phase: %s\" there", s.Configured, s.Phase))
	}
	reads := ev.RedisHits + ev.JSONBHits + ev.CacheMisses
	line := fmt.Sprintf("  reads here since then: %d", reads)
	if reads > 0 {
		share := func(n int64) string { return policy.Percent(float64(n) / float64(reads)) }
		line += fmt.Sprintf(" (%s from Redis, %s from Postgres, %s found nowhere)", share(ev.RedisHits), share(ev.JSONBHits), share(ev.CacheMisses))
	}
	out = append(out, line)
	if longest := max(s.Seconds.TTL, s.Seconds.LongestLife); longest > 0 {
		out = append(out, "  values live up to "+duration(longest))
	}
	line = fmt.Sprintf("  journal: %d keys", ev.Journal)
	if ev.Journal > 0 {
		line += ", the oldest for " + duration(s.Seconds.JournalOldest)
	}
	out = append(out, line)
	if ev.Compared > 0 {
		out = append(out, fmt.Sprintf("  compared: %d hits, %d with another copy", ev.Compared, ev.Differences))
	}
	if ev.Sampled > 0 {
		out = append(out, fmt.Sprintf("  rows looked for in Redis: %d, missing there: %d", ev.Sampled, ev.Missing))
	}
	stores := "  redis " + ev.Redis
	if ev.Eviction != "" {
		stores += ", " + ev.Eviction
		if ev.MaxMemory == 0 {
			stores += " without a memory limit"
		}
	}
	out = append(out, stores+"; postgres "+ev.Store)
	for _, o := range ev.Others {
		out = append(out, fmt.Sprintf("  sidecars in %s: last seen %s ago", o.Phase, policy.Short(o.Ago)))
	}
	if s.Next != nil {
		out = append(out, s.Next.lines("next")...)
	}
	if s.Back != nil {
		out = append(out, s.Back.lines("back")...)
		if back, err := policy.ParsePhase(s.Back.Phase); err == nil && phase.Rules().ReadsRedis && !back.Rules().ReadsRedis {
			out = append(out, "    but it is refused while keys are only in Redis, which is looked at when it is taken")
		}
	}
	return out
}

// lines tell what speaks against a step.
func (m *Move) lines(word string) []string {
	if len(m.Against) == 0 {
		return []string{"  " + word + ": " + m.Phase + ", and nothing speaks against it"}
	}
	out := []string{"  " + word + ": " + m.Phase + ", and this speaks against it:"}
	for _, r := range m.Against {
		out = append(out, "    "+string(r.Doubt)+": "+r.Says, "      remedy: "+r.Remedy)
	}
	return out
}

// began is what was counted when a route entered its phase.
type began struct {
	at                                                time.Time
	redisHits, jsonbHits, misses, compared, different int64
}

// begin notes that a route enters a phase now.
func (c *counters) begin(route string) {
	b := c.reads(route)
	b.at = time.Now()
	c.began.Store(route, b)
}

// reads are a route's figures of the moment.
func (c *counters) reads(route string) began {
	s := c.route(route)
	b := began{redisHits: s.redisHits.Load(), jsonbHits: s.jsonbHits.Load(), misses: s.misses.Load() + s.negative.Load(), compared: s.verified.Load()}
	for i := range s.mismatches {
		b.different += s.mismatches[i].Load()
	}
	return b
}

// since are a route's figures since it entered its phase, and when that was.
func (c *counters) since(route string) began {
	now := c.reads(route)
	v, ok := c.began.Load(route)
	if !ok {
		return now
	}
	b := v.(began)
	return began{
		at: b.at, redisHits: now.redisHits - b.redisHits, jsonbHits: now.jsonbHits - b.jsonbHits, misses: now.misses - b.misses,
		compared: now.compared - b.compared, different: now.different - b.different,
	}
}

const (
	// standingTime bounds what is asked of both stores for GET /phase and CACHEPROXY PHASE.
	standingTime = 5 * time.Second
	// standingRows are looked for in Redis before its store is left: those of a handful of round trips, and enough to find
	// one that is missing if a hundredth are.
	standingRows = 500
)

// Standings gathers what speaks for and against the next step of every route, or of the one named. Both stores are asked if they can be.
func (s *Server) Standings(ctx context.Context, only string) ([]Standing, error) {
	ctx, cancel := context.WithTimeout(ctx, standingTime)
	defer cancel()
	e := s.e
	var info map[string]string
	if frame, err := e.up.do(ctx, "INFO", "memory"); err == nil {
		text, _ := bulk(frame)
		info = parseInfo(text)
	}
	var out []Standing
	for _, r := range e.router.Load().Routes() {
		if only != "" && r.Name != only {
			continue
		}
		out = append(out, e.standing(ctx, &r, info))
	}
	if only != "" && out == nil {
		return nil, ErrNoRoute
	}
	if s.cfg.Phases != nil {
		configured := s.cfg.Phases()
		for i := range out {
			out[i].Configured = configured[out[i].Route]
		}
	}
	return out, nil
}

func (e *engine) standing(ctx context.Context, r *policy.Route, info map[string]string) Standing {
	ev := policy.Evidence{Route: r.Name, Phase: r.Phase, TTL: r.TTL, Others: []policy.Sighting{}}
	unknown := func(what string) { ev.Unknown = append(ev.Unknown, what) }
	h := e.health()
	ev.Redis, ev.Store = h.Redis.Status, h.Postgres.Status

	counted := e.stats.since(r.Name)
	ev.RedisHits, ev.JSONBHits, ev.CacheMisses = counted.redisHits, counted.jsonbHits, counted.misses
	ev.Compared, ev.Differences = counted.compared, counted.different
	ev.InPhase = time.Since(counted.at)
	ev.Journal, ev.JournalOldest = e.journal.waiting(r.Name)

	if info == nil {
		unknown("Redis's maxmemory-policy")
	} else {
		ev.MaxMemory, _ = strconv.ParseInt(info["maxmemory"], 10, 64)
		ev.Eviction = info["maxmemory_policy"]
	}
	if e.usesStore() {
		rows := 0
		switch rules := r.Phase.Rules(); {
		case !rules.ReadsStore:
			rows = -1
		case !rules.Write.KeepsRow():
			rows = standingRows
		}
		err := errStoreDown
		var known StoreStanding
		if e.store.up.Load() {
			// That it is slow does not open the breaker: it reads more than clients do.
			known, err = e.store.Standing(ctx, r.Name, rows)
		}
		if err != nil {
			unknown("the phases of other sidecars")
		} else {
			e.reckon(&ev, known)
			if err := e.sample(ctx, &ev, r.Name, known.Keys); err != nil {
				unknown("whether Redis has the rows")
			}
		}
	}
	out := Standing{
		Route: r.Name, Match: r.Match, Phase: r.Phase.String(), Since: counted.at.UTC().Truncate(time.Second), Evidence: ev,
		Seconds: Seconds{InPhase: ev.InPhase.Seconds(), TTL: ev.TTL.Seconds(), LongestLife: ev.LongestLife.Seconds(), JournalOldest: ev.JournalOldest.Seconds()},
	}
	if to, ok := r.Phase.Next(); ok {
		out.Next = &Move{to.String(), append([]policy.Reason{}, policy.Against(ev, to)...)}
	}
	if to, ok := r.Phase.Previous(); ok {
		out.Back = &Move{to.String(), append([]policy.Reason{}, policy.Against(ev, to)...)}
	}
	return out
}

// reckon takes over what the store knows. A phase that this version does not know is some later one's, and left out.
func (e *engine) reckon(ev *policy.Evidence, known StoreStanding) {
	ev.LongestLife, ev.Unseen = known.Longest, known.Partial
	var all []policy.Sighting
	for _, p := range known.Phases {
		phase, err := policy.ParsePhase(p.Phase)
		if err != nil {
			continue
		}
		all = append(all, policy.Sighting{Phase: phase, Ago: p.Seen})
		if phase == ev.Phase {
			ev.InPhase = p.Since
		}
	}
	ev.InPhase = policy.InPhase(ev.Phase, ev.InPhase, all)
	ev.Others = append(ev.Others, policy.Recent(all)...)
}

// sample looks for rows in Redis. One that is not there is looked at again: its key may have been deleted meanwhile.
func (e *engine) sample(ctx context.Context, ev *policy.Evidence, route string, keys []string) error {
	if len(keys) == 0 {
		return nil
	}
	n, err := e.exist(ctx, keys)
	if err != nil {
		return err
	}
	ev.Sampled = len(keys)
	if n == len(keys) {
		return nil
	}
	var refs []policy.Ref
	for _, key := range keys {
		there, err := e.exist(ctx, []string{key})
		if err != nil {
			return err
		}
		if there == 0 {
			refs = append(refs, policy.Ref{Route: route, Key: key})
		}
	}
	rows, err := e.store.load(ctx, refs)
	if err != nil {
		return err
	}
	for _, row := range rows {
		if row.State == policy.Live {
			ev.Missing++
		}
	}
	return nil
}

// exist counts the keys that Redis has.
func (e *engine) exist(ctx context.Context, keys []string) (int, error) {
	frame, err := e.up.do(ctx, append([]string{"EXISTS"}, keys...)...)
	if err != nil {
		return 0, err
	}
	n, ok := parseInt(frame)
	if !ok {
		return 0, fmt.Errorf("redis answered EXISTS out of shape")
	}
	return int(n), nil
}

// waiting counts the keys of a route in both journals, and how long the oldest of them has stood.
func (j *journal) waiting(route string) (n int, oldest time.Duration) {
	router := j.e.router.Load()
	j.mu.RLock()
	defer j.mu.RUnlock()
	now := localNow()
	first := now
	for _, in := range j.intents {
		for _, ref := range in.refs {
			if ref.Route == route {
				n, first = n+1, min(first, in.since)
			}
		}
	}
	for k := range j.staleStoreKeys() {
		if r := router.Match([]byte(k)); r != nil && r.Name == route {
			since, _ := j.markedSince(k)
			n, first = n+1, min(first, since)
		}
	}
	return n, time.Duration(now-first) * time.Microsecond
}

// beats tells Postgres, again and again, that this process serves its routes in their phases: what GET /phase shows to others, and
// keeps `finalize` from dropping what is in use. A process that cannot reach Postgres is not seen, and says so when it is back.
func (e *engine) beats(ctx context.Context) {
	tick := time.NewTicker(beatEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if !e.journal.isRegistered() {
			continue // its rows may have to be fenced before anything is said
		}
		if err := e.tell(ctx); err != nil && ctx.Err() == nil {
			e.log.Debug("the phases in use are told again later", zap.Error(err))
		}
	}
}

// tell says once in which phases the routes are served. No phase changes meanwhile, or this could happen:
//
//	1 a route is in phase3, and this is on its way to say so    2 it goes back to phase2: its rows are fenced, and phase3 is forgotten
//	3 Postgres is told that phase3 is in use    4 the route goes on to phase1, and its rows are the truth
//	5 the next process finds phase3, and fences them
func (e *engine) tell(ctx context.Context) error {
	e.telling.Lock()
	defer e.telling.Unlock()
	var routes, phases []string
	for _, r := range e.router.Load().Routes() {
		routes, phases = append(routes, r.Name), append(phases, r.Phase.String())
	}
	ctx, cancel := context.WithTimeout(ctx, e.cfg.StoreTimeout)
	defer cancel()
	return e.store.Seen(ctx, routes, phases)
}

// beatEvery: see policy.Lately.
const beatEvery = policy.Lately / 4
