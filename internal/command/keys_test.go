package command

import (
	"bytes"
	"slices"
	"testing"
)

func TestKeysOfCorpus(t *testing.T) {
	for _, args := range slices.Concat(corpus, mistaken) {
		keys, ok := Keys(Resolve(args), args, nil)
		if !ok {
			t.Errorf("%q: the keys cannot be told", args)
		}
		slices.SortFunc(keys, func(a, b Key) int { return a.Arg - b.Arg })
		if got, want := namesOf(keys, args), keysOf(args); !slices.Equal(got, want) {
			t.Errorf("%q: keys %q, want %q", args, got, want)
		}
		// The container's row and the subcommand's say the same.
		again, okAgain := Keys(Lookup(args[0]), args, nil)
		slices.SortFunc(again, func(a, b Key) int { return a.Arg - b.Arg })
		if !slices.Equal(again, keys) || okAgain != ok {
			t.Errorf("%q: keys %v by the row, %v by the container's", args, keys, again)
		}
	}
}

// A store destination may bear the name of an option.
func TestKeysNamedLikeOptions(t *testing.T) {
	for _, tc := range []struct {
		line string
		want []int
	}{
		{"SORT a STORE BY STORE x", []int{1, 5}},
		{"SORT a STORE LIMIT", []int{1, 3}},
		{"SORT a STORE", []int{1}},
		{"GEORADIUS a 1 2 3 m STORE storedist STOREDIST x", []int{1, 7, 9}},
		{"GEORADIUSBYMEMBER a m 3 m STORE STORE", []int{1, 6}},
		{"XREAD STREAMS STREAMS 0", []int{2}},
		{"MIGRATE h 6379 keys 0 10 AUTH KEYS", []int{3}},
		{`MIGRATE h 6379 "" 0 10 KEYS`, []int{3}},
		{"DEBUG", nil},
		{"XGROUP", nil},
	} {
		args := lines(tc.line)[0]
		keys, ok := Keys(Resolve(args), args, nil)
		var got []int
		for _, key := range keys {
			got = append(got, key.Arg)
		}
		if !ok || !slices.Equal(got, tc.want) {
			t.Errorf("%s: keys at %v, %v; want %v", tc.line, got, ok, tc.want)
		}
	}
}

func TestKeysOfMalformedLines(t *testing.T) {
	kept := Key{Arg: 7}
	for _, args := range malformed {
		keys, ok := Keys(Lookup(args[0]), args, []Key{kept})
		if ok || len(keys) != 1 || keys[0] != kept {
			t.Errorf("%q: keys %v, %v", args, keys, ok)
		}
	}
	if keys, ok := Keys(Lookup([]byte("get")), nil, nil); ok || len(keys) != 0 {
		t.Errorf("an empty line has keys %v, %v", keys, ok)
	}
}

func TestIncompleteSpecs(t *testing.T) {
	args := lines("X a b c")[0]
	for _, spec := range []KeySpec{
		{Flags: KeyRO},
		{Flags: KeyRO, Begin: BeginIndex, Index: 1},
		{Flags: KeyRO | KeyIncomplete, Begin: BeginIndex, Index: 1, Find: FindRange, KeyStep: 1},
		{Flags: KeyRO, Begin: BeginIndex, Index: 4, Find: FindRange, KeyStep: 1},
		{Flags: KeyRO, Begin: BeginIndex, Index: 3, Find: FindRange, LastKey: 1, KeyStep: 1},
		{Flags: KeyRO, Begin: BeginKeyword, Keyword: "A", StartFrom: 2, Find: FindRange, KeyStep: 1},
		{Flags: KeyRO, Begin: BeginKeyword, Keyword: "C", StartFrom: -9, Find: FindRange, KeyStep: 1},
	} {
		if keys, ok := Keys(&Info{Name: "x", Specs: []KeySpec{spec}}, args, nil); ok || len(keys) != 0 {
			t.Errorf("%+v: keys %v, %v", spec, keys, ok)
		}
	}
	// A keyword may be searched from the end.
	last := KeySpec{Flags: KeyRO, Begin: BeginKeyword, Keyword: "B", StartFrom: -1, Find: FindRange, KeyStep: 1}
	if keys, ok := Keys(&Info{Name: "x", Specs: []KeySpec{last}}, args, nil); !ok || keys[0].Arg != 3 {
		t.Errorf("behind the last B stands %v, %v", keys, ok)
	}
}

