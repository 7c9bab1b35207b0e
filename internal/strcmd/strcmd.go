// Package strcmd computes Redis's string commands without Redis: given the command and what its keys
// hold, it answers with the bytes that Redis 7.0 would send and says what becomes of each key. The proxy uses
// it where it knows the value itself: under a key's lock, and while Redis is down.
//
// Everything here is a pure function of its arguments: no clock is read, no store is asked, nothing is kept.
//
// Order of reading: this file has the contract, command.go the table of commands and the steps each command
// passes, read.go, write.go, life.go and number.go the commands themselves. syntax.go reads arguments,
// reply.go writes replies, and longdouble.go is the arithmetic of INCRBYFLOAT.
package strcmd

import "cacheproxy/policy"

// Value is what a key holds when the command starts.
type Value struct {
	// Exists tells that the key is there and has not expired. Without it the other fields are not read.
	Exists bool
	// Other tells that the key holds something that is not a string. Commands that need a string answer
	// WRONGTYPE; SET and MSET overwrite it; DEL, EXISTS, TYPE, TTL and EXPIRE with their kin work on it.
	Other bool
	// OtherType is the type's name as TYPE answers it ("list", "hash", …). Read only with Other.
	OtherType string
	// Data is the string. It is only read.
	Data []byte
	// TTL is what remains in milliseconds; -1 is no expiry. TTL and PTTL answer it, and EXPIRE and PEXPIRE
	// compare with it (NX, XX, GT, LT), so that a skewed clock does no harm.
	TTL int64
	// ExpireAt is the same as Unix milliseconds; -1 is no expiry. EXPIRETIME and PEXPIRETIME answer it, and
	// EXPIREAT and PEXPIREAT compare with it.
	ExpireAt int64
}

// Op is a closed list: what happens to a key.
type Op uint8

const (
	// None: the key stays as it is.
	None Op = iota
	// Put: the key holds Effect.Data and lives as Effect.Expiry says.
	Put
	// Delete: the key is gone.
	Delete
)

// Effect is what a command does to one key.
//
// DEL, UNLINK and GETDEL have the effect Delete also on a key that is absent: nothing may be left of it in a
// copy that the caller could not see. Whoever saw every copy may skip it.
//
// EXPIRE, PERSIST and their kin put the same data again with another expiry. On a value that is no string
// they have the effect None, because there is no data to put, and answer as if it were done: send these to the store
// that holds the value instead. (One that deletes, such as EXPIRE with -1, has the effect Delete for every type.)
type Effect struct {
	Op Op
	// Data, with Put, is the new value. It may alias an argument or the Data of the key's Value, so it is read-only
	// and valid as long as those are.
	Data []byte
	// Expiry, with Put, is the key's new life. KeepExpiry is used only where the key held a string.
	Expiry policy.Expiry
}

// Env is what a command depends on beside its arguments and its keys.
type Env struct {
	// NowMS is the time in Unix milliseconds. It decides which absolute times are past.
	NowMS int64
	// Proto is the client's protocol version: 3, and 2 for any other number.
	Proto int
	// DefaultTTL is the life in milliseconds, per key in the order of Keys, of a key that gets a value and no
	// expiry: SET without a TTL, SETNX, GETSET, MSET, and a key that SET KEEPTTL, INCR or APPEND creates. 0, or
	// a missing element, is no expiry.
	DefaultTTL []int64
	// MaxBulk is Redis's proto-max-bulk-len: APPEND makes no longer value. 0 is Redis's default, 512 MiB.
	MaxBulk int64
}

// Supported tells whether the command is one of ours, in any case of its letters.
func Supported(name []byte) bool { return lookup(name) != nil }

// Keys returns the indexes into args of the command's keys, in order and with repetitions; args[0] is the
// command's name. It is nil if the command is not supported or has a wrong number of arguments. The caller owns
// the result.
func Keys(args [][]byte) []int {
	cmd := lookupArgs(args)
	if cmd == nil || !cmd.arityOK(len(args)) {
		return nil
	}
	if cmd.keys == firstKey {
		return []int{1}
	}
	step := cmd.keys.step()
	keys := make([]int, 0, (len(args)-1)/step)
	for i := 1; i < len(args); i += step {
		keys = append(keys, i)
	}
	return keys
}

// Unconditional tells whether neither the reply nor the effects depend on what the keys hold, so that nobody
// needs to look: SET without NX, XX, GET and KEEPTTL, SETEX, PSETEX, MSET. It is false for a command
// that Check refuses for its arity or its options.
func Unconditional(args [][]byte) bool {
	cmd := lookupArgs(args)
	if cmd == nil || !cmd.blind || !cmd.arityOK(len(args)) {
		return false
	}
	if cmd.name != "set" {
		return true
	}
	o, bad := parseOptions(args[3:], forSet)
	return bad == "" && !o.nx && !o.xx && !o.get && !o.keepTTL
}

// Check returns the error reply that Redis gives before it looks at any key (a wrong number of arguments, syntax,
// numbers out of range), or nil if the command may go on. Some arguments Redis reads only after it has looked: GETEX's
// expire time and INCRBYFLOAT's increment. Those are judged by Eval.
func Check(args [][]byte, env Env) []byte {
	if cmd := lookupArgs(args); cmd != nil && cmd.parse == nil && cmd.arityOK(len(args)) {
		return nil // GET: without the call, which would be allocated
	}
	c := call{args: args, env: env}
	if bad := c.prepare(); bad != "" {
		return appendError(nil, bad)
	}
	return nil
}

// Eval appends the command's reply to reply and one effect per key, in the order of Keys, to effects, and returns
// both. After an error reply every effect is None.
//
// values has one element per key; it may be nil where Unconditional is true, and for a command that Check refuses.
// A key that is named twice needs the same Value twice. Its effects take place in order, as in Redis: the last is what
// counts, and DEL counts the key once. Arguments and values are neither changed nor kept, except as
// Effect.Data says.
//
// A command that is not Supported gets an error reply and no effects.
func Eval(reply []byte, args [][]byte, values []Value, env Env, effects []Effect) ([]byte, []Effect) {
	c := call{args: args, values: values, env: env, reply: reply}
	base := len(effects)
	c.effects = append(effects, make([]Effect, countKeys(args))...)
	c.effect = c.effects[base:]

	bad := c.prepare()
	if bad == "" {
		bad = c.cmd.run(&c)
	}
	if bad != "" {
		return appendError(c.reply, bad), c.effects
	}
	return c.reply, c.effects
}
