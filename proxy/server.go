package proxy

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"cacheproxy/internal/said"
	"cacheproxy/policy"

	"github.com/tidwall/redcon"
	"go.uber.org/zap"
)

// RedisConfig says how to reach Redis.
type RedisConfig struct {
	URL         string        // redis://, rediss:// or unix://
	Password    func() string // asked for every new connection, from any goroutine; nil, or "" from it: that of URL
	Timeout     time.Duration // the one bounded wait of P8; 0: 250 ms
	DialTimeout time.Duration // 0: 1 s
	Connections int           // shared ones per protocol version, and event loops; 0: one for every two processors, at most three
	TLS         *tls.Config   // refines rediss://; nil: the system's roots
}

// ServerConfig says how clients are served; zero fields mean what their comment says.
type ServerConfig struct {
	Config
	Password         string        // asked of clients; "": none
	Goroutines       bool          // drive every client, where an event loop could
	MaxClients       int           // 0: no limit
	Grace            time.Duration // how long a stop waits for answers; 0: 10 s
	MaxQuery         int           // bytes of one command; 0: 1 GiB
	MaxInflight      int           // commands of one client in flight; 0: 1024
	MaxInflightBytes int           // and the bytes of it, unfetched replies included; 0: 64 MiB
	Deny             []string      // the entries of commands.deny; none: nothing is denied
	// Text answers "CACHEPROXY CONFIG": the effective configuration without secrets. nil: nothing to show.
	Text func() string
	// Reload reads the configuration again, for "CACHEPROXY RELOAD" and before a step of a phase. It calls SetRoutes at most, and logs its error. nil: not
	// available.
	Reload func() error
	// Phases are the phases that the configuration names, by route. nil: it is not known.
	Phases func() map[string]string
	// Version answers "CACHEPROXY VERSION".
	Version string
}

// Server is the proxy: it accepts clients and runs their sessions over one engine.
type Server struct {
	cfg   ServerConfig
	e     *engine
	log   *zap.Logger
	ids   atomic.Uint64
	start time.Time

	mu      sync.Mutex
	clients map[*client]struct{} // guarded by mu
	wg      sync.WaitGroup       // every client's goroutines
	guard   atomic.Pointer[guardListener]
	loops   []clientLoop // static once Serve has begun
	drain   atomic.Bool

	phases sync.Mutex // held while routes or phases change

	password atomic.Pointer[string] // what new clients are asked for
}

// New allocates a server; nothing is touched before Serve. store is nil where no route has one.
func New(cfg ServerConfig, store Store) (*Server, error) {
	if store == nil {
		store = noStore{}
	}
	if cfg.Grace <= 0 {
		cfg.Grace = 10 * time.Second
	}
	e, err := newEngine(cfg.Config, store)
	if err != nil {
		return nil, err
	}
	if err := e.setDeny(cfg.Deny); err != nil {
		return nil, err
	}
	s := &Server{cfg: cfg, e: e, log: e.log, start: time.Now(), clients: map[*client]struct{}{}}
	s.password.Store(&cfg.Password)
	return s, nil
}

// SetPassword replaces the password that clients are asked for when they connect; those that are connected stay what they are. Whether
// one is asked for at all does not change.
func (s *Server) SetPassword(password string) {
	if s.cfg.Password != "" && password != "" {
		s.password.Store(&password)
	}
}

// Serve accepts clients on ln, which it owns, until ctx ends; then it refuses new connections, answers what is in
// flight, closes, and returns when everything it started has stopped.
func (s *Server) Serve(ctx context.Context, ln net.Listener) error {
	stopLoops, err := s.startLoops()
	if err != nil {
		return err
	}
	defer stopLoops()
	engineCtx, stopEngine := context.WithCancel(context.WithoutCancel(ctx))
	engineDone := make(chan struct{})
	go func() {
		defer close(engineDone)
		s.e.run(engineCtx)
	}()
	defer func() {
		stopEngine()
		<-engineDone
	}()
	s.registerAll(ctx)
	if n := filesForClients(); n > 0 && (s.cfg.MaxClients == 0 || s.cfg.MaxClients > n) {
		s.log.Warn("the limit of open files allows fewer clients than max_clients; raise it (ulimit -n) for more", zap.Int("clients", n), zap.Int("max_clients", s.cfg.MaxClients))
		s.cfg.MaxClients = n
	}

	g := newGuard(ln, limits{buffer: s.cfg.MaxQuery, auth: s.cfg.Password != ""}, s.cfg.MaxClients, func(err error, again time.Duration) {
		s.log.Warn("no client can be accepted", zap.Error(err), zap.Duration("again_in", again))
	})
	s.guard.Store(g)
	h := &handover{guardListener: g, waiting: map[*waiter]struct{}{}}
	rc := redcon.NewServer("", s.first, nil, nil)
	served := make(chan error, 1)
	go func() { served <- rc.Serve(h) }()
	select {
	case err := <-served:
		s.shutdown()
		return errors.Join(errors.New("the listener failed"), err)
	case <-ctx.Done():
	}
	s.drain.Store(true)
	_ = g.finish(lastWords) // it is over in any case
	if err := <-served; err != nil {
		s.log.Warn("the listener ended badly", zap.Error(err))
	}
	s.shutdown()
	return nil
}

