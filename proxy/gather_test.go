package proxy

import (
	"testing"
	"time"
)

// While one group is under way the next one waits for as many commands as the last one had, but not for long; with nobody at work it waits for nothing.
func TestGroupsGather(t *testing.T) {
	w := newWriter(nil)
	w.most = time.Hour
	queue := func(n int) {
		w.mu.Lock()
		for range n {
			w.queue = append(w.queue, &writeOp{})
		}
		if w.enough() {
			w.cond.Signal()
		}
		w.mu.Unlock()
	}
	taken := make(chan int, 1)
	next := func() { taken <- len(w.next()) }
	expect := func(n int) {
		t.Helper()
		select {
		case got := <-taken:
			if got != n {
				t.Fatalf("a group of %d, want %d", got, n)
			}
		case <-time.After(10 * time.Second):
			t.Fatalf("no group, want %d", n)
		}
	}

	w.last, w.took = 100, time.Hour
	queue(1)
	next()
	expect(1) // nobody is at work

	w.last = 3 // and one is, whom nobody stops
	queue(1)
	go next()
	for range 20 {
		time.Sleep(time.Millisecond)
		select {
		case n := <-taken:
			t.Fatalf("a group of %d, while it was worth to wait for 3", n)
		default:
		}
	}
	queue(2)
	expect(3)

	w.took = 40 * time.Millisecond
	queue(2)
	next()
	expect(2) // the others do not come
	w.took, w.most = time.Hour, time.Millisecond
	queue(2)
	next()
	expect(2) // and the last group took long
	w.most = time.Hour

	w.mu.Lock()
	w.stopped, w.took = true, time.Hour
	w.mu.Unlock()
	w.last = 3
	queue(1)
	next()
	expect(1) // what is left is written at once when the writer is to stop
	next()
	expect(0)
}
