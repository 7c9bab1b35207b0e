package proxy

import (
	"errors"
	"io"
	"net"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"cacheproxy/internal/said"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"
)

// loop drives the sessions of many clients, and the lanes that they share, in one goroutine over epoll. In a turn it reads every client that has said
// something, gives Redis in one write what all of them asked, and answers each client in one write. Almost all that a proxy costs is system calls
// and wake-ups; this way a busy one needs few of either.
type loop struct {
	log   *zap.Logger
	ep    *poller
	bell  int          // an eventfd: ends the sleep
	lanes *sharedLanes // static; nil: none of its own
	ended chan struct{}

	parallel bool // static: there are processors for others while it looks for something to do

	mu     sync.Mutex
	asleep bool            // guarded by mu: waits for events, or is about to
	quit   bool            // guarded by mu
	calls  []func()        // guarded by mu: to be run by the loop
	todo   []*polledClient // guarded by mu: whose session may have changed
	full   []*lane         // guarded by mu: have something to write

	own atomic.Pointer[lane] // the client's own connection that was used last; nil: a shared one was used since

	// Of the loop's goroutine.
	polled []polled                   // by file descriptor
	spins  bool                       // to look before the next sleep has been worth it
	alone  int                        // for so many turns there has been one event at most
	woke   int64                      // when the turn began, monotonic
	timed  map[*polledClient]struct{} // those that a time matters to
}

// polled is what a loop reads and writes.
type polled interface{ ready(events uint32) }

// tick is how often clients are looked at that a time matters to: those that are being stopped, and those that are given time to read their last
// reply.
const tick = 10 * time.Millisecond

func newLoop(log *zap.Logger) (*loop, error) {
	ep, err := newPoller()
	if err != nil {
		return nil, err
	}
	bell, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		ep.close()
		return nil, err
	}
	l := &loop{log: log, ep: ep, bell: bell, parallel: runtime.GOMAXPROCS(0) > 1, ended: make(chan struct{}), timed: map[*polledClient]struct{}{}}
	if err := l.add(bell, unix.EPOLLIN, l); err != nil {
		ep.close()
		unix.Close(bell) //nolint:errcheck // nothing is lost
		return nil, err
	}
	return l, nil
}

// run turns until stop.
func (l *loop) run() {
	defer close(l.ended)
	for {
		events, err := l.poll()
		if err != nil {
			l.log.Error("epoll failed", zap.Error(err)) // no error of it is to be expected
		}
		l.woke = monotonic()
		for i := range events {
			if fd := int(events[i].Fd); fd < len(l.polled) && l.polled[fd] != nil {
				l.polled[fd].ready(events[i].Events)
				l.flushEarly()
			}
		}
		if len(l.timed) > 0 {
			l.watchTime(time.Now())
		}
		if !l.finishTurn() {
			l.ep.close()
			unix.Close(l.bell) //nolint:errcheck // nothing is lost
			return
		}
	}
}

// maxSpin is how long a loop looks again and again for something to do before it sleeps. To fall asleep and be woken costs two switches of the
// processor and, on a virtual machine, an exit from it: of a client that asks one thing at a time that is most of the added latency. A loop that
// looks offers its processor to other threads each time; other goroutines have the other ones. The rule is that of the Linux kernel's halt
// polling: whoever slept longer than this has looked in vain, and does not look the next time; whoever was woken sooner should have.
//
// It is for whoever asks one thing at a time. Where many clients ask, a loop that sleeps finds more of them when it wakes up, and Redis gets more in one
// write; one that looks takes their processor (measured: a tenth less throughput at 50 connections). So it looks when fewTurns in
// a row had one event each.
const (
	maxSpin  = 50 * time.Microsecond
	fewTurns = 8
)

// poll returns what is ready, and waits for it if there is nothing else to do.
func (l *loop) poll() ([]unix.EpollEvent, error) {
	l.mu.Lock()
	busy := len(l.calls)+len(l.todo)+len(l.full) > 0 || l.quit
	l.asleep = !busy
	l.mu.Unlock()
	if busy {
		return l.ep.now()
	}
	began := time.Now()
	var events []unix.EpollEvent
	var err error
	if l.alone >= fewTurns {
		events, err = l.look(began)
	}
	if len(events) == 0 && err == nil {
		d := time.Duration(0)
		if len(l.timed) > 0 {
			d = tick
		}
		events, err = l.ep.wait(d)
		l.spins = l.parallel && time.Since(began) < maxSpin
	}
	if len(events) <= 1 {
		l.alone++
	} else {
		l.alone = 0
	}
	l.mu.Lock()
	l.asleep = false
	l.mu.Unlock()
	return events, err
}

