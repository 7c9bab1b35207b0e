package soak

import (
	"crypto/sha1"
	"encoding/hex"
	"fmt"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"time"
)

// actor is a client that lives again and again, each time on a new connection.
type actor struct {
	w    *world
	n    int
	rng  *rand.Rand
	db   int
	life int
	made int   // tokens
	keys *keys // what earlier lives left, if that is known
}

// token is a word that nobody else says.
func (a *actor) token() string {
	a.made++
	return fmt.Sprintf("t%d.%d.%d", a.n, a.life, a.made)
}

// filled is a value that is this client's in each of its parts.
func (a *actor) filled(size int) string {
	tok := a.token() + " "
	return strings.Repeat(tok, size/len(tok)+1)
}

func (a *actor) one(in int) bool { return a.rng.IntN(in) == 0 }

func pick[T any](a *actor, of ...T) T { return of[a.rng.IntN(len(of))] }

// pause is a moment up to d, or until the section ends.
func (a *actor) pause(d time.Duration) {
	select {
	case <-a.w.stop:
	case <-time.After(time.Duration(a.rng.Int64N(int64(d)))):
	}
}

func (a *actor) stopped() bool {
	select {
	case <-a.w.stop:
		return true
	default:
		return false
	}
}

// run lives until the section ends.
func (a *actor) run() {
	if a.one(8) {
		a.db = 1 + a.rng.IntN(3)
	}
	for !a.stopped() {
		a.pause(300 * time.Millisecond) // not all at once
		a.live()
	}
	if a.keys != nil {
		a.w.retire(a.keys)
	}
}

// live is one connection from its beginning to its end.
func (a *actor) live() {
	a.life++
	c := a.dial("")
	if c == nil {
		return
	}
	if a.keys == nil {
		a.keys = newKeys(strings.ReplaceAll(a.token(), ".", "-"), a.db)
	} else if a.one(3) {
		a.keys.verify(c) // nothing has changed since
	}
	if a.one(3) {
		name := a.token()
		c.expect('+', "OK", "CLIENT", "SETNAME", name)
		c.expect('$', name, "CLIENT", "GETNAME")
	}
	alive := true
	for n := a.rng.IntN(8); n > 0 && alive && !a.stopped(); n-- {
		if alive = a.act(c); !a.one(4) {
			a.pause(250 * time.Millisecond)
		}
	}
	if alive && c.wait() {
		a.leave(c)
	}
	c.vanish()
	if c.forgotten { // some of its commands may still be about to run: later lives leave these keys alone
		a.w.retire(a.keys)
		a.keys = nil
	}
}

// dial connects as this client.
func (a *actor) dial(what string) *conn {
	c := a.w.dial(a.w.proxy.addr, fmt.Sprintf("client %d.%d%s", a.n, a.life, what), a.rng)
	if c != nil {
		if proto := a.rng.IntN(4); proto > 0 {
			a.hello(c, max(2, proto))
		}
		if a.db != 0 {
			c.expect('+', "OK", "SELECT", strconv.Itoa(a.db))
		}
	}
	return c
}

// with does something that needs a second connection of the same client.
func (a *actor) with(do func(p *conn) bool) bool {
	p := a.dial("'s peer")
	if p == nil {
		return false
	}
	defer p.vanish()
	return do(p)
}

func (a *actor) hello(c *conn, proto int) {
	c.wait() // what is on its way has the old form
	c.proto = proto
	c.do(op{args: []string{"HELLO", strconv.Itoa(proto)}, check: func(f frame) error {
		for i := 0; i+1 < len(f.elems); i += 2 {
			if f.elems[i].is('$', "proto") && f.elems[i+1].is(':', strconv.Itoa(proto)) && (f.kind == '%') == (proto == 3) {
				return nil
			}
		}
		return fmt.Errorf("no greeting: %s", f)
	}})
}

const script = "return {ARGV[1], redis.call('INCR', KEYS[1])}"

var scriptSHA = func() string {
	sum := sha1.Sum([]byte(script))
	return hex.EncodeToString(sum[:])
}()

