package chaos

import (
	"cmp"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/anishathalye/porcupine"
)

// What a history is judged by: one key of Redis, as a string or nothing, and what each command answers and leaves.

// absent is the state of a key that is not there; a value is "=" and itself. unknown is that of a key that may hold anything: what is read next tells.
const (
	absent  = "-"
	unknown = "?"
)

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

	// What is done to all keys:
	flushed verb = "FLUSHALL"
	gone    verb = "gone"  // Redis has forgotten the key; it may have been the only holder
	older   verb = "older" // Redis has an older memory: the key may be as it was at any time before
)

type input struct {
	verb verb
	arg  string
	how  string // where a verb stands for several commands
	// forgetful: Redis may have forgotten the key just before, and have been its only holder.
	forgetful bool
	// uncounted: a DEL that finds nothing may be wrong about it, for the other store could not be asked (exception (e) of P3).
	uncounted bool
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
	case gone, flushed:
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

// step returns the states that a command may leave of a key in state, none if it would not have answered so.
func step(state string, in input, out output) []any {
	if in.forgetful && state != absent {
		in.forgetful = false
		return append(step(state, in, out), step(absent, in, out)...)
	}
	if in.verb == older {
		return []any{state, unknown}
	}
	if state == unknown {
		return in.learn(out)
	}
	reply, next := in.apply(state)
	switch {
	case in.verb == gone: // or somebody else had it too
		return []any{state, next}
	case in.uncounted && in.verb == del && out.text == ":0":
	case out.known && in.verb != flushed && out.text != reply:
		return nil
	}
	return []any{next}
}

// learn is apply for a key that may hold anything: the answer tells what it was, if it is one that the command gives at all.
func (in input) learn(out output) []any {
	held := "=" + out.text
	if out.text == "(nil)" {
		held = absent
	}
	switch {
	case in.verb == set, in.verb == swap:
		return []any{"=" + in.arg}
	case in.verb == del, in.verb == flushed, in.verb == gone:
		return []any{absent}
	case !out.known, in.verb == add: // of a value of unknown length
		return []any{unknown}
	case in.verb == get:
		return []any{held}
	case in.verb == setNX && out.text == "OK":
		return []any{"=" + in.arg}
	case in.verb == expire && out.text == ":0":
		return []any{absent}
	case in.verb == incr && strings.HasPrefix(out.text, ":"):
		return []any{"=" + out.text[1:]}
	}
	return []any{unknown}
}

var model = (&porcupine.NondeterministicModel{
	Init:  func() []any { return []any{absent} },
	Step:  func(state, in, out any) []any { return step(state.(string), in.(input), out.(output)) },
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
func slacks(most time.Duration) (all []time.Duration) {
	for d := most / 16; d <= most; d *= 2 {
		all = append(all, d)
	}
	return all
}

const (
	// checkTime bounds one check. A history that takes longer counts as failed.
	checkTime = 60 * time.Second
	// maxLate bounds how many reads of one key an exception may explain.
	maxLate = 64
)

// check judges one key's history. most is for how long a write may be missed by reads (exceptions (a) and (b) of P3); writes never miss one.
//
// Only reads that cannot be explained otherwise are allowed to be late. To allow it to all of them would be as right, but then each is concurrent with
// hundreds of others, and no check ends.
func check(ops []porcupine.Operation, most time.Duration) (v verdict) {
	if v.result = porcupine.CheckOperationsTimeout(model, ops, checkTime); v.result != porcupine.Illegal || most == 0 {
		return v
	}
	late := map[int]bool{}
	for len(late) < maxLate {
		result, info := porcupine.CheckOperationsVerbose(model, delayed(ops, late, most), checkTime)
		if result == porcupine.Unknown {
			v.result = result
			return v
		}
		if result == porcupine.Ok {
			break
		}
		if !suspect(ops, blocks(ops, info), late, most) {
			return v
		}
	}
	for _, v.slack = range slacks(most) {
		if v.result = porcupine.CheckOperationsTimeout(model, delayed(ops, late, v.slack), checkTime); v.result != porcupine.Illegal {
			return v
		}
	}
	return v
}

// suspect adds reads to late, for one of them may be why a history cannot go on with one of the operations at: a read of these itself, or else the last ones before
// the first, which may have seen what was overwritten, so that it came too early. false: there are none.
func suspect(ops []porcupine.Operation, at []int, late map[int]bool, most time.Duration) bool {
	if len(at) == 0 {
		return false
	}
	for _, i := range at {
		if ops[i].Input.(input).verb == get && !late[i] {
			late[i] = true
			return true
		}
	}
	i := at[0]
	var before []int
	for j, op := range ops {
		if op.Input.(input).verb == get && !late[j] && op.Call < ops[i].Return && op.Return > ops[i].Call-int64(most) {
			before = append(before, j)
		}
	}
	slices.SortFunc(before, func(a, b int) int { return cmp.Compare(ops[b].Call, ops[a].Call) })
	for _, j := range before[:min(len(before), atOnce)] {
		late[j] = true
	}
	return len(before) > 0
}

// atOnce reads are suspected at once: few, so that not many more are delayed than must be.
const atOnce = 4

// delayed lets some reads answer what was true up to d before they were asked.
func delayed(ops []porcupine.Operation, late map[int]bool, d time.Duration) []porcupine.Operation {
	out := slices.Clone(ops)
	for i := range late {
		out[i].Call -= int64(d)
	}
	return out
}

// blocks are the operations that the longest explanations of a history's beginning fail at, in the order of their ends.
func blocks(ops []porcupine.Operation, info porcupine.LinearizationInfo) (at []int) {
	longest := 0
	for _, p := range info.PartialLinearizations()[0] {
		longest = max(longest, len(p))
	}
	for _, p := range info.PartialLinearizations()[0] {
		if len(p) < longest {
			continue
		}
		in := make([]bool, len(ops))
		for _, i := range p {
			in[i] = true
		}
		first := -1
		for i := range ops {
			if !in[i] && (first < 0 || ops[i].Return < ops[first].Return) {
				first = i
			}
		}
		if first >= 0 && !slices.Contains(at, first) {
			at = append(at, first)
		}
	}
	slices.SortFunc(at, func(a, b int) int { return cmp.Compare(ops[a].Return, ops[b].Return) })
	return at
}
