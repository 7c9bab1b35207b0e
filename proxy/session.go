package proxy

import (
	"bytes"
	"context"
	"fmt"
	"hash/maphash"
	"strconv"
	"sync/atomic"
	"time"

	cmdtab "cacheproxy/internal/command"
	"cacheproxy/internal/said"
	"cacheproxy/internal/strcmd"
	"cacheproxy/policy"
)

// session is one client's state as a machine that never blocks and does no I/O: commands come in by feed; out
// come bytes for the client (out), requests to lanes, and requests to the fill and write paths, whose
// results come back as events (reply, failed, overdue, and what async calls). Slots keep the order of replies.
//
// All methods must be called with the driver's lock held, except the three of completer, which take it.
type session struct {
	d   driver
	e   *engine
	srv *Server // for CACHEPROXY
	id  uint64
	lim sessionLimits

	proto    int
	db       int
	name     string
	lib, ver string
	authed   bool
	password string // static; "" means none is asked for
	addr     string
	laddr    string
	since    time.Time
	heard    int64        // when the last command came, Unix ns
	last     *cmdtab.Info // the last command; nil: unknown

	said      *cmdtab.Info // what resolve found last in the table, nil: nothing yet
	saidAs    []byte       // by this word
	saidClass policy.Class

	slots   []*slot // in the order of the commands; the head's reply is next
	begun   int     // how many of slots have begun; those behind wait for them
	free    []*slot // for reuse
	open    int     // slots that have begun and have no reply
	held    int     // bytes of commands and replies in slots
	typical int     // bytes of a reply, as the last ones suggest: what each open slot is expected to cost
	writes  int     // unfinished slots that may write
	walls   int     // unfinished slots that nothing may overtake
	loose   int     // unfinished slots that may touch keys they do not name
	out     outbox  // for the client
	now     int64   // the last look at the clock of whoever drives the session (monotonic)
	sending int     // bytes the driver took from out and has not sent yet
	ending  bool    // no more commands come: close when everything is answered
	over    bool    // and what has not begun is dropped (QUIT)

	loop   laneLoop     // static; what drives it, and its lanes too; nil: goroutines do
	shared *sharedLanes // static
	sided  int          // unfinished slots on the side
	mutes  bool         // what Redis says on pin is not read for now

	pin      *pin                  // the client's own connection to Redis, if it needs one
	relay    *relay                // MONITOR, SYNC: bytes go through as they are
	tx       *transaction          // since MULTI; nil outside
	watching bool                  // between WATCH and EXEC
	watched  int                   // keys named to WATCH since
	watches  []txKey               // those of them that a store knows
	rows     map[string]policy.Row // as WATCH found them, of keys that have no copy in Redis
	subs     subscriptions
	tracking tracking
	sticky   bool // CLIENT NO-EVICT and its like were said on pin
	noEvict  bool // CLIENT NO-EVICT ON
	user     *credentials
	replyOff bool // CLIENT REPLY OFF
	skip     bool // CLIENT REPLY SKIP was the last command
}

// driver is what runs a session: an event loop, or goroutines.
type driver interface {
	lock()
	unlock() // and acts on what changed: out, room, ending
	wait()   // releases the lock until something may have changed, and takes it again
}

// sessionLimits bound what one client may have in flight; reading pauses above them.
type sessionLimits struct {
	commands int // 0: 1024
	bytes    int // 0: 64 MiB
}

// slot is one command from its arrival to its reply.
type slot struct {
	s       *session // static
	tag     uint64   // rises when the slot stops waiting for a lane: a reply with an older tag is discarded
	raw     []byte   // the command, the slot's own copy
	args    [][]byte
	class   policy.Class
	counts  class   // as what it is counted
	ended   verdict // and with what
	fed     int64   // when it came, monotonic
	info    *cmdtab.Info
	keys    []cmdtab.Key
	routes  []*policy.Route // of keys; nil: not routed
	hashes  []uint64        // of keys
	routed  bool
	write   bool    // it may write routed keys: counts in session.writes
	wall    bool    // nothing may overtake it: counts in session.walls
	loose   bool    // it may touch keys that it does not name: counts in session.loose
	began   [3]bool // counted in writes, in walls, in loose
	blocks  bool    // it waits for an event that may never come
	clear   bool    // Redis has said that the client's user may run it
	mayAll  bool    // and all that a script may do
	caching byte    // what CLIENT CACHING said of it
	mute    bool    // its reply is not sent (CLIENT REPLY)
	done    bool
	reply_  []byte
	on      *lane  // where it was sent
	hit     bool   // a long reply of Redis to it is a hit
	alone   bool   // it reads keys of routes, and Redis alone answers: that is counted, and nothing else done
	big     bool   // its key is known for long replies
	side    bool   // it goes over the shared connection for what may keep Redis busy; once it has begun it counts in session.sided
	again   bool   // it has been asked twice
	apart   bool   // it goes over a connection of its own
	stream  bool   // its reply is long, and passed on while it comes
	size    int    // of what has been passed on
	parts   outbox // and what waits for its turn

	epoch   uint64
	then    func(frame []byte) // what to do with the lane's reply; nil: it is the answer
	reads   bool               // in place of then, for the many that would each need one: readReply
	local   func()             // answers if Redis cannot be asked; nil: nobody can
	answers []answer
	missing int
}

var hashSeed = maphash.MakeSeed()

func newSession(d driver, e *engine, id uint64, password, addr string, lim sessionLimits) *session {
	if lim.commands <= 0 {
		lim.commands = 1024
	}
	if lim.bytes <= 0 {
		lim.bytes = 64 << 20
	}
	return &session{d: d, e: e, shared: e.up.lanesOf(id), id: id, lim: lim, proto: 2, db: e.up.dialer.opt.DB, typical: firstTypical, password: password, authed: password == "", addr: addr, since: time.Now()}
}

// firstTypical is what a reply is thought to cost before any has come: with 64 MiB it lets 64 commands go first, and
// each small reply then doubles that within a few.
const firstTypical = 1 << 20

// full: no command may be fed now.
func (s *session) full() bool {
	return s.ending || len(s.slots) >= s.lim.commands || s.held+s.out.bytes+s.sending >= s.lim.bytes
}

