package fallback

import (
	"cmp"
	"context"
	"errors"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
	"go.uber.org/zap"
)

const (
	defaultMaxReads     = 8
	defaultMaxWrites    = 4
	defaultQueryTimeout = 2 * time.Second
	defaultWindow       = time.Hour

	// housekeepers is how many of Poll, Register, Strike, Sweep and their kin run at once, on connections of
	// their own: a poll that waited behind a flood of misses would leave stale answers standing. Two, so that
	// a sweep delays no poll.
	housekeepers = 2
	// fences is one: they exclude each other in the database anyway, and a second connection would only wait.
	fences = 1

	// connectTimeout bounds one attempt for one host. Longer than a lost SYN (1 s) and its repetition would
	// outlive QueryTimeout; shorter would fail a slow TLS handshake across regions.
	connectTimeout = 2 * time.Second
	// idleInTransaction ends the transaction of a sidecar that died or hung between Begin and Commit, because
	// it holds key locks that the whole fleet waits for. A living writer needs milliseconds there; five seconds
	// leave room for a Redis that answers at the last moment of its own time limits.
	idleInTransaction = 5 * time.Second
	// maxMessage bounds what one message of the server may make us allocate. Redis holds values of up to
	// 512 MiB, so a row may be that long; more than that with some room for the other columns is not ours.
	maxMessage = 512<<20 + 1<<20
	// connLifetime renews connections, so that a fleet spreads over new standbys, poolers and DNS answers;
	// its jitter keeps the pool from being renewed all at once.
	connLifetime       = 30 * time.Minute
	connLifetimeJitter = 5 * time.Minute
	connIdle           = 5 * time.Minute
	// sweepEvery is the pause between sweeps when nothing is left to do (see Run).
	sweepEvery = 10 * time.Second
)

// Config says where the store is and what it may use. A zero field means what its comment says.
type Config struct {
	// URL is a Postgres URL or keyword string with pgx's extensions. What it says about statement_timeout,
	// lock_timeout, idle_in_transaction_session_timeout, application_name, connect_timeout,
	// target_session_attrs and default_query_exec_mode wins over what New would set. A pooler in transaction
	// mode must accept or ignore the three time limits as startup parameters, and, if it knows no prepared
	// statements, needs default_query_exec_mode=exec.
	URL string
	// Password is asked for every new connection, from any goroutine; nil, or "" from it, means that of URL.
	Password func() string
	// MaxReads is how many Loads ask Postgres at once; 0 means 8.
	MaxReads int
	// MaxWrites is how many Txs are open at once; 0 means 4.
	MaxWrites int
	// QueryTimeout bounds every call that has no shorter deadline, the wait for a slot and for a connection
	// included; 0 means 2 s. The server gives up a little earlier, which saves the connection.
	QueryTimeout time.Duration
	// Window is how long it is remembered that a key was deleted or has expired; 0 means 1 h.
	Window time.Duration
	// Columns are the routes whose values stand in columns of the application's tables; those of all others stand in
	// cacheproxy.entries.
	Columns []Column
	// Log receives what happens in Run; nil means nothing is logged.
	Log *zap.Logger
}

func (c Config) withDefaults() Config {
	if c.MaxReads <= 0 {
		c.MaxReads = defaultMaxReads
	}
	if c.MaxWrites <= 0 {
		c.MaxWrites = defaultMaxWrites
	}
	if c.QueryTimeout <= 0 {
		c.QueryTimeout = defaultQueryTimeout
	}
	if c.Window <= 0 {
		c.Window = defaultWindow
	}
	if c.Log == nil {
		c.Log = zap.NewNop()
	}
	return c
}

// Store is the store of one Postgres database: the table cacheproxy.entries, and the columns of the configuration. All methods may be called from any goroutine. Errors
// answer to Uncertain, Overloaded, Unavailable, Retryable, BadData, Rejected and ReadOnly.
type Store struct {
	// Static after New.
	cfg        Config
	pool       *pgxpool.Pool
	reads      *limiter
	writes     *limiter
	house      *limiter
	fence      *limiter
	sweepEvery time.Duration
	columns    atomic.Pointer[columns]
}

