package view

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"
	"unicode/utf8"

	"cacheproxy/proxy"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var start = time.Date(2026, 3, 4, 5, 6, 7, 0, time.UTC)

// at is a snapshot so many seconds after the start: of a sidecar that has done n of everything by then.
func at(seconds int, n int64) *Snapshot {
	st := proxy.Stats{MigrationPhase: "mixed"}
	for _, r := range []struct{ name, phase string }{{"user", "phase1"}, {"report", "phase2"}} {
		st.Routes = append(st.Routes, proxy.RouteStats{Name: r.name, Phase: r.phase, Writes: 2 * n,
			Performance: proxy.Performance{RedisHits: 90 * n, JSONBHits: 9 * n, CacheMisses: n}})
	}
	st.Redis = proxy.RedisStats{Status: "connected", MemoryMB: 15.2}
	st.Postgres.Status = "connected"
	st.Proxy = proxy.SelfStats{Clients: 3, Commands: 200 * n, UptimeSeconds: int64(seconds) + 60, Promotions: 9 * n}
	return &Snapshot{At: start.Add(time.Duration(seconds) * time.Second), Stats: st}
}

// withFound is a snapshot of a sidecar that has met keys without a row, and copies that differ.
func withFound(s *Snapshot) *Snapshot {
	s.Stats.Routes[0].NoRow = 3
	s.Stats.Routes[0].Mismatches = map[string]int64{"missing": 0, "ttl": 0, "value": 0}
	s.Stats.Routes[1].Verified, s.Stats.Routes[1].Unverified = 120, 5
	s.Stats.Routes[1].Mismatches = map[string]int64{"value": 3, "missing": 1, "ttl": 0}
	return s
}

func gone(seconds int) *Snapshot {
	return &Snapshot{At: start.Add(time.Duration(seconds) * time.Second), Err: errors.New("no cacheproxy answers on here: connection refused")}
}

func TestFrame(t *testing.T) {
	screen := Screen{Width: 80, Height: 24, Title: "here", Hint: "q quits"}
	old := at(2, 5)
	found := withFound(at(2, 5))
	down := at(2, 5)
	down.Stats.Redis = proxy.RedisStats{Status: "down", Reason: "refused", SinceSeconds: 65}
	down.Stats.Postgres = proxy.StoreStats{Status: "recovering", SinceSeconds: 1}
	down.Stats.Journal = proxy.JournalStats{RedisStale: 7, StoreStale: 1, OldestSeconds: 61.5}
	down.Stats.Proxy.PromotionsFailed, down.Stats.Proxy.Shed, down.Stats.Proxy.Draining = 2, 10, true
	down.Stats.Routes[0].Refused = 30
	for _, c := range []struct {
		name              string
		before, now, last *Snapshot
		want              string
	}{
		{"the first", nil, at(0, 5), nil, `
cacheproxy here  mixed  up 1m  3 clients  q quits
redis connected 15.2 MB   postgres connected
journal empty   promotions 45

ROUTE  PHASE    READS/S   REDIS   JSONB    MISS  WRITES/S  REFUSED/S
user   phase1         -       -       -       -         -          -
report phase2         -       -       -       -         -          -
all    mixed          -       -       -       -         -          -`},
		{"what happened in two seconds", at(0, 1), at(2, 5), nil, `
cacheproxy here  mixed  up 1m2s  3 clients  400 commands/s  q quits
redis connected 15.2 MB   postgres connected
journal empty   promotions 18/s

ROUTE  PHASE    READS/S   REDIS   JSONB    MISS  WRITES/S  REFUSED/S
user   phase1       200  90.0 %   9.0 %   1.0 %       4.0          0
report phase2       200  90.0 %   9.0 %   1.0 %       4.0          0
all    mixed        400  90.0 %   9.0 %   1.0 %       8.0          0`},
		{"nothing happened", at(0, 5), at(1, 5), nil, `
cacheproxy here  mixed  up 1m1s  3 clients  0 commands/s  q quits
redis connected 15.2 MB   postgres connected
journal empty   promotions 0/s

ROUTE  PHASE    READS/S   REDIS   JSONB    MISS  WRITES/S  REFUSED/S
user   phase1         0       -       -       -         0          0
report phase2         0       -       -       -         0          0
all    mixed          0       -       -       -         0          0`},
		{"trouble", at(0, 5), down, nil, `
cacheproxy here  mixed  up 1m2s  3 clients  0 commands/s  draining  q quits
redis down (refused) for 1m5s   postgres recovering for 1s
journal 7 redis stale, 1 store stale, the oldest for 1m1s   promotions 0/s (2 f…
…
`},
		{"another process", at(0, 5), at(2, 1), nil, `
cacheproxy here  mixed  up 1m2s  3 clients  q quits
…
user   phase1         -       -       -       -         -          -`},
		{"it has gone", old, gone(9), old, `
cacheproxy here  q quits
no cacheproxy answers on here: connection refused; trying again. What follows i…
redis connected 15.2 MB   postgres connected
…`},
		{"it was never there", nil, gone(0), nil, `
cacheproxy here  q quits
no cacheproxy answers on here: connection refused; trying again`},
		{"keys without a row, and copies that differ", at(0, 1), found, nil, `
cacheproxy here  mixed  up 1m2s  3 clients  400 commands/s  q quits
redis connected 15.2 MB   postgres connected
journal empty   promotions 18/s

ROUTE  PHASE    READS/S   REDIS   JSONB    MISS  WRITES/S  REFUSED/S
user   phase1       200  90.0 %   9.0 %   1.0 %       4.0          0
report phase2       200  90.0 %   9.0 %   1.0 %       4.0          0
all    mixed        400  90.0 %   9.0 %   1.0 %       8.0          0

user since the start: no row 3
report since the start: compared 120, differ 4 (missing 1, value 3), dropped 5`},
	} {
		got := "\n" + strings.Join(Frame(c.before, c.now, c.last, screen), "\n")
		for _, part := range strings.Split(c.want, "\n…") {
			if part = strings.TrimRight(part, "\n"); !strings.Contains(got, part) {
				t.Errorf("%s: got%s\nwant%s", c.name, got, part)
				break
			}
		}
		if !strings.Contains(c.want, "\n…") && got != c.want {
			t.Errorf("%s: got%s\nwant%s", c.name, got, c.want)
		}
	}
}

