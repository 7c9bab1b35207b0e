package proxy

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"go.uber.org/zap"
)

// completer receives what becomes of a request that was sent on a lane. For every request exactly one of
// reply and failed is called in the end; overdue may come before. The calls come from the lane's
// goroutines or its loop, in the order of sending; they must not block.
type completer interface {
	// reply delivers one complete frame; its bytes are the lane's and valid only during the call.
	reply(tag uint64, frame []byte)
	// part delivers the beginning of a reply that is long and has not all come. true: the receiver has taken it, and the rest comes by
	// part and at last by reply; the bytes are valid only during the call. false: the reply comes whole.
	part(tag uint64, b []byte) bool
	// failed tells that no reply will come. sent: Redis may have seen the request.
	failed(tag uint64, sent bool, err error)
	// overdue tells that the deadline has passed. The reply, if it still comes, is delivered all the
	// same; the receiver tells it apart by its tag.
	overdue(tag uint64)
}

// pending is one request whose reply is due on a lane.
type pending struct {
	cb       completer
	tag      uint64
	deadline time.Time // zero: none
	late     bool      // overdue was called
}

// lane is a connection to Redis shared by many clients: requests are written in the order of send, many
// of them in one system call, and replies come back in that order, framed but not parsed.
//
// A lane with a dial function connects when it is first used and again after a failure; one without
// (the control lane, and a client's own that began as a spare) is given its connections by adopt. A loop writes and reads it, or goroutines do.
type lane struct {
	dial   func(ctx context.Context) (net.Conn, error) // static; nil: connections come by adopt
	broken func(err error)                             // static; called once for every connection that ends by itself
	// intercept sees every frame first; true: it was no reply. Static; nil on shared lanes, where pushes are nobody's.
	intercept func(frame []byte) bool
	listens   atomic.Bool // what comes may be a message also in RESP2, so that nothing is a reply before it is whole
	besides   atomic.Bool // pushes may come within a reply (framer)
	// sink, once it is set, gets what comes as it comes, until it returns false: what follows is no sequence of frames.
	sink atomic.Pointer[func(b []byte) bool]
	log  *zap.Logger

	mu      sync.Mutex
	cond    *sync.Cond   // signalled when out grows, the connection changes or the lane closes
	conn    net.Conn     // guarded by mu
	gen     uint64       // guarded by mu: number of the present connection
	out     outbox       // guarded by mu: not yet written
	queue   []pending    // guarded by mu: head at first
	first   int          // guarded by mu
	taken   int          // guarded by mu: how many of queue, from first, have been given to the socket
	closed  bool         // guarded by mu
	started bool         // guarded by mu: the writer runs
	wanted  bool         // guarded by mu: connect though nothing is to be sent
	writing bool         // guarded by mu: the writer is in a write
	asked   time.Time    // guarded by mu: since when something that the socket was given has waited
	silent  time.Time    // guarded by mu: when deaf first suspected it
	heard   atomic.Int64 // when Redis last said something here, or took a piece of a large value, Unix ns
	said    atomic.Int64 // when what is being delivered was read, monotonic
	working atomic.Bool  // what it said is being delivered
	busy    atomic.Int64 // heard, when keepAwake was told that a script is running
	done    sync.WaitGroup
	stop    context.CancelFunc
	ctx     context.Context

	loop    laneLoop // static; what writes and reads; nil: goroutines of the lane's own
	dialing bool     // guarded by mu: for the loop
	marked  bool     // guarded by mu: the loop knows that there is something to write
}

// laneLoop writes and reads lanes.
type laneLoop interface {
	// hasOutput: the lane has something to write. It is called with the lane's lock held.
	hasOutput(l *lane)
	// take returns what stands for a connection that belongs to the loop from now on. It is called with the lane's lock held.
	take(l *lane, c net.Conn) (net.Conn, error)
	// use is called before something is sent on a lane.
	use(l *lane)
	// hold stops reading a lane, or begins again.
	hold(l *lane, yes bool)
}

