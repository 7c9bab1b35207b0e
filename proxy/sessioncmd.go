package proxy

import (
	"bytes"
	"context"
	"strconv"
	"strings"

	cmdtab "cacheproxy/internal/command"
	"cacheproxy/internal/said"
	"cacheproxy/policy"
)

// credentials are those of a client that authenticated as somebody else than the proxy itself.
type credentials struct{ user, pass string }

func allowedBeforeAuth(name []byte) bool {
	return foldEqual(name, "auth") || foldEqual(name, "hello") || foldEqual(name, "quit") || foldEqual(name, "reset")
}

// contained runs f; a panic on one client's data ends that client's command, not the process.
func (s *session) contained(f func() []byte) (reply []byte) {
	defer func() {
		if p := recover(); p != nil {
			s.e.log.Error("a command panicked", said.Panic(p)...)
			reply = []byte("-ERR internal error\r\n")
		}
	}()
	return f()
}

// sessionCommand answers commands about the client's own connection.
func (s *session) sessionCommand(sl *slot) {
	args := sl.args
	switch name := args[0]; {
	case foldEqual(name, "hello"):
		s.hello(sl)
	case foldEqual(name, "auth"):
		done := func([]byte) { s.answer(sl, "+OK\r\n") }
		switch {
		case len(args) == 2:
			s.auth(sl, "default", string(args[1]), done)
		case len(args) == 3:
			s.auth(sl, string(args[1]), string(args[2]), done)
		case len(args) < 2:
			s.answer(sl, arity("auth"))
		default:
			s.answer(sl, "-ERR syntax error\r\n")
		}
	case foldEqual(name, "select"):
		s.selectDB(sl)
	case foldEqual(name, "quit"):
		s.quit(sl)
	case foldEqual(name, "reset"):
		s.reset(sl)
	default:
		s.client(sl)
	}
}

func arity(name string) string {
	return "-ERR wrong number of arguments for '" + name + "' command\r\n"
}

// auth checks a password of ours, or lets Redis decide: it is sent the command as it is, on the connection that its outcome will be
// bound to. ok makes the reply to success from Redis's.
func (s *session) auth(sl *slot, user, pass string, ok func(frame []byte)) {
	if s.password != "" {
		if user != "default" || pass != s.password {
			s.answer(sl, "-WRONGPASS invalid username-password pair or user is disabled.\r\n")
			return
		}
		s.authed = true
		ok(nil)
		return
	}
	next := &credentials{user, pass}
	var l *lane
	if own, ownPass := s.e.up.dialer.credentials(); user != own {
		s.takePin()
		l = s.pin.lane // and no other: whoever shares it would become that user
	} else {
		next = nil // the shared connections are this user's already
		l = s.lane()
		if pass == ownPass && pass != "" {
			sl.local = func() {
				s.user = nil
				ok(nil)
			}
		}
	}
	sl.then = func(frame []byte) {
		if isError(frame) {
			s.finish(sl, frame)
			return
		}
		s.user = next
		ok(frame)
	}
	s.sendOn(l, sl, false)
}

// needsLeave: the proxy itself would touch Redis or the store for this command, and the client is another user than it.
func (s *session) needsLeave(sl *slot) bool {
	if sl.clear {
		return false
	}
	switch sl.class {
	case policy.Flush:
		return s.e.storeInUse()
	case policy.Own:
		return false
	case policy.Session:
		return sl.info == nil || sl.info.Flags&cmdtab.NoAuth == 0 // those that anybody may say
	}
	for _, r := range sl.routes {
		if r != nil && r.Phase.Rules().UsesStore {
			return true
		}
	}
	return sl.info == nil
}

