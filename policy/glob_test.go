package policy

import (
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
)

func TestGlob(t *testing.T) {
	tests := []struct {
		pattern, s string
		want       bool
	}{
		{"", "", true},
		{"", "a", false},
		{"a", "", false},
		{"a", "a", true},
		{"a", "A", false},
		{"a", "ab", false},
		{"ab", "a", false},

		{"*", "", true},
		{"**", "", false}, // Redis compares nothing with an empty key
		{"*", "anything\x00\xff\n", true},
		{"a*", "a", true},
		{"a**", "a", true},
		{"*a", "a", true},
		{"*a", "ba", true},
		{"*a", "ab", false},
		{"*ab", "aab", true},
		{"*a*b*", "xaxbx", true},
		{"*a*b*", "xbxax", false},
		{"a*c", "abbbbc", true},
		{"a*c", "abbbbcd", false},
		{"*abc", "ababc", true},
		{"*?", "", false},
		{"*?", "a", true},

		{"?", "a", true},
		{"?", "", false},
		{"?", "é", false}, // bytes, not letters
		{"??", "é", true},

		{"[abc]", "b", true},
		{"[abc]", "d", false},
		{"[^abc]", "d", true},
		{"[^abc]", "b", false},
		{"[a^]", "^", true},
		{"[a-c]", "b", true},
		{"[c-a]", "b", true},
		{"[^a-c]", "b", false},
		{"[a-]", "-", false}, // a range from a to ], not closed
		{"[a-]", "b", false},
		{"[a-]", "]", true},
		{"[a-]", "^", true},
		{"[-a]", "-", true},
		{"[]", "a", false},
		{"[^]", "a", true},
		{"[]a", "]a", false},
		{`[\]]`, "]", true},
		{`[\a-c]`, "b", false},
		{`[\a-c]`, "-", true},
		{`[a-\]`, "]", true}, // from backslash to a: no escape here
		{`[a-\]`, "-", false},
		{`[a-\]`, "^", true},
		{"[\x80-\x7f]", "\x00", true},
		{"[\x01-\xff]", "\x00", true},
		{"[\x01-\xff]", "\x80", false},

		{"[abc", "b", true},
		{"[abc", "bc", false},
		{"[^abc", "d", true},
		{"[", "[", false},
		{"[^", "x", true},
		{`[\`, `\`, true},
		{`[a\`, `\`, true},

		{`\*`, "*", true},
		{`\*`, "a", false},
		{`\a`, "a", true},
		{`\\`, `\`, true},
		{`\`, `\`, true},
		{`a\`, `a\`, true},
		{`a\`, "a", false},
		{`*\**`, "a*b", true},
		{`*\**`, "ab", false},
		{"h{a,b}", "h{a,b}", true},
		{"h{a,b}", "ha", false},

		{strings.Repeat("*a", maxStars), strings.Repeat("a", maxStars+200), true},
		{strings.Repeat("*a", maxStars+1), strings.Repeat("a", maxStars+200), false},
		{strings.Repeat("a*", maxStars+1), strings.Repeat("a", maxStars+1), true},
	}
	for _, tt := range tests {
		if got := Glob([]byte(tt.pattern), []byte(tt.s)); got != tt.want {
			t.Errorf("Glob(%.40q, %.40q) = %v, want %v", tt.pattern, tt.s, got, tt.want)
		}
	}

	// The table is only as good as its author: Redis signs it, as far as it can be asked.
	redis := startRedis(t)
	for _, tt := range tests {
		redis.do("FLUSHALL")
		redis.do("SET", tt.s, "")
		if got := len(redis.strings("KEYS", tt.pattern)) == 1; got != tt.want {
			t.Errorf("KEYS %.40q finds %.40q: %v, want %v", tt.pattern, tt.s, got, tt.want)
		}
	}
}

// TestGlobExponential ends only because a pattern with many stars is not tried in every way there is.
func TestGlobExponential(t *testing.T) {
	pattern := []byte(strings.Repeat("a*", 100) + "b")
	if Glob(pattern, []byte(strings.Repeat("a", MaxKey))) {
		t.Error("matched without a b")
	}
}

// TestGlobAgreesWithRedis asks a real Redis about random patterns and keys over bytes that mean something.
func TestGlobAgreesWithRedis(t *testing.T) {
	const (
		seed     = 2
		rounds   = 20
		keys     = 60
		patterns = 60
	)
	rnd := rand.New(rand.NewPCG(seed, seed))
	random := func(alphabet string, longest int) string {
		b := make([]byte, rnd.IntN(longest+1))
		for i := range b {
			b[i] = alphabet[rnd.IntN(len(alphabet))]
		}
		return string(b)
	}
	redis := startRedis(t)
	pairs, matches := 0, 0
	for range rounds {
		redis.do("FLUSHALL")
		stored := map[string]bool{"": true}
		for range keys {
			stored[random("aabbcd-]^[\\*?\x00\x7f\x80\xff", 6)] = true
		}
		for key := range stored {
			redis.do("SET", key, "")
		}
		for range patterns {
			pattern := random("aabbc-]^[[\\***??\x00\x80\xff", 9)
			found := redis.strings("KEYS", pattern)
			for key := range stored {
				pairs++
				want := slices.Contains(found, key)
				if want {
					matches++
				}
				if got := Glob([]byte(pattern), []byte(key)); got != want {
					t.Errorf("Glob(%q, %q) = %v, Redis says %v", pattern, key, got, want)
				}
			}
		}
	}
	if matches < pairs/100 {
		t.Errorf("only %d of %d pairs match: the generator asks nothing", matches, pairs)
	}
}

// FuzzGlob compares Glob with a definition that is too slow to use and too short to be wrong.
func FuzzGlob(f *testing.F) {
	f.Add([]byte("a*[^b-d]?\\*"), []byte("axxay*"))
	f.Add([]byte("*a*b["), []byte("ab"))
	f.Fuzz(func(t *testing.T, pattern, s []byte) {
		if len(pattern) > 12 || len(s) > 12 || len(s) == 0 {
			return
		}
		if got, want := Glob(pattern, s), globByDefinition(pattern, s); got != want {
			t.Errorf("Glob(%q, %q) = %v, want %v", pattern, s, got, want)
		}
	})
}

func globByDefinition(pattern, s []byte) bool {
	if len(pattern) == 0 {
		return len(s) == 0
	}
	if pattern[0] == '*' {
		for i := 0; i <= len(s); i++ {
			if globByDefinition(pattern[1:], s[i:]) {
				return true
			}
		}
		return false
	}
	if len(s) == 0 {
		return false
	}
	n, ok := matchByte(pattern, s[0])
	return ok && globByDefinition(pattern[n:], s[1:])
}

func TestOverlap(t *testing.T) {
	for _, tt := range []struct {
		a, b string
		want bool
	}{
		{"*", "a", true}, {"", "", true}, {"", "a", false}, {"a", "a", true}, {"a", "b", false}, {"a*", "*b", true}, {"a*", "b*", false},
		{"report:?*", "report:", false}, {"report:?*", "report:*", true}, {"report:?*", "user:*", false}, {"report:?*", "*:7", true},
		{"r:?*:v1", "r:?*:v2", false}, {"r:?*", "r:?*:v1", true}, {"[a-c]x", "[^a-c]x", false}, {"[a-c]x", "?x", true}, {`\*`, "[a-z]", false},
		{"???", "*a*b*", true}, {"??", "*a*b*c*", false}, {"[ab", "b", true}, {`a\`, `a\`, true},
	} {
		if got := Overlap(tt.a, tt.b); got != tt.want {
			t.Errorf("%s and %s: %v", tt.a, tt.b, got)
		}
		if got := Overlap(tt.b, tt.a); got != tt.want {
			t.Errorf("%s and %s: %v", tt.b, tt.a, got)
		}
	}
}
