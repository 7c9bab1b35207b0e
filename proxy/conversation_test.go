package proxy_test

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// A conversation is what clients say to a server, step by step, and where they listen. Its text is one paragraph of a file in
// testdata/oracle; a test that fails prints one that can be pasted there. Lines are
//
//	SET key1 "a\r\nb"     a command of client a, whose reply is read; a word in quotes is a Go string
//	> GET key1            the same, and the pattern from which wrong keys are derived (see derive)
//	[b] GET key1          of client b, who connects when first named
//	~ BLPOP key1 0        no reply is read now
//	$ "*1\r\n$4\r\nPING"  bytes as they are, no reply is read now
//	<  <3                 one further frame is read, or three
//	<has "text"           frames are read up to the one that has the text, which alone is compared
//	<eof                  the server closes; what it says before is compared
//	!blocked 1            wait until Redis itself counts so many blocked clients
//	!info clients x:1     wait until Redis itself says so in INFO clients
//	!hangup               the client closes
//	# why                 a remark
//	@resp2  @resp3        the conversation makes sense in one protocol version only
//	@bytes                it is also sent byte by byte
//	@single               it is not sent in random pieces, because Redis's own answer depends on what it reads at once
//
// {id:b} and {addr:b} stand for what the server calls client b, {reply} for the last bulk string that the client was sent.
// When the steps are over every client shuts down its sending side and reads to the end: nothing may come.
type conversation struct {
	name    string // of the file, and the remark above or else the first lines
	at      string // file:line
	steps   []step
	proto   int  // 0: both versions
	bytes   bool // sent byte by byte too
	single  bool // not sent in pieces
	derived bool // from the command table
}

// A step is one line.
type step struct {
	op      op
	client  string
	words   []string // of a command; the argument of other steps
	n       int      // frames to read
	pattern bool     // begins with >
	text    string
}

type op int

const (
	opSend op = iota // a command whose reply is read
	opSay            // a command whose reply is not read now
	opRaw
	opRead
	opHas
	opEOF
	opInfo
	opHangup
)

// parseConversations reads the paragraphs of a text.
func parseConversations(file, text string) ([]conversation, error) {
	var out []conversation
	var c conversation
	var remark string
	end := func() {
		if len(c.steps) > 0 {
			if remark == "" {
				var first []string
				for _, s := range c.steps[:min(3, len(c.steps))] {
					first = append(first, s.text)
				}
				remark = strings.Join(first, "; ")
			}
			c.name = strings.TrimSuffix(file, ".txt") + ": " + remark
			out = append(out, c)
		}
		c, remark = conversation{}, ""
	}
	n := 0
	for line := range strings.Lines(text) {
		n++
		line = strings.TrimSpace(line)
		if line == "" {
			end()
			continue
		}
		if line[0] == '#' {
			if c.at == "" && remark == "" {
				remark = strings.TrimSpace(line[1:])
			}
			continue
		}
		if c.at == "" {
			c.at = fmt.Sprintf("%s:%d", file, n)
		}
		switch line {
		case "@resp2":
			c.proto = 2
			continue
		case "@resp3":
			c.proto = 3
			continue
		case "@bytes":
			c.bytes = true
			continue
		case "@single":
			c.single = true
			continue
		}
		s, err := parseStep(line)
		if err != nil {
			return nil, fmt.Errorf("%s:%d: %w", file, n, err)
		}
		c.steps = append(c.steps, s)
	}
	end()
	return out, nil
}

