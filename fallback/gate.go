package fallback

import "unicode/utf8"

// The gate decides which bytes Postgres gets to see as JSON. A batch is one transaction, so a value that
// Postgres refuses would take everybody's writes with it; and there are values that it accepts and cannot
// give back. So the gate is stricter than JSON: what passes is accepted by every supported Postgres, can be
// read again as text, and costs little to parse. Everything else is stored as bytes, which loses nothing but
// the view for queries.
const (
	// gateSize: larger documents take the server seconds to parse, and nobody queries a cache for them.
	gateSize = 16 << 20
	// gateDepth: the server recurses, and its stack of 2 MB ends somewhere beyond 10,000 levels.
	gateDepth = 512
	// gateExponent: numbers are stored with all their digits, so an exponent is a promise to print zeros. This
	// is the range of a float64, beyond which hardly any reader follows.
	gateExponent = 308
	// gateDigits bounds the digits of one number. numeric ends at 131,072 before the point and 16,383 after.
	gateDigits = 4096
	// gateCanonical bounds the document as the server prints it. Text beyond 256 MB cannot be printed at all
	// (the row would be poison), and printing is part of every write.
	gateCanonical = 64 << 20
	// gateNodes bounds the values and names of a document. The server makes some 50 bytes of each while it
	// parses, and a million of them take it a good part of a second.
	gateNodes = 1 << 20
)

// gate tells whether Postgres may parse value as JSON. canonical is an upper bound of the size of what the
// server prints for it.
func gate(value []byte) (canonical int, ok bool) {
	if len(value) == 0 || len(value) > gateSize || !utf8.Valid(value) {
		return 0, false
	}
	g := gateScanner{b: value}
	if !g.document() {
		return 0, false
	}
	return g.size, true
}

// gateScanner reads one document from the front. It has no recursion, so that its own stack is no concern.
type gateScanner struct {
	b     []byte
	i     int // next byte
	size  int // bound of the canonical size of what was read
	nodes int
	depth int
	open  [gateDepth]byte // '{' or '[' of each level
}

// document reads a value and nothing but white space around it.
func (g *gateScanner) document() bool {
	for {
		// Here a value is expected.
		g.space()
		if !g.node(2) { // each value is followed by at most ", "
			return false
		}
		switch c := g.peek(); c {
		case '{', '[':
			if g.depth == gateDepth {
				return false
			}
			g.open[g.depth] = c
			g.depth++
			g.i++
			g.size += 2
			g.space()
			if g.peek() == c+2 { // '}' and ']' stand two behind their partners
				g.i++
				g.depth--
				break
			}
			if c == '{' && !g.name() {
				return false
			}
			continue
		case '"':
			if !g.text() {
				return false
			}
		case 't':
			if !g.word("true") {
				return false
			}
		case 'f':
			if !g.word("false") {
				return false
			}
		case 'n':
			if !g.word("null") {
				return false
			}
		default:
			if !g.number() {
				return false
			}
		}
		// Here a value has ended: close what ends with it, up to the next one.
		for {
			if g.size > gateCanonical {
				return false
			}
			g.space()
			if g.depth == 0 {
				return g.i == len(g.b)
			}
			c := g.open[g.depth-1]
			switch g.peek() {
			case c + 2:
				g.i++
				g.depth--
				continue
			case ',':
				g.i++
				if c == '{' {
					g.space()
					if !g.name() {
						return false
					}
				}
			default:
				return false
			}
			break
		}
	}
}

// node counts a value or a name and the punctuation that the server prints after it.
func (g *gateScanner) node(punctuation int) bool {
	g.nodes++
	g.size += punctuation
	return g.nodes <= gateNodes
}

// peek is the next byte, or 0 at the end: no document may contain a NUL outside of what text refuses.
func (g *gateScanner) peek() byte {
	if g.i < len(g.b) {
		return g.b[g.i]
	}
	return 0
}

