package strcmd

import "cacheproxy/policy"

// keyLayout is a closed list: where a command's keys stand among its arguments.
type keyLayout uint8

const (
	firstKey    keyLayout = iota // the first argument
	everyArg                     // every argument
	everySecond                  // the first of each pair
)

// step is the distance from one key to the next, for layouts with several.
func (k keyLayout) step() int {
	if k == everySecond {
		return 2
	}
	return 1
}

// command is a row of the table. It passes three steps: arity, then parse for what Redis reads before it looks at a
// key, then run. Each may end it with a fault; a run that does so has neither replied nor set an effect.
type command struct {
	name  string // as Redis prints it
	arity int    // as in COMMAND: with the name itself; negative is at least
	keys  keyLayout
	blind bool // never needs the old value, except for what SET's options ask
	unit  unit // of the time it reads or answers, where the name says it
	parse func(*call) fault
	run   func(*call) fault
}

func (cmd *command) arityOK(n int) bool {
	if cmd.arity >= 0 {
		return n == cmd.arity
	}
	// MSET alone has pairs. Redis calls a key without a value a wrong number of arguments too.
	return n >= -cmd.arity && (cmd.keys != everySecond || n%2 == 1)
}

// longestName is the length of "incrbyfloat" and "pexpiretime".
const longestName = 11

var commands = byName(
	command{name: "get", arity: 2, run: runGet},
	command{name: "mget", arity: -2, keys: everyArg, run: runMGet},
	command{name: "strlen", arity: 2, run: runStrLen},
	command{name: "getrange", arity: 4, parse: parseRange, run: runGetRange},
	command{name: "substr", arity: 4, parse: parseRange, run: runGetRange},
	command{name: "exists", arity: -2, keys: everyArg, run: runExists},
	command{name: "type", arity: 2, run: runType},
	command{name: "ttl", arity: 2, unit: inSeconds, run: runTTL},
	command{name: "pttl", arity: 2, unit: inMillis, run: runTTL},
	command{name: "expiretime", arity: 2, unit: atSeconds, run: runTTL},
	command{name: "pexpiretime", arity: 2, unit: atMillis, run: runTTL},

	command{name: "set", arity: -3, blind: true, parse: parseSet, run: runSet},
	command{name: "setex", arity: 4, unit: inSeconds, blind: true, parse: parseSetEX, run: runSetEX},
	command{name: "psetex", arity: 4, unit: inMillis, blind: true, parse: parseSetEX, run: runSetEX},
	command{name: "setnx", arity: 3, run: runSetNX},
	command{name: "getset", arity: 3, run: runGetSet},
	command{name: "mset", arity: -3, keys: everySecond, blind: true, run: runMSet},
	command{name: "append", arity: 3, run: runAppend},
	command{name: "del", arity: -2, keys: everyArg, run: runDel},
	command{name: "unlink", arity: -2, keys: everyArg, run: runDel},
	command{name: "getdel", arity: 2, run: runGetDel},
	command{name: "getex", arity: -2, parse: parseGetEX, run: runGetEX},

	command{name: "expire", arity: -3, unit: inSeconds, parse: parseExpire, run: runExpire},
	command{name: "pexpire", arity: -3, unit: inMillis, parse: parseExpire, run: runExpire},
	command{name: "expireat", arity: -3, unit: atSeconds, parse: parseExpire, run: runExpire},
	command{name: "pexpireat", arity: -3, unit: atMillis, parse: parseExpire, run: runExpire},
	command{name: "persist", arity: 2, run: runPersist},

	command{name: "incr", arity: 2, parse: parseIncr, run: runIncr},
	command{name: "decr", arity: 2, parse: parseDecr, run: runIncr},
	command{name: "incrby", arity: 3, parse: parseIncr, run: runIncr},
	command{name: "decrby", arity: 3, parse: parseDecr, run: runIncr},
	command{name: "incrbyfloat", arity: 3, run: runIncrByFloat},
)

func byName(rows ...command) map[string]*command {
	m := make(map[string]*command, len(rows))
	for i := range rows {
		m[rows[i].name] = &rows[i]
	}
	return m
}

