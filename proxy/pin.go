package proxy

import (
	"bufio"
	"context"
	"net"
	"strconv"
	"strings"
	"sync/atomic"
	"time"
)

// pin is a connection to Redis of one client's own, with its protocol, user, database and name. It is dialled once: when it
// breaks, what was bound to it is gone.
type pin struct {
	*lane
	id atomic.Int64 // CLIENT ID in Redis; 0 until it is known
}

// identity is who a client is to Redis.
type identity struct {
	proto int
	db    int
	user  *credentials // nil: the proxy's own
	name  string
	anyDB bool // db does not matter
	spare bool // nobody yet: without a word if that is possible, since MONITOR would show it
}

func (s *session) identity() identity {
	return identity{proto: s.proto, db: s.db, user: s.user, name: s.name}
}

// steps are the commands that make a connection this client's. A user with few rights can do without a name and an id; it comes last,
// for it may have no right to the steps before. greeted: the connection is the proxy's user's already, in the routed database.
func (who identity) steps(d *dialer, greeted bool) (steps []step) {
	add := func(needed bool, args ...string) {
		steps = append(steps, step{appendCommand(nil, args...), needed})
	}
	user, pass := d.credentials()
	switch {
	case pass != "" && !greeted:
		add(true, "HELLO", strconv.Itoa(who.proto), "AUTH", user, pass)
	case who.proto != 2:
		add(true, "HELLO", strconv.Itoa(who.proto))
	}
	if who.name != "" {
		add(false, "CLIENT", "SETNAME", who.name) // CLIENT GETNAME in MULTI tells
	}
	if !who.spare {
		add(false, "CLIENT", "ID")
	}
	if !greeted && !who.anyDB && who.db != 0 {
		add(true, "SELECT", strconv.Itoa(who.db))
	}
	if who.user != nil {
		add(true, "AUTH", who.user.user, who.user.pass)
	}
	return steps
}

// step is one of them. needed: without it the connection is not what was asked for.
type step struct {
	raw    []byte
	needed bool
}

// dial opens a connection that is nobody else's.
func (who identity) dial(ctx context.Context, d *dialer) (_ net.Conn, id int64, err error) {
	ctx, cancel := context.WithTimeout(ctx, d.timeout)
	defer cancel()
	conn, err := d.connect(ctx)
	if err != nil {
		return nil, 0, &outageError{why: classifyError(err)}
	}
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) }) //nolint:errcheck // a dead connection is dead
	defer stop()
	fail := func(err error) (net.Conn, int64, error) {
		conn.Close() //nolint:errcheck // the error says more
		return nil, 0, err
	}
	steps := who.steps(d, false)
	var req []byte
	for _, s := range steps {
		req = append(req, s.raw...)
	}
	if len(req) > 0 {
		if _, err := conn.Write(req); err != nil {
			return fail(&outageError{why: classifyError(err)})
		}
	}
	rd := bufio.NewReader(conn)
	for _, s := range steps {
		frame, err := readFrame(rd, maxHandshake)
		if err != nil {
			return fail(&outageError{why: classifyError(err)})
		}
		if isError(frame) && s.needed {
			return fail(errorOf(frame))
		}
		if n, ok := parseInt(frame); ok {
			id = n // of CLIENT ID: no other step answers a number
		}
	}
	if rd.Buffered() > 0 {
		return fail(&outageError{why: outOther, reply: "unexpected bytes after the handshake"})
	}
	if !stop() {
		return fail(&outageError{why: outTimeout})
	}
	return conn, id, nil
}

// spare is a connection that waits for a client who needs one of its own, so that its first command need not wait for a dial and
// a handshake. It has belonged to nobody.
type spare struct{ net.Conn }

const (
	// maxSpares connections wait where clients need many; where none has been needed for spareIdle, keptSpares. Where clients never need
	// one there is none. They are nothing to Redis but a few KB each; with fewer, what clients do one after the other on several
	// connections would reach Redis in another order whenever one of them had to dial first.
	maxSpares  = 16
	keptSpares = 3
	spareIdle  = time.Minute
	// spareDelay: what was taken is replaced a little later, when the client that took it has been served.
	spareDelay = 25 * time.Millisecond
)

// takeSpare returns a connection that waits, or nil. One that has been closed meanwhile is found out.
func (u *upstream) takeSpare() *spare {
	select {
	case u.wantSpares <- struct{}{}:
	default:
	}
	for {
		select {
		case s := <-u.spares:
			if quietConn(s.Conn) {
				return s
			}
			s.Close() //nolint:errcheck // it is closed
		default:
			return nil
		}
	}
}

// spareLoop replaces spares that were taken, until ctx ends.
func (u *upstream) spareLoop(ctx context.Context) {
	defer func() {
		for {
			select {
			case s := <-u.spares:
				s.Close() //nolint:errcheck // not needed
			default:
				return
			}
		}
	}()
	for {
		select {
		case <-ctx.Done():
			return
		case <-u.wantSpares:
		case <-time.After(spareIdle):
			for len(u.spares) > keptSpares {
				select {
				case s := <-u.spares:
					s.Close() //nolint:errcheck // not needed
				default:
				}
			}
			continue
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(spareDelay):
		}
		for len(u.spares) < maxSpares && u.trust() != down {
			conn, _, err := identity{proto: 2, db: u.dialer.opt.DB, spare: true}.dial(ctx, u.dialer)
			if err != nil {
				break // whoever needs one dials himself, and says what is wrong
			}
			u.spares <- &spare{conn}
		}
	}
}

