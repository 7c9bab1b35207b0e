// Package samejson tells whether two texts are the same JSON value. A column of type jsonb keeps the value and not the text: it orders
// names, drops what is named twice, and prints numbers and escapes in its own way.
package samejson

import (
	"bytes"
	"encoding/json"
	"io"
	"strconv"
	"strings"
)

// Equal tells whether a and b are JSON and the same value: objects whatever the order of their names (of one that is there twice the last
// counts), numbers by what they are worth, strings by their characters.
func Equal(a, b []byte) bool {
	if bytes.Equal(a, b) {
		return json.Valid(a)
	}
	x, ok := decode(a)
	if !ok {
		return false
	}
	y, ok := decode(b)
	return ok && same(x, y)
}

func decode(text []byte) (v any, ok bool) {
	d := json.NewDecoder(bytes.NewReader(text))
	d.UseNumber()
	if d.Decode(&v) != nil {
		return nil, false
	}
	_, err := d.Token() // nothing may follow
	return v, err == io.EOF
}

func same(a, b any) bool {
	switch a := a.(type) {
	case map[string]any:
		b, ok := b.(map[string]any)
		if !ok || len(a) != len(b) {
			return false
		}
		for name, v := range a {
			w, there := b[name]
			if !there || !same(v, w) {
				return false
			}
		}
		return true
	case []any:
		b, ok := b.([]any)
		if !ok || len(a) != len(b) {
			return false
		}
		for i := range a {
			if !same(a[i], b[i]) {
				return false
			}
		}
		return true
	case json.Number:
		b, ok := b.(json.Number)
		return ok && worth(string(a)) == worth(string(b))
	}
	return a == b // string, bool or nil
}

// number is what a JSON number is worth: 0.digits times ten to the power of exp, digits without zeros at either end. Zero is all empty, and has
// no sign, as in Postgres.
type number struct {
	minus  bool
	digits string
	exp    int64
}

func worth(text string) number {
	rest, minus := strings.CutPrefix(text, "-")
	mantissa, power := rest, ""
	if i := strings.IndexAny(rest, "eE"); i >= 0 {
		mantissa, power = rest[:i], rest[i+1:]
	}
	whole, fraction, _ := strings.Cut(mantissa, ".")
	digits := strings.TrimLeft(whole+fraction, "0")
	zeros := len(whole) + len(fraction) - len(digits)
	digits = strings.TrimRight(digits, "0")
	if digits == "" {
		return number{}
	}
	// What does not fit 64 bits no jsonb can hold; it is told apart from everything that fits.
	exp, _ := strconv.ParseInt(power, 10, 64)
	return number{minus, digits, exp + int64(len(whole)-zeros)}
}