// New checks cfg and returns a store that has not connected yet: connections are made when they are needed,
// so that a sidecar starts while Postgres is down. The error never repeats the URL.
func New(cfg Config) (*Store, error) { return newStore(cfg, nil) }

// newStore is New with a look at every statement for tests; nil looks at none.
func newStore(cfg Config, tracer pgx.QueryTracer) (*Store, error) {
	cfg = cfg.withDefaults()
	cs, err := newColumns(cfg.Columns)
	if err != nil {
		return nil, err
	}
	pc, err := pgxpool.ParseConfig(cfg.URL)
	if err != nil {
		// The parser's own error quotes the URL, whose password it can mask only where it can find it.
		return nil, errors.New("fallback: the Postgres URL cannot be parsed")
	}
	pc.MaxConns = int32(cfg.MaxReads + cfg.MaxWrites + housekeepers + fences)
	pc.MinConns, pc.MinIdleConns = 0, 0
	pc.MaxConnLifetime, pc.MaxConnLifetimeJitter = connLifetime, connLifetimeJitter
	pc.MaxConnIdleTime = connIdle
	// No ping before use: it costs a round trip, and a connection that died in the pool is found by the
	// request itself, which is repeated once (see try).
	pc.ShouldPing = func(context.Context, pgxpool.ShouldPingParams) bool { return false }

	if cfg.Password != nil {
		pc.BeforeConnect = func(_ context.Context, cc *pgx.ConnConfig) error {
			cc.Password = cmp.Or(cfg.Password(), cc.Password)
			return nil
		}
	}

	cc := pc.ConnConfig
	cc.Tracer = tracer
	cc.MaxProtocolMessageBodyLen = maxMessage
	// ParseConfig puts its own default of two minutes where the URL says nothing.
	if cc.ConnectTimeout <= 0 || cc.ConnectTimeout >= 2*time.Minute {
		cc.ConnectTimeout = connectTimeout
	}
	for name, value := range map[string]string{
		"application_name": "cacheproxy",
		// The server's limits lie below the client's: a statement that it cancels leaves the connection whole,
		// one that the client gives up costs the connection. A lock waited for in vain gets a code of its own
		// (55P03), so that contention is not taken for an outage.
		"statement_timeout":                   milliseconds(cfg.QueryTimeout * 9 / 10),
		"lock_timeout":                        milliseconds(cfg.QueryTimeout * 8 / 10),
		"idle_in_transaction_session_timeout": milliseconds(idleInTransaction),
	} {
		if _, set := cc.RuntimeParams[name]; !set {
			cc.RuntimeParams[name] = value
		}
	}
	if cc.ValidateConnect == nil && severalHosts(cc) {
		// With several hosts only the primary will do: a standby's rows are older than the promise allows.
		cc.ValidateConnect = pgconn.ValidateConnectTargetSessionAttrsReadWrite
	}

	pool, err := pgxpool.NewWithConfig(context.Background(), pc)
	if err != nil {
		return nil, errors.New("fallback: the pool settings in the Postgres URL are impossible")
	}
	s := &Store{
		cfg: cfg, pool: pool, sweepEvery: sweepEvery,
		reads:  newLimiter(cfg.MaxReads),
		writes: newLimiter(cfg.MaxWrites),
		house:  newLimiter(housekeepers),
		fence:  newLimiter(fences),
	}
	s.columns.Store(cs)
	return s, nil
}

// milliseconds is d as Postgres reads it; at least 1, because 0 would switch the limit off.
func milliseconds(d time.Duration) string {
	return strconv.FormatInt(max(1, d.Milliseconds()), 10)
}

