package proxy

import (
	"bytes"
	"context"
	"hash/maphash"
	"strings"
	"sync"

	cmdtab "cacheproxy/internal/command"
)

// A command that the table lacks may be one of a module, or of a later version of Redis. Redis itself is asked about it once,
// and what it tells serves as a row of the table; if that leaves open where the keys are, Redis is asked about every line.

// learned are the commands that Redis has told us of. What another Redis told is forgotten: whenever trust in one is lost,
// the epoch rises.
type learned struct {
	mu    sync.RWMutex
	epoch uint64                  // guarded by mu
	rows  map[string]*cmdtab.Info // guarded by mu; by name in lower case
}

// maxLearned bounds the names that are kept. The modules of Redis 8 have some 150.
const maxLearned = 1000

// resolve finds the row of a command line, in the table or among the learned. nil: Redis must be asked.
func (e *engine) resolve(args [][]byte) *cmdtab.Info {
	if info := cmdtab.Resolve(args); info != nil {
		return info
	}
	return e.learned.find(toldName(args), e.up.epoch.Load())
}

// toldName is the name under which Redis tells of a command: of a container that the table knows it is the subcommand's.
func toldName(args [][]byte) string {
	name := string(args[0])
	if strings.Contains(name, "|") {
		return "" // Redis would tell of a subcommand, which this is not
	}
	if cmdtab.Lookup(args[0]) != nil && len(args) > 1 {
		name += "|" + string(args[1])
	}
	return strings.ToLower(name)
}

func (l *learned) find(name string, epoch uint64) *cmdtab.Info {
	l.mu.RLock()
	defer l.mu.RUnlock()
	if l.epoch != epoch {
		return nil
	}
	return l.rows[name]
}

func (l *learned) add(name string, info *cmdtab.Info, epoch uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.epoch != epoch || l.rows == nil || len(l.rows) >= maxLearned {
		l.epoch, l.rows = epoch, map[string]*cmdtab.Info{}
	}
	l.rows[name] = info
}

// unknown begins a command without a row. It is treated as a write of the keys that Redis names in it, unless it is learned.
func (s *session) unknown(sl *slot) {
	s.askKeys(sl, func(exists bool) {
		if sl.info != nil {
			s.keyed(sl)
			return
		}
		for _, r := range sl.routes {
			if r != nil && r.Phase.Rules().UsesStore {
				s.loadRunMirror(sl)
				return
			}
		}
		if !exists {
			s.send(sl, false) // Redis finds the words
			return
		}
		// It may wait for an event, and then others must not wait behind it.
		s.takePin()
		s.sendOn(s.pin.lane, sl, false)
		sl.blocks = true
	})
}

// askKeys asks Redis about a command without a row and the keys that it names, then goes on, with sl.info if it is learned.
// exists: Redis may have that command.
func (s *session) askKeys(sl *slot, then func(exists bool)) {
	s.begin(sl)
	tag := sl.tag
	name := toldName(sl.args)
	getkeys := appendArray(nil, len(sl.args)+2)
	getkeys = appendBulk(getkeys, "COMMAND")
	getkeys = appendBulk(getkeys, "GETKEYS")
	getkeys = append(getkeys, sl.raw[bytes.IndexByte(sl.raw, '\n')+1:]...)
	e := s.e
	e.wg.Go(func() {
		epoch := e.up.epoch.Load()
		frame, err := e.up.roundTrip(context.Background(), appendCommand(nil, "COMMAND", "INFO", name))
		exists, told := toldOf(frame)
		switch {
		case err == nil && !exists:
			s.event(sl, tag, func() { then(false) })
			return
		case err == nil && told != nil:
			e.learned.add(name, told, epoch)
			s.event(sl, tag, func() {
				sl.info = told
				s.locate(sl)
				then(true)
			})
			return
		case err == nil:
			frame, err = e.up.roundTrip(context.Background(), getkeys)
		}
		s.event(sl, tag, func() { s.named(sl, frame, err, then) })
	})
}

