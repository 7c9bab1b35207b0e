package strcmd

import (
	"bufio"
	"bytes"
	"fmt"
	"maps"
	"math/big"
	"slices"
	"strings"
	"testing"

	"cacheproxy/policy"
)

const testNow = 1_700_000_000_000

func text(data string) Value {
	return Value{Exists: true, Data: []byte(data), TTL: -1, ExpireAt: -1}
}

func textFor(data string, ttl int64) Value {
	return Value{Exists: true, Data: []byte(data), TTL: ttl, ExpireAt: testNow + ttl}
}

func other(kind string) Value {
	return Value{Exists: true, Other: true, OtherType: kind, TTL: -1, ExpireAt: -1}
}

func in(ms int64) policy.Expiry { return policy.Expiry{Kind: policy.ExpiresIn, MS: ms} }
func at(ms int64) policy.Expiry { return policy.Expiry{Kind: policy.ExpiresAt, MS: ms} }

var (
	never = policy.Expiry{Kind: policy.NoExpiry}
	keep  = policy.Expiry{Kind: policy.KeepExpiry}
)

func put(data string, e policy.Expiry) Effect { return Effect{Op: Put, Data: []byte(data), Expiry: e} }

var gone = Effect{Op: Delete}

func equalEffects(a, b []Effect) bool {
	return slices.EqualFunc(a, b, func(x, y Effect) bool {
		return x.Op == y.Op && bytes.Equal(x.Data, y.Data) && x.Expiry == y.Expiry
	})
}