func parseStep(line string) (step, error) {
	s := step{client: "a", text: line, n: 1}
	if strings.HasPrefix(line, "[") {
		name, rest, ok := strings.Cut(line[1:], "] ")
		if !ok {
			return s, errors.New("[client] and a blank begin a line of another client")
		}
		s.client, line = name, strings.TrimSpace(rest)
	}
	head, rest, _ := strings.Cut(line, " ")
	switch {
	case head == ">":
		s.pattern = true
		line = rest
	case head == "~":
		s.op, line = opSay, rest
	case head == "$":
		s.op, line = opRaw, rest
	case head == "<has":
		s.op, line = opHas, rest
	case head == "<eof":
		s.op, line = opEOF, rest
	case head == "!hangup":
		s.op, line = opHangup, rest
	case head == "!blocked":
		s.op, s.words, line = opInfo, []string{"clients", "blocked_clients:" + rest}, ""
	case head == "!info":
		s.op, line = opInfo, rest
	case head[0] == '<':
		s.op, line = opRead, ""
		if head != "<" {
			var err error
			s.n, err = strconv.Atoi(head[1:])
			return s, err
		}
	}
	for line = strings.TrimSpace(line); line != ""; line = strings.TrimSpace(line) {
		if line[0] == '"' {
			quoted, err := strconv.QuotedPrefix(line)
			if err != nil {
				return s, err
			}
			word, _ := strconv.Unquote(quoted)
			s.words, line = append(s.words, word), line[len(quoted):]
			continue
		}
		word, after, _ := strings.Cut(line, " ")
		s.words, line = append(s.words, word), after
	}
	if (s.op == opSend || s.op == opSay || s.op == opRaw || s.op == opHas) && len(s.words) == 0 {
		return s, errors.New("nothing is said")
	}
	return s, nil
}

// line writes a command as parseStep reads it.
func commandLine(words []string) string {
	quoted := make([]string, len(words))
	for i, w := range words {
		quoted[i] = w
		plain := w != "" && strings.IndexFunc(w, func(r rune) bool { return r <= ' ' || r > '~' || r == '"' }) < 0
		if !plain || i == 0 && strings.ContainsAny(w[:1], "<>~$![#@") {
			quoted[i] = strconv.Quote(w)
		}
	}
	return strings.Join(quoted, " ")
}

// say makes a step of a command.
func say(words ...string) step {
	return step{op: opSend, client: "a", words: words, text: commandLine(words)}
}

// String is the paragraph that parseConversations would read.
func (c conversation) String() string {
	var b strings.Builder
	if c.proto != 0 {
		fmt.Fprintf(&b, "@resp%d\n", c.proto)
	}
	if c.bytes {
		b.WriteString("@bytes\n")
	}
	if c.single {
		b.WriteString("@single\n")
	}
	for _, s := range c.steps {
		b.WriteString(s.text + "\n")
	}
	return b.String()
}

// readConversations reads every file of the corpus.
func readConversations(t testing.TB) []conversation {
	t.Helper()
	files, err := filepath.Glob("testdata/oracle/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatal("there is no corpus", err)
	}
	var out []conversation
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		more, err := parseConversations(filepath.Base(file), string(text))
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, more...)
	}
	return out
}

// A way is how the bytes of a conversation reach the server: waiting for each reply, in random pieces without waiting where a
// client says several things in a row, or byte by byte.
type way int

const (
	single way = iota
	pieces
	bytewise
)

func (w way) String() string { return [...]string{"single", "pieces", "bytes"}[w] }

// bytePause keeps bytes that are sent one by one from being read together: longer than a loopback connection takes, short
// enough for some thousand bytes. Nothing depends on it but how much the test sees.
const bytePause = 30 * time.Microsecond

// replyBound is how long a reply may take. Real ones take milliseconds; a busy machine a second.
const replyBound = 10 * time.Second

// A target is a server that is spoken to.
type target struct {
	name     string
	addr     string
	upstream string // the Redis that tells how many clients are blocked
	routed   bool   // keys have a store
	alone    bool   // between clients that do not wait for each other it has no order: conversations of several are not for it
	half     int    // if not 0, each derived conversation is held in one way only; odd and even targets take turns
}

// heard is what one step brought: a frame, or what stood in its place.
type heard [][]byte

// talk is a conversation under way.
type talk struct {
	proto   int
	way     way
	bound   time.Duration // of a reply
	target  target
	rng     *rand.Rand
	clients map[string]*talker
	order   []string
	ids     bool // the conversation speaks of ids
}

// talker is one client of a conversation.
type talker struct {
	net.Conn
	rd        *bufio.Reader
	bound     time.Duration
	id        string
	last      string // the last bulk string it was sent
	batch     []byte // pieces: what is not sent yet
	listening []func() error
	closed    bool
}

