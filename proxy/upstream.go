package proxy

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	cmdtab "cacheproxy/internal/command"

	"github.com/redis/go-redis/v9"
	"go.uber.org/zap"
)

// outage is a closed list: why Redis, or one command of ours in it, could not be had.
type outage string

const (
	outNone       outage = ""
	outRefused    outage = "refused"     // nobody listens
	outBlackhole  outage = "unreachable" // no answer to the dial
	outTimeout    outage = "timeout"     // connected, but no answer within redis.timeout (paused, swamped)
	outBroken     outage = "broken"      // the connection ended
	outLoading    outage = "loading"     // Redis reads its data set
	outReadonly   outage = "readonly"    // a replica answers
	outMasterdown outage = "masterdown"  // a replica that lost its master
	outAuth       outage = "auth"        // credentials refused
	outMisconf    outage = "misconf"     // Redis refuses writes: it cannot save
	outOOM        outage = "oom"         // Redis refuses writes: maxmemory
	outBusy       outage = "busy"        // a script runs too long
	outUnverified outage = "unverified"  // its copies have not been compared with the store yet
	outOther      outage = "error"       // any other error reply
)

// outages are all of them but outNone.
var outages = []outage{outRefused, outBlackhole, outTimeout, outBroken, outLoading, outReadonly, outMasterdown, outAuth, outMisconf, outOOM, outBusy, outUnverified, outOther}

// dead tells whether Redis as a whole is of no use to routed keys. A Redis that only refuses writes
// (misconf, oom) still answers reads.
func (o outage) dead() bool {
	switch o {
	case outNone, outMisconf, outOOM, outOther:
		return false
	}
	return true
}

// classifyReply maps the code of an error reply to an outage; outNone for replies that are no error.
func classifyReply(frame []byte) outage {
	if !isError(frame) {
		return outNone
	}
	switch string(errorCode(frame)) {
	case "LOADING":
		return outLoading
	case "READONLY":
		return outReadonly
	case "MASTERDOWN", "CLUSTERDOWN":
		return outMasterdown
	case "MISCONF", "NOREPLICAS":
		return outMisconf
	case "OOM":
		return outOOM
	case "NOAUTH", "WRONGPASS", "NOPERM":
		return outAuth
	case "BUSY":
		return outBusy
	}
	return outOther
}

// classifyError maps a transport error to an outage.
func classifyError(err error) outage {
	var o *outageError
	var ne net.Error
	switch {
	case err == nil:
		return outNone
	case errors.As(err, &o):
		return o.why
	case errors.Is(err, context.DeadlineExceeded), errors.As(err, &ne) && ne.Timeout():
		return outTimeout
	case strings.Contains(err.Error(), "refused"), strings.Contains(err.Error(), "no such file"):
		return outRefused
	}
	return outBroken
}

// outageError is an error reply of Redis, or a failure of the way to it, that stands for an outage.
type outageError struct {
	why   outage
	reply string // Redis's own error line without "-" and CRLF, where there was one
}

// Reason is what a log may say of it: not the reply, which may quote arguments.
func (e *outageError) Reason() string { return string(e.why) }

func (e *outageError) Error() string {
	if e.reply != "" {
		return "redis: " + e.reply
	}
	return "redis: " + string(e.why)
}

// errorOf turns an error frame into an outageError, nil for other frames.
func errorOf(frame []byte) error {
	if w := classifyReply(frame); w != outNone {
		line, _, _ := bytes.Cut(frame, []byte("\r\n"))
		return &outageError{why: w, reply: string(line[1:])}
	}
	return nil
}

// link is one connection to Redis after its handshake.
type link struct {
	net.Conn
	id     int64  // CLIENT ID, for CLIENT KILL by a successor
	runID  string // changes when the server restarts
	replID string // changes when the data set comes from elsewhere (failover)
	role   string
	hello  []byte // the HELLO reply, as the server shaped it
	info   map[string]string
}

// dialer opens connections to Redis. go-redis parses the URL and owns TLS and credentials; the
// conversation after that is raw.
type dialer struct {
	opt      *redis.Options
	timeout  time.Duration          // of a whole handshake
	ask      func() string          // nil: the password is that of opt
	password atomic.Pointer[string] // what ask said last; nil or "": that of opt
}

