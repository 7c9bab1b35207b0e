package proxy

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
)

// feedScanner gives chunks to s one after the other, as a connection would, and
// returns what it makes of them: one line a command, then the error's text.
// It fails the test if a command is not canonical.
func feedScanner(t testing.TB, s *scanner, chunks ...[]byte) string {
	t.Helper()
	var out strings.Builder
	for _, chunk := range chunks {
		for len(chunk) > 0 {
			n := copy(s.space(1), chunk)
			s.wrote(n)
			chunk = chunk[n:]
			for {
				cmd, ok, err := s.next()
				if err != nil {
					var p *protocolError
					if !errors.As(err, &p) {
						t.Fatalf("not a *protocolError: %v", err)
					}
					if again, ok, err2 := s.next(); ok || err2 != err {
						t.Fatalf("the error does not stay: %v, %v", again, err2)
					}
					fmt.Fprintf(&out, "! %s", p.Error())
					return out.String()
				}
				if !ok {
					break
				}
				if want := appendCommand(nil, cmd.args...); !bytes.Equal(cmd.raw, want) {
					t.Fatalf("raw is %.200q, want %.200q", cmd.raw, want)
				}
				if len(cmd.args) == 0 {
					t.Fatal("a command without arguments")
				}
				fmt.Fprintf(&out, "%q\n", cmd.args)
			}
		}
	}
	return out.String()
}

// randomPieces cuts b into chunks of random size.
func randomPieces(b []byte, r *rand.Rand) [][]byte {
	var out [][]byte
	for len(b) > 0 {
		n := 1 + r.IntN(min(len(b), 1+r.IntN(40)))
		out = append(out, b[:n])
		b = b[n:]
	}
	return out
}

const pe = "! Protocol error: "

