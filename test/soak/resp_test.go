package soak

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"strconv"
)

// frame is one reply or push.
type frame struct {
	kind  byte // the first byte on the wire
	text  string
	elems []frame // of a map: keys and values in turn
	null  bool
}

func readFrame(r *bufio.Reader) (frame, error) {
	line, err := r.ReadBytes('\n')
	if err != nil {
		return frame{}, err
	}
	if len(line) < 3 || line[len(line)-2] != '\r' {
		return frame{}, fmt.Errorf("a line that is none: %.60q", line)
	}
	f := frame{kind: line[0], text: string(line[1 : len(line)-2])}
	per := 0 // elements
	switch f.kind {
	case '+', '-', ':', ',':
		return f, nil
	case '_':
		f.null = true
		return f, nil
	case '$', '=':
	case '*', '~', '>':
		per = 1
	case '%':
		per = 2
	default:
		return frame{}, fmt.Errorf("no reply begins like this: %.60q", line)
	}
	n, err := strconv.Atoi(f.text)
	f.text = ""
	switch {
	case err != nil || n < -1 || n > 1<<29:
		return frame{}, fmt.Errorf("a length that is none: %.60q", line)
	case n == -1:
		f.null = true
		return f, nil
	case per > 0:
		for range n * per {
			e, err := readFrame(r)
			if err != nil {
				return frame{}, err
			}
			f.elems = append(f.elems, e)
		}
		return f, nil
	}
	b := make([]byte, n+2)
	if _, err := io.ReadFull(r, b); err != nil {
		return frame{}, err
	}
	if !bytes.HasSuffix(b, []byte("\r\n")) {
		return frame{}, errors.New("a string that does not end where it should")
	}
	f.text = string(b[:n])
	return f, nil
}

func (f frame) String() string {
	switch {
	case f.null:
		return "(nil)"
	case f.elems != nil:
		return fmt.Sprintf("%c%.12v", f.kind, f.elems[:min(len(f.elems), 12)])
	}
	return fmt.Sprintf("%c%.100s", f.kind, f.text)
}

// is tells whether it is this string, number, status or error.
func (f frame) is(kind byte, text string) bool { return f.kind == kind && !f.null && f.text == text }

func (f frame) num() (int64, bool) {
	n, err := strconv.ParseInt(f.text, 10, 64)
	return n, err == nil && f.kind == ':'
}

// word is the first element, which names a push.
func (f frame) word() string {
	if (f.kind == '*' || f.kind == '>') && len(f.elems) > 0 && f.elems[0].kind == '$' {
		return f.elems[0].text
	}
	return ""
}

func appendCommand(b []byte, args ...string) []byte {
	b = fmt.Appendf(b, "*%d\r\n", len(args))
	for _, a := range args {
		b = fmt.Appendf(b, "$%d\r\n", len(a))
		b = append(b, a...)
		b = append(b, "\r\n"...)
	}
	return b
}