// askLeave asks Redis whether the client's user may run a command. If not, Redis itself gets the command and says so.
func (s *session) askLeave(sl *slot) {
	s.begin(sl)
	tag := sl.tag
	args := append([][]byte{[]byte("ACL"), []byte("DRYRUN"), []byte(s.user.user)}, sl.args...)
	raw, user := appendCommand(nil, args...), s.user.user
	s.e.wg.Add(1)
	go func() {
		defer s.e.wg.Done()
		frame, err := s.e.up.roundTrip(context.Background(), raw)
		mayAll := err == nil && runsScript(sl.info) && s.e.mayEverything(user)
		s.event(sl, tag, func() {
			sl.tag++
			sl.mayAll = mayAll
			switch {
			case sl.info == nil && bytes.HasPrefix(frame, []byte("-ERR Command '")):
				s.send(sl, false) // Redis does not know it either
			case err != nil && isError(frame):
				s.answerClear(sl, &refusal{"DENIED", "redis cannot tell what this user may do (ACL DRYRUN)"})
			case err != nil:
				s.answerClear(sl, unavailable(firstRoute(sl.routes), "redis cannot be reached"))
			case string(frame) == "+OK\r\n":
				sl.clear = true
				s.dispatch(sl)
			default:
				s.send(sl, false)
			}
		})
	}()
}

// mayEverything: nothing that a script of this user may do is denied to it.
func (e *engine) mayEverything(user string) bool {
	frame, err := e.up.do(context.Background(), "ACL", "GETUSER", user)
	if err != nil {
		return false
	}
	cols, _ := elements(frame, nil)
	commands, keys := false, false
	for i := 0; i+1 < len(cols); i += 2 {
		name, _ := bulk(cols[i])
		value, _ := bulk(cols[i+1])
		switch string(name) {
		case "commands":
			commands = string(value) == "+@all"
		case "keys":
			keys = string(value) == "~*"
		}
	}
	return commands && keys
}

// hello switches the protocol version.
func (s *session) hello(sl *slot) {
	proto := s.proto
	args := sl.args[1:]
	if len(args) > 0 {
		v, ok := parseDecimal(args[0])
		if !ok {
			s.answer(sl, "-ERR Protocol version is not an integer or out of range\r\n")
			return
		}
		if v != 2 && v != 3 {
			s.answer(sl, "-NOPROTO unsupported protocol version\r\n")
			return
		}
		proto = int(v)
		args = args[1:]
	}
	var user, pass, name string
	hasAuth, hasName := false, false
	for len(args) > 0 {
		switch {
		case foldEqual(args[0], "auth") && len(args) >= 3:
			user, pass, hasAuth = string(args[1]), string(args[2]), true
			args = args[3:]
		case foldEqual(args[0], "setname") && len(args) >= 2:
			name, hasName = string(args[1]), true
			args = args[2:]
		default:
			s.answer(sl, "-ERR Syntax error in HELLO option '"+printable(args[0])+"'\r\n")
			return
		}
	}
	if hasName && !validName(name) {
		s.answer(sl, badName)
		return
	}
	greet := func(frame []byte) {
		if hasName {
			s.name = name
		}
		if proto != s.proto && s.pin != nil && frame == nil {
			if s.needsPin() {
				s.speak(sl, proto)
				return
			}
			s.dropPin() // the next command takes another, if it needs one
		}
		s.proto = proto
		s.finish(sl, s.greeting())
	}
	switch {
	case hasAuth:
		// The protocol that Redis speaks on the connection is changed by AUTH only where it is the client's own.
		if own, _ := s.e.up.dialer.credentials(); s.password == "" && user == own {
			s.authOwn(sl, user, pass, func() { greet(nil) })
			return
		}
		s.auth(sl, user, pass, greet)
	case !s.authed:
		s.answer(sl, "-NOAUTH HELLO must be called with the client already authenticated, otherwise the HELLO <proto> AUTH <user> <pass> option can be used to authenticate the client and select the RESP protocol version at the same time\r\n")
	default:
		greet(nil)
	}
}

// authOwn asks Redis about the credentials of the proxy's own user, on a connection that this changes nothing for.
func (s *session) authOwn(sl *slot, user, pass string, ok func()) {
	raw := sl.raw
	sl.raw = appendCommand(nil, "AUTH", user, pass)
	s.auth(sl, user, pass, func([]byte) { ok() })
	sl.raw = raw
}

// speak changes the protocol version of a connection that must not be given up.
func (s *session) speak(sl *slot, proto int) {
	sl.then = func(frame []byte) {
		if isError(frame) {
			s.finish(sl, frame)
			return
		}
		s.proto = proto
		s.finish(sl, s.greeting())
	}
	raw := sl.raw
	sl.raw = appendCommand(nil, "HELLO", strconv.Itoa(proto))
	s.send(sl, false)
	sl.raw = raw
}