// maxLaneBytes bounds what may wait for one socket: a paused Redis must not grow the process by what its clients keep
// sending. 64 MiB is many milliseconds of a fast network and leaves room for a few large values.
const maxLaneBytes = 64 << 20

var (
	errLaneFull   = errors.New("redis: too much is waiting for the connection")
	errLaneDown   = &outageError{why: outBroken}
	errLaneClosed = errors.New("redis: closed")
)

func newLane(dial func(ctx context.Context) (net.Conn, error), log *zap.Logger) *lane {
	l := &lane{dial: dial, log: log}
	l.cond = sync.NewCond(&l.mu)
	l.ctx, l.stop = context.WithCancel(context.Background())
	return l
}

// send queues raw, which must be one complete command; a large one is not copied and must stay as it is until the completer is called.
// After an error nothing was queued and the completer is not called.
func (l *lane) send(raw []byte, p pending) error {
	l.mu.Lock()
	var err error
	switch {
	case l.closed:
		err = errLaneClosed
	case l.conn == nil && l.dial == nil:
		err = errLaneDown
	case l.out.bytes >= maxLaneBytes:
		err = errLaneFull
	}
	if err != nil {
		l.mu.Unlock()
		return err
	}
	if !l.atOnce(raw) {
		l.start()
		l.put(raw)
	}
	if l.first > 0 && l.first*2 > len(l.queue) { // keep the queue's memory in proportion to what waits
		n := copy(l.queue, l.queue[l.first:])
		clear(l.queue[n:])
		l.queue, l.first = l.queue[:n], 0
	}
	l.queue = append(l.queue, p)
	if l.out.bytes == 0 && !l.writing {
		l.given() // by atOnce
	}
	l.roused()
	l.mu.Unlock()
	return nil
}

// roused tells whoever writes that there is something to be written. Caller holds mu.
func (l *lane) roused() {
	if l.loop != nil {
		l.loop.hasOutput(l)
	} else {
		l.cond.Signal()
	}
}

// atOnce gives a request to the socket of a client's own connection without waiting for the writer: there is nobody to share a write with,
// and what clients do one after the other reaches Redis in that order. false: nothing was written. Caller holds mu.
func (l *lane) atOnce(raw []byte) bool {
	if l.intercept == nil || l.conn == nil || l.out.bytes > 0 || l.writing || len(raw) > chunkSize {
		return false
	}
	n := 0
	withFD(l.conn, func(fd int) { n, _ = syscall.Write(fd, raw) })
	if n <= 0 {
		return false // TLS, a full socket, or one of which the writer will see what is wrong
	}
	if n < len(raw) {
		l.start()
		l.put(raw[n:])
	}
	return true
}

// post sends what has no reply.
func (l *lane) post(raw []byte) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case l.closed:
		return errLaneClosed
	case l.out.bytes >= maxLaneBytes:
		return errLaneFull
	}
	l.start()
	l.put(raw)
	l.roused()
	return nil
}

// put queues bytes: a large request is written from where it is. Caller holds mu.
func (l *lane) put(raw []byte) {
	if len(raw) >= lendFrom {
		l.out.lend(raw)
	} else {
		l.out.add(raw)
	}
}

// start starts the writer; of a lane on a loop, what it needs is a connection. Caller holds mu.
func (l *lane) start() {
	switch {
	case l.loop != nil:
		if l.conn == nil && l.dial != nil && !l.dialing {
			l.dialing = true
			l.done.Add(1)
			go l.connectOnce()
		}
	case !l.started:
		l.started = true
		l.done.Add(1)
		go l.write()
	}
}

// connect makes a connection though nothing is to be sent.
func (l *lane) connect() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed || l.conn != nil || l.dial == nil {
		return
	}
	l.wanted = true
	l.start()
	l.roused()
}

// connectOnce dials for a lane on a loop.
func (l *lane) connectOnce() {
	defer l.done.Done()
	c, err := l.dial(l.ctx)
	l.mu.Lock()
	l.dialing = false
	if err == nil && l.closed {
		c.Close() //nolint:errcheck // closing
		err = errLaneClosed
	}
	if err == nil {
		if err = l.connected(c); err == nil {
			l.mu.Unlock()
			return
		}
	}
	failed, _ := l.takeAll()
	l.mu.Unlock()
	fail(failed, 0, err)
}

