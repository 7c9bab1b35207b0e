package chaos

import (
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"

	"github.com/anishathalye/porcupine"
)

// What a history is judged by: one key of Redis, as a string or nothing, and what each command answers and leaves.

// absent is the state of a key that is not there; a value is "=" and itself.
const absent = "-"

// verb is what a command does to one key: a closed list.
type verb string

const (
	get    verb = "GET"
	set    verb = "SET"    // also MSET's part for this key, and SET with a TTL that nobody lives to see
	setNX  verb = "SET NX" //
	del    verb = "DEL"
	incr   verb = "INCR"
	add    verb = "APPEND"
	expire verb = "EXPIRE" // with a TTL that nobody lives to see
	swap   verb = "swap"   // the value before, and SET: GETSET, a script, or MULTI
	gone   verb = "gone"   // Redis has forgotten the key; it may have been the only holder
)

type input struct {
	verb verb
	arg  string
	how  string // where a verb stands for several commands
}

type output struct {
	known bool   // the client was told
	text  string // what: as redis-cli would say it
}

func (in input) String() string { return strings.TrimSpace(string(in.verb) + " " + in.how) }

// apply is what Redis does: what it answers and what the key is afterwards.
func (in input) apply(state string) (reply, next string) {
	value, exists := strings.CutPrefix(state, "=")
	if !exists {
		value = ""
	}
	one := func(yes bool) string {
		if yes {
			return ":1"
		}
		return ":0"
	}
	was := "(nil)"
	if exists {
		was = value
	}
	switch in.verb {
	case get:
		return was, state
	case set:
		return "OK", "=" + in.arg
	case setNX:
		if exists {
			return "(nil)", state
		}
		return "OK", "=" + in.arg
	case del:
		return one(exists), absent
	case gone:
		return "", absent
	case incr:
		n, err := strconv.ParseInt(value, 10, 64)
		if exists && err != nil {
			return "-ERR value is not an integer or out of range", state
		}
		n++
		return fmt.Sprint(":", n), fmt.Sprint("=", n)
	case add:
		return fmt.Sprint(":", len(value)+len(in.arg)), "=" + value + in.arg
	case expire:
		return one(exists), state
	case swap:
		return was, "=" + in.arg
	}
	panic("no such command: " + in.verb)
}

var model = (&porcupine.NondeterministicModel{
	Init: func() []any { return []any{absent} },
	Step: func(state, in, out any) []any {
		i, o := in.(input), out.(output)
		reply, next := i.apply(state.(string))
		switch {
		case i.verb == gone: // or somebody else had it too
			return []any{state, next}
		case o.known && o.text != reply:
			return nil
		}
		return []any{next}
	},
	Equal: func(a, b any) bool { return a == b },
	DescribeOperation: func(in, out any) string {
		i, o := in.(input), out.(output)
		if !o.known {
			o.text = "?"
		}
		return fmt.Sprintf("%s %s → %s", i, i.arg, o.text)
	},
	DescribeState: func(state any) string { return fmt.Sprint(state) },
}).ToModel()

// never is when a command returns whose outcome nobody knows: it may take effect at any time, or not at all.
const never = math.MaxInt64

// verdict is what a check of one key's history found.
type verdict struct {
	result porcupine.CheckResult
	slack  time.Duration // how old the state that a GET answers may be, for result to be Ok
}

// slacks are tried in turn: the first that explains a history is how long staleness lasted in it, rounded up.
func slacks(most time.Duration) []time.Duration {
	all := []time.Duration{0}
	for d := most / 16; most > 0 && d <= most; d *= 2 {
		all = append(all, d)
	}
	return all
}

// checkTime bounds one check. A history that takes longer counts as failed.
const checkTime = 60 * time.Second

// check judges one key's history. most is for how long a write may be missed by reads (exception (a) of P3); writes never
// miss one.
func check(ops []porcupine.Operation, most time.Duration) (v verdict) {
	for _, v.slack = range slacks(most) {
		late := make([]porcupine.Operation, len(ops))
		for i, op := range ops {
			if op.Input.(input).verb == get {
				op.Call -= int64(v.slack) // what it answers was true then
			}
			late[i] = op
		}
		if v.result = porcupine.CheckOperationsTimeout(model, late, checkTime); v.result != porcupine.Illegal {
			return v
		}
	}
	return v
}
