package strcmd

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"maps"
	"math/rand"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"

	"cacheproxy/internal/devserver"
	"cacheproxy/policy"
)

// oracle is a connection to a real Redis that answers in raw bytes.
type oracle struct {
	t     testing.TB
	conn  net.Conn
	r     *bufio.Reader
	proto int
}

// startRedis runs a private redis-server for the length of the test and returns its unix socket. It has no port: a name in
// a directory of our own cannot be anybody else's server.
func startRedis(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "strcmd") // not t.TempDir, whose paths outgrow a socket's name
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	server, err := devserver.StartRedis(t.Context(), devserver.RedisOptions{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := server.Stop(); err != nil {
			t.Error(err)
		}
	})
	return server.Addr()
}

func dialOracle(t testing.TB, socket string, proto int) *oracle {
	t.Helper()
	conn, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	o := &oracle{t: t, conn: conn, r: bufio.NewReader(conn), proto: proto}
	o.do(line("HELLO", strconv.Itoa(proto)))
	return o
}

// line makes a command of its words.
func line(words ...string) [][]byte {
	args := make([][]byte, len(words))
	for i, w := range words {
		args[i] = []byte(w)
	}
	return args
}

// do sends the commands in one pipeline and returns their raw replies.
func (o *oracle) do(cmds ...[][]byte) []string {
	o.t.Helper()
	var out []byte
	for _, args := range cmds {
		out = appendArray(out, len(args))
		for _, arg := range args {
			out = appendBulk(out, arg)
		}
	}
	if _, err := o.conn.Write(out); err != nil {
		o.t.Fatal(err)
	}
	replies := make([]string, len(cmds))
	for i := range replies {
		var b bytes.Buffer
		if err := copyReply(&b, o.r); err != nil {
			o.t.Fatalf("reply to %q: %v", cmds[i], err)
		}
		replies[i] = b.String()
	}
	return replies
}

// copyReply copies one framed RESP reply.
func copyReply(w *bytes.Buffer, r *bufio.Reader) error {
	head, err := r.ReadString('\n')
	if err != nil {
		return err
	}
	w.WriteString(head)
	if !strings.HasSuffix(head, "\r\n") || len(head) < 3 {
		return fmt.Errorf("bad line %q", head)
	}
	body := head[1 : len(head)-2]
	switch head[0] {
	case '+', '-', ':':
		return nil
	case '_':
		if body != "" {
			return fmt.Errorf("bad null %q", head)
		}
		return nil
	}
	n, err := strconv.Atoi(body)
	if err != nil {
		return err
	}
	switch head[0] {
	case '$':
		if n < 0 {
			return nil
		}
		_, err = io.CopyN(w, r, int64(n)+2)
		return err
	case '%':
		n *= 2
		fallthrough
	case '*':
		for range n {
			if err := copyReply(w, r); err != nil {
				return err
			}
		}
		return nil
	}
	return fmt.Errorf("bad type %q", head)
}

// clock reads TIME's reply as Unix milliseconds.
func clock(t testing.TB, reply string) int64 {
	t.Helper()
	f := strings.Split(reply, "\r\n") // *2 $10 seconds $6 micros
	if len(f) < 5 {
		t.Fatalf("TIME: %q", reply)
	}
	s, err1 := strconv.ParseInt(f[2], 10, 64)
	us, err2 := strconv.ParseInt(f[4], 10, 64)
	if err1 != nil || err2 != nil {
		t.Fatalf("TIME: %q", reply)
	}
	return s*1000 + us/1000
}

func integer(t testing.TB, reply string) int64 {
	t.Helper()
	n, err := strconv.ParseInt(strings.TrimSuffix(strings.TrimPrefix(reply, ":"), "\r\n"), 10, 64)
	if err != nil {
		t.Fatalf("%q is no integer", reply)
	}
	return n
}

