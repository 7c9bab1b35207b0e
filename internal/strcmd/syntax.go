package strcmd

import (
	"bytes"
	"math"

	"cacheproxy/policy"
)

func toLower(b byte) byte {
	if 'A' <= b && b <= 'Z' {
		return b + 'a' - 'A'
	}
	return b
}

// equalFold compares b with an ASCII word in lower case, ignoring the case of b. Other letters than ASCII never fold.
func equalFold(b []byte, word string) bool {
	if len(b) != len(word) {
		return false
	}
	for i := range b {
		if toLower(b[i]) != word[i] {
			return false
		}
	}
	return true
}

// cString is what C sees of an argument: the bytes before the first NUL. Redis compares options, but not names, keys
// and numbers, as C strings.
func cString(b []byte) []byte {
	if i := bytes.IndexByte(b, 0); i >= 0 {
		return b[:i]
	}
	return b
}

// parseInt reads an integer in the one form that Redis itself would write: no plus, no space, no leading zero,
// no minus zero.
func parseInt(b []byte) (n int64, ok bool) {
	digits := b
	neg := len(b) > 0 && b[0] == '-'
	if neg {
		digits = b[1:]
	}
	if len(digits) == 1 && digits[0] == '0' && !neg {
		return 0, true
	}
	if len(digits) == 0 || len(digits) > len("9223372036854775808") || digits[0] == '0' {
		return 0, false
	}
	var u uint64 // nineteen digits fit
	for _, d := range digits {
		if d < '0' || d > '9' {
			return 0, false
		}
		u = u*10 + uint64(d-'0')
	}
	switch {
	case neg && u <= -math.MinInt64:
		return -int64(u), true
	case !neg && u <= math.MaxInt64:
		return int64(u), true
	}
	return 0, false
}

// unit is a closed list: how a time is given, as a span (in) or as Unix time (at).
type unit uint8

const (
	noUnit unit = iota
	inSeconds
	inMillis
	atSeconds
	atMillis
)

func (u unit) seconds() bool  { return u == inSeconds || u == atSeconds }
func (u unit) relative() bool { return u == inSeconds || u == inMillis }

// options are those of SET and GETEX.
type options struct {
	nx, xx, get, keepTTL, persist bool

	unit unit
	time []byte // with a unit: not yet looked at
}

// optionSet is a closed list: whose options are read.
type optionSet uint8

const (
	forSet optionSet = iota
	forGetEX
)

// parseOptions reads args, the options of SET or GETEX. Like Redis it lets an option be repeated, with
// the last time winning and the earlier ones unread, and calls every conflict a syntax error.
func parseOptions(args [][]byte, set optionSet) (o options, bad fault) {
	for i := 0; i < len(args); i++ {
		opt := cString(args[i])
		var u unit
		switch {
		case set == forSet && equalFold(opt, "nx") && !o.xx:
			o.nx = true
			continue
		case set == forSet && equalFold(opt, "xx") && !o.nx:
			o.xx = true
			continue
		case set == forSet && equalFold(opt, "get"):
			o.get = true
			continue
		case set == forSet && equalFold(opt, "keepttl") && o.unit == noUnit:
			o.keepTTL = true
			continue
		case set == forGetEX && equalFold(opt, "persist") && o.unit == noUnit:
			o.persist = true
			continue
		case equalFold(opt, "ex"):
			u = inSeconds
		case equalFold(opt, "px"):
			u = inMillis
		case equalFold(opt, "exat"):
			u = atSeconds
		case equalFold(opt, "pxat"):
			u = atMillis
		}
		i++ // the time
		if u == noUnit || i == len(args) || o.keepTTL || o.persist || (o.unit != noUnit && o.unit != u) {
			return options{}, faultSyntax
		}
		o.unit, o.time = u, args[i]
	}
	return o, ""
}

// lifetime reads the time of SET, SETEX, PSETEX and GETEX, which is never zero or negative.
func (c *call) lifetime(u unit, arg []byte) (policy.Expiry, fault) {
	ms, ok := parseInt(arg)
	if !ok {
		return policy.Expiry{}, faultNotInteger
	}
	if ms <= 0 || (u.seconds() && ms > math.MaxInt64/1000) {
		return policy.Expiry{}, c.faultExpireTime()
	}
	if u.seconds() {
		ms *= 1000
	}
	if !u.relative() {
		return policy.Expiry{Kind: policy.ExpiresAt, MS: ms}, ""
	}
	if ms > math.MaxInt64-c.env.NowMS {
		return policy.Expiry{}, c.faultExpireTime()
	}
	return policy.Expiry{Kind: policy.ExpiresIn, MS: ms}, ""
}
