package chaos

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"cacheproxy/internal/testenv"

	"github.com/jackc/pgx/v5"
	"github.com/redis/go-redis/v9"
)

// A sidecar dies at each step of each protocol, once before the store has the message and once before the answer arrives.

// background are messages that are not steps of what a sidecar is asked.
var background = []string{"journal", "poll", "weigh"}

// deed is something that a sidecar does, of which it may do any part. The key was "5" before, or what prepare made of it.
type deed struct {
	name    string
	prepare func(x *stepped)       // what must be so before; nil: nothing
	do      func(x *stepped) error // what is asked, nil if it was acknowledged
	before  string                 // what GET answers if it was not done
	after   string                 // and if it was
	alone   bool                   // no other sidecar runs, which might do it
	reads   bool                   // only in phases that read the store
}

// stepped is one deed that is cut short.
type stepped struct {
	t      *testing.T
	c      *cluster
	a, b   *sidecar
	direct *redis.Client
	key    string
}

// say is a command through the sidecar that dies, with {} for the key. The parts between ";" are those of one transaction.
func say(words string) func(*stepped) error {
	return func(x *stepped) error {
		c := client(x.a.addr)
		defer c.Close()
		var cmds [][]any
		for part := range strings.SplitSeq(words, ";") {
			var args []any
			for _, w := range strings.Fields(part) {
				args = append(args, strings.ReplaceAll(w, "{}", x.key))
			}
			cmds = append(cmds, args)
		}
		ctx := context.Background()
		if len(cmds) == 1 {
			err := c.Do(ctx, cmds[0]...).Err()
			if errors.Is(err, redis.Nil) {
				err = nil
			}
			return err
		}
		p := c.TxPipeline()
		for _, args := range cmds {
			p.Do(ctx, args...)
		}
		_, err := p.Exec(ctx)
		return err
	}
}

func (x *stepped) must(err error) {
	x.t.Helper()
	if err != nil {
		x.t.Fatal(err)
	}
}

// raw is a command to Redis itself.
func (x *stepped) raw(args ...any) {
	x.t.Helper()
	if err := x.direct.Do(context.Background(), args...).Err(); err != nil && !errors.Is(err, redis.Nil) {
		x.t.Fatal(err)
	}
}

func (x *stepped) sql(query string, args ...any) {
	x.t.Helper()
	db, err := pgx.Connect(context.Background(), x.c.pg.URL("app"))
	x.must(err)
	defer db.Close(context.Background()) //nolint:errcheck // it has done its work
	_, err = db.Exec(context.Background(), query, args...)
	x.must(err)
}

// get reads the key through a sidecar.
func (x *stepped) get(s *sidecar) (said string) {
	c := client(s.addr)
	defer c.Close()
	soon(x.t, x.key+" can be read", func() (err error) {
		said, err = c.Get(context.Background(), x.key).Result()
		if errors.Is(err, redis.Nil) {
			said, err = "(nil)", nil
		}
		return err
	})
	return said
}

// settled waits until the journals are empty, which repairs make them.
func settled(x *stepped) error { x.c.journals(x.t); return nil }

// stored makes sure that the store has a row, also in a phase that leaves none.
func (x *stepped) stored(value string) {
	if x.a.phase == "phase2" {
		x.sql("INSERT INTO cacheproxy.entries (key, route, raw, generation, updated_at) VALUES ($1, 'all', $2, (SELECT coalesce(max(generation), 0) FROM cacheproxy.generations), clock_timestamp())", x.key, []byte(value))
	}
}

// forgotten lets Redis forget the key.
func forgotten(x *stepped) {
	x.stored("5")
	x.raw("DEL", x.key)
}

// restarted lets the sidecar meet a Redis with an older memory, when it starts.
func restarted(x *stepped) {
	x.must(say("SET {} 8")(x))
	x.stored("8")
	x.a.kill()
	x.raw("SET", x.key, "5")
	now, err := x.direct.Time(context.Background()).Result()
	x.must(err)
	x.raw("SET", "cacheproxy:clock", fmt.Sprintf("%d another one", now.Add(-time.Minute).UnixMilli()))
}

