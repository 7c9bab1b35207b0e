package policy

import (
	"errors"
	"fmt"
	"slices"
	"strings"
)

// Template is the pattern of a route whose store is a column: literal text, and placeholders in braces that name
// the columns of its key, as in "report:{id}" or "u:{tenant}:{id}". It is immutable.
//
// A placeholder stands for one or more bytes, up to the first place where the literal that follows it is found.
// So its text never holds that literal, and a key has one reading:
//
//	u:{tenant}:{id}   u:a:b:c    tenant a, id b:c     the last placeholder takes the rest
//	u:{tenant}:{id}   u::c       no match             a tenant is never empty
//	r:{id}:v1         r:7:v1     id 7
//	r:{id}:v1         r:7:v1:v1  no match             the first ":v1" does not end the key
//
// A backslash takes the special meaning from the byte behind it: \{ is a brace.
type Template struct {
	names    []string
	literals []string // literals[i] stands before the placeholder i, and the last one behind all
}

// ParseTemplate reads a pattern. An error says what to write instead.
func ParseTemplate(match string) (*Template, error) {
	t := &Template{}
	var lit []byte
	for i := 0; i < len(match); i++ {
		switch c := match[i]; c {
		case '\\':
			if i+1 == len(match) {
				return nil, errors.New(`it ends with a backslash, which takes the special meaning from the byte behind it; write \\ for a backslash`)
			}
			i++
			lit = append(lit, match[i])
		case '*', '?', '[':
			return nil, fmt.Errorf(`%c is no wildcard here; write {name} for what varies, or \%c for the byte itself`, c, c)
		case '}':
			return nil, errors.New(`a } closes no placeholder; write \} for the brace itself`)
		case '{':
			end := strings.IndexByte(match[i:], '}')
			if end < 0 {
				return nil, errors.New(`a { is never closed; write {name} for a placeholder, or \{ for the brace itself`)
			}
			name := match[i+1 : i+end]
			switch {
			case name == "":
				return nil, errors.New(`{} has no name; write the name of a key column in it, as in {id}, or \{\} for the braces themselves`)
			case !placeholderName(name):
				return nil, fmt.Errorf(`{%s} is no placeholder; a name has letters, digits and _; write \{ for the brace itself`, name)
			case slices.Contains(t.names, name):
				return nil, fmt.Errorf("{%s} is there twice; give each placeholder a name of its own", name)
			case len(t.names) > 0 && len(lit) == 0:
				return nil, fmt.Errorf("{%s} follows {%s} at once, and nothing tells where one ends; write something between them, as in {%[2]s}:{%[1]s}",
					name, t.names[len(t.names)-1])
			}
			t.names, t.literals, lit = append(t.names, name), append(t.literals, string(lit)), nil
			i += end
		default:
			lit = append(lit, c)
		}
	}
	if len(t.names) == 0 {
		return nil, errors.New("it has no placeholder; write one for each key column, as in report:{id}")
	}
	t.literals = append(t.literals, string(lit))
	return t, nil
}

func placeholderName(name string) bool {
	for i := range len(name) {
		switch c := name[i]; {
		case c == '_', c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', i > 0 && c >= '0' && c <= '9':
		default:
			return false
		}
	}
	return true
}

// Names returns the names of the placeholders in their order. The slice is the caller's.
func (t *Template) Names() []string { return slices.Clone(t.names) }

// Literals returns the text around the placeholders: what stands before each, and what follows the last. The slice is the caller's.
func (t *Template) Literals() []string { return slices.Clone(t.literals) }

// Split returns what stands in key for each placeholder, and whether key is one of the template's.
func (t *Template) Split(key string) (parts []string, ok bool) {
	rest, ok := strings.CutPrefix(key, t.literals[0])
	if !ok {
		return nil, false
	}
	parts = make([]string, len(t.names))
	for i := range parts {
		n := partLen(rest, t.literals[i+1], i+1 == len(parts))
		if n <= 0 {
			return nil, false
		}
		parts[i], rest = rest[:n], rest[n+len(t.literals[i+1]):]
	}
	return parts, true
}

// Matches is Split without the parts. It allocates nothing and does not keep key.
func (t *Template) Matches(key []byte) bool {
	if len(key) < len(t.literals[0]) || string(key[:len(t.literals[0])]) != t.literals[0] {
		return false
	}
	rest := key[len(t.literals[0]):]
	for i := range t.names {
		n := partLen(rest, t.literals[i+1], i+1 == len(t.names))
		if n <= 0 {
			return false
		}
		rest = rest[n+len(t.literals[i+1]):]
	}
	return true
}

// partLen is how many bytes of rest belong to a placeholder that lit follows; not positive if there is no such reading.
func partLen[T string | []byte](rest T, lit string, last bool) int {
	n := len(rest)
	if lit != "" {
		n = index(rest, lit)
	}
	if last && n+len(lit) != len(rest) {
		return -1
	}
	return n
}

// index is strings.Index for both kinds of bytes. Keys are short.
func index[T string | []byte](s T, lit string) int {
	for i := 0; i+len(lit) <= len(s); i++ {
		if s[i] == lit[0] && string(s[i:i+len(lit)]) == lit {
			return i
		}
	}
	return -1
}

// Join returns the key that Split takes apart into parts, or "" if there is none that can be routed (see Eligible): a
// part is empty or holds the literal that follows it, or the key is too long.
func (t *Template) Join(parts []string) string {
	if len(parts) != len(t.names) {
		return ""
	}
	b := []byte(t.literals[0])
	for i, part := range parts {
		lit := t.literals[i+1]
		if part == "" || lit != "" && index(part+lit, lit) != len(part) {
			return ""
		}
		b = append(append(b, part...), lit...)
	}
	if !Eligible(b) {
		return ""
	}
	return string(b)
}

// Glob returns a pattern, as SCAN and the function Glob read it, that every key of the template matches. Others may match it too.
func (t *Template) Glob() string {
	var b strings.Builder
	for i, lit := range t.literals {
		if i > 0 {
			b.WriteString("?*")
		}
		for j := range len(lit) {
			if strings.IndexByte(`*?[\`, lit[j]) >= 0 {
				b.WriteByte('\\')
			}
			b.WriteByte(lit[j])
		}
	}
	return b.String()
}