// some is a random small command, whose reply is this client's alone.
func (a *actor) some() op {
	k := a.keys
	tok := a.token()
	at := a.rng.IntN(2) // which route
	s, n := k.strings[a.rng.IntN(4)], k.counters[at]
	switch a.rng.IntN(20) {
	case 0, 1:
		return op{args: []string{"ECHO", tok}, check: exactly('$', tok)}
	case 2:
		return op{args: []string{"GET"}, check: exactly('-', "ERR wrong number of arguments for 'get' command")}
	case 3, 4, 5:
		return s.set(tok)
	case 6:
		o := s.set(tok)
		o.args = append(o.args, "EX", "7200")
		return o
	case 7:
		return k.fields[at].set(tok)
	case 8:
		return k.fields[at].read()
	case 9:
		return op{args: []string{"GETSET", s.name, tok}, check: func(f frame) error {
			defer s.must(tok)
			return s.holds(f)
		}, lost: func() { s.may(tok) }}
	case 10:
		return op{args: []string{"GETDEL", s.name}, check: func(f frame) error {
			defer s.must(absent)
			return s.holds(f)
		}, lost: func() { s.may(absent) }}
	case 11, 12:
		return op{args: []string{"INCR", n.name}, check: n.rose, lost: n.lost}
	case 13, 14:
		by := pick(a, []string{"EVAL", script}, []string{"EVALSHA", scriptSHA})
		return op{args: []string{by[0], by[1], "1", n.name, tok}, check: func(f frame) error {
			if len(f.elems) != 2 || !f.elems[0].is('$', tok) {
				return fmt.Errorf("another script's result: %s", f)
			}
			return n.rose(f.elems[1])
		}, lost: n.lost}
	case 15:
		x, y := k.strings[at], k.strings[at+2]
		return op{args: []string{"MSET", x.name, tok, y.name, tok}, check: func(f frame) error {
			x.must(tok)
			y.must(tok)
			return exactly('+', "OK")(f)
		}, lost: func() { x.may(tok); y.may(tok) }}
	case 16:
		args := []string{"MGET"}
		for _, s := range k.strings {
			args = append(args, s.name)
		}
		return op{args: args, check: func(f frame) error {
			if len(f.elems) != len(k.strings) {
				return fmt.Errorf("MGET answers %s", f)
			}
			for i, s := range k.strings {
				if err := s.holds(f.elems[i]); err != nil {
					return err
				}
			}
			return nil
		}}
	}
	return s.read()
}

// act is one thing that a client does. false: the connection has ended.
func (a *actor) act(c *conn) bool {
	type choice struct {
		weight int
		do     func(c *conn) bool
	}
	acts := []choice{
		{16, a.pipeline}, {8, a.push}, {6, a.pop}, {6, a.publish}, {5, a.block}, {5, a.subscribe}, {4, a.transaction}, {3, a.watch}, {2, a.quiet},
		{2, a.large}, {2, a.private}, {2, a.orphan}, {2, a.track}, {1, a.slowly}, {1, a.again}, {1, a.monitor},
	}
	all := 0
	for _, x := range acts {
		all += x.weight
	}
	n := a.rng.IntN(all)
	return acts[slices.IndexFunc(acts, func(x choice) bool { n -= x.weight; return n < 0 })].do(c)
}

// rest waits for the replies, or leaves them to the next act.
func (a *actor) rest(c *conn) bool {
	if a.one(4) {
		c.flush()
		return true
	}
	return c.wait()
}

func (a *actor) pipeline(c *conn) bool {
	depth := 15
	if a.one(10) {
		depth = pick(a, 150, 150, 2000) // more than a client may have in flight
	}
	for range 1 + a.rng.IntN(depth) {
		c.do(a.some())
	}
	return a.rest(c)
}

// slowly reads slower than it asks.
func (a *actor) slowly(c *conn) bool {
	c.slow.Store(true)
	defer c.slow.Store(false)
	for range 3 {
		v := a.filled(200_000)
		c.expect('$', v, "ECHO", v)
		c.do(a.some())
	}
	return c.wait()
}

// again begins anew on the same connection.
func (a *actor) again(c *conn) bool {
	if a.one(2) {
		if !c.wait() {
			return false
		}
		c.proto = 2
		c.expect('+', "RESET", "RESET")
	}
	a.hello(c, 2+a.rng.IntN(2))
	if a.db != 0 {
		c.expect('+', "OK", "SELECT", strconv.Itoa(a.db))
	}
	return c.wait()
}

func (a *actor) transaction(c *conn) bool {
	c.expect('+', "OK", "MULTI")
	ops := a.queued(c, 1+a.rng.IntN(5))
	if a.one(5) {
		c.expect('+', "OK", "DISCARD")
	} else {
		c.exec(ops)
	}
	return a.rest(c)
}

