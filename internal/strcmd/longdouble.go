package strcmd

import (
	"bytes"
	"math/big"
)

// The numbers of this file are C's long doubles on x86-64, the type in which Redis does INCRBYFLOAT there: 64 bits of
// mantissa, exponents from -16382 to 16383, and below that fewer bits down to 2^-16445. A big.Float holds one.
const (
	ldPrecision = 64
	// The bounds of a big.Float's exponent, whose mantissa lies between 0.5 and 1.
	ldMaxExp = 16384
	ldMinExp = -16381
	// ldUnit is the exponent of the smallest number above zero; all others are multiples of it.
	ldUnit = -16445

	// ldMaxChars is the size of Redis's buffer for a number, with the NUL at its end.
	ldMaxChars = 5 * 1024

	// exponentCap replaces every larger exponent: no number of less than ldMaxChars characters can bring it back
	// into range, and sums with it do not overflow.
	exponentCap = 1 << 20
)

// parseLongDouble reads a number as strtold does in the C locale (decimal or hexadecimal, or infinity) and refuses
// what Redis refuses: space before or after it, NaN, and what overflows, or underflows to zero.
func parseLongDouble(s []byte) (x *big.Float, ok bool) {
	if len(s) == 0 || len(s) >= ldMaxChars {
		return nil, false
	}
	x = new(big.Float).SetPrec(ldPrecision)
	neg := s[0] == '-'
	if neg || s[0] == '+' {
		s = s[1:]
	}
	if equalFold(s, "inf") || equalFold(s, "infinity") {
		return x.SetInf(neg), true
	}
	base := 10
	if len(s) > 2 && s[0] == '0' && toLower(s[1]) == 'x' {
		base, s = 16, s[2:]
	}
	digits, exp, ok := scanNumber(s, base)
	if !ok || len(digits) > 0 && !setDigits(x, digits, base, exp) {
		return nil, false
	}
	if neg {
		x.Neg(x)
	}
	return x, true
}

// scanNumber splits a number without sign and prefix into its digits, from the first that is not zero on and without
// the point, and the exponent that puts the point behind the last of them: of 10 for base 10, of 2 for base 16.
func scanNumber(s []byte, base int) (digits []byte, exp int, ok bool) {
	mark, perDigit := byte('e'), 1
	if base == 16 {
		mark, perDigit = 'p', 4
	}
	digits = make([]byte, 0, len(s))
	i, point, some := 0, false, false
	for ; i < len(s); i++ {
		d := toLower(s[i])
		if d == '.' && !point {
			point = true
			continue
		}
		if (d < '0' || d > '9') && (base != 16 || d < 'a' || d > 'f') {
			break
		}
		some = true
		if d != '0' || len(digits) > 0 {
			digits = append(digits, d)
		}
		if point {
			exp -= perDigit
		}
	}
	if !some {
		return nil, 0, false
	}
	if i == len(s) {
		return digits, exp, true
	}
	if toLower(s[i]) != mark {
		return nil, 0, false
	}
	e, ok := scanExponent(s[i+1:])
	return digits, exp + e, ok
}

// scanExponent reads a signed decimal that fills s, capped at exponentCap.
func scanExponent(s []byte) (e int, ok bool) {
	neg := len(s) > 0 && s[0] == '-'
	if neg || len(s) > 0 && s[0] == '+' {
		s = s[1:]
	}
	for _, d := range s {
		if d < '0' || d > '9' {
			return 0, false
		}
		e = min(e*10+int(d-'0'), exponentCap)
	}
	if neg {
		e = -e
	}
	return e, len(s) > 0
}

// setDigits makes x the number that scanNumber has split, rounded once, to nearest and to even. It tells whether
// the number is in range and not rounded to zero. x has its precision and is zero; digits are not empty and begin with
// one that is not zero.
func setDigits(x *big.Float, digits []byte, base, exp int) bool {
	// Far out of range there is no need for huge powers: at least base^(len-1), less than base^len.
	if base == 10 && (exp+len(digits)-1 > 4932 || exp+len(digits) < -4951) ||
		base == 16 && (exp+4*(len(digits)-1) > ldMaxExp || exp+4*len(digits) < ldUnit-1) {
		return false
	}
	num, _ := new(big.Int).SetString(string(digits), base)
	den := big.NewInt(1)
	scale := num
	if exp < 0 {
		scale, exp = den, -exp
	}
	if base == 10 {
		scale.Mul(scale, new(big.Int).Exp(big.NewInt(10), big.NewInt(int64(exp)), nil))
	} else {
		scale.Lsh(scale, uint(exp))
	}

	x.Quo(new(big.Float).SetInt(num), new(big.Float).SetInt(den))
	switch e := x.MantExp(nil); {
	case e > ldMaxExp:
		return false
	case e >= ldMinExp:
		return true
	}
	// Too small for all the bits: round the exact number, not the rounded one, to a multiple of the unit.
	q, r := new(big.Int).QuoRem(num.Lsh(num, -ldUnit), den, new(big.Int))
	if c := r.Lsh(r, 1).Cmp(den); c > 0 || c == 0 && q.Bit(0) == 1 {
		q.Add(q, big.NewInt(1))
	}
	x.SetInt(q)
	x.SetMantExp(x, ldUnit)
	return q.Sign() != 0
}

// addLongDouble returns x+y, and false if that is not a finite number. Below the smallest full exponent sums are exact,
// because all numbers there are multiples of one unit.
func addLongDouble(x, y *big.Float) (sum *big.Float, finite bool) {
	if x.IsInf() || y.IsInf() {
		return nil, false
	}
	sum = new(big.Float).SetPrec(ldPrecision).Add(x, y)
	return sum, sum.MantExp(nil) <= ldMaxExp
}

// appendLongDouble writes x with up to 17 decimals and without trailing zeros, never with an exponent and never as minus
// zero.
func appendLongDouble(dst []byte, x *big.Float) []byte {
	text := bytes.TrimRight(x.Append(nil, 'f', 17), "0")
	text = bytes.TrimSuffix(text, []byte("."))
	if string(text) == "-0" {
		text = text[1:]
	}
	return append(dst, text...)
}
