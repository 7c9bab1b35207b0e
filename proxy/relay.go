package proxy

import (
	"bytes"
)

// relay is the state of a client whose connection to Redis says what no command asked for: MONITOR's lines, or after SYNC the bytes
// of a replica. What comes goes to the client as it is, and what the client says goes to Redis as it is, until it leaves or says RESET.
// Redis lets neither touch a key, so nothing here needs to be kept right.
type relay struct {
	stream bool  // bytes without frames (SYNC)
	reset  *slot // the RESET that ends it
}

// monitor begins a relay when Redis agrees.
func (s *session) monitor(sl *slot) {
	s.takePin()
	s.pin.listens.Store(true)
	sl.then = func(frame []byte) {
		if !isError(frame) {
			s.relay = &relay{}
		} else if s.pin != nil {
			s.pin.listens.Store(s.subs.any())
		}
		s.finish(sl, frame)
	}
	s.sendOn(s.pin.lane, sl, false)
}

// sync turns the client into a replica: from here on Redis sends what is no reply. What it still owes this connection comes first.
func (s *session) sync(sl *slot) {
	s.takePin()
	p := s.pin
	sink := func(b []byte) bool {
		s.d.lock()
		defer s.d.unlock()
		defer s.survive()
		if s.pin != p {
			return false
		}
		s.pushed(p, b)
		return s.pin == p
	}
	sl.then = func(frame []byte) {
		if isError(frame) {
			s.finish(sl, frame)
			return
		}
		s.relay = &relay{stream: true}
		p.sink.Store(&sink)
		s.relayed(sl)
	}
	raw := sl.raw
	sl.raw = appendCommand(nil, "PING")
	s.sendOn(p.lane, sl, false)
	sl.raw = raw
}

// relayed passes a command on; its reply comes by itself, so its slot has none. Those before it are done.
func (s *session) relayed(sl *slot) {
	if s.pin == nil {
		s.cutOff()
		return
	}
	name := sl.args[0]
	switch {
	case s.relay.stream && !foldEqual(name, "replconf") && !foldEqual(name, "psync") && !foldEqual(name, "sync") && !foldEqual(name, "ping"):
		s.cutOff() // no replica says this
		return
	case foldEqual(name, "reset") && len(sl.args) == 1:
		s.begin(sl)
		s.relay.reset = sl
	default:
		sl.mute = true
		s.close(sl)
	}
	if s.pin.post(sl.raw) != nil {
		s.cutOff()
	}
}

// relays passes on a frame of a relay. The reply to RESET is known by its place: MONITOR's lines begin with a time.
func (s *session) relays(p *pin, frame []byte) {
	if sl := s.relay.reset; sl != nil && bytes.Equal(frame, []byte("+RESET\r\n")) {
		s.relay = nil
		s.forget(sl)
		s.settle()
		return
	}
	s.pushed(p, frame)
}

// allDone: everything that has begun is answered.
func (s *session) allDone() bool {
	for _, sl := range s.slots[:s.begun] {
		if !sl.done {
			return false
		}
	}
	return true
}

// leave frees what the client holds: a blocked command or a subscription ends at once.
func (s *session) leave() {
	s.dropPin()
	s.relay = nil
	for _, sl := range s.slots {
		sl.tag++
	}
}