var scanCases = []struct{ name, in, want string }{
	{"one", "*1\r\n$4\r\nPING\r\n", `["PING"]` + "\n"},
	{"two", "*2\r\n$3\r\nGET\r\n$1\r\nk\r\n*1\r\n$4\r\nPING\r\n", `["GET" "k"]` + "\n" + `["PING"]` + "\n"},
	{"empty argument", "*2\r\n$4\r\nECHO\r\n$0\r\n\r\n", `["ECHO" ""]` + "\n"},
	{"empty name", "*1\r\n$0\r\n\r\n", `[""]` + "\n"},
	{"binary", "*2\r\n$4\r\nECHO\r\n$5\r\n\r\n\x00*1\r\n", `["ECHO" "\r\n\x00*1"]` + "\n"},
	{"any byte for LF, any two for CRLF", "*1\rX$4\rYPINGzz", `["PING"]` + "\n"},
	{"ten arguments", "*10\r\n" + strings.Repeat("$1\r\na\r\n", 10), `["a" "a" "a" "a" "a" "a" "a" "a" "a" "a"]` + "\n"},

	{"ignored counts", "*0\r\n*-1\r\n*-9223372036854775808\r\nPING\r\n", `["PING"]` + "\n"},
	{"count too low", "*-9223372036854775809\r\n", pe + "invalid multibulk length"},
	{"count INT_MAX", "*2147483647\r\n", ""},
	{"count INT_MAX+1", "*2147483648\r\n", pe + "invalid multibulk length"},
	{"count INT64_MAX", "*9223372036854775807\r\n", pe + "invalid multibulk length"},
	{"count overflows", "*18446744073709551617\r\n", pe + "invalid multibulk length"},
	{"count of many digits", "*123456789012345678901234567890\r\n", pe + "invalid multibulk length"},
	{"count +1", "*+1\r\n", pe + "invalid multibulk length"},
	{"count 01", "*01\r\n", pe + "invalid multibulk length"},
	{"count -0", "*-0\r\n", pe + "invalid multibulk length"},
	{"count empty", "*\r\n", pe + "invalid multibulk length"},
	{"count -", "*-\r\n", pe + "invalid multibulk length"},
	{"count 1x", "*1x\r\n", pe + "invalid multibulk length"},
	{"count x", "*x\r\n", pe + "invalid multibulk length"},
	{"count with LF", "*1\n$4\r\n", pe + "invalid multibulk length"},
	{"count space", "* 1\r\n", pe + "invalid multibulk length"},
	{"count of a long line", "*" + strings.Repeat("1", maxLine-1) + "\r\n", pe + "invalid multibulk length"},
	{"count of a line too long", "*" + strings.Repeat("1", maxLine+1), pe + "too big mbulk count string"},
	{"count of a line too long, ended", "*" + strings.Repeat("1", maxLine) + "\r\n", pe + "too big mbulk count string"},
	{"NUL hides the end of a count", "*1\x00\r\n$4\r\nPING\r\n", ""},
	{"NUL, then too long", "*1\x00\r\n" + strings.Repeat("x", maxLine), pe + "too big mbulk count string"},

	{"length 512 MiB", "*1\r\n$536870912\r\n", ""},
	{"length 512 MiB + 1", "*1\r\n$536870913\r\n", pe + "invalid bulk length"},
	{"length kills redcon", "*1\r\n$9223372036854775807\r\n", pe + "invalid bulk length"},
	{"length -1", "*1\r\n$-1\r\n", pe + "invalid bulk length"},
	{"length +4", "*1\r\n$+4\r\nPING\r\n", pe + "invalid bulk length"},
	{"length 004", "*1\r\n$004\r\nPING\r\n", pe + "invalid bulk length"},
	{"length empty", "*1\r\n$\r\n", pe + "invalid bulk length"},
	{"length of a line too long", "*1\r\n$" + strings.Repeat("1", maxLine+1), pe + "too big bulk count string"},
	{"no length", "*1\r\nPING\r\n", pe + "expected '$', got 'P'"},
	{"no length, count instead", "*1\r\n*1\r\n", pe + "expected '$', got '*'"},
	{"no length, odd byte", "*1\r\n\xff\r\n", pe + "expected '$', got '\xff'"},
	{"no length, CR", "*1\r\n\r\n", pe + "expected '$', got ' '"},
	{"no length, LF", "*1\r\n\nP\r\n", pe + "expected '$', got ' '"},
	{"no length yet", "*1\r\nPING", ""},
	{"NUL for a length", "*1\r\n\x00\r\n", ""},

	{"valid ones first", "PING\r\nPING\r\n*x\r\nPING\r\n", `["PING"]` + "\n" + `["PING"]` + "\n" + pe + "invalid multibulk length"},

	{"inline", "SET k v\r\n", `["SET" "k" "v"]` + "\n"},
	{"inline LF", "PING\n", `["PING"]` + "\n"},
	{"inline spaces", " \tSET\x0b \x0ck  v \t\r\n", `["SET\v" "k" "v"]` + "\n"},
	{"inline CR separates", "ECHO a\rb\r\n", `["ECHO" "a" "b"]` + "\n"},
	{"inline quotes", `ECHO "\x41\n\xzz\q\r\t\b\a\\\""` + "\r\n", `["ECHO" "A\nxzzq\r\t\b\a\\\""]` + "\n"},
	{"inline hex", `ECHO "\xAf\xg0\x0"` + "\n", `["ECHO" "\xafxg0x0"]` + "\n"},
	{"inline single quotes", `ECHO 'a\'b\n"' ''` + "\n", `["ECHO" "a'b\\n\"" ""]` + "\n"},
	{"inline quotes within", `ECHO foo"bar" foo'bar'` + "\n", `["ECHO" "foobar" "foobar"]` + "\n"},
	{"inline empty name", "\"\"\r\n", `[""]` + "\n"},
	{"inline blank lines", "\r\n\n  \t\r\n\r\rPING\r\n", `["PING"]` + "\n"},
	{"inline unfinished", "PING", ""},
	{"inline open quote", "PING \"a\r\n", pe + "unbalanced quotes in request"},
	{"inline open single quote", "PING 'a\r\n", pe + "unbalanced quotes in request"},
	{"inline escape at the end", "PING \"a\\\n", pe + "unbalanced quotes in request"},
	{"inline quote then text", "PING \"a\"b\r\n", pe + "unbalanced quotes in request"},
	{"inline quote then text, single", "PING 'a'b\r\n", pe + "unbalanced quotes in request"},
	{"inline NUL hides the end", "PING\x00\r\nPING\r\n", ""},
	{"inline NUL, then too long", "P\x00\n" + strings.Repeat("x", maxLine), pe + "too big inline request"},
	{"inline too long", strings.Repeat("a", maxLine+1), pe + "too big inline request"},
	{"inline too long, ended", strings.Repeat("a", maxLine+1) + "\n", pe + "too big inline request"},
	{"inline as long as can be", strings.Repeat(" ", maxLine-1) + "a\n", `["a"]` + "\n"},

	{"HTTP", "POST / HTTP/1.1\r\nHost: x\r\n\r\n", "! possible cross-protocol attack: HTTP instead of commands"},
	{"HTTP header", "PING\r\nhost: x\r\n", `["PING"]` + "\n" + "! possible cross-protocol attack: HTTP instead of commands"},
	{"HTTP as multibulk", "*1\r\n$4\r\nPosT\r\n", "! possible cross-protocol attack: HTTP instead of commands"},
	{"HTTP before a NUL", "*1\r\n$6\r\nPost\x00a\r\n", "! possible cross-protocol attack: HTTP instead of commands"},
	{"not HTTP", "posts\r\nhost\r\nhash\r\n", `["posts"]` + "\n" + `["host"]` + "\n" + `["hash"]` + "\n"},
}

