package proxy_test

import (
	"go/parser"
	"go/token"
	"io/fs"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// may is the import graph as a policy: which packages of this module the non-test files of a folder may import. A folder
// takes the rule of the nearest folder above that has one. "std" forbids everything that is not the standard library.
var may = map[string][]string{
	"policy":            {"std"},
	"proxy":             {"policy", "internal/command", "internal/said", "internal/samejson", "internal/strcmd"},
	"fallback":          {"policy"},
	"internal/bridge":   {"policy", "proxy", "fallback"},
	"internal/command":  {},
	"internal/said":     {},
	"internal/samejson": {"std"},
	"internal/strcmd":   {"policy"},
	"internal":          {"policy", "proxy", "internal/"},
	"cmd":               {"policy", "proxy", "fallback", "internal/", ""},
	"test/bench":        {"internal/devserver"},
	"test/deploy":       {"internal/devserver", "internal/testenv"},
	"test/model":        {"std", "policy"},
	"test/clients":      {"test/clients/step"}, // they are somebody else's programs
}

func TestImportGraph(t *testing.T) {
	const module = "cacheproxy"
	seen := map[string]bool{}
	uses := map[string]map[string]bool{} // folder: what it imports
	err := filepath.WalkDir("..", func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && path != ".." && (d.Name()[0] == '.' || d.Name() == "testdata" || d.Name() == "tools") {
			return fs.SkipDir
		}
		if d.IsDir() || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
			return nil
		}
		dir, _ := filepath.Rel("..", filepath.Dir(path))
		dir = filepath.ToSlash(dir)
		rule, top := []string(nil), dir
		for ; top != "."; top = filepath.ToSlash(filepath.Dir(top)) {
			if r, ok := may[top]; ok {
				rule = r
				break
			}
		}
		if top == "." {
			rule = nil
		}
		seen[top] = true
		f, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.ImportsOnly)
		if err != nil {
			return err
		}
		if uses[dir] == nil {
			uses[dir] = map[string]bool{}
		}
		for _, spec := range f.Imports {
			name, _ := strconv.Unquote(spec.Path.Value)
			inner, ours := strings.CutPrefix(name, module+"/")
			if name == module {
				inner, ours = "", true
			}
			if !ours {
				if slices.Contains(rule, "std") && strings.Contains(strings.SplitN(name, "/", 2)[0], ".") {
					t.Errorf("%s imports %s: only the standard library is allowed there", path, name)
				}
				continue
			}
			uses[dir][inner] = true
			if inner == top || strings.HasPrefix(inner, top+"/") {
				continue
			}
			if !slices.ContainsFunc(rule, func(r string) bool { return r == inner || strings.HasSuffix(r, "/") && strings.HasPrefix(inner, r) }) {
				t.Errorf("%s imports %s, which %s must not", path, name, dir)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for dir := range may {
		if !seen[dir] {
			t.Errorf("there is no folder %s any more", dir)
		}
	}
	for dir, of := range uses {
		if of["proxy"] && of["fallback"] && dir != "internal/bridge" && !strings.HasPrefix(dir, "cmd/") {
			t.Errorf("%s introduces proxy and fallback to each other, which is for cmd and internal/bridge", dir)
		}
	}
}
