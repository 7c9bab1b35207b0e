package strcmd

import (
	"math"
	"strconv"

	"cacheproxy/policy"
)

// parseIncr is of INCR and INCRBY.
func parseIncr(c *call) fault {
	c.number = 1
	if len(c.args) > 2 {
		var ok bool
		if c.number, ok = parseInt(c.args[2]); !ok {
			return faultNotInteger
		}
	}
	return ""
}

// parseDecr is of DECR and DECRBY.
func parseDecr(c *call) fault {
	if bad := parseIncr(c); bad != "" {
		return bad
	}
	if c.number == math.MinInt64 {
		return faultDecrOverflow
	}
	c.number = -c.number
	return ""
}

// runIncr is INCR, INCRBY, DECR and DECRBY.
func runIncr(c *call) fault {
	v, bad := c.text()
	if bad != "" {
		return bad
	}
	var n int64
	if v.Exists {
		var ok bool
		if n, ok = parseInt(v.Data); !ok {
			return faultNotInteger
		}
	}
	if c.number < 0 && n < math.MinInt64-c.number || c.number > 0 && n > math.MaxInt64-c.number {
		return faultOverflow
	}
	n += c.number
	c.put(strconv.AppendInt(nil, n, 10), c.keptExpiry(v))
	c.replyInt(n)
	return ""
}

func runIncrByFloat(c *call) fault {
	v, bad := c.text()
	if bad != "" {
		return bad
	}
	old := []byte("0")
	if v.Exists {
		old = v.Data
	}
	x, ok1 := parseLongDouble(old)
	y, ok2 := parseLongDouble(c.args[2])
	if !ok1 || !ok2 {
		return faultNotFloat
	}
	sum, finite := addLongDouble(x, y)
	if !finite {
		return faultNotFinite
	}
	data := appendLongDouble(nil, sum)
	c.put(data, c.keptExpiry(v))
	c.replyBulk(data)
	return ""
}

// keptExpiry is the life of a number after it was counted: what it had, or the default for one that is new.
func (c *call) keptExpiry(v Value) policy.Expiry {
	if v.Exists {
		return policy.Expiry{Kind: policy.KeepExpiry}
	}
	return c.defaultExpiry(0)
}