// prior is what a key holds before a case. The zero value is an absent key.
type prior struct {
	kind     string // "" absent, "string", or another type
	data     string
	expireAt int64 // 0: none
}

func (p prior) value(now int64) Value {
	v := Value{Exists: p.kind != "", TTL: -1, ExpireAt: -1}
	if v.Exists && p.kind != "string" {
		v.Other, v.OtherType = true, p.kind
	} else {
		v.Data = []byte(p.data)
	}
	if p.expireAt != 0 {
		v.ExpireAt, v.TTL = p.expireAt, max(p.expireAt-now, 0)
	}
	return v
}

func (p prior) setup(key string) [][][]byte {
	cmds := [][][]byte{line("DEL", key)}
	switch p.kind {
	case "string":
		cmds = append(cmds, line("SET", key, p.data))
	case "list":
		cmds = append(cmds, line("RPUSH", key, "a", "b"))
	case "hash":
		cmds = append(cmds, line("HSET", key, "f", "v"))
	}
	if p.expireAt != 0 {
		cmds = append(cmds, line("PEXPIREAT", key, strconv.FormatInt(p.expireAt, 10)))
	}
	return cmds
}

// compare runs one command on Redis and through Eval, and reports the first difference in the reply or in what the
// keys hold afterwards. Redis's own clock is read right before and right after the command; whatever depends on the
// time must lie between what Eval says for the one and for the other.
func (o *oracle) compare(args [][]byte, priors map[string]prior) {
	o.t.Helper()
	keys := slices.Sorted(maps.Keys(priors))
	var cmds [][][]byte
	for _, key := range keys {
		cmds = append(cmds, priors[key].setup(key)...)
	}
	at := len(cmds)
	cmds = append(cmds, line("TIME"), args, line("TIME"))
	for _, key := range keys {
		cmds = append(cmds, line("TYPE", key), line("PEXPIRETIME", key), line("GET", key))
	}
	cmds = append(cmds, line("TIME"))
	replies := o.do(cmds...)
	before, got, after := clock(o.t, replies[at]), replies[at+1], clock(o.t, replies[at+2])
	end := clock(o.t, replies[len(replies)-1])

	what := fmt.Sprintf("RESP%d %.200q on %.200q", o.proto, args, fmt.Sprint(priors))
	index := Keys(args)
	eval := func(now int64) (string, []Effect) {
		env := Env{NowMS: now, Proto: o.proto}
		values := make([]Value, len(index))
		for i, at := range index {
			values[i] = priors[string(args[at])].value(now)
		}
		reply, effects := Eval(nil, args, values, env, nil)
		if len(effects) != len(index) {
			o.t.Fatalf("%s: %d effects for %d keys", what, len(effects), len(index))
		}
		if refusal := Check(args, env); refusal != nil && string(refusal) != string(reply) {
			o.t.Fatalf("%s: Check says %q, Eval %q", what, refusal, reply)
		}
		if Unconditional(args) {
			if blind, _ := Eval(nil, args, nil, env, nil); !bytes.Equal(blind, reply) {
				o.t.Fatalf("%s: unconditional, but %q without values, %q with them", what, blind, reply)
			}
		}
		return string(reply), effects
	}
	want, effects := eval(before)
	if later, _ := eval(after); later != want {
		lo, hi, n := integer(o.t, later), integer(o.t, want), integer(o.t, got)
		if n < lo || n > hi {
			o.t.Fatalf("%s: Redis answers %d, we %d to %d", what, n, lo, hi)
		}
	} else if got != want {
		o.t.Fatalf("%s:\nRedis answers %.300q\n          we %.300q", what, got, want)
	}

	last := map[string]Effect{}
	for i, at := range index {
		last[string(args[at])] = effects[i]
	}
	for i, key := range keys {
		p, e := priors[key], last[key]
		state := replies[at+3+3*i : at+6+3*i]
		kind, data, from, to := p.kind, p.data, p.expireAt, p.expireAt
		switch e.Op {
		case None:
			other := kind != "" && kind != "string"
			if name := strings.ToLower(string(args[0])); other && (name == "persist" || strings.Contains(name, "expire")) {
				from, to = integer(o.t, state[1]), integer(o.t, state[1]) // Effect says so: the caller's business
			}
		case Delete:
			kind, from, to = "", 0, 0
		case Put:
			kind, data = "string", string(e.Data)
			switch e.Expiry.Kind {
			case policy.NoExpiry:
				from, to = 0, 0
			case policy.ExpiresAt:
				from, to = e.Expiry.MS, e.Expiry.MS
			case policy.ExpiresIn:
				from, to = before+e.Expiry.MS, after+e.Expiry.MS
			case policy.KeepExpiry:
				if p.kind != "string" {
					o.t.Fatalf("%s: KeepExpiry on a key that held no string", what)
				}
			}
		}
		if from != 0 && from <= end {
			continue // it may have expired under our eyes
		}
		switch {
		case kind == "":
			if state[0] != "+none\r\n" {
				o.t.Fatalf("%s: %q is to be gone, Redis holds a %q", what, key, state[0])
			}
			continue
		case state[0] != "+"+kind+"\r\n":
			o.t.Fatalf("%s: %q is to hold a %s, Redis holds %q", what, key, kind, state[0])
		case kind == "string" && state[2] != string(appendBulk(nil, []byte(data))):
			o.t.Fatalf("%s: %q is to hold %.200q, Redis holds %.200q", what, key, data, state[2])
		}
		if from == 0 {
			from, to = -1, -1
		}
		if n := integer(o.t, state[1]); n < from || n > to {
			o.t.Fatalf("%s: %q is to expire at %d to %d, in Redis at %d", what, key, from, to, n)
		}
	}
}

