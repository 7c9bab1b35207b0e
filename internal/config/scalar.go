package config

import (
	"cmp"
	"fmt"
	"math"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Size is a number of bytes, written with a unit: 64MiB, 512mb.
type Size int64

// The units of Size.
const (
	KiB Size = 1 << 10
	MiB Size = 1 << 20
	GiB Size = 1 << 30
	TiB Size = 1 << 40
)

// units are Redis's (k is 1000, kb is 1024, as in redis.conf), the IEC names, and b.
var units = map[string]Size{
	"b": 1,
	"k": 1e3, "kb": KiB, "kib": KiB,
	"m": 1e6, "mb": MiB, "mib": MiB,
	"g": 1e9, "gb": GiB, "gib": GiB,
	"t": 1e12, "tb": TiB, "tib": TiB,
}

// String is the size in the largest unit that divides it.
func (s Size) String() string {
	for _, u := range []struct {
		size Size
		name string
	}{{TiB, "TiB"}, {GiB, "GiB"}, {MiB, "MiB"}, {KiB, "KiB"}} {
		if s != 0 && s%u.size == 0 {
			return fmt.Sprintf("%d%s", s/u.size, u.name)
		}
	}
	return fmt.Sprintf("%dB", int64(s))
}

// MarshalYAML writes the size as Load reads it.
func (s Size) MarshalYAML() (any, error) { return s.String(), nil }

// Fraction is a share between 0 and 1, written as 0.1 or 10%.
type Fraction float64

// String is the fraction in per cent.
func (f Fraction) String() string {
	return strconv.FormatFloat(float64(f)*100, 'g', 12, 64) + "%"
}

// MarshalYAML writes the fraction as Load reads it.
func (f Fraction) MarshalYAML() (any, error) { return f.String(), nil }

// scalar is a value before its type is known.
type scalar struct {
	text string
	// tag is YAML's opinion of the text (!!int, !!str, …); empty for a text from elsewhere, which
	// has no quotes that could make a number a text.
	tag string
}

// mistake is what is wrong with a value and what to do about it.
type mistake struct{ problem, remedy string }

var (
	durationType = reflect.TypeFor[time.Duration]()
	sizeType     = reflect.TypeFor[Size]()
	fractionType = reflect.TypeFor[Fraction]()
)

// parse reads s as the setting f wants it and holds it against f's words and bounds.
func parse(f reflect.StructField, s scalar) (reflect.Value, *mistake) {
	if s.tag == "!!null" {
		return reflect.Value{}, &mistake{"has no value", "write one, or remove the key to get the default"}
	}
	var (
		v   any
		bad *mistake
	)
	switch {
	case f.Type == durationType:
		v, bad = within(f, s.text, durationIn(f))
	case f.Type == sizeType:
		v, bad = within(f, s.text, parseSize)
	case f.Type == fractionType:
		v, bad = parseFraction(s.text)
	case f.Type.Kind() == reflect.Int:
		if s.tag == "!!str" {
			return reflect.Value{}, notANumber(s.text)
		}
		v, bad = within(f, s.text, parseInt)
	case f.Type.Kind() == reflect.Bool:
		v, bad = parseBool(s)
	default:
		v, bad = parseText(f, s.text)
	}
	if bad != nil {
		return reflect.Value{}, bad
	}
	return reflect.ValueOf(v), nil
}

// within parses a number-like setting and checks its min and max tags, which are written in the
// setting's own notation.
func within[T ~int | ~int64](f reflect.StructField, text string, parse func(string) (T, *mistake)) (T, *mistake) {
	v, bad := parse(text)
	if bad != nil {
		return 0, bad
	}
	if low, ok := f.Tag.Lookup("min"); ok {
		if bound, bad := parse(low); bad == nil && v < bound {
			return 0, &mistake{"is below the minimum of " + low, "write " + low + " or more"}
		}
	}
	if high, ok := f.Tag.Lookup("max"); ok {
		if bound, bad := parse(high); bad == nil && v > bound {
			return 0, &mistake{"is above the maximum of " + high, "write " + high + " or less"}
		}
	}
	return v, nil
}

// durationIn parses a duration. Who forgets the unit is told the one of the default.
func durationIn(f reflect.StructField) func(string) (time.Duration, *mistake) {
	unit := cmp.Or(f.Tag.Get("unit"), "s")
	return func(text string) (time.Duration, *mistake) { return parseDuration(text, unit) }
}

func parseDuration(text, unit string) (time.Duration, *mistake) {
	if text == "0" {
		return 0, nil
	}
	if n, err := strconv.ParseFloat(text, 64); err == nil {
		if n < 0 {
			return 0, &mistake{"must not be negative", "write a duration such as 30s"}
		}
		return 0, &mistake{fmt.Sprintf("%q has no unit", text), fmt.Sprintf("did you mean %s%s?", text, unit)}
	}
	d, err := time.ParseDuration(text)
	if err != nil {
		if days, isDays := strings.CutSuffix(text, "d"); isDays {
			if n, err := strconv.Atoi(days); err == nil && n > 0 && n < 1e5 {
				return 0, &mistake{fmt.Sprintf("%q: the day is not a unit", text), fmt.Sprintf("did you mean %dh?", n*24)}
			}
		}
		return 0, &mistake{fmt.Sprintf("%q is not a duration", text), "write a number and a unit: 250ms, 30s, 5m, 1h"}
	}
	if d < 0 {
		return 0, &mistake{"must not be negative", "write a duration such as 30s"}
	}
	if d%time.Millisecond != 0 {
		return 0, &mistake{fmt.Sprintf("%q is finer than a millisecond", text), "round it to milliseconds, as Redis does"}
	}
	return d, nil
}

func parseSize(text string) (Size, *mistake) {
	if text == "" || text == "0" {
		return 0, nil
	}
	digits := strings.TrimRight(text, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
	unit := strings.ToLower(text[len(digits):])
	n, err := strconv.ParseInt(strings.TrimSpace(digits), 10, 64)
	switch {
	case err != nil:
		return 0, &mistake{fmt.Sprintf("%q is not a size", text), "write a whole number and a unit: 512mb, 64MiB, 1GiB"}
	case n < 0:
		return 0, &mistake{"must not be negative", "write a size such as 64MiB"}
	case unit == "":
		return 0, &mistake{fmt.Sprintf("%q has no unit", text), fmt.Sprintf("did you mean %smb? (%sb is bytes)", text, text)}
	}
	u, ok := units[unit]
	if !ok {
		return 0, &mistake{fmt.Sprintf("%q: unknown unit", text), "use kb, mb, gb, tb or KiB, MiB, GiB, TiB"}
	}
	if n > math.MaxInt64/int64(u) {
		return 0, &mistake{fmt.Sprintf("%q is more than can be counted", text), "write a smaller size"}
	}
	return Size(n) * u, nil
}

func parseFraction(text string) (Fraction, *mistake) {
	digits, percent := strings.CutSuffix(text, "%")
	n, err := strconv.ParseFloat(strings.TrimSpace(digits), 64)
	if err != nil || math.IsNaN(n) {
		return 0, &mistake{fmt.Sprintf("%q is not a share", text), "write 10% or 0.1"}
	}
	if percent {
		n /= 100
	}
	switch {
	case n >= 0 && n <= 1:
		return Fraction(n), nil
	case !percent && n > 1 && n <= 100:
		return 0, &mistake{"is outside 0 to 100 %", fmt.Sprintf("did you mean %s%%?", text)}
	}
	return 0, &mistake{"is outside 0 to 100 %", "write a share such as 10% or 0.1"}
}

func parseInt(text string) (int, *mistake) {
	n, err := strconv.Atoi(text)
	if err != nil {
		return 0, notANumber(text)
	}
	return n, nil
}

func notANumber(text string) *mistake {
	if _, err := strconv.Atoi(text); err == nil {
		return &mistake{"is a text and should be a whole number", "remove the quotes"}
	}
	return &mistake{fmt.Sprintf("%q is not a whole number", text), "write digits only"}
}

func parseBool(s scalar) (bool, *mistake) {
	if s.tag == "!!bool" || s.tag == "" {
		switch s.text {
		case "true", "True", "TRUE":
			return true, nil
		case "false", "False", "FALSE":
			return false, nil
		}
	}
	return false, &mistake{fmt.Sprintf("%q is neither true nor false", s.text), "write true or false, without quotes"}
}

func parseText(f reflect.StructField, text string) (string, *mistake) {
	if strings.ContainsRune(text, 0) {
		return "", &mistake{"contains a NUL byte", "remove it"}
	}
	list, ok := f.Tag.Lookup("words")
	if !ok {
		return text, nil
	}
	words := strings.Fields(list)
	if slices.Contains(words, text) {
		return text, nil
	}
	remedy := "write " + anyOf(words)
	if w := didYouMean(text, words); w != "" {
		remedy = fmt.Sprintf("did you mean %s? (%s)", w, anyOf(words))
	} else if _, err := strconv.Atoi(text); err == nil {
		for _, w := range words {
			if strings.HasSuffix(w, text) {
				remedy = fmt.Sprintf("did you mean %s? (%s)", w, anyOf(words))
			}
		}
	}
	return "", &mistake{fmt.Sprintf("unknown word %q", text), remedy}
}