// queued says something in a transaction.
func (a *actor) queued(c *conn, n int) (ops []op) {
	for range n {
		if o := a.some(); len(o.args) > 1 { // others would abort all of it
			ops = append(ops, o)
			c.expect('+', "QUEUED", o.args...)
		}
	}
	return ops
}

func (c *conn) exec(ops []op) {
	c.do(op{args: []string{"EXEC"}, check: func(f frame) error {
		if f.kind != '*' || f.null || len(f.elems) != len(ops) {
			return fmt.Errorf("EXEC of %d commands answers %s", len(ops), f)
		}
		for i, o := range ops {
			if err := o.check(f.elems[i]); err != nil {
				return fmt.Errorf("in EXEC, %.100q: %w", o.args, err)
			}
		}
		return nil
	}, lost: func() {
		for _, o := range ops {
			if o.lost != nil {
				o.lost()
			}
		}
	}})
}

// watch sees EXEC refused if and only if somebody has written a watched key.
func (a *actor) watch(c *conn) bool {
	s := pick(a, a.keys.strings...)
	c.expect('+', "OK", "WATCH", s.name)
	if !c.wait() {
		return false
	}
	how := a.rng.IntN(3)
	switch set := s.set(a.token()); how {
	case 0:
		c.do(s.read())
	case 1:
		c.do(set)
	case 2:
		if !a.with(func(p *conn) bool { p.do(set); return p.wait() }) {
			return false
		}
	}
	set := s.set(a.token())
	c.expect('+', "OK", "MULTI")
	c.expect('+', "QUEUED", set.args...)
	if how == 0 {
		c.exec([]op{set})
	} else {
		c.do(op{args: []string{"EXEC"}, check: func(f frame) error {
			if !f.null {
				return fmt.Errorf("EXEC answers %s, though a watched key has changed", f)
			}
			return nil
		}})
	}
	return c.wait()
}

// quiet switches replies off for a while. The reply that ends it tells that all before it has run.
func (a *actor) quiet(c *conn) bool {
	s := pick(a, a.keys.strings...)
	var said []string
	set := func() {
		said = append(said, a.token())
		c.say("SET", s.name, said[len(said)-1])
	}
	after := func(check func(f frame) error) func(f frame) error {
		return func(f frame) error { s.must(said[len(said)-1]); return check(f) }
	}
	if a.one(2) {
		c.say("CLIENT", "REPLY", "SKIP")
		set()
		tok := a.token()
		c.do(op{args: []string{"ECHO", tok}, check: after(exactly('$', tok))})
		return c.wait()
	}
	c.say("CLIENT", "REPLY", "OFF")
	for range 1 + a.rng.IntN(10) {
		c.say("ECHO", a.token())
		set()
	}
	c.do(op{args: []string{"CLIENT", "REPLY", "ON"}, check: after(exactly('+', "OK"))})
	return c.wait()
}

// large sends and fetches a value of megabytes.
func (a *actor) large(c *conn) bool {
	select {
	case a.w.large <- struct{}{}:
		defer func() { <-a.w.large }()
	default:
		return a.pipeline(c) // too many are at it
	}
	k := pick(a, a.keys.big...)
	c.do(k.set(a.filled(pick(a, 1, 1, 2, 4, 8) << 20)))
	for range 1 + a.rng.IntN(2) {
		c.do(a.some())
		c.do(k.read())
	}
	c.do(op{args: []string{"GETDEL", k.name}, check: func(f frame) error {
		defer k.must(absent)
		return k.holds(f)
	}})
	return c.wait()
}

// queue is the name of one that all clients of the database use, a list or a sorted set.
func (a *actor) queue() string {
	return fmt.Sprintf("%s:%d:%d", pick(a, "ql", "qz"), a.db, a.rng.IntN(6))
}

// add is the push of a new element.
func (a *actor) add(queue string) op {
	e := a.token()
	a.w.ledger.push(queue, e)
	args := []string{pick(a, "LPUSH", "RPUSH"), queue, e}
	if queue[1] == 'z' {
		args = []string{"ZADD", queue, strconv.Itoa(a.rng.IntN(100)), e}
	}
	return op{args: args, check: func(f frame) error {
		if n, ok := f.num(); !ok || n < 1 {
			return fmt.Errorf("it answers %s", f)
		}
		a.w.ledger.pushed(e)
		a.w.pushes.Add(1)
		return nil
	}}
}

