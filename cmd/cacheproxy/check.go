package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"cacheproxy/fallback"
	"cacheproxy/internal/config"
	"cacheproxy/policy"

	"github.com/jackc/pgx/v5"
	"github.com/redis/go-redis/v9"
	"github.com/spf13/cobra"
	"go.uber.org/zap"
)

// checkTime bounds what is asked of one store. Creating the schema takes the longest, and is quick on an empty database.
const checkTime = 15 * time.Second

func (c *cli) checkCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "check",
		Short: "Validate the configuration, reach both stores, check schema and rights",
		Long: "Prints one line per finding. A missing schema is created where rights allow.\n" +
			"Exits with 78 if the configuration has mistakes, 3 if a store is unreachable, 1 if something else fails, else 0.",
		Args: usage(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error { return c.check(cmd.Context()) },
	}
}

func (c *cli) check(ctx context.Context) error {
	path := c.path()
	cfg, err := c.load(path)
	if err != nil {
		return err
	}
	toRedis, err := redisTLS(cfg.Redis.TLS)
	if err == nil && cfg.Listen.TLS.Enabled() {
		_, err = newCertificates(cfg.Listen.TLS)
	}
	if err != nil {
		return &failure{exitConfig, err}
	}
	r := &report{w: c.stdout}
	if path == "" {
		r.ok("config", "no file; defaults and environment")
	} else {
		r.ok("config", "%s", path)
	}
	for _, route := range cfg.Routes {
		r.ok("config", "route %s: %s in %s", route.Name, route.Match, route.Phase)
	}
	opt, err := redisOptions(cfg.Redis, toRedis)
	if err != nil {
		return &failure{exitConfig, err}
	}
	client := redis.NewClient(opt)
	defer client.Close()
	r.redis(ctx, client, cfg)
	if cfg.UsesStore() {
		r.postgres(ctx, cfg)
	} else {
		r.ok("postgres", "not used: no route is in a phase that has a store")
	}
	if ctx.Err() != nil {
		return errors.New("the check was interrupted")
	}
	if r.code != exitFine {
		return &failure{code: r.code} // the findings have been printed
	}
	return nil
}

// report prints findings and remembers the worst.
type report struct {
	w    io.Writer
	code int
}

func (r *report) line(word, about, format string, args ...any) {
	fmt.Fprintf(r.w, "%-4s  %-8s  %s\n", word, about, fmt.Sprintf(format, args...))
}

func (r *report) ok(about, format string, args ...any)   { r.line("ok", about, format, args...) }
func (r *report) warn(about, format string, args ...any) { r.line("warn", about, format, args...) }

func (r *report) fail(about, format string, args ...any) {
	r.line("fail", about, format, args...)
	r.code = max(r.code, exitNot)
}

// unreachable outweighs what else fails: without the store the rest is guesswork.
func (r *report) unreachable(about string, err error) {
	r.line("fail", about, "cannot be used: %s", reason(err))
	r.code = exitUnreachable
}

func (r *report) redis(ctx context.Context, client *redis.Client, cfg *config.Config) {
	ctx, cancel := context.WithTimeout(ctx, checkTime)
	defer cancel()
	text, err := client.Do(ctx, "INFO", "everything").Text()
	switch {
	case denied(err):
		r.fail("redis", "the right for INFO is missing: the proxy cannot tell a restart or a failover and does not trust this Redis (P3, P4)")
	case err != nil:
		r.unreachable("redis", err)
		return
	default:
		r.redisInfo(parseInfo(text), cfg)
	}
	r.redisRights(ctx, client, cfg)
}