// filesForClients is how many clients the limit of open files allows; 0: it is not known. Of what is left when the proxy has what it needs itself,
// a quarter is for connections to Redis of clients' own.
func filesForClients() int {
	var lim syscall.Rlimit
	if syscall.Getrlimit(syscall.RLIMIT_NOFILE, &lim) != nil || lim.Cur > 1<<30 {
		return 0
	}
	return max(1, (int(lim.Cur)-ownFiles)*3/4)
}

// ownFiles: lanes, runners, spares, Postgres, listeners and what the runtime needs.
const ownFiles = 100

// startLoops starts the loops that drive clients of plain sockets.
func (s *Server) startLoops() (stop func(), err error) {
	if s.cfg.Goroutines {
		return func() {}, nil
	}
	lanes := s.e.up.lanesOn
	if s.e.up.dialer.opt.TLSConfig != nil {
		lanes = nil // a loop has no TLS
	}
	if s.loops, err = newLoops(s.e.cfg.Redis.Connections, s.log, lanes); err != nil {
		return nil, fmt.Errorf("no event loop: %w", err)
	}
	for _, l := range s.loops {
		go l.run()
	}
	return func() {
		for _, l := range s.loops {
			l.stop()
		}
	}, nil
}

// shutdown lets the clients finish, then ends those that did not within the grace.
func (s *Server) shutdown() {
	s.mu.Lock()
	all := make([]*client, 0, len(s.clients))
	for c := range s.clients {
		all = append(all, c)
	}
	s.mu.Unlock()
	for _, c := range all {
		c.stop()
	}
	done := make(chan struct{})
	go func() {
		s.wg.Wait()
		close(done)
	}()
	select {
	case <-done:
		return
	case <-time.After(s.cfg.Grace):
	}
	s.log.Warn("clients were cut off at the end of the grace", zap.Int("clients", s.Clients()))
	for _, c := range all {
		c.kill()
	}
	<-done
}

// Clients is the number of connected clients.
func (s *Server) Clients() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.clients)
}

// first is redcon's handler. It sees a client's first command and takes the connection over.
func (s *Server) first(conn redcon.Conn, cmd redcon.Command) {
	w, ok := conn.NetConn().(*waiter)
	if !ok || !w.take() {
		conn.Close() //nolint:errcheck // not accepted by our listener, or closed meanwhile
		return
	}
	defer w.done()
	conn.Detach()
	nc := w.guardConn
	if nc.detach() != nil {
		nc.Close() //nolint:errcheck // it is broken
		return
	}
	c := &client{s: s, conn: nc}
	addr, laddr := nc.RemoteAddr().String(), nc.LocalAddr().String()
	c.cond = sync.NewCond(&c.mu)
	c.sess = newSession(c, s.e, s.ids.Add(1), *s.password.Load(), addr, sessionLimits{commands: s.cfg.MaxInflight, bytes: s.cfg.MaxInflightBytes})
	c.sess.srv, c.sess.laddr = s, laddr
	first := command{raw: cmd.Raw, args: cmd.Args} // redcon does not use them again
	if nc.kept != nil {
		first, nc.kept = *nc.kept, nil
	}
	onLoop := len(s.loops) > 0 && s.loops[c.sess.id%uint64(len(s.loops))].adopt(c)
	s.mu.Lock()
	s.clients[c] = struct{}{}
	s.mu.Unlock()
	s.wg.Add(1)
	if onLoop {
		c.polling.start(first)
	} else {
		s.wg.Add(1)
		go c.read(first)
		go c.write()
	}
	if s.drain.Load() {
		c.stop()
	}
}

// handover is the listener that redcon sees. A client is redcon's until its first command; from then on it is ours and
// redcon, which forgets it a moment later, must not close it. When the listener closes, clients whose first command is on its
// way still get lastWords to deliver it.
type handover struct {
	*guardListener
	mu      sync.Mutex
	waiting map[*waiter]struct{} // guarded by mu: have not said anything yet
	stopped bool                 // guarded by mu
	all     sync.WaitGroup       // of waiting
}

// waiter is a client that has not said anything yet.
type waiter struct {
	*guardConn
	h     *handover
	mu    sync.Mutex
	taken bool // guarded by mu: it is ours
	ended bool // guarded by mu: it counts no more
}