func TestScanner(t *testing.T) {
	for _, c := range scanCases {
		t.Run(c.name, func(t *testing.T) {
			if got := feedScanner(t, newScanner(limits{}), []byte(c.in)); got != c.want {
				t.Errorf("in one piece:\n%s\nwant\n%s", got, c.want)
			}
			if got := feedScanner(t, newScanner(limits{}), singleBytes([]byte(c.in))...); got != c.want {
				t.Errorf("byte by byte:\n%s\nwant\n%s", got, c.want)
			}
			for i := 1; i < min(len(c.in), 100); i++ {
				if got := feedScanner(t, newScanner(limits{}), []byte(c.in[:i]), []byte(c.in[i:])); got != c.want {
					t.Errorf("split at %d:\n%s\nwant\n%s", i, got, c.want)
				}
			}
		})
	}
}

// singleBytes cuts b into single bytes.
func singleBytes(b []byte) [][]byte {
	out := make([][]byte, len(b))
	for i := range b {
		out[i] = b[i : i+1]
	}
	return out
}

func TestProtocolErrorReply(t *testing.T) {
	for _, c := range []struct {
		err  *protocolError
		want string
	}{
		{errArgCount, "-ERR Protocol error: invalid multibulk length\r\n"},
		{errExpectedBulk('x'), "-ERR Protocol error: expected '$', got 'x'\r\n"},
		{errExpectedBulk('\n'), "-ERR Protocol error: expected '$', got ' '\r\n"},
		{errQueryBuffer, ""},
		{errCrossProtocol, ""},
	} {
		if got := c.err.reply(); got != c.want {
			t.Errorf("%v: %q, want %q", c.err, got, c.want)
		}
	}
}

func TestScannerLimits(t *testing.T) {
	big := func(n int) string { return fmt.Sprintf("*2\r\n$4\r\nECHO\r\n$%d\r\n%s\r\n", n, strings.Repeat("a", n)) }
	count := func(n int) string { return fmt.Sprintf("*%d\r\n%s", n, strings.Repeat("$1\r\na\r\n", n)) }
	for _, c := range []struct {
		name, in string
		lim      limits
		want     string // how the answer ends
	}{
		{"bulk", big(100), limits{bulk: 100}, "\"]\n"},
		{"bulk, one more", big(101), limits{bulk: 100}, "invalid bulk length"},
		{"args", count(20), limits{args: 20}, "\"]\n"},
		{"args, one more", count(21), limits{args: 20}, "invalid multibulk length"},
		{"args, claimed", "*100\r\n$1\r\na\r\n", limits{args: 20}, ""},
		{"buffer", big(1000), limits{buffer: len(big(1000))}, "\"]\n"},
		{"buffer, one less", big(1000), limits{buffer: len(big(1000)) - 1}, "query buffer limit exceeded"},
		{"buffer, third value", "*9\r\n" + strings.Repeat("$400\r\n"+strings.Repeat("a", 400)+"\r\n", 2) + "$400\r\n", limits{buffer: 1000}, "query buffer limit exceeded"},
		{"unauthenticated args", count(10), limits{auth: true}, "\"]\n"},
		{"unauthenticated args, one more", count(11), limits{auth: true}, "unauthenticated multibulk length"},
		{"unauthenticated bulk", big(16384), limits{auth: true}, "\"]\n"},
		{"unauthenticated bulk, one more", big(16385), limits{auth: true}, "unauthenticated bulk length"},
	} {
		t.Run(c.name, func(t *testing.T) {
			for _, chunks := range [][][]byte{{[]byte(c.in)}, singleBytes([]byte(c.in))} {
				got := feedScanner(t, newScanner(c.lim), chunks...)
				if !strings.HasSuffix(got, c.want) || c.want == "" && got != "" {
					t.Errorf("%.200q, want …%q", got, c.want)
				}
			}
		})
	}
}

