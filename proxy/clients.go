package proxy

import (
	"cmp"
	"context"
	"slices"
	"strconv"
	"strings"
	"time"
)

// What CLIENT says about the clients of this sidecar: Redis sees only the connections that they share.

// describe is this client's line of CLIENT LIST: the fields that this Redis has, in its order. What Redis tells of its own buffers is told
// of ours; a field that we do not know is 0.
func (s *session) describe() string {
	var b strings.Builder
	for i, name := range s.e.up.clientFields() {
		if i > 0 {
			b.WriteByte(' ')
		}
		b.WriteString(name)
		b.WriteByte('=')
		b.WriteString(s.field(name))
	}
	return b.String()
}

// field is the value of one field of CLIENT LIST.
func (s *session) field(name string) string {
	n := 0
	switch name {
	case "id":
		return strconv.FormatUint(s.id, 10)
	case "addr":
		return s.addr
	case "laddr":
		return s.laddr
	case "fd":
		n = int(s.id % 1_000_000) // there is one, but it says nothing; a number that tells clients apart
	case "name":
		return s.name
	case "age":
		n = int(time.Since(s.since).Seconds())
	case "idle":
		n = int(max(0, s.e.up.clock.Load()-s.heard) / int64(time.Second))
	case "flags":
		return s.flags()
	case "db":
		n = s.db
	case "sub":
		n = len(s.subs.channels)
	case "psub":
		n = len(s.subs.patterns)
	case "ssub":
		n = len(s.subs.shards)
	case "multi":
		n = -1
		if s.tx != nil {
			n = s.tx.queued
		}
	case "watch":
		n = s.watched
	case "qbuf":
		n = s.held
	case "argv-mem":
		if len(s.slots) > 0 {
			n = len(s.slots[0].raw)
		}
	case "rbs", "tot-mem":
		n = s.out.bytes + s.held
	case "obl", "omem":
		n = s.out.bytes + s.sending
	case "events":
		return "r"
	case "cmd":
		switch {
		case s.last != nil:
			return s.last.Name
		default:
			return "NULL"
		}
	case "user":
		if s.user != nil {
			return s.user.user
		}
		user, _ := s.e.up.dialer.credentials()
		return user
	case "redir":
		n = int(s.tracking.getRedirect())
	case "resp":
		n = s.proto
	case "lib-name":
		return s.lib
	case "lib-ver":
		return s.ver
	}
	return strconv.Itoa(n)
}

// flags are the letters of CLIENT LIST.
func (s *session) flags() string {
	var b []byte
	add := func(is bool, c byte) {
		if is {
			b = append(b, c)
		}
	}
	add(s.relay != nil, 'O')
	add(s.subs.any(), 'P')
	add(s.tx != nil, 'x')
	add(s.blocked() && s.relay == nil, 'b')
	add(s.tracking.on, 't')
	add(s.tracking.on && s.tracking.bcast, 'B')
	add(s.tx != nil && s.tx.dirty, 'd')
	add(s.ending, 'c')
	add(s.noEvict, 'e')
	if len(b) == 0 {
		return "N"
	}
	return string(b)
}

// about answers from the clients of the server, each of which has a lock of its own, so not under ours.
func (s *session) about(sl *slot, f func() []byte) {
	s.begin(sl)
	s.async(sl, f)
}

// snapshot is every client in the order of their ids.
func (s *Server) snapshot() []*client {
	s.mu.Lock()
	all := make([]*client, 0, len(s.clients))
	for c := range s.clients {
		all = append(all, c)
	}
	s.mu.Unlock()
	slices.SortFunc(all, func(a, b *client) int { return cmp.Compare(a.sess.id, b.sess.id) })
	return all
}

const (
	syntaxError = "-ERR syntax error\r\n"
	badClientID = "-ERR client-id should be greater than 0\r\n"
)

// clientType is a client's TYPE in the words of CLIENT LIST. Caller holds the client's lock.
func (c *client) clientType() string {
	switch {
	case c.sess.relay != nil && c.sess.relay.stream:
		return "slave"
	case c.sess.subs.any():
		return "pubsub"
	}
	return "normal"
}

// typeWord is a TYPE in the word that clientType has for it.
func typeWord(arg []byte) string {
	if foldEqual(arg, "replica") {
		return "slave"
	}
	return strings.ToLower(string(arg))
}

// present: to its user the client is still there. One who has been told everything and saw the end of its connection is not,
// though the proxy may wait for it to close its own side. Caller holds the client's lock.
func (c *client) present() bool {
	return !c.gone && (!c.sess.ending || !c.sess.idle() || c.sess.out.bytes > 0)
}

func knownType(t string) bool {
	return slices.Contains([]string{"normal", "master", "slave", "pubsub"}, t)
}