// hold has a conversation with a target and returns what each step heard; one more for the silence after the last.
// It returns early when something that was expected did not come: the error is then the last thing heard.
func hold(g target, r run, bound time.Duration) []heard {
	c := r.conversation
	t := &talk{target: g, proto: r.proto, way: r.way, bound: bound, rng: rand.New(rand.NewPCG(uint64(r.seed), uint64(r.way))), clients: map[string]*talker{}}
	for _, s := range c.steps {
		t.ids = t.ids || strings.Contains(s.text, "{id:") || strings.Contains(s.text, "{addr:")
	}
	defer func() {
		for _, k := range t.clients {
			k.Close()
		}
	}()
	out := make([]heard, len(c.steps)+1)
	err := t.steps(c, out)
	if err == nil {
		err = t.silence(&out[len(c.steps)])
	}
	if err != nil {
		for i := range out {
			if out[i] == nil {
				out[i] = heard{[]byte(err.Error())}
				return out[:i+1]
			}
		}
	}
	return out
}

func (t *talk) steps(c conversation, out []heard) error {
	for i, s := range c.steps {
		k, err := t.client(s.client)
		if err != nil {
			return err
		}
		if s.op == opInfo || s.op == opEOF || s.op == opHangup || i > 0 && c.steps[i-1].client != s.client || strings.Contains(s.text, "{reply") {
			if err := t.flushAll(); err != nil {
				return err
			}
		}
		listen := func(n int) error {
			f := func() error {
				h := heard{}
				for range n {
					frame, err := k.frame()
					if err != nil {
						return err
					}
					h = append(h, frame)
				}
				out[i] = h
				return nil
			}
			if t.way == single {
				return f()
			}
			k.listening = append(k.listening, f)
			return nil
		}
		switch s.op {
		case opSend, opSay, opRaw:
			var b []byte
			words := make([]string, len(s.words))
			for j, w := range s.words {
				if words[j], err = t.expand(k, w); err != nil {
					return err
				}
			}
			if b = []byte(strings.Join(words, "")); s.op != opRaw {
				b = encode(words...)
			}
			if s.op != opSend {
				out[i] = heard{}
			}
			if t.way == single {
				k.Write(b) // if the server has closed, reading tells
			} else {
				k.batch = append(k.batch, b...)
			}
			if s.op == opSend {
				err = listen(1)
			}
		case opRead:
			err = listen(s.n)
		case opHas:
			if err = t.flush(k); err == nil {
				for out[i] == nil {
					frame, err := k.frame()
					if err != nil {
						return err
					}
					if bytes.Contains(frame, []byte(s.words[0])) {
						out[i] = heard{frame}
					}
				}
			}
		case opEOF:
			var rest []byte
			if rest, err = k.rest(); err == nil {
				out[i], k.closed = heard{rest}, true
			}
		case opInfo:
			if err = t.info(s.words[0], s.words[1]); err == nil {
				out[i] = heard{}
			}
		case opHangup:
			k.Close()
			out[i], k.closed = heard{}, true
		}
		if err != nil {
			return err
		}
	}
	return t.flushAll()
}

// client returns the client of that name; who is new connects.
func (t *talk) client(name string) (*talker, error) {
	if k := t.clients[name]; k != nil {
		return k, nil
	}
	c, err := net.Dial("tcp", t.target.addr)
	if err != nil {
		return nil, err
	}
	k := &talker{Conn: c, rd: bufio.NewReader(c), bound: t.bound}
	t.clients[name] = k
	t.order = append(t.order, name)
	if t.proto == 3 {
		if _, err := k.Write(encode("HELLO", "3")); err != nil {
			return nil, err
		}
		if _, err := k.frame(); err != nil {
			return nil, err
		}
	}
	if t.ids {
		if _, err := k.Write(encode("CLIENT", "ID")); err != nil {
			return nil, err
		}
		frame, err := k.frame()
		if err != nil {
			return nil, err
		}
		k.id = strings.Trim(string(frame), ":\r\n")
	}
	return k, nil
}

var placeholder = regexp.MustCompile(`\{(id|addr):(\w+)\}|\{reply\}`)

