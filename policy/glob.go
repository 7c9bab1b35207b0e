package policy

// maxStars bounds how many times a pattern may begin a "*" that something follows. Redis (since its fix of
// CVE-2024-31228) recurses once for each and declares that nothing matches beyond 1000. There is no stack to
// exhaust here, but both must agree.
const maxStars = 1000

// Glob reports whether pattern matches the whole of s, byte for byte as KEYS decides it in Redis 7:
//
//	?        any one byte
//	*        any bytes, also none
//	[a-c^]   one byte of the set; a range may be reversed
//	[^a-c]   one byte outside the set
//	\x       x itself, also in a set; a trailing backslash is a backslash
//
// A set that is not closed ends with the pattern. Ranges compare bytes as Redis does where char is signed
// (x86-64): 0x80 to 0xff come before 0x00. The empty string is matched by "" and "*" and by no other pattern,
// not even "**": Redis compares nothing with an empty key, and KEYS knows "*" by itself.
//
// The time is bounded by len(pattern)*len(s); nothing is allocated and neither argument is kept.
func Glob(pattern, s []byte) bool {
	if len(s) == 0 {
		return len(pattern) == 0 || string(pattern) == "*"
	}
	// Everything but "*" takes exactly one byte. So only the last "*" ever needs to be tried longer: if what
	// follows it matches nowhere, lengthening an earlier one leaves it less to match in, and no more. That is
	// what skipLongerMatches tells Redis, and what keeps the time from being exponential.
	p, i := 0, 0
	afterStar, from := -1, 0 // what follows the last "*", and where in s it is being tried
	stars := 0
	for i < len(s) {
		if p < len(pattern) {
			if pattern[p] == '*' {
				if p = skipStars(pattern, p); p == len(pattern) {
					return true
				}
				if stars++; stars > maxStars {
					return false
				}
				afterStar, from = p, i
				continue
			}
			if n, ok := matchByte(pattern[p:], s[i]); ok {
				p += n
				i++
				continue
			}
		}
		if afterStar < 0 {
			return false
		}
		from++
		p, i = afterStar, from
	}
	return skipStars(pattern, p) == len(pattern)
}

// skipStars returns the index of the first byte at or after p that is not a star.
func skipStars(pattern []byte, p int) int {
	for p < len(pattern) && pattern[p] == '*' {
		p++
	}
	return p
}

// matchByte compares c with the element that p begins with, which is not a star. It returns the length of
// the element, which means nothing if c does not match.
func matchByte(p []byte, c byte) (n int, ok bool) {
	switch {
	case p[0] == '?':
		return 1, true
	case p[0] == '[':
		return matchSet(p, c)
	case p[0] == '\\' && len(p) > 1:
		return 2, p[1] == c
	}
	return 1, p[0] == c
}

// matchSet is matchByte for a set. p begins with its bracket.
func matchSet(p []byte, c byte) (n int, ok bool) {
	i, in := 1, false
	negated := i < len(p) && p[i] == '^'
	if negated {
		i++
	}
	for ; i < len(p) && p[i] != ']'; i++ {
		switch {
		case p[i] == '\\' && i+1 < len(p):
			i++
			in = in || p[i] == c
		case i+2 < len(p) && p[i+1] == '-':
			lo, hi := int8(p[i]), int8(p[i+2])
			if lo > hi {
				lo, hi = hi, lo
			}
			in = in || lo <= int8(c) && int8(c) <= hi
			i += 2
		default:
			in = in || p[i] == c
		}
	}
	if i < len(p) {
		i++ // the closing bracket
	}
	return i, in != negated
}

// Overlap tells whether a string may be matched by both patterns. It is for a configuration, which is read once, and not for keys.
func Overlap(a, b string) bool {
	as, bs := elements(a), elements(b)
	width := len(bs) + 1
	seen := make([]bool, (len(as)+1)*width)
	todo := []int{0}
	visit := func(i, j int) {
		if at := i*width + j; !seen[at] {
			seen[at] = true
			todo = append(todo, at)
		}
	}
	for len(todo) > 0 {
		at := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		i, j := at/width, at%width
		endA, endB := i == len(as), j == len(bs)
		switch {
		case endA && endB:
			return true
		case !endA && as[i] == "*":
			visit(i+1, j)
			if !endB {
				visit(i, j+1)
			}
		case !endB && bs[j] == "*":
			visit(i, j+1)
			if !endA {
				visit(i+1, j)
			}
		case !endA && !endB && meet(as[i], bs[j]):
			visit(i+1, j+1)
		}
	}
	return false
}

// elements are the parts of a pattern that take one byte each, and its stars.
func elements(pattern string) []string {
	var out []string
	for p := []byte(pattern); len(p) > 0; {
		n := 1
		if p[0] != '*' {
			n, _ = matchByte(p, 0)
		}
		out, p = append(out, string(p[:n])), p[n:]
	}
	return out
}

// meet tells whether two elements take a byte that is the same.
func meet(a, b string) bool {
	for c := range 256 {
		_, one := matchByte([]byte(a), byte(c))
		_, other := matchByte([]byte(b), byte(c))
		if one && other {
			return true
		}
	}
	return false
}
