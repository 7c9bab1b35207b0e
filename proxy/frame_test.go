package proxy

import (
	"bytes"
	"fmt"
	"math"
	"math/rand/v2"
	"net"
	"strings"
	"testing"
	"time"

	"cacheproxy/internal/testenv"
)

var frameCases = []struct {
	in   string
	kind byte
}{
	{"+OK\r\n", '+'},
	{"+\r\n", '+'},
	{"+a\rb\nc\r\r\n", '+'},
	{"-ERR no\r\n", '-'},
	{":0\r\n", ':'},
	{":-9223372036854775808\r\n", ':'},
	{"$0\r\n\r\n", '$'},
	{"$3\r\na\r\n\r\n", '$'},
	{"$-1\r\n", '$'},
	{"$12\r\n0123456789ab\r\n", '$'},
	{"*-1\r\n", '*'},
	{"*0\r\n", '*'},
	{"*2\r\n$1\r\na\r\n:1\r\n", '*'},
	{"*2\r\n*2\r\n*0\r\n*-1\r\n*1\r\n*1\r\n+x\r\n", '*'},
	{"_\r\n", '_'},
	{"#t\r\n", '#'},
	{"#f\r\n", '#'},
	{",1.5\r\n", ','},
	{",-inf\r\n", ','},
	{"(3492890328409238509324850943850943825024385\r\n", '('},
	{"!5\r\nERR a\r\n", '!'},
	{"=7\r\ntxt:abc\r\n", '='},
	{"%2\r\n+a\r\n:1\r\n+b\r\n*1\r\n_\r\n", '%'},
	{"%0\r\n", '%'},
	{"~2\r\n+a\r\n+b\r\n", '~'},
	{">2\r\n$7\r\nmessage\r\n+x\r\n", '>'},
	{"|1\r\n+ttl\r\n:3600\r\n$1\r\na\r\n", '$'},
	{"|1\r\n+a\r\n%1\r\n+b\r\n|1\r\n+c\r\n+d\r\n+e\r\n|0\r\n*1\r\n|1\r\n+f\r\n+g\r\n:1\r\n", '*'},
}

func TestFramer(t *testing.T) {
	for _, c := range frameCases {
		for _, after := range []string{"", "+next\r\n", "garbage"} {
			b := []byte(c.in + after)
			var f framer
			for i := range len(c.in) { // byte by byte
				if n, err := f.scan(b[:i]); n != 0 || err != nil {
					t.Fatalf("%q, %d bytes of it: %d, %v", c.in, i, n, err)
				}
			}
			if n, err := f.scan(b); n != len(c.in) || err != nil {
				t.Errorf("%q before %q: %d, %v", c.in, after, n, err)
			}
			if f != (framer{}) {
				t.Errorf("%q: not reset: %+v", c.in, f)
			}
			if n, err := f.scan(b); n != len(c.in) || err != nil {
				t.Errorf("%q at once: %d, %v", c.in, n, err)
			}
		}
		if got := frameKind([]byte(c.in)); got != c.kind {
			t.Errorf("%q: kind %c, want %c", c.in, got, c.kind)
		}
	}
}

func TestFramerErrors(t *testing.T) {
	for _, in := range []string{
		"x\r\n", "\r\n", "PING\r\n",
		":\r\n", ":1.5\r\n", ":01\r\n", ":+1\r\n", ":9223372036854775808\r\n",
		"$\r\n", "$-2\r\n", "$x\r\n", "$01\r\n", "$1\rx", "$1\r\nabc", "$1\r\na\rb",
		"$2147483648\r\n", "$9223372036854775807\r\n", "$-\r\n",
		"*-2\r\n", "*x\r\n", "*2147483648\r\n", "*9223372036854775807\r\n",
		"*1\r\nx", "%-1\r\n", "~-1\r\n", ">-1\r\n", "|-1\r\n", "!-1\r\n", "=-1\r\n", "=3\r\ntxt\r\n",
		"#x\r\n", "#tx\r", "_x\r", "$?\r\n", "*?\r\n", "%?\r\n", ";4\r\n", ".\r\n",
		"$1111111111111111111111111111", ":                          1\r\n", "$0000000000000000000001\r\n",
	} {
		var f framer
		if n, err := f.scan([]byte(in)); n != 0 || err != errFrame {
			t.Errorf("%q: %d, %v", in, n, err)
		}
		f = framer{}
		var err error
		for i := range len(in) + 1 {
			if n, e := f.scan([]byte(in[:i])); n != 0 {
				t.Errorf("%q, %d bytes of it: %d", in, i, n)
			} else if e != nil {
				err = e
				break
			}
		}
		if err != errFrame {
			t.Errorf("%q byte by byte: %v", in, err)
		}
	}
}