// crowded: no further command may begin, for the replies of those under way would be too much. With nothing under way and
// nothing to send, one may, whatever its size.
func (s *session) crowded() bool {
	unread := s.out.bytes + s.sending
	return s.open+unread > 0 && s.held+unread+s.open*s.typical >= s.lim.bytes
}

// expect learns from the size of a reply: up at once, down by steps.
func (s *session) expect(n int) {
	if n >= s.typical {
		s.typical = n
		return
	}
	s.typical -= (s.typical - n + 3) / 4
}

// blocked: the client waits for an event that may never come.
func (s *session) blocked() bool {
	if s.relay != nil {
		return true
	}
	for _, sl := range s.slots[:s.begun] {
		if !sl.done && sl.blocks {
			return true
		}
	}
	return false
}

// farewell is the reply to a breach of the protocol: it comes after everything that was well-formed.
func (s *session) farewell(text string) {
	s.e.stats.protocolErrors.Add(1)
	sl := &slot{s: s, done: true, reply_: []byte(text)}
	s.held += len(text)
	s.slots = append(s.slots, sl)
	s.settle()
}

// end: no more commands come. What was fed is answered; nobody is waited for who waits for an event.
func (s *session) end() {
	s.ending = true
	if s.blocked() {
		s.cutOff()
	}
	s.settle()
}

// cutOff ends the session with what is answered by now.
func (s *session) cutOff() {
	s.leave()
	s.ending, s.over = true, true
	n := 0
	for n < len(s.slots) && s.slots[n].done {
		n++
	}
	s.drop(n)
	s.begun = min(s.begun, n)
}

// drop forgets the slots from n on.
func (s *session) drop(n int) {
	for i, sl := range s.slots[n:] {
		sl.tag++
		s.held -= len(sl.raw) + sl.parts.bytes
		sl.parts.drop()
		if sl.done {
			s.held -= len(sl.reply_)
		} else if n+i < s.begun {
			s.open--
			if sl.side {
				s.sided--
			}
		}
		s.undo(sl)
	}
	clear(s.slots[n:])
	s.slots = s.slots[:n]
}

// idle: everything has been answered.
func (s *session) idle() bool { return len(s.slots) == 0 }

// feed takes the next command; its bytes are copied.
func (s *session) feed(cmd command) {
	var sl *slot
	if n := len(s.free); n > 0 {
		sl, s.free = s.free[n-1], s.free[:n-1]
	} else {
		sl = &slot{s: s}
	}
	sl.take(cmd)
	sl.fed = s.now
	s.heard = s.e.up.clock.Load()
	s.held += len(sl.raw)
	s.slots = append(s.slots, sl)
	s.e.stats.commands.Add(1)
	s.settle()
}

// take fills a fresh or recycled slot. The arguments are views into the slot's own bytes.
func (sl *slot) take(cmd command) {
	sl.tag++ // what was still due to the command before this one is discarded
	sl.args, sl.keys, sl.routes, sl.hashes = sl.args[:0], sl.keys[:0], sl.routes[:0], sl.hashes[:0]
	sl.reply_, sl.answers = sl.reply_[:0], sl.answers[:0]
	sl.info, sl.class, sl.then, sl.local = nil, 0, nil, nil
	sl.routed, sl.write, sl.wall, sl.loose, sl.done = false, false, false, false, false
	sl.blocks, sl.clear, sl.mute, sl.caching, sl.on = false, false, false, 0, nil
	sl.side, sl.again, sl.mayAll = false, false, false
	sl.counts, sl.ended = classOther, verdictOK
	sl.alone = false
	sl.reads, sl.hit, sl.big, sl.apart, sl.stream, sl.size = false, false, false, false, false, 0
	sl.began = [3]bool{}
	if cmd.owned {
		sl.raw, sl.args = cmd.raw, cmd.args
		return
	}
	sl.raw = append(sl.raw[:0], cmd.raw...)
	// raw is canonical, "*<args>\r\n" and then "$<n>\r\n<bytes>\r\n" for each: the lengths tell where they are.
	at := 1 + digits(len(cmd.args)) + 2
	for _, a := range cmd.args {
		at += 1 + digits(len(a)) + 2
		sl.args = append(sl.args, sl.raw[at:at+len(a)])
		at += len(a) + 2
	}
	if at != len(sl.raw) {
		panic("a command that is not in its canonical form")
	}
}

// digits of n in decimal.
func digits(n int) int {
	d := 1
	for ; n >= 10; n /= 10 {
		d++
	}
	return d
}

// start plans and begins a command; false: it must wait until what it must not overtake is done.
func (s *session) start(sl *slot) bool {
	if sl.info == nil {
		s.resolve(sl)
	}
	s.last, sl.side = sl.info, false
	if !s.authed && !allowedBeforeAuth(sl.args[0]) {
		s.answer(sl, "-NOAUTH Authentication required.\r\n")
		return true
	}
	if why := s.denial(sl); why != nil {
		return s.refuse(sl, why)
	}
	if s.relay != nil {
		if !s.allDone() {
			return false
		}
		s.relayed(sl)
		return true
	}
	if s.tx != nil && !endsMulti(sl.args) {
		return s.queue(sl)
	}
	if s.mustWait(sl) {
		return false
	}
	if sl.side {
		s.sided++
	}
	if s.ending && sl.info != nil && sl.info.Flags&cmdtab.Blocking != 0 {
		s.cutOff() // the client hung up before this began to wait
		return false
	}
	if s.user != nil && s.needsLeave(sl) {
		s.askLeave(sl)
		return true
	}
	s.dispatch(sl)
	return true
}

// resolve finds the command's row and class. Clients say the same word many times, and then the two tables need not be asked again.
func (s *session) resolve(sl *slot) {
	if s.said != nil && bytes.Equal(sl.args[0], s.saidAs) {
		sl.info, sl.class = s.said, s.saidClass
		return
	}
	sl.info = s.e.resolve(sl.args)
	sl.class = policy.ClassOf(sl.args[0])
	if cmdtab.Static(sl.info) { // others come and go with the server that told of them, or are not known by one word
		s.said, s.saidClass, s.saidAs = sl.info, sl.class, append(s.saidAs[:0], sl.args[0]...)
	}
}

