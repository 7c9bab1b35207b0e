package proxy

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"slices"
	"strconv"
	"strings"
	"time"

	"cacheproxy/internal/strcmd"
	"cacheproxy/policy"
)

var ownHelp = []string{
	"CACHEPROXY <subcommand> [<arg> ...]. Subcommands are:",
	"CONFIG",
	"    The effective configuration, without secrets.",
	"DIFF <key>",
	"    Compare both copies of a key.",
	"EXPLAIN <key>",
	"    Both copies of a key, their TTLs, and who would answer a read and why.",
	"JOURNAL",
	"    The keys whose copies may differ, and what repairs them.",
	"PHASE [<route> <phase>]",
	"    Where each route stands and what speaks against its next step; or move one a step, in this process, until it restarts.",
	"RELOAD",
	"    Read the configuration file again.",
	"ROUTES",
	"    The routes in the order in which they are tried.",
	"STATS",
	"    What this sidecar counts, as JSON.",
	"VERSION",
	"    The version of the proxy.",
	"HELP",
	"    This text.",
}

// own answers CACHEPROXY.
func (s *session) own(sl *slot) {
	s.begin(sl)
	args := make([]string, len(sl.args))
	for i, a := range sl.args {
		args[i] = string(a)
	}
	proto := s.proto
	s.async(sl, func() []byte { return s.srv.ownReply(args, proto) })
}

func (s *Server) ownReply(args []string, proto int) []byte {
	if len(args) < 2 {
		return []byte(arity("cacheproxy"))
	}
	sub := strings.ToUpper(args[1])
	want := map[string][]int{"HELP": {2}, "STATS": {2}, "PHASE": {2, 4}, "ROUTES": {2}, "EXPLAIN": {3}, "DIFF": {3}, "JOURNAL": {2}, "CONFIG": {2}, "RELOAD": {2}, "VERSION": {2}}[sub]
	if want == nil {
		return appendError(nil, "ERR unknown subcommand '"+printable([]byte(args[1]))+"'. Try CACHEPROXY HELP.")
	}
	if !slices.Contains(want, len(args)) {
		return []byte(arity("cacheproxy|" + strings.ToLower(sub)))
	}
	switch sub {
	case "STATS":
		b, err := json.MarshalIndent(s.Stats(context.Background()), "", "  ")
		if err != nil {
			return appendError(nil, "ERR "+err.Error())
		}
		return appendVerbatim(nil, "txt", b, proto)
	case "PHASE":
		if len(args) == 4 {
			to, err := policy.ParsePhase(args[3])
			if err != nil {
				return appendError(nil, "ERR "+err.Error())
			}
			if err := s.SetPhase(args[2], to); err != nil {
				if errors.Is(err, ErrNoRoute) {
					return appendError(nil, "ERR no such route; see CACHEPROXY ROUTES")
				}
				return appendError(nil, "ERR "+strings.ReplaceAll(err.Error(), "\n", ": "))
			}
			return []byte("+OK\r\n")
		}
		standings, err := s.Standings(context.Background(), "")
		if err != nil {
			return appendError(nil, "ERR "+err.Error())
		}
		var out []string
		for i := range standings {
			out = append(out, standings[i].Lines()...)
		}
		return lines(out, proto)
	case "ROUTES":
		routes := s.e.router.Load().Routes()
		b := appendArray(nil, len(routes))
		for _, r := range routes {
			b = appendBulk(b, fmt.Sprintf("%s match=%s phase=%s ttl=%s ttl_jitter=%g negative_ttl=%s on_unknown=%s write_policy=%s store=%s",
				r.Name, r.Match, r.Phase, r.TTL, r.Jitter, r.NegativeTTL, r.OnUnknown, r.WritePolicy, storeWord(&r)))
		}
		return b
	case "EXPLAIN":
		return lines(s.explain(args[2]), proto)
	case "DIFF":
		return lines(s.diff(args[2]), proto)
	case "JOURNAL":
		return lines(s.e.journal.describe(), proto)
	case "CONFIG":
		if s.cfg.Text == nil {
			return appendError(nil, "ERR no configuration to show")
		}
		return appendVerbatim(nil, "txt", s.cfg.Text(), proto)
	case "RELOAD":
		if s.cfg.Reload == nil {
			return appendError(nil, "ERR this process was started without a file to reload")
		}
		if err := s.cfg.Reload(); err != nil {
			return appendError(nil, "ERR "+strings.ReplaceAll(err.Error(), "\n", "; "))
		}
		return []byte("+OK\r\n")
	case "VERSION":
		return appendBulk(nil, s.cfg.Version)
	default:
		return lines(ownHelp, proto)
	}
}