// look waits awake, if that has been worth it.
func (l *loop) look(began time.Time) ([]unix.EpollEvent, error) {
	for l.spins && time.Since(began) < maxSpin {
		if events, err := l.ep.now(); len(events) > 0 || err != nil {
			return events, err
		}
		yield()
	}
	return nil, nil
}

// finishTurn does what the turn has left to do: the sessions that changed first, because they may ask Redis for more, and the lanes when nothing
// is left to be asked. false: the loop is to end.
func (l *loop) finishTurn() bool {
	var (
		calls []func()
		todo  []*polledClient
		full  []*lane
	)
	for {
		l.mu.Lock()
		switch {
		case len(l.calls) > 0:
			calls, l.calls = l.calls, calls[:0]
			l.mu.Unlock()
			for i, f := range calls {
				l.contained(f)
				calls[i] = nil
			}
		case len(l.todo) > 0:
			todo, l.todo = l.todo, todo[:0]
			l.mu.Unlock()
			for i, ev := range todo {
				ev.turn()
				todo[i] = nil
			}
		case len(l.full) > 0:
			full, l.full = l.full, full[:0]
			l.mu.Unlock()
			for i, la := range full {
				l.contained(la.flush)
				full[i] = nil
			}
		default:
			quit := l.quit
			l.mu.Unlock()
			return !quit
		}
	}
}

// early bytes of requests are written before the turn has ended: with long pipelines a turn is long, and Redis, which would have nothing to do meanwhile,
// takes commands by 16 KiB itself. Measured with 50 connections and a pipeline of sixteen: a sixth more throughput.
const early = 8 << 10

func (l *loop) flushEarly() {
	if l.lanes == nil {
		return
	}
	for _, la := range l.lanes.main {
		la.mu.Lock()
		p, ok := la.conn.(*polledLane)
		much := ok && p.left == 0 && la.out.bytes >= early // left: the socket is full
		la.mu.Unlock()
		if much {
			l.contained(la.flush)
		}
	}
}

// contained runs f, and goes on if it panics.
func (l *loop) contained(f func()) {
	defer func() {
		if p := recover(); p != nil {
			l.log.Error("an event loop panicked", said.Panic(p)...)
		}
	}()
	f()
}

// hungUp: the other side of a connection says nothing more, also if not all that it has said has been read.
func hungUp(c net.Conn) (yes bool) {
	withFD(c, func(fd int) {
		fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLRDHUP}}
		n, err := unix.Poll(fds, 0)
		yes = err == nil && n > 0
	})
	return yes
}

// ring ends the sleep. Caller holds mu.
func (l *loop) ring() {
	if l.asleep {
		l.asleep = false
		_, _ = writeFD(l.bell, []byte{1, 0, 0, 0, 0, 0, 0, 0}) // it can only fail when it has been rung 2^64 times
	}
}

// ready is the bell.
func (l *loop) ready(uint32) {
	var b [8]byte
	_, _ = readFD(l.bell, b[:])
}

// call has the loop run f.
func (l *loop) call(f func()) {
	l.mu.Lock()
	l.calls = append(l.calls, f)
	l.ring()
	l.mu.Unlock()
}

// hasOutput has the loop write what a lane has, at the end of its turn. Caller holds la.mu.
func (l *loop) hasOutput(la *lane) {
	if la.marked {
		return
	}
	la.marked = true
	l.mu.Lock()
	l.full = append(l.full, la)
	l.ring()
	l.mu.Unlock()
}

// stop ends the loop when it has done what it was told, and waits for it. Its clients and lanes must be gone.
func (l *loop) stop() {
	l.mu.Lock()
	l.quit = true
	l.ring()
	l.mu.Unlock()
	<-l.ended
}

func (l *loop) add(fd int, events uint32, p polled) error {
	for len(l.polled) <= fd {
		l.polled = append(l.polled, nil)
	}
	l.polled[fd] = p
	return unix.EpollCtl(l.ep.fd, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: events, Fd: int32(fd)})
}

func (l *loop) modify(fd int, events uint32) {
	_ = unix.EpollCtl(l.ep.fd, unix.EPOLL_CTL_MOD, fd, &unix.EpollEvent{Events: events, Fd: int32(fd)}) // of a descriptor that is there it cannot fail
}