// needsPin: something that the client said lives in a connection of its own.
func (s *session) needsPin() bool {
	return s.tx != nil || s.watching || s.sticky || s.tracking.on || s.subs.any() || s.relay != nil || s.user != nil || s.db != s.e.up.dialer.opt.DB
}

// takePin gives the client a connection to Redis of its own.
func (s *session) takePin() {
	if s.pin == nil {
		s.pinAs(s.identity())
	}
}

// pinAs is takePin for a client as it is to be. A spare connection is given the last steps and then what the client says, without
// waiting. What the client must not say before it is somebody, or somewhere, waits for a handshake instead.
func (s *session) pinAs(who identity) {
	e, p := s.e, &pin{}
	var sp *spare
	if who.user == nil && (who.anyDB || who.db == e.up.dialer.opt.DB) {
		sp = e.up.takeSpare()
	}
	if sp == nil {
		dialled := false // owned by the lane's writer
		p.lane = newLane(func(ctx context.Context) (net.Conn, error) {
			if dialled {
				return nil, errLaneDown
			}
			dialled = true
			conn, id, err := who.dial(ctx, e.up.dialer)
			p.id.Store(id)
			return conn, err
		}, e.log)
	} else {
		p.lane = newLane(nil, e.log)
	}
	p.loop = s.loop
	p.intercept = func(frame []byte) bool { return s.intercept(p, frame) }
	p.broken = func(error) {
		s.d.lock()
		defer s.d.unlock()
		defer s.survive()
		if s.pin == p {
			s.unpinned()
			s.settle()
		}
	}
	s.pin = p
	if sp == nil {
		return
	}
	p.adopt(sp.Conn)
	for _, st := range who.steps(e.up.dialer, true) {
		_ = p.send(st.raw, pending{cb: &stepped{p, st.needed}}) // if it fails, so does what follows
	}
}

// stepped ends a connection that could not be made what was asked for.
type stepped struct {
	p      *pin
	needed bool
}

func (s *stepped) reply(_ uint64, frame []byte) {
	if s.needed && isError(frame) {
		s.p.fail(errorOf(frame))
	}
	if n, ok := parseInt(frame); ok && s.p != nil {
		s.p.id.Store(n) // of CLIENT ID: no other step answers a number
	}
}
func (s *stepped) failed(uint64, bool, error) {}
func (s *stepped) overdue(uint64)             {}
func (s *stepped) part(uint64, []byte) bool   { return false }

// dropPin gives it back: it is closed, never pooled.
func (s *session) dropPin() {
	if p := s.pin; p != nil {
		s.pin = nil
		s.e.wg.Add(1)
		go func() { // close waits for the lane's goroutines, and those may wait for our lock
			defer s.e.wg.Done()
			p.close()
		}()
	}
}

// unpinned: the connection broke. A transaction, a WATCH, a subscription or the tracking of keys is gone with it, and to go on
// without would break the promise that it made, so the client is ended, as by Redis itself; another user may have been deleted. A database can
// be had again.
func (s *session) unpinned() {
	s.dropPin()
	s.sticky = false
	if s.tx != nil || s.watching || s.tracking.on || s.subs.any() || s.relay != nil || s.user != nil {
		s.ending, s.over = true, true
	}
}

// release forgets what the client's own connection was for, and the connection.
func (s *session) release() {
	s.dropPin()
	s.ended()
	s.sticky, s.noEvict = false, false
	s.tracking, s.subs = tracking{}, subscriptions{}
}

// pinning begins a command whose meaning is bound to one connection.
func (s *session) pinning(sl *slot) {
	name := strings.ToLower(string(sl.args[0]))
	switch name {
	case "wait", "waitaof":
		// Redis waits for what it had written when this connection last said something, and the writes went elsewhere.
		s.takePin()
		_ = s.pin.send(appendCommand(nil, "PING"), pending{cb: &stepped{}}) // if it fails, so does what follows
		s.sendOn(s.pin.lane, sl, false)
	case "multi":
		s.beginMulti(sl)
	case "watch":
		s.watch(sl)
	case "unwatch":
		sl.then = func(frame []byte) {
			if !isError(frame) {
				s.unwatched()
			}
			s.finish(sl, frame)
		}
		s.send(sl, false)
	case "exec", "discard":
		s.send(sl, false) // without MULTI Redis says what it says
	case "subscribe", "unsubscribe", "psubscribe", "punsubscribe", "ssubscribe", "sunsubscribe":
		s.subscribe(sl, name)
	case "asking", "readonly", "readwrite":
		s.sticky = true
		s.send(sl, false)
	case "replconf":
		s.sticky = true // it goes before SYNC, on the same connection
		s.send(sl, false)
	case "post", "host:":
		s.answerClear(sl, &refusal{"DENIED", name + " is the beginning of an HTTP request"})
	case "monitor":
		s.monitor(sl)
	default: // SYNC, PSYNC
		if sl.info == nil || !sl.info.ArityOK(len(sl.args)) {
			s.send(sl, false) // Redis says what is wrong with it
			return
		}
		s.sync(sl)
	}
}