// connected makes c the connection of a lane on a loop. Caller holds mu.
func (l *lane) connected(c net.Conn) error {
	l.gen++
	l.heard.Store(time.Now().UnixNano())
	conn, err := l.loop.take(l, c)
	if err != nil {
		return err
	}
	l.conn = conn
	l.roused()
	return nil
}

// up tells whether the lane has a connection.
func (l *lane) up() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.conn != nil
}

// waiting is the number of requests without a reply.
func (l *lane) waiting() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.queue) - l.first
}

// adopt gives the lane a connection.
func (l *lane) adopt(c net.Conn) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		c.Close() //nolint:errcheck // closing
		return
	}
	if l.loop != nil {
		if l.connected(c) != nil {
			l.dial = nil // what is sent fails
		}
		return
	}
	l.gen++
	l.heard.Store(time.Now().UnixNano())
	l.conn = c
	l.done.Add(1)
	go l.read(c, l.gen)
	l.cond.Broadcast()
}

// drop ends the present connection; everything that waits fails with err.
func (l *lane) drop(err error) {
	l.mu.Lock()
	c := l.conn
	l.conn = nil
	failed, sent := l.takeAll()
	l.mu.Unlock()
	if c != nil {
		c.Close() //nolint:errcheck // given up
	}
	fail(failed, sent, err)
}

// given notes that all that waits is the socket's now. Caller holds mu.
func (l *lane) given() {
	if l.taken == 0 {
		l.asked = time.Now()
	}
	l.taken = len(l.queue) - l.first
}

// takeAll empties the queue; the first sent of it had been given to the socket. Caller holds mu.
func (l *lane) takeAll() (failed []pending, sent int) {
	failed, sent = l.queue[l.first:], l.taken
	l.queue, l.first, l.taken, l.out = nil, 0, 0, outbox{}
	return failed, sent
}

func fail(ps []pending, sent int, err error) {
	for i, p := range ps {
		p.cb.failed(p.tag, i < sent, err)
	}
}

// close ends the lane and waits for its goroutines.
func (l *lane) close() {
	l.mu.Lock()
	l.closed = true
	l.cond.Broadcast()
	l.mu.Unlock()
	l.stop()
	l.drop(errLaneClosed)
	l.done.Wait()
}

// lost handles a connection that failed by itself.
func (l *lane) lost(gen uint64, err error) {
	l.mu.Lock()
	if l.gen != gen || l.conn == nil {
		l.mu.Unlock()
		return // somebody dropped it before
	}
	c := l.conn
	l.conn = nil
	failed, sent := l.takeAll()
	l.mu.Unlock()
	c.Close() //nolint:errcheck // it is broken
	// A shared connection that nobody waited on may have been closed for idleness; whether Redis is well, the control
	// connection knows, and the next one looks which server it finds.
	if l.broken != nil && (len(failed) > 0 || l.dial == nil || l.intercept != nil || !errors.Is(err, io.EOF)) {
		l.broken(err)
	}
	fail(failed, sent, &outageError{why: classifyError(err)})
}

// fail ends the present connection as if it had broken.
func (l *lane) fail(err error) {
	l.mu.Lock()
	gen := l.gen
	l.mu.Unlock()
	l.lost(gen, err)
}