func (l *loop) remove(fd int) {
	l.polled[fd] = nil
	_ = unix.EpollCtl(l.ep.fd, unix.EPOLL_CTL_DEL, fd, nil)
}

// ownFD takes the descriptor of a connection out of the runtime's hands, which would wake up for every byte that comes. What is left of c is
// closed. false: it has none (TLS), and c is as it was.
func ownFD(c net.Conn) (fd int, ok bool) {
	var err error
	if !withFD(c, func(old int) { fd, err = unix.FcntlInt(uintptr(old), unix.F_DUPFD_CLOEXEC, 0) }) || err != nil {
		return 0, false
	}
	c.Close() //nolint:errcheck // its socket lives on
	return fd, true
}

// polledClient is a client's socket on a loop. But for posted, everything is of the loop's goroutine.
type polledClient struct {
	c      *client
	l      *loop
	fd     int
	in     *scanner
	posted bool // guarded by c.mu: the loop has been told to look

	started  bool   // the first command has been fed
	events   uint32 // what is polled for
	deaf     bool   // the other side is gone for good, and the socket is not polled any more
	hungUp   bool   // the other side says nothing more, though not all that it has said has been read
	ended    bool   // nothing more is read
	eof      bool   // for the client has closed its side
	closed   bool
	taken    outbox    // being written
	seg, off int       // how far
	heldBack bool      // the stream was not read for a while since the last read
	slow     bool      // that was so once
	stopped  time.Time // when stop came
	heard    time.Time // and what was read last since
	linger   time.Time // when the socket is closed at the latest
	unread   int       // bytes discarded while it lingers
}

// adopt makes the loop the driver of a client that nobody else knows yet; start begins. false: it cannot, and nothing has happened.
func (l *loop) adopt(c *client) bool {
	fd, ok := ownFD(c.conn.NetConn())
	if !ok {
		return false
	}
	c.polling = &polledClient{c: c, l: l, fd: fd, in: c.conn.in}
	if l.lanes != nil {
		c.sess.shared, c.sess.loop = l.lanes, l
	}
	return true
}

// use keeps the order in which clients speak also where they do on different connections: what is waiting for another one is written
// before la is used. Between the shared ones, of RESP2 and RESP3, that would cost most of the batching, and there it is left to the end of the turn.
func (l *loop) use(la *lane) {
	own := la
	if la.intercept == nil {
		own = nil
	}
	before := l.own.Load()
	if before == own {
		return
	}
	l.own.Store(own)
	if before != nil {
		before.flush()
	} else {
		for _, la := range l.lanes.all() {
			la.flush()
		}
	}
}

// start begins with the client's first command.
func (ev *polledClient) start(first command) {
	ev.l.call(func() {
		c := ev.c
		c.lock()
		defer c.unlock()
		defer ev.contain()
		ev.started = true
		ev.events = unix.EPOLLIN
		if err := ev.l.add(ev.fd, ev.events, ev); err != nil {
			ev.l.log.Error("a client cannot be polled", zap.Error(err)) // the kernel's limit of watches
			ev.fail()
			return
		}
		c.sess.now = ev.l.woke
		c.sess.feed(first)
		ev.in.setAuthenticated(c.sess.authed)
		ev.feed()
	})
}

// changed has the loop look at the client's session at the end of its turn. Caller holds c.mu.
func (ev *polledClient) changed() {
	if ev.posted {
		return
	}
	ev.posted = true
	l := ev.l
	l.mu.Lock()
	l.todo = append(l.todo, ev)
	l.ring()
	l.mu.Unlock()
}

// contain ends a client, not the process, when what it says makes a session panic. Caller holds c.mu.
func (ev *polledClient) contain() {
	if p := recover(); p != nil {
		ev.l.log.Error("a session panicked", said.Panic(p)...)
		ev.fail()
		ev.changed()
	}
}

// fail ends the client. Caller holds c.mu.
func (ev *polledClient) fail() {
	ev.ended = true
	ev.c.gone = true
	ev.c.sess.cutOff()
}

