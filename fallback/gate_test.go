package fallback

import (
	"encoding/json"
	"strings"
	"testing"
	"unicode/utf8"
)

var gatePasses = []string{
	`{"b": 1,"a":2,   "aa":3, "A":4}`, `{"a":1,"a":2}`, `1.0`, `1.10`, `1e5`, `1E-5`, `1.50e2`, `1e+5`,
	`-0`, `-0.0`, `0.0e-3`, `12345678901234567890123456789`, `"\u0041\/\u00e9"`, `"\u007f"`, "\"\x7f\"",
	`"\ud83d\ude00"`, `"\u0001\b\f\n\r\t\"\\"`, `""`, `{}`, `[]`, `[{}]`, `[ ]`, `{ }`, `null`, `true`, `false`,
	"\t\r\n 1 \n", `{"a":{"b":[1,[2,{"c":null}]]}}`, `1e308`, `1e-308`, `1e000000000000000000000308`,
	`"é😀"`, "\"\ufffe\"", `{"":""}`, `[1,2 , 3]`, `{"a" : 1 , "b":2}`,
	strings.Repeat("[", gateDepth) + strings.Repeat("]", gateDepth),
	"0." + strings.Repeat("0", gateDigits-3) + "1",
	strings.Repeat("9", gateDigits),
}

var gateRefuses = []string{
	``, ` `, `hello`, `007`, `+1`, `.5`, `1.`, `1e`, `1e+`, `-`, `--1`, `NaN`, `Infinity`, `-Infinity`, `tru`, `nul`, `falsee`,
	`"`, `"a`, `"\x"`, `"\u12"`, `"\u12g4"`, `"\`, "\"\n\"", "\"\x01\"", "\x00", "1\x00", "\"\x00\"",
	`"\u0000"`, `{"\u0000":1}`, `"\ud83d"`, `"\ude00"`, `"\ude00\ud83d"`, `"\ud83d\u0041"`, `"\ud83d\n"`, `"\ud83dx\ude00"`,
	`"\ud83d\ud83d\ude00"`, `"\ud83d\`, `"\ud83d\u`,
	"\"\xff\"", "\"\xed\xa0\x80\"", "\xef\xbb\xbf1",
	`1e309`, `1e-309`, `1e131071`, `1e131072`, `1e-16384`, `1e99999999999999999999999999`,
	strings.Repeat("9", gateDigits+1),
	strings.Repeat("[", gateDepth+1) + strings.Repeat("]", gateDepth+1),
	strings.Repeat("[", 20000) + strings.Repeat("]", 20000),
	`[`, `]`, `{`, `}`, `[1`, `[1,]`, `[,1]`, `[1 2]`, `{"a"}`, `{"a":}`, `{"a":1,}`, `{,}`, `{a:1}`, `{1:2}`, `[}`, `{]`, `[1}`, `{"a":1]`,
	`1 2`, `{} x`, `'a'`, `[1]]`, `{"a" 1}`,
	`[` + strings.TrimSuffix(strings.Repeat("1e131071,", 10000), ",") + `]`,
	`[` + strings.TrimSuffix(strings.Repeat("1e308,", 300000), ",") + `]`,
	`[` + strings.TrimSuffix(strings.Repeat("1,", gateNodes+1), ",") + `]`,
	`"` + strings.Repeat("a", gateSize) + `"`,
}

func TestGate(t *testing.T) {
	for _, v := range gatePasses {
		if _, ok := gate([]byte(v)); !ok {
			t.Errorf("refused: %.60q", v)
		}
		if !json.Valid([]byte(v)) {
			t.Errorf("not JSON in the first place: %.60q", v)
		}
	}
	for _, v := range gateRefuses {
		if _, ok := gate([]byte(v)); ok {
			t.Errorf("passed: %.60q", v)
		}
	}
	if _, ok := gate([]byte(`"` + strings.Repeat("a", gateSize-2) + `"`)); !ok {
		t.Error("the largest document was refused")
	}
}

// The server is the oracle: what the gate lets through, it parses, prints within the promised size, and
// compares with itself. One connection, one database for the whole run.
func FuzzGate(f *testing.F) {
	for _, v := range gatePasses {
		f.Add([]byte(v))
	}
	for _, v := range gateRefuses {
		if len(v) < 1<<16 {
			f.Add([]byte(v))
		}
	}
	s := open(f)
	f.Fuzz(func(t *testing.T, value []byte) {
		size, ok := gate(value)
		if !ok {
			return
		}
		if !json.Valid(value) || !utf8.Valid(value) {
			t.Fatalf("the gate passed what is not JSON: %q", value)
		}
		var printed int
		var again bool
		err := s.pool.QueryRow(t.Context(), `SELECT octet_length(j::text), j::text::jsonb = j FROM (SELECT $1::text::jsonb AS j) v`,
			string(value)).Scan(&printed, &again)
		if err != nil {
			t.Fatalf("the server refused %q: %v", value, err)
		}
		if printed > size {
			t.Fatalf("%q prints %d bytes, expected at most %d", value, printed, size)
		}
		if !again {
			t.Fatalf("%q is not equal to what it prints", value)
		}
	})
}
