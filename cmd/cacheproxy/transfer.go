package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"cacheproxy/fallback"
	"cacheproxy/internal/bridge"
	"cacheproxy/internal/config"
	"cacheproxy/internal/transfer"
	"cacheproxy/policy"
	"cacheproxy/proxy"

	"github.com/spf13/cobra"
	"go.uber.org/zap"
)

// What migrate and verify share: both walk over one route, beside the sidecars that serve it.

const (
	// toolTimeout is the least that a question of the tools may take: nobody waits for their answers, and their pages are larger than what clients ask.
	toolTimeout = 10 * time.Second
	// toolWorkers batches are under way at once, unless a flag says otherwise: enough to keep one store busy while the other works.
	toolWorkers = 4
	// maxWorkers bounds the flag: each has a connection to both stores.
	maxWorkers = 64
	// toolPatience is how long a store may be in trouble: longer than a failover or a restart with a large data set takes.
	toolPatience = 5 * time.Minute
)

// transferFlags are those of both.
type transferFlags struct {
	route    string
	workers  int
	patience time.Duration
}

func (f *transferFlags) register(cmd *cobra.Command) {
	cmd.Flags().StringVar(&f.route, "route", "", "the route (needed where there are several)")
	cmd.Flags().IntVar(&f.workers, "workers", toolWorkers, "batches under way at once")
	cmd.Flags().DurationVar(&f.patience, "patience", toolPatience, "how long a store may be in trouble before this gives up")
}

func (f *transferFlags) check() error {
	if f.workers < 1 || f.workers > maxWorkers {
		return &failure{exitUsage, fmt.Errorf("--workers must be from 1 to %d", maxWorkers)}
	}
	if f.patience < 0 {
		return &failure{exitUsage, errors.New("--patience must not be negative")}
	}
	return nil
}

// transferring is one route between its stores.
type transferring struct {
	cfg    *config.Config
	router *policy.Router
	route  *policy.Route
	store  config.Store
	db     *fallback.Store
	stores transfer.Stores
}

// openTransfer reads the configuration and makes what is needed for one route, if allowed has nothing against it. Nothing is connected yet.
func (c *cli) openTransfer(f *transferFlags, allowed func(*policy.Route) error) (*transferring, error) {
	if err := f.check(); err != nil {
		return nil, err
	}
	cfg, err := c.load(c.path())
	if err != nil {
		return nil, err
	}
	t := &transferring{cfg: cfg}
	routes := cfg.PolicyRoutes()
	if t.router, err = policy.NewRouter(routes); err != nil {
		return nil, &failure{exitConfig, err}
	}
	i, err := pickRoute(routes, f.route)
	if err != nil {
		return nil, &failure{exitUsage, err}
	}
	t.route, t.store = &routes[i], cfg.Routes[i].Store
	if err := allowed(t.route); err != nil {
		return nil, err
	}
	if cfg.Postgres.URL == "" {
		return nil, &failure{exitConfig, errors.New("postgres.url is not set: there is no store to compare with or to copy from")}
	}
	toRedis, err := redisTLS(cfg.Redis.TLS)
	if err != nil {
		return nil, &failure{exitConfig, err}
	}
	// The settings are for clients, who wait for each answer.
	with := *cfg
	with.Postgres.Timeout = max(cfg.Postgres.Timeout, toolTimeout)
	with.Postgres.MaxReads, with.Postgres.MaxWrites = f.workers+1, f.workers
	if t.db, err = newFallback(&with, zap.NewNop()); err != nil {
		return nil, &failure{exitConfig, err}
	}
	peer, err := proxy.NewPeer(proxy.PeerConfig{
		Redis: proxy.RedisConfig{
			URL: cfg.Redis.URL, Password: config.Password("redis.password_file", cfg.Redis.PasswordFile, zap.NewNop()),
			Timeout: max(cfg.Redis.Timeout, toolTimeout), DialTimeout: max(cfg.Redis.DialTimeout, time.Second), TLS: toRedis,
		},
		MaxValue: int(cfg.Postgres.MaxValue), Instance: newInstance(),
	}, bridge.Peer(t.db))
	if err != nil {
		t.db.Close()
		return nil, &failure{exitConfig, err}
	}
	t.stores = transfer.Stores{
		Peer: peer, Rows: t.db, Trouble: storeTrouble,
		Taken: func(err error) bool { return errors.Is(err, fallback.ErrTransferring) },
	}
	return t, nil
}

func (t *transferring) close() { t.db.Close() }

// identity names the store of the route in a checkpoint.
func (t *transferring) identity() string { return fmt.Sprintf("%+v", t.store) }

// pickRoute finds the route that is named, or the only one there is.
func pickRoute(routes []policy.Route, name string) (int, error) {
	var names []string
	for i, r := range routes {
		if r.Name == name || name == "" && len(routes) == 1 {
			return i, nil
		}
		names = append(names, r.Name)
	}
	switch {
	case len(names) == 0:
		return 0, errors.New("the configuration has no route")
	case name == "":
		return 0, fmt.Errorf("there are several routes: say which with --route (%s)", strings.Join(names, ", "))
	}
	return 0, fmt.Errorf("there is no route %s, only %s", name, strings.Join(names, ", "))
}

// storeTrouble says why Postgres did not do what it was asked, if that may pass.
func storeTrouble(err error) string {
	switch {
	case fallback.Overloaded(err):
		return "the connections to postgres are all in use"
	case fallback.Retryable(err):
		return "somebody holds a lock in postgres"
	case fallback.ReadOnly(err):
		return "postgres takes no writes"
	case fallback.Unavailable(err):
		return "no answer from postgres yet (" + reason(err) + ")"
	}
	return ""
}

// transferFailure turns the end of a transfer into an exit code.
func transferFailure(err error) error {
	if err == nil {
		return nil
	}
	if _, ok := errors.AsType[*transfer.Refusal](err); ok {
		return err
	}
	if gave, ok := errors.AsType[*transfer.Unreachable](err); ok {
		return &failure{exitUnreachable, gave}
	}
	if errors.Is(err, transfer.ErrInterrupted) {
		return &failure{exitInterrupted, err}
	}
	return err
}

// reach makes sure of the schema, for as long as f.patience allows a Postgres to be away.
func (t *transferring) reach(ctx context.Context, f *transferFlags, do func(context.Context) error) error {
	for end := time.Now().Add(f.patience); ; {
		err := do(ctx)
		if err != nil && ctx.Err() != nil {
			return transfer.ErrInterrupted
		}
		if err == nil || storeTrouble(err) == "" {
			return err
		}
		if time.Now().After(end) {
			return &transfer.Unreachable{Why: storeTrouble(err)}
		}
		select {
		case <-ctx.Done():
			return transfer.ErrInterrupted
		case <-time.After(time.Second):
		}
	}
}