func (h *handover) Accept() (net.Conn, error) {
	conn, err := h.guardListener.Accept()
	h.mu.Lock()
	if err != nil {
		for w := range h.waiting {
			_ = w.stop(lastWords) // redcon then closes it
		}
		h.stopped = true
		h.mu.Unlock()
		h.all.Wait()
		return nil, err
	}
	defer h.mu.Unlock()
	w := &waiter{guardConn: conn.(*guardConn), h: h}
	h.waiting[w] = struct{}{}
	h.all.Add(1)
	return w, nil
}

// take makes the client ours; false: it was closed.
func (w *waiter) take() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.taken = !w.ended
	return w.taken
}

// done: it is nobody's business here any more.
func (w *waiter) done() {
	w.mu.Lock()
	ended := w.ended
	w.ended = true
	w.mu.Unlock()
	if !ended {
		w.h.mu.Lock()
		delete(w.h.waiting, w)
		w.h.mu.Unlock()
		w.h.all.Done()
	}
}

// Close is what redcon calls; a client that is ours stays.
func (w *waiter) Close() error {
	w.mu.Lock()
	taken := w.taken
	w.mu.Unlock()
	if taken {
		return nil
	}
	w.done()
	return w.guardConn.Close()
}

// client is a session and its socket. A loop drives them, or two goroutines: one reads commands, one writes replies.
type client struct {
	s    *Server
	conn *guardConn

	mu   sync.Mutex
	cond *sync.Cond // signalled whenever the session may have changed
	sess *session   // guarded by mu
	gone bool       // guarded by mu: the socket is of no use any more

	polling polling // static; its place on a loop; nil: goroutines drive it
}

// clientLoop drives many clients at once.
type clientLoop interface {
	run()
	stop()
	adopt(c *client) bool
}

// polling is a client's place on a loop.
type polling interface {
	start(first command)
	changed() // called with the client's lock held
	stop()
}

func (c *client) lock() { c.mu.Lock() }
func (c *client) unlock() {
	if c.polling != nil {
		c.polling.changed()
	}
	c.cond.Broadcast()
	c.mu.Unlock()
}
func (c *client) wait() { c.cond.Wait() }

// lastWords is how long a stopping proxy still reads what its clients had already sent.
const lastWords = 50 * time.Millisecond

// stop makes the client end once everything it has sent is answered.
func (c *client) stop() {
	if c.polling != nil {
		c.polling.stop()
	} else {
		_ = c.conn.stop(lastWords)
	}
}

// kill ends the client now.
func (c *client) kill() {
	c.lock()
	c.gone = true
	c.sess.cutOff()
	c.unlock()
	if c.polling == nil {
		c.conn.Close() //nolint:errcheck // it is given up
	}
}

// forgotten: the client is served no more.
func (c *client) forgotten() {
	c.s.mu.Lock()
	delete(c.s.clients, c)
	c.s.mu.Unlock()
	c.s.wg.Done()
}

// read feeds commands until the client leaves, breaks the protocol, or the proxy stops.
func (c *client) read(cmd command) {
	defer c.s.wg.Done()
	defer func() {
		if p := recover(); p != nil {
			c.s.log.Error("a session panicked", said.Panic(p)...)
			c.kill()
		}
	}()
	for {
		if !c.feed(cmd) {
			return
		}
		var err error
		cmd, _, err = c.conn.next()
		if err == nil {
			continue
		}
		var violation *protocolError
		c.lock()
		switch {
		case errors.As(err, &violation):
			c.sess.farewell(violation.reply())
			c.sess.end()
		case errors.Is(err, io.EOF) || isTimeout(err) && c.s.drain.Load():
			// Half-closed or stopping: what was sent is answered. A client that waits for an event is not waited for.
			c.sess.end()
		default:
			c.gone = true
			c.sess.cutOff()
		}
		c.unlock()
		return
	}
}

func isTimeout(err error) bool {
	var ne net.Error
	return errors.As(err, &ne) && ne.Timeout()
}

// hangUpPoll is how often a client that is held back is looked at, whether it is still there.
const hangUpPoll = 100 * time.Millisecond

// feed gives the session one command when it has room. false: the client is ending.
func (c *client) feed(cmd command) bool {
	c.lock()
	defer func() { // a panic in the session is reported by read, with the lock free
		if p := recover(); p != nil {
			c.mu.Unlock()
			panic(p)
		}
		c.unlock()
	}()
	waited := false
	for c.sess.full() && !c.sess.ending && !c.gone {
		waited = true
		if c.sess.blocked() {
			if hungUp(socketOf(c.conn.NetConn())) {
				c.sess.cutOff()
				return false
			}
		}
		again := time.AfterFunc(hangUpPoll, c.cond.Broadcast)
		c.cond.Wait()
		again.Stop()
	}
	if c.sess.ending || c.gone {
		return false
	}
	c.conn.heldBack = c.conn.heldBack || waited
	c.sess.now = monotonic()
	c.sess.feed(cmd)
	c.conn.setAuthenticated(c.sess.authed)
	return true
}