// Nesting costs no memory, and no sum of counts runs over.
func TestFramerNesting(t *testing.T) {
	b := append(bytes.Repeat([]byte("*1\r\n"), 1<<20), ":1\r\n"...)
	var f framer
	if n, err := f.scan(b); n != len(b) || err != nil {
		t.Error(n, err)
	}
	f = framer{left: math.MaxInt64/2 + 1}
	if _, err := f.scan([]byte("*1\r\n")); err != errFrame {
		t.Error("the sum of all counts ran over")
	}
}

// A reply that arrives in many pieces is looked at once: the framer's position
// follows the bytes. With 100 MB in 1 KB pieces anything else would not end.
func TestFramerLarge(t *testing.T) {
	value := bytes.Repeat([]byte("v"), 40<<20)
	b := appendArray(nil, 100_002)
	b = appendBulk(b, value)
	b = appendSimple(b, string(value[:20<<20]))
	for range 100_000 {
		b = appendBulk(b, "0123456789")
	}
	var f framer
	for i := 0; i < len(b); i += 1000 {
		if n, err := f.scan(b[:i]); n != 0 || err != nil {
			t.Fatal(i, n, err)
		}
	}
	if n, err := f.scan(b); n != len(b) || err != nil {
		t.Error(n, err)
	}
}

func TestFrameHelpers(t *testing.T) {
	const attr = "|1\r\n+ttl\r\n*1\r\n:1\r\n"
	for _, c := range []struct {
		in          string
		null, isErr bool
		code        string
		n           int64
		isInt       bool
		text        string
		isText      bool
	}{
		{in: "$-1\r\n", null: true},
		{in: "*-1\r\n", null: true},
		{in: "_\r\n", null: true},
		{in: "-ERR no such\r\n", isErr: true, code: "ERR"},
		{in: "-MOVED\r\n", isErr: true, code: "MOVED"},
		{in: "!7\r\nERR a b\r\n", isErr: true, code: "ERR"},
		{in: "-\r\n", isErr: true},
		{in: ":42\r\n", n: 42, isInt: true, text: "42", isText: true},
		{in: ":-1\r\n", n: -1, isInt: true, text: "-1", isText: true},
		{in: "+OK\r\n", text: "OK", isText: true},
		{in: "$0\r\n\r\n", isText: true},
		{in: "$3\r\na\r\n\r\n", text: "a\r\n", isText: true},
		{in: "=7\r\ntxt:abc\r\n", text: "abc", isText: true},
		{in: ",1.5\r\n", text: "1.5", isText: true},
		{in: "(12\r\n", text: "12", isText: true},
		{in: "#t\r\n", text: "t", isText: true},
		{in: "*1\r\n:1\r\n"},
		{in: "%0\r\n"},
		// What is no frame gets no for an answer.
		{in: ""}, {in: "|"}, {in: "|1\r\n+a\r\n"}, {in: "|x\r\n:1\r\n"}, {in: "$5\r\nab\r\n"}, {in: "$"}, {in: "="}, {in: "+"},
		{in: ":x\r\n", text: "x", isText: true}, {in: "=3\r\nabc\r\n"},
	} {
		for _, in := range []string{c.in, attr + c.in} {
			b := []byte(in)
			if got := isNull(b); got != c.null {
				t.Errorf("isNull(%q) = %v", in, got)
			}
			if got := isError(b); got != c.isErr {
				t.Errorf("isError(%q) = %v", in, got)
			}
			if got := errorCode(b); string(got) != c.code {
				t.Errorf("errorCode(%q) = %q", in, got)
			}
			if n, ok := parseInt(b); ok != c.isInt || ok && n != c.n {
				t.Errorf("parseInt(%q) = %d, %v", in, n, ok)
			}
			if text, ok := bulk(b); ok != c.isText || string(text) != c.text {
				t.Errorf("bulk(%q) = %q, %v", in, text, ok)
			}
		}
	}
}