// storeWord is the kind of a route's store, as the configuration calls it.
func storeWord(r *policy.Route) string {
	if r.Column() {
		return "column"
	}
	return "table"
}

func lines(ls []string, _ int) []byte {
	b := appendArray(nil, len(ls))
	for _, l := range ls {
		b = appendSimple(b, printable([]byte(l)))
	}
	return b
}

// copies is what both stores hold of a key now.
type copies struct {
	route      *policy.Route
	redis      strcmd.Value
	redisErr   error
	redisWhy   string // the breaker's reason, with redisErr
	mark       string
	row        policy.Row
	rowErr     error
	staleRedis bool
	staleStore bool
}

func (s *Server) look(key string) copies {
	e := s.e
	ctx, cancel := context.WithTimeout(context.Background(), e.cfg.StoreTimeout)
	defer cancel()
	c := copies{route: e.router.Load().Match([]byte(key)), staleRedis: e.journal.staleRedis(key), staleStore: e.journal.staleStore(key)}
	rs, err := e.up.script(ctx, scriptRead, []string{key}, "0")
	if err != nil {
		c.redisErr, c.redisWhy = err, e.health().Redis.Reason
		if c.redisWhy == "" {
			c.redisWhy = string(classifyError(err))
		}
	} else {
		c.redis, c.mark = e.replyValue(rs[0]), rs[0].mark
	}
	if c.route != nil && c.route.Phase.Rules().UsesStore {
		rows, err := e.store.load(ctx, []policy.Ref{{Route: c.route.Name, Key: key}})
		if err != nil {
			c.rowErr = err
		} else {
			c.row = rows[0]
		}
	}
	return c
}

// writeWords tell a reader of EXPLAIN where a write goes.
var writeWords = map[policy.WriteMode]string{
	policy.WriteStoreOnly:    "the store; the copy in Redis is deleted",
	policy.WriteBoth:         "both",
	policy.WriteRedisDropRow: "Redis; the row in the store is deleted",
	policy.WriteRedisOnly:    "Redis only",
}

func ttlWords(ms int64) string {
	if ms < 0 {
		return "no expiry"
	}
	return "expires in " + (time.Duration(ms) * time.Millisecond).String()
}

func (s *Server) explain(key string) []string {
	c := s.look(key)
	if c.route == nil {
		why := "no route matches it"
		if !policy.Eligible([]byte(key)) {
			why = "it is not UTF-8, contains NUL, is longer than 2000 bytes, or is reserved"
		}
		return []string{"route: none (" + why + ")", "reads: answered by Redis; the key passes through untouched", "redis: " + redisWords(c)}
	}
	rules := c.route.Phase.Rules()
	noRow := c.row.State == policy.NoRow
	goes := writeWords[rules.Write]
	if noRow {
		goes = "Redis only, because the key has no row"
	}
	out := []string{
		fmt.Sprintf("route: %s (match %s)", c.route.Name, c.route.Match),
		fmt.Sprintf("phase: %s (writes go to: %s)", c.route.Phase, goes),
		"redis: " + redisWords(c),
		"store: " + placeWords(c.route) + storeWords(c, rules),
	}
	if noRow {
		out = append(out, "note: Redis alone holds this key; once the row is inserted, the next write in phase0 or phase1 brings the value into its column")
	}
	if c.staleRedis {
		out = append(out, "journal: the copy in Redis is stale; repair pending")
	}
	if c.staleStore || c.mark != "" {
		out = append(out, "journal: the copy in the store is stale; repair pending")
	}
	who := "nobody: a read answers nil"
	switch {
	case !rules.ReadsStore && c.redisErr != nil:
		who = "nobody: Redis cannot be asked and this phase does not read the store"
	case (rules.ReadsRedis || c.rowErr == nil && onlyRedis(c.route, c.row)) && c.redisErr == nil && !c.staleRedis && c.redis.Exists:
		who = "redis: it has the key"
	case !rules.ReadsStore:
	case c.rowErr != nil:
		who = "nobody: neither copy can be told; on_unknown decides (" + c.route.OnUnknown.String() + ")"
	case (c.staleStore || c.mark != "") && (c.redisErr != nil || !c.redis.Exists):
		who = "nobody: the store's copy is stale"
	case c.row.State == policy.Live && rules.ReadsRedis && c.redisErr == nil:
		who = "jsonb: Redis lacks the key; the value is then promoted"
	case c.row.State == policy.Live:
		who = "jsonb: Redis is not asked"
	}
	return append(out, "reads: answered by "+who)
}