func (ev *polledClient) ready(events uint32) {
	if !ev.linger.IsZero() {
		ev.discard()
		return
	}
	c := ev.c
	c.mu.Lock()
	switch {
	case ev.events&unix.EPOLLIN != 0 && events&^unix.EPOLLOUT != 0:
		ev.read()
	case events&(unix.EPOLLHUP|unix.EPOLLERR) != 0:
		// It has gone while it was held back. What it had sent before is still worth reading; the rest of the events would come without end.
		ev.hungUp, ev.deaf = true, true
		_ = unix.EpollCtl(ev.l.ep.fd, unix.EPOLL_CTL_DEL, ev.fd, nil)
	case events&unix.EPOLLRDHUP != 0:
		ev.hungUp = true
	}
	// A client that only asks Redis needs no look at the end of the turn.
	if s := c.sess; s.out.bytes > 0 || c.gone || s.full() || events&unix.EPOLLIN == 0 {
		ev.changed()
	}
	c.mu.Unlock()
}

// read reads the socket once, and feeds what has come. Caller holds c.mu.
func (ev *polledClient) read() (n int) {
	defer ev.contain()
	if ev.ended || ev.c.sess.full() {
		return 0
	}
	n, errno := readFD(ev.fd, ev.in.space(minRead))
	switch {
	case errno == unix.EAGAIN || errno == unix.EINTR:
		return 0
	case errno != 0:
		ev.fail()
		return 0
	case n == 0:
		// Half-closed: what was sent is answered. A client that waits for an event is not waited for.
		ev.eof, ev.ended = true, true
		ev.c.sess.end()
		return 0
	}
	ev.heldBack = false
	ev.in.wrote(n)
	ev.feed()
	return n
}

// feed gives the session the commands that are here and that it has room for. Caller holds c.mu.
func (ev *polledClient) feed() {
	s := ev.c.sess
	s.now = ev.l.woke
	for !ev.ended && !s.full() {
		cmd, ok, err := ev.in.next()
		if err != nil {
			var violation *protocolError
			errors.As(err, &violation) // a scanner has no other
			ev.ended = true
			s.farewell(violation.reply())
			s.end()
			return
		}
		if !ok {
			ev.in.lendBack() // thousands of clients may have nothing to say
			return
		}
		if len(cmd.raw) > largeCommand {
			ev.in.surrender(&cmd)
		}
		s.feed(cmd)
		ev.in.setAuthenticated(s.authed)
	}
}

// turn does what the session's last changes call for: it writes replies, feeds commands that had no room, and closes.
func (ev *polledClient) turn() {
	c := ev.c
	c.mu.Lock()
	defer c.mu.Unlock()
	defer ev.contain()
	ev.posted = false
	if !ev.started || ev.closed || !ev.linger.IsZero() {
		// 1 the client is known    2 CLIENT LIST looks at it, and has it looked at here    3 its first command is fed: not behind the second
		return
	}
	s := c.sess
	for !c.gone {
		ev.feed()
		if ev.deaf && !ev.ended && !s.full() && ev.read() > 0 {
			continue
		}
		if !ev.write() {
			break
		}
	}
	if ev.hungUp && !ev.ended && s.blocked() {
		// It waits for an event, and nobody for it. What it said behind that is lost, as when it had been read.
		ev.ended = true
		s.cutOff()
	}
	if c.gone || s.ending && s.idle() && s.out.bytes+s.sending == 0 {
		ev.finish()
		return
	}
	if s.full() && !ev.ended {
		ev.heldBack, ev.slow = true, true
	}
	ev.pollFor()
	s.hearAgain()
	c.cond.Broadcast() // there may be room again
}

// pollFor asks epoll for what can be made use of now.
func (ev *polledClient) pollFor() {
	var events uint32
	switch {
	case ev.ended:
	case !ev.c.sess.full():
		events |= unix.EPOLLIN
	case !ev.hungUp:
		events |= unix.EPOLLRDHUP
	}
	if ev.c.sess.sending > 0 {
		events |= unix.EPOLLOUT
	}
	if events != ev.events && !ev.deaf {
		ev.events = events
		ev.l.modify(ev.fd, events)
	}
}

