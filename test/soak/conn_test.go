package soak

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// patience bounds a wait for what takes milliseconds on a machine that has nothing else to do.
const patience = time.Minute

// op is a command and what its reply must be.
type op struct {
	args  []string
	check func(f frame) error
	// lost: the client went before the reply came, so it may have run or not. nil: that makes no difference.
	lost     func()
	confirms int // how many confirmations of SUBSCRIBE or the like are its reply; 0: it is an ordinary one
}

// conn is a connection, to the proxy unless its client looks behind it. One goroutine, its owner's, sends; another one, its own, reads and judges what comes.
type conn struct {
	w     *world
	who   string
	rng   *rand.Rand // the owner's
	nc    *net.TCPConn
	out   []byte         // the owner's: not yet written
	proto int            // changes only while nothing is due
	said  map[string]int // the owner's: how many publications there were on a channel
	slow  atomic.Bool    // read little by little

	mu        sync.Mutex
	moved     *sync.Cond
	due       []*op           // guarded by mu: commands whose replies have not come
	subs      map[string]seen // guarded by mu: by kind (m, p, s) and name
	reads     map[string]bool // guarded by mu: keys whose changes Redis may tell; nil: none
	news      map[string]int  // guarded by mu: how often it has
	monitors  bool            // guarded by mu
	mayEnd    bool            // guarded by mu: the proxy closes when everything is answered
	left      bool            // guarded by mu: the client has ended it
	over      bool            // guarded by mu
	forgotten bool            // guarded by mu: some command was lost
	past      [20]string      // guarded by mu: what was said and heard last, for who looks for a mistake
	pastNext  int             // guarded by mu
}

// remember notes what was said or heard. It is called under mu.
func (c *conn) remember(format string, args ...any) {
	c.past[c.pastNext%len(c.past)] = fmt.Sprintf(format, args...)
	c.pastNext++
}

// history is what was remembered. It is called under mu.
func (c *conn) history() string {
	var b strings.Builder
	for i := range c.past {
		if s := c.past[(c.pastNext+i)%len(c.past)]; s != "" {
			b.WriteString("\n\t\t" + s)
		}
	}
	return b.String()
}

func (w *world) dial(addr, who string, rng *rand.Rand) *conn {
	nc, err := net.DialTimeout("tcp", addr, patience)
	if err != nil {
		w.wrong("%s cannot connect: %v", who, err)
		return nil
	}
	w.conns.Add(1)
	c := &conn{w: w, who: who, rng: rng, nc: nc.(*net.TCPConn), proto: 2, said: map[string]int{}, subs: map[string]seen{}, news: map[string]int{}}
	c.moved = sync.NewCond(&c.mu)
	w.readers.Go(c.reader)
	return c
}

// Read is what the reader reads by.
func (c *conn) Read(b []byte) (int, error) {
	if c.slow.Load() {
		time.Sleep(time.Millisecond)
		b = b[:min(len(b), 2048)]
	}
	n, err := c.nc.Read(b)
	c.w.bytes.Add(int64(n))
	return n, err
}

func (c *conn) reader() {
	rd := bufio.NewReaderSize(c, 16<<10)
	for {
		f, err := readFrame(rd)
		if err == nil {
			err = c.got(f)
		}
		if err != nil {
			c.end(err)
			return
		}
	}
}

// mistake is a reply that must not be.
type mistake string

func (m mistake) Error() string { return string(m) }

func mistakef(format string, args ...any) error { return mistake(fmt.Sprintf(format, args...)) }

// got judges what came.
func (c *conn) got(f frame) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	defer c.moved.Broadcast()
	word := f.word()
	switch {
	case c.left:
		return io.EOF // the client does not look any more
	case c.monitors && f.kind == '+' && strings.Contains(f.text, "] \""):
		return nil
	case word == "message" || word == "pmessage" || word == "smessage":
		return c.heard(f, word)
	case word == "invalidate" && f.kind == '>':
		return c.invalidated(f)
	case len(c.due) == 0:
		return mistakef("a reply that nobody asked for: %s", f)
	}
	o := c.due[0]
	confirms := strings.HasSuffix(word, "subscribe") && (f.kind == '>') == (c.proto == 3)
	if confirms != (o.confirms > 0) || f.kind == '>' && !confirms {
		return mistakef("%.100q: %s", o.args, f)
	}
	if o.confirms--; o.confirms <= 0 {
		c.due = c.due[1:]
	}
	c.w.replies.Add(1)
	c.remember("heard %.60s, to %.60q", f, o.args)
	if err := o.check(f); err != nil {
		return mistakef("%.100q: %v", o.args, err)
	}
	return nil
}