// newDialer parses the URL and connects to nothing.
func newDialer(cfg RedisConfig) (*dialer, error) {
	opt, err := redis.ParseURL(cfg.URL)
	if err != nil {
		return nil, fmt.Errorf("redis.url: %w", err)
	}
	if opt.TLSConfig != nil && cfg.TLS != nil {
		refined := cfg.TLS.Clone()
		refined.ServerName = opt.TLSConfig.ServerName
		opt.TLSConfig = refined
	}
	opt.DialTimeout = cfg.DialTimeout
	opt.Dialer = redis.NewDialer(opt)
	return &dialer{opt: opt, timeout: cfg.DialTimeout, ask: cfg.Password}, nil
}

// connect opens a connection on which nothing has been said, and asks for the password that is to be said there: it may have been
// changed since the last one.
func (d *dialer) connect(ctx context.Context) (net.Conn, error) {
	conn, err := d.opt.Dialer(ctx, d.opt.Network, d.opt.Addr)
	if err == nil && d.ask != nil {
		now := d.ask()
		d.password.Store(&now)
	}
	return conn, err
}

// dial connects, switches to the protocol version, authenticates and selects the database: one
// round trip after the connect. name stands in CLIENT LIST.
func (d *dialer) dial(ctx context.Context, proto int, name string) (*link, error) {
	ctx, cancel := context.WithTimeout(ctx, d.timeout)
	defer cancel()
	conn, err := d.connect(ctx)
	if err != nil {
		why := classifyError(err)
		if why == outTimeout {
			why = outBlackhole
		}
		return nil, &outageError{why: why}
	}
	l, err := d.handshake(conn, proto, name)
	if err != nil {
		conn.Close() //nolint:errcheck // the handshake's error says more
		return nil, err
	}
	return l, nil
}

func (d *dialer) handshake(conn net.Conn, proto int, name string) (*link, error) {
	if err := conn.SetDeadline(time.Now().Add(d.timeout)); err != nil {
		return nil, err
	}
	hello := []string{"HELLO", strconv.Itoa(proto)}
	if user, pass := d.credentials(); pass != "" {
		hello = append(hello, "AUTH", user, pass)
	}
	var out []byte
	n := 4
	out = appendCommand(out, hello...)
	out = appendCommand(out, "SELECT", strconv.Itoa(d.opt.DB))
	out = appendCommand(out, "CLIENT", "SETNAME", name)
	out = appendCommand(out, "CLIENT", "ID")
	out = appendCommand(out, "INFO", "everything")
	if _, err := conn.Write(out); err != nil {
		return nil, &outageError{why: classifyError(err)}
	}
	l := &link{Conn: conn}
	rd := bufio.NewReader(conn)
	for i := 0; i <= n; i++ {
		frame, err := readFrame(rd, maxHandshake)
		if err != nil {
			return nil, &outageError{why: classifyError(err)}
		}
		if isError(frame) {
			if i == 0 || i == 1 || i == 4 {
				return nil, errorOf(frame)
			}
			continue // a name and an id are comforts
		}
		switch i {
		case 0:
			l.hello = frame
		case 3:
			l.id, _ = parseInt(frame)
		case 4:
			text, _ := bulk(frame)
			l.info = parseInfo(text)
			l.runID, l.replID, l.role = l.info["run_id"], l.info["master_replid"], l.info["role"]
		}
	}
	if rd.Buffered() > 0 {
		return nil, &outageError{why: outOther, reply: "unexpected bytes after the handshake"}
	}
	if l.info["loading"] == "1" {
		return nil, &outageError{why: outLoading}
	}
	return l, conn.SetDeadline(time.Time{})
}

// credentials are those of the last connection, and for the next one once it is connected.
func (d *dialer) credentials() (user, pass string) {
	user, pass = cmp.Or(d.opt.Username, "default"), d.opt.Password
	if now := d.password.Load(); now != nil && *now != "" {
		pass = *now
	}
	return user, pass
}