func redisWords(c copies) string {
	switch {
	case c.redisErr != nil:
		return "cannot be asked (" + c.redisWhy + ")"
	case !c.redis.Exists:
		return "absent"
	case c.redis.Other:
		return "a " + c.redis.OtherType + ", " + ttlWords(c.redis.TTL)
	}
	return fmt.Sprintf("%d bytes, %s", len(c.redis.Data), ttlWords(c.redis.TTL))
}

func storeWords(c copies, rules policy.Rules) string {
	switch {
	case !rules.UsesStore:
		return "not connected in this phase"
	case c.rowErr != nil:
		return "cannot be asked"
	case c.row.State == policy.Tombstone && c.route.Column():
		return "nothing (the row is there, and its value was deleted or has expired)"
	case c.row.State == policy.Tombstone:
		return "deleted (remembered for the failover window)"
	case c.row.State == policy.NoRow:
		return "the table has no row for this key"
	case c.row.Bare:
		return "absent (the row is there, and nothing has been written to its column)"
	case c.row.State == policy.Absent && c.route.Column():
		return "absent (the row is there, and its column was emptied because Redis has the key alone)"
	case c.row.State == policy.Absent:
		return "absent"
	case c.route.Column():
		return fmt.Sprintf("%d bytes as Postgres prints the JSON, %s", len(c.row.Value), ttlWords(c.row.TTL))
	}
	return fmt.Sprintf("%d bytes, %s", len(c.row.Value), ttlWords(c.row.TTL))
}

// placeWords begin what is said of the store of an adopted route; "" for the proxy's own table.
func placeWords(r *policy.Route) string {
	switch {
	case !r.Column():
		return ""
	case r.Place == "":
		return "an adopted column: "
	}
	return r.Place + ": "
}

func (s *Server) diff(key string) []string {
	c := s.look(key)
	switch {
	case c.route == nil:
		return []string{"not routed: there is only one copy"}
	case !c.route.Phase.Rules().UsesStore:
		return []string{"phase3: there is only one copy"}
	case c.redisErr != nil || c.rowErr != nil:
		return []string{"unknown: redis " + redisWords(c) + "; store " + storeWords(c, c.route.Phase.Rules())}
	}
	inRedis, inStore := c.redis.Exists, c.row.State == policy.Live
	switch {
	case c.row.State == policy.NoRow && inRedis:
		return []string{"only in redis, and nowhere else to be: the table has no row for this key; redis " + redisWords(c)}
	case c.row.State == policy.NoRow:
		return []string{"same: absent in redis, and the table has no row for this key"}
	case !inRedis && !inStore:
		return []string{"same: absent in both"}
	case inRedis && !inStore:
		return []string{"only in redis: " + redisWords(c)}
	case !inRedis:
		return []string{"only in the store: " + storeWords(c, c.route.Phase.Rules())}
	case c.redis.Other:
		return []string{"different type: redis holds a " + c.redis.OtherType}
	}
	var out []string
	if !same(c.route, c.redis.Data, c.row.Value) {
		at := 0
		for at < min(len(c.redis.Data), len(c.row.Value)) && c.redis.Data[at] == c.row.Value[at] {
			at++
		}
		out = append(out, fmt.Sprintf("different value: redis %d bytes, store %d bytes, first difference at byte %d", len(c.redis.Data), len(c.row.Value), at))
	}
	if ends := s.e.clocks.toRedis(c.row.ExpiresAt); (c.redis.ExpireAt < 0) != (ends < 0) || abs(c.redis.ExpireAt-ends) > 10 {
		out = append(out, "different life: redis "+ttlWords(c.redis.TTL)+", store "+ttlWords(c.row.TTL))
	}
	if out == nil && !bytes.Equal(c.redis.Data, c.row.Value) {
		return []string{fmt.Sprintf("same as JSON: redis %d bytes, store %d bytes as Postgres prints it, %s", len(c.redis.Data), len(c.row.Value), ttlWords(c.redis.TTL))}
	}
	if out == nil {
		return []string{fmt.Sprintf("same: %d bytes, %s", len(c.redis.Data), ttlWords(c.redis.TTL))}
	}
	return out
}