// expand puts in what only this server can know.
func (t *talk) expand(k *talker, word string) (string, error) {
	var failed error
	return placeholder.ReplaceAllStringFunc(word, func(p string) string {
		m := placeholder.FindStringSubmatch(p)
		if m[1] == "" {
			return k.last
		}
		other, err := t.client(m[2])
		if err != nil {
			failed = err
			return ""
		}
		if m[1] == "addr" {
			return other.LocalAddr().String()
		}
		return other.id
	}), failed
}

func (t *talk) flushAll() error {
	for _, name := range t.order {
		if err := t.flush(t.clients[name]); err != nil {
			return err
		}
	}
	return nil
}

// flush sends what a client has to say, in pieces, and hears what it waits for.
func (t *talk) flush(k *talker) error {
	batch, listening := k.batch, k.listening
	k.batch, k.listening = nil, nil
	var sent sync.WaitGroup
	defer sent.Wait()
	if len(batch) > 0 {
		sizes := pieceSizes(t.rng, len(batch), t.way)
		sent.Go(func() {
			for _, n := range sizes {
				if _, err := k.Write(batch[:n]); err != nil {
					return // the server has closed: reading tells
				}
				batch = batch[n:]
				if t.way == bytewise {
					time.Sleep(bytePause)
				}
			}
		})
	}
	for _, f := range listening {
		if err := f(); err != nil {
			k.Close() // for the writer
			return err
		}
	}
	return nil
}

// pieceSizes cuts n bytes, at the same places for every target.
func pieceSizes(rng *rand.Rand, n int, way way) (sizes []int) {
	for n > 0 {
		size := 1
		if way == pieces {
			size = min(n, 1+rng.IntN(1+rng.IntN(2000)))
		}
		sizes = append(sizes, size)
		n -= size
	}
	return sizes
}

// info waits until Redis says so. The connection on which it is asked is gone before info returns.
func (t *talk) info(section, line string) error {
	for end := time.Now().Add(t.bound); time.Now().Before(end); time.Sleep(time.Millisecond) {
		info, err := ask(t.target.upstream, []string{"INFO", section})
		if err != nil {
			return err
		}
		if strings.Contains(info, "\n"+line+"\r\n") {
			return nil
		}
	}
	return fmt.Errorf("Redis never says %s", line)
}

// ask sends commands on a connection of its own, which is gone when it returns, and returns what came back.
func ask(addr string, commands ...[]string) (string, error) {
	c, err := net.Dial("tcp", addr)
	if err != nil {
		return "", err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(replyBound))
	var b []byte
	for _, words := range commands {
		b = append(b, encode(words...)...)
	}
	if _, err = c.Write(append(b, encode("QUIT")...)); err != nil {
		return "", err
	}
	all, err := io.ReadAll(c)
	return string(all), err
}

// silence shuts down what each client says: nothing may be left to hear.
func (t *talk) silence(out *heard) error {
	h := heard{}
	for _, name := range t.order {
		k := t.clients[name]
		if k.closed {
			continue
		}
		k.Conn.(*net.TCPConn).CloseWrite()
		rest, err := k.rest()
		if err != nil {
			return fmt.Errorf("[%s] %w", name, err)
		}
		if len(rest) > 0 {
			h = append(h, fmt.Appendf(nil, "[%s] is also told %q", name, rest))
		}
	}
	*out = h
	return nil
}

// rest reads to the end.
func (k *talker) rest() ([]byte, error) {
	k.SetReadDeadline(time.Now().Add(k.bound))
	b, err := io.ReadAll(k.rd)
	if ne := net.Error(nil); errors.As(err, &ne) && ne.Timeout() {
		return nil, fmt.Errorf("the server does not close the connection; it said %.200q", b)
	}
	return b, nil // a reset after a farewell is a close too
}

// frame reads one reply as it is.
func (k *talker) frame() ([]byte, error) {
	k.SetReadDeadline(time.Now().Add(k.bound))
	b, err := readRaw(k.rd)
	if err != nil {
		return nil, fmt.Errorf("no reply: %w; it began with %.100q", withoutAddrs(err), b)
	}
	if n := parseNode(b); n.kind == '$' {
		k.last = n.text
	}
	return b, nil
}

