package policy

import (
	"math"
	"math/rand/v2"
	"testing"
	"time"
)

func TestDefaultTTL(t *testing.T) {
	almostOne := math.Nextafter(1, 0)
	tests := []struct {
		ttl    time.Duration
		jitter float64
		random float64
		want   time.Duration
	}{
		{0, 0, 0, 0},
		{0, 1, 0.5, 0},
		{time.Hour, 0, 0, time.Hour},
		{time.Hour, 0, almostOne, time.Hour},
		{time.Hour, 0.1, 0, time.Hour},
		{time.Hour, 0.1, 0.5, 57 * time.Minute},
		{time.Hour, 1, 0.5, 30 * time.Minute},
		{time.Hour, 1, almostOne, time.Millisecond},
		{1500 * time.Microsecond, 0, 0, time.Millisecond},
		{time.Nanosecond, 0, 0, time.Millisecond},
		{time.Millisecond, 1, 0.9, time.Millisecond},
		{math.MaxInt64, 0, 0, time.Duration(math.MaxInt64).Truncate(time.Millisecond)},
	}
	for _, tt := range tests {
		r := &Route{TTL: tt.ttl, Jitter: tt.jitter}
		if got := r.DefaultTTL(tt.random); got != tt.want {
			t.Errorf("ttl %v, jitter %v, random %v: got %v, want %v", tt.ttl, tt.jitter, tt.random, got, tt.want)
		}
	}
}

func TestDefaultTTLSpreads(t *testing.T) {
	const seed, n = 1, 10_000
	rnd := rand.New(rand.NewPCG(seed, seed))
	r := &Route{TTL: time.Hour, Jitter: 0.2}
	low, high := r.TTL-r.TTL/5, r.TTL
	var lower int
	for range n {
		got := r.DefaultTTL(rnd.Float64())
		if got < low || got > high || got%time.Millisecond != 0 {
			t.Fatalf("got %v, want whole milliseconds between %v and %v", got, low, high)
		}
		if got < (low+high)/2 {
			lower++
		}
	}
	if lower < n*45/100 || lower > n*55/100 {
		t.Errorf("%d of %d lie in the lower half: the spread is not even", lower, n)
	}
}
