package said

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// lines are the levels and messages of all lines that the sources below a folder may write, and what else there is to say against them.
func lines(t *testing.T, root string) (said map[string]bool, wrong []string) {
	t.Helper()
	said = map[string]bool{}
	levels := map[string]string{"Debug": "debug", "Info": "info", "Warn": "warn", "Error": "error", "DPanic": "", "Panic": "", "Fatal": "", "Log": "", "Check": ""}
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && path != root && (d.Name()[0] == '.' || d.Name() == "testdata" || d.Name() == "test" || d.Name() == "tools" || d.Name() == "said") {
			return fs.SkipDir
		}
		if d.IsDir() || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") || strings.HasSuffix(path, "wrong_on.go") {
			return nil
		}
		set := token.NewFileSet()
		f, err := parser.ParseFile(set, path, nil, 0)
		if err != nil {
			return err
		}
		ast.Inspect(f, func(n ast.Node) bool {
			call, ok := n.(*ast.CallExpr)
			if !ok {
				return true
			}
			fun, ok := call.Fun.(*ast.SelectorExpr)
			if !ok {
				return true
			}
			bad := func(what string) { wrong = append(wrong, set.Position(call.Pos()).String()+": "+what) }
			if on, ok := fun.X.(*ast.Ident); ok && on.Name == "zap" {
				switch fun.Sel.Name {
				case "Any", "Reflect", "Object", "Inline", "ByteString", "ByteStrings", "Binary", "NamedError", "Errors", "NewStdLog", "RedirectStdLog", "S", "L", "Dict", "Array":
					bad("zap." + fun.Sel.Name + " writes whatever it is given")
				}
			}
			if fun.Sel.Name == "Sugar" {
				bad("a sugared logger writes whatever it is given")
			}
			level, isLine := levels[fun.Sel.Name]
			if !isLine || !isLog(fun.X) {
				return true
			}
			if len(call.Args) == 0 || level == "" {
				bad("no " + fun.Sel.Name + " here")
				return true
			}
			lit, ok := call.Args[0].(*ast.BasicLit)
			if !ok {
				bad("the message is no literal")
				return true
			}
			message, _ := strconv.Unquote(lit.Value)
			said[level+" "+message] = true
			return true
		})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return said, wrong
}

// isLog: an expression that ends in log or Log is a logger here.
func isLog(x ast.Expr) bool {
	switch x := x.(type) {
	case *ast.Ident:
		return strings.EqualFold(x.Name, "log")
	case *ast.SelectorExpr:
		return strings.EqualFold(x.Sel.Name, "log")
	case *ast.CallExpr:
		fun, ok := x.Fun.(*ast.SelectorExpr)
		return ok && isLog(fun.X) // With, Named
	}
	return false
}

// docs/logs.md names every line with its level, and no others.
func TestEveryLineIsDocumented(t *testing.T) {
	b, err := os.ReadFile("../../docs/logs.md")
	if err != nil {
		t.Fatal(err)
	}
	documented := map[string]bool{}
	for _, m := range regexp.MustCompile("(?m)^\\| (debug|info|warn|error) \\| `+ ?(.*?) ?`+ \\|").FindAllStringSubmatch(string(b), -1) {
		documented[m[1]+" "+m[2]] = true
	}
	said, wrong := lines(t, "../..")
	for _, w := range wrong {
		t.Error(w)
	}
	if len(said) < 20 {
		t.Errorf("only %d lines were found", len(said))
	}
	for _, l := range slices.Sorted(maps.Keys(said)) {
		if !documented[l] {
			t.Errorf("not in docs/logs.md: %s", l)
		}
	}
	for _, l := range slices.Sorted(maps.Keys(documented)) {
		if !said[l] {
			t.Errorf("docs/logs.md has what nobody says: %s", l)
		}
	}
}

// What TestEveryLineIsDocumented must find.
func TestLinesAreFound(t *testing.T) {
	dir := t.TempDir()
	src := `package p
func f() {
	log.Info("one")
	s.e.log.Warn("two", zap.Error(err))
	s.cfg.Log.With(x).Error("three", zap.Any("key", key))
	p.log.Debug(text)
	p.log.Fatal("four")
	p.log.Sugar().Infof("%s", key)
	w.Error("not a log")
}`
	if err := os.WriteFile(filepath.Join(dir, "p.go"), []byte(src), 0o600); err != nil {
		t.Fatal(err)
	}
	said, wrong := lines(t, dir)
	if got, want := slices.Sorted(maps.Keys(said)), []string{"error three", "info one", "warn two"}; !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
	if len(wrong) != 4 {
		t.Errorf("%q", wrong)
	}
}