// describe tells the journals' state. At most ten keys of each are named.
func (j *journal) describe() []string {
	j.mu.Lock()
	defer j.mu.Unlock()
	const show = 10
	out := []string{
		fmt.Sprintf("redis is stale: %d entries", len(j.intents)),
		fmt.Sprintf("store is stale: %d keys", j.lenMarks()),
	}
	n := 0
	for id, in := range j.intents {
		for _, ref := range in.refs {
			if n++; n <= show {
				out = append(out, "  redis stale: "+ref.Key+" (entry "+strconv.FormatInt(id, 10)+")")
			}
		}
	}
	n = 0
	for k := range j.staleStoreKeys() {
		if n++; n <= show {
			out = append(out, "  store stale: "+k)
		}
	}
	for c := range causes {
		if n := j.e.stats.repairs[c].Load(); n > 0 {
			out = append(out, fmt.Sprintf("repaired because of %s: %d keys", c, n))
		}
	}
	return out
}

// staleStoreKeys yields every key whose row waits for a repair, once: not those whose writers are at work. Caller holds mu.
func (j *journal) staleStoreKeys() iter.Seq[string] {
	return func(yield func(string) bool) {
		for k := range j.marks {
			if !yield(k) {
				return
			}
		}
		for k, m := range j.mine {
			if _, both := j.marks[k]; m.left && !both && !yield(k) {
				return
			}
		}
	}
}

func (j *journal) lenMarks() (n int) {
	for range j.staleStoreKeys() {
		n++
	}
	return n
}

// ---- statistics ----

// Stats is the answer of GET /cache/stats and CACHEPROXY STATS; docs/metrics.md says what each figure is.
type Stats struct {
	MigrationPhase string       `json:"migration_phase"`
	Performance    Performance  `json:"performance"`
	Redis          RedisStats   `json:"redis"`
	Postgres       StoreStats   `json:"postgres"`
	Routes         []RouteStats `json:"routes"`
	Journal        JournalStats `json:"journal"`
	Proxy          SelfStats    `json:"proxy"`
}

// Performance counts reads by who answered them. Rates are rounded to three places; without reads they are 0.
type Performance struct {
	RedisHits      int64   `json:"redis_hits"`
	JSONBHits      int64   `json:"jsonb_hits"`
	CacheMisses    int64   `json:"cache_misses"`
	RedisHitRate   float64 `json:"redis_hit_rate"`
	OverallHitRate float64 `json:"overall_hit_rate"`
}

func newPerformance(redis, jsonb, misses int64) Performance {
	p := Performance{RedisHits: redis, JSONBHits: jsonb, CacheMisses: misses}
	if all := redis + jsonb + misses; all > 0 {
		round := func(n int64) float64 { return float64((n*2000+all)/(2*all)) / 1000 }
		p.RedisHitRate, p.OverallHitRate = round(redis), round(redis+jsonb)
	}
	return p
}

// RedisStats is Redis as this sidecar sees it.
type RedisStats struct {
	Status        string           `json:"status"`
	Reason        string           `json:"reason,omitempty"`
	SinceSeconds  int64            `json:"since_seconds"`
	MemoryMB      float64          `json:"memory_usage_mb"`
	HitRate       float64          `json:"hit_rate"`
	TotalRequests int64            `json:"total_requests"`
	Config        map[string]any   `json:"config"`
	Opens         int64            `json:"breaker_opens"`
	Errors        map[string]int64 `json:"errors"`
}