// write is the goroutine that connects and writes.
func (l *lane) write() {
	defer l.done.Done()
	var taken outbox
	for {
		l.mu.Lock()
		for !l.closed && (l.out.bytes == 0 && !l.wanted || l.conn == nil && l.dial == nil) {
			l.cond.Wait()
		}
		l.wanted = false
		if l.closed {
			l.mu.Unlock()
			return
		}
		if l.conn == nil {
			l.mu.Unlock()
			c, err := l.dial(l.ctx)
			if err != nil {
				l.mu.Lock()
				failed, _ := l.takeAll()
				l.mu.Unlock()
				fail(failed, 0, err)
				continue
			}
			l.adopt(c)
			continue
		}
		l.mu.Unlock()
		// Yield once: the clients that are ready to run add their requests to this write. Measured at 50
		// connections without a pipeline: half as much throughput again.
		runtime.Gosched()
		l.mu.Lock()
		c, gen := l.conn, l.gen
		if c == nil || l.out.bytes == 0 {
			l.mu.Unlock()
			continue
		}
		l.out.swap(&taken)
		l.given()
		l.writing = true
		l.mu.Unlock()
		for i := range taken.segs {
			seg := &taken.segs[i]
			if err := l.write1(c, seg.b); err != nil {
				l.lost(gen, err)
				break
			}
			if !seg.open {
				seg.b = nil // a large request is its sender's again
			}
		}
		l.mu.Lock()
		l.writing = false
		l.mu.Unlock()
	}
}

// piece of a large value is written at once; that Redis takes the next one shows that it is alive. Small writes show nothing: the
// socket's buffer takes them also while Redis is paused.
const piece = 4 << 20

func (l *lane) write1(c net.Conn, b []byte) error {
	whole := len(b)
	for len(b) > piece {
		if _, err := c.Write(b[:piece]); err != nil {
			return err
		}
		b = b[piece:]
		l.heard.Store(time.Now().UnixNano())
	}
	_, err := c.Write(b)
	if n := whole - len(b); n > 0 { // Redis needs a while for it, some 100 MB/s, in which it says nothing
		l.heard.Store(time.Now().Add(time.Duration(n) * 10 * time.Nanosecond).UnixNano())
	}
	return err
}

// deaf: something has waited here for longer than d while Redis said nothing, although it has spoken elsewhere since. One server answers its
// connections in turn, so this one leads nowhere (its path is gone, and nobody has told us).
func (l *lane) deaf(d time.Duration, spoke int64) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.conn == nil || l.taken == 0 || l.behind() { // what this process has not come to write is not Redis's to answer
		l.silent = time.Time{}
		return false
	}
	since := max(l.heard.Load(), l.asked.UnixNano())
	if spoke-since <= int64(d) {
		l.silent = time.Time{}
		return false
	}
	// After a pause of the whole server both speak again at nearly the same time: look once more a little later.
	if l.silent.IsZero() {
		l.silent = time.Now()
	}
	return time.Since(l.silent) > 3*quiet
}

// keepAwake has Redis say something on a connection on which it has said nothing for d and owes nothing: what is idle for longer than its
// setting "timeout" it closes, perhaps at the moment in which a client says something.
func (l *lane) keepAwake(now time.Time, d time.Duration) {
	if now.UnixNano()-l.heard.Load() < int64(d) || !l.up() || l.waiting() > 0 {
		return
	}
	_ = l.send(pingRequest, pending{cb: &awake{l}}) // a connection that has just gone needs it no more
}

// awake is told what Redis answers to keepAwake.
type awake struct{ l *lane }

func (a *awake) reply(_ uint64, frame []byte) {
	if bytes.HasPrefix(frame, []byte("-BUSY ")) {
		a.l.busy.Store(a.l.heard.Load())
	}
}
func (a *awake) failed(uint64, bool, error) {}
func (a *awake) overdue(uint64)             {}
func (a *awake) part(uint64, []byte) bool   { return false }

var pingRequest = appendCommand(nil, "PING")

// behind: Redis has said something here that has not been taken up yet, because this process is busy. Caller holds mu.
func (l *lane) behind() bool {
	if l.working.Load() {
		return true
	}
	if p, ok := l.conn.(interface{ unread() bool }); ok { // on a loop
		return p.unread()
	}
	return unreadConn(l.conn)
}

// alive: Redis has said or taken something lately.
func (l *lane) alive(now time.Time) bool { return now.UnixNano()-l.heard.Load() < int64(quiet) }

// hear looks at the clock for what has just been read.
func (l *lane) hear() {
	now := time.Now()
	l.heard.Store(now.UnixNano())
	l.said.Store(int64(now.Sub(processStart)))
}