// pools holds the words that generated cases are made of. All times lie far from now, on either side.
type pools struct {
	priors   []prior
	integers []string // also for times
	floats   []string
	values   []string
	options  []string
}

func newPools(now int64) pools {
	ms := func(n int64) string { return strconv.FormatInt(n, 10) }
	soon, late := now+1_000_000, now+1_000_000_000
	p := pools{
		integers: []string{
			"0", "1", "-1", "10", "-10", "2000", "500000", "2000000", "-2000000", "999999999999",
			"9223372036854775807", "-9223372036854775808", "9223372036854775806", "-9223372036854775807",
			"9223372036854775808", "-9223372036854775809", "99999999999999999999", "9223372036854775",
			"9223372036854776", "-9223372036854775", "-9223372036854776", "9223370000000000000", "9223370000000000",
			"", " ", " 1", "1 ", "+1", "01", "-0", "00", "-01", "--1", "-", "1.0", "1e3", "0x10", "abc", "1\x00", "é",
			ms(soon), ms(soon + 1), ms(soon - 1), ms(late), ms(now - 10_000), ms(soon / 1000), ms(late / 1000),
			ms(now/1000 - 100),
		},
		floats: []string{
			"0", "1", "-1", "1.5", "-1.5", ".5", "-.5", "5.", ".", "-", "+", "+1", "++1", "0.1", "0.2", "0.3", "1e3", "1E-3",
			"1e", "1e+", "1e-", "e1", "1e+5", "1e5.5", "3.0e3", "5.0e3", "1e17", "1e18", "1e20", "1e4932", "1.18e4932", "1.19e4932",
			"-1.18e4932", "1e4933", "1e99999999999999999999", "1e-99999999999999999999", "0e99999999999999999999", "1e-4950", "1e-4951",
			"1.9e-4951", "1.8225997659412373012e-4951", "1.8225997659412373013e-4951", "3.6451995318824746025e-4951",
			"3.3621031431120935063e-4932", "1e-4952", "-1e-4952", "1e-17", "5e-18", "4.9e-18", "-5e-18", "-4e-18", "1e-18",
			"inf", "-inf", "+inf", "Infinity", "-INFINITY", "infinit", "nan", "-nan", "NaN", "nan(1)", "nan()",
			"0x", "0x1", "-0X1F", "0x.8", "0x8.", "0x.", "0x1p4", "0x1P-4", "0x1p", "0x1p+", "0xg", "0x1.8p1", "0xabcdefp-3", "0x1p16383",
			"0x1p16384", "0x0.8p16384", "0x0.8p16385", "0x1p-16445", "0x1p-16446", "0x1.8p-16446", "0x1.0001p-16446", "0x0p99999999",
			"0x1p-99999", "0x1p99999", "0x8000000000000000.8", "0x8000000000000001.8", "0x8000000000000000.8000000000000000001",
			" 1", "1 ", "\t1", "1\n", "\v1", "1\x00", "\x001", "", " ", "abc", "1a", "1_000", "1,5", "0b1", "0o7", "00012", "-0", "-0.0", "1..2", "1.2.3",
			"9223372036854775807", "-9223372036854775808", "18446744073709551615", "18446744073709551616", "18446744073709551617",
			"36893488147419103233", "123456789.123456789123456789", "0.30000000000000000004", "99999999999999999.99999999999999999",
			strings.Repeat("1", 5119), strings.Repeat("1", 5120), "0." + strings.Repeat("0", 4000) + "1e4001", strings.Repeat("0", 5000) + "7",
			"1" + strings.Repeat("0", 4800) + "e-4800", "0x" + strings.Repeat("f", 4000), "0x" + strings.Repeat("0", 5000) + "1", "0x0." + strings.Repeat("0", 4090) + "1p16380",
		},
		values: []string{"", "v", "10", "-5", "a b", "\x00\xff\r\n", strings.Repeat("x", 4_000)},
		options: []string{
			"NX", "XX", "GT", "LT", "GET", "KEEPTTL", "PERSIST", "EX", "PX", "EXAT", "PXAT", "nx", "Xx", "gT", "lt", "get", "KeepTTL", "persist",
			"ex", "pX", "exat", "PxAt", "nx\x00y", "EX\x00", "\x00", "bad", "", "N", "NXX", "ba\r\nd\n", "\r\n", "\rx", "10", "500000", "0", "-1", "é", "\u212a",
		},
	}
	p.priors = []prior{{}}
	for _, data := range []string{
		"", "0", "10", "-3", "abc", " 1", "1 ", "01", "-0", "+5", "1.5", "-1.5e3", "inf", "nan", "0x10", "9223372036854775807", "-9223372036854775808",
		"9223372036854775808", "1e4932", "\x00\x01\r\n\xff", strings.Repeat("big", 2_000),
	} {
		p.priors = append(p.priors, prior{kind: "string", data: data}, prior{kind: "string", data: data, expireAt: soon})
	}
	p.priors = append(p.priors,
		prior{kind: "string", data: "far", expireAt: 9223372036854775807},
		prior{kind: "string", data: "far", expireAt: 9223372036854775000},
		prior{kind: "list"}, prior{kind: "list", expireAt: soon}, prior{kind: "hash"}, prior{kind: "hash", expireAt: soon})
	return p
}

