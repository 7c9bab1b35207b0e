package proxy

import (
	"testing"
	"time"
)

func TestOffset(t *testing.T) {
	var o offset
	if !o.doubtful() || o.mid.Load() != 0 {
		t.Error("before the first look")
	}
	const ahead = 3_600_000_000 // an hour
	now := int64(1_000_000)
	look := func(there, back int64, jump int64) {
		o.saw(now, now+there+back, now+there+ahead+jump)
		now += 250_000
	}
	off := func(jump int64) int64 { return max(o.mid.Load()-ahead-jump, ahead+jump-o.mid.Load()) }
	look(40_000, 1_000, 0) // a slow first answer
	if !o.doubtful() {
		t.Error("a slow answer leaves no doubt")
	}
	look(300, 300, 0)
	if o.doubtful() || off(0) > 300 {
		t.Errorf("after a quick answer it is %d µs off", off(0))
	}
	for range 20 { // slow ones change little
		look(1_000, 20_000, 0)
	}
	if off(0) > 5_000 {
		t.Errorf("after slow answers it is %d µs off", off(0))
	}
	look(300, 300, 0)
	// A clock that is slewed is followed.
	slew := int64(0)
	for range 400 {
		slew += 100 // 400 millionths
		look(400, 400, slew)
	}
	if off(slew) > 1_000 {
		t.Errorf("a slewed clock is %d µs off", off(slew))
	}
	// One that jumps, or another server's, is believed at once.
	look(500, 500, -30_000_000)
	if off(-30_000_000) > 500 {
		t.Errorf("after a jump it is %d µs off", off(-30_000_000))
	}
}

func TestClocks(t *testing.T) {
	var c clocks
	if d := c.redisNow() - time.Now().UnixMilli(); d < -1000 || d > 1000 {
		t.Errorf("unknown clocks are %d ms off", d)
	}
	c.redis.mid.Store(5_000_400)
	c.store.mid.Store(-2_000_000)
	for _, ms := range []int64{-1, 7_001, 1_700_000_000_000} {
		if got := c.toRedis(c.toStore(ms)); got != ms {
			t.Errorf("%d there and back is %d", ms, got)
		}
	}
	if got := c.toStore(1_700_000_000_000); got != 1_699_999_993_000 {
		t.Errorf("on the store's clock it is %d", got)
	}
	if got := c.toStore(10); got != 1 {
		t.Errorf("a moment long ago is %d", got)
	}
}
