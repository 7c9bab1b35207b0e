package main

import (
	"context"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"testing"

	"cacheproxy/internal/command"
)

// changed are the facts that matter to the proxy in which a later server differs from the table, and why the table is right
// for both.
var changed = map[string]string{
	"sinterstore":       "7.0 says that the destination is read too; to load it first costs a look and changes nothing",
	"georadius":         "Valkey 9 calls a destination's flags variable; Keys reads the arguments in any case",
	"georadiusbymember": "as georadius",
	"hsetex":            "Valkey's own command of this name says insert for update; both are writes",
}

// TestTableFitsLaterServers holds the table against the records: it has their commands and subcommands, and says the same of
// what decides how the proxy treats one: whether it writes, blocks or subscribes, and where its keys are.
func TestTableFitsLaterServers(t *testing.T) {
	used := map[string]bool{}
	for _, name := range later {
		rows, err := readRecord(name)
		if err != nil {
			t.Fatal(err)
		}
		if len(rows) < 50 {
			t.Errorf("the record of %s has %d rows", name, len(rows))
		}
		for _, c := range rows {
			info := find(c.name)
			if info == nil {
				t.Errorf("%s: the table lacks %s", name, c.name)
				continue
			}
			for word, flag := range map[string]command.Flag{
				"write": command.Write, "readonly": command.Readonly, "blocking": command.Blocking, "pubsub": command.PubSub, "module": command.Module,
				"no_auth": command.NoAuth,
			} {
				if got, want := info.Flags&flag != 0, slices.Contains(c.flags, word); got != want {
					t.Errorf("%s: %s is %s: %v, the table says %v", name, c.name, word, want, got)
				}
			}
			if got, want := plainSpecs(info.Specs), plainSpecs(specsOf(c)); !reflect.DeepEqual(got, want) {
				if used[c.name] = true; changed[c.name] == "" {
					t.Errorf("%s: the keys of %s are %+v, the table says %+v", name, c.name, want, got)
				}
			}
		}
	}
	for name := range changed {
		if !used[name] {
			t.Errorf("nobody differs about %s any more", name)
		}
	}
}

func find(name string) *command.Info {
	for _, info := range command.All() {
		if info.Name == name {
			return info
		}
	}
	return nil
}

// plainSpecs leaves out the flag that says that a specification is incomplete: Keys knows those commands by name.
func plainSpecs(specs []command.KeySpec) []command.KeySpec {
	specs = slices.Clone(specs)
	for i := range specs {
		specs[i].Flags &^= command.KeyIncomplete
	}
	return specs
}

// specsOf is what render would write for a row.
func specsOf(c row) []command.KeySpec {
	var specs []command.KeySpec
	for _, s := range c.specs {
		k := command.KeySpec{
			Keyword: s.keyword, Index: s.args["index"], StartFrom: s.args["startfrom"], LastKey: s.args["lastkey"],
			Limit: s.args["limit"], KeyNumIdx: s.args["keynumidx"], FirstKey: s.args["firstkey"], KeyStep: s.args["keystep"],
			Begin: map[string]command.BeginSearch{"index": command.BeginIndex, "keyword": command.BeginKeyword}[s.begin],
			Find:  map[string]command.FindKeys{"range": command.FindRange, "keynum": command.FindKeyNum}[s.find],
		}
		for _, word := range s.flags {
			k.Flags |= 1 << slices.IndexFunc(keyIdents, func(id ident) bool { return id.word == word })
		}
		specs = append(specs, k)
	}
	return specs
}

// A record of the installed server beside itself is empty.
func TestRecord(t *testing.T) {
	dir := t.TempDir()
	if err := record(context.Background(), "redis-server", dir); err != nil {
		t.Fatal(err)
	}
	files, err := filepath.Glob(filepath.Join(dir, "*.jsonl"))
	if err != nil || len(files) != 1 {
		t.Fatalf("files %v, %v", files, err)
	}
	if text, err := os.ReadFile(files[0]); err != nil || len(text) > 0 {
		t.Errorf("a server differs from itself: %s, %v", text, err)
	}
	if err := record(context.Background(), "no-such-redis-server", dir); err == nil {
		t.Error("recorded a server that does not exist")
	}
	if _, err := readRecord("no-such-record"); err == nil {
		t.Error("read a record that does not exist")
	}
}

func TestRecordedRowsSurvive(t *testing.T) {
	for _, c := range extra {
		if got := toRecorded(c).row(); !reflect.DeepEqual(got, c) {
			t.Errorf("%+v became %+v", c, got)
		}
	}
}

// Modules say of every key that it is read and written, and are in no category.
func TestBelieve(t *testing.T) {
	read := row{name: "vcard", flags: []string{"readonly", "module"}, specs: []keySpec{{flags: []string{"RW", "access", "update"}}}}
	if got := believe(read); !slices.Equal(got.specs[0].flags, []string{"RO", "access"}) || !slices.Equal(got.acl, []string{"@read", "@slow"}) {
		t.Errorf("a read is %+v", got)
	}
	write := row{name: "vadd", flags: []string{"write", "module"}, acl: []string{"@own"}, specs: []keySpec{{flags: []string{"RW", "access", "update"}}}}
	if got := believe(write); !slices.Equal(got.specs[0].flags, []string{"RW", "access", "update"}) || !slices.Equal(got.acl, []string{"@own"}) {
		t.Errorf("a write is %+v", got)
	}
}