func TestElements(t *testing.T) {
	for _, c := range []struct {
		in   string
		want []string
		ok   bool
	}{
		{"*0\r\n", nil, true},
		{"*2\r\n$1\r\na\r\n*1\r\n:1\r\n", []string{"$1\r\na\r\n", "*1\r\n:1\r\n"}, true},
		{"%1\r\n+a\r\n~1\r\n+b\r\n", []string{"+a\r\n", "~1\r\n+b\r\n"}, true},
		{"|1\r\n+x\r\n+y\r\n>1\r\n|1\r\n+a\r\n+b\r\n:1\r\n", []string{"|1\r\n+a\r\n+b\r\n:1\r\n"}, true},
		{"*-1\r\n", nil, false},
		{"_\r\n", nil, false},
		{":5\r\n", nil, false},
		{"$1\r\na\r\n", nil, false},
		{"", nil, false},
		{"*2\r\n:1\r\n", nil, false},
		{"*1\r\nx\r\n", nil, false},
		{"\r\n", nil, false},
		{"*x\r\n", nil, false},
	} {
		dst := make([][]byte, 0, 4)
		got, ok := elements([]byte(c.in), append(dst, []byte("old")))
		if fmt.Sprintf("%q", got) != fmt.Sprintf("%q", c.want) || ok != c.ok {
			t.Errorf("%q: %q, %v", c.in, got, ok)
		}
	}
}

// FuzzFrame holds that it makes no difference how a reply is split, and that
// no helper panics on what came.
func FuzzFrame(f *testing.F) {
	for i, c := range frameCases {
		f.Add([]byte(c.in+"+next\r\n"), uint64(i))
	}
	f.Add([]byte("*3\r\n$-2\r\n"), uint64(1))
	f.Add([]byte("|1\r\n*2\r\n:1\r\n,x\r\n"), uint64(2))
	f.Fuzz(func(t *testing.T, b []byte, seed uint64) {
		var whole framer
		want, wantErr := whole.scan(b)
		if want > 0 && wantErr != nil || want < 0 || want > len(b) {
			t.Fatal(want, wantErr)
		}

		r := rand.New(rand.NewPCG(seed, 0))
		var parts framer
		var n int
		var err error
		for i := 0; n == 0 && err == nil; i = min(len(b), i+1+r.IntN(8)) {
			n, err = parts.scan(b[:i:i])
			if i == len(b) {
				break
			}
		}
		if n != want || err != wantErr {
			t.Fatalf("in one piece %d, %v; in pieces %d, %v", want, wantErr, n, err)
		}

		frame := b[:max(n, 0)]
		if n == 0 {
			frame = b
		}
		isNull(frame)
		errorCode(frame)
		parseInt(frame)
		bulk(frame)
		if n > 0 {
			if v := frameValue(frame); len(v) == 0 {
				t.Fatal("a frame without a value")
			}
			if kids, ok := elements(frame, nil); ok {
				v := frameValue(frame)
				_, size, _ := frameHeader(v)
				if got := bytes.Join(kids, nil); !bytes.Equal(got, v[size:]) {
					t.Fatalf("the elements of %q are %q", v, got)
				}
			}
		} else {
			elements(frame, nil)
		}
	})
}