// dispatch begins a command that need not wait.
func (s *session) dispatch(sl *slot) {
	if s.confined(sl) {
		s.sendOn(s.pin.lane, sl, false)
		return
	}
	sl.caching, s.tracking.caching = s.tracking.caching, 0
	switch sl.class {
	case policy.Own:
		s.own(sl)
	case policy.Session:
		s.sessionCommand(sl)
	case policy.Pinning:
		s.pinning(sl)
	case policy.Flush:
		s.flush(sl)
	case policy.Keyspace:
		s.keyspace(sl)
	case policy.Passthrough:
		if sl.info == infoRow {
			s.info(sl)
			return
		}
		sl.counts = classPlain
		s.forward(sl)
	default:
		s.keyed(sl)
	}
}

// locate finds keys and routes of a command, once.
func (s *session) locate(sl *slot) {
	if len(sl.keys) > 0 || sl.class == policy.Passthrough {
		return
	}
	keys, ok := cmdtab.Keys(sl.info, sl.args, sl.keys)
	if !ok {
		return
	}
	sl.keys = keys
	router := s.e.router.Load()
	home := s.atHome()
	for _, k := range keys {
		name := sl.args[k.Arg]
		var r *policy.Route
		if home {
			r = router.Match(name)
		}
		sl.routes = append(sl.routes, r)
		sl.hashes = append(sl.hashes, maphash.Bytes(hashSeed, name))
		sl.routed = sl.routed || r != nil
		sl.write = sl.write || k.Write && r != nil && r.Phase.Rules().UsesStore
	}
}

// mustWait tells whether an earlier command of this client must be done first: effects on one key come in order,
// and some commands speak of everything before them.
func (s *session) mustWait(sl *slot) bool {
	if s.walls > 0 {
		return true // before anything is looked at: SELECT, AUTH and their like change what it means
	}
	// The order of a client's commands holds on one connection: between the two that it shares, all before must be answered.
	side := mayKeepBusy(sl.info) && !s.needsPin()
	sl.side = side
	if side && s.open-1 > s.sided || !side && s.sided > 0 {
		return true
	}
	switch sl.class {
	case policy.Own, policy.Session, policy.Pinning, policy.Flush, policy.Keyspace:
		sl.wall = true
	case policy.Passthrough:
	default:
		s.locate(sl)
		if sl.info == nil || sl.info.Flags&cmdtab.Blocking != 0 {
			sl.wall = true
		}
	}
	if mixed(sl.routes) {
		// Its keys are asked for one by one, some of them after a miss:
		//	1 MGET plain routed is sent and misses    2 SET plain is sent behind it    3 both keys are looked up: plain is there
		sl.wall = true
	}
	sl.big = s.e.up.big.any(sl.hashes)
	sl.apart = len(sl.raw) > largeCommand || sl.big || ownConnection(sl.info) || s.e.up.pauses(sl.info)
	if sl.apart || s.user != nil {
		sl.wall = true // it goes over a connection of its own, or is asked about first
	}
	before := s.slots[:s.begun]
	if sl.wall {
		return len(before) > 0
	}
	// Without keys it may still speak of them: PUBLISH after SET, a script that makes its keys up.
	// With keys too: SORT key BY weight_*.
	sl.loose = sl.info == nil || len(sl.keys) == 0 && sl.info.Flags&(cmdtab.Fast|cmdtab.Readonly) == 0 || sl.info.Flags&cmdtab.PubSub != 0 || namesPart(sl.info)
	if s.writes == 0 && !sl.write {
		return false // the common case: nothing in flight changes anything
	}
	if sl.write && s.loose > 0 || sl.loose && s.writes > 0 {
		return true
	}
	if len(sl.keys) == 0 {
		return false
	}
	if !sl.routed && sl.info.Flags&cmdtab.Write != 0 {
		return s.writes > 0 // LPUSH queue after SET value: whoever pops it may read the value
	}
	for _, b := range before {
		if b.done || !b.write && !sl.write {
			continue
		}
		for _, h := range b.hashes {
			for _, mine := range sl.hashes {
				if h == mine {
					return true
				}
			}
		}
	}
	return false
}

// mayKeepBusy: it runs what a client has written, which may take for ever.
func mayKeepBusy(info *cmdtab.Info) bool {
	return runsScript(info) || info != nil && (info.Name == "eval_ro" || info.Name == "evalsha_ro" || info.Name == "fcall_ro")
}

// namesPart: the command reads keys that it does not name.
func namesPart(info *cmdtab.Info) bool {
	for i := range info.Specs {
		if info.Specs[i].Begin == cmdtab.BeginUnknown {
			return true
		}
	}
	return false
}

// mixed: some of the keys may be in a store and some cannot.
func mixed(routes []*policy.Route) bool {
	with, without := false, false
	for _, r := range routes {
		if r != nil && r.Phase.Rules().UsesStore {
			with = true
		} else {
			without = true
		}
	}
	return with && without
}

// begin counts a slot that is under way; what it is may have changed since the last time.
func (s *session) begin(sl *slot) {
	s.undo(sl)
	sl.began = [3]bool{sl.write, sl.wall, sl.loose}
	s.tally(sl, 1)
}

// undo takes back begin.
func (s *session) undo(sl *slot) {
	s.tally(sl, -1)
	sl.began = [3]bool{}
}

func (s *session) tally(sl *slot, by int) {
	if sl.began[0] {
		s.writes += by
	}
	if sl.began[1] {
		s.walls += by
	}
	if sl.began[2] {
		s.loose += by
	}
}

// keyed begins a command that names keys.
func (s *session) keyed(sl *slot) {
	sl.counts = classPlain
	if sl.routed {
		sl.counts = countedAs(sl.class)
	}
	if sl.info == nil {
		s.unknown(sl)
		return
	}
	if r := s.crosses(sl); r != nil {
		s.answerClear(sl, &refusal{"DENIED", fmt.Sprintf("keys of route %s (%s) cannot be brought in from another database; use GET and SET", r.Name, r.Phase)})
		return
	}
	store := false
	for _, r := range sl.routes {
		if r != nil && r.Phase.Rules().UsesStore {
			store = true
		}
	}
	if !store {
		sl.alone = sl.routed && sl.class == policy.ReadThrough
		s.plain(sl)
		return
	}
	if sl.class != policy.ReadThrough {
		if r := s.unfit(sl); r != nil {
			s.answerClear(sl, notJSON(r))
			return
		}
	}
	switch sl.class {
	case policy.ReadThrough:
		if s.tracks(sl) {
			s.readTracked(sl)
			return
		}
		s.read(sl)
	case policy.Write:
		s.change(sl)
	case policy.LoadPass:
		s.loadPass(sl)
	default:
		writes := false
		for _, k := range sl.keys {
			writes = writes || k.Write
		}
		if !writes {
			s.loadPass(sl)
			return
		}
		s.loadRunMirror(sl)
	}
}

