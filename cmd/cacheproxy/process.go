package main

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/base32"
	"errors"
	"io"
	"net"
	"os"
	"reflect"
	"strings"
	"sync"
	"time"

	"cacheproxy/fallback"
	"cacheproxy/internal/admin"
	"cacheproxy/internal/config"
	"cacheproxy/internal/metrics"
	"cacheproxy/policy"
	"cacheproxy/proxy"

	"go.uber.org/zap"
	"go.yaml.in/yaml/v3"
)

// process is a running proxy with all that belongs to it.
type process struct {
	// Static after construction.
	instance string
	settings *settings
	log      *zap.Logger
	server   *proxy.Server
	store    *store        // nil if none is configured
	certs    *certificates // nil without TLS
	memory   *memory
	// serving is called, if it is not nil, when clients are accepted and whatever can be reached has been.
	serving func(addresses)

	// hangup, if it is not nil, asks for a reload.
	hangup <-chan os.Signal
	// changed has room for one notice that the configuration file has changed.
	changed chan struct{}
}

// newProcess allocates what cfg asks for; nothing is touched before run.
func newProcess(cfg *config.Config, from source, stderr io.Writer) (*process, error) {
	log, level := newLogger(cfg.Log, stderr)
	p := &process{
		instance: newInstance(),
		log:      log,
		changed:  make(chan struct{}, 1),
	}
	p.settings = newSettings(cfg, from, level)
	bad := func(err error) (*process, error) { return nil, &failure{exitConfig, err} }
	var err error
	if cfg.Listen.TLS.Enabled() {
		if p.certs, err = newCertificates(cfg.Listen.TLS); err != nil {
			return bad(err)
		}
	}
	toRedis, err := redisTLS(cfg.Redis.TLS)
	if err != nil {
		return bad(err)
	}
	password := config.Password("redis.password_file", cfg.Redis.PasswordFile, log)
	if p.memory, err = newMemory(cfg, toRedis, password, log); err != nil {
		return bad(err)
	}
	var side proxy.Store
	// Also in phase3 the store is told, behind, that it misses writes: a later phase2 must know.
	if cfg.Postgres.URL != "" {
		s, err := newFallback(cfg, log)
		if err != nil {
			return bad(err)
		}
		p.store = newStore(s)
		side = p.store
	}
	settings := proxy.ServerConfig{
		Config: proxy.Config{
			Redis: proxy.RedisConfig{
				URL: cfg.Redis.URL, Password: password, Timeout: cfg.Redis.Timeout, DialTimeout: cfg.Redis.DialTimeout,
				Connections: cfg.Redis.Connections, TLS: toRedis,
			},
			Routes:       cfg.PolicyRoutes(),
			Poll:         cfg.Journal.Poll,
			Probe:        cfg.Breaker.Probe,
			ProbeMax:     cfg.Breaker.ProbeMax,
			StoreTimeout: cfg.Postgres.Timeout,
			MaxValue:     int(cfg.Postgres.MaxValue),
			Window:       cfg.Redis.FailoverWindow,
			Sample:       float64(cfg.Verify.Sample),
			Instance:     p.instance,
			Log:          log,
		},
		Password:         cfg.Listen.Password,
		MaxClients:       cfg.Listen.MaxClients,
		Grace:            max(cfg.Listen.ShutdownGrace, time.Nanosecond), // zero would mean the default there
		MaxQuery:         int(cfg.Limits.MaxQueryBuffer),
		MaxInflight:      cfg.Limits.MaxInflightPerClient,
		MaxInflightBytes: int(cfg.Limits.MaxInflightBytesPerClient),
		Deny:             cfg.Commands.Deny,
		Text:             p.text,
		Phases:           p.configuredPhases,
		Version:          versionText(),
	}
	if from.path != "" {
		settings.Reload = p.reload
	}
	if p.server, err = proxy.New(settings, side); err != nil {
		p.close()
		return bad(err)
	}
	return p, nil
}

func newFallback(cfg *config.Config, log *zap.Logger) (*fallback.Store, error) {
	return fallback.New(fallback.Config{
		URL: cfg.Postgres.URL, Password: config.Password("postgres.password_file", cfg.Postgres.PasswordFile, log),
		MaxReads: cfg.Postgres.MaxReads, MaxWrites: cfg.Postgres.MaxWrites, QueryTimeout: cfg.Postgres.Timeout,
		Window: cfg.Redis.FailoverWindow, Log: log, Columns: columns(cfg, cfg.PolicyRoutes()),
	})
}