// What Redis cannot show: the form of each effect, and what comes from the route.
func TestEffects(t *testing.T) {
	absent, later := Value{}, int64(testNow+5000)
	for _, c := range []struct {
		command string
		before  []Value
		reply   string
		effects []Effect
	}{
		{"GET k", []Value{text("v")}, "$1\r\nv\r\n", []Effect{{}}},
		{"SET k v", []Value{textFor("old", 9)}, "+OK\r\n", []Effect{put("v", in(1000))}},
		{"SET k v EX 7", nil, "+OK\r\n", []Effect{put("v", in(7000))}},
		{"SET k v EXAT 1", nil, "+OK\r\n", []Effect{gone}},
		{"SET k v PXAT 1700000000000", nil, "+OK\r\n", []Effect{gone}},
		{"SET k v PXAT 1700000000001", nil, "+OK\r\n", []Effect{put("v", at(testNow+1))}},
		{"SET k v KEEPTTL", []Value{textFor("old", 9)}, "+OK\r\n", []Effect{put("v", keep)}},
		{"SET k v KEEPTTL", []Value{absent}, "+OK\r\n", []Effect{put("v", in(1000))}},
		{"SET k v KEEPTTL", []Value{other("list")}, "+OK\r\n", []Effect{put("v", never)}},
		{"SET k v KEEPTTL", []Value{{Exists: true, Other: true, TTL: 5000, ExpireAt: later}}, "+OK\r\n", []Effect{put("v", at(later))}},
		{"SET k v NX GET", []Value{text("old")}, "$3\r\nold\r\n", []Effect{{}}},
		{"SET k v XX GET", []Value{absent}, "_\r\n", []Effect{{}}},
		{"SETNX k v", []Value{absent}, ":1\r\n", []Effect{put("v", in(1000))}},
		{"SETNX k v", []Value{other("set")}, ":0\r\n", []Effect{{}}},
		{"GETSET k v", []Value{textFor("old", 9)}, "$3\r\nold\r\n", []Effect{put("v", in(1000))}},
		{"MSET a 1 b 2 c 3", nil, "+OK\r\n", []Effect{put("1", in(1000)), put("2", never), put("3", never)}},
		{"MSET a 1 a 2", nil, "+OK\r\n", []Effect{put("1", in(1000)), put("2", never)}},
		{"INCR k", []Value{absent}, ":1\r\n", []Effect{put("1", in(1000))}},
		{"INCR k", []Value{textFor("9", 9)}, ":10\r\n", []Effect{put("10", keep)}},
		{"INCRBYFLOAT k 0.5", []Value{absent}, "$3\r\n0.5\r\n", []Effect{put("0.5", in(1000))}},
		{"APPEND k v", []Value{absent}, ":1\r\n", []Effect{put("v", in(1000))}},
		{"APPEND k v", []Value{text("v")}, ":2\r\n", []Effect{put("vv", keep)}},
		{"DEL a b a", []Value{text(""), absent, text("")}, ":1\r\n", []Effect{gone, gone, gone}},
		{"UNLINK k", []Value{absent}, ":0\r\n", []Effect{gone}},
		{"GETDEL k", []Value{absent}, "_\r\n", []Effect{gone}},
		{"EXISTS a a", []Value{text(""), text("")}, ":2\r\n", []Effect{{}, {}}},
		{"EXPIRE k 7", []Value{text("v")}, ":1\r\n", []Effect{put("v", in(7000))}},
		{"EXPIRE k 7", []Value{other("list")}, ":1\r\n", []Effect{{}}},
		{"EXPIRE k -1", []Value{other("list")}, ":1\r\n", []Effect{gone}},
		{"EXPIRE k 7", []Value{absent}, ":0\r\n", []Effect{{}}},
		{"PEXPIREAT k 1700000000000", []Value{text("v")}, ":1\r\n", []Effect{gone}},
		{"PERSIST k", []Value{textFor("v", 9)}, ":1\r\n", []Effect{put("v", never)}},
		{"PERSIST k", []Value{text("v")}, ":0\r\n", []Effect{{}}},
		{"GETEX k", []Value{textFor("v", 9)}, "$1\r\nv\r\n", []Effect{{}}},
		{"GETEX k PERSIST", []Value{textFor("v", 9)}, "$1\r\nv\r\n", []Effect{put("v", never)}},
		{"GETEX k PERSIST", []Value{text("v")}, "$1\r\nv\r\n", []Effect{{}}},
		{"GETEX k PXAT 1", []Value{text("v")}, "$1\r\nv\r\n", []Effect{gone}},
		{"GETEX k PX 0", []Value{absent}, "_\r\n", []Effect{{}}},
		{"GETEX k PX 0", []Value{text("v")}, "-ERR invalid expire time in 'getex' command\r\n", []Effect{{}}},
		{"MSET a 1 b", nil, "-ERR wrong number of arguments for 'mset' command\r\n", nil},
		{"HGET k f", nil, "-ERR unknown command\r\n", nil},
		{"INCRBYFLOATS k 1", nil, "-ERR unknown command\r\n", nil},
	} {
		args := line(strings.Fields(c.command)...)
		// The second key has no default, the third none that is given.
		env := Env{NowMS: testNow, Proto: 3, DefaultTTL: []int64{1000, 0}}
		reply, effects := Eval([]byte("+before\r\n"), args, c.before, env, []Effect{gone})
		if string(reply) != "+before\r\n"+c.reply {
			t.Errorf("%s: %q, want %q", c.command, reply, c.reply)
		}
		if !equalEffects(effects, append([]Effect{gone}, c.effects...)) {
			t.Errorf("%s: effects %+v, want %+v", c.command, effects[1:], c.effects)
		}
	}
}

func TestKeys(t *testing.T) {
	for _, c := range []struct {
		command string
		keys    []int
	}{
		{"get k", []int{1}},
		{"SET k v EX 1", []int{1}},
		{"mget a b a", []int{1, 2, 3}},
		{"MSET a 1 b 2", []int{1, 3}},
		{"MSET a 1 b", nil},
		{"GET", nil},
		{"GET a b", nil},
		{"HGET k f", nil},
		{"", nil},
	} {
		args := line(strings.Fields(c.command)...)
		if got := Keys(args); !slices.Equal(got, c.keys) {
			t.Errorf("%q: %v, want %v", c.command, got, c.keys)
		}
	}
}