func pick[T any](r *rand.Rand, s []T) T { return s[r.Intn(len(s))] }

// args makes the arguments of a random call of cmd, mostly well-formed.
func (p pools) args(r *rand.Rand, cmd *command, keys []string) [][]byte {
	name := cmd.name
	if r.Intn(2) == 0 {
		name = strings.ToUpper(name)
	}
	words := []string{name}
	for range max(cmd.arity, -cmd.arity) - 1 {
		words = append(words, "")
	}
	switch cmd.keys {
	case everyArg:
		words = words[:1]
		for range 1 + r.Intn(4) {
			words = append(words, pick(r, keys))
		}
	case everySecond:
		words = words[:1]
		for range 1 + r.Intn(3) {
			words = append(words, pick(r, keys), pick(r, p.values))
		}
	default:
		words[1] = pick(r, keys)
		for i := 2; i < len(words); i++ {
			switch {
			case cmd.name == "incrbyfloat":
				words[i] = pick(r, p.floats)
			case cmd.name == "set", cmd.name == "setnx", cmd.name == "getset", cmd.name == "append", i == 3 && cmd.unit != noUnit:
				words[i] = pick(r, p.values)
			default:
				words[i] = pick(r, p.integers)
			}
		}
		if cmd.arity < 0 {
			for range r.Intn(4) {
				word := pick(r, p.options)
				words = append(words, word)
				if len(word) > 1 && strings.ContainsAny(word[:2], "eExX") && r.Intn(5) > 0 {
					words = append(words, pick(r, p.integers))
				}
			}
		}
	}
	switch r.Intn(12) {
	case 0:
		words = words[:1+r.Intn(len(words))]
	case 1:
		words = append(words, pick(r, p.options))
	}
	return line(words...)
}