// crosses names the route of a key that MOVE or COPY would bring from another database into the routed one: it would come in
// behind the store's back. The other direction is a matter of the source alone.
func (s *session) crosses(sl *slot) *policy.Route {
	if s.atHome() {
		return nil
	}
	target := []byte(nil)
	switch {
	case foldEqual(sl.args[0], "move") && len(sl.args) == 3:
		target = sl.args[2]
	case foldEqual(sl.args[0], "copy"):
		for i := 3; i+1 < len(sl.args); i++ {
			if foldEqual(sl.args[i], "db") {
				target = sl.args[i+1]
			}
		}
	}
	if n, err := strconv.Atoi(string(target)); err != nil || n != s.e.up.dialer.opt.DB {
		return nil
	}
	router := s.e.router.Load()
	for _, k := range sl.keys {
		if r := router.Match(sl.args[k.Arg]); r != nil && r.Phase.Rules().UsesStore {
			return r
		}
	}
	return nil
}

// plain forwards a command whose keys no store knows.
func (s *session) plain(sl *slot) {
	if !sl.routed {
		s.e.stats.unrouted.Add(1)
	}
	s.forward(sl)
}

// largeCommand: what is larger takes a connection of its own, so that no other client waits behind it.
const largeCommand = 1 << 20

// ownConnection: these end a script that keeps Redis busy, or a pause, and must not stand in a queue behind it.
func ownConnection(info *cmdtab.Info) bool {
	if info == nil || info.Flags&cmdtab.AllowBusy == 0 {
		return false
	}
	switch info.Name {
	case "script|kill", "function|kill", "function|stats", "shutdown", "client|unpause":
		return true
	}
	return false
}

// forward sends a command to Redis as it is.
func (s *session) forward(sl *slot) {
	if sl.info != nil && sl.info.Name == "script|debug" && len(sl.args) == 3 && !foldEqual(sl.args[2], "no") {
		s.debugScripts(sl)
		return
	}
	if ownConnection(sl.info) && s.pin == nil {
		// Redis may be busy and refuse a SELECT, and its database does not matter: the connection is for this command only.
		who := s.identity()
		who.anyDB = true
		s.pinAs(who)
		then := sl.then
		sl.then = func(frame []byte) {
			s.dropPin()
			if then != nil {
				then(frame)
				return
			}
			s.finish(sl, frame)
		}
		s.sendOn(s.pin.lane, sl, false)
		return
	}
	if sl.apart || sl.info != nil && sl.info.Flags&cmdtab.Blocking != 0 {
		s.takePin()
		s.sendOn(s.pin.lane, sl, false)
		return
	}
	s.send(sl, sl.routed && !s.needsPin())
}

// debugScripts passes SCRIPT DEBUG on: it changes what the next EVAL on its connection does. Redis wants it to come alone.
func (s *session) debugScripts(sl *slot) {
	s.takePin()
	raw := sl.raw
	sl.then = func([]byte) {
		s.sticky = true
		s.send(sl, false)
	}
	sl.raw = appendCommand(nil, "PING")
	s.sendOn(s.pin.lane, sl, false)
	sl.raw = raw
}

// lane is where this client's commands go.
func (s *session) lane() *lane {
	if s.needsPin() {
		s.takePin()
	} else if s.pin != nil && s.pin.waiting() == 0 {
		s.dropPin() // it was for one command
	}
	if s.pin != nil {
		return s.pin.lane
	}
	return s.shared.main[s.proto-2]
}

// send puts a command on the client's lane. Commands on routed keys have a deadline (P8), others have none of ours.
func (s *session) send(sl *slot, bounded bool) {
	l := s.lane()
	if sl.side && s.pin == nil {
		l = s.shared.side[s.proto-2]
	}
	s.sendOn(l, sl, bounded)
}

func (s *session) sendOn(l *lane, sl *slot, bounded bool) {
	s.begin(sl)
	sl.on = l
	sl.blocks = s.tx == nil && sl.info != nil && sl.info.Flags&cmdtab.Blocking != 0
	if sl.blocks && s.ending {
		s.cutOff() // the client hung up while the keys were loaded, or the right to them was asked for
		return
	}
	if l.intercept == nil && s.e.up.gone() && !l.up() { // a client's own finds out for itself: Redis may only be busy
		s.lost(sl, false)
		return
	}
	sl.epoch = s.e.up.epoch.Load()
	p := pending{cb: sl, tag: sl.tag}
	if bounded {
		p.deadline = time.Now().Add(s.e.cfg.Redis.Timeout)
		if sl.class != policy.ReadThrough {
			// Nobody else can answer, so a Redis that is only busy (a SORT, a script) gets the time that any command of its has.
			p.deadline = time.Now().Add(s.e.generic.runTimeout())
		}
	}
	if s.loop != nil {
		s.loop.use(l)
	}
	if err := l.send(sl.raw, p); err != nil {
		s.lost(sl, false)
		return
	}
	if bounded && s.pin != nil {
		s.e.up.mind(l)
	}
}

// event runs f, which is what has become of sl since it had this tag. A slot that was answered otherwise has moved on.
// All that reaches a session from another goroutine comes through here.
func (s *session) event(sl *slot, tag uint64, f func()) { s.happens(sl, tag, false, f) }

// happens is event. said: it is what the slot's lane has read, and then the lane has looked at the clock already, for all that came in that read.
func (s *session) happens(sl *slot, tag uint64, said bool, f func()) {
	s.d.lock()
	defer s.d.unlock()
	defer s.survive()
	if sl.tag != tag || sl.done {
		return
	}
	if said {
		s.now = sl.on.said.Load()
	} else {
		s.now = monotonic()
	}
	f()
	s.settle()
}

