package soak

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
)

// What a client's own keys may hold. Nobody else writes them, so a reply that was somebody else's, or a command that ran twice or
// not at all, shows. What became of a command whose client vanished is not known: both outcomes are possible until a later write is
// answered.

// absent is what a key holds that does not exist.
const absent = "\x00absent"

// text is a string, or a field of a hash.
type text struct {
	name, field string
	can         []string // what it may hold
}

func (k *text) must(v string) { k.can = []string{v} }

func (k *text) may(v string) {
	if !slices.Contains(k.can, v) {
		k.can = append(k.can, v)
	}
}

// holds judges a value that was read.
func (k *text) holds(f frame) error {
	got := f.text
	switch {
	case f.null:
		got = absent
	case f.kind != '$':
		return fmt.Errorf("%s is no string", f)
	}
	if !slices.Contains(k.can, got) {
		return fmt.Errorf("%s holds %.80q, may hold %.200q", k.name, got, k.can)
	}
	return nil
}

// read asks for it.
func (k *text) read() op {
	if k.field != "" {
		return op{args: []string{"HGET", k.name, k.field}, check: k.holds}
	}
	return op{args: []string{"GET", k.name}, check: k.holds}
}

// set writes it.
func (k *text) set(v string) op {
	if k.field != "" {
		return op{args: []string{"HSET", k.name, k.field, v}, check: func(f frame) error {
			k.must(v)
			return isNumber(f)
		}, lost: func() { k.may(v) }}
	}
	return op{args: []string{"SET", k.name, v}, check: func(f frame) error {
		k.must(v)
		return exactly('+', "OK")(f)
	}, lost: func() { k.may(v) }}
}

func isNumber(f frame) error {
	if _, ok := f.num(); !ok {
		return fmt.Errorf("no number: %s", f)
	}
	return nil
}

func exactly(kind byte, text string) func(f frame) error {
	return func(f frame) error {
		if !f.is(kind, text) {
			return fmt.Errorf("got %s, want %c%.100s", f, kind, text)
		}
		return nil
	}
}

// counter is a number that only rises, by one.
type counter struct {
	name   string
	lo, hi int64
}

func (k *counter) rose(f frame) error {
	n, ok := f.num()
	if !ok || n < k.lo+1 || n > k.hi+1 {
		return fmt.Errorf("the INCR of %s answers %s, it was %d to %d", k.name, f, k.lo, k.hi)
	}
	k.lo, k.hi = n, n
	return nil
}

func (k *counter) lost() { k.hi++ }

func (k *counter) holds(f frame) error {
	n, err := int64(0), error(nil)
	if !f.null {
		n, err = strconv.ParseInt(f.text, 10, 64)
	}
	if err != nil || n < k.lo || n > k.hi {
		return fmt.Errorf("%s holds %s, may hold %d to %d", k.name, f, k.lo, k.hi)
	}
	return nil
}

// keys are one client's. They outlive its connections as long as it is known what they hold.
type keys struct {
	db       int
	strings  []*text // of one route those at even places, of another one the others
	fields   []*text
	big      []*text
	counters []*counter
}

func newKeys(id string, db int) *keys {
	k := &keys{db: db}
	text := func(name, field string) *text { return &text{name: name, field: field, can: []string{absent}} }
	for i := range 4 {
		route := [...]string{"one:", "two:"}[i%2] + id
		k.strings = append(k.strings, text(fmt.Sprintf("%s:s%d", route, i), ""))
		if i < 2 {
			k.fields = append(k.fields, text(route+":h", "f"))
			k.big = append(k.big, text(route+":b", ""))
			k.counters = append(k.counters, &counter{name: route + ":n"})
		}
	}
	return k
}

// names are those of all keys.
func (k *keys) names() map[string]bool {
	names := map[string]bool{}
	for _, x := range slices.Concat(k.strings, k.fields, k.big) {
		names[x.name] = true
	}
	for _, x := range k.counters {
		names[x.name] = true
	}
	return names
}

// verify asks for everything that the keys hold.
func (k *keys) verify(c *conn) {
	for _, x := range slices.Concat(k.strings, k.fields, k.big) {
		c.do(x.read())
	}
	for _, x := range k.counters {
		c.do(op{args: []string{"GET", x.name}, check: x.holds})
	}
}

// ledger knows what all clients together have pushed to queues and popped from them since the last checkpoint.
type ledger struct {
	mu    sync.Mutex
	elems map[string]*element // guarded by mu
}

type element struct {
	queue  string
	sure   bool   // the push was answered
	popped string // by whom
}

func (l *ledger) push(queue, name string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.elems[name] = &element{queue: queue}
}

func (l *ledger) pushed(name string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.elems[name].sure = true
}

// pop judges an element that somebody got.
func (l *ledger) pop(queue, name, who string) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch e := l.elems[name]; {
	case e == nil:
		return fmt.Errorf("%.80q was popped, which nobody has pushed", name)
	case e.queue != queue:
		return fmt.Errorf("%s was popped from %s, it was pushed to %s", name, queue, e.queue)
	case e.popped != "":
		return fmt.Errorf("%s was popped by %s and again by %s", name, e.popped, who)
	default:
		e.popped = who
		return nil
	}
}

// settle compares what is left in the queues with what was pushed and not popped. Nobody who pops from them vanishes before the
// reply has come, so that nothing may be missing.
func (l *ledger) settle(left func(queue string) []frame) (wrong []error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	queues := map[string]bool{}
	for _, e := range l.elems {
		queues[e.queue] = true
	}
	there := map[string]bool{}
	for queue := range queues {
		for _, f := range left(queue) {
			e := l.elems[f.text]
			switch {
			case e == nil || e.queue != queue:
				wrong = append(wrong, fmt.Errorf("%.80q is in %s, where nobody has pushed it", f.text, queue))
			case e.popped != "":
				wrong = append(wrong, fmt.Errorf("%s is in %s, though %s has popped it", f.text, queue, e.popped))
			case there[f.text]:
				wrong = append(wrong, fmt.Errorf("%s is in %s twice", f.text, queue))
			}
			there[f.text] = true
		}
	}
	for name, e := range l.elems {
		if e.sure && e.popped == "" && !there[name] {
			wrong = append(wrong, fmt.Errorf("%s was pushed to %s and is lost", name, e.queue))
		}
	}
	l.elems = map[string]*element{}
	return wrong
}

// message is what the n-th publication of a connection on a channel says.
func message(channel, publisher string, n int) string {
	return strings.Join([]string{"m", channel, publisher, strconv.Itoa(n)}, "|")
}

// seen is how far a subscription has got with each publisher on each channel.
type seen map[[2]string]int

// next judges a message: of each publisher they come in order and without a gap, from the first that the subscriber got.
func (s seen) next(payload, channel string) error {
	parts := strings.Split(payload, "|")
	if len(parts) != 4 || parts[0] != "m" || parts[1] != channel {
		return fmt.Errorf("%.80q came on %s", payload, channel)
	}
	n, err := strconv.Atoi(parts[3])
	at := [2]string{channel, parts[2]}
	last, known := s[at]
	if err != nil || known && n != last+1 {
		return fmt.Errorf("%.80q came after number %d", payload, last)
	}
	s[at] = n
	return nil
}