// The scanner meets the large SET before anybody has executed the AUTH, and
// must not hold it against the client.
func TestScannerAuthenticatedMeanwhile(t *testing.T) {
	for _, in := range []string{
		"*2\r\n$4\r\nAUTH\r\n$1\r\np\r\n*11\r\n" + strings.Repeat("$1\r\na\r\n", 11),
		"AUTH p\r\n*2\r\n$4\r\nECHO\r\n$16385\r\n" + strings.Repeat("a", 16385) + "\r\n",
	} {
		s := newScanner(limits{auth: true})
		s.wrote(copy(s.space(len(in)), in))
		if cmd, ok, err := s.next(); !ok || err != nil || string(cmd.args[0]) != "AUTH" {
			t.Fatal(cmd, ok, err)
		}
		if !s.ready() {
			t.Fatal("a violation is something to report")
		}
		s.setAuthenticated(true)
		if cmd, ok, err := s.next(); !ok || err != nil || len(cmd.raw) < 80 {
			t.Fatalf("%.80q, %v, %v", cmd.raw, ok, err)
		}
		s.setAuthenticated(false)
		if got := feedScanner(t, s, []byte("*11\r\n")); got != pe+"unauthenticated multibulk length" {
			t.Error(got)
		}
	}
}

// Looking ahead must leave the last command's bytes alone.
func TestScannerReady(t *testing.T) {
	s := newScanner(limits{})
	in := "ECHO \"one one\"\r\n ECHO two\r\n\r\n*0\r\n*2\r\n$4\r\nECHO\r\n$5\r\nthree\r\n  \r\n"
	s.wrote(copy(s.space(1), in))
	for i, word := range []string{"one one", "two", "three"} {
		if !s.ready() {
			t.Fatalf("%s is there", word)
		}
		cmd, ok, err := s.next()
		if !ok || err != nil {
			t.Fatal(ok, err)
		}
		if got, want := s.ready(), i < 2; got != want {
			t.Errorf("after %s: ready is %v, want %v", word, got, want)
		}
		if want := appendCommand(nil, "ECHO", word); !bytes.Equal(cmd.raw, want) || string(cmd.args[1]) != word {
			t.Errorf("%q %q, want %q", cmd.raw, cmd.args, want)
		}
	}
	if s.buffered() != 0 {
		t.Errorf("%d bytes are left", s.buffered())
	}
	s.wrote(copy(s.space(1), "PING \""))
	if s.ready() || s.buffered() != 6 {
		t.Error("half a line is nothing to report", s.buffered())
	}
	s.wrote(copy(s.space(1), "\n"))
	if !s.ready() {
		t.Error("an error is something to report")
	}
}

// A header's claim costs nothing.
func TestScannerClaims(t *testing.T) {
	for _, in := range []string{"*2147483647\r\n", "*2147483647\r\n$536870912\r\n", "*1\r\n$536870912\r\nabc"} {
		s := newScanner(limits{})
		if got := feedScanner(t, s, []byte(in)); got != "" {
			t.Fatal(got)
		}
		s.space(minRead)
		if len(s.buf) > keepBuffer || cap(s.spans) > keepArgs || cap(s.args) > keepArgs {
			t.Errorf("%q: %d bytes, %d spans, %d arguments", in, len(s.buf), cap(s.spans), cap(s.args))
		}
	}
}

// movesOf drips in, n bytes a time, and returns how often what was held moved,
// the largest buffer, and the commands.
func movesOf(t *testing.T, s *scanner, in []byte, n int) (moves, largest, commands int) {
	t.Helper()
	var at *byte
	for len(in) > 0 {
		room := s.space(1)
		if &s.buf[0] != at {
			at = &s.buf[0]
			moves++
		}
		largest = max(largest, len(s.buf))
		k := copy(room, in[:min(n, len(in))])
		s.wrote(k)
		in = in[k:]
		for {
			_, ok, err := s.next()
			if err != nil {
				t.Fatal(err)
			}
			if !ok {
				break
			}
			commands++
		}
	}
	return moves, largest, commands
}