// Everything that the table has, with every kind of value before it, at random but always the same.
func TestOracle(t *testing.T) {
	socket := startRedis(t)
	keys := []string{"k1", "k2", "k3"}
	for _, proto := range []int{2, 3} {
		o := dialOracle(t, socket, proto)
		p := newPools(clock(t, o.do(line("TIME"))[0]))
		r := rand.New(rand.NewSource(int64(proto)))
		for _, name := range slices.Sorted(maps.Keys(commands)) {
			cmd := commands[name]
			rounds := 4
			if cmd.arity < -1 && cmd.keys == firstKey { // options
				rounds = 20
			}
			for range rounds {
				for _, first := range p.priors {
					priors := map[string]prior{"k1": first}
					use := keys[:1]
					if cmd.keys != firstKey {
						use = keys
						priors["k2"], priors["k3"] = pick(r, p.priors), pick(r, p.priors)
					}
					o.compare(p.args(r, cmd, use), priors)
				}
			}
		}
	}
}

// What chance might miss: each pair of options, each number against each kind of value.
func TestOracleEveryArgument(t *testing.T) {
	o := dialOracle(t, startRedis(t), 3)
	p := newPools(clock(t, o.do(line("TIME"))[0]))
	soon := p.priors[2].expireAt
	few := []prior{{}, {kind: "string", data: "10"}, {kind: "string", data: "10", expireAt: soon}, {kind: "list", expireAt: soon}}
	on := func(words ...string) {
		t.Helper()
		for _, before := range few {
			o.compare(line(words...), map[string]prior{"k1": before})
		}
	}
	for _, a := range p.options {
		for _, b := range p.options {
			on("expire", "k1", "2000", a, b)
			on("getex", "k1", a, b)
			on("getex", "k1", a, "500000", b)
			on("getex", "k1", a, b, "0")
			on("set", "k1", "v", a, b)
			on("set", "k1", "v", a, "500000", b)
			on("set", "k1", "v", a, b, "500000")
			on("set", "k1", "v", a, "500000", b, "600000")
		}
	}
	for _, n := range p.integers {
		for _, name := range []string{"incrby", "decrby", "expire", "pexpire", "expireat", "pexpireat"} {
			on(name, "k1", n)
		}
		for _, option := range []string{"nx", "xx", "gt", "lt"} {
			on("pexpireat", "k1", n, option)
			on("expire", "k1", n, option)
			on("expire", "k1", n, option, "xx")
		}
		for _, u := range []string{"ex", "px", "exat", "pxat"} {
			on("set", "k1", "v", u, n)
			on("set", "k1", "v", "nx", "get", u, n)
			on("getex", "k1", u, n)
		}
		on("setex", "k1", n, "v")
		on("psetex", "k1", n, "v")
		for _, m := range p.integers {
			on("getrange", "k1", n, m)
		}
		for _, before := range p.priors {
			o.compare(line("incrby", "k1", n), map[string]prior{"k1": before})
			o.compare(line("decrby", "k1", n), map[string]prior{"k1": before})
		}
	}
	for start := -5; start < 5; start++ {
		for end := -5; end < 5; end++ {
			o.compare(line("GETRANGE", "k1", strconv.Itoa(start), strconv.Itoa(end)), map[string]prior{"k1": {kind: "string", data: "abc"}})
		}
	}
}

