package command

import (
	"slices"
	"strings"
	"testing"
)

func TestLookup(t *testing.T) {
	for _, tc := range []struct{ name, want string }{
		{"get", "get"},
		{"GET", "get"},
		{"gEt", "get"},
		{"RESTORE-ASKING", "restore-asking"},
		{"georadiusbymember_RO", "georadiusbymember_ro"},
		{"msetex", "msetex"},
		{"", ""},
		{"gets", ""},
		{"ge", ""},
		{"get\x00", ""},
		{"config|get", ""},
		{"json.set", ""},
		{strings.Repeat("x", maxName), ""},
		{strings.Repeat("x", maxName+1), ""},
		{"\xc7et", ""},
	} {
		if got := nameOf(Lookup([]byte(tc.name))); got != tc.want {
			t.Errorf("Lookup(%q) = %q, want %q", tc.name, got, tc.want)
		}
	}
}

func TestLookupSub(t *testing.T) {
	for _, tc := range []struct{ name, sub, want string }{
		{"config", "get", "config|get"},
		{"CONFIG", "Get", "config|get"},
		{"client", "no-touch", "client|no-touch"},
		{"config", "", ""},
		{"config", "what", ""},
		{"get", "get", ""},
		{"config", "|get", ""},
		{"config|get", "", ""},
		{"", "get", ""},
		{strings.Repeat("x", maxName), "get", ""},
		{"config", strings.Repeat("x", maxName), ""},
	} {
		if got := nameOf(LookupSub([]byte(tc.name), []byte(tc.sub))); got != tc.want {
			t.Errorf("LookupSub(%q, %q) = %q, want %q", tc.name, tc.sub, got, tc.want)
		}
	}
}

func TestResolve(t *testing.T) {
	for line, want := range map[string]string{
		"GET a":         "get",
		"CONFIG GET a":  "config|get",
		"CONFIG":        "config",
		"CONFIG WHAT":   "",
		"DEBUG WHAT":    "debug",
		"COMMAND":       "command",
		"command count": "command|count",
		"WHAT":          "",
	} {
		if got := nameOf(Resolve(lines(line)[0])); got != want {
			t.Errorf("Resolve(%s) = %q, want %q", line, got, want)
		}
	}
	if info := Resolve(nil); info != nil {
		t.Errorf("Resolve of nothing = %q", info.Name)
	}
}

func TestStatic(t *testing.T) {
	for line, want := range map[string]bool{"GET": true, "get": true, "CONFIG": false, "CONFIG GET": false, "NOSUCH": false} {
		if got := Static(Resolve(lines(line)[0])); got != want {
			t.Errorf("Static of %s is %v", line, got)
		}
	}
	get := *Lookup([]byte("get"))
	if Static(&get) {
		t.Error("a row that is not of the table is static")
	}
}

func TestAll(t *testing.T) {
	rows := All()
	if !slices.IsSortedFunc(rows, func(a, b *Info) int { return strings.Compare(a.Name, b.Name) }) {
		t.Error("All() is not in the order of the names")
	}
	for _, info := range rows {
		container, sub, isSub := strings.Cut(info.Name, "|")
		found := Lookup([]byte(container))
		if isSub {
			if found == nil || !found.Container() {
				t.Errorf("%s has no container", info.Name)
			}
			found = LookupSub([]byte(strings.ToUpper(container)), []byte(sub))
		}
		if found != info {
			t.Errorf("%s is not found by its name", info.Name)
		}
		if info.Arity == 0 {
			t.Errorf("%s has no arity", info.Name)
		}
		if info.Flags&Write != 0 && info.Flags&Readonly != 0 {
			t.Errorf("%s is both a write and read-only", info.Name)
		}
		for _, spec := range info.Specs {
			if spec.Find != FindUnknown && spec.KeyStep < 1 {
				t.Errorf("%s has a key specification that does not advance", info.Name)
			}
		}
	}
	rows[0] = nil
	if All()[0] == nil {
		t.Error("All() returns the package's own slice")
	}
}

func TestFacts(t *testing.T) {
	set := Lookup([]byte("set"))
	if set.Flags != Write|DenyOOM || set.ACL != CatWrite|CatString|CatSlow || set.First != 1 || set.Last != 1 ||
		set.Step != 1 || !set.Keyed() || set.Container() {
		t.Errorf("set is %+v", *set)
	}
	for name, keyed := range map[string]bool{
		"get": true, "eval": true, "debug": true, "ping": false, "spublish": false, "flushall": false,
	} {
		if got := Lookup([]byte(name)).Keyed(); got != keyed {
			t.Errorf("%s: Keyed() = %v", name, got)
		}
	}
	for _, tc := range []struct {
		name string
		n    int
		want bool
	}{
		{"get", 1, false}, {"get", 2, true}, {"get", 3, false},
		{"set", 2, false}, {"set", 3, true}, {"set", 9, true},
	} {
		if got := Lookup([]byte(tc.name)).ArityOK(tc.n); got != tc.want {
			t.Errorf("%s: ArityOK(%d) = %v", tc.name, tc.n, got)
		}
	}
}

// WAIT blocks in 7.0 too, where it is not flagged: a client that hangs up must not be waited for.
func TestWaitBlocks(t *testing.T) {
	for _, name := range []string{"wait", "waitaof", "blpop", "xread", "bzmpop"} {
		if Lookup([]byte(name)).Flags&Blocking == 0 {
			t.Errorf("%s is not called blocking", name)
		}
	}
}

func TestIDsAndCategories(t *testing.T) {
	for i, info := range All() {
		if info.ID() != i {
			t.Errorf("%s has the ID %d and stands at %d", info.Name, info.ID(), i)
		}
	}
	if got := Lookup([]byte("get")).ACL.Words(); !slices.Equal(got, []string{"read", "string", "fast"}) {
		t.Errorf("the categories of GET are %q", got)
	}
	if got := (CatKeyspace | CatArray).Words(); !slices.Equal(got, []string{"keyspace", "array"}) {
		t.Errorf("the first and the last category are %q", got)
	}
	Categories()[0] = ""
	DebugWords()[0] = ""
	if Categories()[0] == "" || DebugWords()[0] == "" {
		t.Error("a list of the package's own was handed out")
	}
}

func TestLookupAllocatesNothing(t *testing.T) {
	name, config, get := []byte("GEORADIUSBYMEMBER_RO"), []byte("CONFIG"), []byte("GET")
	if n := testing.AllocsPerRun(100, func() {
		if Lookup(name) == nil || Lookup(get) == nil || LookupSub(config, get) == nil {
			t.Error("a command is missing")
		}
	}); n != 0 {
		t.Errorf("a lookup allocates %v times", n)
	}
}

func BenchmarkLookup(b *testing.B) {
	name := []byte("GET")
	for b.Loop() {
		Lookup(name)
	}
}

func nameOf(info *Info) string {
	if info == nil {
		return ""
	}
	return info.Name
}