func TestScannerLargeCommand(t *testing.T) {
	const size = 8<<20 + 12345
	value := bytes.Repeat([]byte("v"), size)
	set := appendCommand(nil, []byte("SET"), []byte("k"), value)
	tail := appendCommand(nil, []byte("SET"), []byte("k"), value, []byte("EX"), []byte("10"))
	many := make([][]byte, 200_000)
	for i := range many {
		many[i] = value[:i%50]
	}
	middling := make([][]byte, 400)
	for i := range middling {
		middling[i] = value[:20<<10]
	}
	for _, c := range []struct {
		name  string
		in    []byte
		n     int
		slack int // what the buffer may exceed the command by
	}{
		{"drip", appendCommand(nil, []byte("SET"), []byte("k"), value[:1<<20]), 1, minRead},
		{"reads", set, 16 << 10, minRead},
		{"more arguments", tail, 1000, 2 * minRead},
		{"many arguments", appendCommand(nil, many...), 100, size},
		{"middling arguments", appendCommand(nil, middling...), 4096, size},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := newScanner(limits{})
			moves, largest, commands := movesOf(t, s, c.in, c.n)
			if commands != 1 || moves > 12 || largest > len(c.in)+c.slack {
				t.Errorf("%d commands, %d moves, a buffer of %d bytes for %d", commands, moves, largest, len(c.in))
			}
			if len(s.buf) != keepBuffer || s.buffered() != 0 {
				t.Errorf("%d bytes are kept", len(s.buf))
			}
			if cap(s.args) > keepArgs || cap(s.spans) > keepArgs {
				t.Errorf("%d views are kept", cap(s.args))
			}
			for _, a := range s.args[:cap(s.args)] {
				if a != nil {
					t.Error("a view keeps the large buffer alive")
				}
			}
		})
	}
}

// A stream in which a read never ends where a command ends must not keep the
// memory of the large command within it.
func TestScannerUnaligned(t *testing.T) {
	small := appendCommand(nil, "SET", "k", strings.Repeat("v", 1000))
	large := appendCommand(nil, "SET", "k", strings.Repeat("v", 1<<20))
	in := bytes.Repeat(small, 1000)
	in = append(in, large...)
	in = append(in, bytes.Repeat(small, 1000)...)
	in = in[:len(in)-10]
	s := newScanner(limits{})
	_, largest, commands := movesOf(t, s, in, 1021)
	if commands != 2000 || largest > len(large)+minRead || len(s.buf) != keepBuffer {
		t.Errorf("%d commands, at most %d bytes, %d at the end", commands, largest, len(s.buf))
	}
	s = newScanner(limits{})
	if moves, largest, _ := movesOf(t, s, bytes.Repeat(small, 2000), 3000); moves != 1 || largest != keepBuffer {
		t.Errorf("small commands: %d buffers, %d bytes", moves, largest)
	}
}

// A long inline command needs more room than it had as a line.
func TestScannerInlineShrinks(t *testing.T) {
	s := newScanner(limits{})
	line := "DEL" + strings.Repeat(" k", 30_000) + "\n"
	if got := feedScanner(t, s, []byte(line)); strings.Count(got, `"k"`) != 30_000 {
		t.Errorf("%.100s", got)
	}
	if cap(s.inline) > keepBuffer || cap(s.args) > keepArgs || cap(s.spans) > keepArgs || len(s.buf) != keepBuffer {
		t.Error("its memory is kept", cap(s.inline), cap(s.args), cap(s.spans), len(s.buf))
	}
}

// A caller who reads although commands wait loses none of them.
func TestScannerBacklog(t *testing.T) {
	s := newScanner(limits{})
	var in []byte
	for i := range 20_000 {
		in = appendCommand(in, "GET", fmt.Sprint("key:", i))
	}
	for i := 0; ; i++ {
		n := copy(s.space(100), in[:min(len(in), 100)])
		s.wrote(n)
		in = in[n:]
		cmd, ok, err := s.next()
		if err != nil {
			t.Fatal(err)
		}
		if !ok {
			if i != 20_000 || len(in) != 0 {
				t.Errorf("%d commands, %d bytes left", i, len(in))
			}
			return
		}
		if got, want := string(cmd.args[1]), fmt.Sprint("key:", i); got != want {
			t.Fatalf("%s, want %s", got, want)
		}
	}
}

