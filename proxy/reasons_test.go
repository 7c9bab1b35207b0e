package proxy

import (
	"maps"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// Where the documents say why Redis is not usable they name every reason there is, and no others.
func TestReasonsAreDocumented(t *testing.T) {
	var want []string
	for _, o := range outages {
		if o.dead() {
			want = append(want, string(o))
		}
	}
	slices.Sort(want)
	for _, c := range []struct{ file, from, to string }{
		{"../docs/logs.md", "| warn | `redis is not usable` |", "\n"},
		{"../docs/troubleshooting.md", "### CacheproxyRedisDown", "```"},
	} {
		b, err := os.ReadFile(c.file)
		if err != nil {
			t.Fatal(err)
		}
		_, text, found := strings.Cut(string(b), c.from)
		if !found {
			t.Fatalf("%s has no %q", c.file, c.from)
		}
		text, _, _ = strings.Cut(text, c.to)
		_, text, found = strings.Cut(text, "reason") // what stands before it has words of its own
		if !found {
			t.Fatalf("%s names no reasons", c.file)
		}
		named := map[string]bool{}
		for _, m := range regexp.MustCompile("`([a-z]+)`").FindAllStringSubmatch(strings.TrimPrefix(text, "`"), -1) {
			named[m[1]] = true
		}
		if got := slices.Sorted(maps.Keys(named)); !slices.Equal(got, want) {
			t.Errorf("%s has the reasons\n%q\nand there are\n%q", c.file, got, want)
		}
	}
}