// Whatever the size of the window, and whatever the names of routes, nothing is drawn beside it.
func TestFrameFits(t *testing.T) {
	many := at(2, 5)
	for i := range 50 {
		many.Stats.Routes = append(many.Stats.Routes, proxy.RouteStats{Name: fmt.Sprintf("a rather long name äöü %d \x1b[2J\n", i), Phase: "phase1"})
	}
	for width := 0; width < 130; width += 3 {
		for height := range 60 {
			for _, now := range []*Snapshot{many, withFound(at(2, 5)), gone(3)} {
				lines := Frame(at(0, 1), now, many, Screen{Width: width, Height: height, Title: "here", Hint: "q quits"})
				if len(lines) > height {
					t.Fatalf("%d lines in %d", len(lines), height)
				}
				for _, line := range lines {
					if n := utf8.RuneCountInString(line); n > width || strings.ContainsAny(line, "\x1b\n\r") {
						t.Fatalf("%d x %d: %d runes: %q", width, height, n, line)
					}
				}
			}
		}
	}
	text := strings.Join(Frame(at(0, 1), many, many, Screen{Width: 100, Height: 12}), "\n")
	// What was found is shortened before the routes are, and keeps them from being shown no further than that.
	for height, want := range map[int]string{
		16: "all    mixed        400  90.0 %   9.0 %   1.0 %       8.0          0\n\nuser since the start: no row 3\nreport since the start: compared 120, differ 4 (missing 1, value 3), dropped 5",
		12: "all    mixed        400  90.0 %   9.0 %   1.0 %       8.0          0\n\nall since the start: no row 3, compared 120, differ 4 (missing 1, value 3), dropped 5",
		9:  "all    mixed        400  90.0 %   9.0 %   1.0 %       8.0          0",
	} {
		if got := strings.Join(Frame(at(0, 1), withFound(at(2, 5)), nil, Screen{Width: 120, Height: height}), "\n"); !strings.HasSuffix(got, want) {
			t.Errorf("in %d lines:\n%s", height, got)
		}
	}
	if !strings.Contains(text, "and 47 more routes") || !strings.HasPrefix(text[strings.LastIndex(text, "\n")+1:], "all") {
		t.Errorf("what does not fit is not said:\n%s", text)
	}
}

