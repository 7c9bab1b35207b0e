package proxy

import (
	"bytes"
	"math"
	"sync"
	"time"
)

// limits bounds what one client may make the proxy hold before it has said
// anything that makes sense. Zero values mean the defaults of withDefaults.
type limits struct {
	// bulk is the longest argument, in bytes; 0 means 512 MiB, the
	// proto-max-bulk-len of Redis. An operator who has raised it there
	// raises it here too.
	bulk int

	// buffer is the longest command, in bytes; 0 means 1 GiB, the
	// client-query-buffer-limit of Redis. There it bounds what has been
	// read and not yet become an argument. Here, where a command is held
	// whole, MSET of three values of 512 MiB fails, as soon as the length
	// of the argument that is too much is known.
	buffer int

	// args is the most arguments of one command that are held; 0 means
	// 4 Mi, four times what Redis allowed before 7.0. An empty argument
	// costs its sender 6 bytes and the scanner 32, so without a bound a
	// full buffer would cost five times its size on top. A larger count
	// may be claimed, as in Redis: it is refused when it comes true.
	args int

	// auth says that the connection starts unauthenticated: until
	// setAuthenticated(true), 10 arguments and 16,384 bytes per argument
	// are the limit, as in Redis, so that strangers cannot fill memory.
	auth bool

	// handshake is how long a client may take to send its first complete
	// command; 0 means for ever, as in Redis. The scanner does not look
	// at it, guardConn does.
	handshake time.Duration
}

// withDefaults returns l with its zero fields filled in.
func (l limits) withDefaults() limits {
	if l.bulk <= 0 {
		l.bulk = 512 << 20
	}
	if l.buffer <= 0 {
		l.buffer = 1 << 30
	}
	// Spans are 32 bits wide, which halves them.
	l.buffer = min(l.buffer, math.MaxInt32)
	if l.args <= 0 {
		l.args = 4 << 20
	}
	return l
}

const (
	// maxLine is the longest header or inline line that is waited for:
	// PROTO_INLINE_MAX_SIZE of Redis. Redis compares with what it happens
	// to have read, so a longer line that arrives in one piece may pass
	// there; here the limit does not depend on how the bytes were split.
	maxLine = 64 << 10

	// keepBuffer is what a connection is read by. It equals the read size
	// of Redis: 16 pipelined SETs of 1 KB fit in one read. Less costs
	// system calls; more costs memory for each client whom goroutines
	// drive, who keeps it while he is idle (on a loop, see lendBack).
	keepBuffer = 16 << 10

	// keepArgs is how many argument views survive a command, 32 KiB; it
	// spares ordinary commands the allocation and lets a huge MSET go.
	keepArgs = 1024

	// unauthArgs and unauthBulk are what Redis grants before AUTH.
	unauthArgs = 10
	unauthBulk = 16384
)

// A protocolError is a violation after which the connection must be closed.
// Commands that came before it are valid and have been released.
type protocolError struct {
	text string // as Redis words it, or our own words if quiet

	// quiet: Redis closes without a word.
	quiet bool

	// unauth: the violation is one only as long as the client has not
	// authenticated.
	unauth bool
}

func (e *protocolError) Error() string { return e.text }

// reply is the last thing to send to the client: the error line of Redis, or
// nothing where Redis closes the connection silently.
func (e *protocolError) reply() string {
	if e.quiet {
		return ""
	}
	return "-ERR " + e.text + "\r\n"
}

var (
	errArgCount       = &protocolError{text: "Protocol error: invalid multibulk length"}
	errArgCountUnauth = &protocolError{text: "Protocol error: unauthenticated multibulk length", unauth: true}
	errBulkLen        = &protocolError{text: "Protocol error: invalid bulk length"}
	errBulkLenUnauth  = &protocolError{text: "Protocol error: unauthenticated bulk length", unauth: true}
	errArgCountLine   = &protocolError{text: "Protocol error: too big mbulk count string"}
	errBulkLenLine    = &protocolError{text: "Protocol error: too big bulk count string"}
	errInlineLine     = &protocolError{text: "Protocol error: too big inline request"}
	errQuotes         = &protocolError{text: "Protocol error: unbalanced quotes in request"}
	errCrossProtocol  = &protocolError{text: "possible cross-protocol attack: HTTP instead of commands", quiet: true}
	errQueryBuffer    = &protocolError{text: "query buffer limit exceeded", quiet: true}
)