// named goes on when Redis has named the keys of a command, or has not.
func (s *session) named(sl *slot, frame []byte, err error, then func(exists bool)) {
	if err != nil && string(errorCode(frame)) != "ERR" && s.e.storeInUse() { // ERR: it names none, or the line is malformed
		if s.tx != nil {
			s.tx.dirty = true
		}
		switch {
		case !isError(frame):
			s.answerClear(sl, unavailable(nil, "redis cannot be reached"))
		case classifyReply(frame) == outAuth:
			s.answerClear(sl, &refusal{"DENIED", "redis does not let the proxy ask which keys this command names (COMMAND)"})
		default:
			s.finish(sl, frame)
		}
		return
	}
	names, _ := elements(frame, nil)
	if err == nil && s.atHome() {
		router := s.e.router.Load()
		for _, f := range names {
			name, _ := bulk(f)
			for i, a := range sl.args[1:] {
				if bytes.Equal(a, name) {
					r := router.Match(name)
					sl.keys = append(sl.keys, cmdtab.Key{Arg: i + 1, Read: true, Write: true})
					sl.routes = append(sl.routes, r)
					sl.hashes = append(sl.hashes, maphash.Bytes(hashSeed, name))
					sl.routed = sl.routed || r != nil
					break
				}
			}
		}
	}
	then(true)
}

// newerSet: a SET with a condition on the value that is there, as Redis has them since 8.4 (and Valkey one of them since 8.1). An
// older Redis has the words to refuse it.
func newerSet(args [][]byte) bool {
	if !foldEqual(args[0], "set") || len(args) < 4 {
		return false
	}
	for _, a := range args[3:] {
		for _, word := range []string{"ifeq", "ifne", "ifdeq", "ifdne"} {
			if foldEqual(a, word) {
				return true
			}
		}
	}
	return false
}

// toldOf reads the reply to COMMAND INFO for one name: whether Redis may have the command, and its row if that has all there is
// to know. A container among the unknown is asked about line by line.
func toldOf(frame []byte) (exists bool, info *cmdtab.Info) {
	list, _ := elements(frame, nil)
	if len(list) != 1 {
		return true, nil
	}
	fields, _ := elements(list[0], nil)
	if len(fields) < 10 {
		return !isNull(list[0]), nil
	}
	if subs, _ := elements(fields[9], nil); len(subs) > 0 {
		return true, nil
	}
	name, _ := bulk(fields[0])
	arity, _ := parseInt(fields[1])
	t := cmdtab.Told{Name: string(name), Arity: int(arity), Flags: words(fields[2])}
	specs, _ := elements(fields[8], nil)
	for _, f := range specs {
		spec := pairs(f)
		begin, find := pairs(spec["begin_search"]), pairs(spec["find_keys"])
		k := cmdtab.ToldSpec{Flags: words(spec["flags"]), Begin: word(begin["type"]), Find: word(find["type"]), Args: map[string]int{}}
		for _, part := range [][]byte{begin["spec"], find["spec"]} {
			for name, value := range pairs(part) {
				if n, ok := parseInt(value); ok {
					k.Args[name] = int(n)
				} else {
					k.Keyword = word(value)
				}
			}
		}
		t.Specs = append(t.Specs, k)
	}
	return true, cmdtab.Learn(t)
}

func word(frame []byte) string {
	b, _ := bulk(frame)
	return string(b)
}

func words(frame []byte) (out []string) {
	list, _ := elements(frame, nil)
	for _, f := range list {
		out = append(out, word(f))
	}
	return out
}

// pairs reads a map, which RESP2 sends as a list of keys and values by turns.
func pairs(frame []byte) map[string][]byte {
	list, _ := elements(frame, nil)
	out := make(map[string][]byte, len(list)/2)
	for i := 0; i+1 < len(list); i += 2 {
		out[word(list[i])] = list[i+1]
	}
	return out
}
