package chaos

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"
	"github.com/redis/go-redis/v9"
)

// key is one key and everything that clients did to it.
type key struct {
	name    string
	numbers bool // it is counted with, so that INCR makes sense

	mu      sync.Mutex
	ops     []porcupine.Operation // guarded by mu
	unknown int                   // guarded by mu: those whose outcome is not known
}

// note adds a command. Its place is known before it is sent, so that what Redis loses meanwhile is seen to be at the same time.
func (k *key) note(op porcupine.Operation) {
	k.mu.Lock()
	k.ops = append(k.ops, op)
	if op.Return == never {
		k.unknown++
	}
	k.mu.Unlock()
}

const (
	slots = 12
	// keyOps commands are a key's history; then another one takes its place. The time of a check grows faster than its history, and the faster the more
	// commands nobody knows the outcome of: each may take effect at any later time.
	keyOps     = 150
	keyUnknown = 6
)

// traffic is what clients do, and what they were told.
type traffic struct {
	c      *cluster
	t      *testing.T
	prefix string // of all keys
	seed   uint64
	began  time.Time
	stop   chan struct{}

	numeric              bool // all values are numbers, as JSON has them too
	forgetful, uncounted bool // as in input

	mu   sync.Mutex
	at   [slots]*key // guarded by mu: in use
	keys []*key      // guarded by mu: all there have been

	lives  lives
	losses spans // when any key may have gone

	commands, unsent, refused, unknown atomic.Int64
	reasons                            sync.Map // what refusals said → *atomic.Int64
}

func (tr *traffic) now() int64 { return int64(time.Since(tr.began)) }

// key returns one that is in use.
func (tr *traffic) key(rng *rand.Rand) *key { return tr.keyAt(rng.IntN(slots)) }

func (tr *traffic) keyAt(i int) *key {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	k := tr.at[i]
	if k != nil {
		k.mu.Lock()
		full := len(k.ops) >= keyOps || k.unknown >= keyUnknown
		k.mu.Unlock()
		if full {
			k = nil
		}
	}
	if k == nil {
		k = &key{name: fmt.Sprint(tr.prefix, "k", len(tr.keys)), numbers: tr.numeric || i%3 == 0}
		tr.at[i] = k
		tr.keys = append(tr.keys, k)
	}
	return k
}

// all are the keys that there have been: of each, somebody may still see that it was lost.
func (tr *traffic) all() []*key {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	return slices.Clone(tr.keys)
}

const swapScript = `local v = redis.call('GET', KEYS[1]); redis.call('SET', KEYS[1], ARGV[1]); return v`

// long is a TTL in seconds that nobody lives to see the end of.
const long = 1000

// conns are connections to every sidecar.
func (tr *traffic) conns() (conns []*redis.Client) {
	for _, s := range tr.c.sidecars {
		conns = append(conns, client(s.addr))
	}
	return conns
}

// drawn is what a client is to do: all that chance decides of it.
type drawn struct {
	sidecar, slot, other int    // other: the key that MSET sets too
	p                    int    // which command, in percent
	value                string // no two are equal, nor after some INCR
	rest                 time.Duration
}

// draw depends on nothing but the seed, how often it was called, and how many sidecars there are: never on what a client was told.
func draw(rng *rand.Rand, n, i, sidecars int) drawn {
	return drawn{sidecar: rng.IntN(sidecars), slot: rng.IntN(slots), other: rng.IntN(slots), p: rng.IntN(100), value: fmt.Sprint(n*1_000_000_000 + 50*i),
		rest: time.Duration(1+rng.IntN(5)) * ms}
}

// clientRand is that of a client.
func clientRand(seed uint64, n int) *rand.Rand { return rand.New(rand.NewPCG(seed, uint64(n))) }

// client is one client's life.
func (tr *traffic) client(n int) {
	rng := clientRand(tr.seed, n)
	conns := tr.conns()
	defer func() {
		for _, c := range conns {
			c.Close()
		}
	}()
	for i := 0; ; i++ {
		select {
		case <-tr.stop:
			return
		default:
		}
		d := draw(rng, n, i, len(conns))
		if !tr.command(n, d, conns[d.sidecar]) {
			time.Sleep(d.rest) // a refused client that does not breathe only spins
		}
	}
}