// withoutAddrs leaves the ports away, which differ from connection to connection.
func withoutAddrs(err error) error {
	if oe := (*net.OpError)(nil); errors.As(err, &oe) {
		return oe.Err
	}
	return err
}

// readRaw reads one frame.
func readRaw(rd *bufio.Reader) ([]byte, error) {
	line, err := rd.ReadBytes('\n')
	if err != nil {
		return line, err
	}
	n, _ := strconv.Atoi(string(bytes.TrimSpace(line[1:])))
	switch line[0] {
	case '$', '=', '!':
		if n >= 0 {
			b := make([]byte, n+2)
			_, err = io.ReadFull(rd, b)
			line = append(line, b...)
		}
	case '*', '~', '>', '%', '|':
		if line[0] == '%' || line[0] == '|' {
			n *= 2
		}
		if line[0] == '|' {
			n++
		}
		for range n {
			b, err := readRaw(rd)
			if err != nil {
				return append(line, b...), err
			}
			line = append(line, b...)
		}
	}
	return line, err
}

// A node is a reply that can be looked into. bytes gives back exactly what parseNode was given.
type node struct {
	kind byte   // its first byte; 0: no RESP, all of it is text
	text string // a line without its end, or the contents of a bulk string
	head string // what stood behind kind where kids or text follow
	form string // of a verbatim string: "txt:"
	kids []*node
}

func parseNode(b []byte) *node {
	n, rest := cutNode(b)
	if n == nil || len(rest) > 0 {
		return &node{text: string(b)}
	}
	return n
}

func cutNode(b []byte) (*node, []byte) {
	line, rest, ok := bytes.Cut(b, []byte("\r\n"))
	if !ok || len(line) == 0 {
		return nil, b
	}
	n := &node{kind: line[0], text: string(line[1:])}
	size, err := strconv.Atoi(n.text)
	switch n.kind {
	case '$', '=', '!':
		if err != nil || size < 0 {
			break
		}
		if len(rest) < size+2 {
			return nil, b
		}
		n.head, n.text, rest = n.text, string(rest[:size]), rest[size+2:]
		if n.kind == '=' && size >= 4 {
			n.form, n.text = n.text[:4], n.text[4:]
		}
	case '*', '~', '>', '%', '|':
		if err != nil || size < 0 {
			break
		}
		n.head, n.text = n.text, ""
		if n.kind == '%' || n.kind == '|' {
			size *= 2
		}
		if n.kind == '|' {
			size++
		}
		for range size {
			var kid *node
			if kid, rest = cutNode(rest); kid == nil {
				return nil, b
			}
			n.kids = append(n.kids, kid)
		}
	case '+', '-', ':', '_', '#', ',', '(':
	default:
		return nil, b
	}
	return n, rest
}

func (n *node) bytes() []byte {
	if n.kind == 0 {
		return []byte(n.text)
	}
	if n.head == "" {
		return []byte(string(n.kind) + n.text + "\r\n")
	}
	b := []byte(string(n.kind) + n.head + "\r\n")
	switch n.kind {
	case '$', '=', '!':
		return append(b, n.form+n.text+"\r\n"...)
	}
	for _, kid := range n.kids {
		b = append(b, kid.bytes()...)
	}
	return b
}

func (n *node) isError() bool { return n.kind == '-' || n.kind == '!' }

// setText changes the contents of a bulk string; its length is then told as that of the new contents.
func (n *node) setText(text string) {
	if n.head != "" {
		n.head = strconv.Itoa(len(n.form) + len(text))
	}
	n.text = text
}

// sortKids puts elements, or groups of them, into the order of their bytes.
func (n *node) sortKids(group int) {
	if group > 1 && len(n.kids)%group != 0 {
		return
	}
	groups := slices.Collect(slices.Chunk(n.kids, group))
	slices.SortStableFunc(groups, func(a, b []*node) int { return bytes.Compare(a[0].bytes(), b[0].bytes()) })
	n.kids = slices.Concat(groups...)
}