// errExpectedBulk is Redis's complaint about the byte c where an argument
// should begin; line breaks are blanked as in every error line.
func errExpectedBulk(c byte) *protocolError {
	if c == '\r' || c == '\n' {
		c = ' '
	}
	return &protocolError{text: "Protocol error: expected '$', got '" + string([]byte{c}) + "'"}
}

// A command is one complete, well-formed command.
//
// Both fields are views into the scanner that made them, valid until its next
// call of next or space; who needs the bytes longer copies them before.
type command struct {
	raw   []byte   // the command in canonical multibulk form
	args  [][]byte // its arguments, at least one: the name
	owned bool     // surrender has given both away: they are the receiver's
}

// A span is an argument's place, relative to the start of its command: the
// buffer may move while a command arrives, a span need not.
type span struct{ off, len uint32 }

// What a scanner has found at the head of its buffer.
const (
	foundNothing   = iota // the beginning of a command at most
	foundMultibulk        // a complete command
	foundInline           // a complete line that is not blank
)

// A scanner cuts a byte stream into commands. It accepts exactly what Redis
// 7.0 accepts, and what it lets through is canonical: headers end in CR LF,
// numbers are written one way, inline commands have become multibulk. So the
// raw bytes may share a connection with those of other clients.
//
// It does no I/O: bytes are read into space and announced with wrote, then
// next is called until it has no more. Every byte is looked at a bounded
// number of times however the stream is split, and memory grows with what has
// arrived and never with what a header claims.
//
// A scanner is owned by one goroutine at a time.
type scanner struct {
	lim    limits // static
	authed bool

	base []byte // the buffer of keepBuffer bytes; nil before the first bytes and after lendBack
	buf  []byte // base, or a larger one while a command needs it

	// buf[start:end] is held: start is the first byte of the command being
	// scanned, pos the first byte of it that is not yet understood.
	start, pos, end int

	look  int    // bytes after pos already searched for the line's end
	want  int    // arguments still missing; 0 between commands
	bulk  int    // length of the argument at pos; -1 if its header is not read
	spans []span // arguments found so far

	found int
	err   *protocolError // once set, nothing more is scanned

	args   [][]byte // backing store of command.args
	inline []byte   // backing store of command.raw of an inline command
}

// newScanner returns a scanner for one connection. It takes its buffer when
// bytes arrive.
func newScanner(lim limits) *scanner {
	return &scanner{lim: lim.withDefaults(), authed: !lim.auth, bulk: -1}
}

// setAuthenticated switches the limits for unauthenticated clients off or on.
//
// The scanner may be ahead of the session: in a pipeline AUTH, SET it may
// have met the SET before the session has executed the AUTH. A violation of
// those limits is therefore forgotten, and the bytes are scanned again.
func (s *scanner) setAuthenticated(yes bool) {
	s.authed = yes
	if yes && s.err != nil && s.err.unauth {
		s.err = nil
	}
}

// buffered returns how many bytes are held that no command has released.
func (s *scanner) buffered() int { return s.end - s.start }

// space returns room for at least n bytes (at least one) to read into; wrote
// says how many were read. It ends the life of the last command.
func (s *scanner) space(n int) []byte {
	n = max(n, 1)
	if s.start == s.end {
		s.release()
	}
	if len(s.buf)-s.end < n || len(s.buf) > len(s.base) {
		s.makeRoom(n)
	}
	return s.buf[s.end:]
}

// wrote announces that n bytes of space are filled.
func (s *scanner) wrote(n int) { s.end += n }

// release gives the memory of a large command back when nothing is held.
func (s *scanner) release() {
	s.start, s.pos, s.end = 0, 0, 0
	if len(s.buf) > len(s.base) {
		giveBuffer(s.buf)
		s.buf = s.base
		s.dropArgs()
	}
	if cap(s.inline) > keepBuffer {
		s.inline = nil
		s.dropArgs()
	}
}