func TestKeyFlags(t *testing.T) {
	for _, tc := range []struct {
		line string
		want Key
	}{
		{"GET a", Key{Arg: 1, Read: true, Flags: KeyRO | KeyAccess}},
		{"DEL a", Key{Arg: 1, Write: true, Flags: KeyRM | KeyDelete}},
		{"GETDEL a", Key{Arg: 1, Read: true, Write: true, Flags: KeyRW | KeyAccess | KeyDelete}},
		{"SET a v NX", Key{Arg: 1, Write: true, Overwrite: true, Flags: KeyOW | KeyUpdate}},
		{"SET a v gEt", Key{Arg: 1, Read: true, Write: true, Flags: KeyRW | KeyAccess | KeyUpdate}},
		{"DELEX a", Key{Arg: 1, Write: true, Flags: KeyRM | KeyDelete}},
		{"DELEX a IFEQ v", Key{Arg: 1, Read: true, Write: true, Flags: KeyRW | KeyDelete}},
		{"BITFIELD a GET u8 0", Key{Arg: 1, Read: true, Flags: KeyRO | KeyAccess}},
		{"BITFIELD a GET u8", Key{Arg: 1, Read: true, Write: true, Flags: KeyRW | KeyAccess | KeyUpdate}},
	} {
		args := lines(tc.line)[0]
		keys, ok := Keys(Resolve(args), args, nil)
		if !ok || len(keys) != 1 || keys[0] != tc.want {
			t.Errorf("%s: %+v, %v; want %+v", tc.line, keys, ok, tc.want)
		}
	}
}

func TestKeysAllocatesNothing(t *testing.T) {
	dst := make([]Key, 0, 8)
	infos := make([]*Info, len(corpus))
	for i, args := range corpus {
		infos[i] = Resolve(args)
	}
	if n := testing.AllocsPerRun(10, func() {
		for i, args := range corpus {
			dst, _ = Keys(infos[i], args, dst[:0])
		}
	}); n != 0 {
		t.Errorf("finding the keys of the corpus allocates %v times", n)
	}
}

func BenchmarkKeys(b *testing.B) {
	args := lines("MGET key1 key2 key3")[0]
	info, dst := Resolve(args), make([]Key, 0, 8)
	for b.Loop() {
		dst, _ = Keys(info, args, dst[:0])
	}
}

// FuzzKeys feeds whole command lines, words separated by newlines, to Lookup and Keys. Every command must bear
// every line, also one that begins with another command's name.
func FuzzKeys(f *testing.F) {
	for _, args := range slices.Concat(corpus, mistaken, malformed) {
		f.Add(bytes.Join(args, []byte("\n")))
	}
	f.Fuzz(func(t *testing.T, line []byte) {
		args := bytes.Split(line, []byte("\n"))
		kept := Key{Arg: -1}
		check := func(info *Info) {
			keys, ok := Keys(info, args, []Key{kept})
			if keys[0] != kept {
				t.Errorf("%q: what stood in dst is gone", args)
			}
			if !ok && len(keys) > 1 {
				t.Errorf("%q: keys %v although they cannot be told", args, keys[1:])
			}
			for _, key := range keys[1:] {
				if key.Arg < 1 || key.Arg >= len(args) {
					t.Errorf("%q: a key at %d", args, key.Arg)
				}
			}
		}
		check(Resolve(args))
		for _, info := range all {
			check(info)
		}
	})
}

func namesOf(keys []Key, args [][]byte) []string {
	var names []string
	for _, key := range keys {
		names = append(names, string(args[key.Arg]))
	}
	return names
}
