package proxy

import (
	"bytes"
	"slices"
	"strconv"
	"strings"
)

// Subscribers. A client that subscribes keeps its own connection to Redis, and what Redis says there without being asked goes
// to the client as it is. Its other commands are handled like anybody's: in RESP3 all of them, in RESP2 the few that Redis
// allows a subscriber. Redis's confirmations tell what the client is subscribed to.

// subscriptions are what Redis has confirmed. The zero value is none.
type subscriptions struct {
	channels, patterns, shards map[string]struct{}

	awaited *slot  // the SUBSCRIBE or the like whose confirmations are coming
	word    string // of these: "subscribe", "punsubscribe" …
	due     int    // how many are still to come
}

func (b *subscriptions) any() bool {
	return len(b.channels)+len(b.patterns)+len(b.shards) > 0
}

// of returns the set that a word such as "psubscribe" speaks of.
func (b *subscriptions) of(word string) *map[string]struct{} {
	switch word[0] {
	case 'p':
		return &b.patterns
	case 's':
		if strings.HasPrefix(word, "ss") || strings.HasPrefix(word, "sun") {
			return &b.shards
		}
	}
	return &b.channels
}

// note learns from a confirmation.
func (b *subscriptions) note(word string, name []byte, null bool) {
	set := b.of(word)
	switch {
	case null: // UNSUBSCRIBE without a subscription
	case strings.HasSuffix(word, "unsubscribe"):
		delete(*set, string(name))
	default:
		if *set == nil {
			*set = map[string]struct{}{}
		}
		(*set)[string(name)] = struct{}{}
	}
}

// The first words of what Redis sends a subscriber.
const (
	wordsOfMessages      = " message pmessage smessage invalidate "
	wordsOfConfirmations = " subscribe unsubscribe psubscribe punsubscribe ssubscribe sunsubscribe "
)

func oneOf(words string, word []byte) bool {
	return len(word) > 0 && strings.Contains(words, " "+string(word)+" ")
}

// subscribe sends SUBSCRIBE and its kin. Each channel is confirmed by a message of its own; all of them together are the reply.
// The command overtakes nothing and nothing overtakes it, so whatever comes meanwhile is a confirmation or a message.
func (s *session) subscribe(sl *slot, word string) {
	s.takePin()
	due := len(sl.args) - 1
	if due == 0 { // of all that there are; one that says so if there are none
		due = max(1, len(*s.subs.of(word)))
	}
	s.subs.awaited, s.subs.word, s.subs.due = sl, word, due
	sl.mute = false // CLIENT REPLY does not silence confirmations, nor messages
	s.pin.listens.Store(true)
	sl.then = func(frame []byte) {
		s.subs.awaited = nil
		if p := s.pin; p != nil {
			p.listens.Store(s.subs.any())
		}
		sl.reply_ = append(sl.reply_, frame...)
		s.close(sl)
	}
	s.sendOn(s.pin.lane, sl, false)
}

// intercept looks at a frame that came on the client's own connection, before it is taken for the reply to the command that waits
// longest. true: it is none.
func (s *session) intercept(p *pin, frame []byte) bool {
	kind := frameKind(frame)
	if kind != '>' && !p.listens.Load() {
		return false
	}
	s.d.lock()
	defer s.d.unlock()
	defer s.survive()
	if s.pin != p {
		return kind == '>' // given up: nobody waits for either
	}
	if s.relay != nil {
		s.relays(p, frame)
		return true
	}
	if kind != '>' && kind != '*' {
		return false
	}
	cols, _ := elements(frame, nil)
	var word []byte
	if len(cols) > 0 {
		word, _ = bulk(cols[0])
	}
	switch {
	case kind == '*' && !s.subs.any() && s.subs.awaited == nil:
		return false // no subscriber: an ordinary array
	case oneOf(wordsOfConfirmations, word) && len(cols) == 3:
		name, _ := bulk(cols[1])
		s.subs.note(string(word), name, isNull(cols[1]))
		sl := s.subs.awaited
		if sl != nil && string(word) == s.subs.word {
			if s.subs.due--; s.subs.due <= 0 {
				return false // the last one: it ends the command
			}
			sl.reply_ = append(sl.reply_, frame...)
			return true
		}
	case kind == '*' && !oneOf(wordsOfMessages, word):
		return false // PING's reply to a subscriber
	}
	if frame = s.unowned(frame, cols); frame != nil {
		s.pushed(p, frame)
	}
	return true
}

// unowned takes out of a message what tells of the proxy's own keys, which clients do not see: keyspace notifications, and their names in
// what a client that tracks all keys is told. nil: nothing is left of it.
func (s *session) unowned(message []byte, cols [][]byte) []byte {
	if !bytes.Contains(message, []byte(reserved)) {
		return message
	}
	last := len(cols) - 1
	if names, ok := elements(cols[last], nil); ok && frameKind(cols[last]) == '*' { // invalidate, or a message that says so
		others := slices.DeleteFunc(slices.Clone(names), func(f []byte) bool {
			name, _ := bulk(f)
			return bytes.HasPrefix(name, []byte(reserved))
		})
		if len(others) == 0 {
			return nil
		}
		head := message[:len(message)-len(cols[last])]
		return append(appendArray(bytes.Clone(head), len(others)), bytes.Join(others, nil)...)
	}
	if last < 2 {
		return message
	}
	channel, _ := bulk(cols[last-1])
	payload, _ := bulk(cols[last])
	kind, rest, _ := bytes.Cut(channel, []byte("@"))
	db, name, _ := bytes.Cut(rest, []byte("__:"))
	switch string(kind) {
	case "__keyevent":
		name = payload
	case "__keyspace":
	default:
		return message
	}
	if bytes.HasPrefix(name, []byte(reserved)) && string(db) == strconv.Itoa(s.e.up.dialer.opt.DB) {
		return nil
	}
	return message
}

// pushed passes on what Redis says without being asked. While the client does not read, nor do we: then Redis's own limit for such
// clients (client-output-buffer-limit) holds.
func (s *session) pushed(p *pin, frame []byte) {
	s.out.add(frame)
	if p.loop != nil {
		if s.out.bytes+s.sending >= s.lim.bytes {
			p.loop.hold(p.lane, true)
			s.mutes = true
		}
		return
	}
	for s.pin == p && !s.over && s.out.bytes+s.sending >= s.lim.bytes {
		s.d.wait()
	}
}

// hearAgain ends what pushed began, when the client has read.
func (s *session) hearAgain() {
	if s.mutes && s.out.bytes+s.sending < s.lim.bytes {
		s.mutes = false
		if s.pin != nil {
			s.loop.hold(s.pin.lane, false)
		}
	}
}

// confined: in RESP2 a subscriber may say little, and Redis has the words for the rest.
func (s *session) confined(sl *slot) bool {
	if s.proto >= 3 || !s.subs.any() {
		return false
	}
	name := sl.args[0]
	return !foldEqual(name, "quit") && !foldEqual(name, "reset") && !(len(name) > 8 && foldEqual(name[len(name)-9:], "subscribe"))
}
