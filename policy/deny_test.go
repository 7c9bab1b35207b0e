package policy

import (
	"strings"
	"testing"
)

// denyRows are a few rows as the command table has them.
var denyRows = []DenyTarget{
	{Name: "config", Categories: []string{"slow"}},
	{Name: "config|get", Categories: []string{"admin", "dangerous", "slow"}},
	{Name: "config|help", Categories: []string{"slow"}},
	{Name: "config|set", Categories: []string{"admin", "dangerous", "slow"}},
	{Name: "debug", Categories: []string{"admin", "dangerous", "slow"}, Words: true},
	{Name: "get", Categories: []string{"read", "string", "fast"}},
	{Name: "keys", Categories: []string{"keyspace", "read", "slow", "dangerous"}},
	{Name: "module|list", Categories: []string{"admin", "slow", "dangerous"}},
	{Name: "module|load", Categories: []string{"admin", "slow", "dangerous"}},
	{Name: "module|loadex", Categories: []string{"admin", "slow", "dangerous"}},
	{Name: "set", Categories: []string{"write", "string", "slow"}},
	{Name: "shutdown", Categories: []string{"admin", "slow", "dangerous"}},
}

func TestDenyRows(t *testing.T) {
	for _, tt := range []struct {
		entries string // separated by commas
		denied  string
		byWord  string
	}{
		{"", "", ""},
		{"shutdown", "shutdown", ""},
		{"SHUTDOWN", "shutdown", ""},
		{"shut", "", ""},
		{"config", "config config|get config|help config|set", ""},
		{"config|set", "config|set", ""},
		{"CONFIG SET", "config|set", ""},
		{"  config   set  ", "config|set", ""},
		{"config|*et", "config|get config|set", ""},
		{"module|load*", "module|load module|loadex", ""},
		{"*|help", "config|help", "debug"},
		{"con*|[gs]et", "config|get config|set", ""},
		{"*", "config config|get config|help config|set debug get keys module|list module|load module|loadex set shutdown", ""},
		{"?et", "get set", ""},
		{"@dangerous", "config|get config|set debug keys module|list module|load module|loadex shutdown", ""},
		{"@keyspace", "keys", ""},
		{"@STRING", "get set", ""},
		{"@str*", "get set", ""},
		{"@nothing", "", ""},
		{"debug|segfault", "", "debug"},
		{"debug segfault, debug", "debug", ""},
		{"debug, debug segfault", "debug", ""},
		{"get|x", "", ""}, // no subcommands: the first argument of GET is a key
		{"set, @keyspace, module|load", "keys module|load set", ""},
	} {
		var entries []string
		if tt.entries != "" {
			entries = strings.Split(tt.entries, ",")
		}
		d, err := NewDeny(entries, denyRows)
		if err != nil {
			t.Errorf("%q: %v", tt.entries, err)
			continue
		}
		var denied, byWord []string
		for i, row := range denyRows {
			switch d.Row(i) {
			case Denied:
				denied = append(denied, row.Name)
				if d.RuleOf(i) == "" {
					t.Errorf("%q denies %s and does not say by which entry", tt.entries, row.Name)
				}
			case DeniedByWord:
				byWord = append(byWord, row.Name)
			}
		}
		if got := strings.Join(denied, " "); got != tt.denied {
			t.Errorf("%q denies %q, want %q", tt.entries, got, tt.denied)
		}
		if got := strings.Join(byWord, " "); got != tt.byWord {
			t.Errorf("%q asks for the word of %q, want %q", tt.entries, got, tt.byWord)
		}
	}
}

