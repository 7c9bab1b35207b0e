package strcmd

func runGet(c *call) fault {
	v, bad := c.text()
	if bad != "" {
		return bad
	}
	c.replyText(v)
	return ""
}

func runMGet(c *call) fault {
	c.reply = appendArray(c.reply, len(c.effect))
	for i := range c.effect {
		v := c.value(i)
		v.Exists = v.Exists && !v.Other // MGET knows no WRONGTYPE
		c.replyText(v)
	}
	return ""
}

func runStrLen(c *call) fault {
	v, bad := c.text()
	switch {
	case bad != "":
		return bad
	case v.Exists:
		c.replyInt(int64(len(v.Data)))
	default:
		c.replyInt(0)
	}
	return ""
}

func parseRange(c *call) fault {
	var ok1, ok2 bool
	c.number, ok1 = parseInt(c.args[2])
	c.end, ok2 = parseInt(c.args[3])
	if !ok1 || !ok2 {
		return faultNotInteger
	}
	return ""
}

func runGetRange(c *call) fault {
	v, bad := c.text()
	if bad != "" {
		return bad
	}
	if !v.Exists {
		v.Data = nil
	}
	c.replyBulk(slice(v.Data, c.number, c.end))
	return ""
}

// slice is the part of b from start to end, inclusive, where negative numbers count from the end. Numbers out of
// range are drawn to the nearest byte, also an end that lies before the first: of "abc", 0 to -9 is "a".
func slice(b []byte, start, end int64) []byte {
	if start < 0 && end < 0 && start > end {
		return nil
	}
	n := int64(len(b))
	if start < 0 {
		start = max(n+start, 0)
	}
	if end < 0 {
		end = max(n+end, 0)
	}
	end = min(end, n-1)
	if start > end {
		return nil
	}
	return b[start : end+1]
}

func runExists(c *call) fault {
	var n int64
	for i := range c.effect {
		if c.value(i).Exists {
			n++
		}
	}
	c.replyInt(n)
	return ""
}

func runType(c *call) fault {
	switch v := c.value(0); {
	case !v.Exists:
		c.replySimple("none")
	case v.Other:
		c.replySimple(v.OtherType)
	default:
		c.replySimple("string")
	}
	return ""
}

// runTTL is TTL, PTTL, EXPIRETIME and PEXPIRETIME.
func runTTL(c *call) fault {
	v := c.value(0)
	ms := v.TTL
	if !c.cmd.unit.relative() {
		ms = v.ExpireAt
	}
	switch {
	case !v.Exists:
		c.replyInt(-2)
	case ms < 0:
		c.replyInt(-1)
	case c.cmd.unit.seconds():
		c.replyInt(int64((uint64(ms) + 500) / 1000)) // the last half second of int64 must not wrap
	default:
		c.replyInt(ms)
	}
	return ""
}
