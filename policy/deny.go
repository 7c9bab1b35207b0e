package policy

import (
	"errors"
	"strings"
)

// DenyRule is one entry of commands.deny. All its words are globs as in KEYS, in lower case.
type DenyRule struct {
	text     string
	category []byte // of "@category", without the @; else nil
	name     []byte
	word     []byte // of "container|sub" or "container sub"; nil is every subcommand
}

// ParseDenyRule reads an entry: a command, a container and a subcommand, joined by a bar or a space, or a category behind an @.
func ParseDenyRule(entry string) (DenyRule, error) {
	text := strings.Join(strings.Fields(strings.ToLower(entry)), "|")
	r := DenyRule{text: text}
	if category, ok := strings.CutPrefix(text, "@"); ok {
		if category == "" || strings.Contains(category, "|") {
			return DenyRule{}, errors.New("is no category")
		}
		r.category = []byte(category)
		return r, nil
	}
	name, word, joined := strings.Cut(text, "|")
	switch {
	case name == "" || joined && word == "":
		return DenyRule{}, errors.New("lacks a name")
	case strings.Contains(word, "|"):
		return DenyRule{}, errors.New("has more than a command and a subcommand")
	}
	r.name = []byte(name)
	if joined {
		r.word = []byte(word)
	}
	return r, nil
}

// String is the entry in lower case with a bar.
func (r DenyRule) String() string { return r.text }

// Glob reports whether the entry has a character that is special in a glob, and so may mean what nobody knows yet.
func (r DenyRule) Glob() bool { return strings.ContainsAny(r.text, `*?[\`) }

// Category is the entry's category, a glob; "" if it names a command.
func (r DenyRule) Category() string { return string(r.category) }

// ofName reports whether the entry speaks of the command called name, or of a subcommand of it.
func (r DenyRule) ofName(name []byte) bool { return r.category == nil && Glob(r.name, name) }

// Matches reports whether the entry means the command called name, in lower case, whose subcommand is sub, or "" if it has
// none, and whose categories are these.
func (r DenyRule) Matches(name, sub []byte, categories []string) bool {
	for _, c := range categories {
		if r.category != nil && Glob(r.category, []byte(c)) {
			return true
		}
	}
	return r.ofName(name) && (r.word == nil || len(sub) > 0 && Glob(r.word, sub))
}

// DenyTarget is a command or a subcommand that has a number of its own: the caller's row.
type DenyTarget struct {
	Name       string // in lower case, a subcommand's with its container: "config|get"
	Categories []string
	// Words: the first argument is a subcommand, but has no row of its own (DEBUG).
	Words bool
}

// Verdict is a closed list: what the rules say of a row.
type Verdict uint8

const (
	Allowed Verdict = iota
	Denied
	// DeniedByWord: the first argument decides; see Find.
	DeniedByWord
)

// Deny is the rules of commands.deny, worked out for every row once, so that to ask for a row costs a look into a slice.
// It does not change; nil denies nothing.
type Deny struct {
	rules    []DenyRule
	verdicts []Verdict // by row
	by       []int     // by row: which of the rules, if it is Denied
}

// NewDeny works the entries out for the rows. It fails on an entry that ParseDenyRule refuses.
func NewDeny(entries []string, rows []DenyTarget) (*Deny, error) {
	d := &Deny{verdicts: make([]Verdict, len(rows)), by: make([]int, len(rows))}
	for _, entry := range entries {
		r, err := ParseDenyRule(entry)
		if err != nil {
			return nil, errors.New("an entry of commands.deny " + err.Error())
		}
		d.rules = append(d.rules, r)
	}
	for i, row := range rows {
		name, sub, _ := strings.Cut(row.Name, "|")
		for k, r := range d.rules {
			if r.Matches([]byte(name), []byte(sub), row.Categories) {
				d.verdicts[i], d.by[i] = Denied, k
				break
			}
			if row.Words && r.ofName([]byte(name)) {
				d.verdicts[i] = DeniedByWord // unless another rule denies it whole
			}
		}
	}
	return d, nil
}

// Row tells what the rules say of a row.
func (d *Deny) Row(row int) Verdict {
	if d == nil {
		return Allowed
	}
	return d.verdicts[row]
}

// RuleOf is the entry that denies a row.
func (d *Deny) RuleOf(row int) string { return d.rules[d.by[row]].text }

// Find returns the entry that denies a command line by its first two words, in any case, and "" if none does. It is for
// commands without a row and for DeniedByWord; word is nil if the line has one word only. Categories are unknown here and
// match nothing. Redis reads the second word as a C string: so does Find.
func (d *Deny) Find(name, word []byte) string {
	if d == nil || len(d.rules) == 0 {
		return ""
	}
	var a, b [64]byte // longer words are rare and go to the heap
	name, word = fold(a[:0], name), fold(b[:0], word)
	for _, r := range d.rules {
		if r.Matches(name, word, nil) {
			return r.text
		}
	}
	return ""
}

// fold appends s in lower case, ASCII only, up to the first NUL.
func fold(dst, s []byte) []byte {
	for _, c := range s {
		if c == 0 {
			break
		}
		if 'A' <= c && c <= 'Z' {
			c += 'a' - 'A'
		}
		dst = append(dst, c)
	}
	return dst
}