// lendBack gives the buffer of a connection that holds nothing to others, until it has something to say again. It ends the life of the last
// command.
func (s *scanner) lendBack() {
	if s.start != s.end || len(s.base) == 0 {
		return
	}
	s.release()
	s.dropArgs()
	poolBase.Put((*[keepBuffer]byte)(s.base))
	s.base, s.buf = nil, nil
}

// dropArgs forgets the views of the last command, which would keep a large
// buffer alive, and their backing store if it is large itself. Many arguments
// always come with a large buffer.
func (s *scanner) dropArgs() {
	if cap(s.args) > keepArgs {
		s.args = nil
	}
	clear(s.args[:cap(s.args)])
	if cap(s.spans) > keepArgs && len(s.spans) == 0 {
		s.spans = nil
	}
}

// makeRoom is the rare part of space: it moves what is held, to the front, to
// a larger buffer or back to the small one.
func (s *scanner) makeRoom(n int) {
	if s.base == nil {
		s.base = poolBase.Get().(*[keepBuffer]byte)[:]
		if s.buf == nil {
			s.buf = s.base
		}
	}
	s.scan()
	held := s.end - s.start
	need := held // how long the command is known to be at least
	if s.found == foundNothing && s.bulk >= 0 {
		need = max(held, s.pos-s.start+s.bulk+2)
	}

	switch {
	case len(s.buf) > len(s.base) && s.start > 0 && s.found == foundNothing && need+n <= len(s.base):
		// A large command is gone and its successor is not large.
		s.moveTo(s.base)
		s.dropArgs()
	case len(s.buf)-s.end >= n:
		// Room enough: the common case while a large command arrives.
	case held+n <= len(s.buf) && (s.found == foundNothing || s.start >= held):
		// What is held is one incomplete command, which moves once in its
		// life, or less than what has left the buffer since the last
		// move. So a byte moves a bounded number of times.
		s.moveTo(s.buf)
	default:
		// Grow with what has arrived, not with what is claimed: fourfold
		// while that is cheap, then twofold. An argument that is a good
		// part of the command ends the growth, so that one of 512 MiB does
		// not end in 1 GiB; small ones must not, or each would cost a copy
		// of all that came before.
		grown := 4 * len(s.buf)
		if len(s.buf) >= 1<<20 {
			grown = 2 * len(s.buf)
		}
		if need > held && 2*s.bulk >= held {
			grown = min(grown, need+max(n, minRead)) // and room for EX 10
		}
		s.moveTo(takeBuffer(max(grown, held+n)))
	}
}

// moveTo makes what is held the beginning of b, the buffer from now on.
func (s *scanner) moveTo(b []byte) {
	copy(b, s.buf[s.start:s.end])
	if len(s.buf) > len(s.base) && len(b) != len(s.buf) {
		giveBuffer(s.buf)
	}
	s.pos -= s.start
	s.end -= s.start
	s.start = 0
	s.buf = b
}

// Buffers of the first three steps beyond keepBuffer are shared by all clients:
// values of 20 KB to 1 MB are what the proxy is for, and to allocate for each
// would cost more than to receive it.
var (
	poolBase = sync.Pool{New: func() any { return new([keepBuffer]byte) }} // for connections that hold nothing (lendBack)

	pool64K  = sync.Pool{New: func() any { return new([64 << 10]byte) }}
	pool256K = sync.Pool{New: func() any { return new([256 << 10]byte) }}
	pool1M   = sync.Pool{New: func() any { return new([1 << 20]byte) }}
)

// takeBuffer returns a buffer of n bytes or more.
func takeBuffer(n int) []byte {
	switch {
	case n <= 64<<10:
		return pool64K.Get().(*[64 << 10]byte)[:]
	case n <= 256<<10:
		return pool256K.Get().(*[256 << 10]byte)[:]
	case n <= 1<<20:
		return pool1M.Get().(*[1 << 20]byte)[:]
	}
	return make([]byte, n)
}

// giveBuffer takes back what takeBuffer has returned. Nobody may look at it any
// more: it will hold another client's command.
func giveBuffer(b []byte) {
	switch len(b) {
	case 64 << 10:
		pool64K.Put((*[64 << 10]byte)(b))
	case 256 << 10:
		pool256K.Put((*[256 << 10]byte)(b))
	case 1 << 20:
		pool1M.Put((*[1 << 20]byte)(b))
	default:
		letGo(b)
	}
}