// columns are the routes whose store is a column of the application's. served says in which phases.
func columns(cfg *config.Config, served []policy.Route) []fallback.Column {
	unused := map[string]bool{}
	for _, r := range served {
		unused[r.Name] = !r.Phase.Rules().UsesStore
	}
	var out []fallback.Column
	for _, r := range cfg.ColumnRoutes() {
		out = append(out, fallback.Column{
			Unused: unused[r.Route], Route: r.Route, Table: r.Store.Table, Keys: r.Keys, Value: r.Store.ValueColumn,
			Expires: r.Store.ExpiresColumn, Updated: r.Store.UpdatedColumn, Template: r.Template,
		})
	}
	return out
}

// newInstance names this process among all sidecars of a fleet.
func newInstance() string {
	var b [5]byte
	_, _ = rand.Read(b[:]) // never fails
	return strings.ToLower(base32.StdEncoding.EncodeToString(b[:]))
}

// close gives back what newProcess has made.
func (p *process) close() {
	if p.store != nil {
		p.store.db.Close()
	}
}

// run serves until ctx ends and the clients are drained. Everything it started has stopped when it returns.
func (p *process) run(ctx context.Context) error {
	defer p.log.Sync() //nolint:errcheck // what was counted is told; standard error cannot always be synced
	defer p.close()
	ls, err := listenAll(p.settings.current())
	if err != nil {
		return err
	}
	// Clients are accepted until ctx ends, or something behind the proxy fails; then that is what run returns.
	accepting, end := context.WithCancelCause(context.WithoutCancel(ctx))
	defer end(nil)
	// What stands behind the proxy outlives it: /readyz says "draining" until the last client has left.
	background, stop := context.WithCancel(context.WithoutCancel(ctx))
	var work sync.WaitGroup
	defer func() {
		stop()
		work.Wait()
	}()
	start := func(f func(context.Context) error) {
		work.Go(func() {
			if err := f(background); err != nil {
				end(err)
			}
		})
	}
	start(func(background context.Context) error {
		select {
		case <-ctx.Done():
			p.log.Info("draining", zap.Int("clients", p.server.Clients()))
			end(nil)
		case <-background.Done():
		}
		return nil
	})
	p.startHTTP(ls, start)
	start(p.watch)
	start(p.reloads)
	start(p.memory.run)
	if p.store != nil {
		err := p.firstSchema(accepting)
		start(func(ctx context.Context) error { return p.keepStore(ctx, err) })
	}
	ready := make(chan struct{})
	start(func(ctx context.Context) error {
		defer close(ready)
		p.until(ctx, firstContact, func(h proxy.Health) bool { return settled(h.Redis) && settled(h.Postgres) })
		return nil
	})
	p.announce(ls.addresses(), start)

	clients := net.Listener(newPatient(ls.clients, ready))
	if p.certs != nil {
		clients = p.certs.wrap(clients)
	}
	if err := p.server.Serve(accepting, clients); err != nil {
		return err
	}
	if ctx.Err() == nil {
		return context.Cause(accepting) // nobody asked us to stop
	}
	p.log.Info("stopped")
	return nil
}

// metrics is what is told of the program besides what its server counts.
func (p *process) metrics() metrics.Process {
	out := metrics.Process{Build: build(), Reloads: p.settings.reloaded}
	if p.store != nil {
		out.Pool, out.Waited = p.store.db.Connections, p.store.db.Waited
	}
	return out
}

// startHTTP serves the observe and the admin address, which lives as long as the process.
func (p *process) startHTTP(ls *listeners, start func(func(context.Context) error)) {
	start(func(ctx context.Context) error {
		return admin.Serve(ctx, ls.observe, admin.Observe(admission{p}, metrics.Handler(p.server, p.metrics())), p.log)
	})
	if ls.admin != nil {
		start(func(ctx context.Context) error {
			return admin.Serve(ctx, ls.admin, admin.Control(admission{p}), p.log)
		})
	}
}

// announce logs what runs here, and calls p.serving when the stores have been reached.
func (p *process) announce(at addresses, start func(func(context.Context) error)) {
	p.log.Info("serving", zap.String("version", versionText()), zap.String("instance", p.instance),
		zap.String("config", cmp.Or(p.settings.from.path, "none")), zap.Int("routes", len(p.settings.current().Routes)),
		zap.String("listen", at.clients), zap.Bool("tls", p.certs != nil), zap.String("observe", at.observe), zap.String("admin", at.admin))
	if p.serving == nil {
		return
	}
	start(func(ctx context.Context) error {
		p.until(ctx, announceTime, func(h proxy.Health) bool {
			return h.Serving && h.Redis.Status == admin.Connected && h.Postgres.Status != admin.Down
		})
		if ctx.Err() == nil {
			p.serving(at)
		}
		return nil
	})
}

