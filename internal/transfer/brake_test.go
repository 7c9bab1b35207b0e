package transfer

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"cacheproxy/proxy"
)

// told collects what is said.
type told struct{ lines []string }

func (t *told) say(format string, args ...any) {
	t.lines = append(t.lines, fmt.Sprintf(format, args...))
}

func (t *told) last() string {
	if len(t.lines) == 0 {
		return ""
	}
	return t.lines[len(t.lines)-1]
}

func TestBrake(t *testing.T) {
	for _, c := range []struct {
		name        string
		fast, slow  proxy.Spent
		says        string
		unimpressed proxy.Spent // slower, but not too slow
	}{
		{"redis", proxy.Spent{Redis: 2 * time.Millisecond, Redises: 2}, proxy.Spent{Redis: 100 * time.Millisecond, Redises: 2}, "redis takes 50ms for what took 1ms",
			proxy.Spent{Redis: 30 * time.Millisecond, Redises: 2}},
		{"postgres", proxy.Spent{Store: 30 * time.Millisecond, Loads: 1}, proxy.Spent{Store: 150 * time.Millisecond, Loads: 1}, "postgres takes 150ms for what took 30ms",
			proxy.Spent{Store: 110 * time.Millisecond, Loads: 1}},
	} {
		t.Run(c.name, func(t *testing.T) {
			var said told
			b := newBrake(8, said.say)
			batch := func(s proxy.Spent) {
				b.enter()
				b.judged = time.Time{} // it is time to judge
				b.leave(context.Background(), 0, s)
			}
			for range 3 {
				batch(c.fast)
				batch(c.unimpressed)
			}
			if b.limit != 8 || len(said.lines) > 0 {
				t.Errorf("well: limit %v, said %q", b.limit, said.lines)
			}
			for _, want := range []float64{4, 2, 1, 1, 1} {
				if batch(c.slow); b.limit != want {
					t.Errorf("slow: limit %v, want %v", b.limit, want)
				}
			}
			if b.rest == 0 || len(said.lines) != 1 || !strings.Contains(said.last(), c.says) {
				t.Errorf("rest %v, said %q, want %q once", b.rest, said.lines, c.says)
			}
			for range 20 {
				batch(c.fast)
			}
			if b.limit != 8 || b.rest != 0 || !strings.Contains(said.last(), "full speed") {
				t.Errorf("well again: limit %v, rest %v, said %q", b.limit, b.rest, said.lines)
			}
		})
	}
}

func TestPace(t *testing.T) {
	for rate, want := range map[float64]int{0: batchKeys, 1: 1, 5: 1, 100: 10, 2560: 256, 1e6: batchKeys} {
		if n := (&pace{rate: rate}).size(); n != want {
			t.Errorf("at %v a second a batch has %d keys, want %d", rate, n, want)
		}
	}
	p := pace{rate: 1000}
	begun := time.Now()
	for range 5 {
		if err := p.wait(context.Background(), 50); err != nil {
			t.Fatal(err)
		}
	}
	if d := time.Since(begun); d < 200*time.Millisecond {
		t.Errorf("the first 200 of 1000 a second took %s", d)
	}
	p.due = time.Now().Add(time.Hour)
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := p.wait(ctx, 1); err == nil {
		t.Error("it waits although it was told to stop")
	}
}

func TestGate(t *testing.T) {
	var said told
	g := &gate{patience: time.Minute, say: said.say}
	ctx := context.Background()
	g.worked()
	if err := g.failed(ctx, "a hiccup"); err != nil || len(said.lines) > 0 {
		t.Errorf("%v, said %q", err, said.lines)
	}
	g.worked()
	for range 3 {
		if err := g.failed(ctx, "trouble"); err != nil {
			t.Error(err)
		}
	}
	if len(said.lines) != 1 || !strings.HasPrefix(said.last(), "waiting for ") || !strings.HasSuffix(said.last(), "trouble") {
		t.Errorf("said %q", said.lines)
	}
	g.worked()
	if !strings.HasPrefix(said.last(), "going on after ") {
		t.Errorf("said %q", said.lines)
	}
	g.patience = 0
	if err := g.failed(ctx, "trouble"); err != nil {
		t.Error(err)
	}
	var gave *Unreachable
	if err := g.failed(ctx, "trouble"); !errors.As(err, &gave) || !strings.Contains(gave.Why, "trouble") {
		t.Errorf("without patience: %v", err)
	}
}

func TestProgress(t *testing.T) {
	for _, columns := range []int{0, 80, 60, 20} {
		var out bytes.Buffer
		p := NewProgress(&out, nil)
		terminal, bar := columns > 0, columns == 80
		if terminal {
			p.columns = func() int { return columns }
		}
		p.begin(100)
		p.show(120, 1000, "rows") // too soon
		if out.Len() > 0 {
			t.Errorf("%d columns: shown too soon: %q", columns, out.String())
		}
		p.last = time.Now().Add(-sayEvery)
		p.recent[0].at = p.recent[0].at.Add(-10 * time.Second)
		p.show(500, 1000, "rows")
		p.say("a line of its %s", "own")
		p.last = time.Now().Add(-sayEvery)
		p.recent[1].at = p.recent[1].at.Add(-10 * time.Second)
		p.show(1200, 1000, "rows") // more than was estimated
		p.end()
		text := out.String()
		for _, want := range []string{" 50 %  500 of about 1000 rows, 40/s, 12s left", "a line of its own\n", "1200 rows, 70/s, more than the 1000 expected"} {
			if columns == 20 {
				want = want[:min(len(want), 19)]
			}
			if !strings.Contains(text, want) {
				t.Errorf("%d columns: %q is missing in %q", columns, want, text)
			}
		}
		for line := range strings.SplitSeq(strings.ReplaceAll(text, "\r\x1b[K", "\n"), "\n") {
			if terminal && len(line) >= columns {
				t.Errorf("%d columns: %q wraps", columns, line)
			}
		}
		if strings.Contains(text, "[##########..........]") != bar {
			t.Errorf("%d columns: %q", columns, text)
		}
		if strings.Contains(text, "\r") != terminal || terminal && !strings.HasSuffix(text, "\r\x1b[K") {
			t.Errorf("%d columns: %q", columns, text)
		}
	}
}
