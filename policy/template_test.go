package policy

import (
	"slices"
	"strings"
	"testing"
)

func parse(t testing.TB, match string) *Template {
	t.Helper()
	tpl, err := ParseTemplate(match)
	if err != nil {
		t.Fatalf("%q: %v", match, err)
	}
	return tpl
}

func TestTemplate(t *testing.T) {
	tests := []struct{ match, key, parts string }{ // parts joined by |; "-": no match
		{"report:{id}", "report:7", "7"},
		{"report:{id}", "report:", "-"},
		{"report:{id}", "repor", "-"},
		{"report:{id}", "xreport:7", "-"},
		{"report:{id}", "report:a:b", "a:b"},
		{"{id}", "7", "7"},
		{"{id}", "", "-"},
		{"{id}:x", "7:x", "7"},
		{"{id}:x", "7:x:x", "-"},
		{"{id}:x", ":x", "-"},
		{"{id}:x", "7:y", "-"},
		{"u:{tenant}:{id}", "u:a:b", "a|b"},
		{"u:{tenant}:{id}", "u:a:b:c", "a|b:c"},
		{"u:{tenant}:{id}", "u::b", "-"},
		{"u:{tenant}:{id}", "u:a:", "-"},
		{"u:{tenant}:{id}", "u:a", "-"},
		{"u:{a}::{b}", "u:x:::y", "x|:y"},
		{"{a}-{b}-{c}!", "1-2-3!", "1|2|3"},
		{"{a}-{b}-{c}!", "1-2-3!!", "-"},
		{`\{{id}\}`, "{7}", "7"},
		{`a\*{id}\\`, `a*7\`, "7"},
		{"é{id}ü", "ésü", "s"},
	}
	for _, tt := range tests {
		tpl := parse(t, tt.match)
		got := "-"
		parts, ok := tpl.Split(tt.key)
		if ok {
			got = strings.Join(parts, "|")
		}
		if got != tt.parts {
			t.Errorf("%s: %q gives %s, want %s", tt.match, tt.key, got, tt.parts)
		}
		if tpl.Matches([]byte(tt.key)) != ok {
			t.Errorf("%s: Matches(%q) is not what Split says", tt.match, tt.key)
		}
		if ok && tpl.Join(parts) != tt.key {
			t.Errorf("%s: %q is not joined again", tt.match, tt.key)
		}
		if ok && !Glob([]byte(tpl.Glob()), []byte(tt.key)) {
			t.Errorf("%s: its glob %s does not match %q", tt.match, tpl.Glob(), tt.key)
		}
	}
}

// TestJoin holds that a key is made only of parts that it gives back.
func TestJoin(t *testing.T) {
	tpl := parse(t, "u:{a}::{b}.")
	for _, parts := range [][]string{{"", "x"}, {"x", ""}, {"a::b", "x"}, {"a:", "x"}, {"x", "1.2"}, {"x"}, {strings.Repeat("k", MaxKey), "x"}, {"\x00", "x"}} {
		if key := tpl.Join(parts); key != "" {
			t.Errorf("%.20q make %.40q", parts, key)
		}
	}
	if got := tpl.Join([]string{":a", "b"}); got != "u::a::b." {
		t.Errorf("got %q", got)
	}
}

func FuzzTemplate(f *testing.F) {
	f.Add("u:{a}::{b}", "u:x:::y", "x", "y")
	f.Add(`{a}\*{b}*`, "1*2*", "1", "*")
	f.Fuzz(func(t *testing.T, match, key, a, b string) {
		tpl, err := ParseTemplate(match)
		if err != nil {
			return
		}
		parts, ok := tpl.Split(key)
		if ok != tpl.Matches([]byte(key)) {
			t.Fatalf("%q: Matches and Split differ about %q", match, key)
		}
		if ok && Eligible([]byte(key)) && tpl.Join(parts) != key {
			t.Fatalf("%q: %q becomes %q", match, key, tpl.Join(parts))
		}
		given := []string{a, b}[:min(2, len(tpl.names))]
		if joined := tpl.Join(given); joined != "" {
			if again, ok := tpl.Split(joined); !ok || !slices.Equal(again, given) {
				t.Fatalf("%q: %q make %q, which is %q", match, given, joined, again)
			}
		}
	})
}

func TestTemplateMistakes(t *testing.T) {
	for match, want := range map[string]string{
		"report:7":      "no placeholder",
		"":              "no placeholder",
		"r:{id":         "never closed",
		"r:id}":         `write \}`,
		"r:{}":          "no name",
		"r:{a b}":       "letters, digits",
		"r:{1}":         "letters, digits",
		"r:{a}{b}":      "{a}:{b}",
		"r:{a}:{a}":     "twice",
		"r:*:{id}":      `\*`,
		"r:[ab]:{id}":   `\[`,
		`r:{id}\`:       "backslash",
		"{user{id}}":    "letters, digits",
		"r:{id}:{name}": "",
	} {
		_, err := ParseTemplate(match)
		switch {
		case err == nil && want != "":
			t.Errorf("%q is accepted", match)
		case err != nil && (want == "" || !strings.Contains(err.Error(), want)):
			t.Errorf("%q: %v, want %q", match, err, want)
		}
	}
}

func TestMatchColumn(t *testing.T) {
	tpl := parse(t, "report:{id}")
	r, err := NewRouter([]Route{
		{Name: "column", Match: "report:{id}", Template: tpl},
		{Name: "braces", Match: "report:{id}"},
		{Name: "rest", Match: "report:*"},
		{Name: "suffix", Match: "x:{id}:v", Template: parse(t, "x:{id}:v")},
	})
	if err != nil {
		t.Fatal(err)
	}
	for key, want := range map[string]string{
		"report:7": "column", "report:{id}": "column", "report:": "rest", "x:1:v": "suffix", "x:1:v:v": "", "x::v": "", "x:1": "",
	} {
		got := ""
		if route := r.Match([]byte(key)); route != nil {
			got = route.Name
			if route.Column() != (got == "column" || got == "suffix") {
				t.Errorf("%s: Column is %v", got, route.Column())
			}
		}
		if got != want {
			t.Errorf("%q goes to %q, want %q", key, got, want)
		}
	}
	key := []byte("report:123")
	if n := testing.AllocsPerRun(100, func() { r.Match(key) }); n != 0 {
		t.Errorf("Match allocates %v times", n)
	}
}