// greeting is HELLO's reply: the server's own, but for the client's id.
func (s *session) greeting() []byte {
	own := s.e.up.hello(s.proto)
	cols, ok := elements(own, nil)
	if !ok {
		return s.firstGreeting()
	}
	b := append([]byte(nil), own[:bytes.IndexByte(own, '\n')+1]...)
	for i, c := range cols {
		if i%2 == 1 {
			if name, _ := bulk(cols[i-1]); string(name) == "id" {
				c = appendInt(nil, int64(s.id))
			}
		}
		b = append(b, c...)
	}
	return b
}

// firstGreeting is the greeting while no server has been seen yet.
func (s *session) firstGreeting() []byte {
	b := appendMap(nil, 7, s.proto)
	b = appendBulk(b, "server")
	b = appendBulk(b, "redis")
	b = appendBulk(b, "version")
	b = appendBulk(b, "7.0.0") // clients only want to know that HELLO works
	b = appendBulk(b, "proto")
	b = appendInt(b, int64(s.proto))
	b = appendBulk(b, "id")
	b = appendInt(b, int64(s.id))
	b = appendBulk(b, "mode")
	b = appendBulk(b, "standalone")
	b = appendBulk(b, "role")
	b = appendBulk(b, "master")
	b = appendBulk(b, "modules")
	return appendArray(b, 0)
}

// greeted learns from HELLO's reply among EXEC's results.
func (s *session) greeted(result []byte) []byte {
	cols, ok := elements(result, nil)
	if !ok {
		return result
	}
	for i := 0; i+1 < len(cols); i += 2 {
		if name, _ := bulk(cols[i]); string(name) == "proto" {
			if n, ok := parseInt(cols[i+1]); ok {
				s.proto = int(n)
			}
		}
	}
	return s.greeting()
}

const badName = "-ERR Client names cannot contain spaces, newlines or special characters.\r\n"

func validName(name string) bool {
	for i := range len(name) {
		if name[i] < '!' || name[i] > '~' {
			return false
		}
	}
	return true
}

func printable(b []byte) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r > '~' {
			return ' '
		}
		return r
	}, string(b))
}

// selectDB: another database than the routed one needs a connection of its own.
func (s *session) selectDB(sl *slot) {
	if len(sl.args) != 2 {
		s.answer(sl, arity("select"))
		return
	}
	n, ok := parseDecimal(sl.args[1])
	switch {
	case !ok:
		s.answer(sl, "-ERR value is not an integer or out of range\r\n")
		return
	case n != int64(int32(n)):
		s.answer(sl, "-ERR value is out of range, value must between -2147483648 and 2147483647\r\n")
		return
	}
	if int(n) == s.db {
		s.answer(sl, "+OK\r\n")
		return
	}
	s.takePin()
	sl.then = func(frame []byte) {
		if !isError(frame) {
			s.db = int(n)
		}
		s.finish(sl, frame)
	}
	s.sendOn(s.pin.lane, sl, false)
}

// atHome: commands speak of the database that routes apply to.
func (s *session) atHome() bool {
	db := s.db
	if s.tx != nil && len(s.tx.dbs) > 0 {
		db = s.tx.dbs[len(s.tx.dbs)-1]
	}
	return db == s.e.up.dialer.opt.DB
}

// quit ends the client. Redis is told where the client has a connection of its own, so that what was bound to it is gone there before the
// client has its answer.
func (s *session) quit(sl *slot) {
	s.alsoThere(sl, func() {
		s.ending, s.over = true, true
		s.answer(sl, "+OK\r\n")
	})
}

// alsoThere gives a command to Redis too, if the client has a connection of its own, and then calls done.
func (s *session) alsoThere(sl *slot, done func()) {
	if s.pin == nil || !s.needsPin() || !s.pin.up() {
		done()
		return
	}
	sl.then = func([]byte) { done() }
	sl.local = done
	s.sendOn(s.pin.lane, sl, false)
}

func (s *session) reset(sl *slot) {
	if len(sl.args) != 1 {
		s.answer(sl, arity("reset"))
		return
	}
	s.alsoThere(sl, func() { s.forget(sl) })
}