func TestUnconditional(t *testing.T) {
	for command, want := range map[string]bool{
		"SET k v": true, "set k v px 5": true, "SETEX k 1 v": true, "PSETEX k 1 v": true, "MSET a 1": true,
		"SET k v NX": false, "SET k v EX 1 xx": false, "SET k v GET": false, "SET k v KEEPTTL": false,
		"SET k v bad": false, "SET k": false, "MSET a": false, "GET k": false, "DEL k": false, "SETNX k v": false, "HSET k f v": false, "": false,
	} {
		if got := Unconditional(line(strings.Fields(command)...)); got != want {
			t.Errorf("%q: %t", command, got)
		}
	}
}

func TestSupported(t *testing.T) {
	for _, name := range slices.Sorted(maps.Keys(commands)) {
		if !Supported([]byte(name)) || !Supported([]byte(strings.ToUpper(name))) {
			t.Errorf("%s is not supported", name)
		}
		if len(name) > longestName {
			t.Errorf("%s is longer than longestName", name)
		}
	}
	for _, name := range []string{"", "GE", "GETS", "get\x00", "setrange", "INCRBYFLOAT2", "\u212aEYS"} {
		if Supported([]byte(name)) {
			t.Errorf("%q is supported", name)
		}
	}
}

func TestCheck(t *testing.T) {
	for command, want := range map[string]string{
		"GET k":                                 "",
		"GETEX k PX 0":                          "", // Redis looks at the key first
		"INCRBYFLOAT k x":                       "",
		"GET":                                   "-ERR wrong number of arguments for 'get' command\r\n",
		"SET k v PX 0":                          "-ERR invalid expire time in 'set' command\r\n",
		"PEXPIRE k 9223372036854775807":         "-ERR invalid expire time in 'pexpire' command\r\n",
		"DECRBY k -9223372036854775808":         "-ERR decrement would overflow\r\n",
		"EXPIRE k 1 NX GT":                      "-ERR NX and XX, GT or LT options at the same time are not compatible\r\n",
		"GETRANGE k 0 x":                        "-ERR value is not an integer or out of range\r\n",
		"SET k v PXAT 9223372036854775807 NX":   "",
		"SET k v PX 9223372036854775807":        "-ERR invalid expire time in 'set' command\r\n",
		"PSETEX k 9223372036854775807 v":        "-ERR invalid expire time in 'psetex' command\r\n",
		"SET k v NX XX":                         "-ERR syntax error\r\n",
		"GETEX k EX 1 PERSIST":                  "-ERR syntax error\r\n",
		"EXPIREAT k 9223372036854775807 GT xx ": "-ERR invalid expire time in 'expireat' command\r\n",
	} {
		got := Check(line(strings.Fields(command)...), Env{NowMS: testNow})
		if string(got) != want {
			t.Errorf("%s: %q, want %q", command, got, want)
		}
	}
}

// A new value must not grow into the old one's memory, which others may be reading.
func TestAppendCopies(t *testing.T) {
	backing := []byte("abcdef")
	value := text("")
	value.Data = backing[:3]
	_, effects := Eval(nil, line("APPEND", "k", "XYZ"), []Value{value}, Env{}, nil)
	if string(effects[0].Data) != "abcXYZ" || string(backing) != "abcdef" {
		t.Errorf("effect %q, backing %q", effects[0].Data, backing)
	}
}

// Numbers below 1e-17 print as zero, so Redis shows only that they are not refused; their bits are checked here against
// exact arithmetic.
func TestParseLongDoubleSmall(t *testing.T) {
	unit := new(big.Float).SetMantExp(big.NewFloat(1), ldUnit)
	for s, units := range map[string]int64{
		"0x1p-16445":                   1,
		"0x1.8p-16445":                 2, // halves go to even
		"0x2.8p-16445":                 2,
		"0x2.80000000000000001p-16445": 3,
		"-0x3p-16445":                  -3,
		"3.6451995318824746025e-4951":  1,
		"1.8225997659412373013e-4951":  1,
		"0x7fffffffffffffff.8p-16445":  -1 << 63, // becomes the smallest full number
		"0x7fffffffffffffff.7p-16445":  1<<63 - 1,
	} {
		x, ok := parseLongDouble([]byte(s))
		if !ok {
			t.Errorf("%s: refused", s)
			continue
		}
		want := new(big.Float).SetPrec(ldPrecision).SetInt64(units)
		if units == -1<<63 {
			want.Neg(want)
		}
		if want.Mul(want, unit); x.Cmp(want) != 0 {
			t.Errorf("%s: %s, want %s", s, x.Text('p', 0), want.Text('p', 0))
		}
	}
}