func (a *actor) push(c *conn) bool {
	for range 1 + a.rng.IntN(6) {
		c.do(a.add(a.queue()))
		if a.one(3) {
			c.do(a.some())
		}
	}
	return a.rest(c)
}

// take is a pop from queue, judged by the ledger. got finds the element in a reply that is not null.
func (a *actor) take(c *conn, queue string, got func(f frame) frame, args ...string) {
	c.do(op{args: args, check: func(f frame) error {
		if f.null || f.kind == '*' && len(f.elems) == 0 {
			return nil
		}
		e := got(f)
		if e.kind != '$' {
			return fmt.Errorf("it answers %s", f)
		}
		a.w.pops.Add(1)
		return a.w.ledger.pop(queue, e.text, c.who)
	}})
}

func (a *actor) pop(c *conn) bool {
	for range 1 + a.rng.IntN(6) {
		if q := a.queue(); q[1] == 'z' {
			a.take(c, q, at(0), "ZPOPMIN", q)
		} else {
			a.take(c, q, at(), pick(a, "LPOP", "RPOP"), q)
		}
	}
	return a.rest(c)
}

// at finds an element of an element. What has another shape is nothing.
func at(path ...int) func(f frame) frame {
	return func(f frame) frame {
		for _, i := range path {
			if i >= len(f.elems) {
				return frame{}
			}
			f = f.elems[i]
		}
		return f
	}
}

// blocking is a pop that waits.
func (a *actor) blocking(c *conn, q, timeout string) {
	switch {
	case q[1] == 'z':
		a.take(c, q, at(1), "BZPOPMIN", q, timeout)
	case a.one(3):
		a.take(c, q, at(1, 0), "BLMPOP", timeout, "2", "ql:none", q, "LEFT")
	default:
		a.take(c, q, at(1), pick(a, "BLPOP", "BRPOP"), "ql:none", q, timeout)
	}
}

func (a *actor) block(c *conn) bool {
	for range 1 + a.rng.IntN(2) {
		a.blocking(c, a.queue(), pick(a, "0.01", "0.1", "0.5", "1"))
		if a.one(2) {
			c.do(a.some())
		}
		if a.one(8) {
			c.expect(':', "0", "WAIT", "1", "50") // there is no replica
		}
	}
	return c.wait()
}

// orphan leaves an element in a queue at which somebody waited who has hung up. Nobody may get it.
func (a *actor) orphan(c *conn) bool {
	if a.db != 0 {
		return a.pipeline(c) // a name given after SELECT does not reach Redis
	}
	name := a.token()
	q := pick(a, "ql", "qz") + ":0:" + name
	r := a.w.dial(a.w.redis.addr, c.who+" in Redis", a.rng)
	if r == nil {
		return false
	}
	defer r.vanish()
	redis := func(waits bool) bool { // until Redis has somebody of that name who waits, or not
		end := time.Now().Add(patience)
		for found := !waits; found != waits; {
			if time.Now().After(end) {
				a.w.wrong("%s: never in %v: Redis has its peer wait: %t", c.who, patience, waits)
				return false
			}
			r.do(op{args: []string{"CLIENT", "LIST"}, check: func(f frame) error {
				_, line, listed := strings.Cut(f.text, " name="+name+" ")
				line, _, _ = strings.Cut(line, "\n")
				found = listed && strings.Contains(line, " flags=b ")
				return nil
			}})
			if !r.wait() {
				return false
			}
		}
		return true
	}
	if !a.with(func(p *conn) bool {
		p.expect('+', "OK", "CLIENT", "SETNAME", name)
		a.blocking(p, q, "0")
		p.flush()
		return redis(true)
	}) || !redis(false) {
		return false
	}
	c.do(a.add(q))
	return c.wait()
}

const channels = 8

func (a *actor) publish(c *conn) bool {
	verb, ch := pick(a, "PUBLISH", "PUBLISH", "SPUBLISH"), a.rng.IntN(channels)
	for range 1 + a.rng.IntN(15) {
		c.publish(verb, ch)
		if a.one(5) {
			c.do(a.some())
		}
	}
	return a.rest(c)
}

// publish sends a numbered message. What a client had sent when it vanished runs from its beginning on, so that there is no gap.
func (c *conn) publish(verb string, channel int) {
	ch := fmt.Sprintf("%ch:%d", strings.ToLower(verb)[0], channel)
	c.said[ch]++
	c.w.published.Add(1)
	c.do(op{args: []string{verb, ch, message(ch, c.who, c.said[ch])}, check: isNumber})
}