// next releases the next command. ok is false if more bytes are needed. An
// error is a *protocolError; it comes after the last valid command and stays.
// next ends the life of the command before.
func (s *scanner) next() (cmd command, ok bool, err error) {
	s.scan()
	switch s.found {
	case foundMultibulk:
		args := s.args[:0]
		b := s.buf[s.start:s.pos:s.pos]
		for _, sp := range s.spans {
			args = append(args, b[sp.off:sp.off+sp.len:sp.off+sp.len])
		}
		s.args = args
		s.spans = s.spans[:0]
		cmd = command{raw: b, args: args}
	case foundInline:
		if cmd, ok = s.splitInline(s.buf[s.start : s.pos-1]); !ok {
			s.err, s.found = errQuotes, foundNothing
			return command{}, false, errQuotes
		}
	default:
		if s.err != nil {
			return command{}, false, s.err
		}
		if s.start == s.end {
			s.release()
		}
		return command{}, false, nil
	}
	s.found = foundNothing
	if crossProtocol(cmd.args[0]) {
		s.err = errCrossProtocol
		return command{}, false, s.err
	}
	s.start = s.pos
	return cmd, true, nil
}

// surrender gives the bytes of a command that next has just returned to its receiver, and goes on with another buffer: a large
// command is not copied. false: it shares its buffer with others, and must be.
func (s *scanner) surrender(cmd *command) bool {
	if len(cmd.raw) < len(s.buf)/2 || len(s.buf) <= len(s.base) {
		return false
	}
	rest := s.buf[s.start:s.end]
	s.buf = s.base
	if len(rest) > len(s.buf) {
		s.buf = takeBuffer(len(rest))
	}
	s.end = copy(s.buf, rest)
	s.start, s.pos = 0, 0
	s.args = nil
	cmd.owned = true
	return true
}

// ready tells whether next would return something, a command or an error,
// without more bytes. It leaves the last command alive.
func (s *scanner) ready() bool {
	s.scan()
	return s.found != foundNothing || s.err != nil
}

// scan goes on from where the last bytes ended until it has found a command,
// an error, or the end of what is held. It moves nothing, and writes only to
// the bytes of the command it scans.
func (s *scanner) scan() {
	for s.found == foundNothing && s.err == nil {
		switch {
		case s.want > 0:
			if !s.scanArg() {
				return
			}
		case s.start == s.end:
			return
		case s.buf[s.start] == '*':
			if !s.scanCount() {
				return
			}
		default:
			if !s.scanInline() {
				return
			}
		}
	}
}

// scanCount reads the header *n of a command. It returns false if it cannot
// go on.
func (s *scanner) scanCount() bool {
	n, size, ok := s.header('*', errArgCount, errArgCountLine)
	if !ok {
		return false
	}
	switch {
	case n > math.MaxInt32:
		s.err = errArgCount
		return false
	case n > unauthArgs && !s.authed:
		s.err = errArgCountUnauth
		return false
	}
	s.pos += size
	if n <= 0 { // Redis ignores *0 and *-1 without a reply.
		s.start = s.pos
		return true
	}
	s.want = int(n)
	return true
}

// scanArg reads one argument. It returns false if it cannot go on.
func (s *scanner) scanArg() bool {
	if s.bulk < 0 {
		n, size, ok := s.header('$', errBulkLen, errBulkLenLine)
		if !ok {
			return false
		}
		switch {
		case n < 0 || n > int64(s.lim.bulk):
			s.err = errBulkLen
			return false
		case n > unauthBulk && !s.authed:
			s.err = errBulkLenUnauth
			return false
		case len(s.spans) >= s.lim.args:
			s.err = errArgCount
			return false
		case n > int64(s.lim.buffer-(s.pos-s.start)-size-2):
			s.err = errQueryBuffer
			return false
		}
		s.pos += size
		s.bulk = int(n)
	}
	after := s.pos + s.bulk
	if s.end-after < 2 {
		return false
	}
	// Redis does not look at the two bytes after an argument. They are
	// part of what is forwarded, so they become what they should be.
	s.buf[after], s.buf[after+1] = '\r', '\n'
	s.spans = append(s.spans, span{uint32(s.pos - s.start), uint32(s.bulk)})
	s.pos = after + 2
	s.bulk = -1
	s.want--
	if s.want == 0 {
		s.found = foundMultibulk
	}
	return true
}