// Redis answers each command, then ECHO with a mark: what lies before the mark
// must be exactly one frame.
func TestFramerOracle(t *testing.T) {
	r := testenv.Redis(t, "--enable-debug-command", "yes")
	commands := []string{
		"PING", "SET k v", "GET k", "GET none", "SET k v GET", "INCR n", "INCR k", "STRLEN k", "MGET k none n", "EXISTS k none",
		"TTL k", "TYPE k", "KEYS *", "DEL none", "RPUSH l a b c", "LRANGE l 0 -1", "LPOP none", "LPOP l 2", "LPOP none 2",
		"HSET h a 1 b 2", "HGETALL h", "HGETALL none", "HRANDFIELD h 2 WITHVALUES", "SADD s a b c", "SMEMBERS s", "SMISMEMBER s a x",
		"ZADD z 1 a 2.5 b inf c", "ZRANGE z 0 -1 WITHSCORES", "ZSCORE z b", "ZSCORE z c", "ZSCORE z none", "ZPOPMIN z", "ZMSCORE z a b",
		"XADD x 1-1 f v", "XRANGE x - +", "XREAD STREAMS x 0", "XINFO STREAM x FULL", "GEOADD g 13.361389 38.115556 p", "GEOPOS g p none",
		"SCAN 0", "OBJECT HELP", "OBJECT ENCODING k", "CLIENT LIST", "CLIENT INFO", "INFO", "COMMAND", "COMMAND DOCS GET", "COMMAND INFO get none",
		"COMMAND GETKEYS MSET a 1 b 2", "CONFIG GET max*", "MEMORY STATS", "MEMORY DOCTOR", "LATENCY DOCTOR", "LOLWUT", "SLOWLOG GET", "ACL LIST",
		"ACL GETUSER default", "ACL CAT", "TIME", "EXEC", "MULTI", "SET k 1", "GET k", "EXEC", "NOSUCH", "SET k", "LPUSH k v", "DUMP k", "ROLE",
		"EVAL 'return {1,2,{3,\"four\"},redis.error_reply(\"MY error\")}' 0", "EVAL 'return redis.status_reply(\"fine\")' 0",
		"EVAL 'return nil' 0", "EVAL 'return {}' 0", "EVAL 'return {double=1.5}' 0", "EVAL 'redis.setresp(3); return {map={a=1}}' 0",
		"EVAL 'return redis.error_reply(\"ERR a\")' 0", "LCS k n IDX", "FUNCTION LIST", "FUNCTION STATS", "HELLO", "CLIENT TRACKINGINFO",
		"DEBUG PROTOCOL string", "DEBUG PROTOCOL integer", "DEBUG PROTOCOL double", "DEBUG PROTOCOL null", "DEBUG PROTOCOL array",
		"DEBUG PROTOCOL set", "DEBUG PROTOCOL map", "DEBUG PROTOCOL attrib", "DEBUG PROTOCOL verbatim", "DEBUG PROTOCOL true",
		"DEBUG PROTOCOL false", "DEBUG PROTOCOL bignum", "BITFIELD n GET u4 0 OVERFLOW FAIL INCRBY u2 0 9",
	}
	for _, proto := range []string{"2", "3"} {
		t.Run("RESP"+proto, func(t *testing.T) {
			c := dialServer(t, r.Addr())
			c.send(appendCommand(nil, "HELLO", proto))
			c.frame(t)
			for i, command := range commands {
				mark := fmt.Sprintf("mark-%d-%s", i, proto)
				if command == "MULTI" || strings.Contains("SET k 1|GET k", command) {
					c.send([]byte(command + "\r\n"))
					c.frame(t)
					continue
				}
				c.send(append([]byte(command+"\r\n"), appendCommand(nil, "ECHO", mark)...))
				frame := c.frame(t)
				if got := string(c.frame(t)); got != string(appendBulk(nil, mark)) {
					t.Fatalf("%s: after the frame %.200q comes %q", command, frame, got)
				}
			}
			// A push comes before the reply of the command that causes it.
			if proto == "3" {
				c.send([]byte("DEBUG PROTOCOL push\r\n"))
				if a, b := c.frame(t), c.frame(t); frameKind(a)+frameKind(b) != '>'+'$' && frameKind(a)+frameKind(b) != '>'+'+' {
					t.Errorf("%q and %q", a, b)
				}
			}
		})
	}

	// What we write for a double is what Redis writes.
	t.Run("double", func(t *testing.T) {
		rnd := rand.New(rand.NewPCG(1, 2))
		values := []float64{0, 1, -1, 1.5, 0.1, 100, 1e15, 1e16, 1e17, 1e21, 1e-4, 1e-5, 123456789012345680, math.MaxFloat64,
			math.SmallestNonzeroFloat64, -2.2250738585072014e-308, math.Inf(1), math.Inf(-1)}
		for range 500 {
			if f := math.Float64frombits(rnd.Uint64()); !math.IsNaN(f) {
				values = append(values, f)
			}
			values = append(values, rnd.Float64(), math.Round(rnd.Float64()*1e4)/100)
		}
		for _, proto := range []int{2, 3} {
			c := dialServer(t, r.Addr())
			c.send(appendCommand(nil, "HELLO", fmt.Sprint(proto)))
			c.frame(t)
			for _, f := range values {
				c.send(appendCommand(nil, "ZADD", "doubles", string(formatDouble(nil, f)), "m"))
				c.send(appendCommand(nil, "ZSCORE", "doubles", "m"))
				c.frame(t)
				if got, want := string(c.frame(t)), string(appendDouble(nil, f, proto)); got != want {
					t.Errorf("%v: Redis writes %q, we %q", f, got, want)
				}
			}
		}
	})
}

