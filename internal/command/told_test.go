package command

import (
	"context"
	"reflect"
	"strings"
	"testing"
)

// told reads one element of the reply to COMMAND, and its subcommands.
func told(v any) []Told {
	e := v.([]any)
	pairs := func(v any) map[string]any {
		m, l := map[string]any{}, v.([]any)
		for i := 0; i+1 < len(l); i += 2 {
			m[l[i].(string)] = l[i+1]
		}
		return m
	}
	words := func(v any) (out []string) {
		for _, w := range v.([]any) {
			out = append(out, w.(string))
		}
		return out
	}
	t := Told{Name: e[0].(string), Arity: int(e[1].(int64)), Flags: words(e[2])}
	for _, s := range e[8].([]any) {
		fields := pairs(s)
		begin, find := pairs(fields["begin_search"]), pairs(fields["find_keys"])
		spec := ToldSpec{Flags: words(fields["flags"]), Begin: begin["type"].(string), Find: find["type"].(string), Args: map[string]int{}}
		for _, part := range []any{begin["spec"], find["spec"]} {
			for name, value := range pairs(part) {
				if n, ok := value.(int64); ok {
					spec.Args[name] = int(n)
				} else {
					spec.Keyword = value.(string)
				}
			}
		}
		t.Specs = append(t.Specs, spec)
	}
	out := []Told{t}
	for _, sub := range e[9].([]any) {
		out = append(out, told(sub)...)
	}
	return out
}

// TestLearnAgainstRedis learns every command of the server as if the table lacked it: what is learned must find the keys that
// the table finds.
func TestLearnAgainstRedis(t *testing.T) {
	server := startRedis(t)
	reply, err := server.Do(context.Background(), "command").Slice()
	if err != nil {
		t.Fatal(err)
	}
	learned := map[string]*Info{}
	refused := map[string]bool{}
	for _, c := range reply {
		for _, told := range told(c) {
			name := strings.ToLower(told.Name)
			info := Learn(told)
			if info == nil {
				refused[name] = true
				continue
			}
			if info.ID() >= 0 || info.Name != name {
				t.Errorf("%s is learned as %s with the ID %d", name, info.Name, info.ID())
			}
			learned[name] = info
		}
	}
	for _, name := range []string{"set", "bitfield", "sort", "sort_ro", "migrate"} {
		if !refused[name] {
			t.Errorf("%s is learned, and its keys are not told in full", name)
		}
	}
	if len(learned) < 300 || len(refused) > 15 {
		t.Errorf("%d are learned, %d are not: %v", len(learned), len(refused), refused)
	}
	for _, args := range corpus {
		row := Resolve(args)
		info := learned[row.Name]
		if info == nil || row.parse != parseSpecs {
			continue
		}
		want, wantOK := Keys(row, args, nil)
		got, ok := Keys(info, args, nil)
		if ok != wantOK || len(got) != len(want) {
			t.Errorf("%q: learned keys %v, %v; the table's %v, %v", args, got, ok, want, wantOK)
			continue
		}
		for i := range got {
			if got[i].Arg != want[i].Arg || got[i].Write != want[i].Write && info.Flags&Module == 0 {
				t.Errorf("%q: learned keys %v, the table's %v", args, got, want)
			}
		}
	}
	for name, row := range map[string]Flag{"blpop": Write | Blocking, "get": Readonly | Fast} {
		if got := learned[name].Flags & (row | Write | Readonly); got != row {
			t.Errorf("%s is learned with the flags %b", name, got)
		}
	}
}

func TestLearn(t *testing.T) {
	first := ToldSpec{Flags: []string{"RW", "access"}, Begin: "index", Find: "range", Args: map[string]int{"index": 1, "keystep": 1}}
	with := func(change func(*ToldSpec)) []ToldSpec {
		s := first
		change(&s)
		return []ToldSpec{s}
	}
	got := Learn(Told{Name: "X.SET", Arity: -2, Flags: []string{"write", "module", "something_new"}, Specs: []ToldSpec{first}})
	if want := (&Info{Name: "x.set", Arity: -2, Flags: Write | Module, id: noID, Specs: []KeySpec{{Flags: KeyRW | KeyAccess, Begin: BeginIndex, Find: FindRange, Index: 1, KeyStep: 1}}}); !reflect.DeepEqual(got, want) {
		t.Errorf("learned %+v", got)
	}
	if got := Learn(Told{Name: "x", Specs: with(func(s *ToldSpec) { s.Flags = []string{"something_new"} })}); got == nil || got.Specs[0].Flags != KeyRW {
		t.Errorf("a key of an unknown kind: %+v", got)
	}
	if got := Learn(Told{Name: "x", Flags: []string{"movablekeys"}, Specs: with(func(s *ToldSpec) {
		s.Find, s.Args = "keynum", map[string]int{"index": 2, "keynumidx": 0, "firstkey": 1, "keystep": 1}
	})}); got == nil {
		t.Error("keys that are counted are told in full")
	}
	if got := Learn(Told{Name: "x", Specs: with(func(s *ToldSpec) { s.Flags, s.Find = []string{"not_key"}, "unknown" })}); got == nil || got.Keyed() {
		t.Errorf("a channel is learned as %+v", got)
	}
	if got := Learn(Told{Name: "x.get", Flags: []string{"readonly", "module"}, Specs: with(func(s *ToldSpec) { s.Flags = []string{"RW", "access", "update"} })}); got.Specs[0].Flags != KeyRO|KeyAccess {
		t.Errorf("a read of a module: %+v", got)
	}
	for name, c := range map[string]Told{
		"code finds the keys":  {Flags: []string{"movablekeys"}},
		"incomplete":           {Specs: with(func(s *ToldSpec) { s.Flags = []string{"RW", "incomplete"} })},
		"variable":             {Specs: with(func(s *ToldSpec) { s.Flags = []string{"RW", "variable_flags"} })},
		"begins nowhere":       {Specs: with(func(s *ToldSpec) { s.Begin = "unknown" })},
		"a new way to find":    {Specs: with(func(s *ToldSpec) { s.Find = "regexp" })},
		"no step":              {Specs: with(func(s *ToldSpec) { s.Args = map[string]int{"index": 1} })},
		"the second is unsure": {Specs: append([]ToldSpec{first}, with(func(s *ToldSpec) { s.Find = "unknown" })...)},
	} {
		if got := Learn(c); got != nil {
			t.Errorf("%s: learned %+v", name, got)
		}
	}
}
