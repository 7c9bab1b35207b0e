package main

import (
	"encoding/json"
	"math"
	"net/http"
	"strconv"
	"strings"
	"testing"

	"cacheproxy/internal/testenv"
	"cacheproxy/proxy"

	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
)

// scraped are the values that the site's proxy shows to Prometheus, by name and labels.
func (s *site) scraped() map[string]float64 {
	s.t.Helper()
	code, body := s.get("/metrics", "Accept", "text/plain;version=0.0.4", "Accept-Encoding", "gzip")
	if code != http.StatusOK {
		s.t.Fatalf("/metrics: %d\n%s", code, body)
	}
	problems, err := promlint.New(strings.NewReader(body)).Lint()
	if err != nil {
		s.t.Fatal(err)
	}
	for _, p := range problems {
		s.t.Errorf("%s: %s", p.Metric, p.Text)
	}
	out := map[string]float64{}
	for line := range strings.Lines(body) {
		if at := strings.LastIndexByte(line, ' '); at > 0 && line[0] != '#' {
			v, err := strconv.ParseFloat(strings.TrimSpace(line[at:]), 64)
			if err != nil {
				s.t.Fatal(err)
			}
			out[line[:at]] = v
		}
	}
	return out
}

// What the program as it is shipped tells Prometheus, /cache/stats and its own table after the same things have been done.
func TestMetricsOfTheProgram(t *testing.T) {
	server := testenv.Redis(t)
	link := testenv.NewLink(t, server.Addr())
	s := newSite(t, "redis://"+link.Addr()+"/0", testenv.Postgres(t))
	s.write(routes)
	s.execBuilt("serve", "--config", s.config)
	s.started()
	do := func(want string, args ...any) {
		t.Helper()
		if got := s.do(args...); got != want {
			t.Errorf("%v: %q, want %q", args, got, want)
		}
	}
	do("OK", "SET", "user:1", "v")
	do("v", "GET", "user:1")
	do("redis: nil", "GET", "user:2")
	do("redis: nil", "GET", "report:1")
	do("redis: nil", "GET", "elsewhere")
	link.Cut()
	do("OK", "SET", "user:1", "new")
	do("new", "GET", "user:1")
	values := s.scraped()
	for name, want := range map[string]float64{
		`upstream_up{upstream="redis"}`: 0, `upstream_up{upstream="postgres"}`: 1, `circuit_state{state="connected",upstream="redis"}`: 0,
		`journal_entries{journal="redis_stale"}`: 1, `journal_repairs_total{cause="redis_stale_row"}`: 0,
	} {
		if got, ok := values["cacheproxy_"+name]; !ok || got != want {
			t.Errorf("while Redis is cut off: %s is %v", name, got)
		}
	}
	if values[`cacheproxy_journal_oldest_seconds{journal="redis_stale"}`] <= 0 {
		t.Error("the entry has no age")
	}
	link.Heal()
	eventually(t, "the entry is repaired", func() bool { return s.scraped()[`cacheproxy_journal_repairs_total{cause="redis_stale_row"}`] == 1 })
	do("OK", "FLUSHALL")

	_, body := s.get("/cache/stats")
	var stats proxy.Stats
	if err := json.Unmarshal([]byte(body), &stats); err != nil {
		t.Fatal(err)
	}
	values = s.scraped()
	same := func(name string, figure, want float64) {
		t.Helper()
		if got, ok := values["cacheproxy_"+name]; !ok || math.Abs(got-want) > 1e-9 || math.Abs(figure-want) > 1e-9 {
			t.Errorf("%s is %v, in /cache/stats %v, want %v", name, got, figure, want)
		}
	}
	user, report := stats.Routes[0], stats.Routes[1]
	same(`reads_total{outcome="hit",route="user",source="redis"}`, float64(user.RedisHits), 1)
	same(`reads_total{outcome="hit",route="user",source="jsonb"}`, float64(user.JSONBHits), 1)
	same(`reads_total{outcome="miss",route="user",source="none"}`, float64(user.CacheMisses), 1)
	same(`reads_total{outcome="miss",route="report",source="none"}`, float64(report.CacheMisses), 1)
	same(`writes_total{route="user"}`, float64(user.Writes), 2)
	same(`route_info{phase="phase2",route="report"}`, 1, 1)
	same(`journal_entries{journal="redis_stale"}`, float64(stats.Journal.RedisStale), 0)
	same(`journal_repairs_total{cause="redis_stale_row"}`, float64(stats.Journal.Repairs["redis_stale_row"]), 1)
	same(`journal_repairs_total{cause="store_stale_copied"}`, float64(stats.Journal.Repairs["store_stale_copied"]), 0)
	same(`fences_total`, float64(stats.Proxy.Fences), 1)
	same(`uncertain_total`, float64(stats.Proxy.Uncertain), 0)
	same(`circuit_opens_total{upstream="redis"}`, float64(stats.Redis.Opens), values[`cacheproxy_circuit_opens_total{upstream="redis"}`])
	same(`journal_longest_seconds{journal="redis_stale"}`, stats.Journal.RedisStaleLongest, values[`cacheproxy_journal_longest_seconds{journal="redis_stale"}`])
	same(`draining`, 0, 0)
	if stats.Journal.RedisStaleLongest <= 0 || stats.Redis.Opens < 1 {
		t.Errorf("after an outage: %+v %+v", stats.Journal, stats.Redis)
	}
	if err := s.run("stats"); err != nil || !s.stdout.has("redis_stale_row", "fences 1", "refused by lease 0") {
		t.Errorf("stats: %v\n%s", err, s.stdout.String())
	}
}