const (
	// firstContact is how long the first client waits for the stores to be tried. Both take some ten milliseconds; a
	// client that is let in before gets refusals and misses although nothing is wrong. One that hangs is not waited for.
	firstContact = 500 * time.Millisecond
	// announceTime is how long p.serving waits for both: about as long as people do.
	announceTime = 10 * time.Second
	healthEvery  = 2 * time.Millisecond
)

// settled tells that a store has been reached, or that it is known why not.
func settled(h proxy.StoreHealth) bool {
	return h.Status == admin.Connected || h.Status == admin.Unused || h.Status == admin.Down && h.Reason != ""
}

// until waits for a state of health, at most for d.
func (p *process) until(ctx context.Context, d time.Duration, reached func(proxy.Health) bool) {
	ctx, cancel := context.WithTimeout(ctx, d)
	defer cancel()
	tick := time.NewTicker(healthEvery)
	defer tick.Stop()
	for !reached(p.server.Health()) {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// watch notices when the configuration file changes.
func (p *process) watch(ctx context.Context) error {
	if p.settings.from.path == "" {
		return nil
	}
	err := config.Watch(ctx, p.settings.from.path, p.log, func() {
		select {
		case p.changed <- struct{}{}:
		default: // a reload is due anyway
		}
	})
	if err != nil {
		p.log.Warn("the configuration file is not watched; SIGHUP reloads it", zap.Error(err))
	}
	return nil
}

// reloadRetry is how soon a reload that failed is tried again if it may succeed then.
const reloadRetry = 10 * time.Second

// reloads reloads the configuration on SIGHUP and when its file has changed. Nobody waits for the outcome, so what
// failed although the file is right is tried again: a new phase, for instance, has to be registered in Postgres.
func (p *process) reloads(ctx context.Context) error {
	var again <-chan time.Time
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-p.hangup:
		case <-p.changed:
		case <-again:
		}
		again = nil
		err := p.reload() // it logs its error
		if _, bad := errors.AsType[*config.Error](err); err != nil && !bad && !errors.Is(err, errNoFile) {
			again = time.After(reloadRetry)
		}
	}
}

// errNoFile refuses a reload.
var errNoFile = errors.New("the process was started without a configuration file: there is nothing to reload")

// reload reads the configuration again and takes over what a running process can. After an error everything stays as
// it was.
func (p *process) reload() error {
	p.settings.mu.Lock()
	defer p.settings.mu.Unlock()
	err := p.settings.reload(func(next *config.Config) error {
		if p.certs != nil {
			if err := p.certs.read(); err != nil {
				return err
			}
		}
		undo, err := p.setColumns(next)
		if err != nil {
			return err
		}
		if err := p.server.SetRoutes(keepPhases(next.PolicyRoutes(), p.settings.current().PolicyRoutes(), p.server.Phases())); err != nil {
			undo()
			return err
		}
		if file := next.Listen.PasswordFile; file != "" && file == p.settings.current().Listen.PasswordFile {
			p.server.SetPassword(next.Listen.Password)
		}
		p.server.SetSample(float64(next.Verify.Sample))
		return p.server.SetDeny(next.Commands.Deny) // the last, as it cannot fail: next was checked
	})
	if err != nil {
		if refused, ok := errors.AsType[*config.Error](err); ok {
			p.log.Error("the configuration was refused, the old one stays", zap.String("problems", refused.Error()))
		} else {
			p.log.Error("the configuration was not reloaded, the old one stays", zap.Error(err))
		}
		return err
	}
	p.log.Info("the configuration was reloaded", zap.Int("routes", len(p.settings.current().Routes)))
	if keys := p.settings.restart(); keys != nil {
		p.log.Warn("changed settings take effect at the next start", zap.Strings("settings", keys))
	}
	return nil
}

// columnsTime bounds the look into the catalogue that a reload waits for.
const columnsTime = 5 * time.Second