// lookup finds a command by its name in any case, or returns nil.
func lookup(name []byte) *command {
	if len(name) > longestName {
		return nil
	}
	var lower [longestName]byte
	for i, b := range name {
		lower[i] = toLower(b)
	}
	return commands[string(lower[:len(name)])]
}

func lookupArgs(args [][]byte) *command {
	if len(args) == 0 {
		return nil
	}
	return lookup(args[0])
}

// countKeys is len(Keys(args)) without the slice.
func countKeys(args [][]byte) int {
	cmd := lookupArgs(args)
	switch {
	case cmd == nil || !cmd.arityOK(len(args)):
		return 0
	case cmd.keys == firstKey:
		return 1
	}
	return (len(args) - 1) / cmd.keys.step()
}

// call is one command on its way. It belongs to one Eval or Check.
type call struct {
	args    [][]byte
	values  []Value
	env     Env
	reply   []byte   // the caller's, appended to
	effects []Effect // the caller's, appended to
	effect  []Effect // the part of effects that is this command's: one per key

	// Static after prepare; each command reads what its parse has set.
	cmd           *command
	options       options // of SET and GETEX
	expireOptions expireOptions
	expiry        policy.Expiry // of SET with a TTL, SETEX, PSETEX, EXPIRE …
	number        int64         // the increment of INCR …, the start of GETRANGE
	end           int64         // of GETRANGE
}

// prepare finds the command and does all that Redis does before it looks at a key.
func (c *call) prepare() fault {
	c.cmd = lookupArgs(c.args)
	if bad := c.cmd.counted(len(c.args)); bad != "" || c.cmd.parse == nil {
		return bad
	}
	return c.cmd.parse(c)
}

// counted is the fault of a command with n arguments that is none of the table, or whose number they are not.
func (cmd *command) counted(n int) fault {
	switch {
	case cmd == nil:
		return faultUnknown
	case !cmd.arityOK(n):
		return fault("ERR wrong number of arguments for '" + cmd.name + "' command")
	}
	return ""
}

// value is what the i-th key holds; a key beyond values is absent.
func (c *call) value(i int) Value {
	if i < len(c.values) {
		return c.values[i]
	}
	return Value{}
}

// text is the string that the only key holds, or the fault that it holds something else.
func (c *call) text() (v Value, bad fault) {
	v = c.value(0)
	if v.Exists && v.Other {
		return v, faultWrongType
	}
	return v, ""
}

// defaultExpiry is the life of the i-th key when a command gives it a value and no expiry.
func (c *call) defaultExpiry(i int) policy.Expiry {
	if i < len(c.env.DefaultTTL) && c.env.DefaultTTL[i] > 0 {
		return policy.Expiry{Kind: policy.ExpiresIn, MS: c.env.DefaultTTL[i]}
	}
	return policy.Expiry{Kind: policy.NoExpiry}
}

// put makes the only key hold data with the given life. An absolute time that is not in the future leaves the
// key gone, as the first look at it in Redis would find.
func (c *call) put(data []byte, e policy.Expiry) {
	if e.Kind == policy.ExpiresAt && e.MS <= c.env.NowMS {
		c.effect[0] = Effect{Op: Delete}
		return
	}
	c.effect[0] = Effect{Op: Put, Data: data, Expiry: e}
}

func (c *call) replyInt(n int64)        { c.reply = appendInt(c.reply, n) }
func (c *call) replyBulk(b []byte)      { c.reply = appendBulk(c.reply, b) }
func (c *call) replySimple(word string) { c.reply = appendSimple(c.reply, word) }
func (c *call) replyNull()              { c.reply = appendNull(c.reply, c.env.Proto) }

// replyFlag answers 1 or 0.
func (c *call) replyFlag(yes bool) {
	if yes {
		c.replyInt(1)
	} else {
		c.replyInt(0)
	}
}

// replyText answers the string, or null for an absent key.
func (c *call) replyText(v Value) {
	if v.Exists {
		c.replyBulk(v.Data)
	} else {
		c.replyNull()
	}
}