// reply is the lane's answer (completer).
func (sl *slot) reply(tag uint64, frame []byte) {
	s := sl.s
	s.happens(sl, tag, true, func() {
		sl.tag++
		if sl.stream {
			s.streamed(sl, frame)
			s.close(sl)
			return
		}
		s.expect(len(frame))
		if sl.big && len(frame) < chunkSize {
			s.e.up.big.forget(sl.hashes) // it was large once
		}
		if sl.reads {
			sl.reads = false
			s.readReply(sl, frame)
			return
		}
		if then := sl.then; then != nil {
			sl.then = nil
			then(frame)
			return
		}
		if sl.routed {
			if why := classifyReply(frame); why.dead() && why != outAuth {
				s.e.up.suspect(why)
			}
		}
		if sl.alone {
			s.countReply(sl, frame)
		}
		s.finish(sl, frame)
	})
}

// part is the beginning of the lane's answer (completer).
func (sl *slot) part(tag uint64, b []byte) (taken bool) {
	taken = true // of a slot that has moved on: it goes nowhere
	s := sl.s
	s.happens(sl, tag, true, func() {
		if !sl.stream {
			if taken = sl.streams(); !taken {
				return
			}
			sl.stream, sl.reads, sl.then = true, false, nil
			if sl.hit || sl.alone {
				s.count(sl, fromRedis)
			}
		}
		s.streamed(sl, b)
	})
	return taken
}

// streams: a long reply to this command needs no look at its end. That it is long says that it is no error and no null.
func (sl *slot) streams() bool {
	return sl.then == nil && !sl.reads || sl.hit && sl.epoch == sl.s.e.up.epoch.Load()
}

// streamed passes on a part of a reply.
func (s *session) streamed(sl *slot, b []byte) {
	if before := sl.size; before < largeReply && before+len(b) >= largeReply {
		s.e.up.big.note(sl.hashes)
		s.expect(largeReply)
	}
	sl.size += len(b)
	if sl.mute {
		return
	}
	sl.parts.addChunks(b)
	s.held += len(b)
	if s.slots[0] == sl {
		s.passOn(sl)
	}
}

// passOn moves what has come of a reply to the client.
func (s *session) passOn(sl *slot) {
	s.held -= sl.parts.bytes
	s.out.take(&sl.parts)
}

// largeReply: the next command on its key takes a connection of its own, so that no other client waits behind it. A megabyte takes
// a millisecond on a fast network, which is as long as anything should wait.
const largeReply = 1 << 20

// bigKeys remembers the keys of large replies, by their hashes. It is small and forgets: a key that it does not know costs other
// clients one wait, a wrong one costs a connection.
type bigKeys struct {
	some atomic.Bool // any were noted at all
	at   [1024]atomic.Uint64
}

func (k *bigKeys) note(hashes []uint64) {
	for _, h := range hashes {
		k.some.Store(true)
		k.at[h%uint64(len(k.at))].Store(h)
	}
}

func (k *bigKeys) any(hashes []uint64) bool {
	if !k.some.Load() {
		return false
	}
	for _, h := range hashes {
		if k.at[h%uint64(len(k.at))].Load() == h {
			return true
		}
	}
	return false
}

func (k *bigKeys) forget(hashes []uint64) {
	for _, h := range hashes {
		k.at[h%uint64(len(k.at))].CompareAndSwap(h, 0)
	}
}

// survive ends this client, not the process, when an event on its data panics.
func (s *session) survive() {
	if p := recover(); p != nil {
		s.e.log.Error("a session panicked", said.Panic(p)...)
		s.cutOff()
		s.slots, s.begun = nil, 0
	}
}

// failed: the lane broke (completer).
func (sl *slot) failed(tag uint64, sent bool, _ error) {
	sl.s.event(sl, tag, func() {
		sl.tag++
		if s := sl.s; s.repeats(sl) {
			s.repeat(sl, sent)
			return
		}
		sl.s.lost(sl, sent)
	})
}

// repeats: a shared connection broke, and the command, which only reads, may be asked once more on another one. Not if a command of this client that may
// have changed something went behind it: its answer would come from after that one.
func (s *session) repeats(sl *slot) bool {
	if sl.again || sl.stream || s.ending || s.pin != nil || sl.local != nil || sl.info == nil || sl.info.Flags&cmdtab.Readonly == 0 {
		return false
	}
	if sl.class == policy.ReadThrough && firstRoute(sl.routes) != nil && s.fallsBack(sl) {
		return false // the store is asked
	}
	after := false // those that have begun after it are looked at
	for _, b := range s.slots[:s.begun] {
		if after && b.info != nil && b.info.Flags&cmdtab.Readonly == 0 {
			return false
		}
		after = after || b == sl
	}
	return true
}

// repeat asks again when it is known that only the connection was lost, and not Redis. Nothing overtakes it meanwhile.
func (s *session) repeat(sl *slot, sent bool) {
	sl.again, sl.wall = true, true
	s.begin(sl)
	tag := sl.tag
	s.e.wg.Go(func() {
		back := s.e.up.returns()
		s.event(sl, tag, func() {
			if !back || s.ending {
				sl.tag++
				s.lost(sl, sent)
				return
			}
			s.send(sl, sl.routed && !s.needsPin())
		})
	})
}

// overdue: the bounded wait is over (completer).
func (sl *slot) overdue(tag uint64) {
	sl.s.event(sl, tag, func() {
		if sl.stream {
			return // it has begun to come
		}
		sl.tag++
		sl.s.lost(sl, true)
	})
}

// lost decides what becomes of a command that Redis did not answer.
func (s *session) lost(sl *slot, sent bool) {
	if sl.stream {
		s.cutOff() // the client has the beginning of a reply that has no end
		return
	}
	if s.pin != nil && sl.on == s.pin.lane {
		s.unpinned()
	}
	sl.then, sl.reads = nil, false
	route := firstRoute(sl.routes)
	if sl.local != nil {
		sl.local()
		return
	}
	if sl.class == policy.ReadThrough && route != nil && s.fallsBack(sl) {
		s.fetch(sl, nil)
		return
	}
	if sent && !harmless(sl) {
		s.answerClear(sl, s.e.stats.unsure(route, "the connection to Redis broke"))
		return
	}
	s.answerClear(sl, unavailable(route, "redis cannot be reached"))
}

// harmless: to run it, or not, or twice, makes no difference to anybody.
func harmless(sl *slot) bool {
	if sl.info == nil {
		return false
	}
	f := sl.info.Flags
	return f&cmdtab.Readonly != 0 || f&cmdtab.Fast != 0 && f&(cmdtab.Write|cmdtab.PubSub|cmdtab.Admin) == 0
}