func starts(x *stepped) error {
	x.a.start()
	soon(x.t, "it has recovered, or is dead", func() error {
		clock, err := x.direct.Get(context.Background(), "cacheproxy:clock").Result()
		if err == nil && strings.HasSuffix(clock, "another one") && !x.a.dead() {
			err = errors.New("it has not")
		}
		return err
	})
	return nil
}

// entry journals that Redis is stale, which holds an older value than the row.
func entry(x *stepped) {
	x.stored("5")
	x.raw("SET", x.key, "old")
	x.sql("INSERT INTO cacheproxy.journal (keys, routes) VALUES (ARRAY[$1], '{all}')", x.key)
}

// marked journals that the store is stale: Redis holds a newer value.
func marked(x *stepped) {
	x.raw("SET", x.key, "6")
	x.raw("HSET", "cacheproxy:journal", x.key, "other.1")
}

var deeds = []deed{
	{name: "GET of what Redis forgot", prepare: forgotten, do: say("GET {}"), before: "5", after: "5", reads: true},
	{name: "GET of nothing", prepare: func(x *stepped) { x.must(say("DEL {}")(x)); x.raw("DEL", "cacheproxy:lease:k:{"+x.key+"}") }, do: say("GET {}"), before: "(nil)", after: "(nil)"},
	{name: "SET", do: say("SET {} 6"), before: "5", after: "6"},
	{name: "SET with a TTL", do: say("SET {} 6 EX 1000"), before: "5", after: "6"},
	{name: "SET NX", prepare: func(x *stepped) { x.must(say("DEL {}")(x)) }, do: say("SET {} 6 NX"), before: "(nil)", after: "6"},
	{name: "DEL", do: say("DEL {}"), before: "5", after: "(nil)"},
	{name: "INCR", do: say("INCR {}"), before: "5", after: "6"},
	{name: "APPEND", do: say("APPEND {} x"), before: "5", after: "5x"},
	{name: "EXPIRE", do: say("EXPIRE {} 1000"), before: "5", after: "5"},
	{name: "MSET", do: say("MSET {} 6 {}b 7"), before: "5", after: "6"},
	{name: "SETRANGE", do: say("SETRANGE {} 0 6"), before: "5", after: "6"},
	{name: "EVAL", do: say("EVAL return(redis.call('INCR',KEYS[1])) 1 {}"), before: "5", after: "6"},
	{name: "MULTI", do: say("INCR {};GET {}"), before: "5", after: "6"},
	{name: "FLUSHALL", do: say("FLUSHALL"), before: "5", after: "(nil)"},
	{name: "a repair because of an entry", prepare: entry, do: settled, before: "5", after: "5", alone: true, reads: true},
	{name: "a repair because of a mark", prepare: marked, do: settled, before: "5", after: "6", alone: true}, // phase0 learns of the mark with a poll
	{name: "a start beside an older memory", prepare: restarted, do: starts, before: "8", after: "8", alone: true, reads: true},
}

// stepsOf are the steps at which a sidecar must have died, by phase, besides those of all.
var stepsOf = map[string][]string{
	"":       {"lock", "COMMIT", "load", "capture", "fence", "flush", "open", "take", "repair", "named", "strike", "clock", "changed", "row", "read"},
	"phase0": {"invalidate", "fill"},
	"phase1": {"invalidate", "fill", "grant", "promote", "absent"},
	"phase2": {"write", "overtake", "grant", "promote", "absent"},
	"drain":  {"write", "overtake"},
}

// notIn are those that a phase does not have.
var notIn = map[string][]string{"phase2": {"capture"}, "drain": {"capture", "row", "take", "repair", "clock", "changed"}}

