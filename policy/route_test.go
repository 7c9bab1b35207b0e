package policy

import (
	"fmt"
	"math"
	"math/rand/v2"
	"strings"
	"testing"
	"time"
)

func newRouter(t testing.TB, patterns ...string) *Router {
	t.Helper()
	routes := make([]Route, len(patterns))
	for i, p := range patterns {
		routes[i] = Route{Name: fmt.Sprintf("r%d", i), Match: p}
	}
	r, err := NewRouter(routes)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func TestMatch(t *testing.T) {
	tests := []struct {
		patterns []string
		key      string
		want     string // the pattern of the route; empty: none
	}{
		{nil, "a", ""},
		{[]string{"a"}, "a", "a"},
		{[]string{"a"}, "ab", ""},
		{[]string{"ab"}, "a", ""},
		{[]string{"*"}, "", "*"},
		{[]string{"**"}, "", ""},
		{[]string{"a*"}, "", ""},
		{[]string{"a*"}, "a", "a*"},
		{[]string{"user:*", "*"}, "user:1", "user:*"},
		{[]string{"user:*", "*"}, "used:1", "*"},
		{[]string{"*", "user:*", "user:1"}, "user:1", "*"},
		{[]string{"user:1", "user:*", "*"}, "user:1", "user:1"},
		{[]string{"user:1", "user:*", "*"}, "user:12", "user:*"},
		{[]string{"user:*", "user:1*", "user:12"}, "user:12", "user:*"},
		{[]string{"user:12*", "user:1*", "user:*"}, "user:13", "user:1*"},
		{[]string{"user:?", "user:*"}, "user:1", "user:?"},
		{[]string{"user:?", "user:*"}, "user:12", "user:*"},
		{[]string{"user:*", "user:?"}, "user:1", "user:*"},
		{[]string{"*:1", "user:*"}, "user:1", "*:1"},
		{[]string{"user:*", "*:1"}, "user:1", "user:*"},
		{[]string{"user:*:a", "user:*:b"}, "user:1:b", "user:*:b"},
		{[]string{"[ab]*", "a*"}, "a1", "[ab]*"},
		{[]string{`a\*`, "a*"}, "a*", `a\*`},
		{[]string{`a\*`, "a*"}, "ab", "a*"},
		{[]string{`a\**`}, "a*b", `a\**`},
		{[]string{`a\**`}, "ab", ""},
		{[]string{`a\`}, `a\`, `a\`},
		{[]string{"a{id}", "a*"}, "a7", "a*"},
		{[]string{"é*"}, "é1", "é*"},
		{[]string{"*"}, "a\x00", ""},
		{[]string{"*"}, "\xff", ""},
		{[]string{"*"}, "cacheproxy:journal", ""},
		{[]string{"cacheproxy:*"}, "cacheproxy:journal", ""},
		{[]string{"*"}, "cacheproxy", "*"},
		{[]string{"*"}, strings.Repeat("k", MaxKey), "*"},
		{[]string{"*"}, strings.Repeat("k", MaxKey+1), ""},
	}
	for _, tt := range tests {
		got := ""
		if route := newRouter(t, tt.patterns...).Match([]byte(tt.key)); route != nil {
			got = route.Match
		}
		if got != tt.want {
			t.Errorf("%q: key %.20q goes to %q, want %q", tt.patterns, tt.key, got, tt.want)
		}
	}
}

func TestEligible(t *testing.T) {
	tests := []struct {
		key  string
		want bool
	}{
		{"", true},
		{"a", true},
		{"ключ:é:🙂", true},
		{strings.Repeat("k", MaxKey), true},
		{strings.Repeat("k", MaxKey+1), false},
		{"a\x00b", false},
		{"\xc3", false},
		{"\xed\xa0\x80", false}, // a surrogate
		{"cacheproxy:", false},
		{"cacheproxy:lease:a", false},
		{"cacheproxy", true},
		{"Cacheproxy:a", true},
		{"my:cacheproxy:a", true},
	}
	for _, tt := range tests {
		if got := Eligible([]byte(tt.key)); got != tt.want {
			t.Errorf("Eligible(%.20q) = %v, want %v", tt.key, got, tt.want)
		}
	}
}

// TestMatchIsFirstMatch compares Match with the loop that it stands for.
func TestMatchIsFirstMatch(t *testing.T) {
	const (
		seed    = 3
		routers = 2000
		keys    = 40
	)
	rnd := rand.New(rand.NewPCG(seed, seed))
	random := func(alphabet string, shortest, longest int) string {
		b := make([]byte, shortest+rnd.IntN(longest-shortest+1))
		for i := range b {
			b[i] = alphabet[rnd.IntN(len(alphabet))]
		}
		return string(b)
	}
	found := 0
	for range routers {
		patterns := make([]string, 1+rnd.IntN(12))
		for i := range patterns {
			switch rnd.IntN(4) {
			case 0:
				patterns[i] = random("ab:", 1, 5)
			case 1:
				patterns[i] = random("ab:", 0, 4) + "*"
			default:
				patterns[i] = random(`aab:*?[^]\`, 1, 7)
			}
		}
		r := newRouter(t, patterns...)
		for range keys {
			key := random(`aab:*\`, 0, 6)
			want := -1
			for i, p := range patterns {
				if Glob([]byte(p), []byte(key)) {
					want = i
					break
				}
			}
			got := -1
			if route := r.Match([]byte(key)); route != nil {
				fmt.Sscanf(route.Name, "r%d", &got)
				found++
			}
			if got != want {
				t.Fatalf("%q: key %q goes to route %d, want %d", patterns, key, got, want)
			}
		}
	}
	if found < routers*keys/10 {
		t.Errorf("only %d of %d keys have a route: the generator asks nothing", found, routers*keys)
	}
}

func TestNewRouterErrors(t *testing.T) {
	tests := []struct {
		name   string
		routes []Route
		want   []string // each a line of the error
	}{
		{"empty name", []Route{{Match: "*"}}, []string{"routes[0]: name is empty"}},
		{"two empty names", []Route{{Match: "*"}, {Match: "*"}}, []string{"routes[0]: name is empty", "routes[1]: name is empty"}},
		{"long name", []Route{{Name: strings.Repeat("n", maxName+1), Match: "*"}}, []string{"routes[0]: name has 201 bytes, at most 200 are allowed"}},
		{"duplicate name", []Route{{Name: "a", Match: "a"}, {Name: "b", Match: "b"}, {Name: "a", Match: "c"}}, []string{`routes[2]: name "a" is that of routes[0]`}},
		{"empty match", []Route{{Name: "a"}}, []string{"routes[0]: match is empty"}},
		{"long match", []Route{{Name: "a", Match: strings.Repeat("m", maxMatch+1)}}, []string{"routes[0]: match has 4001 bytes, at most 4000 are allowed"}},
		{"no phase", []Route{{Name: "a", Match: "a", Phase: 5}}, []string{"routes[0]: Phase(5) is no phase"}},
		{"negative ttl", []Route{{Name: "a", Match: "a", TTL: -1}}, []string{"routes[0]: ttl is negative"}},
		{"negative negative_ttl", []Route{{Name: "a", Match: "a", NegativeTTL: -1}}, []string{"routes[0]: negative_ttl is negative"}},
		{"jitter", []Route{{Name: "a", Match: "a", Jitter: 1.1}, {Name: "b", Match: "b", Jitter: -0.1}, {Name: "c", Match: "c", Jitter: math.NaN()}}, []string{
			"routes[0]: ttl_jitter is not between 0 and 1",
			"routes[1]: ttl_jitter is not between 0 and 1",
			"routes[2]: ttl_jitter is not between 0 and 1",
		}},
		{"all at once", []Route{{}, {Name: "a", Match: "a"}, {Name: "a"}}, []string{
			"routes[0]: name is empty",
			"routes[0]: match is empty",
			"routes[2]: match is empty",
			`routes[2]: name "a" is that of routes[1]`,
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			r, err := NewRouter(tt.routes)
			if err == nil || r != nil {
				t.Fatalf("NewRouter = %v, %v, want an error alone", r, err)
			}
			if want := strings.Join(tt.want, "\n"); err.Error() != want {
				t.Errorf("got\n%v\nwant\n%v", err, want)
			}
		})
	}
}

func TestRouterIsImmutable(t *testing.T) {
	routes := []Route{{Name: "a", Match: "a*", Phase: Phase1, TTL: time.Hour}, {Name: "b", Match: "*"}}
	r, err := NewRouter(routes)
	if err != nil {
		t.Fatal(err)
	}
	routes[0].Phase = Phase3
	r.Routes()[1].Name = "changed"
	next, err := r.WithPhase("a", Phase2)
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name   string
		router *Router
		want   Phase
	}{{"old", r, Phase1}, {"new", next, Phase2}} {
		a, b := tt.router.Match([]byte("a1")), tt.router.Match([]byte("b1"))
		if a == nil || a.Name != "a" || a.Phase != tt.want || a.TTL != time.Hour {
			t.Errorf("%s router: a1 goes to %+v, want a in %v", tt.name, a, tt.want)
		}
		if b == nil || b.Name != "b" || b.Phase != Phase0 {
			t.Errorf("%s router: b1 goes to %+v, want b in phase0", tt.name, b)
		}
		if got := tt.router.Routes(); len(got) != 2 || got[0] != *a || got[1] != *b {
			t.Errorf("%s router: Routes() = %+v", tt.name, got)
		}
	}
}

func TestWithPhaseErrors(t *testing.T) {
	r := newRouter(t, "*")
	for name, phase := range map[string]Phase{"none": Phase1, "r0": 5} {
		if next, err := r.WithPhase(name, phase); err == nil || next != nil {
			t.Errorf("WithPhase(%q, %v) = %v, %v, want an error alone", name, phase, next, err)
		}
	}
}

func TestMatchAllocatesNothing(t *testing.T) {
	r := newRouter(t, "user:*", "exact", "se?sion:*[0-9]", "*:tail", `esc\*aped*`)
	long := strings.Repeat("k", MaxKey)
	for _, key := range []string{"", "user:1", "exact", "session:12", "some:tail", "esc*aped", "none", long, "\xff"} {
		k := []byte(key)
		if n := testing.AllocsPerRun(100, func() { r.Match(k) }); n != 0 {
			t.Errorf("Match(%.20q) allocates %v times", key, n)
		}
	}
}

func BenchmarkMatch(b *testing.B) {
	for _, n := range []int{1, 100, 1000} {
		patterns := make([]string, n)
		for i := range patterns {
			patterns[i] = fmt.Sprintf("app:%04d:*", i)
		}
		r := newRouter(b, patterns...)
		for name, key := range map[string]string{
			"hit":  fmt.Sprintf("app:%04d:some:key:4711", n-1),
			"miss": fmt.Sprintf("app:%04d-some:key:4711", n-1),
		} {
			k := []byte(key)
			b.Run(fmt.Sprintf("%d/%s", n, name), func(b *testing.B) {
				b.ReportAllocs()
				for b.Loop() {
					r.Match(k)
				}
			})
		}
	}
}