// fallsBack: the store answers for every key of this read while Redis is down.
func (s *session) fallsBack(sl *slot) bool {
	for _, r := range sl.routes {
		if r == nil || r.Phase.Rules().RedisDownRead != policy.FromStore && r.Phase.Rules().RedisDownRead != policy.NoEffect {
			return false
		}
	}
	return true
}

// read begins a read-through command.
func (s *session) read(sl *slot) {
	if bad := strcmd.Check(sl.args, strcmd.Env{Proto: s.proto}); bad != nil {
		s.finish(sl, bad)
		return
	}
	ask := true
	for i, r := range sl.routes {
		if r == nil || !r.Phase.Rules().ReadsStore {
			continue
		}
		if !r.Phase.Rules().ReadsRedis || !s.e.up.trusted() || s.e.journal.staleRedisBytes(sl.args[sl.keys[i].Arg]) {
			ask = false
			break
		}
	}
	if !ask {
		s.begin(sl)
		s.fetch(sl, nil)
		return
	}
	sl.reads = true
	switch lowerFirst(sl.args[0]) {
	case 'g', 's': // GET, GETRANGE, STRLEN, SUBSTR
		sl.hit = true
	}
	if sl.big {
		s.takePin()
		s.sendOn(s.pin.lane, sl, true)
		return
	}
	s.send(sl, true)
}

// readReply looks at what Redis answered to a read-through command: a hit is passed on unparsed.
func (s *session) readReply(sl *slot, frame []byte) {
	if isError(frame) {
		why := classifyReply(frame)
		if why.dead() && why != outAuth {
			s.e.up.suspect(why)
			if s.fallsBack(sl) {
				s.fetch(sl, nil)
				return
			}
		}
		s.finish(sl, frame)
		return
	}
	if sl.epoch != s.e.up.epoch.Load() && s.fallsBack(sl) {
		s.fetch(sl, nil) // trust was lost while the command was on its way
		return
	}
	if !lacks(sl.args, frame) {
		s.count(sl, fromRedis)
		if share := s.e.shadow.share.Load(); share != 0 && len(frame) < largeReply {
			s.sample(sl, share)
		}
		s.finish(sl, frame)
		return
	}
	s.fetch(sl, frame)
}

// lacks tells whether a reply says, or leaves possible, that Redis lacks a key.
func lacks(args [][]byte, frame []byte) bool {
	switch name := args[0]; lowerFirst(name) {
	case 'g', 's':
		if foldEqual(name, "get") {
			return isNull(frame)
		}
		if foldEqual(name, "strlen") {
			return bytes.Equal(frame, []byte(":0\r\n"))
		}
		return bytes.Equal(frame, []byte("$0\r\n\r\n")) // GETRANGE, SUBSTR
	case 'm': // MGET
		return bytes.Contains(frame, []byte("$-1\r\n")) || bytes.Contains(frame, []byte("_\r\n"))
	case 'e':
		if foldEqual(name, "exists") {
			n, _ := parseInt(frame)
			return n < int64(len(args)-1)
		}
		return bytes.Equal(frame, []byte(":-2\r\n")) // EXPIRETIME
	default: // TTL, PTTL, TYPE, PEXPIRETIME
		return bytes.Equal(frame, []byte(":-2\r\n")) || bytes.Equal(frame, []byte("+none\r\n"))
	}
}

func lowerFirst(b []byte) byte { return b[0] | 0x20 }

// fetch finds the keys one by one. frame, if not nil, is what Redis answered to the whole command: of an MGET it
// spares the keys that were hits.
func (s *session) fetch(sl *slot, frame []byte) {
	sl.answers = sl.answers[:0]
	var had [][]byte
	if frame != nil && foldEqual(sl.args[0], "mget") {
		had, _ = elements(frame, nil)
	}
	e := s.e
	sl.missing = len(sl.keys)
	tag := sl.tag
	for range sl.keys {
		sl.answers = append(sl.answers, answer{})
	}
	for i, k := range sl.keys {
		if i < len(had) && !isNull(had[i]) {
			v, _ := bulk(had[i])
			sl.answers[i] = answer{from: fromRedis, exists: true, value: bytes.Clone(v), ttl: -1, expiresAt: -1}
			sl.missing--
			continue
		}
		r := sl.routes[i]
		name := string(sl.args[k.Arg])
		got := func(a answer) {
			s.event(sl, tag, func() {
				sl.answers[i] = a
				if sl.missing--; sl.missing == 0 {
					s.compose(sl)
				}
			})
		}
		if r == nil || !r.Phase.Rules().ReadsStore {
			e.wg.Add(1)
			go func() {
				defer e.wg.Done()
				got(e.peek(name, r))
			}()
			continue
		}
		direct := !r.Phase.Rules().ReadsRedis || !e.up.trusted() || e.journal.staleRedis(name)
		e.fill.get(policy.Ref{Route: r.Name, Key: name}, r, direct, got)
	}
	if sl.missing == 0 {
		s.compose(sl)
	}
}

// compose answers a read-through command from what its keys hold.
func (s *session) compose(sl *slot) {
	values := make([]strcmd.Value, len(sl.answers))
	for i, a := range sl.answers {
		if a.fail != nil {
			s.answerClear(sl, a.fail)
			return
		}
		values[i] = strcmd.Value{Exists: a.exists, Other: a.other != "", OtherType: a.other, Data: a.value, TTL: a.ttl, ExpireAt: a.expiresAt}
		if r := sl.routes[i]; r != nil {
			s.e.stats.route(r.Name).read(a.from)
			if share := s.e.shadow.share.Load(); share != 0 && a.from == fromRedis && r.Phase.Rules().UsesStore && len(a.value) < largeReply {
				s.e.shadow.take(share, r, sl.args[sl.keys[i].Arg])
			}
		}
	}
	reply, _ := strcmd.Eval(sl.reply_[:0], sl.args, values, strcmd.Env{NowMS: time.Now().UnixMilli(), Proto: s.proto}, nil)
	sl.reply_ = reply
	sl.ended = verdictOf(reply)
	s.close(sl)
}