// heard judges what was published.
func (c *conn) heard(f frame, word string) error {
	c.w.messages.Add(1)
	n := len(f.elems)
	if (n != 3 || word == "pmessage") && (n != 4 || word != "pmessage") || (f.kind == '>') != (c.proto == 3) {
		return mistakef("no message in RESP%d: %s", c.proto, f)
	}
	s, ok := c.subs[word[:1]+f.elems[1].text]
	if !ok {
		return mistakef("not subscribed to this: %s", f)
	}
	if err := s.next(f.elems[n-1].text, f.elems[n-2].text); err != nil {
		return mistake(err.Error())
	}
	return nil
}

// invalidated judges the news that a key has changed.
func (c *conn) invalidated(f frame) error {
	if len(f.elems) != 2 || c.reads == nil {
		return mistakef("tracks nothing: %s", f)
	}
	for _, e := range f.elems[1].elems {
		if !c.reads[e.text] {
			return mistakef("never read this: %s", f)
		}
		c.news[e.text]++
	}
	return nil
}

// end gives up what is due when the connection has ended, and judges whether it might.
func (c *conn) end(err error) {
	c.nc.Close()
	c.mu.Lock()
	defer c.mu.Unlock()
	defer c.moved.Broadcast()
	c.over = true
	var m mistake
	switch {
	case errors.As(err, &m):
		c.w.wrong("%s: %s; before that%s", c.who, m, c.history())
	case c.left, c.mayEnd && len(c.due) == 0:
	default:
		c.w.wrong("%s: the connection ends: %v%s", c.who, err, c.first())
	}
	for _, o := range c.due {
		c.lose(o)
	}
	c.due = nil
}

func (c *conn) lose(o *op) {
	if o.lost != nil {
		c.forgotten = true
		o.lost()
	}
}

// first says what is due. It is called under mu.
func (c *conn) first() string {
	if len(c.due) == 0 {
		return ", nothing is due"
	}
	return fmt.Sprintf(", %d replies are due, the first to %.100q", len(c.due), c.due[0].args)
}

// do queues a command and notes what reply must come.
func (c *conn) do(o op) {
	c.mu.Lock()
	if c.over {
		c.lose(&o)
	} else {
		c.due = append(c.due, &o)
	}
	c.mu.Unlock()
	c.say(o.args...)
}

// say queues what has no reply.
func (c *conn) say(args ...string) {
	c.mu.Lock()
	c.remember("said %.60q", args)
	c.mu.Unlock()
	c.w.commands.Add(1)
	c.out = appendCommand(c.out, args...)
}

// expect queues a command whose reply is known.
func (c *conn) expect(kind byte, text string, args ...string) {
	c.do(op{args: args, check: exactly(kind, text)})
}

// flush sends, in one piece or split at random bytes.
func (c *conn) flush() {
	out := c.out
	c.out = nil
	c.w.bytes.Add(int64(len(out)))
	for most := max(8, len(out)/[...]int{1, 1, 1, 2, 2, 100}[c.rng.IntN(6)]); len(out) > 0; {
		n := min(len(out), most)
		if n < len(out) {
			n = 1 + c.rng.IntN(n)
			time.Sleep(time.Duration(c.rng.IntN(500)) * time.Microsecond)
		}
		if _, err := c.nc.Write(out[:n]); err != nil {
			return // the reader finds out why
		}
		out = out[n:]
	}
}

// wait flushes and waits until everything is answered. false: the connection has ended.
func (c *conn) wait() bool {
	c.flush()
	return c.until("everything is answered", func() bool { return len(c.due) == 0 })
}

// until waits for a condition that the reader makes true, for as long as anything comes: hundreds of writes of one key, one after the other, may take
// minutes on a machine that has much to do. It is asked under mu.
func (c *conn) until(what string, ok func() bool) bool {
	late := time.AfterFunc(patience, func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		if !c.over {
			c.w.wrong("%s: never in %v: %s%s", c.who, patience, what, c.first())
			c.left = true
			c.nc.Close()
		}
	})
	defer late.Stop()
	c.mu.Lock()
	defer c.mu.Unlock()
	for !c.over && !ok() {
		c.moved.Wait()
		late.Reset(patience)
	}
	return !c.over
}

// vanish ends the connection at once: half of the time with a RST.
func (c *conn) vanish() {
	c.mu.Lock()
	c.left = true
	c.mu.Unlock()
	if c.rng.IntN(2) == 0 {
		_ = c.nc.SetLinger(0)
	}
	c.nc.Close()
	c.until("the reader has noticed", func() bool { return false })
}

// farewell waits until the proxy closes, after everything is answered.
func (c *conn) farewell() {
	c.mu.Lock()
	c.mayEnd = true
	c.mu.Unlock()
	c.flush()
	c.until("the proxy closes", func() bool { return false })
}