// header reads the line at pos, which should be kind, a number, CR LF, and
// returns the number and the size of the line. ok is false if the line is
// incomplete or wrong.
func (s *scanner) header(kind byte, invalid, tooLong *protocolError) (n int64, size int, ok bool) {
	// Nearly every header is complete and has few digits.
	b := s.buf[s.pos:s.end]
	if len(b) >= 4 && b[0] == kind && b[1]-'0' <= 9 {
		n = int64(b[1] - '0')
		i := 2
		for n != 0 && i < 9 && i < len(b) && b[i]-'0' <= 9 {
			n = n*10 + int64(b[i]-'0')
			i++
		}
		if i+1 < len(b) && b[i] == '\r' {
			b[i+1] = '\n'
			s.look = 0
			return n, i + 2, true
		}
	}
	return s.longHeader(b, kind, invalid, tooLong)
}

// longHeader is header for lines that are long, incomplete or wrong.
func (s *scanner) longHeader(b []byte, kind byte, invalid, tooLong *protocolError) (n int64, size int, ok bool) {
	i := s.lineEnd(b, '\r')
	if i < 0 && len(b) > maxLine {
		s.err = tooLong
		return 0, 0, false
	}
	if i < 0 || i+1 >= len(b) {
		return 0, 0, false
	}
	if b[0] != kind {
		s.err = errExpectedBulk(b[0])
		return 0, 0, false
	}
	n, ok = parseDecimal(b[1:i])
	if !ok {
		s.err = invalid
		return 0, 0, false
	}
	b[i+1] = '\n' // Redis takes any byte for the LF; see scanArg.
	s.look = 0
	return n, i + 2, true
}

// scanInline looks for the end of an inline command. It returns false if it
// cannot go on.
func (s *scanner) scanInline() bool {
	b := s.buf[s.start:s.end]
	i := s.lineEnd(b, '\n')
	if i < 0 && len(b) > maxLine {
		s.err = errInlineLine
		return false
	}
	if i < 0 {
		return false
	}
	s.look = 0
	s.pos = s.start + i + 1
	if blank(b[:i]) {
		s.start = s.pos
		return true
	}
	s.found = foundInline
	return true
}

// lineEnd finds the byte that ends the line b, or returns -1 if it is not
// among the first maxLine+1. It remembers in look how far it has come. Redis searches with strchr, so a NUL hides the
// rest of what has arrived, and the line never ends: look stays at the NUL.
func (s *scanner) lineEnd(b []byte, end byte) int {
	rest := b[s.look:min(len(b), maxLine+1)]
	if len(rest) > 0 && rest[0] == 0 {
		return -1
	}
	i := bytes.IndexByte(rest, end)
	if i >= 0 {
		rest = rest[:i]
	}
	if nul := bytes.IndexByte(rest, 0); nul >= 0 {
		s.look += nul
		return -1
	}
	if i < 0 {
		s.look += len(rest)
		return -1
	}
	return s.look + i
}

// splitInline splits a line as sdssplitargs of Redis does. It returns false if
// quotes are not closed, or not followed by a space.
func (s *scanner) splitInline(line []byte) (command, bool) {
	// First the arguments' bytes one after the other, then, when their number
	// and lengths are known, the command behind them.
	out := s.inline[:0]
	spans := s.spans[:0]
	for i := 0; ; {
		for i < len(line) && isSpace(line[i]) {
			i++
		}
		if i == len(line) {
			break
		}
		from := len(out)
		var ok bool
		if out, i, ok = splitArg(out, line, i); !ok {
			return command{}, false
		}
		spans = append(spans, span{uint32(from), uint32(len(out) - from)})
	}

	from := len(out)
	out = appendArray(out, len(spans))
	for i, sp := range spans {
		out = appendBulk(out, out[sp.off:sp.off+sp.len])
		spans[i].off = uint32(len(out)) - sp.len - 2
	}
	args := s.args[:0]
	for _, sp := range spans {
		args = append(args, out[sp.off:sp.off+sp.len:sp.off+sp.len])
	}
	s.inline, s.spans, s.args = out, spans[:0], args
	return command{raw: out[from:len(out):len(out)], args: args}, true
}