// forget ends a RESET.
func (s *session) forget(sl *slot) {
	s.release()
	s.proto, s.db, s.name, s.user = 2, s.e.up.dialer.opt.DB, "", nil
	s.replyOff, s.skip = false, false
	s.authed = s.password == ""
	sl.mute = false
	s.answer(sl, "+RESET\r\n")
}

// client answers CLIENT.
func (s *session) client(sl *slot) {
	args := sl.args
	if len(args) < 2 {
		s.answer(sl, arity("client"))
		return
	}
	if sl.info == nil || !sl.info.ArityOK(len(args)) || sl.info.Name == "client|setinfo" && !s.e.up.hasField("lib-name") {
		s.forward(sl) // Redis says what is wrong with it
		return
	}
	proto := s.proto
	switch sub := strings.ToLower(string(args[1])); sub {
	case "id", "getname", "info", "getredir":
		// Redis counts it, shows it to MONITOR and asks its ACL; the answer is ours.
		sl.local = func() { s.finish(sl, s.aboutItself(sub)) }
		sl.then = func(frame []byte) {
			if !isError(frame) {
				frame = s.aboutItself(sub)
			}
			s.finish(sl, frame)
		}
		s.send(sl, false)
	case "setname", "setinfo":
		s.introduce(sl)
	case "reply":
		s.clientReply(sl)
	case "list":
		sl.then = func(frame []byte) {
			if isError(frame) && classifyReply(frame) == outAuth {
				s.finish(sl, frame)
				return
			}
			s.about(sl, func() []byte { return s.srv.clientList(args, proto) })
		}
		if s.e.up.trust() == down {
			s.about(sl, func() []byte { return s.srv.clientList(args, proto) })
			return
		}
		s.send(sl, false)
	case "kill":
		s.about(sl, func() []byte { return s.srv.clientKill(args, s.id) })
	case "pause", "unpause":
		sl.then = func(frame []byte) {
			if !isError(frame) {
				s.e.up.paused(args)
			}
			s.finish(sl, frame)
		}
		s.forward(sl)
	case "unblock":
		if len(args) > 4 {
			s.forward(sl) // Redis says what is wrong with it
			return
		}
		s.about(sl, func() []byte { return s.srv.clientUnblock(args) })
	case "tracking":
		s.track(sl)
	case "trackinginfo":
		s.trackingInfo(sl)
	case "caching":
		yes := foldEqual(args[2], "yes")
		sl.then = func(frame []byte) {
			if !isError(frame) {
				s.tracking.caching = 'n'
				if yes {
					s.tracking.caching = 'y'
				}
			}
			s.finish(sl, frame)
		}
		s.send(sl, false)
	case "no-evict", "no-touch":
		s.sticky = true
		yes := foldEqual(args[2], "on")
		sl.then = func(frame []byte) {
			if sub == "no-evict" && !isError(frame) {
				s.noEvict = yes
			}
			s.finish(sl, frame)
		}
		s.send(sl, false)
	default:
		s.forward(sl)
	}
}

// aboutItself is what CLIENT ID and its like answer.
func (s *session) aboutItself(sub string) []byte {
	switch {
	case sub == "id":
		return appendInt(nil, int64(s.id))
	case sub == "getredir":
		return appendInt(nil, s.tracking.getRedirect())
	case sub == "info":
		return appendVerbatim(nil, "txt", s.describe()+"\n", s.proto)
	case s.name == "":
		return appendNull(nil, s.proto)
	}
	return appendBulk(nil, s.name)
}

// introduce answers CLIENT SETNAME and SETINFO. Redis is told too where the client has a connection of its own.
func (s *session) introduce(sl *slot) {
	args := sl.args
	value := args[len(args)-1]
	if foldEqual(args[1], "setinfo") {
		switch {
		case !foldEqual(args[2], "lib-name") && !foldEqual(args[2], "lib-ver"):
			s.answer(sl, "-ERR Unrecognized option '"+printable(args[2])+"'\r\n")
			return
		case !validName(string(value)):
			s.answer(sl, "-ERR "+strings.ToLower(string(args[2]))+" cannot contain spaces, newlines or special characters.\r\n")
			return
		}
	} else if !validName(string(value)) {
		s.answer(sl, badName)
		return
	}
	s.describeAs(args)
	if s.pin != nil && s.needsPin() && foldEqual(args[1], "setname") {
		s.send(sl, false)
		return
	}
	s.answer(sl, "+OK\r\n")
}

