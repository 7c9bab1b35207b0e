package policy

import (
	"strings"
	"testing"
)

func TestParseTable(t *testing.T) {
	for text, want := range map[string]string{
		"public.reports":            "public|reports",
		"reports":                   "public|reports",
		"App.Reports":               "App|Reports",
		`"my app"."a.b"`:            "my app|a.b",
		`"a""b".c`:                  `a"b|c`,
		`"reports"`:                 "public|reports",
		"":                          "-",
		".":                         "-",
		"a.":                        "-",
		".b":                        "-",
		"a.b.c":                     "-",
		`"a`:                        "-",
		`"a"b`:                      "-",
		`""`:                        "-",
		strings.Repeat("x", 64):     "-",
		"a\x00b":                    "-",
		"\xff":                      "-",
		`"a"."`:                     "-",
		"a." + `"b"` + ".":          "-",
		strings.Repeat("x", 63):     "public|" + strings.Repeat("x", 63),
		`"` + "a" + `".` + `"b""c"`: `a|b"c`,
	} {
		got := "-"
		if schema, table, err := ParseTable(text); err == nil {
			got = schema + "|" + table
		}
		if got != want {
			t.Errorf("%s is %s, want %s", text, got, want)
		}
	}
}