// splitArg appends the argument at line[i] to out and returns where it ends.
func splitArg(out, line []byte, i int) (_ []byte, end int, ok bool) {
	at := func(i int) byte {
		if i < len(line) {
			return line[i]
		}
		return 0
	}
	const plain = 0
	for quote := byte(plain); ; i++ {
		if i >= len(line) {
			return out, i, quote == plain
		}
		c := line[i]
		switch {
		case quote == plain && (c == '"' || c == '\''):
			quote = c
		case quote == plain && (c == ' ' || c == '\n' || c == '\r' || c == '\t'):
			return out, i, true
		case quote == plain:
			out = append(out, c)
		case c == quote:
			return out, i + 1, i+1 == len(line) || isSpace(line[i+1])
		case quote == '\'' && c == '\\' && at(i+1) == '\'':
			i++
			out = append(out, '\'')
		case quote == '"' && c == '\\' && at(i+1) == 'x' && isHex(at(i+2)) && isHex(at(i+3)):
			out = append(out, unhex(at(i+2))<<4|unhex(at(i+3)))
			i += 3
		case quote == '"' && c == '\\' && i+1 < len(line):
			i++
			out = append(out, unescape(line[i]))
		default:
			out = append(out, c)
		}
	}
}

// unescape returns what a backslash and c mean between double quotes.
func unescape(c byte) byte {
	switch c {
	case 'n':
		return '\n'
	case 'r':
		return '\r'
	case 't':
		return '\t'
	case 'b':
		return '\b'
	case 'a':
		return '\a'
	}
	return c
}

// isSpace is isspace of the C locale.
func isSpace(c byte) bool { return c == ' ' || '\t' <= c && c <= '\r' }

func isHex(c byte) bool {
	return c-'0' <= 9 || c|0x20 >= 'a' && c|0x20 <= 'f'
}

// unhex returns the value of a digit for which isHex holds.
func unhex(c byte) byte {
	if c <= '9' {
		return c - '0'
	}
	return c | 0x20 - 'a' + 10
}

// blank tells whether a line holds no argument.
func blank(line []byte) bool {
	for _, c := range line {
		if !isSpace(c) {
			return false
		}
	}
	return true
}

// crossProtocol tells whether a command's name is how an HTTP request begins:
// somebody has made a browser talk to us. Redis compares C strings, so what
// follows a NUL does not count.
func crossProtocol(name []byte) bool {
	if len(name) < 4 || name[0]|0x20 != 'p' && name[0]|0x20 != 'h' {
		return false
	}
	if i := bytes.IndexByte(name, 0); i >= 0 {
		name = name[:i]
	}
	return foldEqual(name, "post") || foldEqual(name, "host:")
}

// foldEqual compares b with s, which is lower case, ignoring the case of
// ASCII letters.
func foldEqual(b []byte, s string) bool {
	if len(b) != len(s) {
		return false
	}
	for i, c := range b {
		if 'A' <= c && c <= 'Z' {
			c |= 0x20
		}
		if c != s[i] {
			return false
		}
	}
	return true
}

// parseDecimal reads a number as strictly as string2ll of Redis: an optional
// minus and digits, no plus, no leading zero, no -0, no overflow.
func parseDecimal(b []byte) (int64, bool) {
	if len(b) == 1 && b[0] == '0' {
		return 0, true
	}
	digits := b
	neg := len(b) > 0 && b[0] == '-'
	if neg {
		digits = b[1:]
	}
	// 19 digits hold every int64 and cannot overflow a uint64.
	if len(digits) == 0 || len(digits) > 19 || digits[0] == '0' {
		return 0, false
	}
	var n uint64
	for _, c := range digits {
		if c-'0' > 9 {
			return 0, false
		}
		n = n*10 + uint64(c-'0')
	}
	switch {
	case neg && n <= 1<<63:
		return -int64(n), true
	case !neg && n <= math.MaxInt64:
		return int64(n), true
	}
	return 0, false
}
