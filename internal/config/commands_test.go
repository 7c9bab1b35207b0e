package config

import (
	"reflect"
	"slices"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"

	"cacheproxy/internal/command"
	"cacheproxy/policy"
)

func TestDeny(t *testing.T) {
	for text, want := range map[string][]string{
		"":                           Defaults().Commands.Deny,
		"commands:":                  Defaults().Commands.Deny,
		"commands: {}":               Defaults().Commands.Deny,
		"commands: {deny: []}":       {},
		"commands: {deny: [KEYS]}":   {"KEYS"},
		"a: &a [keys]":               nil,
		"commands:\n  deny: [debug]": {"debug"},
		"commands:\n  deny:\n    - \"@dangerous\"\n    - config set\n    - 'ft.*'\n    - ft.search\n    - ft.config|set": {"@dangerous", "config set", "ft.*", "ft.search", "ft.config|set"},
	} {
		if want == nil {
			problems(t, write(t, text), nil)
			continue
		}
		if got := mustLoad(t, write(t, text), nil).Commands.Deny; !slices.Equal(got, want) {
			t.Errorf("%q: %q, want %q", text, got, want)
		}
	}
}

// A running proxy takes the list over, and what it prints is what it would read.
func TestDenyReloadsAndPrints(t *testing.T) {
	a, b := Defaults(), Defaults()
	b.Commands.Deny = []string{"@dangerous", "*|help", "config set"}
	if got := Diff(&a, &b); got != nil {
		t.Errorf("%q need a restart", got)
	}
	r := b.Redacted()
	printed, err := yaml.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	if got := mustLoad(t, write(t, string(printed)), nil); !reflect.DeepEqual(got.Commands, b.Commands) {
		t.Errorf("%q was printed and read as %q", b.Commands.Deny, got.Commands.Deny)
	}
	if r.Commands.Deny[0] = ""; b.Commands.Deny[0] == "" {
		t.Error("the copy for printing shares the list")
	}
}

// TestDefaultDeny: the default denies what stops or re-homes a server, and nothing else of the containers it names, so that a
// new entry is somebody's decision. Redis's own test suite needs the subcommands of DEBUG that are not denied.
func TestDefaultDeny(t *testing.T) {
	var rows []policy.DenyTarget
	for _, info := range command.All() {
		rows = append(rows, policy.DenyTarget{Name: info.Name, Categories: info.ACL.Words(), Words: info.Name == "debug"})
	}
	d, err := policy.NewDeny(Defaults().Commands.Deny, rows)
	if err != nil {
		t.Fatal(err)
	}
	var denied []string
	for i, row := range rows {
		if d.Row(i) == policy.Denied {
			denied = append(denied, row.Name)
		}
	}
	if got, want := strings.Join(denied, " "), "cluster|addslots cluster|addslotsrange cluster|bumpepoch cluster|delslots"+
		" cluster|delslotsrange cluster|failover cluster|flushslots cluster|forget cluster|meet cluster|migrateslots"+
		" cluster|migration cluster|replicate cluster|reset cluster|set-config-epoch cluster|setslot failover module|load"+
		" module|loadex module|unload replicaof shutdown slaveof"; got != want {
		t.Errorf("denied are\n%s\nwant\n%s", got, want)
	}
	denied = nil
	for _, word := range command.DebugWords() {
		if d.Find([]byte("debug"), []byte(word)) != "" {
			denied = append(denied, word)
		}
	}
	if got, want := strings.Join(denied, " "), "assert crash-and-recover oom panic pause-after-fork repl-pause restart segfault"; got != want {
		t.Errorf("denied of DEBUG are\n%s\nwant\n%s", got, want)
	}
}