// maxHandshake bounds a reply of a handshake: they are small, and a server may have gone wrong.
const maxHandshake = 1 << 20

// readFrame reads one reply of at most about limit bytes.
func readFrame(rd *bufio.Reader, limit int) ([]byte, error) {
	var f framer
	var b []byte
	for len(b) < limit {
		line, err := rd.ReadSlice('\n')
		b = append(b, line...)
		if err != nil && !errors.Is(err, bufio.ErrBufferFull) {
			if errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF
			}
			return nil, err
		}
		n, err := f.scan(b)
		if err != nil {
			return nil, err
		}
		if n > 0 {
			return b, nil
		}
	}
	return nil, errors.New("redis: reply too long")
}

// parseInfo reads the key:value lines of INFO.
func parseInfo(text []byte) map[string]string {
	m := map[string]string{}
	for line := range strings.SplitSeq(string(text), "\r\n") {
		if k, v, ok := strings.Cut(line, ":"); ok && k != "" && k[0] != '#' {
			m[k] = v
		}
	}
	return m
}

// trust tells what Redis may be used for. It only ever falls at once and rises step by step.
type trust int32

const (
	down      trust = iota // no connection, or one that does not answer
	reachable              // it answers, but may hold old data: good for keys that no route matches
	trusted                // it answers, and its copies of routed keys have been repaired
)

func (t trust) String() string { return [...]string{"down", "recovering", "connected"}[t] }

// upstream is this sidecar's relation to one Redis: the breaker, the control connection with its scripts,
// and the lanes. Nobody waits for a Redis that is not trusted; one goroutine (run) brings it back.
type upstream struct {
	dialer  *dialer
	timeout time.Duration // the one bounded wait of P8
	probe   time.Duration // first pause between attempts to come back
	maxWait time.Duration // longest pause
	log     *zap.Logger

	// recover makes Redis's copies right again before they are trusted. Static after construction.
	recover func(ctx context.Context, l *link) error
	// trustedAgain is told when they are. Static after construction.
	trustedAgain func()

	state    atomic.Int32
	epoch    atomic.Uint64 // rises whenever trust is lost: leases taken under an older epoch are void
	control  *lane
	suspects chan struct{}          // capacity 1: wakes run
	lanes    []*sharedLanes         // static; of clients that goroutines drive
	shared   []*sharedLanes         // guarded by mu: those, and those of loops
	took     *[operations]histogram // static
	all      []*lane                // static once run: these, and those of loops
	pause    atomic.Int64           // until when clients' writes are paused (CLIENT PAUSE), Unix ms

	big        bigKeys
	spares     chan *spare   // connections that wait for clients who need their own
	wantSpares chan struct{} // capacity 1

	mindMu sync.Mutex
	minded map[*lane]struct{} // guarded by mindMu: clients' own connections on which something with a deadline waits

	mu     sync.Mutex
	why    outage    // guarded by mu: reason of the present outage
	since  time.Time // guarded by mu: when state last changed
	runID  string    // guarded by mu: of the data that is trusted
	replID string    // guarded by mu
	old    []oldConn // guarded by mu: connections whose last request may still run
	last   *link     // guarded by mu: the control connection
	opens  int64     // guarded by mu: how often the breaker opened
	lostAt time.Time // guarded by mu: when trust was last lost

	hellos [2][]byte    // guarded by mu: replies to HELLO 2 and 3
	fields []string     // guarded by mu: of CLIENT LIST
	clock  atomic.Int64 // Unix ns, as the last tick of expireLoop saw it
}

// oldConn is a connection that was given up with a request in flight.
type oldConn struct {
	id    int64
	runID string // ids restart with the server
}

// maxOld bounds the list of connections to kill: one control connection and the generic ones per
// outage; beyond that a Redis that never comes back would grow it for ever, and older ones have died with
// their sockets by then.
const maxOld = 256