// write sends what the session has for the client, and closes when it is over.
func (c *client) write() {
	defer c.forgotten()
	defer func() {
		c.lock()
		c.gone = true
		c.sess.cutOff()
		c.unlock()
		c.conn.Close() //nolint:errcheck // it is over
	}()
	var taken outbox
	for {
		c.mu.Lock()
		for c.sess.out.bytes == 0 && !c.gone && (!c.sess.ending || !c.sess.idle()) {
			c.cond.Wait()
		}
		c.sess.out.swap(&taken)
		c.sess.sending = taken.bytes
		over := c.gone || taken.bytes == 0
		c.mu.Unlock()
		if over {
			if !c.isGone() {
				c.linger()
			}
			return
		}
		for i := range taken.segs {
			seg := &taken.segs[i]
			if len(seg.b) == 0 {
				continue
			}
			if _, err := c.conn.Write(seg.b); err != nil {
				return
			}
			if seg.free(); !seg.open {
				seg.b = nil // a long reply gives its memory back as it leaves
			}
		}
		c.lock()
		c.sess.sending = 0
		c.sess.settle()
		c.unlock() // there is room again
	}
}

func (c *client) isGone() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.gone
}

// lingerTime: long enough for the client to read its last reply and close, short enough for a stop to be quick.
const lingerTime = 100 * time.Millisecond

// linger closes so that the last replies arrive: closing a socket that has unread bytes would discard them.
func (c *client) linger() {
	type closeWriter interface{ CloseWrite() error }
	cw, ok := c.conn.NetConn().(closeWriter)
	if !ok || cw.CloseWrite() != nil {
		return
	}
	_ = c.conn.NetConn().SetReadDeadline(time.Now().Add(lingerTime))
	_, _ = io.CopyN(io.Discard, c.conn.NetConn(), 1<<20)
}

// registerAll notes the phases in use in Postgres before they are served, if it can be reached;
// otherwise the journal's poll goes on trying.
func (s *Server) registerAll(ctx context.Context) {
	if !s.e.usesStore() {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, registerWait)
	defer cancel()
	_ = s.e.register(ctx) // noted by the breaker
}

// registerWait: a Postgres that is well answers in milliseconds; one that is not must not keep the clients out.
const registerWait = 500 * time.Millisecond

// Phases are the phases in which the routes are served, by name.
func (s *Server) Phases() map[string]policy.Phase {
	out := map[string]policy.Phase{}
	for _, r := range s.e.router.Load().Routes() {
		out[r.Name] = r.Phase
	}
	return out
}

// SetRoutes replaces the routes. The phases of new routes are registered first.
func (s *Server) SetRoutes(routes []policy.Route) error {
	s.phases.Lock()
	defer s.phases.Unlock()
	next, err := policy.NewRouter(routes)
	if err != nil {
		return err
	}
	return s.swap(next, false)
}

// ErrNoRoute says that no route has that name.
var ErrNoRoute = errors.New("no such route")

// SetPhase moves one route one step. Coming back from drain or phase3 fences the store: rows from before are dead. The configuration is read first:
// whoever has just written the phase into the file, and goes on from there, means it in that order, and the reload that the change of the file calls
// for would come after the step and undo it.
func (s *Server) SetPhase(name string, to policy.Phase) error { return s.setPhase(name, to, false) }

// ForcePhase is SetPhase that goes back to a phase without Redis although keys are only there: they are not seen until the route
// comes back.
func (s *Server) ForcePhase(name string, to policy.Phase) error { return s.setPhase(name, to, true) }

func (s *Server) setPhase(name string, to policy.Phase, force bool) error {
	if s.cfg.Reload != nil {
		_ = s.cfg.Reload() // it logs its error; the step is right or wrong by itself
	}
	s.phases.Lock()
	defer s.phases.Unlock()
	router := s.e.router.Load()
	for _, r := range router.Routes() {
		if r.Name != name {
			continue
		}
		if err := policy.Step(r.Phase, to); err != nil {
			return err
		}
		next, err := router.WithPhase(name, to)
		if err != nil {
			return err
		}
		return s.swap(next, force)
	}
	return ErrNoRoute
}

// swap puts a router in place. Caller holds phases.
func (s *Server) swap(next *policy.Router, force bool) error {
	ctx, cancel := context.WithTimeout(context.Background(), 2*s.e.cfg.StoreTimeout)
	defer cancel()
	return s.e.enter(ctx, s.e.router.Load(), next, force)
}
