//go:build longer

package model

import (
	"cmp"
	"os"
	"testing"
	"time"
)

// TestLonger goes on with longer programs for MODEL, such as 1h: a share of it for each family.
func TestLonger(t *testing.T) {
	budget, err := time.ParseDuration(os.Getenv("MODEL"))
	if err != nil {
		t.Fatalf("MODEL: %v", err)
	}
	for _, w := range families {
		t.Run(w.name, func(t *testing.T) {
			end := time.Now().Add(budget / time.Duration(len(families)))
			states, total, left := 0, w.total+1, false
			for ; !left && !t.Failed() && total <= min(maxOps, cmp.Or(w.most, maxOps)); total++ {
				w.each(total, func(c Config) bool {
					c.Limit = 5_000_000
					r := Explore(c)
					states += r.States
					if r.Wrong != "" {
						t.Error(r)
					}
					left = left || time.Now().After(end)
					return !left && !t.Failed()
				})
			}
			t.Logf("%d states, up to %d commands, all of them: %v", states, total-1, !left)
		})
	}
}
