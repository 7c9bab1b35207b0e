package proxy

import (
	"bytes"
	"strconv"
	"time"
)

// Client-side caching. A client that tracks keys keeps its own connection to Redis, where its reads are seen and where the news of
// changes come. Whatever the proxy answers from the store must have been read there too, and after it was promoted, or the client
// would keep a value that nobody tells it about:
//
//	1 GET k misses in Redis, and is remembered there    2 the proxy promotes k: the news of this change reach the client first
//	3 the client gets and keeps the value; Redis has forgotten that it reads k
//
// So a tracked key is promoted first, and then read on the client's connection like any other.

// tracking is what CLIENT TRACKING has switched on.
type tracking struct {
	on, bcast, optin, optout bool
	redirect                 int64 // the client that gets the news; 0: this one
	caching                  byte  // what CLIENT CACHING said about the next command: 'y', 'n' or nothing
}

// tracks: Redis remembers what the client reads by this command.
func (s *session) tracks(sl *slot) bool {
	t := &s.tracking
	switch {
	case !t.on || t.bcast:
		return false
	case t.optin:
		return sl.caching == 'y'
	}
	return sl.caching != 'n'
}

// track switches tracking on or off. The client that the news go to is known to Redis by a connection of its own.
func (s *session) track(sl *slot) {
	on := foldEqual(sl.args[2], "on")
	next := tracking{on: on}
	at := 0
	for i := 3; i < len(sl.args); i++ {
		switch a := sl.args[i]; {
		case foldEqual(a, "redirect") && i+1 < len(sl.args):
			i++
			at = i
		case foldEqual(a, "prefix"):
			i++
		case foldEqual(a, "bcast"):
			next.bcast = true
		case foldEqual(a, "optin"):
			next.optin = true
		case foldEqual(a, "optout"):
			next.optout = true
		}
	}
	if !on && !s.tracking.on {
		s.forward(sl)
		return
	}
	s.takePin()
	send := func() {
		sl.then = func(frame []byte) {
			if !isError(frame) {
				s.tracking = next
			}
			s.finish(sl, frame)
		}
		s.sendOn(s.pin.lane, sl, false)
	}
	id, ok := int64(0), false
	if at > 0 {
		id, ok = parseDecimal(sl.args[at])
	}
	if !ok || id == 0 {
		send() // what is wrong with it, Redis says
		return
	}
	next.redirect = id
	args := cloneArgs(sl.args)
	s.begin(sl)
	tag := sl.tag
	s.e.wg.Go(func() {
		there := s.srv.pinned(uint64(id))
		s.event(sl, tag, func() {
			args[at] = strconv.AppendInt(nil, there, 10)
			s.held -= len(sl.raw)
			sl.raw = appendCommand(nil, args...)
			s.held += len(sl.raw)
			if s.pin == nil {
				s.answerClear(sl, unavailable(nil, "redis cannot be reached"))
				return
			}
			send()
		})
	})
}

// neverAnID is what Redis gives to no connection.
const neverAnID = 1<<63 - 1

// pinned gives a client a connection to Redis of its own, if it has none yet, and returns the id that Redis knows it by.
func (s *Server) pinned(id uint64) int64 {
	c := s.client(id)
	if c == nil {
		return neverAnID
	}
	c.lock()
	c.sess.takePin()
	c.sess.sticky = true
	p := c.sess.pin
	c.unlock()
	p.connect()
	for end := time.Now().Add(s.e.up.dialer.timeout); p.id.Load() == 0 && time.Now().Before(end); {
		time.Sleep(heldPoll)
	}
	if there := p.id.Load(); there != 0 {
		return there
	}
	return neverAnID
}

// getRedirect answers CLIENT GETREDIR in the ids of this sidecar.
func (t *tracking) getRedirect() int64 {
	switch {
	case !t.on:
		return -1
	case t.redirect != 0:
		return t.redirect
	}
	return 0
}

// trackingInfo passes on CLIENT TRACKINGINFO; the client that the news go to has another id here.
func (s *session) trackingInfo(sl *slot) {
	sl.then = func(frame []byte) {
		cols, ok := elements(frame, nil)
		if !ok || s.tracking.redirect == 0 {
			s.finish(sl, frame)
			return
		}
		header := frame[:bytes.IndexByte(frame, '\n')+1]
		b := append(sl.reply_[:0], header...)
		for i, c := range cols {
			name := []byte(nil)
			if i > 0 {
				name, _ = bulk(cols[i-1])
			}
			if string(name) == "redirect" {
				c = appendInt(nil, s.tracking.redirect)
			}
			b = append(b, c...)
		}
		sl.reply_ = b
		s.close(sl)
	}
	s.send(sl, false)
}

// readTracked reads keys so that Redis remembers that this client has: promoted first where they have a copy in Redis. In a phase where
// they have none Redis is asked all the same, for its memory's sake, and the store then has the answer; a write there changes the key
// in Redis for a moment (scriptFill).
func (s *session) readTracked(sl *slot) {
	copies := true
	for _, r := range sl.routes {
		if r != nil && r.Phase.Rules().ReadsStore && !r.Phase.Rules().ReadsRedis {
			copies = false
		}
	}
	tries := 0
	var read func()
	read = func() {
		sl.then = func(frame []byte) {
			tries++
			switch {
			case isError(frame):
				s.finish(sl, frame)
			case copies && !lacks(sl.args, frame):
				s.count(sl, fromRedis)
				s.finish(sl, frame)
			case copies && tries < maxTrackedReads:
				s.load(sl, read) // evicted in between
			default:
				s.fetch(sl, nil)
			}
		}
		s.send(sl, false)
	}
	if !copies {
		read()
		return
	}
	s.load(sl, read)
}

// maxTrackedReads: a key that is gone right after it was promoted, twice, is absent for all that a client can tell; the store has
// the last word.
const maxTrackedReads = 2
