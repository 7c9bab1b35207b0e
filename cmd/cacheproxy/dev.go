package main

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"cacheproxy/internal/config"
	"cacheproxy/internal/devserver"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"
)

// The ports of the private servers, or the next free ones: beside the usual ports, which may well be in use.
const (
	devRedisPort    = 6390
	devPostgresPort = 5433
	devDatabase     = "app"
)

// devConfig is the configuration that dev writes for a newcomer to edit.
//
//go:embed dev.yaml
var devConfig []byte

func (c *cli) devCommand() *cobra.Command {
	var flags overrides
	var data string
	cmd := &cobra.Command{
		Use:   "dev",
		Short: "Run with a private Redis and Postgres that it starts itself",
		Long: "Starts a Redis and a Postgres of its own, puts a few documents into Postgres, and runs the proxy in front of both.\n" +
			"Everything is kept in one directory, and Ctrl-C stops everything. REDIS_URL and DATABASE_URL are not used.",
		Args: usage(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error { return c.dev(cmd.Context(), data, &flags) },
	}
	flags.register(cmd)
	cmd.Flags().StringVar(&data, "data", filepath.Join(".data", "dev"), "directory for the servers' data and the configuration")
	return cmd
}

func (c *cli) dev(ctx context.Context, data string, flags *overrides) (err error) {
	ctx, stop := signal.NotifyContext(ctx, syscall.SIGHUP) // the terminal was closed
	defer stop()
	c.env = slices.DeleteFunc(slices.Clone(c.env), func(v string) bool {
		return strings.HasPrefix(v, "REDIS_URL=") || strings.HasPrefix(v, "DATABASE_URL=") // they may name stores that matter
	})
	path := c.config
	if path == "" {
		if path, err = writeDevConfig(data); err != nil {
			return err
		}
	}
	options := flags.options()
	load := func() (*config.Config, error) { return c.load(path, options...) }
	cfg, err := load() // a mistake should show before servers start
	if err != nil {
		return err
	}
	ports := portFinder{}
	options = append(options, ports.moved(cfg)...)

	servers, err := startServers(ctx, data, &ports)
	defer func() { err = errors.Join(err, servers.stop()) }()
	if err != nil {
		if ctx.Err() != nil {
			return nil // stopped before it had begun
		}
		return err
	}
	options = append(options,
		config.Override("the private Redis", "redis.url", servers.redis.URL()),
		config.Override("the private Postgres", "postgres.url", servers.postgres.URL(devDatabase)))
	if cfg, err = load(); err != nil {
		return err
	}
	p, err := newProcess(cfg, source{path, load}, c.stderr)
	if err != nil {
		return err
	}
	if err := loadDemo(ctx, cfg, p.log); err != nil && ctx.Err() == nil {
		p.close()
		return fmt.Errorf("load the demonstration: %w", err)
	}
	p.serving = func(at addresses) { tour(c.stdout, at, servers, path) }
	return p.run(ctx)
}

// writeDevConfig writes the configuration into the directory, unless there is one.
func writeDevConfig(data string) (string, error) {
	if err := os.MkdirAll(data, 0o755); err != nil {
		return "", fmt.Errorf("make the data directory: %w", err)
	}
	path := filepath.Join(data, config.DefaultPath)
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if errors.Is(err, fs.ErrExist) {
		return path, nil
	}
	if err == nil {
		_, err = f.Write(devConfig)
		err = errors.Join(err, f.Close())
	}
	if err != nil {
		return "", fmt.Errorf("write the configuration: %w", err)
	}
	return path, nil
}

// servers are the private Redis and Postgres; nil is one that did not start.
type servers struct {
	redis    *devserver.Redis
	postgres *devserver.Postgres
}

// startServers starts both at once. After an error the caller stops what did start.
func startServers(ctx context.Context, data string, ports *portFinder) (*servers, error) {
	var s servers
	redisPort, err := ports.next(devRedisPort)
	if err != nil {
		return &s, err
	}
	postgresPort, err := ports.next(devPostgresPort)
	if err != nil {
		return &s, err
	}
	var g errgroup.Group
	g.Go(func() (err error) {
		// A file of its own, because from phase2 on Redis holds the only copy of what was written.
		s.redis, err = devserver.StartRedis(ctx, devserver.RedisOptions{Dir: data, Port: redisPort, Args: []string{"--appendonly", "yes"}})
		return err
	})
	g.Go(func() (err error) {
		s.postgres, err = devserver.StartPostgres(ctx, devserver.PostgresOptions{Dir: data, Port: postgresPort, Durable: true})
		if err != nil {
			return err
		}
		return s.postgres.CreateDatabase(ctx, devDatabase)
	})
	return &s, g.Wait()
}

func (s *servers) stop() error {
	var err error
	if s.redis != nil {
		err = s.redis.Stop()
	}
	if s.postgres != nil {
		err = errors.Join(err, s.postgres.Stop())
	}
	return err
}

// portFinder finds free ports of 127.0.0.1 and gives none out twice.
type portFinder map[int]bool

// next returns the first free port from one on.
func (f portFinder) next(port int) (int, error) {
	const tries = 100
	for p := port; p < port+tries; p++ {
		if f[p] {
			continue
		}
		ln, err := net.Listen("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(p)))
		if err != nil {
			continue
		}
		if err := ln.Close(); err != nil {
			return 0, err
		}
		f[p] = true
		return p, nil
	}
	return 0, fmt.Errorf("no port from %d to %d is free", port, port+tries-1)
}

// moved gives those addresses of cfg that nobody has chosen a free port. One that somebody has chosen stays, and is an
// error if it is taken.
func (f portFinder) moved(cfg *config.Config) []config.Option {
	var out []config.Option
	usual := config.Defaults()
	for _, a := range []struct{ key, now, usual string }{
		{"listen.address", cfg.Listen.Address, usual.Listen.Address},
		{"observe.address", cfg.Observe.Address, usual.Observe.Address},
		{"admin.address", cfg.Admin.Address, usual.Admin.Address},
	} {
		if a.now != a.usual {
			continue
		}
		host, text, _ := net.SplitHostPort(a.usual)
		port, _ := strconv.Atoi(text)
		if free, err := f.next(port); err == nil && free != port {
			out = append(out, config.Override("a free port", a.key, net.JoinHostPort(host, strconv.Itoa(free))))
		}
	}
	return out
}

// tour prints where everything is and what to type next.
func tour(w io.Writer, at addresses, s *servers, path string) {
	cli := "redis-cli -s " + at.clients
	if _, port, err := net.SplitHostPort(at.clients); err == nil {
		cli = "redis-cli -p " + port
	}
	_, redisPort, _ := net.SplitHostPort(s.redis.Addr())
	psql := "psql -P pager=off '" + s.postgres.URL(devDatabase) + "'"
	self := "cacheproxy"
	if _, err := exec.LookPath(self); err != nil && len(os.Args) > 0 {
		self = os.Args[0]
	}
	pid := strconv.Itoa(s.redis.PID())

	var b strings.Builder
	b.WriteString("\ncacheproxy is ready. Ctrl-C stops it and both servers; what they hold stays.\n\n")
	for _, line := range [][2]string{
		{"clients", cli},
		{"redis", "redis-cli -p " + redisPort + "  (process " + pid + ")"},
		{"postgres", psql},
		{"health", "http://" + at.observe + "/healthz"},
		{"stats", "http://" + at.observe + "/cache/stats"},
		{"metrics", "http://" + at.observe + "/metrics"},
		{"settings", path + "  (read again when you save it)"},
	} {
		fmt.Fprintf(&b, "  %-9s %s\n", line[0], line[1])
	}
	b.WriteString("\nTry:\n")
	for _, step := range [][2]string{
		{"A document that only Postgres has: it is answered, and promoted into Redis.", cli + " GET user:1"},
		{"Both copies of it now, and who would answer.", cli + " CACHEPROXY EXPLAIN user:1"},
		{"The route user is in phase1: a write goes to both.", cli + ` SET user:4 '{"name": "Dana"}' EX 3600`},
		{"", psql + ` -c 'SELECT key, value, expires_at FROM cacheproxy.entries ORDER BY key'`},
		{"The route report is in phase2: a write goes to Redis, and the row goes.", cli + ` SET report:2026-01 '{"total": 1}'`},
		{"Redis hangs: Postgres answers. Let it run on afterwards.", "kill -STOP " + pid + "; " + cli + " GET user:1; kill -CONT " + pid},
		{"One step on, and back.", cli + " CACHEPROXY PHASE user phase2; " + cli + " CACHEPROXY PHASE user phase1"},
		{"What was counted.", self + " stats --observe " + at.observe},
	} {
		if step[0] != "" {
			b.WriteString("  # " + step[0] + "\n")
		}
		b.WriteString("  " + step[1] + "\n")
	}
	_, _ = io.WriteString(w, b.String()) // without a reader the proxy runs all the same
}
