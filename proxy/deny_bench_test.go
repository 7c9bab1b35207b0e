package proxy

import (
	"testing"

	cmdtab "cacheproxy/internal/command"
	"cacheproxy/internal/config"
)

// deniedSlot is a session under the default rules and a command for it.
func deniedSlot(tb testing.TB, entries []string, words ...string) (*session, *slot) {
	tb.Helper()
	e := &engine{stats: newCounters()}
	if err := e.setDeny(entries); err != nil {
		tb.Fatal(err)
	}
	s := &session{e: e}
	sl := &slot{s: s}
	for _, w := range words {
		sl.args = append(sl.args, []byte(w))
	}
	sl.info = cmdtab.Resolve(sl.args)
	return s, sl
}

func TestDenialAllocatesNothing(t *testing.T) {
	for _, words := range [][]string{{"GET", "k"}, {"DEBUG", "OBJECT", "k"}, {"JSON.GET", "k"}, {"CONFIG", "GET", "x"}} {
		s, sl := deniedSlot(t, config.Defaults().Commands.Deny, words...)
		if n := testing.AllocsPerRun(100, func() {
			if s.denial(sl) != nil {
				t.Errorf("%q is denied", words)
			}
		}); n != 0 {
			t.Errorf("%q: to ask whether it is denied allocates %v times", words, n)
		}
	}
}

// What commands.deny costs every command: with the default rules, without any, and for a command that only its words tell.
func BenchmarkDenial(b *testing.B) {
	for _, bb := range []struct {
		name    string
		entries []string
		words   []string
	}{
		{"default/GET", config.Defaults().Commands.Deny, []string{"GET", "k"}},
		{"none/GET", nil, []string{"GET", "k"}},
		{"default/DEBUG_OBJECT", config.Defaults().Commands.Deny, []string{"DEBUG", "OBJECT", "k"}},
		{"default/unknown", config.Defaults().Commands.Deny, []string{"JSON.GET", "k"}},
	} {
		b.Run(bb.name, func(b *testing.B) {
			s, sl := deniedSlot(b, bb.entries, bb.words...)
			b.ReportAllocs()
			for b.Loop() {
				if s.denial(sl) != nil {
					b.Fatal("denied")
				}
			}
		})
	}
}