func (s *Server) clientList(args [][]byte, proto int) []byte {
	of, kind := s.snapshot(), ""
	switch {
	case len(args) == 2:
	case len(args) == 4 && foldEqual(args[2], "type"):
		if kind = typeWord(args[3]); !knownType(kind) {
			return appendError(nil, "ERR Unknown client type '"+string(args[3])+"'")
		}
	case len(args) >= 4 && foldEqual(args[2], "id"): // in the order asked for, and as often
		all := map[uint64]*client{}
		for _, c := range of {
			all[c.sess.id] = c
		}
		of = nil
		for _, a := range args[3:] {
			n, ok := parseDecimal(a)
			if !ok {
				return []byte("-ERR Invalid client ID\r\n")
			}
			if c := all[uint64(n)]; c != nil {
				of = append(of, c)
			}
		}
	default:
		return []byte(syntaxError)
	}
	var b strings.Builder
	for _, c := range of {
		c.lock()
		if (kind == "" || kind == c.clientType()) && c.present() {
			b.WriteString(c.sess.describe())
			b.WriteByte('\n')
		}
		c.unlock()
	}
	return appendVerbatim(nil, "txt", b.String(), proto)
}

// clientKill ends clients. One that kills itself gets its reply first.
func (s *Server) clientKill(args [][]byte, self uint64) []byte {
	old := len(args) == 3
	skipMe := !old
	var filters []func(c *client) bool
	is := func(f func(c *client) bool) { filters = append(filters, f) }
	if old {
		addr := string(args[2])
		is(func(c *client) bool { return c.sess.addr == addr })
	} else if len(args)%2 != 0 {
		return []byte(syntaxError)
	}
	for i := 2; !old && i < len(args); i += 2 {
		value := string(args[i+1])
		switch strings.ToLower(string(args[i])) {
		case "id":
			n, ok := parseDecimal(args[i+1])
			if !ok || n < 1 {
				return []byte(badClientID)
			}
			is(func(c *client) bool { return c.sess.id == uint64(n) })
		case "addr":
			is(func(c *client) bool { return c.sess.addr == value })
		case "laddr":
			is(func(c *client) bool { return c.sess.laddr == value })
		case "type":
			kind := typeWord(args[i+1])
			if !knownType(kind) {
				return appendError(nil, "ERR Unknown client type '"+value+"'")
			}
			is(func(c *client) bool { return c.clientType() == kind })
		case "user":
			if !s.knownUser(value) {
				return appendError(nil, "ERR No such user '"+value+"'")
			}
			is(func(c *client) bool {
				return c.sess.user == nil && value == "default" || c.sess.user != nil && c.sess.user.user == value
			})
		case "skipme":
			switch strings.ToLower(value) {
			case "yes":
				skipMe = true
			case "no":
				skipMe = false
			default:
				return []byte(syntaxError)
			}
		default:
			return []byte(syntaxError)
		}
	}
	n := 0
	for _, c := range s.snapshot() {
		c.lock()
		hit := c.present() && (!skipMe || c.sess.id != self)
		for _, f := range filters {
			hit = hit && f(c)
		}
		if hit && c.sess.id == self {
			c.sess.ending, c.sess.over = true, true
		}
		c.unlock()
		if !hit {
			continue
		}
		n++
		if c.sess.id != self {
			c.kill()
		}
	}
	switch {
	case !old:
		return appendInt(nil, int64(n))
	case n == 0:
		return []byte("-ERR No such client\r\n")
	}
	return []byte("+OK\r\n")
}

// knownUser asks Redis; if it cannot tell, the user may exist.
func (s *Server) knownUser(name string) bool {
	frame, err := s.e.up.do(context.Background(), "ACL", "GETUSER", name)
	return err != nil || !isNull(frame)
}

// clientUnblock ends the wait of a client: Redis knows it by the connection that it waits on.
func (s *Server) clientUnblock(args [][]byte) []byte {
	id, ok := parseDecimal(args[2])
	if !ok {
		return []byte("-ERR value is not an integer or out of range\r\n")
	}
	how := "TIMEOUT"
	switch {
	case len(args) == 4 && foldEqual(args[3], "error"):
		how = "ERROR"
	case len(args) == 4 && !foldEqual(args[3], "timeout"):
		return []byte("-ERR CLIENT UNBLOCK reason should be TIMEOUT or ERROR\r\n")
	}
	there := int64(0)
	if c := s.client(uint64(id)); c != nil {
		c.lock()
		if c.sess.pin != nil && c.sess.blocked() {
			there = c.sess.pin.id.Load()
		}
		c.unlock()
	}
	if there == 0 {
		return appendInt(nil, 0)
	}
	frame, err := s.e.up.do(context.Background(), "CLIENT", "UNBLOCK", strconv.FormatInt(there, 10), how)
	if err != nil && frame == nil {
		return unavailable(nil, "redis cannot be reached").reply(nil)
	}
	return frame
}

// client finds a client by its id.
func (s *Server) client(id uint64) *client {
	for _, c := range s.snapshot() {
		if c.sess.id == id {
			return c
		}
	}
	return nil
}