// read is the goroutine that takes what comes on one connection.
func (l *lane) read(c net.Conn, gen uint64) {
	defer l.done.Done()
	in := newIntake(l, gen)
	for {
		n, err := c.Read(in.room())
		l.hear()
		l.working.Store(true)
		more, ferr := in.took(n)
		l.working.Store(false)
		switch {
		case !more:
			return
		case ferr != nil:
			err = ferr
		}
		if err != nil {
			l.lost(gen, err)
			return
		}
	}
}

// offer gives the beginning of a long reply to whom it is for; false: it is to come whole.
func (l *lane) offer(gen uint64, b []byte) bool {
	p, ok := l.head(gen)
	return ok && !l.listens.Load() && p.cb.part(p.tag, b)
}

// deliver gives a frame to whom it is for; false: the connection is not the lane's any more. rest: it is the rest of a reply that has been taken in parts,
// and how it begins says nothing.
func (l *lane) deliver(gen uint64, frame []byte, rest bool) bool {
	if !rest && l.intercept != nil && l.intercept(frame) {
		return true
	}
	if !rest && l.intercept == nil && frameKind(frame) == '>' {
		return true // nobody's reply; shared lanes subscribe to nothing
	}
	p, ok := l.pop(gen)
	if ok {
		p.cb.reply(p.tag, frame)
	}
	return ok
}

// intake frames what comes on one connection of a lane. Of a reply that is long the lane is offered what there is of it; if it takes that, the
// rest follows. Once the lane has a sink, that gets the bytes instead. What they are given is valid during the call only.
type intake struct {
	part       func(b []byte) bool                  // static
	each       func(b []byte, rest bool) bool       // static; rest: of a reply that part has taken
	sink       *atomic.Pointer[func(b []byte) bool] // static
	besides    *atomic.Bool                         // static
	least      int                                  // static: of buf
	f          framer
	buf        []byte
	start, end int  // of what is in buf and has not been passed on
	streams    bool // the reply that is coming is passed on in parts
	asked      bool // and whether it may be has been asked
}

// intakeRoom is what one read of a shared connection takes: small replies to a pipeline of sixteen of fifty clients, or three of 64 KiB. One
// client's own connection begins with less, for many may wait on theirs for hours.
const (
	intakeRoom    = 256 << 10
	ownIntakeRoom = 4 << 10
)

// keepIntake times what it began with a connection's buffer may stay, when what made it grow has gone.
const keepIntake = 2

func newIntake(l *lane, gen uint64) *intake {
	room := intakeRoom
	if l.intercept != nil {
		room = ownIntakeRoom
	}
	return &intake{
		least: room,
		part:  func(b []byte) bool { return l.offer(gen, b) },
		each:  func(b []byte, rest bool) bool { return l.deliver(gen, b, rest) },
		sink:  &l.sink, besides: &l.besides,
		buf: make([]byte, room),
	}
}

// room is where the next bytes are to be read to; it is never empty.
func (in *intake) room() []byte { return in.buf[in.end:] }

// took tells that n bytes have come to room. more: others are wanted; an error says that they are no frames.
func (in *intake) took(n int) (more bool, err error) {
	in.end += n
	if raw := in.sink.Load(); raw != nil && in.start < in.end {
		if !(*raw)(in.buf[in.start:in.end]) {
			return false, nil
		}
		in.start = in.end
	}
	in.f.besides = in.besides.Load()
	for in.start < in.end {
		size, err := in.f.scan(in.buf[in.start:in.end])
		if err != nil {
			return true, err
		}
		if size == 0 {
			break
		}
		frame, rest := in.buf[in.start:in.start+size], in.streams
		in.start += size
		in.streams, in.asked = false, false
		if !in.each(frame, rest) {
			return false, nil
		}
	}
	if held := in.end - in.start; in.part != nil && (in.streams && held > 0 || !in.asked && held >= chunkSize) {
		// A push is nobody's reply, and comes whole.
		if done := in.f.understood(held); done > 0 && (in.streams || in.buf[in.start] != '>') {
			in.asked = true
			if in.streams = in.part(in.buf[in.start : in.start+done]); in.streams {
				in.f.forget(done)
				in.start += done
			}
		}
	}
	in.makeRoom()
	return true, nil
}

