package samejson

import "testing"

func TestEqual(t *testing.T) {
	for _, c := range []struct {
		a, b string
		want bool
	}{
		{`{"b": 1,"a":2}`, `{"a": 2, "b": 1}`, true},
		{`{"a":1,"a":2}`, `{"a": 2}`, true},
		{`{"a":1}`, `{"a":1,"b":null}`, false},
		{`[1,2]`, `[2,1]`, false},
		{`[1]`, `{"0":1}`, false},
		{`1e5`, `100000`, true},
		{`1E-5`, `0.00001`, true},
		{`1.50e2`, `150`, true},
		{`1.0`, `1`, true},
		{`-0.0`, `0`, true},
		{`-1`, `1`, false},
		{`12345678901234567890123456789`, `12345678901234567890123456788`, false},
		{`0.1e1`, `1`, true},
		{`10`, `1`, false},
		{`1e131071`, `1e131070`, false},
		{`"\u0041\/\u00e9"`, `"A/é"`, true},
		{`"1"`, `1`, false},
		{`null`, `false`, false},
		{` null `, `null`, true},
		{`hello`, `hello`, false},
		{`1 2`, `1`, false},
		{`1`, `1 2`, false},
		{``, ``, false},
	} {
		if got := Equal([]byte(c.a), []byte(c.b)); got != c.want {
			t.Errorf("%s and %s: %v", c.a, c.b, got)
		}
		if got := Equal([]byte(c.b), []byte(c.a)); got != c.want {
			t.Errorf("%s and %s: %v", c.b, c.a, got)
		}
	}
}
