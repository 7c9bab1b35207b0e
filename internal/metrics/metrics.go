// Package metrics tells Prometheus what a sidecar counts. It counts nothing itself: when Prometheus asks, the figures that
// /cache/stats and INFO show are turned into metrics, so the three cannot disagree and the data path does not know of it.
//
// docs/metrics.md has every metric beside the name that its figure has elsewhere.
package metrics

import (
	"net/http"
	"time"

	"cacheproxy/proxy"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// Source is a sidecar. Both ask nobody, and are called for every scrape.
type Source interface {
	Figures() proxy.Stats
	Timings() proxy.Timings
}

// Process is the program around it. What is nil is not told.
type Process struct {
	Build   Build
	Reloads func() Reloads
	// Pool tells how many connections to Postgres wait for work and how many are at it.
	Pool func() (idle, active int)
	// Waited tells how many requests have waited for a connection to Postgres and for how long together, for each cause.
	Waited func(tell func(cause string, requests int64, together time.Duration))
}

// Reloads is what became of the configuration since the start, which counts as a success, but is not in Succeeded.
type Reloads struct {
	Succeeded, Failed int64
	LastFailed        bool
	LastSuccess       time.Time
}

// Build is what the program was built from. Revision may be empty.
type Build struct{ Version, Revision, Go string }

// Handler answers GET /metrics.
func Handler(s Source, p Process) http.Handler {
	return promhttp.HandlerFor(registry(s, p), promhttp.HandlerOpts{
		// Some ten kilobytes, from next door. A gzip writer would keep most of a megabyte for them.
		DisableCompression: true,
	})
}

func registry(s Source, p Process) *prometheus.Registry {
	r := prometheus.NewRegistry()
	r.MustRegister(collector{s, p}, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return r
}

// collector reads the figures anew for every scrape. Its labels are words of closed lists and the names of routes, which are the
// configuration's; nothing that a client says becomes one.
type collector struct {
	source  Source
	process Process
}

// metric is one name, with its help and labels. kind says nothing of a histogram or a summary.
type metric struct {
	desc *prometheus.Desc
	kind prometheus.ValueType
}

var all []metric

func define(kind prometheus.ValueType, name, help string, labels ...string) metric {
	m := metric{prometheus.NewDesc("cacheproxy_"+name, help, labels, nil), kind}
	all = append(all, m)
	return m
}

func histogram(name, help string, labels ...string) metric {
	return define(prometheus.UntypedValue, name, help, labels...)
}

func summary(name, help string, labels ...string) metric {
	return define(prometheus.UntypedValue, name, help, labels...)
}

func counter(name, help string, labels ...string) metric {
	return define(prometheus.CounterValue, name, help, labels...)
}

func gauge(name, help string, labels ...string) metric {
	return define(prometheus.GaugeValue, name, help, labels...)
}

var (
	buildInfo = gauge("build_info", "What the program was built from; always 1.", "version", "revision", "goversion")
	draining  = gauge("draining", "Whether the process has been asked to stop and waits for its clients.")

	connections      = gauge("downstream_connections", "Clients that are connected.")
	connectionsTotal = counter("downstream_connections_total", "Clients that have connected, and those that were turned away because there were too many.", "result")

	violations = counter("downstream_protocol_errors_total", "Clients that have said what is no command, and were hung up on.")

	commands = counter("commands_total", "Commands that were answered, by what the reply was: refused is a refusal of the proxy's own.", "class", "outcome")
	took     = histogram("command_duration_seconds", "How long a command took from when it was read until its reply was there. What waits for an event is not timed.", "class")
	unrouted = counter("commands_unrouted_total", "Commands on keys that no route matches, which went to Redis as they were.")
	denied   = counter("commands_denied_total", "Commands that commands.deny has refused.")

	routeInfo = gauge("route_info", "The phase of a route; always 1.", "route", "phase")
	reads     = counter("reads_total", "Reads of keys of a route, by what they found and where.", "route", "outcome", "source")
	writes    = counter("writes_total", "Writes of keys of a route.", "route")
	refused   = counter("refused_total", "Commands on keys of a route that were answered with a refusal of the proxy's own.", "route")
	noRow     = counter("no_row_total", "Writes of keys that have no row in the column of their route, and went to Redis alone.", "route")
	checked   = counter("verify_checked_total", "Hits whose two copies were compared, of the share that verify.sample names.", "route")
	unchecked = counter("verify_dropped_total", "Hits that were to be compared and could not be: a store was down, too many waited, or the key was written again and again.", "route")
	differed  = counter("verify_mismatches_total", "Hits whose two copies differed for longer than a write or a repair takes.", "route", "kind")
	shed      = counter("shed_total", "Reads and writes that were refused because too many were waiting.")
	uncertain = counter("uncertain_total", "Commands that were answered with -UNCERTAIN: they may have run.")
	rawOnly   = counter("stored_raw_only_total", "Writes that Postgres refused as JSON and took as bytes.")

	promotions = counter("promotions_total", "Values of Postgres that were to be put into Redis. Refused: the lease had gone, usually to a write.", "result")
	lostLeases = counter("lost_leases_total", "Keys whose lease a write had lost by the time it had committed, and which it deleted in Redis once more.")
	lifted     = counter("numbers_lifted_total", "How often Postgres had forgotten numbers that Redis remembers, and was given higher ones.")
	fences     = counter("fences_total", "How often all rows of a store or a route were declared dead: FLUSHALL and its kin, and the way back from a phase without the store.")

	entries = gauge("journal_entries", "What waits for a repair: entries in Postgres for redis_stale, keys in Redis for store_stale.", "journal")
	oldest  = gauge("journal_oldest_seconds", "How long the oldest of them has stood, as far as this sidecar knows; 0 without any.", "journal")
	longest = gauge("journal_longest_seconds", "The longest that anything this sidecar has repaired had stood.", "journal")
	repairs = counter("journal_repairs_total", "Keys that this sidecar has repaired.", "cause")

	fallbacks    = counter("fallback_requests_total", "Keys that Postgres was asked for, by what came of it. Shed: too many were waiting.", "result")
	fallbackTook = histogram("fallback_duration_seconds", "How long it took from a miss in Redis until it was known what Postgres has, and that was in Redis.")
	upstreamTook = histogram("upstream_duration_seconds", "How long a store took for what the proxy asks of it. The commands of clients that pass through are not here.", "upstream", "operation")
	pool         = gauge("upstream_pool_connections", "Connections to a store, by what they do.", "upstream", "state")
	poolWait     = summary("upstream_pool_wait_seconds", "How long requests have waited for a connection to a store, of those that had to, by what for.", "upstream", "cause")

	reloads    = counter("config_reloads_total", "How often the configuration was reloaded, by how that ended.", "result")
	reloadedOK = gauge("config_last_reload_successful", "Whether the configuration in its file is the one in force; 0 after a reload that failed.")
	reloadedAt = gauge("config_last_reload_success_timestamp_seconds", "When the configuration in force was read.")

	up        = gauge("upstream_up", "Whether a store answers and is trusted; absent if no route uses it.", "upstream")
	state     = gauge("circuit_state", "1 for the state that a store is in, 0 for the others.", "upstream", "state")
	stateTime = gauge("circuit_state_seconds", "How long it has been in that state.", "upstream")
	opens     = counter("circuit_opens_total", "How often a store was given up until it would answer again.", "upstream")
	failures  = counter("redis_errors_total", "Failures of the proxy's own requests to Redis.", "reason")
)

// states are the words for the state of a store.
var states = []string{"connected", "recovering", "down", "unused"}

func (collector) Describe(ch chan<- *prometheus.Desc) {
	for _, m := range all {
		ch <- m.desc
	}
}

func (c collector) Collect(ch chan<- prometheus.Metric) {
	s := c.source.Figures()
	tell := func(m metric, value float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(m.desc, m.kind, value, labels...)
	}
	count := func(m metric, n int64, labels ...string) { tell(m, float64(n), labels...) }

	last := func(m metric, d proxy.Durations, labels ...string) {
		ch <- prometheus.MustNewConstHistogram(m.desc, d.Count, d.Sum, d.Buckets, labels...)
	}

	build := c.process.Build
	tell(buildInfo, 1, build.Version, build.Revision, build.Go)
	tell(draining, one(s.Proxy.Draining))
	tell(connections, float64(s.Proxy.Clients))
	count(connectionsTotal, s.Proxy.ClientsAccepted, "accepted")
	count(connectionsTotal, s.Proxy.ClientsRefused, "rejected")
	count(violations, s.Proxy.ProtocolErrors)
	count(unrouted, s.Proxy.Unrouted)
	count(denied, s.Proxy.Denied)
	for _, r := range s.Routes {
		tell(routeInfo, 1, r.Name, r.Phase)
		count(reads, r.RedisHits, r.Name, "hit", "redis")
		count(reads, r.JSONBHits, r.Name, "hit", "jsonb")
		count(reads, r.CacheMisses-r.Negative, r.Name, "miss", "none")
		count(reads, r.Negative, r.Name, "miss", "negative")
		count(writes, r.Writes, r.Name)
		count(refused, r.Refused, r.Name)
		count(noRow, r.NoRow, r.Name)
		count(checked, r.Verified, r.Name)
		count(unchecked, r.Unverified, r.Name)
		for kind, n := range r.Mismatches {
			count(differed, n, r.Name, kind)
		}
	}
	count(shed, s.Proxy.Shed)
	count(uncertain, s.Proxy.Uncertain)
	count(rawOnly, s.Proxy.StoredRaw)
	count(promotions, s.Proxy.Promotions, "ok")
	count(promotions, s.Proxy.PromotionsRefused, "refused")
	count(promotions, s.Proxy.PromotionsFailed, "failed")
	count(lostLeases, s.Proxy.LostLeases)
	count(lifted, s.Proxy.NumbersLifted)
	count(fences, s.Proxy.Fences)

	const redisStale, storeStale = "redis_stale", "store_stale"
	tell(entries, float64(s.Journal.RedisStale), redisStale)
	tell(entries, float64(s.Journal.StoreStale), storeStale)
	tell(oldest, s.Journal.RedisStaleOldest, redisStale)
	tell(oldest, s.Journal.StoreStaleOldest, storeStale)
	tell(longest, s.Journal.RedisStaleLongest, redisStale)
	tell(longest, s.Journal.StoreStaleLongest, storeStale)
	for cause, n := range s.Journal.Repairs {
		count(repairs, n, cause)
	}

	upstream := func(name, status string, since, opened int64) {
		if status != "unused" {
			tell(up, one(status == "connected"), name)
		}
		for _, word := range states {
			tell(state, one(word == status), name, word)
		}
		tell(stateTime, float64(since), name)
		count(opens, opened, name)
	}
	upstream("redis", s.Redis.Status, s.Redis.SinceSeconds, s.Redis.Opens)
	upstream("postgres", s.Postgres.Status, s.Postgres.SinceSeconds, s.Postgres.Opens)
	for reason, n := range s.Redis.Errors {
		count(failures, n, reason)
	}

	t := c.source.Timings()
	for _, ct := range t.Commands {
		for outcome, n := range ct.Outcomes {
			count(commands, n, ct.Class, outcome)
		}
		if ct.Took != nil {
			last(took, *ct.Took, ct.Class)
		}
	}
	for _, ut := range t.Upstreams {
		last(upstreamTook, ut.Took, ut.Upstream, ut.Operation)
	}
	for result, n := range t.Fallbacks {
		count(fallbacks, n, result)
	}
	last(fallbackTook, t.Fallback)

	if f := c.process.Pool; f != nil {
		idle, active := f()
		tell(pool, float64(idle), "postgres", "idle")
		tell(pool, float64(active), "postgres", "active")
	}
	if f := c.process.Waited; f != nil {
		f(func(cause string, requests int64, together time.Duration) {
			ch <- prometheus.MustNewConstSummary(poolWait.desc, uint64(requests), together.Seconds(), nil, "postgres", cause)
		})
	}
	if f := c.process.Reloads; f != nil {
		r := f()
		count(reloads, r.Succeeded, "ok")
		count(reloads, r.Failed, "error")
		tell(reloadedOK, one(!r.LastFailed))
		tell(reloadedAt, float64(r.LastSuccess.UnixMilli())/1e3)
	}
}

func one(b bool) float64 {
	if b {
		return 1
	}
	return 0
}