func TestCrashAtEachStep(t *testing.T) {
	program := testenv.Program(t)
	for _, phase := range []string{"phase0", "phase1", "phase2", "drain"} {
		t.Run(phase, func(t *testing.T) {
			t.Parallel()
			c := newCluster(t, options{program: program, steps: true, poll: 100 * ms}, phase, phase)
			died := map[testenv.Step]int{}
			tries := 0
			try := func(d deed, is func(testenv.Step) bool) bool {
				tries++
				if d.reads && phase == "drain" {
					return false
				}
				fired := crash(t, c, d, fmt.Sprint(phase, "-", tries), is, died)
				if t.Failed() {
					t.FailNow()
				}
				return fired
			}
			for _, d := range deeds {
				for _, done := range []bool{false, true} {
					for n := 1; ; n++ {
						count := 0
						if !try(d, func(s testenv.Step) bool {
							if s.Done == done {
								count++
							}
							return s.Done == done && count == n
						}) {
							break
						}
					}
				}
			}
			// How many messages there are is not always the same: what was passed over is looked for by its name.
			for _, name := range slices.Concat(stepsOf[""], stepsOf[phase]) {
				for _, done := range []bool{false, true} {
					at := testenv.Step{Name: name, Done: done}
					if slices.Contains(notIn[phase], name) {
						continue
					}
					for i := 0; died[at] == 0 && i < len(deeds); i++ {
						try(deeds[i], func(s testenv.Step) bool { return s.Name == name && s.Done == done })
					}
					if died[at] == 0 {
						t.Errorf("it never died at %s, done %t", name, done)
					}
				}
			}
			var lines []string
			for s, n := range died {
				when := "before"
				if s.Done {
					when = "after"
				}
				lines = append(lines, fmt.Sprintf("%s %s %d times", when, s.Name, n))
			}
			slices.Sort(lines)
			t.Logf("a sidecar died %s", strings.Join(lines, ", "))
		})
	}
}

// crash lets a sidecar die at the message of a deed that is says, and judges what is left. false: it has no such message.
func crash(t *testing.T, c *cluster, d deed, key string, is func(testenv.Step) bool, died map[testenv.Step]int) bool {
	t.Helper()
	x := &stepped{t: t, c: c, a: c.sidecars[0], b: c.sidecars[1], direct: client(c.redis().Addr()), key: key}
	defer x.direct.Close()
	soon(t, "it writes", func() error { return say("SET {} 5")(x) })
	if d.alone {
		x.b.kill()
	}
	if d.prepare != nil {
		d.prepare(x)
	}

	var mu sync.Mutex
	fired := false
	var at testenv.Step
	x.a.steps.At(func(s testenv.Step) bool {
		mu.Lock()
		defer mu.Unlock()
		if fired {
			return false
		}
		if slices.Contains(background, s.Name) || !is(s) {
			return true
		}
		fired, at = true, testenv.Step{Name: s.Name, Done: s.Done}
		x.a.kill()
		return false
	})
	acknowledged := make(chan bool, 1)
	go func() { acknowledged <- d.do(x) == nil }()
	var told bool
	for waiting := true; waiting; {
		select {
		case told = <-acknowledged:
			waiting = false
		case <-time.After(5 * ms):
			mu.Lock()
			waiting = !fired // what waits for a repair that died waits in vain
			mu.Unlock()
		}
	}
	x.a.steps.At(nil)
	mu.Lock()
	defer mu.Unlock()
	if fired {
		died[at]++
		x.a.start()
	}
	if d.alone {
		x.b.start()
	}

	// What it left: done or not, and not first the one and then the other.
	soFar := d.before
	see := func(who, got string) {
		t.Helper()
		switch {
		case got == d.after:
			soFar = d.after
		case got != soFar:
			t.Errorf("%s: it died at %s, done %t: %s reads %q, and %q was there before", d.name, at.Name, at.Done, who, got, soFar)
		}
	}
	if told && !d.alone {
		soFar = d.after
	}
	if d.alone {
		soon(t, "the other is ready", x.b.isReady)
	}
	see("the other", x.get(x.b))
	soon(t, "it is ready", x.a.isReady)
	see("it", x.get(x.a))
	c.journals(t)
	see("the other, when all is repaired,", x.get(x.b))
	see("it, when all is repaired,", x.get(x.a))
	if phase := x.a.phase; phase == "phase0" || phase == "phase1" {
		x.raw("DEL", key)
		see("the other, when Redis has forgotten it,", x.get(x.b))
	}
	if d.alone && soFar != d.after {
		t.Errorf("%s: %q is left", d.name, soFar)
	}
	return fired
}
