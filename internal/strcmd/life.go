package strcmd

import (
	"math"
	"strings"

	"cacheproxy/policy"
)

// expireOptions are those of EXPIRE and its kin.
type expireOptions struct{ nx, xx, gt, lt bool }

func parseExpireOptions(args [][]byte) (o expireOptions, bad fault) {
	for _, arg := range args {
		switch opt := cString(arg); {
		case equalFold(opt, "nx"):
			o.nx = true
		case equalFold(opt, "xx"):
			o.xx = true
		case equalFold(opt, "gt"):
			o.gt = true
		case equalFold(opt, "lt"):
			o.lt = true
		default:
			return o, faultUnsupported(opt)
		}
	}
	switch {
	case o.nx && (o.xx || o.gt || o.lt):
		return o, faultExpireNX
	case o.gt && o.lt:
		return o, faultExpireGTLT
	}
	return o, ""
}

// faultUnsupported quotes the option as Redis does, which must not break the line: line ends at its end are cut
// and those within it become spaces.
func faultUnsupported(opt []byte) fault {
	text := strings.TrimRight(string(opt), "\r\n")
	return fault("ERR Unsupported option " + lineEnds.Replace(text))
}

var lineEnds = strings.NewReplacer("\r", " ", "\n", " ")

// parseExpire is of EXPIRE, PEXPIRE, EXPIREAT and PEXPIREAT. Any time is fine that does not overflow, also one
// that is past.
func parseExpire(c *call) (bad fault) {
	if c.expireOptions, bad = parseExpireOptions(c.args[3:]); bad != "" {
		return bad
	}
	ms, ok := parseInt(c.args[2])
	if !ok {
		return faultNotInteger
	}
	if c.cmd.unit.seconds() {
		if ms > math.MaxInt64/1000 || ms < math.MinInt64/1000 {
			return c.faultExpireTime()
		}
		ms *= 1000
	}
	if !c.cmd.unit.relative() {
		c.expiry = policy.Expiry{Kind: policy.ExpiresAt, MS: ms}
		return ""
	}
	if ms > math.MaxInt64-c.env.NowMS {
		return c.faultExpireTime()
	}
	c.expiry = policy.Expiry{Kind: policy.ExpiresIn, MS: ms}
	return ""
}

// runExpire is EXPIRE, PEXPIRE, EXPIREAT and PEXPIREAT.
func runExpire(c *call) fault {
	v := c.value(0)
	done := v.Exists && c.expireAllowed(v)
	if done {
		c.live(v, c.expiry)
	}
	c.replyFlag(done)
	return ""
}

// expireAllowed asks NX, XX, GT and LT. A key without an expiry counts as one that lives for ever.
func (c *call) expireAllowed(v Value) bool {
	// Spans are compared with spans and times with times: the two clocks need not agree.
	now := v.TTL
	if c.expiry.Kind == policy.ExpiresAt {
		now = v.ExpireAt
	}
	o, next := c.expireOptions, c.expiry.MS
	if now < 0 {
		return !o.xx && !o.gt
	}
	return !o.nx && (!o.gt || next > now) && (!o.lt || next < now)
}

// live gives the only key, which holds v, another life.
func (c *call) live(v Value, e policy.Expiry) {
	past := e.Kind == policy.ExpiresIn && e.MS <= 0 || e.Kind == policy.ExpiresAt && e.MS <= c.env.NowMS
	switch {
	case past:
		c.effect[0] = Effect{Op: Delete}
	case !v.Other:
		c.effect[0] = Effect{Op: Put, Data: v.Data, Expiry: e}
	}
}

func runPersist(c *call) fault {
	v := c.value(0)
	done := v.Exists && v.TTL >= 0
	if done {
		c.live(v, policy.Expiry{Kind: policy.NoExpiry})
	}
	c.replyFlag(done)
	return ""
}