// Sums are compared in bulk: the pool's numbers with each other, and random numbers of all magnitudes.
func TestOracleFloats(t *testing.T) {
	o := dialOracle(t, startRedis(t), 2)
	p := newPools(clock(t, o.do(line("TIME"))[0]))
	r := rand.New(rand.NewSource(7))
	number := func() string {
		b := []byte(pick(r, []string{"", "", "-", "+"}))
		base, mark, reach := 10, "e", 40
		if r.Intn(4) == 0 {
			b, base, mark, reach = append(b, "0x"...), 16, "p", 130
		}
		if r.Intn(20) == 0 {
			reach = 16600
		}
		for range 1 + r.Intn(30) {
			if r.Intn(12) == 0 && !bytes.Contains(b, []byte(".")) {
				b = append(b, '.')
			}
			b = strconv.AppendInt(b, int64(r.Intn(base)), base)
		}
		if r.Intn(2) == 0 {
			b = fmt.Appendf(b, "%s%d", mark, r.Intn(2*reach)-reach)
		}
		return string(b)
	}
	var pairs [][2]string
	for _, a := range p.floats {
		pairs = append(pairs, [2]string{a, "0"}, [2]string{"0", a}, [2]string{a, a})
		for range 20 {
			pairs = append(pairs, [2]string{a, pick(r, p.floats)})
		}
	}
	for range 10_000 {
		pairs = append(pairs, [2]string{number(), number()})
	}
	for batch := range slices.Chunk(pairs, 100) {
		var cmds [][][]byte
		for _, pair := range batch {
			cmds = append(cmds, line("SET", "k", pair[0]), line("INCRBYFLOAT", "k", pair[1]))
		}
		replies := o.do(cmds...)
		for i, pair := range batch {
			value := Value{Exists: true, Data: []byte(pair[0]), TTL: -1, ExpireAt: -1}
			got, _ := Eval(nil, cmds[2*i+1], []Value{value}, Env{Proto: 2}, nil)
			if string(got) != replies[2*i+1] {
				t.Errorf("%.200q + %.200q:\nRedis answers %.300q\n          we %.300q", pair[0], pair[1], replies[2*i+1], got)
			}
		}
	}
}

// APPEND stops at proto-max-bulk-len, to the byte. Redis lets it be no less than 1 MiB.
func TestOracleMaxBulk(t *testing.T) {
	const limit = 1 << 20
	o := dialOracle(t, startRedis(t), 3)
	o.do(line("CONFIG", "SET", "proto-max-bulk-len", strconv.Itoa(limit)))
	head := strings.Repeat("x", limit-5)
	for _, tail := range []string{"", "1234", "12345", "123456"} {
		args := line("APPEND", "k", tail)
		want := o.do(line("SET", "k", head), args)[1]
		value := Value{Exists: true, Data: []byte(head), TTL: -1, ExpireAt: -1}
		got, effects := Eval(nil, args, []Value{value}, Env{Proto: 3, MaxBulk: limit}, nil)
		if string(got) != want {
			t.Errorf("%d bytes more: Redis answers %q, we %q", len(tail), want, got)
		}
		if failed := want[0] == '-'; failed != (effects[0].Op == None) {
			t.Errorf("%d bytes more: %q with effect %d", len(tail), want, effects[0].Op)
		}
	}
}