// write sends what the session has for the client. true: all of something was sent, so that the session may have room for more. Caller
// holds c.mu.
func (ev *polledClient) write() bool {
	s := ev.c.sess
	if s.sending == 0 {
		if s.out.bytes == 0 {
			return false
		}
		s.out.swap(&ev.taken)
		s.sending = ev.taken.bytes
		ev.seg, ev.off = 0, 0
	}
	for ; ev.seg < len(ev.taken.segs); ev.seg++ {
		seg := &ev.taken.segs[ev.seg]
		for ev.off < len(seg.b) {
			n, errno := writeFD(ev.fd, seg.b[ev.off:])
			if n > 0 {
				ev.off += n
			}
			switch errno {
			case 0, unix.EINTR:
			case unix.EAGAIN:
				return false
			default:
				ev.fail()
				return false
			}
		}
		ev.off = 0
		if seg.free(); !seg.open {
			seg.b = nil // a long reply gives its memory back as it leaves
		}
	}
	s.sending = 0
	s.settle()
	return true
}

// finish begins the end of a client that has been told everything, or is gone. Caller holds c.mu.
func (ev *polledClient) finish() {
	c := ev.c
	sound := !c.gone && !ev.eof && !ev.deaf
	c.gone = true
	c.sess.cutOff()
	if sound && unix.Shutdown(ev.fd, unix.SHUT_WR) == nil {
		// Closing a socket that has unread bytes would discard the last replies.
		ev.linger = time.Now().Add(lingerTime)
		ev.events = unix.EPOLLIN
		ev.l.modify(ev.fd, ev.events)
		ev.l.timed[ev] = struct{}{}
		return
	}
	ev.close()
}

// discard reads what nobody will answer, until the client has read its last reply and closes.
func (ev *polledClient) discard() {
	var b [4096]byte
	n, errno := readFD(ev.fd, b[:])
	if errno == unix.EAGAIN || errno == unix.EINTR {
		return
	}
	if ev.unread += n; n <= 0 || ev.unread > 1<<20 {
		ev.close()
	}
}

func (ev *polledClient) close() {
	if ev.closed {
		return
	}
	ev.closed = true
	ev.l.remove(ev.fd)
	unix.Close(ev.fd) //nolint:errcheck // it is over
	delete(ev.l.timed, ev)
	ev.in.release()
	ev.taken.drop()
	ev.c.conn.Close() //nolint:errcheck // its socket was ours; the guard counts
	ev.c.forgotten()
}

// watchTime looks at the clients that a time matters to.
func (l *loop) watchTime(now time.Time) {
	for ev := range l.timed {
		switch {
		case !ev.linger.IsZero():
			if now.After(ev.linger) {
				ev.close()
			}
		case !ev.ended:
			ev.hear(now)
		default:
			delete(l.timed, ev)
		}
	}
}

// stop ends the client's stream after lastWords: what it has sent by then is still read.
func (ev *polledClient) stop() {
	ev.l.call(func() {
		if !ev.closed && ev.stopped.IsZero() {
			ev.stopped = time.Now()
			ev.heard = ev.stopped
			ev.l.timed[ev] = struct{}{}
		}
	})
}

// hear ends the stream of a client that is being stopped, when its time is over and nothing of what it said is left unread. One that was held
// back has more to say than its socket had room for, and gets longer (slowWords, heldWords).
func (ev *polledClient) hear(now time.Time) {
	since := now.Sub(ev.stopped)
	until := ev.stopped.Add(lastWords)
	if ev.heldBack && since < heldWords || ev.slow && since < slowWords {
		until = ev.heard.Add(lastWords)
	}
	if now.Before(until) {
		return
	}
	c := ev.c
	c.lock()
	defer c.unlock()
	if c.sess.full() || ev.in.ready() {
		return
	}
	if ev.read() > 0 {
		ev.heard = now
		return
	}
	if !ev.ended {
		ev.ended = true
		c.sess.end()
	}
}

// polledLane is a lane's connection on a loop. As the lane's net.Conn it can only be closed.
type polledLane struct {
	net.Conn
	la     *lane
	l      *loop
	fd     int
	gen    uint64
	in     *intake
	out    outbox // guarded by la.mu: being written
	seg    int    // guarded by la.mu: how far
	off    int    // guarded by la.mu
	left   int    // guarded by la.mu: of out
	known  bool   // guarded by la.mu: to epoll
	held   bool   // guarded by la.mu: nothing more is wanted for now
	events uint32 // guarded by la.mu: what is polled for
}