// redisInfo judges what INFO tells.
func (r *report) redisInfo(info map[string]string, cfg *config.Config) {
	r.ok("redis", "reached: version %s", info["redis_version"])
	if major, _, _ := strings.Cut(info["redis_version"], "."); number(major) < 6 {
		r.fail("redis", "version %s is too old: the proxy speaks HELLO, which came with 6.0", info["redis_version"])
	}
	if info["role"] == "master" {
		r.ok("redis", "role: primary")
	} else {
		r.fail("redis", "role: %s; it takes no writes, and redis.url must name the primary", info["role"])
	}
	if info["loading"] == "1" {
		r.warn("redis", "it is loading its data set; until then the store answers")
	}
	limit, evicts := number(info["maxmemory"]), info["maxmemory_policy"]
	switch want := int64(cfg.Redis.MaxMemory); {
	case want != 0 && (limit != want || cfg.Redis.ManageMemory && evicts != managedPolicy):
		if cfg.Redis.ManageMemory {
			r.ok("redis", "memory: %s with %s now; serve sets %s with %s", memoryLimit(limit), evicts, cfg.Redis.MaxMemory, managedPolicy)
			evicts = managedPolicy
		} else {
			r.warn("redis", "memory: %s with %s, but redis.max_memory is %s; set it there, or redis.manage_memory here", memoryLimit(limit), evicts, cfg.Redis.MaxMemory)
		}
	default:
		r.ok("redis", "memory: %s with %s", memoryLimit(limit), evicts)
	}
	if cfg.UsesStore() && evictsAll(evicts) {
		r.warn("redis", "%s can evict the proxy's journal and leases; each sidecar remembers its own, and what a crash of one costs meanwhile is P3 (b)", evicts)
	}
	if evicts == "noeviction" && limit > 0 {
		r.warn("redis", "noeviction: once the limit is reached, writes fail instead of old keys going")
	}
	if name := redisPrimary(cfg); name != "" && info["aof_enabled"] == "0" {
		r.warn("redis", "it keeps no append-only file, and the route %s holds values that only Redis has: what it forgets in a crash is gone (P3 c)", name)
	}
}

// redisPrimary names a route whose acknowledged writes are in Redis alone, "" if there is none.
func redisPrimary(cfg *config.Config) string {
	for _, route := range cfg.PolicyRoutes() {
		switch route.Phase.Rules().Write {
		case policy.WriteRedisDropRow, policy.WriteRedisOnly:
			return route.Name
		}
	}
	return ""
}

func memoryLimit(n int64) string {
	if n == 0 {
		return "no limit"
	}
	return config.Size(n).String()
}

func number(text string) int64 {
	n, _ := strconv.ParseInt(text, 10, 64)
	return n
}

// rights are commands that managed services and ACLs forbid, asked in a way that changes nothing, and what goes missing
// with them.
var rights = []struct {
	name string
	ask  []any
	cost string
	// needed tells whether anything is lost; nil is always.
	needed func(*config.Config) bool
	// vital: without it the routes are not served from Redis at all.
	vital bool
}{
	{name: "EVAL", ask: []any{"EVAL", "return 1", 0}, vital: true, needed: (*config.Config).UsesStore,
		cost: "promotions, leases and repairs are scripts: routed keys are not served from this Redis (P3, P7)"},
	{name: "SCRIPT", ask: []any{"SCRIPT", "EXISTS", strings.Repeat("0", 40)}, vital: true, needed: (*config.Config).UsesStore,
		cost: "scripts cannot be loaded: routed keys are not served from this Redis (P3, P7)"},
	{name: "keys cacheproxy:*", ask: []any{"EXISTS", "cacheproxy:clock"}, vital: true, needed: (*config.Config).UsesStore,
		cost: "journal, leases and clock cannot be kept there (P3, P4)"},
	{name: "CLIENT KILL", ask: []any{"CLIENT", "KILL", "ID", "9223372036854775807"},
		cost: "a write that timed out in a paused Redis may still run after a newer one (P3)"},
	{name: "CONFIG SET", ask: []any{"CONFIG", "SET", "cacheproxy-probe", "1"}, needed: func(c *config.Config) bool { return c.Redis.ManageMemory },
		cost: "redis.manage_memory has no effect"},
}

func (r *report) redisRights(ctx context.Context, client *redis.Client, cfg *config.Config) {
	missing := false
	for _, right := range rights {
		if right.needed != nil && !right.needed(cfg) {
			continue
		}
		err := client.Do(ctx, right.ask...).Err()
		if !denied(err) {
			continue // done, or refused for what was asked and not for who asks
		}
		missing = true
		if right.vital {
			r.fail("redis", "the right for %s is missing: %s", right.name, right.cost)
		} else {
			r.warn("redis", "the right for %s is missing: %s", right.name, right.cost)
		}
	}
	if !missing {
		r.ok("redis", "rights: all that are used")
	}
}

