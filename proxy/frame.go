package proxy

import (
	"bytes"
	"errors"
	"math"
)

// errFrame says that what came is no RESP. The connection it came from cannot
// be used any more: nobody knows where the next reply begins.
var errFrame = errors.New("redis: malformed reply")

const (
	// maxHeader is the longest line that holds a number: a type byte, a
	// minus, 19 digits, CR LF. Waiting for the end of a longer one would be
	// waiting for ever.
	maxHeader = 1 + 1 + 19 + 2

	// maxCount is the most elements of one aggregate. No Redis has the
	// memory to send more, and twice as many still fit in an int64.
	maxCount = math.MaxInt32

	// maxPayload is the longest string, four times what Redis holds unless
	// it is told otherwise. A reply is held whole, so one beyond it would
	// not be welcome anyway.
	maxPayload = math.MaxInt32
)

// A framer finds where a reply ends. It builds no values and keeps no bytes,
// only its position, so a reply that arrives in many pieces is read once.
//
// It knows every type of RESP2 and RESP3. An attribute belongs to the value
// that follows it, at the top and within aggregates. The streamed types of
// RESP3, which no Redis sends, are refused. How much is held while a reply is
// incomplete is for the caller to bound.
//
// The zero framer is ready, and is ready again after each complete reply.
type framer struct {
	pos  int // what lies before is understood; a value or its tail begins here
	look int // bytes after pos already searched for the line's end
	tail int // where the string that is being received ends, or 0

	// left counts the values still to come after the one at pos. Nesting
	// needs no stack: where one value ends the next begins, whatever they
	// are part of.
	left int64

	// besides: a push within an aggregate is none of its elements. Redis writes one there when a client publishes to itself in a
	// transaction; but the confirmation of a SUBSCRIBE in a transaction is an element. Set by the caller, and kept.
	besides bool
}

// scan looks at b, which begins where the reply begins and at each call holds
// what it held before and more. It returns the reply's length when the reply
// is complete and 0 while it is not. After an error the framer is spent.
func (f *framer) scan(b []byte) (n int, err error) {
	for {
		whole, err := f.value(b)
		if !whole {
			return 0, err
		}
		if f.left == 0 {
			n, *f = f.pos, framer{besides: f.besides}
			return n, nil
		}
		f.left--
	}
}

// understood tells how many of the first n bytes are of no more use to scan: they may leave, if forget is told.
func (f *framer) understood(n int) int {
	if f.tail > 0 {
		return max(0, min(n, f.tail-2)) // the string's own end is still to be looked at
	}
	return min(n, f.pos)
}

// forget tells that the first n bytes have left: from now on b begins behind them. They must have been understood.
func (f *framer) forget(n int) {
	f.pos -= n
	if f.tail > 0 {
		f.tail -= n
	}
}

// value moves over one value, or over the header of an aggregate, whose
// elements it adds to left. It returns false if b ends before.
func (f *framer) value(b []byte) (bool, error) {
	if f.tail > 0 {
		return f.payload(b)
	}
	if f.pos >= len(b) {
		return false, nil
	}
	kind := b[f.pos]
	switch kind {
	case '+', '-', ',', '(':
		return f.text(b), nil
	case '_', '#':
		return f.constant(b)
	case '$', '*', ':', '%', '~', '>', '|', '=', '!':
	default:
		return false, errFrame
	}

	n, size, ok := frameHeader(b[f.pos:])
	if size == 0 {
		if !ok {
			return false, errFrame
		}
		return false, nil
	}
	f.pos += size
	switch {
	case kind == ':':
		return true, nil
	case n == -1 && (kind == '$' || kind == '*'):
		return true, nil
	case n < 0:
		return false, errFrame
	case kind == '$' || kind == '=' || kind == '!':
		if n > maxPayload || kind == '=' && n < int64(len("txt:")) {
			return false, errFrame
		}
		f.tail = f.pos + int(n) + 2
		return f.payload(b)
	}
	if kind == '>' && f.besides && f.pos > size {
		n++
	}
	if err := f.expect(kind, n); err != nil {
		return false, err
	}
	return true, nil
}

// expect adds the elements of an aggregate to those still to come.
func (f *framer) expect(kind byte, n int64) error {
	// So many values take gigabytes to arrive; it is the sum that must not
	// run over.
	if n > maxCount || f.left > math.MaxInt64/2 {
		return errFrame
	}
	switch kind {
	case '%':
		n *= 2
	case '|':
		n = 2*n + 1 // and the value that it describes
	}
	f.left += n
	return nil
}

// payload moves over the bytes of a string whose header has been read.
func (f *framer) payload(b []byte) (bool, error) {
	if len(b) < f.tail {
		return false, nil
	}
	if b[f.tail-2] != '\r' || b[f.tail-1] != '\n' {
		return false, errFrame
	}
	f.pos, f.tail = f.tail, 0
	return true, nil
}

// text moves over a line of any length. A CR that no LF follows is part of it.
func (f *framer) text(b []byte) bool {
	rest := b[f.pos:]
	for {
		i := bytes.IndexByte(rest[f.look:], '\r')
		if i < 0 {
			f.look = len(rest)
			return false
		}
		f.look += i
		if f.look+1 == len(rest) {
			return false
		}
		f.look++
		if rest[f.look] == '\n' {
			f.pos += f.look + 1
			f.look = 0
			return true
		}
	}
}

