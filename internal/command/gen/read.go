package main

import (
	"fmt"
	"slices"
	"strings"
)

// row is a command or subcommand in the server's own words.
type row struct {
	name              string
	arity             int
	flags             []string
	first, last, step int
	acl               []string
	tips              []string
	specs             []keySpec
	since             string // the version that brought it; empty if the server knows the command
}

// keySpec is a key specification. begin and find are Redis's words for the two searches, and args holds their numbers
// under Redis's names.
type keySpec struct {
	flags       []string
	begin, find string
	keyword     string
	args        map[string]int
}

// readCommands reads a RESP2 reply to COMMAND and returns the commands and, behind each, its subcommands.
func readCommands(reply any) ([]row, error) {
	r := &reader{}
	var rows []row
	for _, command := range r.list(reply) {
		rows = append(rows, r.command(command)...)
	}
	if r.err != nil {
		return nil, fmt.Errorf("read the reply to COMMAND: %w", r.err)
	}
	return rows, nil
}

// reader takes a reply apart and keeps the first mistake it meets. After a mistake it returns zero values.
type reader struct{ err error }

func (r *reader) fail(want string, got any) {
	if r.err == nil {
		r.err = fmt.Errorf("want %s, got %T", want, got)
	}
}

func (r *reader) list(v any) []any {
	l, ok := v.([]any)
	if !ok {
		r.fail("a list", v)
	}
	return l
}

func (r *reader) text(v any) string {
	s, ok := v.(string)
	if !ok {
		r.fail("a string", v)
	}
	return s
}

func (r *reader) number(v any) int {
	n, ok := v.(int64)
	if !ok {
		r.fail("a number", v)
	}
	return int(n)
}

func (r *reader) texts(v any) []string {
	var out []string
	for _, e := range r.list(v) {
		out = append(out, r.text(e))
	}
	return out
}

// pairs reads a map, which RESP2 sends as a list of keys and values by turns.
func (r *reader) pairs(v any) map[string]any {
	l, out := r.list(v), make(map[string]any)
	for i := 0; i+1 < len(l); i += 2 {
		out[r.text(l[i])] = l[i+1]
	}
	return out
}

func (r *reader) command(v any) []row {
	fields := r.list(v)
	if len(fields) < 10 {
		r.fail("ten fields of a command", v)
		return nil
	}
	c := row{
		name:  strings.ToLower(r.text(fields[0])), // modules may shout
		arity: r.number(fields[1]),
		flags: r.texts(fields[2]),
		first: r.number(fields[3]),
		last:  r.number(fields[4]),
		step:  r.number(fields[5]),
		acl:   r.texts(fields[6]),
		tips:  r.texts(fields[7]),
	}
	for _, s := range r.list(fields[8]) {
		c.specs = append(c.specs, r.spec(s))
	}
	rows := []row{c}
	for _, sub := range r.list(fields[9]) {
		rows = append(rows, r.command(sub)...)
	}
	return rows
}

func (r *reader) spec(v any) keySpec {
	fields := r.pairs(v)
	begin, find := r.pairs(fields["begin_search"]), r.pairs(fields["find_keys"])
	s := keySpec{
		flags: r.texts(fields["flags"]),
		begin: r.text(begin["type"]),
		find:  r.text(find["type"]),
		args:  make(map[string]int),
	}
	for _, part := range []any{begin["spec"], find["spec"]} {
		for name, value := range r.pairs(part) {
			if name == "keyword" {
				s.keyword = r.text(value)
				continue
			}
			s.args[name] = r.number(value)
		}
	}
	return s
}

// merge returns the server's rows and those of the others that it lacks, in the order of their names. What blocks in one
// version is called blocking: WAIT always has, and says so since 7.2.
func merge(server, others []row) []row {
	known := make(map[string]int)
	rows := slices.Clone(server)
	for i, c := range rows {
		known[c.name] = i
	}
	for _, c := range others {
		i, ok := known[c.name]
		if !ok {
			rows = append(rows, c)
			continue
		}
		if slices.Contains(c.flags, "blocking") && !slices.Contains(rows[i].flags, "blocking") {
			rows[i].flags = append(slices.Clip(rows[i].flags), "blocking")
			rows[i].acl = append(slices.Clip(rows[i].acl), "@blocking")
		}
	}
	slices.SortFunc(rows, func(a, b row) int { return strings.Compare(a.name, b.name) })
	return rows
}
