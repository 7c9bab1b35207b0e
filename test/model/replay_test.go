package model

import "testing"

func TestReplay(t *testing.T) {
	in := world("11", []string{"S", "G"}, First, First, Faults{})
	write := []Step{
		{0, "write 1: locks, draws a number, reads the rows", ""},
		{0, "write 2: invalidates, takes the lease", ""},
		{1, "miss 1: looks, and asks for the lease", "held by another"},
		{0, "write 3: COMMIT", ""},
		{0, "write 4: puts the value into Redis", ""},
		{1, "miss 4: waits", "the lease is free, or the key is there"},
		{1, "miss 1: looks, and asks for the lease", "a value"},
	}
	if n := Replay(in, write); n != len(write) {
		t.Errorf("a write and a read beside it: %d steps of %d", n, len(write))
	}
	early := append([]Step{}, write...)
	early[3], early[4] = early[4], early[3]
	if n := Replay(in, early); n != 3 {
		t.Errorf("a value that is in Redis before the COMMIT: %d steps are followed, 3 expected", n)
	}
	evicted := append([]Step{}, write[:5]...)
	evicted = append(evicted, Step{1, "miss 4: waits", write[5].Answer}, Step{1, write[6].Name, "granted"})
	if n := Replay(in, evicted); n != 6 {
		t.Errorf("a key that is gone without an eviction: %d steps are followed, 6 expected", n)
	}
	in.Faults.Evict = true
	if n := Replay(in, evicted); n != len(evicted) {
		t.Errorf("a key that is evicted: %d steps of %d", n, len(evicted))
	}
}
