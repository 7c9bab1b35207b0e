package proxy

import (
	"runtime"
	"runtime/metrics"
	"sync/atomic"
)

// collectAfter bytes of large buffers let go, the collector is asked to run, unless more than that is alive. By its own pace it lets as much garbage stand as
// there was live memory when it last ran: one value of 100 MB that passes during a run would be followed by 100 MB and more that nobody needs, and
// the next value comes on top.
const collectAfter = 32 << 20

var (
	garbage    atomic.Int64 // bytes of large buffers since the collector was last asked
	collecting atomic.Bool
)

// letGo says that nobody looks at b any more, which is not kept for use again. It does not wait.
func letGo(b []byte) {
	if cap(b) <= largeCommand {
		return
	}
	if garbage.Add(int64(cap(b))) < collectAfter || !collecting.CompareAndSwap(false, true) {
		return
	}
	go func() {
		defer collecting.Store(false)
		// With much alive the collector's own pace is as quick as this one, and a run costs more.
		if n := garbage.Load(); n < heap()-n {
			return
		}
		garbage.Store(0)
		runtime.GC()
	}()
}

// heap is how many bytes are alive or not yet collected.
func heap() int64 {
	s := []metrics.Sample{{Name: "/memory/classes/heap/objects:bytes"}}
	metrics.Read(s)
	return int64(s[0].Value.Uint64())
}