// command does one thing. false: it was refused.
func (tr *traffic) command(n int, d drawn, c *redis.Client) bool {
	ctx := context.Background()
	k, value := tr.keyAt(d.slot), d.value
	if !k.numbers {
		value = "v" + value + "."
	}
	var args []any
	in := []input{{}}
	keys := []*key{k}
	tx := false
	switch p := d.p; {
	case p < 45:
		args, in[0] = []any{"GET", k.name}, input{verb: get}
	case p < 57:
		args, in[0] = []any{"SET", k.name, value}, input{verb: set, arg: value, how: ""}
	case p < 62:
		args, in[0] = []any{"SET", k.name, value, "EX", long}, input{verb: set, arg: value, how: "EX"}
	case p < 66:
		args, in[0] = []any{"SET", k.name, value, "NX"}, input{verb: setNX, arg: value, how: ""}
	case p < 74:
		args, in[0] = []any{"DEL", k.name}, input{verb: del}
	case p < 80 && k.numbers:
		args, in[0] = []any{"INCR", k.name}, input{verb: incr}
	case p < 80:
		args, in[0] = []any{"APPEND", k.name, value}, input{verb: add, arg: value, how: ""}
	case p < 84:
		args, in[0] = []any{"EXPIRE", k.name, long}, input{verb: expire}
	case p < 88:
		args, in[0] = []any{"GETSET", k.name, value}, input{verb: swap, arg: value, how: "GETSET"}
	case p < 92:
		args, in[0] = []any{"EVAL", swapScript, 1, k.name, value}, input{verb: swap, arg: value, how: "EVAL"}
	case p < 96:
		tx = true
		in[0] = input{verb: swap, arg: value, how: "MULTI"}
	default:
		other := tr.keyAt(d.other)
		args, in[0] = []any{"MSET", k.name, value}, input{verb: set, arg: value, how: "MSET"}
		if other != k && other.numbers == k.numbers {
			args = append(args, other.name, value)
			in, keys = append(in, in[0]), append(keys, other)
		}
	}
	call := tr.now()
	var said any
	var err error
	if tx {
		said, err = transaction(ctx, c, k.name, value)
	} else {
		said, err = c.Do(ctx, args...).Result()
		if errors.Is(err, redis.Nil) {
			said, err = nil, nil
		}
	}
	back := tr.now()
	tr.commands.Add(1)
	out := output{known: true}
	var reply redis.Error
	switch {
	case err == nil && said == nil:
		out.text = "(nil)"
	case err == nil:
		switch v := said.(type) {
		case string:
			out.text = v
		case int64:
			out.text = fmt.Sprint(":", v)
		default:
			out.text = fmt.Sprintf("%T", v)
		}
	case !errors.As(err, &reply): // the connection broke
		tr.reason("connection: " + trim(err.Error()))
		if op := (*net.OpError)(nil); errors.As(err, &op) && op.Op == "dial" {
			tr.commands.Add(-1)
			tr.unsent.Add(1)
			return false
		}
		out.known = false
	case strings.HasPrefix(err.Error(), "UNCERTAIN"):
		out.known = false
		tr.reason(trim(err.Error()))
	case strings.HasPrefix(err.Error(), "UNAVAILABLE"), strings.HasPrefix(err.Error(), "OOM"), strings.HasPrefix(err.Error(), "EXECABORT"):
		tr.refused.Add(1)
		tr.reason(trim(err.Error()))
		return false // nothing was done, which the rest of the history shows
	default:
		out.text = "-" + err.Error()
	}
	if !out.known {
		tr.unknown.Add(1)
		if in[0].verb == get {
			return false
		}
		back = never
	}
	for i, k := range keys {
		in[i].forgetful, in[i].uncounted = tr.forgetful, tr.uncounted
		k.note(porcupine.Operation{ClientId: n, Input: in[i], Call: call, Output: out, Return: back})
	}
	return out.known
}

// transaction is MULTI, GET, SET and EXEC in one write.
func transaction(ctx context.Context, c *redis.Client, key, value string) (any, error) {
	p := c.TxPipeline()
	was := p.Get(ctx, key)
	p.Set(ctx, key, value, 0)
	if _, err := p.Exec(ctx); err != nil && !errors.Is(err, redis.Nil) {
		return nil, err
	}
	if v, err := was.Result(); !errors.Is(err, redis.Nil) {
		return v, err
	}
	return nil, nil
}

// trim keeps what kind of failure it was.
func trim(s string) string {
	s, _, _ = strings.Cut(s, "127.0.0.1")
	return s[:min(len(s), 120)]
}

func (tr *traffic) reason(text string) {
	n, _ := tr.reasons.LoadOrStore(text, new(atomic.Int64))
	n.(*atomic.Int64).Add(1)
}

// lost notes that Redis has lost something of keys, some time since from.
func (tr *traffic) lost(from int64, what verb, keys ...*key) {
	back := tr.now()
	tr.losses.add(from, back)
	for _, k := range keys {
		k.note(porcupine.Operation{ClientId: 0, Input: input{verb: what}, Call: from, Output: output{known: true}, Return: back})
	}
}

// flush empties the database through a sidecar.
func (tr *traffic) flush(rng *rand.Rand) {
	c := client(tr.c.sidecars[rng.IntN(len(tr.c.sidecars))].addr)
	defer c.Close()
	call := tr.now()
	err := c.Do(context.Background(), "FLUSHALL").Err()
	back := tr.now()
	var reply redis.Error
	switch {
	case err == nil:
	case errors.As(err, &reply) && !strings.HasPrefix(err.Error(), "UNCERTAIN"):
		tr.reason(trim(err.Error()))
		return
	default:
		back = never
	}
	for _, k := range tr.all() {
		k.note(porcupine.Operation{ClientId: 0, Input: input{verb: flushed}, Call: call, Output: output{known: err == nil}, Return: back})
	}
	tr.losses.add(call, back)
}
