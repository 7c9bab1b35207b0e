package chaos

import (
	"encoding/json"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"
)

// op is a command of a made-up history, its times in milliseconds.
func op(client int, from, to int64, v verb, arg, reply string) porcupine.Operation {
	out := output{known: reply != "?", text: reply}
	if reply == "?" {
		to = never
	} else {
		to *= int64(time.Millisecond)
	}
	return porcupine.Operation{ClientId: client, Input: input{verb: v, arg: arg}, Call: from * int64(time.Millisecond), Output: out, Return: to}
}

// Histories of real runs that reads explain which are late by exceptions (a) and (b), and nothing without.
func TestLateReads(t *testing.T) {
	files, err := filepath.Glob("testdata/*.json")
	if err != nil || len(files) == 0 {
		t.Fatal("no histories", err)
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		var h history
		if err := json.Unmarshal(text, &h); err != nil {
			t.Fatal(err)
		}
		var ops []porcupine.Operation
		for _, l := range h.Commands {
			op := porcupine.Operation{ClientId: l.Client, Input: input{l.Verb, l.Arg, l.How, l.Forgetful, l.Uncounted},
				Call: int64(l.From * 1e6), Output: output{l.Got != "?", l.Got}, Return: int64(l.To * 1e6)}
			if l.To < 0 {
				op.Return = never
			}
			ops = append(ops, op)
		}
		began := time.Now()
		v := check(ops, unseen)
		t.Logf("%s: %s with %v, judged in %v", file, v.result, v.slack, time.Since(began).Round(time.Millisecond))
		if v.result != porcupine.Ok {
			t.Errorf("%s: %s", file, v.result)
		}
		if r := check(ops, 0).result; r != porcupine.Illegal {
			t.Errorf("%s: %s though no staleness is allowed", file, r)
		}
	}
}

// The checker finds what must not be, and nothing else.
func TestChecker(t *testing.T) {
	const most = 800 * time.Millisecond
	for _, c := range []struct {
		name  string
		ops   []porcupine.Operation
		want  porcupine.CheckResult
		slack time.Duration
	}{
		{"one after the other", []porcupine.Operation{
			op(1, 0, 1, get, "", "(nil)"), op(1, 2, 3, set, "a", "OK"), op(2, 4, 5, get, "", "a"), op(1, 6, 7, swap, "b", "a"), op(2, 8, 9, del, "", ":1"),
			op(1, 10, 11, setNX, "c", "OK"), op(1, 12, 13, setNX, "d", "(nil)"), op(2, 14, 15, add, "xy", ":3"), op(2, 16, 17, expire, "", ":1"),
			op(2, 18, 19, get, "", "cxy"), op(2, 20, 21, incr, "", "-ERR value is not an integer or out of range"),
		}, porcupine.Ok, 0},
		{"from nothing", []porcupine.Operation{
			op(1, 0, 1, expire, "", ":0"), op(1, 2, 3, add, "xy", ":2"), op(1, 4, 5, add, "z", ":3"), op(1, 6, 7, swap, "a", "xyz"), op(1, 8, 9, del, "", ":1"),
			op(1, 10, 11, del, "", ":0"), op(1, 12, 13, swap, "b", "(nil)"), op(1, 14, 15, del, "", ":1"), op(1, 16, 17, incr, "", ":1"), op(1, 18, 19, get, "", "1"),
		}, porcupine.Ok, 0},
		{"at the same time", []porcupine.Operation{
			op(1, 0, 10, set, "a", "OK"), op(2, 0, 10, set, "b", "OK"), op(3, 1, 2, get, "", "(nil)"), op(3, 3, 4, get, "", "b"), op(3, 11, 12, get, "", "a"),
		}, porcupine.Ok, 0},
		{"an old value after the write was acknowledged", []porcupine.Operation{
			op(1, 0, 1, set, "a", "OK"), op(1, 2, 3, set, "b", "OK"), op(2, 1000, 1001, get, "", "a"),
		}, porcupine.Illegal, 0},
		{"an old value for a while", []porcupine.Operation{
			op(1, 0, 1, set, "a", "OK"), op(1, 2, 3, set, "b", "OK"), op(2, 80, 81, get, "", "a"), op(2, 700, 701, get, "", "b"),
		}, porcupine.Ok, 100 * time.Millisecond},
		{"back and forth", []porcupine.Operation{
			op(1, 0, 1, set, "a", "OK"), op(1, 2, 3, set, "b", "OK"), op(2, 10, 11, get, "", "b"), op(2, 12, 13, get, "", "a"), op(2, 14, 15, get, "", "b"),
		}, porcupine.Ok, 50 * time.Millisecond},
		{"a write that has missed another", []porcupine.Operation{op(1, 0, 1, set, "a", "OK"), op(2, 2, 3, swap, "b", "(nil)")}, porcupine.Illegal, 0},
		{"a lost write", []porcupine.Operation{op(1, 0, 1, set, "a", "OK"), op(2, 1000, 1001, get, "", "(nil)")}, porcupine.Illegal, 0},
		{"a write that Redis alone had", []porcupine.Operation{
			op(1, 0, 1, set, "a", "OK"), op(0, 500, 600, gone, "", "?"), op(2, 1000, 1001, get, "", "(nil)"),
		}, porcupine.Ok, 0},
		{"counted twice", []porcupine.Operation{op(1, 0, 1, incr, "", ":1"), op(1, 2, 3, incr, "", ":3")}, porcupine.Illegal, 0},
		{"perhaps counted", []porcupine.Operation{op(1, 0, 1, incr, "", ":1"), op(2, 1, 0, incr, "", "?"), op(1, 2, 3, incr, "", ":3"), op(1, 4, 5, get, "", "3")}, porcupine.Ok, 0},
		{"perhaps counted, and later", []porcupine.Operation{
			op(1, 0, 1, incr, "", ":1"), op(2, 1, 0, incr, "", "?"), op(1, 2, 3, incr, "", ":2"), op(1, 900, 901, incr, "", ":4"),
		}, porcupine.Ok, 0},
		{"perhaps counted, but twice", []porcupine.Operation{op(1, 0, 1, incr, "", ":1"), op(2, 1, 0, incr, "", "?"), op(1, 2, 3, incr, "", ":4")}, porcupine.Illegal, 0},
		{"resurrected", []porcupine.Operation{
			op(1, 0, 1, set, "a", "OK"), op(1, 2, 3, del, "", ":1"), op(2, 4, 5, get, "", "(nil)"), op(2, 900, 901, get, "", "a"),
		}, porcupine.Illegal, 0},
	} {
		v := check(c.ops, most)
		if v.result != c.want || v.result == porcupine.Ok && v.slack != c.slack {
			t.Errorf("%s: %s with %v, want %s with %v", c.name, v.result, v.slack, c.want, c.slack)
		}
		if c.slack > 0 && check(c.ops, 0).result != porcupine.Illegal {
			t.Errorf("%s: it passes though no staleness is allowed", c.name)
		}
	}
}