// makeRoom sees to it that room is not empty, nor large for nothing.
func (in *intake) makeRoom() {
	switch {
	case in.start == in.end:
		in.start, in.end = 0, 0
		if len(in.buf) > keepIntake*in.least { // there are dozens of connections, and each would keep what its largest reply took
			in.buf = make([]byte, in.least)
		}
	case in.start > 0 && (in.streams || in.end == len(in.buf) && in.start >= len(in.buf)/2):
		in.end = copy(in.buf, in.buf[in.start:in.end])
		in.start = 0
	case in.end == len(in.buf):
		grown := make([]byte, 2*len(in.buf))
		in.end = copy(grown, in.buf[in.start:in.end])
		in.start, in.buf = 0, grown
	}
}

// head is the request that waits longest for a reply of connection gen.
func (l *lane) head(gen uint64) (pending, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.gen != gen || l.conn == nil || l.first == len(l.queue) {
		return pending{}, false
	}
	return l.queue[l.first], true
}

// pop takes the head of the queue for a reply of connection gen.
func (l *lane) pop(gen uint64) (pending, bool) {
	l.mu.Lock()
	if l.gen != gen || l.conn == nil {
		l.mu.Unlock()
		return pending{}, false
	}
	if l.first == len(l.queue) {
		l.mu.Unlock()
		l.lost(gen, errors.New("redis: a reply that nobody asked for"))
		return pending{}, false
	}
	p := l.queue[l.first]
	l.queue[l.first] = pending{}
	l.first++
	l.taken--
	if l.first == len(l.queue) {
		l.queue, l.first = l.queue[:0], 0
	}
	l.mu.Unlock()
	return p, true
}

// quiet: a Redis that has said something on this connection within this time is neither dead nor paused. What is late there
// waits behind a large value, and the store would not be faster.
const quiet = 100 * time.Millisecond

// expire calls overdue for every request whose deadline has passed while Redis said nothing.
func (l *lane) expire(now time.Time) int {
	var late []pending
	if l.alive(now) {
		return 0
	}
	l.mu.Lock()
	asked := false
	for i := l.first; i < len(l.queue); i++ {
		p := &l.queue[i]
		if p.deadline.IsZero() || p.late || p.deadline.After(now) {
			continue
		}
		if !asked && l.conn != nil && l.behind() {
			break // it is not Redis that is late
		}
		asked = true
		p.late = true
		late = append(late, *p)
	}
	l.mu.Unlock()
	for _, p := range late {
		p.cb.overdue(p.tag)
	}
	return len(late)
}

// ask sends requests one right behind the other and returns copies of their replies. It waits for d, or longer while Redis
// is seen to be at work here. After an error the caller must drop the connection: what was asked may still run.
func (l *lane) ask(d time.Duration, reqs ...[]byte) ([][]byte, error) {
	calls := make([]*call, len(reqs))
	for i, req := range reqs {
		calls[i] = &call{done: make(chan result, 1)}
		if err := l.send(req, pending{cb: calls[i]}); err != nil {
			return nil, err
		}
	}
	out := make([][]byte, len(reqs))
	for i, c := range calls {
		r, ok := l.await(c, d)
		switch {
		case !ok:
			return nil, &outageError{why: outTimeout}
		case r.err != nil:
			return nil, r.err
		}
		out[i] = r.frame
	}
	return out, nil
}

// await waits for what becomes of c: for d, but a Redis that is taking a large value, ours or one before it, is alive: it is given time,
// though not without end. false: the time is over.
func (l *lane) await(c *call, d time.Duration) (result, bool) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	for end := time.Now().Add(largeWait); ; timer.Reset(quiet) {
		select {
		case r := <-c.done:
			return r, true
		case now := <-timer.C:
			if !l.alive(now) || now.After(end) {
				return result{}, false
			}
		}
	}
}