// join subscribes.
func (c *conn) join(verb, kind string, names ...string) {
	c.do(op{confirms: len(names), args: append([]string{verb}, names...), check: func(f frame) error {
		if len(f.elems) != 3 || f.word() != strings.ToLower(verb) || !slices.Contains(names, f.elems[1].text) {
			return fmt.Errorf("no confirmation: %s", f)
		}
		c.subs[kind+f.elems[1].text] = seen{}
		return nil
	}})
}

// part unsubscribes from everything of a kind, with or without the names.
func (c *conn) part(verb, kind string, named bool) {
	c.mu.Lock()
	names := []string{}
	for name := range c.subs {
		if name[:1] == kind {
			names = append(names, name[1:])
		}
	}
	c.mu.Unlock()
	if len(names) == 0 {
		return
	}
	args := []string{verb}
	if named {
		args = append(args, names...)
	}
	c.do(op{confirms: len(names), args: args, check: func(f frame) error {
		if len(f.elems) != 3 || f.word() != strings.ToLower(verb) || c.subs[kind+f.elems[1].text] == nil {
			return fmt.Errorf("no confirmation of %q: %s", names, f)
		}
		delete(c.subs, kind+f.elems[1].text)
		return nil
	}})
}

// subscribe listens for a while. In RESP3 it goes on with everything else meanwhile.
func (a *actor) subscribe(c *conn) bool {
	if !c.wait() {
		return false
	}
	a.joinSome(c)
	c.slow.Store(a.one(4))
	defer c.slow.Store(false)
	for range 1 + a.rng.IntN(4) {
		a.pause(700 * time.Millisecond)
		tok := a.token()
		if c.proto == 3 {
			c.expect('$', tok, "PING", tok)
			c.do(a.some())
			c.publish("PUBLISH", a.rng.IntN(channels))
		} else {
			c.do(op{args: []string{"PING", tok}, check: func(f frame) error {
				if len(f.elems) != 2 || !f.elems[0].is('$', "pong") || !f.elems[1].is('$', tok) {
					return fmt.Errorf("PING answers %s", f)
				}
				return nil
			}})
		}
		c.flush()
	}
	if !c.wait() {
		return false
	}
	c.part("UNSUBSCRIBE", "m", a.one(2))
	c.part("PUNSUBSCRIBE", "p", a.one(2))
	c.part("SUNSUBSCRIBE", "s", a.one(2))
	return c.wait()
}

func (a *actor) joinSome(c *conn) {
	for range 1 + a.rng.IntN(2) {
		var some, shards []string
		for _, i := range a.rng.Perm(channels)[:1+a.rng.IntN(4)] {
			some, shards = append(some, fmt.Sprintf("ph:%d", i)), append(shards, fmt.Sprintf("sh:%d", i))
		}
		switch a.rng.IntN(4) {
		case 0:
			c.join("PSUBSCRIBE", "p", pick(a, "ph:*", "ph:[0-2]", "p?:1"))
		case 1:
			c.join("SSUBSCRIBE", "s", shards...)
		default:
			c.join("SUBSCRIBE", "m", some...)
		}
	}
}

// private knows who listens: nobody, the other connection, nobody.
func (a *actor) private(c *conn) bool {
	ch := "own:" + a.token()
	verb, kind := "", "m"
	if a.one(3) {
		verb, kind = "S", "s"
	}
	seq := 0
	say := func(listeners string) {
		seq++
		c.expect(':', listeners, verb+"PUBLISH", ch, message(ch, "me", seq))
	}
	say("0")
	return c.wait() && a.with(func(p *conn) bool {
		p.join(verb+"SUBSCRIBE", kind, ch)
		if !p.wait() {
			return false
		}
		for range 3 {
			say("1")
		}
		if !c.wait() || !p.until("what was published is heard", func() bool { return p.subs[kind+ch][[2]string{ch, "me"}] == 4 }) {
			return false
		}
		if p.part(verb+"UNSUBSCRIBE", kind, a.one(2)); !p.wait() {
			return false
		}
		say("0")
		return c.wait()
	})
}