func newUpstream(d *dialer, timeout, probe, maxWait time.Duration, lanes int, took *[operations]histogram, log *zap.Logger) *upstream {
	u := &upstream{dialer: d, took: took, timeout: timeout, probe: probe, maxWait: maxWait, log: log, suspects: make(chan struct{}, 1), since: time.Now(), minded: map[*lane]struct{}{},
		spares: make(chan *spare, maxSpares), wantSpares: make(chan struct{}, 1)}
	u.control = newLane(nil, log)
	u.control.broken = func(err error) { u.suspect(classifyError(err)) }
	for range lanes {
		u.lanes = append(u.lanes, u.lanesOn(nil))
	}
	return u
}

// dialLane opens a shared connection. One that finds another server than the one whose data is trusted
// closes the breaker's door: nothing routed is read from it before run has repaired.
func (u *upstream) dialLane(ctx context.Context, proto int) (net.Conn, error) {
	l, err := u.dialer.dial(ctx, proto, "cacheproxy-lane")
	if err != nil {
		return nil, err
	}
	u.mu.Lock()
	other := u.trust() == trusted && (l.runID != u.runID || l.replID != u.replID)
	u.mu.Unlock()
	if other {
		u.suspect(outBroken)
	}
	return l.Conn, nil
}

// sharedLanes are the connections that clients share, by the version of the protocol less two. What may keep Redis busy, so that it answers others
// with BUSY, goes over the side: behind it they would get no answer.
type sharedLanes struct {
	main, side [2]*lane
	times      commandTimes // of their clients
}

func (ls *sharedLanes) all() []*lane { return []*lane{ls.main[0], ls.main[1], ls.side[0], ls.side[1]} }

// lanesOn makes the shared connections of a loop, before run.
func (u *upstream) lanesOn(loop laneLoop) *sharedLanes {
	ls := new(sharedLanes)
	for i := range ls.main {
		ls.main[i], ls.side[i] = u.sharedLane(i+2, loop), u.sharedLane(i+2, loop)
	}
	u.mu.Lock()
	u.shared = append(u.shared, ls)
	u.mu.Unlock()
	return ls
}

// commandTimes are what is counted of commands.
func (u *upstream) commandTimes() (all []*commandTimes) {
	u.mu.Lock()
	defer u.mu.Unlock()
	for _, ls := range u.shared {
		all = append(all, &ls.times)
	}
	return all
}

// sharedLane makes one shared connection, before run. It is dialled when it is first needed.
func (u *upstream) sharedLane(proto int, loop laneLoop) *lane {
	l := newLane(func(ctx context.Context) (net.Conn, error) { return u.dialLane(ctx, proto) }, u.log)
	l.broken = u.control.broken
	l.loop = loop
	u.all = append(u.all, l)
	return l
}

// lanesOf is where a client sends whom goroutines drive; the same client always gets the same lanes, so that its order holds.
func (u *upstream) lanesOf(client uint64) *sharedLanes { return u.lanes[client%uint64(len(u.lanes))] }

// expireLoop watches the deadlines of what waits on the lanes. A tick of 10 ms keeps a bounded wait of
// 250 ms within 5 %.
func (u *upstream) expireLoop(ctx context.Context) {
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case now := <-tick.C:
			u.clock.Store(now.UnixNano())
			late := 0
			for _, l := range u.all {
				late += l.expire(now)
			}
			late += u.expireMinded(now)
			if late > 0 {
				u.suspect(outTimeout)
			}
			if !u.trusted() {
				continue
			}
			u.control.keepAwake(now, controlAwake)
			for _, l := range u.all {
				l.keepAwake(now, lanesAwake)
			}
			spoke := u.control.heard.Load()
			if spoke == u.control.busy.Load() {
				continue // it speaks here, and cannot where the script's answer is due
			}
			for _, l := range u.all {
				if l.deaf(max(deafTime, u.timeout), spoke) {
					u.log.Warn("a connection to redis leads nowhere and is dropped")
					l.drop(&outageError{why: outBroken})
				}
			}
		}
	}
}

const (
	// controlAwake: that the control connection ends is an outage, so it must outlive any timeout but the shortest, a second. With a route
	// that has a store it is in use all the time.
	controlAwake = time.Second
	// lanesAwake: an idle shared connection that ends is nothing but a dial, so that a usual timeout of some minutes is what counts.
	lanesAwake = 20 * time.Second
)

