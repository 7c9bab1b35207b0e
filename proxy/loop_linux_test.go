package proxy

import (
	"testing"
	"time"

	"go.uber.org/zap"
)

// A loop that was woken soon looks for more before it sleeps again; one that slept for long does not, whatever it had done before.
func TestLoopLooksWhileItPays(t *testing.T) {
	l, err := newLoop(zap.NewNop())
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		go l.run()
		l.stop()
	}()
	rung := func() {
		l.mu.Lock()
		l.asleep = true
		l.ring()
		l.mu.Unlock()
	}
	turn := func() {
		t.Helper()
		events, err := l.poll()
		if err != nil || len(events) != 1 || int(events[0].Fd) != l.bell {
			t.Fatalf("%v, %v, want the bell", events, err)
		}
		l.ready(0)
	}

	l.parallel, l.spins, l.alone = true, true, fewTurns
	rung()
	if turn(); !l.spins {
		t.Error("it does not look any more although the bell had been rung before it would have slept")
	}
	later := time.AfterFunc(20*time.Millisecond, rung)
	defer later.Stop()
	if turn(); l.spins {
		t.Error("it looks again after a long sleep")
	}
	// With one processor for all goroutines, looking would keep the others from it.
	l.parallel = false
	rung()
	if turn(); l.spins {
		t.Error("it looks, with one processor")
	}
	// A sleep that is to end by itself does, and the next one is without an end.
	if events, err := l.ep.wait(time.Millisecond); len(events) != 0 || err != nil {
		t.Errorf("%v, %v after a millisecond", events, err)
	}
	later = time.AfterFunc(20*time.Millisecond, rung)
	defer later.Stop()
	turn()
}
