package main

import (
	"context"
	"time"

	"cacheproxy/internal/config"
	"cacheproxy/policy"

	"github.com/redis/go-redis/v9"
	"go.uber.org/zap"
)

// demo are the documents that dev puts into Postgres, as an application would have left them there.
var demo = []struct {
	key, value string
	life       time.Duration // 0: for ever
}{
	{"user:1", `{"id": 1, "name": "Ada Lovelace", "email": "ada@example.com", "roles": ["admin", "author"], "settings": {"theme": "dark", "locale": "en-GB"}}`, 0},
	{"user:2", `{"id": 2, "name": "Grace Hopper", "email": "grace@example.com", "roles": ["author"], "settings": {"theme": "light", "locale": "en-US"}}`, 0},
	{"user:3", `{"id": 3, "name": "Katherine Johnson", "email": "katherine@example.com", "roles": [], "settings": {}}`, time.Hour},
	{"report:2026-01", `{"month": "2026-01", "orders": 1824, "revenue": {"EUR": 91250.40, "USD": 40311.00}, "top": ["A-113", "C-207"]}`, 0},
	{"report:2026-02", `{"month": "2026-02", "orders": 1677, "revenue": {"EUR": 84012.95, "USD": 38540.10}, "top": ["C-207", "A-101"]}`, 0},
	{"report:2026-03", `{"month": "2026-03", "orders": 2051, "revenue": {"EUR": 102733.15, "USD": 45120.75}, "top": ["A-113", "B-009"]}`, 0},
}

// loadDemo stores the documents that neither store knows anything of. The proxy must not run yet: nothing is written to
// Redis, and nobody is told.
func loadDemo(ctx context.Context, cfg *config.Config, log *zap.Logger) error {
	router, err := policy.NewRouter(cfg.PolicyRoutes())
	if err != nil {
		return err
	}
	opt, err := redisOptions(cfg.Redis, nil)
	if err != nil {
		return err
	}
	client := redis.NewClient(opt)
	defer client.Close()
	var refs []policy.Ref
	var changes []policy.Change
	for _, d := range demo {
		route := router.Match([]byte(d.key))
		if route == nil || !route.Phase.Rules().UsesStore {
			continue
		}
		switch n, err := client.Exists(ctx, d.key).Result(); {
		case err != nil:
			return err
		case n > 0:
			continue
		}
		change := policy.Change{Ref: policy.Ref{Route: route.Name, Key: d.key}, Op: policy.Put, Value: []byte(d.value)}
		if d.life > 0 {
			change.Expiry = policy.Expiry{Kind: policy.ExpiresIn, MS: d.life.Milliseconds()}
		}
		refs, changes = append(refs, change.Ref), append(changes, change)
	}
	if len(refs) == 0 {
		return nil
	}
	s, err := newFallback(cfg, log)
	if err != nil {
		return err
	}
	defer s.Close()
	if err := s.EnsureSchema(ctx); err != nil {
		return err
	}
	t, err := newStore(s).Begin(ctx, refs)
	if err != nil {
		return err
	}
	defer t.Rollback()
	missing := changes[:0]
	for i, row := range t.Rows() {
		if row.State == policy.Absent {
			missing = append(missing, changes[i])
		}
	}
	_, err = t.Commit(ctx, missing, nil, nil, false)
	return err
}
