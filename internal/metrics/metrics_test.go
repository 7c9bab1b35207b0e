package metrics

import (
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"reflect"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"cacheproxy/proxy"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
)

// still is a sidecar whose figures do not change.
type still proxy.Stats

func (s still) Figures() proxy.Stats { return proxy.Stats(s) }

func (s still) Timings() proxy.Timings {
	took := proxy.Durations{Count: 3, Sum: 0.75, Buckets: map[float64]uint64{0.125: 1, 0.25: 2}}
	return proxy.Timings{
		Commands: []proxy.CommandTimes{
			{Class: "read", Outcomes: map[string]int64{"ok": 2, "error": 1}, Took: &took},
			{Class: "blocking", Outcomes: map[string]int64{"ok": 4}},
		},
		Upstreams: []proxy.UpstreamTimes{{Upstream: "redis", Operation: "promote", Took: took}},
		Fallback:  took,
		Fallbacks: map[string]int64{"found": 30, "shed": 31},
	}
}

var process = Process{
	Build: Build{"v1", "abc", "go1"},
	Reloads: func() Reloads {
		return Reloads{Succeeded: 32, Failed: 33, LastFailed: true, LastSuccess: time.UnixMilli(1500)}
	},
	Pool: func() (idle, active int) { return 34, 35 },
	Waited: func(tell func(cause string, requests int64, together time.Duration)) {
		tell("max_reads", 36, 1500*time.Millisecond)
	},
}

var figures = still{
	Redis:    proxy.RedisStats{Status: "recovering", SinceSeconds: 3, Opens: 2, Errors: map[string]int64{"timeout": 4, "oom": 0}},
	Postgres: proxy.StoreStats{Status: "unused"},
	Routes: []proxy.RouteStats{
		{Name: "a:b \"c\"\n", Phase: "phase1", Negative: 1, Writes: 7, Refused: 8, NoRow: 25, Verified: 26, Unverified: 27,
			Mismatches: map[string]int64{"missing": 28, "ttl": 0}, Performance: proxy.Performance{RedisHits: 4, JSONBHits: 5, CacheMisses: 3}},
		{Name: "user", Phase: "phase2"},
	},
	Journal: proxy.JournalStats{
		RedisStale: 1, StoreStale: 2, RedisStaleOldest: 0.5, StoreStaleOldest: 1.5, RedisStaleLongest: 2.5, StoreStaleLongest: 3.5,
		Repairs: map[string]int64{"restart": 9, "both_stale": 1},
	},
	Proxy: proxy.SelfStats{
		Clients: 10, ClientsAccepted: 11, ClientsRefused: 12, ProtocolErrors: 25, Unrouted: 14, Denied: 15, Promotions: 16, PromotionsRefused: 17, PromotionsFailed: 18,
		LostLeases: 19, Shed: 20, Uncertain: 21, Fences: 22, NumbersLifted: 23, StoredRaw: 24, Draining: true,
	},
}

