package main

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"net"
	"strconv"
	"strings"
	"time"

	"cacheproxy/internal/config"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/redis/go-redis/v9"
	"github.com/redis/go-redis/v9/logging"
	"github.com/redis/go-redis/v9/maintnotifications"
	"go.uber.org/zap"
)

// go-redis would write to standard error past our log, with addresses. What it has to say is in its errors.
func init() { logging.Disable() }

const (
	// memoryEvery is how often Redis's memory settings are looked at: one that restarted has lost what CONFIG SET said.
	memoryEvery = time.Minute
	// Between attempts to reach Redis; the proxy's own probes find its return sooner.
	memoryRetry    = time.Second
	memoryRetryMax = 30 * time.Second
	// memoryTime bounds one look.
	memoryTime = 5 * time.Second
	// managedPolicy is what redis.manage_memory sets: a cache evicts what nobody has read lately.
	managedPolicy = "allkeys-lru"
)

// redisOptions are for a client that asks a few questions and is closed: two connections at most, and one attempt.
// After as many failed dials as it may have connections a client goes on dialling in a goroutine that Close does not
// wait for; one that is closed after the first failure does not get there.
func redisOptions(cfg config.Redis, t *tls.Config) (*redis.Options, error) {
	opt, err := redis.ParseURL(cfg.URL)
	if err != nil {
		return nil, errors.New("redis.url cannot be parsed")
	}
	if opt.TLSConfig != nil && t != nil {
		t = t.Clone()
		t.ServerName = opt.TLSConfig.ServerName
		opt.TLSConfig = t
	}
	opt.MaxRetries, opt.DialerRetries, opt.PoolSize = -1, 1, 2
	opt.DialTimeout = cfg.DialTimeout
	opt.ReadTimeout = max(cfg.Timeout, time.Second)
	opt.WriteTimeout = opt.ReadTimeout
	opt.ContextTimeoutEnabled = true
	opt.ClientName, opt.DisableIdentity = "cacheproxy-tools", true
	opt.MaintNotificationsConfig = &maintnotifications.Config{Mode: maintnotifications.ModeDisabled}
	return opt, nil
}

// memory looks after what Redis may use: it sets redis.max_memory where redis.manage_memory says so, and otherwise says
// what differs.
type memory struct {
	cfg    config.Redis
	stores bool // a route's phase has a store, so Redis holds a journal and leases
	redis  *redis.Options
	log    *zap.Logger
	said   map[string]bool // owned by run
}

// newMemory allocates. password, if it is not nil, is asked for every connection; "" from it is that of the URL.
func newMemory(cfg *config.Config, t *tls.Config, password func() string, log *zap.Logger) (*memory, error) {
	opt, err := redisOptions(cfg.Redis, t)
	if err != nil {
		return nil, err
	}
	if password != nil {
		opt.CredentialsProvider = func() (string, string) { return opt.Username, cmp.Or(password(), opt.Password) }
	}
	return &memory{cfg: cfg.Redis, stores: cfg.UsesStore(), redis: opt, log: log, said: map[string]bool{}}, nil
}

// run looks until ctx ends.
func (m *memory) run(ctx context.Context) error {
	pause := memoryRetry
	for {
		wait := memoryEvery
		if m.look(ctx) {
			pause = memoryRetry
		} else {
			wait, pause = pause, min(2*pause, memoryRetryMax)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(wait):
		}
	}
}

// look compares Redis's settings with ours, and tells whether it could.
func (m *memory) look(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, memoryTime)
	defer cancel()
	client := redis.NewClient(m.redis)
	defer client.Close()
	info, err := client.Info(ctx, "memory").Result()
	if err != nil {
		return false
	}
	has := parseInfo(info)
	limit, _ := strconv.ParseInt(has["maxmemory"], 10, 64)
	policy := has["maxmemory_policy"]
	want := int64(m.cfg.MaxMemory)
	switch {
	case m.cfg.ManageMemory:
		return (limit == want && policy == managedPolicy) || m.set(ctx, client)
	case want != 0 && limit != want && m.first("limit"):
		m.log.Warn("redis has another memory limit than redis.max_memory; set it there, or redis.manage_memory here",
			zap.Int64("maxmemory", limit), zap.Int64("max_memory", want))
	}
	if m.stores && evictsAll(policy) && m.first("policy") {
		m.log.Warn("redis may evict the proxy's journal and leases; see `cacheproxy check` for what that costs", zap.String("maxmemory_policy", policy))
	}
	return true
}

func (m *memory) set(ctx context.Context, client *redis.Client) bool {
	err := client.ConfigSet(ctx, "maxmemory", strconv.FormatInt(int64(m.cfg.MaxMemory), 10)).Err()
	if err == nil {
		err = client.ConfigSet(ctx, "maxmemory-policy", managedPolicy).Err()
	}
	if err != nil {
		if m.first("set") {
			m.log.Warn("redis does not let its memory limit be set", zap.Error(err))
		}
		return false
	}
	m.log.Info("redis's memory limit was set", zap.Int64("maxmemory", int64(m.cfg.MaxMemory)), zap.String("maxmemory_policy", managedPolicy))
	return true
}

// first: nothing has been said of this yet.
func (m *memory) first(what string) bool {
	was := m.said[what]
	m.said[what] = true
	return !was
}

func evictsAll(policy string) bool { return strings.HasPrefix(policy, "allkeys-") }

// parseInfo reads the key:value lines of INFO.
func parseInfo(text string) map[string]string {
	m := map[string]string{}
	for line := range strings.Lines(text) {
		if k, v, ok := strings.Cut(strings.TrimSpace(line), ":"); ok {
			m[k] = v
		}
	}
	return m
}

// reason is an error of a store's driver in the words that help, without the address and the user in it.
func reason(err error) string {
	if pg, ok := errors.AsType[*pgconn.PgError](err); ok {
		return pg.Message + " (SQLSTATE " + pg.Code + ")"
	}
	if op, ok := errors.AsType[*net.OpError](err); ok && op.Err != nil {
		return op.Err.Error()
	}
	if dns, ok := errors.AsType[*net.DNSError](err); ok {
		return dns.Err
	}
	if errors.Is(err, context.DeadlineExceeded) {
		return "no answer in time"
	}
	return err.Error()
}
