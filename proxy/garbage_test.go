package proxy

import (
	"runtime"
	"runtime/debug"
	"testing"
)

// The collector is asked to run when large buffers were let go, and for small ones it is not.
func TestLargeBuffersAreCollected(t *testing.T) {
	defer debug.SetGCPercent(debug.SetGCPercent(-1)) // nobody else runs it
	runs := func() uint32 {
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.NumForcedGC
	}
	runtime.GC()
	drop := func(n, size int) {
		for range n {
			letGo(make([]byte, 0, size))
		}
	}
	garbage.Store(0)
	before := runs()
	drop(64, largeCommand)
	if n := garbage.Load(); n != 0 || collecting.Load() || runs() != before {
		t.Fatalf("small ones count: %d bytes", n)
	}
	drop(1, collectAfter-1)
	if n := garbage.Load(); n != collectAfter-1 || collecting.Load() || runs() != before {
		t.Fatalf("%d bytes, and the collector has run %d times", n, runs()-before)
	}
	drop(1, max(2*largeCommand, int(heap())))
	for collecting.Load() {
		runtime.Gosched()
	}
	if n := garbage.Load(); n != 0 || runs() != before+1 {
		t.Fatalf("%d bytes are counted, and the collector has run %d times", n, runs()-before)
	}

	// What was alive when it last ran, and is not any more, is no reason to wait.
	was := 2 * int(heap()+collectAfter)
	b := make([]byte, 0, was)
	runtime.GC()
	runtime.KeepAlive(b)
	before = runs()
	letGo(b)
	for collecting.Load() {
		runtime.Gosched()
	}
	if n := garbage.Load(); n != 0 || runs() != before+1 {
		t.Fatalf("%d bytes that were alive are counted, and the collector has run %d times", n, runs()-before)
	}
}