const text = `
cacheproxy_build_info{goversion="go1",revision="abc",version="v1"} 1
cacheproxy_circuit_opens_total{upstream="postgres"} 0
cacheproxy_circuit_opens_total{upstream="redis"} 2
cacheproxy_circuit_state_seconds{upstream="postgres"} 0
cacheproxy_circuit_state_seconds{upstream="redis"} 3
cacheproxy_circuit_state{state="connected",upstream="postgres"} 0
cacheproxy_circuit_state{state="connected",upstream="redis"} 0
cacheproxy_circuit_state{state="down",upstream="postgres"} 0
cacheproxy_circuit_state{state="down",upstream="redis"} 0
cacheproxy_circuit_state{state="recovering",upstream="postgres"} 0
cacheproxy_circuit_state{state="recovering",upstream="redis"} 1
cacheproxy_circuit_state{state="unused",upstream="postgres"} 1
cacheproxy_circuit_state{state="unused",upstream="redis"} 0
cacheproxy_command_duration_seconds_bucket{class="read",le="+Inf"} 3
cacheproxy_command_duration_seconds_bucket{class="read",le="0.125"} 1
cacheproxy_command_duration_seconds_bucket{class="read",le="0.25"} 2
cacheproxy_command_duration_seconds_count{class="read"} 3
cacheproxy_command_duration_seconds_sum{class="read"} 0.75
cacheproxy_commands_denied_total 15
cacheproxy_commands_total{class="blocking",outcome="ok"} 4
cacheproxy_commands_total{class="read",outcome="error"} 1
cacheproxy_commands_total{class="read",outcome="ok"} 2
cacheproxy_commands_unrouted_total 14
cacheproxy_config_last_reload_success_timestamp_seconds 1.5
cacheproxy_config_last_reload_successful 0
cacheproxy_config_reloads_total{result="error"} 33
cacheproxy_config_reloads_total{result="ok"} 32
cacheproxy_downstream_connections 10
cacheproxy_downstream_connections_total{result="accepted"} 11
cacheproxy_downstream_connections_total{result="rejected"} 12
cacheproxy_downstream_protocol_errors_total 25
cacheproxy_draining 1
cacheproxy_fallback_duration_seconds_bucket{le="+Inf"} 3
cacheproxy_fallback_duration_seconds_bucket{le="0.125"} 1
cacheproxy_fallback_duration_seconds_bucket{le="0.25"} 2
cacheproxy_fallback_duration_seconds_count 3
cacheproxy_fallback_duration_seconds_sum 0.75
cacheproxy_fallback_requests_total{result="found"} 30
cacheproxy_fallback_requests_total{result="shed"} 31
cacheproxy_fences_total 22
cacheproxy_journal_entries{journal="redis_stale"} 1
cacheproxy_journal_entries{journal="store_stale"} 2
cacheproxy_journal_longest_seconds{journal="redis_stale"} 2.5
cacheproxy_journal_longest_seconds{journal="store_stale"} 3.5
cacheproxy_journal_oldest_seconds{journal="redis_stale"} 0.5
cacheproxy_journal_oldest_seconds{journal="store_stale"} 1.5
cacheproxy_journal_repairs_total{cause="both_stale"} 1
cacheproxy_journal_repairs_total{cause="restart"} 9
cacheproxy_lost_leases_total 19
cacheproxy_no_row_total{route="a:b \"c\"\n"} 25
cacheproxy_no_row_total{route="user"} 0
cacheproxy_numbers_lifted_total 23
cacheproxy_promotions_total{result="failed"} 18
cacheproxy_promotions_total{result="ok"} 16
cacheproxy_promotions_total{result="refused"} 17
cacheproxy_reads_total{outcome="hit",route="a:b \"c\"\n",source="jsonb"} 5
cacheproxy_reads_total{outcome="hit",route="a:b \"c\"\n",source="redis"} 4
cacheproxy_reads_total{outcome="hit",route="user",source="jsonb"} 0
cacheproxy_reads_total{outcome="hit",route="user",source="redis"} 0
cacheproxy_reads_total{outcome="miss",route="a:b \"c\"\n",source="negative"} 1
cacheproxy_reads_total{outcome="miss",route="a:b \"c\"\n",source="none"} 2
cacheproxy_reads_total{outcome="miss",route="user",source="negative"} 0
cacheproxy_reads_total{outcome="miss",route="user",source="none"} 0
cacheproxy_redis_errors_total{reason="oom"} 0
cacheproxy_redis_errors_total{reason="timeout"} 4
cacheproxy_refused_total{route="a:b \"c\"\n"} 8
cacheproxy_refused_total{route="user"} 0
cacheproxy_route_info{phase="phase1",route="a:b \"c\"\n"} 1
cacheproxy_route_info{phase="phase2",route="user"} 1
cacheproxy_shed_total 20
cacheproxy_stored_raw_only_total 24
cacheproxy_uncertain_total 21
cacheproxy_upstream_duration_seconds_bucket{operation="promote",upstream="redis",le="+Inf"} 3
cacheproxy_upstream_duration_seconds_bucket{operation="promote",upstream="redis",le="0.125"} 1
cacheproxy_upstream_duration_seconds_bucket{operation="promote",upstream="redis",le="0.25"} 2
cacheproxy_upstream_duration_seconds_count{operation="promote",upstream="redis"} 3
cacheproxy_upstream_duration_seconds_sum{operation="promote",upstream="redis"} 0.75
cacheproxy_upstream_pool_connections{state="active",upstream="postgres"} 35
cacheproxy_upstream_pool_connections{state="idle",upstream="postgres"} 34
cacheproxy_upstream_pool_wait_seconds_count{cause="max_reads",upstream="postgres"} 36
cacheproxy_upstream_pool_wait_seconds_sum{cause="max_reads",upstream="postgres"} 1.5
cacheproxy_upstream_up{upstream="redis"} 0
cacheproxy_verify_checked_total{route="a:b \"c\"\n"} 26
cacheproxy_verify_checked_total{route="user"} 0
cacheproxy_verify_dropped_total{route="a:b \"c\"\n"} 27
cacheproxy_verify_dropped_total{route="user"} 0
cacheproxy_verify_mismatches_total{kind="missing",route="a:b \"c\"\n"} 28
cacheproxy_verify_mismatches_total{kind="ttl",route="a:b \"c\"\n"} 0
cacheproxy_writes_total{route="a:b \"c\"\n"} 7
cacheproxy_writes_total{route="user"} 0
`