// count notes a read that one source answered whole.
func (s *session) count(sl *slot, from source) {
	for _, r := range sl.routes {
		if r != nil {
			s.e.stats.route(r.Name).read(from)
		}
	}
}

// countReply notes what Redis alone has answered to a read of keys of routes.
func (s *session) countReply(sl *slot, frame []byte) {
	switch {
	case isError(frame):
		return
	case !lacks(sl.args, frame):
		s.count(sl, fromRedis)
		return
	}
	var each [][]byte
	n := int64(0) // of EXISTS, which does not tell of which: keys of one route as a rule
	switch {
	case foldEqual(sl.args[0], "mget"):
		each, _ = elements(frame, nil)
	case foldEqual(sl.args[0], "exists"):
		n, _ = parseInt(frame)
	}
	for i, r := range sl.routes {
		from := fromNone
		if i < len(each) && !isNull(each[i]) || int64(i) < n {
			from = fromRedis
		}
		if r != nil {
			s.e.stats.route(r.Name).read(from)
		}
	}
}

// change begins a write that the proxy evaluates.
func (s *session) change(sl *slot) {
	if bad := strcmd.Check(sl.args, strcmd.Env{NowMS: time.Now().UnixMilli(), Proto: s.proto}); bad != nil {
		if newerSet(sl.args) {
			s.loadRunMirror(sl)
			return
		}
		s.finish(sl, bad)
		return
	}
	s.begin(sl)
	mode, mixed := writeMode(sl.routes)
	if mixed {
		s.split(sl)
		return
	}
	op := &writeOp{args: sl.args, mode: mode, proto: s.proto, routes: sl.routes}
	for i, k := range sl.keys {
		op.keys = append(op.keys, policy.Ref{Route: sl.routes[i].Name, Key: string(sl.args[k.Arg])})
		s.e.stats.route(sl.routes[i].Name).writes.Add(1)
	}
	tag := sl.tag
	op.done = func(reply []byte, pass bool) {
		s.event(sl, tag, func() {
			sl.tag++
			if pass {
				s.forward(sl)
			} else {
				s.noteRefusal(op.routes[0], reply)
				s.finish(sl, reply)
			}
		})
	}
	s.e.write.submit(op)
}

// writeMode is the mode that all keys share; mixed: they do not.
func writeMode(routes []*policy.Route) (mode policy.WriteMode, mixed bool) {
	mode = policy.WriteRedisOnly
	for i, r := range routes {
		m := policy.WriteRedisOnly
		if r != nil {
			m = r.Phase.Rules().Write
		}
		if m == policy.WriteStoreOnly {
			m = policy.WriteBoth // one path: each key's route says whether Redis gets a copy
		}
		if i > 0 && m != mode {
			return mode, true
		}
		mode = m
	}
	return mode, false
}

// split runs a write whose keys are written in different ways as one command for each way, one after
// the other. What Redis would have done at once is no longer atomic: the price of routes that stand in different phases.
func (s *session) split(sl *slot) {
	step := 1
	if foldEqual(sl.args[0], "mset") {
		step = 2
	}
	type part struct {
		op    *writeOp
		plain []string
	}
	parts := map[policy.WriteMode]*part{}
	var order []policy.WriteMode
	for i, k := range sl.keys {
		r := sl.routes[i]
		mode, _ := writeMode([]*policy.Route{r})
		p := parts[mode]
		if p == nil {
			p = &part{op: &writeOp{args: [][]byte{sl.args[0]}, mode: mode, proto: 2}, plain: []string{string(sl.args[0])}}
			parts[mode] = p
			order = append(order, mode)
		}
		for _, a := range sl.args[k.Arg : k.Arg+step] {
			p.op.args = append(p.op.args, a)
			p.plain = append(p.plain, string(a))
		}
		if r != nil {
			p.op.keys = append(p.op.keys, policy.Ref{Route: r.Name, Key: string(sl.args[k.Arg])})
			p.op.routes = append(p.op.routes, r)
			s.e.stats.route(r.Name).writes.Add(1)
		}
	}
	run := func() []byte {
		sum, ints := int64(0), false
		for _, mode := range order {
			p := parts[mode]
			var reply []byte
			if mode == policy.WriteRedisOnly {
				var err error
				if reply, err = s.e.up.roundTrip(context.Background(), appendCommand(nil, p.plain...)); err != nil && reply == nil {
					return s.e.stats.unsure(nil, "the connection to Redis broke").reply(nil)
				}
			} else {
				ch := make(chan []byte, 1)
				p.op.done = func(b []byte, _ bool) { ch <- bytes.Clone(b) }
				s.e.write.submit(p.op)
				reply = <-ch
			}
			if isError(reply) {
				return reply
			}
			if n, ok := parseInt(reply); ok {
				sum, ints = sum+n, true
			}
		}
		if ints {
			return appendInt(nil, sum)
		}
		return []byte("+OK\r\n")
	}
	route := firstRoute(sl.routes)
	s.async(sl, func() []byte {
		reply := run()
		s.noteRefusal(route, reply)
		return reply
	})
}

// async runs f in a goroutine; its result is the slot's reply. begin must have been called.
func (s *session) async(sl *slot, f func() []byte) {
	tag := sl.tag
	s.e.wg.Add(1)
	go func() {
		defer s.e.wg.Done()
		reply := s.contained(f)
		s.event(sl, tag, func() {
			sl.tag++
			s.finish(sl, reply)
		})
	}()
}

// loadPass sees to it that Redis has the keys, then forwards the command.
func (s *session) loadPass(sl *slot) {
	// Also a command that only reads is not yet in Redis's queue while its keys are loaded, and what may speak of it must wait:
	//	1 FCALL_RO f 1 key waits for key    2 FUNCTION DELETE f's library would be sent at once    3 FCALL_RO finds no f
	sl.write = true
	s.load(sl, func() { s.forward(sl) })
}

// load promotes the keys of a command that Redis lacks, then calls then. A Redis that was lost a moment ago may only have been busy, and nobody
// else can answer: it is waited for, once.
func (s *session) load(sl *slot, then func()) {
	s.begin(sl)
	if s.e.up.trusted() {
		s.loadNow(sl, then)
		return
	}
	tag := sl.tag
	s.e.wg.Go(func() {
		back := s.e.up.returns()
		s.event(sl, tag, func() {
			if back {
				s.loadNow(sl, then)
				return
			}
			s.answerClear(sl, unavailable(firstRoute(sl.routes), "redis cannot be reached"))
		})
	})
}

