package proxy

import "testing"

func TestDraw(t *testing.T) {
	for _, c := range []struct {
		share     float64
		low, high int
	}{{0, 0, 0}, {-1, 0, 0}, {1e-30, 0, 1}, {0.25, 24000, 26000}, {0.5, 49000, 51000}, {1, 100000, 100000}, {2, 100000, 100000}} {
		sh := &shadow{}
		sh.set(c.share)
		n := 0
		for range 100000 {
			if share := sh.share.Load(); share != 0 && sh.draw(share) {
				n++
			}
		}
		if n < c.low || n > c.high {
			t.Errorf("of a share of %v %d of 100000 were drawn", c.share, n)
		}
	}
}