// describeAs notes what a valid CLIENT SETNAME or SETINFO says.
func (s *session) describeAs(args [][]byte) {
	switch value := string(args[len(args)-1]); {
	case foldEqual(args[1], "setname"):
		s.name = value
	case foldEqual(args[2], "lib-name"):
		s.lib = value
	default:
		s.ver = value
	}
}

// clientReply switches replies off and on.
func (s *session) clientReply(sl *slot) {
	switch how := sl.args[2]; {
	case foldEqual(how, "on"):
		s.replyOff, sl.mute = false, false
		s.answer(sl, "+OK\r\n")
	case foldEqual(how, "off"):
		s.replyOff = true
		s.answer(sl, "")
	case foldEqual(how, "skip"):
		s.skip = !s.replyOff
		s.answer(sl, "")
	default:
		s.answer(sl, "-ERR syntax error\r\n")
	}
}

// fences: the command empties or exchanges the database that routes apply to, and a store has copies of what is there.
func (s *session) fences(sl *slot) bool {
	if foldEqual(sl.args[0], "swapdb") && len(sl.args) != 3 {
		return false // Redis refuses it, in words that it has not for scripts
	}
	return sl.class == policy.Flush && s.e.storeInUse() && (s.atHome() || !foldEqual(sl.args[0], "flushdb"))
}

// flush empties Redis and makes the rows dead, in one step for all sidecars (docs/consistency.md, "Fences").
func (s *session) flush(sl *slot) {
	s.begin(sl)
	if !s.fences(sl) {
		s.forward(sl)
		return
	}
	if no := s.keepsColumn(sl); no != nil {
		s.answerClear(sl, no)
		return
	}
	raw := bytes.Clone(sl.raw)
	s.async(sl, func() []byte { return s.e.flush(raw) })
}

// keyspace forwards a command that lists or counts keys, and hides the proxy's own.
func (s *session) keyspace(sl *slot) {
	name := strings.ToLower(string(sl.args[0]))
	switch name {
	case "keys", "scan":
		sl.then = func(f []byte) { s.finish(sl, hidden(name, f, s.proto)) }
	case "randomkey":
		tries := 0
		var again func(f []byte)
		again = func(f []byte) {
			// Our own keys are few beside the clients', so a hundred draws find one of theirs if there are any to speak of.
			if v, ok := bulk(f); ok && bytes.HasPrefix(v, []byte(reserved)) && tries < 100 {
				tries++
				sl.then = again
				s.send(sl, false)
				return
			}
			s.finish(sl, hidden(name, f, s.proto))
		}
		sl.then = again
	case "dbsize":
		sl.then = func(f []byte) {
			n, ok := parseInt(f)
			if !ok || s.db != s.e.up.dialer.opt.DB || !s.e.usesStore() {
				s.finish(sl, f)
				return
			}
			s.async(sl, func() []byte { return appendInt(nil, s.e.dbSize(n)) })
		}
	}
	s.send(sl, false)
}

// hidden is the reply to KEYS, SCAN or RANDOMKEY without the proxy's own keys; f itself if there are none in it.
func hidden(name string, f []byte, proto int) []byte {
	switch name {
	case "keys":
		return hideKeys(f)
	case "scan":
		cols, ok := elements(f, nil)
		if !ok || len(cols) != 2 {
			return f
		}
		b := appendArray(make([]byte, 0, len(f)), 2)
		b = append(b, cols[0]...)
		return append(b, hideKeys(cols[1])...)
	}
	if v, ok := bulk(f); ok && bytes.HasPrefix(v, []byte(reserved)) {
		return appendNull(nil, proto)
	}
	return f
}

func hideKeys(f []byte) []byte {
	names, ok := elements(f, nil)
	if !ok {
		return f
	}
	keep := names[:0]
	for _, n := range names {
		if v, _ := bulk(n); !bytes.HasPrefix(v, []byte(reserved)) {
			keep = append(keep, n)
		}
	}
	if len(keep) == len(names) {
		return f
	}
	b := appendArray(make([]byte, 0, len(f)), len(keep))
	for _, n := range keep {
		b = append(b, n...)
	}
	return b
}
