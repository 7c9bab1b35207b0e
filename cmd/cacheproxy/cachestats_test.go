package main

import (
	"encoding/json"
	"fmt"
	"net/http"
	"testing"

	"cacheproxy/internal/testenv"
)

// TestCacheStats reads 150 keys that Redis has, 25 that only Postgres has, and 5 that nobody has: /cache/stats has the names that dashboards read,
// and counts right.
func TestCacheStats(t *testing.T) {
	pg := testenv.Postgres(t)
	s := newSite(t, testenv.Redis(t).URL(), pg)
	s.write("redis: {timeout: 10s}\nroutes: [{name: user, match: 'user:*', phase: phase1, ttl: 1h}]")
	s.execBuilt("serve", "--config", s.config)
	s.connected()
	execute(t, pg, `INSERT INTO cacheproxy.entries (key, value, route, generation, updated_at)
		SELECT 'user:p' || i, '1', 'user', (SELECT coalesce(max(generation), 0) FROM cacheproxy.generations), now() FROM generate_series(1, 25) i`)
	if got := s.do("SET", "user:r", "1"); got != "OK" {
		t.Fatal(got)
	}
	for range 150 {
		if got := s.do("GET", "user:r"); got != "1" {
			t.Fatal(got)
		}
	}
	for i := range 25 {
		if got := s.do("GET", fmt.Sprint("user:p", 1+i)); got != "1" {
			t.Fatal(got)
		}
	}
	for i := range 5 {
		if got := s.do("GET", fmt.Sprint("user:n", i)); got != "redis: nil" {
			t.Fatal(got)
		}
	}
	code, body := s.get("/cache/stats")
	var got struct {
		MigrationPhase string `json:"migration_phase"`
		Performance    map[string]float64
		Redis          struct {
			Status        string
			MemoryUsageMB float64  `json:"memory_usage_mb"`
			HitRate       *float64 `json:"hit_rate"`
			TotalRequests float64  `json:"total_requests"`
			Config        struct {
				TTLSeconds float64 `json:"ttl_seconds"`
			}
		}
		Postgres, Journal map[string]any
		Routes            []map[string]any
	}
	if err := json.Unmarshal([]byte(body), &got); err != nil || code != http.StatusOK {
		t.Fatalf("%d %v\n%s", code, err, body)
	}
	for name, want := range map[string]float64{"redis_hits": 150, "jsonb_hits": 25, "cache_misses": 5, "redis_hit_rate": 0.833, "overall_hit_rate": 0.972} {
		if got.Performance[name] != want {
			t.Errorf("%s is %v, want %v", name, got.Performance[name], want)
		}
	}
	if got.MigrationPhase != "phase1" || got.Redis.Status != "connected" || got.Redis.MemoryUsageMB <= 0 || got.Redis.HitRate == nil || got.Redis.TotalRequests < 180 ||
		got.Redis.Config.TTLSeconds != 3600 || got.Postgres["status"] != "connected" || got.Journal == nil || len(got.Routes) != 1 || got.Routes[0]["redis_hits"] != 150.0 {
		t.Errorf("not as it should be:\n%s", body)
	}
}
