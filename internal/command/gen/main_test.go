package main

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"cacheproxy/internal/command"
	"cacheproxy/internal/command/internal/scratch"
)

// TestTableIsCurrent holds the committed table against the installed server. A table from another version of Redis
// need not be the same, but it must know every command of the server.
func TestTableIsCurrent(t *testing.T) {
	ctx := context.Background()
	server, err := scratch.Start(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer server.Stop()
	version, err := server.Version(ctx)
	if err != nil {
		t.Fatal(err)
	}
	fresh, err := generate(ctx, server)
	if err != nil {
		t.Fatal(err)
	}
	committed, err := os.ReadFile("../table_gen.go")
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(committed, []byte("from Redis "+version+", gen/later and")) && !bytes.Equal(committed, fresh) {
		t.Errorf("table_gen.go is not what Redis %s and extra.go give: run go generate", version)
	}
	reply, err := server.Do(ctx, "command").Result()
	if err != nil {
		t.Fatal(err)
	}
	rows, err := readCommands(reply)
	if err != nil {
		t.Fatal(err)
	}
	if len(rows) < 300 {
		t.Errorf("Redis %s has only %d commands", version, len(rows))
	}
	for _, c := range append(rows, extra...) {
		args := bytes.Split([]byte(c.name), []byte("|"))
		if info := command.Resolve(args); info == nil || info.Name != c.name {
			t.Errorf("the table lacks %s", c.name)
		}
	}
}

func TestRunWritesTheSameFileTwice(t *testing.T) {
	ctx, dir := context.Background(), t.TempDir()
	var files [2][]byte
	for i := range files {
		path := filepath.Join(dir, "table.go")
		if err := run(ctx, path); err != nil {
			t.Fatal(err)
		}
		var err error
		if files[i], err = os.ReadFile(path); err != nil {
			t.Fatal(err)
		}
	}
	if !bytes.Equal(files[0], files[1]) {
		t.Error("two runs of the generator differ")
	}
	if err := run(ctx, filepath.Join(dir, "missing", "table.go")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("writing into a directory that does not exist: %v", err)
	}
}

func TestRunWithoutServer(t *testing.T) {
	path := filepath.Join(t.TempDir(), "table.go")
	ctx := context.Background()
	server, err := scratch.Start(ctx)
	if err != nil {
		t.Fatal(err)
	}
	server.Stop()
	if _, err := generate(ctx, server); err == nil {
		t.Error("a stopped server gave a table")
	}
	t.Setenv("PATH", t.TempDir())
	if err := run(ctx, path); err == nil {
		t.Error("generated a table without a redis-server")
	}
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a failed run left a file: %v", err)
	}
}

func TestServerThatForbidsCommand(t *testing.T) {
	ctx := context.Background()
	server, err := scratch.Start(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer server.Stop()
	if err := server.Do(ctx, "acl", "setuser", "default", "-command").Err(); err != nil {
		t.Fatal(err)
	}
	if _, err := generate(ctx, server); err == nil || !strings.Contains(err.Error(), "ask redis for its commands") {
		t.Errorf("generate without the right to ask: %v", err)
	}
}

func TestReadCommands(t *testing.T) {
	list := func(v ...any) []any { return v }
	specOf := func(begin any) []any {
		return list("flags", list("RO"), "begin_search", begin,
			"find_keys", list("type", "range", "spec", list("lastkey", int64(-1), "keystep", int64(1))))
	}
	good := list("type", "keyword", "spec", list("keyword", "K", "startfrom", int64(2)))
	cmd := func(name any, arity any, specs ...any) []any {
		return list(name, arity, list("write"), int64(1), int64(1), int64(1), list("@write"), list("tip"), specs,
			list())
	}
	rows, err := readCommands(list(cmd("X", int64(-2), specOf(good))))
	want := []row{{
		name: "x", arity: -2, flags: []string{"write"}, first: 1, last: 1, step: 1,
		acl: []string{"@write"}, tips: []string{"tip"},
		specs: []keySpec{{
			flags: []string{"RO"}, begin: "keyword", find: "range", keyword: "K",
			args: map[string]int{"startfrom": 2, "lastkey": -1, "keystep": 1},
		}},
	}}
	if err != nil || !reflect.DeepEqual(rows, want) {
		t.Errorf("readCommands = %+v, %v", rows, err)
	}
	for _, bad := range []any{
		nil, "x", list("x"), list(list("x")), list(cmd(int64(1), int64(1))), list(cmd("x", "1")),
		list(cmd("x", int64(1), "spec")), list(cmd("x", int64(1), specOf("index"))),
		list(cmd("x", int64(1), specOf(list("type", "index", "spec", list("index", "1"))))),
	} {
		if rows, err := readCommands(bad); err == nil {
			t.Errorf("readCommands(%v) = %+v without an error", bad, rows)
		}
	}
}

func TestMergeTheServerWins(t *testing.T) {
	rows := merge([]row{{name: "b", arity: 1, flags: []string{"fast"}}, {name: "a", arity: 1}},
		[]row{{name: "c", arity: 2}, {name: "a", arity: 2, since: "9"}, {name: "b", arity: 2, flags: []string{"write", "blocking"}}})
	want := []row{{name: "a", arity: 1}, {name: "b", arity: 1, flags: []string{"fast", "blocking"}, acl: []string{"@blocking"}}, {name: "c", arity: 2}}
	if !reflect.DeepEqual(rows, want) {
		t.Errorf("merge = %+v", rows)
	}
}

func TestRenderRefusesWordsWithoutConstants(t *testing.T) {
	ok := keySpec{flags: []string{"RO"}, begin: "index", find: "range"}
	odd := func(change func(*keySpec)) []keySpec {
		s := ok
		change(&s)
		return []keySpec{s}
	}
	for _, c := range []row{
		{name: "flag", flags: []string{"write", "odd"}},
		{name: "category", acl: []string{"@odd"}},
		{name: "key flag", specs: odd(func(s *keySpec) { s.flags = []string{"odd"} })},
		{name: "begin", specs: odd(func(s *keySpec) { s.begin = "odd" })},
		{name: "find", specs: odd(func(s *keySpec) { s.find = "odd" })},
		{name: "number", specs: odd(func(s *keySpec) { s.args = map[string]int{"odd": 1} })},
	} {
		if _, err := render("1.2.3", []row{c}); err == nil || !strings.Contains(err.Error(), c.name) {
			t.Errorf("render of an unknown %s: %v", c.name, err)
		}
	}
	source, err := render("1.2.3", []row{{name: "x", arity: 2, specs: []keySpec{ok, ok}, since: "9.9.0"}})
	if err != nil || !strings.Contains(string(source), "// since 9.9.0") ||
		!strings.HasPrefix(string(source), "// Code generated by gen from Redis 1.2.3, gen/later and") {
		t.Errorf("render = %s, %v", source, err)
	}
}

// The categories that follow from flags are the ones that the server itself derives.
func TestExtraCategories(t *testing.T) {
	for _, tc := range []struct {
		flags, categories string
		want              []string
	}{
		{"write fast", "hash", []string{"@hash", "@write", "@fast"}},
		{"readonly", "", []string{"@read", "@slow"}},
		{"admin", "", []string{"@admin", "@dangerous", "@slow"}},
		{"blocking", "connection", []string{"@connection", "@blocking", "@slow"}},
	} {
		if got := plain("9", "x", 1, tc.flags, tc.categories).acl; !reflect.DeepEqual(got, tc.want) {
			t.Errorf("%q with %q: %v, want %v", tc.categories, tc.flags, got, tc.want)
		}
	}
}