// mind watches the deadlines of a client's own connection until nothing waits there.
func (u *upstream) mind(l *lane) {
	u.mindMu.Lock()
	u.minded[l] = struct{}{}
	u.mindMu.Unlock()
}

func (u *upstream) expireMinded(now time.Time) (late int) {
	u.mindMu.Lock()
	lanes := make([]*lane, 0, len(u.minded))
	for l := range u.minded {
		if l.waiting() == 0 {
			delete(u.minded, l)
		} else {
			lanes = append(lanes, l)
		}
	}
	u.mindMu.Unlock()
	for _, l := range lanes { // not under the lock: sessions are told
		late += l.expire(now)
	}
	return late
}

// deafTime: the journal's poll makes Redis speak on the control connection every quarter of a second; a second more than that is no
// coincidence, unless the machines are so busy that redis.timeout was raised: who grants Redis more for an answer grants it here too.
const deafTime = time.Second

// closeLanes ends the shared connections; what waits fails.
func (u *upstream) closeLanes() {
	for _, l := range u.all {
		l.close()
	}
}

// dataSet names what a server holds: the run, and the history it replicates.
func dataSet(l *link) string { return l.runID + " " + l.replID }

// present tells the state, since when, and the data set that is trusted ("" if none is).
func (u *upstream) present() (trust, time.Time, string) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.trust() != trusted || u.runID == "" {
		return u.trust(), u.since, ""
	}
	return trusted, u.since, u.runID + " " + u.replID
}

// connection is the control connection, nil if there is none that is trusted.
func (u *upstream) connection() *link {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.trust() != trusted {
		return nil
	}
	return u.last
}

// hello is the server's own reply to HELLO in a protocol version; nil if none has been seen yet.
func (u *upstream) hello(proto int) []byte {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.hellos[proto-2]
}

// clientFields are the fields of CLIENT LIST, as the server has them.
func (u *upstream) clientFields() []string {
	u.mu.Lock()
	defer u.mu.Unlock()
	if len(u.fields) == 0 {
		return firstFields
	}
	return u.fields
}

func (u *upstream) hasField(name string) bool { return slices.Contains(u.clientFields(), name) }

// firstFields are those of Redis 7.0, for as long as no server has been seen.
var firstFields = strings.Fields(`id addr laddr fd name age idle flags db sub psub ssub multi qbuf qbuf-free argv-mem multi-mem
	rbs rbp obl oll omem tot-mem events cmd user redir resp`)

