package proxy

import (
	"runtime"
	"sync/atomic"
)

// collectAfter bytes of large buffers let go, the collector is asked to run. By its own pace it lets as much garbage stand as there was
// live memory when it last ran: one value of 100 MB that passes during a run would be followed by 100 MB and more that nobody needs,
// and the next value comes on top. 32 MiB is eight runs of a small heap's own pace, so that no load of large values has more runs than
// without it.
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
	garbage.Store(0)
	go func() {
		runtime.GC()
		collecting.Store(false)
	}()
}