// families are the metrics of ours that a sidecar with these figures shows.
func families(t *testing.T, r prometheus.Gatherer) (names []string) {
	t.Helper()
	all, err := r.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range all {
		if strings.HasPrefix(f.GetName(), "cacheproxy_") {
			names = append(names, f.GetName())
		}
	}
	return names
}

func TestMetrics(t *testing.T) {
	w := httptest.NewRecorder()
	r := httptest.NewRequest(http.MethodGet, "/metrics", nil)
	r.Header.Set("Accept-Encoding", "gzip")
	Handler(figures, process).ServeHTTP(w, r)
	if w.Code != http.StatusOK || w.Header().Get("Content-Encoding") != "" {
		t.Errorf("status %d, encoding %q", w.Code, w.Header().Get("Content-Encoding"))
	}
	body := w.Body.String()
	for _, name := range []string{"go_goroutines ", "process_resident_memory_bytes "} {
		if runtime.GOOS == "linux" && !strings.Contains(body, "\n"+name) {
			t.Errorf("no %s", name)
		}
	}
	var got []string
	for line := range strings.Lines(body) {
		if strings.HasPrefix(line, "cacheproxy_") {
			got = append(got, strings.TrimSuffix(line, "\n"))
		}
	}
	slices.Sort(got)
	want := strings.Split(strings.Trim(text, "\n"), "\n")
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Errorf("got:\n%s", strings.Join(got, "\n"))
	}
}

func TestNames(t *testing.T) {
	strict := prometheus.NewPedanticRegistry() // what is told must be what is described
	strict.MustRegister(collector{figures, process})
	if names := families(t, strict); len(names) != len(all) {
		t.Errorf("%d metrics are shown, of %d", len(names), len(all))
	}
	problems, err := testutil.GatherAndLint(registry(figures, process))
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		t.Errorf("%s: %s", p.Metric, p.Text)
	}
}

// docs/metrics.md names every metric and every figure of /cache/stats, and no others.
func TestEveryFigureIsDocumented(t *testing.T) {
	b, err := os.ReadFile("../../docs/metrics.md")
	if err != nil {
		t.Fatal(err)
	}
	compare := func(what string, pattern string, want []string) {
		t.Helper()
		found := map[string]bool{}
		for _, m := range regexp.MustCompile(pattern).FindAllStringSubmatch(string(b), -1) {
			found[m[1]] = true
		}
		slices.Sort(want)
		want = slices.Compact(want)
		if got := slices.Sorted(maps.Keys(found)); !slices.Equal(got, want) {
			t.Errorf("%s\n%q, want\n%q", what, got, want)
		}
	}
	compare("metrics", "`(cacheproxy_[a-z_]+)", families(t, registry(figures, process)))
	compare("figures", "`((?:migration_phase|performance|redis|postgres|routes|journal|proxy)(?:\\.[a-z_]+)?)`", figureNames())
}

// figureNames are the paths in the JSON of /cache/stats, two levels deep.
func figureNames() (names []string) {
	name := func(f reflect.StructField) string {
		n, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		return n
	}
	for _, f := range reflect.VisibleFields(reflect.TypeFor[proxy.Stats]()) {
		section := f.Type
		if section.Kind() == reflect.Slice {
			section = section.Elem()
		}
		if section.Kind() != reflect.Struct {
			names = append(names, name(f))
			continue
		}
		for _, inner := range reflect.VisibleFields(section) {
			if !inner.Anonymous {
				names = append(names, name(f)+"."+name(inner))
			}
		}
	}
	return names
}
