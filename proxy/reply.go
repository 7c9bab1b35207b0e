package proxy

import (
	"math"
	"strconv"
)

// The functions of this file append one reply, or the header of an aggregate,
// to b and return the extended slice, as append does. They copy what they are
// given and allocate only if b must grow. proto is the protocol version of the
// connection that b goes to, 2 or 3; where it is missing both versions write
// the same bytes. The bytes are those Redis 7.0 would write.

// appendHeader appends a type byte, a number and CR LF.
func appendHeader(b []byte, kind byte, n int64) []byte {
	b = append(b, kind)
	if 0 <= n && n < 10 {
		b = append(b, byte('0'+n))
	} else {
		b = strconv.AppendInt(b, n, 10)
	}
	return append(b, '\r', '\n')
}

// appendBulk appends a bulk string: any bytes.
func appendBulk[T ~string | ~[]byte](b []byte, s T) []byte {
	b = appendHeader(b, '$', int64(len(s)))
	b = append(b, s...)
	return append(b, '\r', '\n')
}

// appendSimple appends a status such as OK. Line breaks become spaces.
func appendSimple(b []byte, s string) []byte {
	return appendLine(append(b, '+'), s)
}

// appendError appends an error; text begins with its code and has no leading
// minus. Line breaks become spaces, as in Redis.
func appendError(b []byte, text string) []byte {
	return appendLine(append(b, '-'), text)
}

// appendLine appends s and CR LF. A line break within s would let whoever
// chose s write replies of their own.
func appendLine(b []byte, s string) []byte {
	from := len(b)
	b = append(b, s...)
	for i, c := range b[from:] {
		if c == '\r' || c == '\n' {
			b[from+i] = ' '
		}
	}
	return append(b, '\r', '\n')
}

// appendInt appends an integer.
func appendInt(b []byte, n int64) []byte { return appendHeader(b, ':', n) }

// appendNull appends the null that stands for a missing string.
func appendNull(b []byte, proto int) []byte {
	if proto < 3 {
		return append(b, "$-1\r\n"...)
	}
	return append(b, "_\r\n"...)
}

// appendNullArray appends the null that stands for a missing array, as EXEC
// and BLPOP answer.
func appendNullArray(b []byte, proto int) []byte {
	if proto < 3 {
		return append(b, "*-1\r\n"...)
	}
	return append(b, "_\r\n"...)
}

// appendArray begins an array of n elements.
func appendArray(b []byte, n int) []byte { return appendHeader(b, '*', int64(n)) }

// appendMap begins a map of n pairs: in RESP2 an array of 2n elements.
func appendMap(b []byte, n, proto int) []byte {
	if proto < 3 {
		return appendArray(b, 2*n)
	}
	return appendHeader(b, '%', int64(n))
}

// appendSet begins a set of n elements: in RESP2 an array.
func appendSet(b []byte, n, proto int) []byte {
	if proto < 3 {
		return appendArray(b, n)
	}
	return appendHeader(b, '~', int64(n))
}

// appendPush begins an out-of-band message of n elements: in RESP2 an array.
func appendPush(b []byte, n, proto int) []byte {
	if proto < 3 {
		return appendArray(b, n)
	}
	return appendHeader(b, '>', int64(n))
}

// appendBool appends a boolean: in RESP2 the integer 0 or 1.
func appendBool(b []byte, v bool, proto int) []byte {
	switch {
	case proto < 3 && v:
		return append(b, ":1\r\n"...)
	case proto < 3:
		return append(b, ":0\r\n"...)
	case v:
		return append(b, "#t\r\n"...)
	}
	return append(b, "#f\r\n"...)
}

// appendDouble appends a number as printf's %.17g writes it: in RESP2 as a
// bulk string.
func appendDouble(b []byte, f float64, proto int) []byte {
	// The longest is -2.2250738585072014e-308.
	var digits [32]byte
	d := formatDouble(digits[:0], f)
	if proto < 3 {
		return appendBulk(b, d)
	}
	b = append(b, ',')
	b = append(b, d...)
	return append(b, '\r', '\n')
}

// formatDouble appends f in the words of C, which differ from ours for what
// is not a number.
func formatDouble(b []byte, f float64) []byte {
	switch {
	case math.IsInf(f, 1):
		return append(b, "inf"...)
	case math.IsInf(f, -1):
		return append(b, "-inf"...)
	case math.IsNaN(f):
		return append(b, "nan"...)
	}
	return strconv.AppendFloat(b, f, 'g', 17, 64)
}

// appendVerbatim appends a text with its format, which is three bytes such as
// txt or mkd: in RESP2 a bulk string without the format.
func appendVerbatim[T ~string | ~[]byte](b []byte, format string, s T, proto int) []byte {
	if proto < 3 {
		return appendBulk(b, s)
	}
	b = appendHeader(b, '=', int64(len(format)+1+len(s)))
	b = append(b, format...)
	b = append(b, ':')
	b = append(b, s...)
	return append(b, '\r', '\n')
}

// appendCommand appends a request.
func appendCommand[T ~string | ~[]byte](b []byte, args ...T) []byte {
	b = appendArray(b, len(args))
	for _, a := range args {
		b = appendBulk(b, a)
	}
	return b
}