func (s *session) loadNow(sl *slot, then func()) {
	tag := sl.tag
	waits := 0
	inStore := false
	var fail *refusal
	after := func() {
		sl.tag++
		switch {
		case fail != nil:
			s.answerClear(sl, fail)
		case inStore:
			s.loadRunMirror(sl)
		default:
			then()
		}
	}
	for i, k := range sl.keys {
		r := sl.routes[i]
		if r == nil || !r.Phase.Rules().ReadsStore {
			continue
		}
		name := string(sl.args[k.Arg])
		if s.e.journal.staleRedis(name) {
			s.e.journal.kick()
			fail = unavailable(r, "redis's copy is being repaired")
			continue
		}
		storeOnly := !r.Phase.Rules().ReadsRedis
		waits++
		s.e.fill.get(policy.Ref{Route: r.Name, Key: name}, r, storeOnly, func(a answer) {
			s.event(sl, tag, func() {
				if a.fail != nil {
					fail = a.fail
				}
				inStore = inStore || storeOnly && a.exists
				if waits--; waits == 0 {
					after()
				}
			})
		})
	}
	if waits == 0 {
		after()
	}
}

func firstRoute(routes []*policy.Route) *policy.Route {
	for _, r := range routes {
		if r != nil {
			return r
		}
	}
	return nil
}

// loadRunMirror runs a command that only Redis can evaluate.
func (s *session) loadRunMirror(sl *slot) {
	if s.user != nil && runsScript(sl.info) && !sl.mayAll {
		// It would run as the proxy's user, who may more.
		s.answerClear(sl, &refusal{"DENIED", "another user's script cannot name keys that have a store; run it as the proxy's user, or in MULTI"})
		return
	}
	sl.write = true
	s.begin(sl)
	op := &runOp{raw: sl.raw, proto: s.proto, source: s.source(sl)}
	for i, k := range sl.keys {
		if r := sl.routes[i]; r != nil && r.Phase.Rules().UsesStore {
			op.add(policy.Ref{Route: r.Name, Key: string(sl.args[k.Arg])}, r, k.Write)
			if k.Write {
				s.e.stats.route(r.Name).writes.Add(1)
			}
		}
	}
	tag := sl.tag
	op.done = func(reply []byte) {
		s.event(sl, tag, func() {
			sl.tag++
			s.noteRefusal(op.route(), reply)
			s.finish(sl, reply)
		})
	}
	s.e.generic.submit(op)
}

// runsScript: the command runs others, whose rights Redis checks as they run.
func runsScript(info *cmdtab.Info) bool {
	if info == nil {
		return false
	}
	switch info.Name {
	case "eval", "evalsha", "fcall":
		return true
	}
	return false
}

// answer finishes a slot with a reply of ours.
func (s *session) answer(sl *slot, reply string) { s.finish(sl, []byte(reply)) }

// noteRefusal counts what a writer or a runner has refused in place of the session.
func (s *session) noteRefusal(r *policy.Route, reply []byte) {
	if r != nil && isRefusal(reply) {
		s.e.stats.route(r.Name).refused.Add(1)
	}
}

func (s *session) answerClear(sl *slot, c *refusal) {
	if r := firstRoute(sl.routes); r != nil {
		s.e.stats.route(r.Name).refused.Add(1)
	}
	sl.reply_ = c.reply(sl.reply_[:0])
	sl.ended = verdictRefused
	s.close(sl)
}

// finish sets the reply, a copy of frame.
func (s *session) finish(sl *slot, frame []byte) {
	if sl.done {
		return
	}
	sl.ended = verdictOf(frame)
	if len(s.slots) > 0 && s.slots[0] == sl && !s.over {
		// Nobody is to be answered before it: it need not wait in the slot for its turn.
		s.passOn(sl)
		if !sl.mute {
			s.out.add(frame)
		}
		sl.reply_ = sl.reply_[:0]
	} else {
		sl.reply_ = append(sl.reply_[:0], frame...)
	}
	s.close(sl)
}

// close marks a slot as answered.
func (s *session) close(sl *slot) {
	if sl.done {
		return
	}
	sl.done = true
	s.open--
	if sl.side {
		s.sided--
	}
	s.held += len(sl.reply_)
	if sl.blocks {
		sl.counts = classBlocking
	}
	s.shared.times.answered(sl.counts, sl.ended, s.now-sl.fed)
}

// countedAs is what a command on keys of routes is counted as.
func countedAs(c policy.Class) class {
	switch c {
	case policy.ReadThrough:
		return classRead
	case policy.Write:
		return classWrite
	}
	return classGeneric
}

// settle moves finished replies to the client in order, and begins what waited for them.
func (s *session) settle() {
	for {
		for s.begun < len(s.slots) && !s.over && !s.crowded() {
			sl := s.slots[s.begun]
			if !sl.done {
				skip, last := s.skip, s.last
				sl.mute, s.skip = s.replyOff || skip, false
				s.open++
				if !s.start(sl) {
					s.open--
					s.skip, s.last = skip, last
					break
				}
			}
			s.begun++
		}
		if s.over {
			s.drop(s.begun)
		}
		n := 0
		for n < s.begun && s.slots[n].done {
			sl := s.slots[n]
			s.passOn(sl)
			if !sl.mute {
				if len(sl.reply_) >= lendFrom {
					s.out.lend(sl.reply_) // it is not recycled
				} else {
					s.out.add(sl.reply_)
				}
			}
			s.held -= len(sl.raw) + len(sl.reply_)
			s.undo(sl)
			s.recycle(sl)
			n++
		}
		if n < s.begun && s.slots[n].stream {
			s.passOn(s.slots[n])
		}
		if n == 0 {
			return
		}
		rest := copy(s.slots, s.slots[n:])
		clear(s.slots[rest:])
		s.slots = s.slots[:rest]
		s.begun -= n
	}
}

// keepSlotBytes: a slot that carried more is not reused with its buffers.
const keepSlotBytes = 16 << 10

func (s *session) recycle(sl *slot) {
	if cap(sl.raw)+cap(sl.reply_) > keepSlotBytes || len(s.free) >= 64 {
		letGo(sl.raw)
		return
	}
	s.free = append(s.free, sl)
}