// A serverConn talks to a server in whole replies.
type serverConn struct {
	net.Conn
	buf []byte
	f   framer
}

// dialServer connects to a path or host:port until the test ends.
func dialServer(t testing.TB, addr string) *serverConn {
	t.Helper()
	network := "tcp"
	if strings.HasPrefix(addr, "/") {
		network = "unix"
	}
	conn, err := net.Dial(network, addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(time.Minute))
	return &serverConn{Conn: conn}
}

func (c *serverConn) send(b []byte) { c.Write(b) }

// frame returns the next reply.
func (c *serverConn) frame(t testing.TB) []byte {
	t.Helper()
	frame, err := c.next()
	if err != nil {
		t.Fatal(err)
	}
	return frame
}

func (c *serverConn) next() ([]byte, error) {
	for {
		n, err := c.f.scan(c.buf)
		if err != nil {
			return nil, err
		}
		if n > 0 {
			frame := c.buf[:n:n]
			c.buf = c.buf[n:]
			return frame, nil
		}
		var room [4096]byte
		k, err := c.Read(room[:])
		if err != nil {
			return nil, err
		}
		c.buf = append(c.buf, room[:k]...)
	}
}

func BenchmarkFramer(b *testing.B) {
	for _, c := range []struct {
		name string
		in   string
	}{
		{"ok", "+OK\r\n"},
		{"bulk100", string(appendBulk(nil, make([]byte, 100)))},
		{"mget16", "*16\r\n" + strings.Repeat(string(appendBulk(nil, make([]byte, 100))), 16)},
		{"attribute", "|1\r\n+ttl\r\n:3600\r\n$1\r\na\r\n"},
	} {
		b.Run(c.name, func(b *testing.B) {
			in := []byte(strings.Repeat(c.in, 16))
			b.ReportAllocs()
			b.SetBytes(int64(len(c.in)))
			var f framer
			rest := in
			for b.Loop() {
				n, err := f.scan(rest)
				if n == 0 || err != nil {
					b.Fatal(n, err)
				}
				if rest = rest[n:]; len(rest) == 0 {
					rest = in
				}
			}
		})
	}
}

func TestFramerDoesNotAllocate(t *testing.T) {
	in := []byte("|1\r\n+ttl\r\n:3600\r\n*3\r\n$1\r\na\r\n:1\r\n_\r\n")
	dst := make([][]byte, 0, 8)
	var f framer
	n := testing.AllocsPerRun(100, func() {
		f.scan(in[:10])
		f.scan(in)
		dst, _ = elements(in, dst)
		bulk(dst[0])
		parseInt(dst[1])
		isNull(dst[2])
		errorCode(in)
	})
	if n != 0 || len(dst) != 3 {
		t.Errorf("%v allocations, %d elements", n, len(dst))
	}
}