// StoreStats is Postgres as this sidecar sees it.
type StoreStats struct {
	Status       string `json:"status"`
	Reason       string `json:"reason,omitempty"`
	SinceSeconds int64  `json:"since_seconds"`
	Opens        int64  `json:"breaker_opens"`
}

// RouteStats is one route's share.
type RouteStats struct {
	Name       string           `json:"name"`
	Match      string           `json:"match"`
	Phase      string           `json:"phase"`
	Negative   int64            `json:"negative_hits"` // those of cache_misses for which the store was not asked
	Writes     int64            `json:"writes"`
	Refused    int64            `json:"refused"`
	NoRow      int64            `json:"no_row"`            // of writes, those of keys that have no row in the route's column: Redis alone has them
	Verified   int64            `json:"verify_checked"`    // hits whose two copies were compared
	Unverified int64            `json:"verify_dropped"`    // those that were drawn and could not be
	Mismatches map[string]int64 `json:"verify_mismatches"` // by kind
	Performance
}

// JournalStats tells what waits for a repair, for how long, and what has been repaired here. The ages of marks ("store is stale") are
// counted from when this sidecar made or first saw them; the longest are those of what it has repaired itself.
type JournalStats struct {
	RedisStale        int              `json:"redis_stale"`
	StoreStale        int              `json:"store_stale"`
	OldestSeconds     float64          `json:"oldest_seconds"` // of both
	RedisStaleOldest  float64          `json:"redis_stale_oldest_seconds"`
	StoreStaleOldest  float64          `json:"store_stale_oldest_seconds"`
	RedisStaleLongest float64          `json:"redis_stale_longest_seconds"`
	StoreStaleLongest float64          `json:"store_stale_longest_seconds"`
	Repairs           map[string]int64 `json:"repairs"` // keys, by cause
}

// SelfStats counts what the proxy itself did.
type SelfStats struct {
	Clients           int   `json:"clients"`
	ClientsAccepted   int64 `json:"clients_accepted"`
	ClientsRefused    int64 `json:"clients_refused"`
	ProtocolErrors    int64 `json:"protocol_errors"`
	UptimeSeconds     int64 `json:"uptime_seconds"`
	Commands          int64 `json:"commands"`
	Unrouted          int64 `json:"unrouted"`
	Denied            int64 `json:"denied"`
	Promotions        int64 `json:"promotions"`
	PromotionsRefused int64 `json:"promotions_refused"` // the lease had gone
	PromotionsFailed  int64 `json:"promotions_failed"`  // Redis did not take them
	LostLeases        int64 `json:"lost_leases"`        // of writes, which then invalidate once more
	Shed              int64 `json:"shed"`
	Uncertain         int64 `json:"uncertain"`
	Fences            int64 `json:"fences"`
	NumbersLifted     int64 `json:"numbers_lifted"`
	StoredRaw         int64 `json:"stored_raw_only"`
	Draining          bool  `json:"draining"`
}

// Stats gathers the figures. Redis is asked for INFO once if it is usable; ctx bounds that.
func (s *Server) Stats(ctx context.Context) Stats {
	out := s.Figures()
	if !s.e.up.trusted() {
		return out
	}
	if frame, err := s.e.up.do(ctx, "INFO", "everything"); err == nil {
		text, _ := bulk(frame)
		info := parseInfo(text)
		used, _ := strconv.ParseFloat(info["used_memory"], 64)
		out.Redis.MemoryMB = float64(int64(used/(1<<20)*10+0.5)) / 10
		hits, _ := strconv.ParseInt(info["keyspace_hits"], 10, 64)
		misses, _ := strconv.ParseInt(info["keyspace_misses"], 10, 64)
		out.Redis.HitRate = newPerformance(hits, 0, misses).RedisHitRate
	}
	return out
}