// introduce learns how the server speaks of itself and of its clients. What it does not tell is done without.
func (u *upstream) introduce(ctx context.Context) error {
	three, err := u.do(ctx, "HELLO", "3")
	if err != nil && classifyError(err) != outOther {
		return err
	}
	two, err := u.do(ctx, "HELLO", "2")
	if err != nil && classifyError(err) != outOther {
		return err
	}
	info, err := u.do(ctx, "CLIENT", "INFO")
	if err != nil && classifyError(err) != outOther {
		return err
	}
	var fields []string
	text, _ := bulk(info)
	for f := range strings.FieldsSeq(string(text)) {
		name, _, _ := strings.Cut(f, "=")
		fields = append(fields, name)
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	u.hellos, u.fields = [2][]byte{two, three}, fields
	return nil
}

// paused notes a CLIENT PAUSE or CLIENT UNPAUSE that Redis has agreed to.
func (u *upstream) paused(args [][]byte) {
	var until int64
	if len(args) > 2 {
		ms, _ := parseDecimal(args[2])
		until = max(u.pause.Load(), time.Now().UnixMilli()+ms)
	}
	u.pause.Store(until)
}

// pauses: Redis keeps this command waiting until a CLIENT PAUSE of writes is over, and with it all that comes behind it on its connection. In a
// pause of everything the rest waits too, wherever it is sent.
func (u *upstream) pauses(info *cmdtab.Info) bool {
	until := u.pause.Load()
	if until == 0 || info == nil || time.Now().UnixMilli() >= until {
		return false
	}
	switch info.Name {
	case "eval", "evalsha", "fcall", "publish", "spublish", "pfcount": // those that may write, in Redis's eyes
		return true
	}
	return info.Flags&cmdtab.Write != 0
}

func (u *upstream) trust() trust  { return trust(u.state.Load()) }
func (u *upstream) trusted() bool { return trust(u.state.Load()) == trusted }

// gone: Redis cannot be had. One whose connection broke a moment ago may be well: to dial again tells, in less time than it takes to be asked by others.
func (u *upstream) gone() bool {
	if u.trust() != down {
		return false
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.why != outBroken || time.Since(u.lostAt) > lately
}

// lately: a Redis that was lost no longer ago may come back at once: it was busy, or one connection broke.
const lately = time.Second

// returns waits for Redis to be trusted again, for as long as a dead Redis may cost (P8), and only if it was lost a moment ago for
// want of an answer. It tells whether it is trusted.
func (u *upstream) returns() bool {
	for end := time.Now().Add(u.timeout); ; time.Sleep(heldPoll) {
		if u.trusted() {
			return true
		}
		u.mu.Lock()
		hope := time.Since(u.lostAt) < lately && u.why != outRefused
		u.mu.Unlock()
		if !hope || time.Now().After(end) {
			return false
		}
	}
}

// suspect opens the breaker: routed commands stop asking Redis at once, and run looks what is wrong.
func (u *upstream) suspect(why outage) {
	u.mu.Lock()
	if u.trust() == trusted {
		u.epoch.Add(1)
		u.opens++
		u.lostAt = time.Now()
	}
	if u.trust() != down {
		u.state.Store(int32(down))
		u.why, u.since = why, time.Now()
		u.log.Warn("redis is not usable", zap.String("reason", string(why)))
	}
	u.mu.Unlock()
	select {
	case u.suspects <- struct{}{}:
	default:
	}
}

// abandon notes that a connection was given up with a request in flight; the next control connection
// kills it before anything is repaired.
func (u *upstream) abandon(l *link) {
	if l == nil || l.id == 0 {
		return
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	if len(u.old) < maxOld {
		u.old = append(u.old, oldConn{l.id, l.runID})
	}
}

// abandonPin is abandon for a client's own connection.
func (u *upstream) abandonPin(p *pin) {
	u.mu.Lock()
	runID := u.runID
	u.mu.Unlock()
	u.abandon(&link{id: p.id.Load(), runID: runID})
}

// run keeps the control connection until ctx ends.
func (u *upstream) run(ctx context.Context) {
	defer u.control.close()
	wait, at := u.probe, time.Now() // when to try
	for {
		if u.trust() == trusted {
			select {
			case <-ctx.Done():
				return
			case <-u.suspects:
			}
			at = time.Now() // it may have been one connection only: look at once
			continue
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(time.Until(at)):
		}
		began := time.Now()
		if err := u.attempt(ctx); err != nil {
			u.refused(classifyError(err))
			at = time.Now().Add(wait)
			wait = min(wait*2, u.maxWait)
			continue
		}
		wait = u.probe
		u.log.Info("redis is trusted", zap.Duration("recovery", time.Since(began)))
		u.trustedAgain()
	}
}

// refused keeps the reason of an outage that goes on, and says so once per reason.
func (u *upstream) refused(why outage) {
	u.mu.Lock()
	changed := u.why != why
	u.why = why
	u.mu.Unlock()
	if changed {
		u.log.Warn("redis is not usable", zap.String("reason", string(why)))
	}
}

// attempt is one try to make Redis trusted: dial, kill what the old connections still have in flight,
// repair, serve, in this order (docs/consistency.md, "Outages, restarts, failovers").
func (u *upstream) attempt(ctx context.Context) error {
	u.mu.Lock()
	if u.last != nil {
		// The control connection that is replaced may have a script in flight.
		if len(u.old) < maxOld {
			u.old = append(u.old, oldConn{u.last.id, u.last.runID})
		}
		u.last = nil
	}
	u.mu.Unlock()
	u.control.drop(&outageError{why: outBroken})
	l, err := u.dialer.dial(ctx, 2, "cacheproxy-control")
	if err != nil {
		return err
	}
	if l.role != "" && l.role != "master" {
		l.Close() //nolint:errcheck // nothing was sent
		return &outageError{why: outReadonly}
	}
	u.mu.Lock()
	kill := u.old
	u.last = l
	epoch := u.epoch.Load()
	u.mu.Unlock()

	u.control.adopt(l.Conn)
	select { // what was suspected before this connection is answered by it
	case <-u.suspects:
	default:
	}
	if err := u.prepare(ctx, l, kill); err != nil {
		return err
	}
	u.mu.Lock()
	u.old = u.old[len(kill):]
	if u.trust() == down {
		u.state.Store(int32(reachable))
	}
	u.mu.Unlock()
	if err := u.recover(ctx, l); err != nil {
		return err
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.epoch.Load() != epoch || !u.control.up() {
		return &outageError{why: outBroken}
	}
	u.runID, u.replID = l.runID, l.replID
	u.why, u.since = outNone, time.Now()
	u.state.Store(int32(trusted))
	return nil
}

// prepare kills old connections, loads the scripts and gets to know the server.
func (u *upstream) prepare(ctx context.Context, l *link, kill []oldConn) error {
	for _, o := range kill {
		if o.runID != l.runID || o.id == 0 {
			continue // the server died with it
		}
		if _, err := u.do(ctx, "CLIENT", "KILL", "ID", strconv.FormatInt(o.id, 10)); err != nil && classifyError(err) != outOther {
			return err
		}
	}
	for _, s := range scripts {
		f, err := u.do(ctx, "SCRIPT", "LOAD", s.body)
		if err != nil {
			return err
		}
		if sha, _ := bulk(f); string(sha) != s.sha {
			return errors.New("redis: SCRIPT LOAD answered another digest")
		}
	}
	return u.introduce(ctx)
}

// largeWait bounds what a value of 512 MiB may take on a slow network between a proxy and its Redis.
const largeWait = 10 * time.Second

// do sends one command on the control connection and returns a copy of its reply. An error reply is
// returned as an *outageError. The wait is bounded by u.timeout; after ctx has ended nothing is sent.
func (u *upstream) do(ctx context.Context, args ...string) ([]byte, error) {
	return u.timed(ctx, redisCommand, appendCommand(nil, args...))
}

// timed is roundTrip, and counts how long an answer has taken.
func (u *upstream) timed(ctx context.Context, op operation, raw []byte) ([]byte, error) {
	if err := ctx.Err(); err != nil {
		return nil, err // the caller's time is over, which says nothing about Redis
	}
	began := monotonic()
	frame, err := u.roundTrip(ctx, raw)
	u.took[op].since(began)
	return frame, err
}

func (u *upstream) roundTrip(ctx context.Context, raw []byte) ([]byte, error) {
	if err := ctx.Err(); err != nil {
		return nil, err // the caller's time is over, which says nothing about Redis
	}
	c := callPool.Get().(*call)
	defer callPool.Put(c)
	c.tag++
	if err := u.control.send(raw, pending{cb: c, tag: c.tag}); err != nil {
		return nil, err
	}
	if r, ok := u.control.await(c, u.timeout); ok {
		if r.err != nil {
			return nil, r.err
		}
		return r.frame, errorOf(r.frame)
	}
	err := error(&outageError{why: outTimeout})
	// The request may run later, when a paused Redis wakes: nobody may use this connection again, and
	// the next one kills it first.
	u.suspect(outTimeout)
	u.control.drop(err)
	r := <-c.done // drop has failed it, or its reply came at the last moment
	if r.err == nil {
		return r.frame, errorOf(r.frame)
	}
	return nil, err
}

// call is one blocking use of a lane.
type call struct {
	done chan result
	tag  uint64
}

type result struct {
	frame []byte
	err   error
}

var callPool = sync.Pool{New: func() any { return &call{done: make(chan result, 1)} }}

func (c *call) reply(_ uint64, frame []byte)       { c.done <- result{frame: bytes.Clone(frame)} }
func (c *call) failed(_ uint64, _ bool, err error) { c.done <- result{err: err} }
func (c *call) overdue(uint64)                     {}
func (c *call) part(uint64, []byte) bool           { return false }