// constant moves over a null or a boolean.
func (f *framer) constant(b []byte) (bool, error) {
	rest := b[f.pos:]
	size := len("_\r\n")
	if rest[0] == '#' {
		size = len("#t\r\n")
	}
	if len(rest) < size {
		return false, nil
	}
	switch string(rest[:size]) {
	case "_\r\n", "#t\r\n", "#f\r\n":
		f.pos += size
		return true, nil
	}
	return false, errFrame
}

// frameHeader reads the number behind the type byte of b and returns it with
// the size of the line. size is 0 if the line is incomplete (ok) or wrong.
func frameHeader(b []byte) (n int64, size int, ok bool) {
	if len(b) >= 4 && b[1]-'0' <= 9 {
		n = int64(b[1] - '0')
		i := 2
		for n != 0 && i < 9 && i < len(b) && b[i]-'0' <= 9 {
			n = n*10 + int64(b[i]-'0')
			i++
		}
		if i+1 < len(b) && b[i] == '\r' && b[i+1] == '\n' {
			return n, i + 2, true
		}
	}
	i := bytes.IndexByte(b[:min(len(b), maxHeader)], '\r')
	switch {
	case i < 0:
		return 0, 0, len(b) < maxHeader
	case i+1 >= len(b):
		return 0, 0, i+1 < maxHeader
	case b[i+1] != '\n':
		return 0, 0, false
	}
	n, ok = parseDecimal(b[1:i])
	if !ok {
		return 0, 0, false
	}
	return n, i + 2, true
}

// The functions below take a complete frame, as scan has measured it, and
// return views into it. Given anything else they answer no.

// frameValue returns the frame without the attributes before it.
func frameValue(frame []byte) []byte {
	for len(frame) > 0 && frame[0] == '|' {
		n, size, _ := frameHeader(frame)
		if size == 0 {
			return nil
		}
		frame = frame[size:]
		for i := int64(0); i < 2*n; i++ {
			var f framer
			k, err := f.scan(frame)
			if k == 0 || err != nil {
				return nil
			}
			frame = frame[k:]
		}
	}
	return frame
}

// frameKind returns the type byte of the value behind the attributes, or 0.
func frameKind(frame []byte) byte {
	if frame = frameValue(frame); len(frame) > 0 {
		return frame[0]
	}
	return 0
}

// isNull tells whether the value is one of the three nulls.
func isNull(frame []byte) bool {
	switch string(frameValue(frame)) {
	case "$-1\r\n", "*-1\r\n", "_\r\n":
		return true
	}
	return false
}

// isError tells whether the value is an error, simple or bulk.
func isError(frame []byte) bool {
	kind := frameKind(frame)
	return kind == '-' || kind == '!'
}

// errorCode returns the first word of an error, such as ERR or MOVED, and nil
// for any other value.
func errorCode(frame []byte) []byte {
	frame = frameValue(frame)
	if len(frame) == 0 || frame[0] != '-' && frame[0] != '!' {
		return nil
	}
	text, _ := scalar(frame)
	if i := bytes.IndexByte(text, ' '); i >= 0 {
		text = text[:i]
	}
	return text
}

// parseInt returns the value of an integer.
func parseInt(frame []byte) (int64, bool) {
	frame = frameValue(frame)
	if len(frame) == 0 || frame[0] != ':' {
		return 0, false
	}
	n, size, ok := frameHeader(frame)
	return n, ok && size > 0
}

// bulk returns the bytes of a value that is neither an aggregate nor null nor
// an error: a string without its framing, a verbatim string without its
// format too, a number as it is written.
func bulk(frame []byte) ([]byte, bool) {
	frame = frameValue(frame)
	if len(frame) == 0 || frame[0] == '-' || frame[0] == '!' {
		return nil, false
	}
	return scalar(frame)
}

// scalar returns the bytes of a value that is neither an aggregate nor null.
func scalar(frame []byte) ([]byte, bool) {
	switch frame[0] {
	case '+', '-', ':', ',', '(', '#':
		if len(frame) < len("+\r\n") {
			return nil, false
		}
		return frame[1 : len(frame)-2], true
	case '$', '!', '=':
		n, size, _ := frameHeader(frame)
		if size == 0 || n < 0 || n != int64(len(frame)-size-2) {
			return nil, false
		}
		payload := frame[size : len(frame)-2]
		if frame[0] == '=' {
			if len(payload) < len("txt:") {
				return nil, false
			}
			payload = payload[len("txt:"):]
		}
		return payload, true
	}
	return nil, false
}

// elements appends views of an aggregate's direct elements to dst[:0], a map's
// keys and values by turns, each with its attributes. ok is false for a null
// and for what is no aggregate.
func elements(frame []byte, dst [][]byte) (_ [][]byte, ok bool) {
	dst = dst[:0]
	frame = frameValue(frame)
	if len(frame) == 0 || bytes.IndexByte([]byte("*~>%"), frame[0]) < 0 {
		return dst, false
	}
	n, size, _ := frameHeader(frame)
	if size == 0 || n < 0 {
		return dst, false
	}
	if frame[0] == '%' {
		n *= 2
	}
	frame = frame[size:]
	for ; n > 0; n-- {
		var f framer
		k, err := f.scan(frame)
		if k == 0 || err != nil {
			return dst[:0], false
		}
		dst = append(dst, frame[:k:k])
		frame = frame[k:]
	}
	return dst, true
}