func TestColors(t *testing.T) {
	now := at(1, 5)
	now.Stats.Redis.Status = "down"
	lines := Frame(nil, now, nil, Screen{Width: 80, Height: 24, Color: true})
	if !strings.Contains(lines[1], "\x1b[31mdown for 0s\x1b[0m") || !strings.Contains(lines[1], "\x1b[32mconnected\x1b[0m") {
		t.Errorf("%q", lines[1])
	}
}

func TestLines(t *testing.T) {
	want := "2026-03-04T05:06:09Z user phase1 reads/s=200.000 redis=0.900 jsonb=0.090 miss=0.010 writes/s=4.000 refused/s=0.000 redis=connected postgres=connected journal=0"
	if got := Lines(at(0, 1), at(2, 5)); len(got) != 3 || got[0] != want {
		t.Errorf("got %q", got)
	}
	for i, end := range []string{"journal=0 no_row=3", "journal=0 verify_checked=120 verify_dropped=5 verify_mismatches=4", "journal=0 no_row=3 verify_checked=120 verify_dropped=5 verify_mismatches=4"} {
		if got := Lines(at(0, 1), withFound(at(2, 5))); len(got) != 3 || !strings.HasSuffix(got[i], end) {
			t.Errorf("got %q, want it to end in %q", got, end)
		}
	}
	if got := Lines(nil, gone(2)); len(got) != 1 || got[0] != "2026-03-04T05:06:09Z no cacheproxy answers on here: connection refused; trying again" {
		t.Errorf("got %q", got)
	}
}

func TestJSON(t *testing.T) {
	b, err := JSON(at(0, 1), at(2, 5))
	if err != nil || bytes.ContainsRune(b, '\n') {
		t.Fatalf("%s, %v", b, err)
	}
	var line struct {
		At     time.Time
		Error  string
		Rates  []Rates
		Totals proxy.Stats
	}
	if err := json.Unmarshal(b, &line); err != nil || !line.At.Equal(start.Add(2*time.Second)) || len(line.Rates) != 3 || *line.Rates[2].Reads != 400 || *line.Rates[2].Redis != 0.9 || line.Totals.Proxy.Commands != 1000 {
		t.Errorf("%s, %v", b, err)
	}
	if b, err = JSON(nil, at(0, 1)); err != nil || !strings.Contains(string(b), `"reads_per_second":null`) {
		t.Errorf("%s, %v", b, err)
	}
	if b, err = JSON(nil, gone(0)); err != nil || string(b) != `{"at":"2026-03-04T05:06:07Z","error":"no cacheproxy answers on here: connection refused"}` {
		t.Errorf("%s, %v", b, err)
	}
}

// sink collects what is written, and ends something at a line.
type sink struct {
	mu   sync.Mutex
	b    bytes.Buffer
	stop func(text string)
}

func (s *sink) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.b.Write(p)
	s.stop(s.b.String())
	return len(p), nil
}

// A sidecar that goes away and comes back is followed: it is said, and it goes on.
func TestWatchGoesOn(t *testing.T) {
	for _, asJSON := range []bool{false, true} {
		ctx, cancel := context.WithCancel(context.Background())
		out := &sink{stop: func(text string) {
			if i := strings.Index(text, "refused;"); i < 0 {
				i = strings.Index(text, `"error"`)
				if i < 0 {
					return
				}
				text = text[i:]
			} else {
				text = text[i:]
			}
			if strings.Contains(text, "reads") {
				cancel()
			}
		}}
		asked := 0
		err := Watch(ctx, Options{
			Every: time.Millisecond, JSON: asJSON, Out: out,
			Ask: func(context.Context) (proxy.Stats, error) {
				asked++
				if asked == 2 || asked == 3 {
					return proxy.Stats{}, errors.New("connection refused")
				}
				return at(asked, int64(asked)).Stats, nil
			},
		})
		cancel()
		if err != nil || asked < 4 {
			t.Errorf("json %v: %v after %d", asJSON, err, asked)
		}
	}
}