// denied tells a command that is forbidden, or that the service has renamed away.
func denied(err error) bool {
	var reply redis.Error
	if !errors.As(err, &reply) {
		return false
	}
	text := reply.Error()
	return strings.HasPrefix(text, "NOPERM") || strings.Contains(text, "unknown command") || strings.Contains(text, "unknown subcommand")
}

func (r *report) postgres(ctx context.Context, cfg *config.Config) {
	ctx, cancel := context.WithTimeout(ctx, checkTime)
	defer cancel()
	var version, encoding string
	var standby, before bool
	conn, err := pgx.Connect(ctx, cfg.Postgres.URL)
	if err == nil {
		defer conn.Close(context.WithoutCancel(ctx)) //nolint:errcheck // nothing is lost with it
		err = conn.QueryRow(ctx, `SELECT current_setting('server_version'), current_setting('server_encoding'), pg_is_in_recovery(),
			EXISTS (SELECT FROM pg_catalog.pg_namespace WHERE nspname = 'cacheproxy')`).Scan(&version, &encoding, &standby, &before)
	}
	if err != nil {
		r.unreachable("postgres", err)
		return
	}
	r.ok("postgres", "reached: version %s", version)
	if standby {
		r.fail("postgres", "role: standby; it takes no writes, and postgres.url must name the primary")
		return
	}
	r.ok("postgres", "role: primary")
	if encoding != "UTF8" {
		r.fail("postgres", "encoding: %s; keys are UTF-8, so the database must have the encoding UTF8", encoding)
		return
	}
	r.ok("postgres", "encoding: %s", encoding)
	s, err := newFallback(cfg, zap.NewNop())
	if err != nil {
		r.unreachable("postgres", err)
		return
	}
	defer s.Close()
	err = s.EnsureSchema(ctx)
	switch lacking, ok := errors.AsType[*fallback.SchemaError](err); {
	case ok:
		r.fail("postgres", "the schema cacheproxy cannot be used with the rights of this role; let %s run: %s", lacking.Who, lacking.Statement)
	case err != nil:
		r.fail("postgres", "the schema cannot be checked: %s", reason(err))
	case before:
		r.ok("postgres", "schema cacheproxy: present, and this role may use it")
	default:
		r.ok("postgres", "schema cacheproxy: created")
	}
	if err == nil {
		r.columns(ctx, s, cfg)
	}
}

// columns judges the columns that belong to the application.
func (r *report) columns(ctx context.Context, s *fallback.Store, cfg *config.Config) {
	reports, err := s.CheckColumns(ctx)
	if err != nil {
		r.fail("postgres", "the columns cannot be checked: %s", reason(err))
		return
	}
	stores := map[string]config.Store{}
	for _, c := range cfg.ColumnRoutes() {
		stores[c.Route] = c.Store
	}
	for _, c := range columns(cfg, cfg.PolicyRoutes()) {
		if c.Unused {
			r.ok("postgres", "route %s: its column is not used in its phase", c.Route)
		}
	}
	for _, c := range reports {
		usable := true
		for _, f := range c.Findings {
			say := r.warn
			if !f.Warning {
				say, usable = r.fail, false
			}
			say("postgres", "route %s: %s; %s", c.Route, f.Problem, f.Remedy)
		}
		if !usable {
			continue
		}
		r.ok("postgres", "route %s: column %s of %s", c.Route, stores[c.Route].ValueColumn, stores[c.Route].Table)
		install := "cacheproxy schema --route " + c.Route + " | psql"
		switch c.Trigger {
		case fallback.TriggerInstalled:
			r.ok("postgres", "route %s: changes that others make are recorded", c.Route)
		case fallback.TriggerOutdated:
			r.warn("postgres", "route %s: what records the changes that others make is outdated or incomplete; run: %s", c.Route, install)
		default:
			r.warn("postgres", "route %s: changes that others make are not recorded, and Redis is not told of them; run: %s", c.Route, install)
		}
	}
}