// setColumns gives the store the columns of next, before a route can name one. Columns that cannot be used are refused.
func (p *process) setColumns(next *config.Config) (undo func(), err error) {
	if p.store == nil {
		return func() {}, nil
	}
	old := p.settings.current()
	served := func(cfg *config.Config) []policy.Route {
		return keepPhases(cfg.PolicyRoutes(), old.PolicyRoutes(), p.server.Phases())
	}
	now, then := columns(old, served(old)), columns(next, served(next))
	if reflect.DeepEqual(now, then) {
		return func() {}, nil
	}
	undo = func() { _ = p.store.db.SetColumns(now) } // they were accepted before
	if err := p.store.db.SetColumns(then); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), columnsTime)
	defer cancel()
	if err := p.store.db.UseColumns(ctx); err != nil {
		undo()
		return nil, err
	}
	return undo, nil
}

// keepPhases gives the routes of a file that was read again the phases in which they are served, unless the file names another phase than
// it did before: a step that was made in this process is not undone because something else has changed in the file.
func keepPhases(next, last []policy.Route, served map[string]policy.Phase) []policy.Route {
	named := map[string]policy.Phase{}
	for _, r := range last {
		named[r.Name] = r.Phase
	}
	for i, r := range next {
		before, known := named[r.Name]
		if now, is := served[r.Name]; known && is && before == r.Phase {
			next[i].Phase = now
		}
	}
	return next
}

// configuredPhases are the phases that the file names, by route.
func (p *process) configuredPhases() map[string]string {
	out := map[string]string{}
	for _, r := range p.settings.current().Routes {
		out[r.Name] = r.Phase
	}
	return out
}

// text is the configuration in force, without its secrets.
func (p *process) text() string {
	b, err := yaml.Marshal(p.settings.current().Redacted())
	if err != nil {
		return "the configuration cannot be printed"
	}
	return string(b)
}

const (
	// schemaFirst is how long the start waits for the schema. A check of one that exists takes milliseconds; an
	// application should not wait much longer for its cache than this.
	schemaFirst = 500 * time.Millisecond
	// Between further attempts: soon at first, for a Postgres that starts beside us, and never so often that a fleet in
	// an outage is felt.
	schemaRetry    = time.Second
	schemaRetryMax = 10 * time.Second
)

// firstSchema creates the schema if it is missing, before clients come, if Postgres answers at once.
func (p *process) firstSchema(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, schemaFirst)
	defer cancel()
	return p.prepareStore(ctx)
}

// prepareStore makes the schema, and looks up the columns that belong to others.
func (p *process) prepareStore(ctx context.Context) error {
	if err := p.store.db.EnsureSchema(ctx); err != nil {
		return err
	}
	return p.store.db.UseColumns(ctx)
}

// keepStore goes on until there is a schema, then keeps it clean until ctx ends. err is how the first attempt ended.
func (p *process) keepStore(ctx context.Context, err error) error {
	if err == nil {
		return p.store.db.Run(ctx)
	}
	said := ""
	for pause := schemaRetry; err != nil; pause = min(2*pause, schemaRetryMax) {
		if ctx.Err() != nil || errors.Is(err, context.Canceled) {
			return nil // stopped, which says nothing about the schema
		}
		say := err.Error()
		if fallback.Unavailable(err) {
			say = "unavailable" // however it fails to be reached, it is one outage
		} else {
			pause = schemaRetryMax // only a person can help
		}
		if said != say {
			said = say
			p.reportSchema(err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(pause):
		}
		err = p.prepareStore(ctx)
	}
	p.log.Info("the schema is ready")
	return p.store.db.Run(ctx)
}

// reportSchema says what keeps the schema from being used, and what a person can do.
func (p *process) reportSchema(err error) {
	if lacking, ok := errors.AsType[*fallback.SchemaError](err); ok {
		p.log.Error("postgres lacks the schema, and this role may not make it; waiting until somebody has",
			zap.String("run_once", lacking.Statement), zap.String("as", lacking.Who))
		return
	}
	if bad, ok := errors.AsType[*fallback.ColumnError](err); ok {
		for _, r := range bad.Reports {
			for _, f := range r.Findings {
				if !f.Warning {
					p.log.Error("the column of a route cannot be used; waiting until somebody has mended it",
						zap.String("route", r.Route), zap.String("problem", f.Problem), zap.String("remedy", f.Remedy))
				}
			}
		}
		return
	}
	if fallback.Unavailable(err) {
		p.log.Warn("postgres cannot be reached; the schema is checked as soon as it can", zap.Error(err))
		return
	}
	p.log.Error("the schema cannot be checked; trying again", zap.Error(err))
}