// take gives a connection of la to the loop. Caller holds la.mu.
func (l *loop) take(la *lane, c net.Conn) (net.Conn, error) {
	fd, ok := ownFD(c)
	if !ok {
		c.Close() //nolint:errcheck // of no use
		return nil, errors.New("redis: the connection has no descriptor")
	}
	p := &polledLane{la: la, l: l, fd: fd, gen: la.gen, in: newIntake(la, la.gen), events: unix.EPOLLIN}
	l.call(func() {
		la.mu.Lock()
		err := l.add(fd, p.events, p)
		p.known = true
		la.mu.Unlock()
		if err != nil {
			la.lost(p.gen, err)
		}
	})
	return p, nil
}

// Close has the loop close the socket.
func (p *polledLane) Close() error {
	p.l.call(func() {
		p.l.own.CompareAndSwap(p.la, nil) // it would keep the client alive
		if p.fd >= 0 {
			p.l.remove(p.fd)
			unix.Close(p.fd) //nolint:errcheck // it is over
			p.fd = -1
		}
	})
	return nil
}

// unread: something has come and has not been read. Caller holds la.mu, and p is the lane's connection.
func (p *polledLane) unread() bool { return unreadFD(p.fd) }

func (p *polledLane) ready(events uint32) {
	defer func() {
		if r := recover(); r != nil {
			p.l.log.Error("a lane panicked", said.Panic(r)...)
			p.la.lost(p.gen, errLaneDown)
		}
	}()
	if events&unix.EPOLLOUT != 0 {
		p.la.flush()
	}
	if events&^unix.EPOLLOUT == 0 {
		return
	}
	n, errno := readFD(p.fd, p.in.room())
	var err error
	switch {
	case errno == unix.EAGAIN || errno == unix.EINTR:
		return
	case errno != 0:
		err = errno
	case n == 0:
		err = io.EOF
	}
	p.la.hear()
	if n > 0 {
		p.la.working.Store(true)
		_, err = p.in.took(n)
		p.la.working.Store(false)
	}
	if err != nil {
		p.la.lost(p.gen, err)
	}
}

// flush writes what a lane on a loop has.
func (l *lane) flush() {
	l.mu.Lock()
	l.marked = false
	p, ok := l.conn.(*polledLane)
	if !ok {
		l.mu.Unlock()
		return
	}
	err := l.writeOut(p)
	if err == nil {
		p.pollFor()
	}
	l.mu.Unlock()
	if err != nil {
		p.l.call(func() { l.lost(p.gen, err) }) // not now: the caller may hold the lock of a session that is to be told
	}
}

// hold stops reading a lane, or begins again: there is no room for what comes.
func (l *loop) hold(la *lane, yes bool) {
	la.mu.Lock()
	defer la.mu.Unlock()
	if p, ok := la.conn.(*polledLane); ok && p.held != yes {
		p.held = yes
		p.pollFor()
	}
}

// pollFor asks epoll for what can be made use of now. Caller holds la.mu, and p is the lane's connection.
func (p *polledLane) pollFor() {
	var events uint32
	if !p.held {
		events |= unix.EPOLLIN
	}
	if p.left > 0 {
		events |= unix.EPOLLOUT
	}
	if events != p.events {
		p.events = events
		if p.known {
			p.l.modify(p.fd, events)
		}
	}
}

// writeOut writes until the socket is full or nothing is left. Caller holds mu.
func (l *lane) writeOut(p *polledLane) error {
	for {
		if p.left == 0 {
			if l.out.bytes == 0 {
				return nil
			}
			l.out.swap(&p.out)
			p.left, p.seg, p.off = p.out.bytes, 0, 0
			l.given()
		}
		for ; p.seg < len(p.out.segs); p.seg++ {
			seg := &p.out.segs[p.seg]
			for p.off < len(seg.b) {
				n, errno := writeFD(p.fd, seg.b[p.off:])
				if n > 0 {
					p.off += n
					p.left -= n
				}
				switch errno {
				case 0, unix.EINTR:
				case unix.EAGAIN:
					return nil
				default:
					return errno
				}
			}
			p.off = 0
			if !seg.open {
				seg.b = nil // a large request is its sender's again
			}
		}
	}
}

// newLoops returns the loops of a server, which must be run and stopped. lanes makes the lanes of one; nil: they have none.
func newLoops(n int, log *zap.Logger, lanes func(l laneLoop) *sharedLanes) (loops []clientLoop, err error) {
	for range n {
		l, err := newLoop(log)
		if err != nil {
			for _, l := range loops {
				go l.run()
				l.stop()
			}
			return nil, err
		}
		if lanes != nil {
			l.lanes = lanes(l)
		}
		loops = append(loops, l)
	}
	return loops, nil
}