// track keeps what it has read, and is told when somebody changes it.
func (a *actor) track(c *conn) bool {
	if c.proto != 3 {
		a.hello(c, 3)
		if !c.wait() {
			return false
		}
	}
	s := pick(a, a.keys.strings...)
	how := []string{"CLIENT", "TRACKING", "ON"}
	if a.one(3) {
		how = append(how, "BCAST", "PREFIX", s.name)
	}
	if !c.wait() {
		return false
	}
	c.mu.Lock()
	c.reads = a.keys.names()
	c.mu.Unlock()
	c.expect('+', "OK", how...)
	for range 1 + a.rng.IntN(3) {
		c.do(s.read())
		if !c.wait() {
			return false
		}
		c.mu.Lock()
		before := c.news[s.name]
		c.mu.Unlock()
		if !a.with(func(p *conn) bool { p.do(s.set(a.token())); return p.wait() }) ||
			!c.until("the change is told", func() bool { return c.news[s.name] > before }) {
			return false
		}
		c.do(a.some())
	}
	c.expect('+', "OK", "CLIENT", "TRACKING", "OFF")
	return c.wait()
}

// monitor sees what others do, for a moment.
func (a *actor) monitor(_ *conn) bool {
	select {
	case a.w.monitor <- struct{}{}:
		defer func() { <-a.w.monitor }()
	default:
		return true // it costs all the others
	}
	return a.with(func(p *conn) bool {
		if !p.wait() {
			return false
		}
		p.mu.Lock()
		p.monitors = true
		p.mu.Unlock()
		p.expect('+', "OK", "MONITOR")
		if !p.wait() {
			return false
		}
		a.pause(200 * time.Millisecond)
		if a.one(2) {
			return true
		}
		p.expect('+', "RESET", "RESET")
		if !p.wait() {
			return false
		}
		p.proto = 2
		tok := a.token()
		p.expect('$', tok, "ECHO", tok)
		return p.wait()
	})
}

// leave is how a connection ends on which nothing is due.
func (a *actor) leave(c *conn) {
	how := pick(a, "QUIT", "close", "in mid-pipeline", "in mid-command", "half-closed", "in mid-reply", "blocked", "subscribed", "in MULTI", "killed")
	a.w.ended(how)
	some := func(n int) {
		for range a.rng.IntN(n) {
			c.do(a.some())
		}
	}
	switch how {
	case "QUIT":
		some(5)
		c.expect('+', "OK", "QUIT")
		c.farewell()
		return
	case "half-closed":
		some(20)
		c.mu.Lock()
		c.mayEnd = true // before the proxy does
		c.mu.Unlock()
		c.flush()
		_ = c.nc.CloseWrite()
		c.farewell()
		return
	case "killed":
		id := ""
		c.do(op{args: []string{"CLIENT", "ID"}, check: func(f frame) error { id = f.text; return isNumber(f) }})
		if !c.wait() {
			return
		}
		c.mu.Lock()
		c.mayEnd = true
		c.mu.Unlock()
		if a.with(func(p *conn) bool { p.expect(':', "1", "CLIENT", "KILL", "ID", id); return p.wait() }) {
			c.farewell()
		}
		return
	case "in mid-pipeline":
		for range 1 + a.rng.IntN(40) {
			switch a.rng.IntN(6) {
			case 0:
				c.publish("PUBLISH", a.rng.IntN(channels))
			case 1:
				c.do(a.add(a.queue()))
			default:
				c.do(a.some())
			}
		}
	case "in mid-command":
		half := appendCommand(nil, "SET", a.keys.strings[0].name, a.filled(1+a.rng.IntN(100_000))) // must not run
		c.out = half[:1+a.rng.IntN(len(half)-1)]
	case "in mid-reply":
		c.slow.Store(true)
		v := a.filled(3 << 20)
		c.expect('$', v, "ECHO", v)
	case "blocked":
		switch a.rng.IntN(4) {
		case 0:
			c.expect('-', "nothing ever comes", "XREAD", "BLOCK", "0", "STREAMS", "xs:none", "$")
		case 1:
			c.expect('-', "nothing ever comes", "WAIT", "1", "0")
		default:
			a.blocking(c, pick(a, "ql:none", "qz:none"), "0")
		}
		some(3)
	case "subscribed":
		a.joinSome(c)
	case "in MULTI":
		c.expect('+', "OK", "MULTI")
		a.queued(c, 1+a.rng.IntN(4)) // none of it may run
	}
	c.flush()
	if a.one(2) {
		a.pause(500 * time.Millisecond)
	}
	c.vanish()
}