func (g *gateScanner) space() {
	for g.i < len(g.b) {
		switch g.b[g.i] {
		case ' ', '\t', '\n', '\r':
			g.i++
		default:
			return
		}
	}
}

func (g *gateScanner) word(w string) bool {
	if len(g.b)-g.i < len(w) || string(g.b[g.i:g.i+len(w)]) != w {
		return false
	}
	g.i += len(w)
	g.size += len(w)
	return true
}

// name reads an object's name and the colon behind it.
func (g *gateScanner) name() bool {
	if !g.node(2) || !g.text() {
		return false
	}
	g.space()
	if g.peek() != ':' {
		return false
	}
	g.i++
	return true
}

// text reads a string. An escape is never shorter than what the server prints for it, so the size of the
// input bounds the output.
func (g *gateScanner) text() bool {
	if g.peek() != '"' {
		return false
	}
	from := g.i
	g.i++
	for {
		rest := g.b[g.i:]
		n := 0
		for n < len(rest) && rest[n] >= ' ' && rest[n] != '"' && rest[n] != '\\' {
			n++
		}
		if g.i += n; n == len(rest) {
			return false
		}
		switch rest[n] {
		case '"':
			g.i++
			g.size += g.i - from
			return true
		case '\\':
			if !g.escape() {
				return false
			}
		default: // a control character
			return false
		}
	}
}

// escape reads what begins with a backslash. U+0000 has no place in text, and surrogates stand for something
// only in pairs, the high one first and the low one right behind it.
func (g *gateScanner) escape() bool {
	g.i++
	switch g.peek() {
	case '"', '\\', '/', 'b', 'f', 'n', 'r', 't':
		g.i++
		return true
	case 'u':
	default:
		return false
	}
	r, ok := g.hex()
	switch {
	case !ok || r == 0 || r >= 0xDC00 && r <= 0xDFFF:
		return false
	case r >= 0xD800 && r <= 0xDBFF:
		if g.peek() != '\\' {
			return false
		}
		g.i++
		low, ok := g.hex()
		return ok && low >= 0xDC00 && low <= 0xDFFF
	}
	return true
}

// hex reads "u" and four digits.
func (g *gateScanner) hex() (r rune, ok bool) {
	if len(g.b)-g.i < 5 || g.b[g.i] != 'u' {
		return 0, false
	}
	for _, c := range g.b[g.i+1 : g.i+5] {
		switch {
		case c >= '0' && c <= '9':
			r = r<<4 | rune(c-'0')
		case c >= 'a' && c <= 'f':
			r = r<<4 | rune(c-'a'+10)
		case c >= 'A' && c <= 'F':
			r = r<<4 | rune(c-'A'+10)
		default:
			return 0, false
		}
	}
	g.i += 5
	return r, true
}

// number reads a number and counts it as long as it is without its exponent.
func (g *gateScanner) number() bool {
	from := g.i
	if g.peek() == '-' {
		g.i++
	}
	if g.peek() == '0' {
		g.i++
	} else if g.digits() == 0 {
		return false
	}
	if g.peek() == '.' {
		g.i++
		if g.digits() == 0 {
			return false
		}
	}
	if g.i-from > gateDigits {
		return false
	}
	g.size += g.i - from
	if c := g.peek(); c != 'e' && c != 'E' {
		return true
	}
	g.i++
	if c := g.peek(); c == '+' || c == '-' {
		g.i++
	}
	first := g.i
	if g.digits() == 0 {
		return false
	}
	exponent := 0
	for _, c := range g.b[first:g.i] {
		if exponent = exponent*10 + int(c-'0'); exponent > gateExponent {
			return false
		}
	}
	g.size += exponent + len("0.")
	return true
}

// digits reads as many digits as there are and returns their number.
func (g *gateScanner) digits() int {
	from := g.i
	for g.i < len(g.b) && g.b[g.i] >= '0' && g.b[g.i] <= '9' {
		g.i++
	}
	return g.i - from
}