func TestDenyFind(t *testing.T) {
	for _, tt := range []struct {
		entries string
		line    string // the two words, separated by a space
		want    string
	}{
		{"debug|segfault", "DEBUG SEGFAULT", "debug|segfault"},
		{"debug|segfault", "debug SegFault", "debug|segfault"},
		{"debug|segfault", "debug segfault\x00x", "debug|segfault"}, // a C string to Redis
		{"debug|segfault", "debug object", ""},
		{"debug|segfault", "debug", ""},
		{"debug|segfault", "debugs segfault", ""},
		{"debug|s*", "debug sleep", "debug|s*"},
		{"debug", "debug", "debug"},
		{"debug", "debug object", "debug"},
		{"config", "config nonsense", "config"}, // an unknown subcommand of a denied container
		{"config|get", "config nonsense", ""},
		{"json.*", "JSON.SET key", "json.*"},
		{"json.set", "JSON.SET key", "json.set"},
		{"json.set", "JSON.GET key", ""},
		{"x|y", "X Y", "x|y"},
		{"get, json.set", "json.set k", "json.set"},
		{"@dangerous", "debug segfault", ""}, // what has no row has no categories
		{"*", "anything", "*"},
		{"?", "\xff", "?"},
		{"a*", strings.Repeat("A", 200), "a*"},
		{"", "debug segfault", ""},
	} {
		var entries []string
		if tt.entries != "" {
			entries = strings.Split(tt.entries, ",")
		}
		d, err := NewDeny(entries, nil)
		if err != nil {
			t.Fatal(err)
		}
		name, word, two := strings.Cut(tt.line, " ")
		var second []byte
		if two {
			second = []byte(word)
		}
		if got := d.Find([]byte(name), second); got != tt.want {
			t.Errorf("%q, %q: denied by %q, want %q", tt.entries, tt.line, got, tt.want)
		}
	}
}

func TestDenyRuleMistakes(t *testing.T) {
	for entry, want := range map[string]string{
		"":          "lacks a name",
		"  ":        "lacks a name",
		"|get":      "lacks a name",
		"config|":   "lacks a name",
		"a|b|c":     "more than a command and a subcommand",
		"a b c":     "more than a command and a subcommand",
		"config |x": "more than a command and a subcommand",
		"@":         "is no category",
		"@a b":      "is no category",
		"@a|b":      "is no category",
	} {
		if _, err := ParseDenyRule(entry); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q", entry, err, want)
		}
		if _, err := NewDeny([]string{entry}, denyRows); err == nil {
			t.Errorf("%q: accepted", entry)
		}
	}
}

func TestDenyRuleParts(t *testing.T) {
	for entry, want := range map[string]struct {
		text, category string
		glob           bool
	}{
		"Config Set":   {"config|set", "", false},
		"@Admin":       {"@admin", "admin", false},
		"@a*":          {"@a*", "a*", true},
		"json.*":       {"json.*", "", true},
		"debug|[s]*":   {"debug|[s]*", "", true},
		`back\up`:      {`back\up`, "", true},
		"config | set": {},
	} {
		r, err := ParseDenyRule(entry)
		if want.text == "" {
			if err == nil {
				t.Errorf("%q is %q", entry, r)
			}
			continue
		}
		if err != nil || r.String() != want.text || r.Category() != want.category || r.Glob() != want.glob {
			t.Errorf("%q is %q, category %q, glob %v, %v; want %+v", entry, r, r.Category(), r.Glob(), err, want)
		}
	}
}

func TestDenyNil(t *testing.T) {
	var d *Deny
	if d.Row(7) != Allowed || d.Find([]byte("shutdown"), nil) != "" {
		t.Error("no rules deny something")
	}
}

func TestDenyAllocatesNothing(t *testing.T) {
	d, err := NewDeny([]string{"debug|segfault", "cluster|migrate*", "@dangerous"}, denyRows)
	if err != nil {
		t.Fatal(err)
	}
	name, word := []byte("DEBUG"), []byte("QUICKLIST-PACKED-THRESHOLD")
	if n := testing.AllocsPerRun(100, func() { d.Row(3); d.Find(name, word) }); n != 0 {
		t.Errorf("a look at the rules allocates %v times", n)
	}
}

func BenchmarkDenyRow(b *testing.B) {
	d, err := NewDeny([]string{"shutdown", "debug|segfault"}, denyRows)
	if err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		if d.Row(5) != Allowed {
			b.Fatal("GET is denied")
		}
	}
}

func BenchmarkDenyFind(b *testing.B) {
	d, err := NewDeny([]string{"shutdown", "debug|segfault", "debug|panic"}, denyRows)
	if err != nil {
		b.Fatal(err)
	}
	name, word := []byte("DEBUG"), []byte("OBJECT")
	b.ReportAllocs()
	for b.Loop() {
		if d.Find(name, word) != "" {
			b.Fatal("DEBUG OBJECT is denied")
		}
	}
}
