package command

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"cacheproxy/internal/command/internal/scratch"

	"github.com/redis/go-redis/v9"
)

// What the tests in this file expect, a real Redis says.

// keyWords are Redis's words for the flags that COMMAND GETKEYSANDFLAGS reports.
var keyWords = map[string]KeyFlag{
	"RO": KeyRO, "RW": KeyRW, "OW": KeyOW, "RM": KeyRM,
	"access": KeyAccess, "update": KeyUpdate, "insert": KeyInsert, "delete": KeyDelete,
	"incomplete": KeyIncomplete, "variable_flags": KeyVariable,
}

// namedKey is a key as Redis reports it: not where it stands, but its name.
type namedKey struct {
	name  string
	flags KeyFlag
}

func startRedis(t *testing.T) *scratch.Server {
	t.Helper()
	server, err := scratch.Start(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(server.Stop)
	return server
}

// serverKeys asks Redis for the keys of each line. A line that Redis answers with an error has a nil answer.
func serverKeys(t *testing.T, server *scratch.Server, lines [][][]byte) [][]namedKey {
	t.Helper()
	ctx := context.Background()
	pipe := server.Pipeline()
	replies := make([]*redis.Cmd, len(lines))
	for i, args := range lines {
		replies[i] = pipe.Do(ctx, anys([]any{"command", "getkeysandflags"}, args)...)
	}
	// Exec returns the first line's error; each line's own is looked at below.
	_, _ = pipe.Exec(ctx)
	answers := make([][]namedKey, len(lines))
	for i, reply := range replies {
		rows, err := reply.Slice()
		if refused := redis.Error(nil); errors.As(err, &refused) {
			continue
		} else if err != nil {
			t.Fatalf("%q: %v", lines[i], err)
		}
		answers[i] = make([]namedKey, len(rows))
		for j, row := range rows {
			pair := row.([]any)
			answers[i][j].name = pair[0].(string)
			for _, word := range pair[1].([]any) {
				flag, ok := keyWords[word.(string)]
				if !ok {
					t.Fatalf("%q: Redis reports a key flag %q", lines[i], word)
				}
				answers[i][j].flags |= flag
			}
		}
	}
	return answers
}

func anys(first []any, args [][]byte) []any {
	for _, arg := range args {
		first = append(first, arg)
	}
	return first
}

// ownKeys is what Keys says of a line, in Redis's form.
func ownKeys(t *testing.T, args [][]byte) ([]namedKey, bool) {
	t.Helper()
	keys, ok := Keys(Resolve(args), args, nil)
	named := make([]namedKey, len(keys))
	for i, key := range keys {
		if key.Arg < 1 || key.Arg >= len(args) {
			t.Fatalf("%q: a key at %d", args, key.Arg)
		}
		named[i] = namedKey{string(args[key.Arg]), key.Flags}
	}
	return named, ok
}

// knownTo asks the server whether it has the commands of the table.
func knownTo(t *testing.T, server *scratch.Server) map[*Info]bool {
	t.Helper()
	ctx := context.Background()
	known := make(map[*Info]bool)
	for _, info := range All() {
		rows, err := server.Do(ctx, "command", "info", info.Name).Slice()
		if err != nil {
			t.Fatal(err)
		}
		known[info] = len(rows) == 1 && rows[0] != nil
	}
	return known
}

func TestCorpusCoversEveryKeyedCommand(t *testing.T) {
	covered := make(map[*Info]bool)
	for _, args := range corpus {
		covered[Resolve(args)] = true
	}
	for _, info := range All() {
		if info.Keyed() && !covered[info] {
			t.Errorf("the corpus has no line for %s", info.Name)
		}
	}
}

func TestCorpusAgainstRedis(t *testing.T) {
	server := startRedis(t)
	known := knownTo(t, server)
	asked := 0
	answers := serverKeys(t, server, corpus)
	for i, args := range corpus {
		info := Resolve(args)
		// DEBUG has no specifications, so Redis says that it has no keys; so do commands without any.
		if !known[info] || !info.Keyed() || info.Name == "debug" {
			continue
		}
		asked++
		if got, ok := ownKeys(t, args); !ok || answers[i] == nil || !sameKeys(info, got, answers[i]) {
			t.Errorf("%q:\n got %v, %v\nwant %v", args, got, ok, answers[i])
		}
	}
	if asked < len(corpus)/2 {
		t.Errorf("only %d of %d lines could be compared", asked, len(corpus))
	}
}

// retold are the commands whose key flags are another version's, or safer than Redis's, and why.
var retold = map[string]string{
	"sinterstore":       "its destination is overwritten, says Redis 7.2; 7.0 said that it is also read",
	"delex":             "Redis takes a condition that it does not know for none",
	"georadius":         "8.0 and Valkey 9 name the last destination only; 7.0 and 8.6 the first of each kind; see mistaken",
	"georadiusbymember": "as georadius",
	"hsetex":            "Valkey 9 says that it only inserts",
}

// sameKeys compares what Keys says of a command with what a server of any version says.
func sameKeys(info *Info, own, server []namedKey) bool {
	if _, ok := retold[info.Name]; !ok && info.Flags&Module == 0 { // modules cannot say what a key is for: see gen/later.go
		return slices.Equal(own, server)
	}
	for _, key := range server {
		if !slices.ContainsFunc(own, func(k namedKey) bool { return k.name == key.name }) {
			return false
		}
	}
	return len(server) > 0
}

// DEBUG knows no subcommand in its HELP that DebugWords lacks.
func TestDebugWordsAgainstRedis(t *testing.T) {
	server := startRedis(t)
	help, err := server.Do(context.Background(), "debug", "help").StringSlice()
	if err != nil || len(help) < 40 {
		t.Fatalf("DEBUG HELP = %q, %v", help, err)
	}
	for _, line := range help[1:] {
		// Explanations are indented, or at least not in capitals.
		word, _, _ := strings.Cut(line, " ")
		if word != "" && word == strings.ToUpper(word) && !slices.Contains(DebugWords(), strings.ToLower(word)) {
			t.Errorf("DEBUG %s is not known", word)
		}
	}
}

// filled are the keys that fill makes.
var filled = []string{"geo", "list", "stream"}

// fill leaves the server with one key of each type that the lines below read.
func fill(t *testing.T, server *scratch.Server) {
	t.Helper()
	for _, args := range lines("FLUSHALL\nGEOADD geo 1 2 m\nRPUSH list 2 1\nXADD stream 1-1 f v\nXGROUP CREATE stream g 0") {
		if err := server.Do(context.Background(), anys(nil, args)...).Err(); err != nil {
			t.Fatalf("%q: %v", args, err)
		}
	}
}

// Of the lines that COMMAND GETKEYS mistakes, Redis must really run them and write where Keys says. If it ceases to
// be mistaken, the lines belong into the corpus; some versions after the one of the table are not, and others are.
func TestMistakenAgainstRedis(t *testing.T) {
	ctx := context.Background()
	server := startRedis(t)
	version, err := server.Version(ctx)
	if err != nil {
		t.Fatal(err)
	}
	for i, answer := range serverKeys(t, server, mistaken) {
		args := mistaken[i]
		own, _ := ownKeys(t, args)
		if slices.Equal(own, answer) && strings.HasPrefix(version, "7.0.") {
			t.Errorf("%q: Redis finds the same keys", args)
		}
		fill(t, server)
		// The first key of each line is what it reads, except that PFMERGE has only a destination.
		source := map[string]string{"GEORADIUS": "geo", "XREADGROUP": "stream"}[string(args[0])]
		if source != "" {
			if err := server.Rename(ctx, source, "key1").Err(); err != nil {
				t.Fatal(err)
			}
		}
		if err := server.Do(ctx, anys(nil, args)...).Err(); err != nil {
			t.Errorf("%q: %v", args, err)
		}
		for _, name := range server.Keys(ctx, "*").Val() {
			if !slices.ContainsFunc(own, func(k namedKey) bool { return k.name == name }) &&
				!slices.Contains(filled, name) {
				t.Errorf("%q: it wrote %q, which is none of %v", args, name, own)
			}
		}
	}
}

// A destination that is named like an option is written too.
func TestDestinationsNamedLikeOptions(t *testing.T) {
	ctx := context.Background()
	server := startRedis(t)
	for _, line := range []string{
		"SORT list STORE BY STORE x",
		"SORT list STORE LIMIT",
		"GEORADIUS geo 1 2 3 m STORE storedist STOREDIST x",
		"GEORADIUSBYMEMBER geo m 3 m STORE STORE",
	} {
		fill(t, server)
		args := lines(line)[0]
		if err := server.Do(ctx, anys(nil, args)...).Err(); err != nil {
			t.Errorf("%s: %v", line, err)
		}
		own, _ := ownKeys(t, args)
		written := slices.DeleteFunc(server.Keys(ctx, "*").Val(), func(name string) bool {
			return slices.Contains(filled, name)
		})
		if len(written) != 1 || !slices.ContainsFunc(own, func(k namedKey) bool { return k.name == written[0] }) {
			t.Errorf("%s: it wrote %q, Keys says %v", line, written, own)
		}
	}
}

// Redis runs none of the malformed lines: it answers each with an error.
func TestMalformedAgainstRedis(t *testing.T) {
	ctx := context.Background()
	server := startRedis(t)
	for _, args := range malformed {
		if name := strings.ToLower(string(args[0])); name == "debug" {
			continue // DEBUG POPULATE and REPLICATE run; it is their keys that cannot be told
		}
		var refused redis.Error
		if err := server.Do(ctx, anys(nil, args)...).Err(); !errors.As(err, &refused) {
			t.Errorf("%q: Redis answers %v", args, err)
		}
	}
}

// TestVariantsAgainstRedis changes the lines of the corpus at random and compares again. Where Keys and Redis differ,
// Redis must refuse to run the line. Lines that say STORE or STREAMS twice are left to mistaken and
// to TestDestinationsNamedLikeOptions, because COMMAND GETKEYS does not read them as the commands do.
func TestVariantsAgainstRedis(t *testing.T) {
	const variantsOfEach = 40
	ctx := context.Background()
	server := startRedis(t)
	known := knownTo(t, server)
	rnd := rand.New(rand.NewPCG(1, 2))
	var variants [][][]byte
	for _, args := range corpus {
		info := Resolve(args)
		if !known[info] || !info.Keyed() || info.Name == "debug" {
			continue
		}
		for range variantsOfEach {
			variants = append(variants, vary(rnd, info, args))
		}
	}
	agreed := 0
	for i, answer := range serverKeys(t, server, variants) {
		args := variants[i]
		own, ok := ownKeys(t, args) // has seen that the positions are in range
		if answer == nil || ambiguous(args) {
			continue
		}
		if sameKeys(Resolve(args), own, answer) {
			agreed++
			continue
		}
		var refused redis.Error
		err := server.Do(ctx, anys(nil, args)...).Err()
		if !errors.As(err, &refused) || !strings.HasPrefix(refused.Error(), "ERR ") {
			t.Errorf("%q:\n got %v, %v\nwant %v\n and Redis answers %v", args, own, ok, answer, err)
		}
	}
	if agreed < len(variants)/2 {
		t.Errorf("Redis and Keys agreed on %d of %d lines only", agreed, len(variants))
	}
}

// ambiguous reports whether a line says STORE, STOREDIST or STREAMS again, be it as an option or as a name.
func ambiguous(args [][]byte) bool {
	stores, streams := 0, 0
	for _, arg := range args {
		switch {
		case isWord(arg, "store"), isWord(arg, "storedist"):
			stores++
		case isWord(arg, "streams"):
			streams++
		}
	}
	return stores > 1 || streams > 1
}

// vary returns a line of the same command with some words dropped, doubled, swapped, replaced, added or
// written in another case.
func vary(rnd *rand.Rand, info *Info, args [][]byte) [][]byte {
	fixed := 1
	if strings.Contains(info.Name, "|") {
		fixed = 2
	}
	words := []string{"a", "b", "c", "", "0", "1", "2", "3", "-1", "m", "KEYS", "STREAMS", "LIMIT", "COUNT", "GET",
		"BY", "STORE", "storedist", "AUTH", "NX", "0.01", "\x00", "get\x00", "store\x00x", "\xff"}
	out := slices.Clone(args)
	for range 1 + rnd.IntN(3) {
		if len(out) == fixed {
			break
		}
		at := fixed + rnd.IntN(len(out)-fixed)
		switch rnd.IntN(6) {
		case 0:
			out = slices.Delete(out, at, at+1)
		case 1:
			out = slices.Insert(out, at, out[at])
		case 2:
			other := fixed + rnd.IntN(len(out)-fixed)
			out[at], out[other] = out[other], out[at]
		case 3:
			out[at] = []byte(words[rnd.IntN(len(words))])
		case 4:
			out = append(out, []byte(words[rnd.IntN(len(words))]))
		case 5:
			out[at] = bytes.ToLower(out[at])
		}
	}
	if rnd.IntN(2) == 0 {
		out[0] = bytes.ToLower(out[0])
	}
	return out
}