// Figures are the statistics without those that Redis has to be asked for. Nothing waits for them but a lock of the journal's.
func (s *Server) Figures() Stats {
	e := s.e
	var out Stats
	var sum Performance
	routes := e.router.Load().Routes()
	for i, r := range routes {
		c := e.stats.route(r.Name)
		negative := c.negative.Load()
		rs := RouteStats{Name: r.Name, Match: r.Match, Phase: r.Phase.String(), Negative: negative, Writes: c.writes.Load(), Refused: c.refused.Load(), NoRow: c.noRow.Load(),
			Verified: c.verified.Load(), Unverified: c.unverified.Load(), Mismatches: c.mismatched(),
			Performance: newPerformance(c.redisHits.Load(), c.jsonbHits.Load(), c.misses.Load()+negative)}
		sum.RedisHits += rs.RedisHits
		sum.JSONBHits += rs.JSONBHits
		sum.CacheMisses += rs.CacheMisses
		switch {
		case i == 0:
			out.MigrationPhase = rs.Phase
		case out.MigrationPhase != rs.Phase:
			out.MigrationPhase = "mixed"
		}
		out.Routes = append(out.Routes, rs)
	}
	out.Performance = newPerformance(sum.RedisHits, sum.JSONBHits, sum.CacheMisses)

	h := e.health()
	ttl := int64(0)
	if len(routes) > 0 {
		ttl = int64(routes[0].TTL.Seconds())
	}
	out.Redis = RedisStats{Status: h.Redis.Status, Reason: h.Redis.Reason, SinceSeconds: h.Redis.Since, TotalRequests: sum.RedisHits + sum.JSONBHits + sum.CacheMisses,
		Config: map[string]any{"ttl_seconds": ttl}, Errors: map[string]int64{}}
	e.up.mu.Lock()
	out.Redis.Opens = e.up.opens
	e.up.mu.Unlock()
	e.stats.mu.Lock()
	for _, why := range outages {
		out.Redis.Errors[string(why)] = e.stats.redisErrors[why]
	}
	e.stats.mu.Unlock()
	e.store.mu.Lock()
	out.Postgres = StoreStats{Status: h.Postgres.Status, Reason: h.Postgres.Reason, SinceSeconds: h.Postgres.Since, Opens: e.store.opens}
	e.store.mu.Unlock()

	c := e.stats
	out.Journal = e.journal.state()
	out.Journal.Repairs = c.repaired()
	out.Proxy = SelfStats{Clients: s.Clients(), ProtocolErrors: c.protocolErrors.Load(), UptimeSeconds: int64(time.Since(s.start).Seconds()), Commands: c.commands.Load(), Unrouted: c.unrouted.Load(), Denied: c.denied.Load(),
		Promotions: c.promotions.Load(), PromotionsRefused: c.refusedPromotions.Load(), PromotionsFailed: c.failedPromotions.Load(),
		LostLeases: c.lostLeases.Load(), Shed: c.shed.Load(), Uncertain: c.uncertain.Load(), Fences: c.fences.Load(), NumbersLifted: c.lifts.Load(), StoredRaw: c.rawOnly.Load(), Draining: s.drain.Load()}
	if g := s.guard.Load(); g != nil {
		out.Proxy.ClientsAccepted, out.Proxy.ClientsRefused = g.accepted(), g.refused()
		out.Proxy.ProtocolErrors += g.violations()
	}
	return out
}

// Health is the state of the process and of both stores.
type Health struct {
	Draining bool        `json:"draining"`
	Serving  bool        `json:"serving"`
	Redis    StoreHealth `json:"redis"`
	Postgres StoreHealth `json:"postgres"`
}

// StoreHealth is one store's state. Status is "connected", "recovering", "down" or "unused".
type StoreHealth struct {
	Status string `json:"status"`
	Reason string `json:"reason,omitempty"`
	Since  int64  `json:"since_seconds"`
}

// Health tells the present state without asking anybody.
func (s *Server) Health() Health {
	h := s.e.health()
	h.Draining, h.Serving = s.drain.Load(), s.guard.Load() != nil
	return h
}

func (e *engine) health() Health {
	var h Health
	e.up.mu.Lock()
	h.Redis = StoreHealth{Status: e.up.trust().String(), Reason: string(e.up.why), Since: int64(time.Since(e.up.since).Seconds())}
	e.up.mu.Unlock()
	e.store.mu.Lock()
	h.Postgres = StoreHealth{Status: "down", Reason: e.store.why, Since: int64(time.Since(e.store.since).Seconds())}
	e.store.mu.Unlock()
	switch {
	case !e.storeInUse():
		h.Postgres = StoreHealth{Status: "unused"}
	case e.store.up.Load():
		h.Postgres.Status = "connected"
	}
	return h
}