// Whatever the arguments, Eval answers one well-formed reply and one effect per key, changes nothing it was given, and
// agrees with Check and Unconditional.
func FuzzEval(f *testing.F) {
	for _, seed := range []string{
		"GET k", "MGET a b a", "SET k v NX GET PX 5", "SET k v KEEPTTL", "SETEX k 10 v", "MSET a 1 b 2", "DEL a a b", "GETEX k EXAT 1",
		"EXPIRE k 10 XX GT", "EXPIRE k 1 b\r\nd", "PERSIST k", "INCRBY k 9223372036854775807", "DECRBY k -9223372036854775808", "APPEND k v",
		"INCRBYFLOAT k 0x1.8p-16445", "INCRBYFLOAT k 1e4932", "INCRBYFLOAT k -inf", "GETRANGE k -9223372036854775808 -1", "TYPE k", "EXPIRETIME k", "x",
	} {
		for kind := range 5 {
			f.Add([]byte(strings.ReplaceAll(seed, " ", "\x01")), "10", uint8(kind), int64(5000), int64(testNow), kind%2 == 0)
		}
	}
	f.Fuzz(func(t *testing.T, command []byte, data string, kind uint8, ttl, now int64, resp3 bool) {
		args := bytes.Split(command, []byte{1})
		given := fmt.Sprintf("%q", args)
		env := Env{NowMS: now, Proto: 2, DefaultTTL: []int64{ttl}}
		if resp3 {
			env.Proto = 3
		}
		value := []Value{{}, text(data), textFor(data, ttl), other("list"), {Exists: true, Other: true, OtherType: "hash", TTL: ttl, ExpireAt: now}}[kind%5]
		keys := Keys(args)
		values := make([]Value, len(keys))
		for i := range values {
			values[i] = value
		}
		reply, effects := Eval([]byte("x"), args, values, env, make([]Effect, 2, 3))
		if len(effects) != 2+len(keys) {
			t.Fatalf("%d effects for %d keys", len(effects)-2, len(keys))
		}
		effects = effects[2:]
		if reply[0] != 'x' {
			t.Fatal("what stood in the reply is gone")
		}
		reply = reply[1:]
		var one bytes.Buffer
		if err := copyReply(&one, bufio.NewReader(bytes.NewReader(reply))); err != nil || one.Len() != len(reply) {
			t.Fatalf("%q is not one reply: %v", reply, err)
		}
		for _, e := range effects {
			switch {
			case reply[0] == '-' && e.Op != None:
				t.Fatalf("%q with effect %d", reply, e.Op)
			case e.Op != Put && (e.Data != nil || e.Expiry != policy.Expiry{}):
				t.Fatalf("effect %d with data or expiry", e.Op)
			case e.Op == Put && e.Expiry.Kind == policy.KeepExpiry && (!value.Exists || value.Other):
				t.Fatal("KeepExpiry on a key that held no string")
			}
		}
		if refusal := Check(args, env); refusal != nil && !bytes.Equal(refusal, reply) {
			t.Fatalf("Check says %q, Eval %q", refusal, reply)
		}
		if Unconditional(args) {
			blind, same := Eval(nil, args, nil, env, nil)
			if !bytes.Equal(blind, reply) || !equalEffects(same, effects) {
				t.Fatalf("unconditional, but %q without values, %q with them", blind, reply)
			}
		}
		if now := fmt.Sprintf("%q", args); now != given {
			t.Fatalf("the arguments %s became %s", given, now)
		}
		if !Supported(args[0]) && len(keys) > 0 {
			t.Fatal("keys of a command that is not supported")
		}
	})
}
