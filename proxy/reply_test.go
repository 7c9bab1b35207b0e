package proxy

import (
	"math"
	"testing"
)

func TestReplies(t *testing.T) {
	b := func(f func([]byte) []byte) string { return string(f(nil)) }
	for _, c := range []struct{ name, got, want string }{
		{"bulk", b(func(b []byte) []byte { return appendBulk(b, "a\r\nb") }), "$4\r\na\r\nb\r\n"},
		{"bulk of bytes", b(func(b []byte) []byte { return appendBulk(b, []byte("0123456789")) }), "$10\r\n0123456789\r\n"},
		{"empty bulk", b(func(b []byte) []byte { return appendBulk(b, "") }), "$0\r\n\r\n"},
		{"simple", b(func(b []byte) []byte { return appendSimple(b, "OK") }), "+OK\r\n"},
		{"simple, two lines", b(func(b []byte) []byte { return appendSimple(b, "O\r\nK") }), "+O  K\r\n"},
		{"error", b(func(b []byte) []byte { return appendError(b, "ERR no") }), "-ERR no\r\n"},
		{"error, injection", b(func(b []byte) []byte { return appendError(b, "ERR 'x\r\n+OK\n'") }), "-ERR 'x  +OK '\r\n"},
		{"int", b(func(b []byte) []byte { return appendInt(b, math.MinInt64) }), ":-9223372036854775808\r\n"},
		{"digit", b(func(b []byte) []byte { return appendInt(b, 7) }), ":7\r\n"},
		{"null 2", b(func(b []byte) []byte { return appendNull(b, 2) }), "$-1\r\n"},
		{"null 3", b(func(b []byte) []byte { return appendNull(b, 3) }), "_\r\n"},
		{"null array 2", b(func(b []byte) []byte { return appendNullArray(b, 2) }), "*-1\r\n"},
		{"null array 3", b(func(b []byte) []byte { return appendNullArray(b, 3) }), "_\r\n"},
		{"array", b(func(b []byte) []byte { return appendArray(b, 12) }), "*12\r\n"},
		{"map 2", b(func(b []byte) []byte { return appendMap(b, 3, 2) }), "*6\r\n"},
		{"map 3", b(func(b []byte) []byte { return appendMap(b, 3, 3) }), "%3\r\n"},
		{"set 2", b(func(b []byte) []byte { return appendSet(b, 3, 2) }), "*3\r\n"},
		{"set 3", b(func(b []byte) []byte { return appendSet(b, 3, 3) }), "~3\r\n"},
		{"push 2", b(func(b []byte) []byte { return appendPush(b, 3, 2) }), "*3\r\n"},
		{"push 3", b(func(b []byte) []byte { return appendPush(b, 3, 3) }), ">3\r\n"},
		{"true 2", b(func(b []byte) []byte { return appendBool(b, true, 2) }), ":1\r\n"},
		{"false 2", b(func(b []byte) []byte { return appendBool(b, false, 2) }), ":0\r\n"},
		{"true 3", b(func(b []byte) []byte { return appendBool(b, true, 3) }), "#t\r\n"},
		{"false 3", b(func(b []byte) []byte { return appendBool(b, false, 3) }), "#f\r\n"},
		{"double 2", b(func(b []byte) []byte { return appendDouble(b, 1.5, 2) }), "$3\r\n1.5\r\n"},
		{"double 3", b(func(b []byte) []byte { return appendDouble(b, 1.5, 3) }), ",1.5\r\n"},
		{"double, not short", b(func(b []byte) []byte { return appendDouble(b, 3.141, 3) }), ",3.141\r\n"},
		{"inf", b(func(b []byte) []byte { return appendDouble(b, math.Inf(1), 3) }), ",inf\r\n"},
		{"-inf", b(func(b []byte) []byte { return appendDouble(b, math.Inf(-1), 2) }), "$4\r\n-inf\r\n"},
		{"nan", b(func(b []byte) []byte { return appendDouble(b, math.NaN(), 3) }), ",nan\r\n"},
		{"verbatim 2", b(func(b []byte) []byte { return appendVerbatim(b, "txt", "abc", 2) }), "$3\r\nabc\r\n"},
		{"verbatim 3", b(func(b []byte) []byte { return appendVerbatim(b, "txt", "abc", 3) }), "=7\r\ntxt:abc\r\n"},
		{"command", b(func(b []byte) []byte { return appendCommand(b, "GET", "k") }), "*2\r\n$3\r\nGET\r\n$1\r\nk\r\n"},
		{"command of bytes", b(func(b []byte) []byte { return appendCommand(b, [][]byte{[]byte("PING")}...) }), "*1\r\n$4\r\nPING\r\n"},
	} {
		if c.got != c.want {
			t.Errorf("%s: %q, want %q", c.name, c.got, c.want)
		}
	}
	if got := string(appendInt([]byte("x"), 1)); got != "x:1\r\n" {
		t.Errorf("what was there before is lost: %q", got)
	}
}

func BenchmarkReply(b *testing.B) {
	value := make([]byte, 100)
	buf := make([]byte, 0, 4096)
	args := [][]byte{[]byte("SET"), []byte("analysis:42"), value}
	for _, c := range []struct {
		name string
		f    func([]byte) []byte
	}{
		{"bulk", func(b []byte) []byte { return appendBulk(b, value) }},
		{"simple", func(b []byte) []byte { return appendSimple(b, "OK") }},
		{"error", func(b []byte) []byte { return appendError(b, "UNAVAILABLE the store does not answer") }},
		{"int", func(b []byte) []byte { return appendInt(b, 123456) }},
		{"double", func(b []byte) []byte { return appendDouble(b, 3.25, 3) }},
		{"double2", func(b []byte) []byte { return appendDouble(b, 3.25, 2) }},
		{"command", func(b []byte) []byte { return appendCommand(b, args...) }},
	} {
		b.Run(c.name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				buf = c.f(buf[:0])
			}
		})
	}
}

func TestRepliesDoNotAllocate(t *testing.T) {
	buf := make([]byte, 0, 4096)
	value := make([]byte, 100)
	n := testing.AllocsPerRun(100, func() {
		b := appendCommand(buf[:0], "SET", "k", "v")
		b = appendBulk(b, value)
		b = appendError(b, "ERR no")
		b = appendDouble(b, 0.1, 2)
		b = appendVerbatim(b, "txt", value, 3)
		appendInt(b, -123456789)
	})
	if n != 0 {
		t.Errorf("%v allocations", n)
	}
}