func TestParseDecimal(t *testing.T) {
	for _, c := range []struct {
		in string
		n  int64
		ok bool
	}{
		{"0", 0, true}, {"7", 7, true}, {"-1", -1, true}, {"10", 10, true},
		{"9223372036854775807", 9223372036854775807, true}, {"9223372036854775808", 0, false},
		{"-9223372036854775808", -9223372036854775808, true}, {"-9223372036854775809", 0, false},
		{"9999999999999999999", 0, false}, {"10000000000000000000", 0, false},
		{"", 0, false}, {"-", 0, false}, {"-0", 0, false}, {"00", 0, false}, {"01", 0, false}, {"-01", 0, false},
		{"+1", 0, false}, {"1 ", 0, false}, {" 1", 0, false}, {"1a", 0, false}, {"0x1", 0, false}, {"--1", 0, false},
	} {
		if n, ok := parseDecimal([]byte(c.in)); n != c.n || ok != c.ok {
			t.Errorf("%q: %d, %v", c.in, n, ok)
		}
	}
}

func TestScannerDoesNotAllocate(t *testing.T) {
	in := bytes.Repeat([]byte("*2\r\n$3\r\nGET\r\n$6\r\nkey:12\r\nGET key:12\r\n"), 16)
	s := newScanner(limits{})
	run := func() {
		s.wrote(copy(s.space(minRead), in))
		for {
			if _, ok, _ := s.next(); !ok {
				return
			}
		}
	}
	run()
	if n := testing.AllocsPerRun(100, run); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func BenchmarkScanner(b *testing.B) {
	get := "*2\r\n$3\r\nGET\r\n$16\r\nanalysis:123456\n\r\n"
	for _, c := range []struct {
		name string
		in   string
	}{
		{"get1", get},
		{"get16", strings.Repeat(get, 16)},
		{"inline", "GET analysis:123456\r\n"},
		{"set1k", string(appendCommand(nil, "SET", "k", strings.Repeat("v", 1024)))},
		{"set100k", string(appendCommand(nil, "SET", "k", strings.Repeat("v", 100<<10)))},
		{"mset100", string(appendCommand(nil, strings.Fields("MSET"+strings.Repeat(" key value", 100))...))},
	} {
		b.Run(c.name, func(b *testing.B) {
			b.ReportAllocs()
			b.SetBytes(int64(len(c.in)))
			s := newScanner(limits{})
			for b.Loop() {
				for in := c.in; len(in) > 0; {
					n := copy(s.space(minRead), in)
					s.wrote(n)
					in = in[n:]
					for {
						if _, ok, _ := s.next(); !ok {
							break
						}
					}
				}
			}
		})
	}
}

// A connection that holds nothing needs no memory, and one that holds a part of a command keeps it.
func TestScannerLendsItsBufferBack(t *testing.T) {
	s := newScanner(limits{})
	say := func(text string) {
		for len(text) > 0 {
			n := copy(s.space(minRead), text)
			s.wrote(n)
			text = text[n:]
		}
	}
	expect := func(want string) {
		t.Helper()
		cmd, ok, err := s.next()
		if err != nil || !ok || string(bytes.Join(cmd.args, []byte(" "))) != want {
			t.Fatalf("%q, %v, %v, want %q", cmd.args, ok, err, want)
		}
	}
	none := func() {
		t.Helper()
		if cmd, ok, err := s.next(); ok || err != nil {
			t.Fatalf("%q, %v", cmd.args, err)
		}
	}
	s.lendBack() // nothing was ever held
	say("*2\r\n$3\r\nGET\r\n$1\r\nk\r\n*2\r\n$3\r\nGET\r\n$100000\r\n")
	expect("GET k")
	none()
	s.lendBack()
	if s.base == nil || s.buffered() == 0 {
		t.Fatal("the beginning of a command is gone")
	}
	long := strings.Repeat("x", 100000)
	say(long + "\r\n")
	expect("GET " + long)
	none()
	s.lendBack()
	if s.base != nil || s.buf != nil {
		t.Fatal("the buffer is kept")
	}
	for _, a := range s.args[:cap(s.args)] {
		if a != nil {
			t.Fatal("a view of the buffer is kept")
		}
	}
	say("PING\r\n")
	expect("PING")
	none()
}