// severalHosts tells hosts from the TLS and plain attempts at one host, which are both listed as fallbacks.
func severalHosts(cc *pgx.ConnConfig) bool {
	for _, f := range cc.Fallbacks {
		if f.Host != cc.Host || f.Port != cc.Port {
			return true
		}
	}
	return false
}

// Close closes all connections. It waits for the calls under way and for every open Tx.
func (s *Store) Close() { s.pool.Close() }

// Reset drops the pooled connections: those in use when they are given back, the others at once. Call it
// after an outage and when ReadOnly is true of an error.
func (s *Store) Reset() { s.pool.Reset() }

// Ping asks Postgres for a sign of life over the connections of housekeeping.
func (s *Store) Ping(ctx context.Context) error {
	return s.do(ctx, s.house, "ping", func(ctx context.Context, c *pgx.Conn) error {
		return c.Ping(ctx)
	})
}

// Stats is what the store uses at a moment.
type Stats struct {
	Open, Idle, InUse, MaxOpen int   // connections
	Dialed                     int64 // connections made since the start
	Reads, Writes, House       LimitStats
}

// Stats asks nobody.
func (s *Store) Stats() Stats {
	p := s.pool.Stat()
	return Stats{
		Open: int(p.TotalConns()), Idle: int(p.IdleConns()), InUse: int(p.AcquiredConns()), MaxOpen: int(p.MaxConns()),
		Dialed: p.NewConnsCount(),
		Reads:  s.reads.stats(), Writes: s.writes.stats(), House: s.house.stats(),
	}
}

// within gives ctx the deadline that QueryTimeout sets; an earlier one stays.
func (s *Store) within(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(ctx, s.cfg.QueryTimeout)
}

// do runs one idempotent request under l, with a deadline and at most one repetition (see try).
func (s *Store) do(ctx context.Context, l *limiter, op string, f func(context.Context, *pgx.Conn) error) error {
	ctx, cancel := s.within(ctx)
	defer cancel()
	if err := l.acquire(ctx); err != nil {
		return wrap(op, err)
	}
	defer l.release()
	return wrap(op, s.try(ctx, func() error {
		conn, err := s.pool.Acquire(ctx)
		if err != nil {
			return err
		}
		defer conn.Release()
		return f(ctx, conn.Conn())
	}))
}

// try runs f, and once more when the first failure says nothing about Postgres as it is now: the connection
// had died in the pool, or a cached plan was outdated. After a restart of the server every pooled connection
// is dead, so all of them go, or the second attempt would meet the next corpse. A connection that could not
// be made is not tried again: that is an outage, and the breaker above wants to know.
func (s *Store) try(ctx context.Context, f func() error) error {
	err := f()
	if err == nil || ctx.Err() != nil {
		return err
	}
	if _, ok := errors.AsType[*pgconn.ConnectError](err); ok {
		return err
	}
	switch pg := pgError(err); {
	case lost(err):
		s.pool.Reset()
	case pg != nil && outdatedPlan(pg):
	default:
		return err
	}
	return f()
}

// Connections tells how many connections wait for work, and how many are at it.
func (s *Store) Connections() (idle, active int) {
	st := s.pool.Stat()
	return int(st.IdleConns()), int(st.AcquiredConns())
}

// Waited tells, for each cause of a closed list, how many requests have waited for a connection since the start and for how long
// together: because as many reads or writes were under way as the configuration allows ("max_reads", "max_writes"; also those that waited in
// vain), or because no connection was idle and one had to be made ("connect"; only where that succeeded). The pool has room for whatever
// the limits let in, so nobody waits in it for anything else.
func (s *Store) Waited(tell func(cause string, requests int64, together time.Duration)) {
	for cause, l := range map[string]*limiter{"max_reads": s.reads, "max_writes": s.writes} {
		tell(cause, l.waits.Load(), time.Duration(l.waited.Load()))
	}
	st := s.pool.Stat()
	tell("connect", st.EmptyAcquireCount(), st.EmptyAcquireWaitTime())
}
