package proxy_test

import (
	"slices"
	"strconv"
	"strings"
	"testing"

	"cacheproxy/internal/command"
)

// What the command table says about a command leads to the ways in which it can be called wrongly: too few and too many
// words by its arity, keys that are missing or of another type by its keys.

// makers make a key of each type, and a string that is a number beside one that is none.
var makers = []struct {
	kind string
	make []string
}{
	{"missing", nil},
	{"string", []string{"SET", "", "text"}},
	{"number", []string{"SET", "", "10"}},
	{"list", []string{"RPUSH", "", "a", "b"}},
	{"hash", []string{"HSET", "", "f", "v"}},
	{"set", []string{"SADD", "", "1"}},
	{"zset", []string{"ZADD", "", "1", "a"}},
	{"stream", []string{"XADD", "", "1-1", "f", "v"}},
}

// coverage is what TestOracle must have seen of the table.
type coverage struct {
	arity    map[string]int // derived lines of a row
	missing  map[string]int
	mistyped map[string]int
}

// neverValid are the rows that have no case that Redis runs, with the reason. Each has one that it refuses.
var neverValid = map[string]string{
	"shutdown":       "it stops the server",
	"failover":       "it needs a replica",
	"sync":           "it makes the connection a replica's",
	"psync":          "it makes the connection a replica's",
	"acl|load":       "it needs a file of users",
	"acl|save":       "it needs a file of users",
	"config|rewrite": "it needs a configuration file",
	"module|load":    "there is no module",
	"module|loadex":  "there is no module",
	"module|unload":  "there is no module",
	"asking":         "it needs a cluster",
	"readonly":       "it needs a cluster",
	"readwrite":      "it needs a cluster",
	"script|kill":    "it needs a script that runs too long",
	"function|kill":  "it needs a function that runs too long",
}

// never tells whether a row can have no case that Redis runs: it is listed, or needs a cluster, or is a container that must be
// called with a subcommand.
func never(info *command.Info) bool {
	_, listed := neverValid[info.Name]
	return listed || strings.HasPrefix(info.Name, "cluster|") || info.Container() && info.Arity == -2
}

// words of a row's name: a subcommand's stand behind its container's.
func rowWords(name string) []string { return strings.Split(strings.ToUpper(name), "|") }

// derive makes the conversations that follow from the table and from the patterns of the corpus.
func derive(corpus []conversation) ([]conversation, *coverage) {
	cov := &coverage{map[string]int{}, map[string]int{}, map[string]int{}}
	arity := conversation{name: "arity"}
	for _, info := range command.All() {
		name := rowWords(info.Name)
		least := info.Arity
		if least < 0 {
			least = -least
		}
		lengths := []int{least - 1}
		if info.Arity > 0 {
			lengths = append(lengths, info.Arity+1)
		}
		for _, n := range lengths {
			if n < len(name) {
				continue // less than the name is another command
			}
			line := slices.Clone(name)
			for i := len(name); i < n; i++ {
				line = append(line, "arg"+strconv.Itoa(i))
			}
			arity.steps = append(arity.steps, say(line...))
			cov.arity[info.Name]++
		}
	}
	out := []conversation{arity}
	for _, c := range corpus {
		for i, s := range c.steps {
			if s.pattern {
				out = append(out, deriveKeys(c, i, cov))
			}
		}
	}
	return out, cov
}

// deriveKeys runs a pattern with each of its keys missing and of each type in turn, and once without any of them, and
// shows what it left.
func deriveKeys(c conversation, at int, cov *coverage) conversation {
	pattern := c.steps[at]
	args := make([][]byte, len(pattern.words))
	for i, w := range pattern.words {
		args[i] = []byte(w)
	}
	info := command.Resolve(args)
	d := conversation{name: "derived from " + pattern.text, at: c.at, proto: c.proto, derived: true}
	setup := c.steps[:slices.IndexFunc(c.steps, func(s step) bool { return s.pattern })]
	if info == nil {
		return d
	}
	found, _ := command.Keys(info, args, nil)
	var keys []string
	for _, k := range found {
		if name := pattern.words[k.Arg]; !slices.Contains(keys, name) {
			keys = append(keys, name)
		}
	}
	var all []string // also of the setup
	for _, s := range append(slices.Clone(setup), pattern) {
		for _, w := range s.words {
			if strings.HasPrefix(w, "key") && !slices.Contains(all, w) {
				all = append(all, w)
			}
		}
	}
	add := func(words ...string) { d.steps = append(d.steps, say(words...)) }
	variant := func(change func()) {
		add(append([]string{"DEL"}, all...)...)
		d.steps = append(d.steps, setup...)
		change()
		d.steps = append(d.steps, step{op: opSend, client: "a", words: pattern.words, text: commandLine(pattern.words)})
		add(append([]string{"DEBUG", "DIGEST-VALUE"}, all...)...)
	}
	if len(keys) == 0 {
		return d
	}
	variant(func() { add(append([]string{"DEL"}, all...)...) })
	for _, key := range keys {
		for _, m := range makers {
			variant(func() {
				add("DEL", key)
				if m.make != nil {
					words := slices.Clone(m.make)
					words[1] = key
					add(words...)
				}
			})
			if m.make == nil {
				cov.missing[info.Name]++
			} else {
				cov.mistyped[info.Name]++
			}
		}
	}
	return d
}

// check tells which rows of the table have no case.
func (cov *coverage) check(t *testing.T, oracle target, runs []run, results [][]heard) {
	valid, refused := map[string]bool{}, map[string]bool{}
	for i, r := range runs {
		for n, s := range r.steps {
			if s.op != opSend && s.op != opSay || n >= len(results[i]) {
				continue
			}
			row := rowOf(s.words)
			ok := true
			for _, f := range results[i][n] {
				ok = ok && !parseNode(f).isError()
			}
			if ok {
				valid[row] = true
			} else {
				refused[row] = true
			}
		}
	}
	unknown := map[string]bool{}
	for _, info := range command.All() {
		said, err := ask(oracle.addr, []string{"COMMAND", "INFO", info.Name})
		if err != nil {
			t.Fatal(err)
		}
		unknown[info.Name] = strings.HasPrefix(said, "*1\r\n*-1\r\n") || strings.HasPrefix(said, "*1\r\n$-1\r\n")
	}
	for _, info := range command.All() {
		name := info.Name
		never := never(info)
		switch {
		case unknown[name]:
			if valid[name] {
				t.Errorf("%s: Redis does not know it and yet it answers", name)
			}
			if !refused[name] {
				t.Errorf("%s: no case", name)
			}
		case never && valid[name]:
			t.Errorf("%s: Redis ran it: take it off the list neverValid", name)
		case never && !refused[name]:
			t.Errorf("%s: no case that Redis refuses", name)
		case !never && !valid[name]:
			t.Errorf("%s: no case that Redis runs", name)
		}
		if info.Keyed() && !info.Container() && (cov.missing[name] == 0 || cov.mistyped[name] == 0) {
			t.Errorf("%s: no pattern (>) from which to derive missing keys and keys of other types", name)
		}
		floor := info.Arity
		if floor < 0 {
			floor = -floor
		}
		if can := info.Arity > 0 || floor-1 >= len(rowWords(name)); can && cov.arity[name] == 0 {
			t.Errorf("%s: no case of wrong arity", name)
		}
	}
}
