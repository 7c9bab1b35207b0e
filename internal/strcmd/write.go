package strcmd

import "cacheproxy/policy"

// defaultMaxBulk is Redis's default for proto-max-bulk-len.
const defaultMaxBulk = 512 << 20

func parseSet(c *call) (bad fault) {
	if c.options, bad = parseOptions(c.args[3:], forSet); bad != "" || c.options.unit == noUnit {
		return bad
	}
	c.expiry, bad = c.lifetime(c.options.unit, c.options.time)
	return bad
}

func runSet(c *call) fault {
	v, o := c.value(0), c.options
	if o.get && v.Exists && v.Other {
		return faultWrongType
	}
	done := !(o.nx && v.Exists) && !(o.xx && !v.Exists)
	if done {
		c.put(c.args[2], c.setExpiry(v))
	}
	switch {
	case o.get: // with NX and XX too: what was there, whether or not it was replaced
		c.replyText(v)
	case done:
		c.replySimple("OK")
	default:
		c.replyNull()
	}
	return ""
}

// setExpiry is the life that SET gives a key that holds v.
func (c *call) setExpiry(v Value) policy.Expiry {
	switch {
	case c.options.unit != noUnit:
		return c.expiry
	case !c.options.keepTTL || !v.Exists:
		return c.defaultExpiry(0)
	case !v.Other:
		return policy.Expiry{Kind: policy.KeepExpiry}
	case v.ExpireAt < 0:
		return policy.Expiry{Kind: policy.NoExpiry}
	}
	// A value of another type is in no row, so a store would have no expiry to keep.
	return policy.Expiry{Kind: policy.ExpiresAt, MS: v.ExpireAt}
}

// parseSetEX is of SETEX and PSETEX.
func parseSetEX(c *call) (bad fault) {
	c.expiry, bad = c.lifetime(c.cmd.unit, c.args[2])
	return bad
}

func runSetEX(c *call) fault {
	c.put(c.args[3], c.expiry)
	c.replySimple("OK")
	return ""
}

func runSetNX(c *call) fault {
	absent := !c.value(0).Exists
	if absent {
		c.put(c.args[2], c.defaultExpiry(0))
	}
	c.replyFlag(absent)
	return ""
}

func runGetSet(c *call) fault {
	v, bad := c.text()
	if bad != "" {
		return bad
	}
	c.put(c.args[2], c.defaultExpiry(0))
	c.replyText(v)
	return ""
}

func runMSet(c *call) fault {
	for i := range c.effect {
		c.effect[i] = Effect{Op: Put, Data: c.args[2*i+2], Expiry: c.defaultExpiry(i)}
	}
	c.replySimple("OK")
	return ""
}

func runAppend(c *call) fault {
	v, bad := c.text()
	if bad != "" {
		return bad
	}
	tail := c.args[2]
	if !v.Exists { // also an empty tail makes a key
		c.put(tail, c.defaultExpiry(0))
		c.replyInt(int64(len(tail)))
		return ""
	}
	limit := c.env.MaxBulk
	if limit == 0 {
		limit = defaultMaxBulk
	}
	n := len(v.Data) + len(tail)
	if int64(n) > limit {
		return faultTooLong
	}
	data := make([]byte, 0, n)
	data = append(append(data, v.Data...), tail...)
	c.put(data, policy.Expiry{Kind: policy.KeepExpiry})
	c.replyInt(int64(n))
	return ""
}

// runDel is DEL and UNLINK.
func runDel(c *call) fault {
	var seen map[string]bool
	if len(c.effect) > 1 {
		seen = make(map[string]bool, len(c.effect))
	}
	var n int64
	for i := range c.effect {
		c.effect[i] = Effect{Op: Delete}
		key := c.args[1+i]
		if c.value(i).Exists && !seen[string(key)] {
			n++
		}
		if seen != nil {
			seen[string(key)] = true
		}
	}
	c.replyInt(n)
	return ""
}

func runGetDel(c *call) fault {
	v, bad := c.text()
	if bad != "" {
		return bad
	}
	c.effect[0] = Effect{Op: Delete}
	c.replyText(v)
	return ""
}

func parseGetEX(c *call) (bad fault) {
	c.options, bad = parseOptions(c.args[2:], forGetEX)
	return bad
}

// runGetEX reads the time after the key, because so does Redis: on an absent key any time is fine.
func runGetEX(c *call) fault {
	v, bad := c.text()
	if bad != "" {
		return bad
	}
	switch {
	case !v.Exists:
	case c.options.unit != noUnit:
		e, bad := c.lifetime(c.options.unit, c.options.time)
		if bad != "" {
			return bad
		}
		c.put(v.Data, e)
	case c.options.persist && v.TTL >= 0:
		c.put(v.Data, policy.Expiry{Kind: policy.NoExpiry})
	}
	c.replyText(v)
	return ""
}
