package view

import (
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"cacheproxy/policy"
	"cacheproxy/proxy"
)

// Screen says how a frame is drawn.
type Screen struct {
	Width, Height int
	Color         bool
	Title         string // whose figures they are
	Hint          string // what the keys do
}

// cell is text with a colour; width is that of the text.
type cell struct {
	text  string
	color string
}

// The colours of a terminal's own palette, so that they can be read on light and dark.
const (
	plain  = ""
	dim    = "2"
	bold   = "1"
	red    = "31"
	green  = "32"
	yellow = "33"
)

// Frame is what the screen shows: at most Height lines, none wider than Width. before is the snapshot that rates are counted from, and last
// the last one with figures, which are shown when now has none; both may be nil.
func Frame(before, now, last *Snapshot, s Screen) []string {
	var lines [][]cell
	if now.Err != nil {
		words := now.Err.Error() + "; trying again"
		if last != nil {
			words += ". What follows is from " + policy.Short(now.At.Sub(last.At).Truncate(time.Second)) + " ago"
		}
		lines = append(lines, []cell{{"cacheproxy " + s.Title + "  ", bold}, {s.Hint, dim}}, []cell{{words, red}})
		before, now = nil, last
	}
	if now != nil {
		f := between(before, now)
		if lines == nil {
			lines = append(lines, head(f, now.Stats, s))
		}
		lines = append(lines, stores(now.Stats), journals(f, now.Stats), nil)
		left := s.Height - len(lines)
		below := notes(now.Stats, left/3) // most of the room is for the routes
		lines = append(lines, table(f, now.Stats, s, left-len(below))...)
		lines = append(lines, below...)
	}
	if len(lines) > s.Height {
		lines = lines[:max(s.Height, 0)]
	}
	out := make([]string, len(lines))
	for i, line := range lines {
		out[i] = draw(line, s)
	}
	return out
}

// draw cuts a line to the width and paints it.
func draw(line []cell, s Screen) string {
	var b strings.Builder
	left := s.Width
	for _, c := range line {
		text := cut(safe(c.text), left)
		left -= utf8.RuneCountInString(text)
		if s.Color && c.color != plain && text != "" {
			text = "\x1b[" + c.color + "m" + text + "\x1b[0m"
		}
		b.WriteString(text)
	}
	return b.String()
}

// safe takes out what a terminal would obey: the names of routes are the configuration's.
func safe(text string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r >= 0x7f && r < 0xa0 {
			return '?'
		}
		return r
	}, text)
}

// cut shortens text to a number of runes.
func cut(text string, n int) string {
	if utf8.RuneCountInString(text) <= n {
		return text
	}
	if n <= 0 {
		return ""
	}
	runes := []rune(text)
	return string(runes[:n-1]) + "…"
}

func head(f flow, st proxy.Stats, s Screen) []cell {
	line := []cell{
		{"cacheproxy " + s.Title, bold},
		{fmt.Sprintf("  %s  up %s  %d clients", st.MigrationPhase, policy.Short(time.Duration(st.Proxy.UptimeSeconds)*time.Second), st.Proxy.Clients), plain},
	}
	if v, ok := f.rate(st.Proxy.Commands, f.was.Proxy.Commands); ok {
		line = append(line, cell{"  " + number(v) + " commands/s", plain})
	}
	if st.Proxy.Draining {
		line = append(line, cell{"  draining", yellow})
	}
	return append(line, cell{"  " + s.Hint, dim})
}

// stateColor: what is connected or not used is fine, what recovers will be.
func stateColor(status string) string {
	switch status {
	case "connected":
		return green
	case "unused":
		return dim
	case "down":
		return red
	}
	return yellow
}

func state(name, status, why string, since int64) []cell {
	words := status
	if why != "" && status != "connected" {
		words += " (" + why + ")"
	}
	if status == "down" || status == "recovering" {
		words += " for " + policy.Short(time.Duration(since)*time.Second)
	}
	return []cell{{name + " ", plain}, {words, stateColor(status)}}
}

func stores(st proxy.Stats) []cell {
	line := state("redis", st.Redis.Status, st.Redis.Reason, st.Redis.SinceSeconds)
	if st.Redis.MemoryMB > 0 {
		line = append(line, cell{fmt.Sprintf(" %.1f MB", st.Redis.MemoryMB), plain})
	}
	return append(append(line, cell{"   ", plain}), state("postgres", st.Postgres.Status, st.Postgres.Reason, st.Postgres.SinceSeconds)...)
}

func journals(f flow, st proxy.Stats) []cell {
	j := st.Journal
	line := []cell{{"journal ", plain}}
	words, color := "empty", plain
	if j.RedisStale+j.StoreStale > 0 {
		words = fmt.Sprintf("%d redis stale, %d store stale, the oldest for %s", j.RedisStale, j.StoreStale, policy.Short(time.Duration(j.OldestSeconds*float64(time.Second)).Truncate(time.Second)))
		if j.OldestSeconds > 10 {
			color = yellow
		}
	}
	line = append(line, cell{words, color})
	promotions := strconv.FormatInt(st.Proxy.Promotions, 10)
	if v, ok := f.rate(st.Proxy.Promotions, f.was.Proxy.Promotions); ok {
		promotions = number(v) + "/s"
	}
	line = append(line, cell{"   promotions " + promotions, plain})
	if st.Proxy.PromotionsFailed > 0 {
		line = append(line, cell{fmt.Sprintf(" (%d failed)", st.Proxy.PromotionsFailed), yellow})
	}
	if v, ok := f.rate(st.Proxy.Shed, f.was.Proxy.Shed); ok && v > 0 {
		line = append(line, cell{"   shed " + number(v) + "/s", red})
	}
	return line
}

// columns of the table, and their widths.
var columns = []struct {
	name  string
	width int
}{{"PHASE", 6}, {"READS/S", 9}, {"REDIS", 7}, {"JSONB", 7}, {"MISS", 7}, {"WRITES/S", 9}, {"REFUSED/S", 10}}

// table has a line for each route, as many as fit, and one for all.
func table(f flow, st proxy.Stats, s Screen, height int) [][]cell {
	routes, sum := f.all(st)
	rest := 0
	for _, c := range columns {
		rest += 1 + c.width
	}
	name := len("ROUTE")
	for _, r := range routes {
		name = max(name, utf8.RuneCountInString(r.Route))
	}
	name = max(min(name, s.Width-rest), min(name, leastName))

	header := []cell{{pad("ROUTE", name), dim}}
	for i, c := range columns {
		if i == 0 {
			header = append(header, cell{" " + pad(c.name, c.width), dim})
		} else {
			header = append(header, cell{" " + right(c.name, c.width), dim})
		}
	}
	out := [][]cell{header}
	shown := routes
	if room := height - 2; len(routes) > room { // the header and the sum
		shown = routes[:max(room-1, 0)]
	}
	for _, r := range shown {
		out = append(out, row(r, name))
	}
	if hidden := len(routes) - len(shown); hidden > 0 {
		out = append(out, []cell{{fmt.Sprintf("and %d more routes; a higher window shows them", hidden), dim}})
	}
	if len(routes) != 1 {
		out = append(out, row(sum, name))
	}
	return out
}

func row(r Rates, name int) []cell {
	percent := func(v *float64) string {
		if v == nil {
			return "-"
		}
		return policy.Percent(*v)
	}
	perSecond := func(v *float64) string {
		if v == nil {
			return "-"
		}
		return number(*v)
	}
	line := []cell{{pad(cut(r.Route, name), name), plain}, {" " + pad(r.Phase, columns[0].width), plain}}
	for i, c := range []cell{
		{perSecond(r.Reads), plain},
		{percent(r.Redis), plain},
		{percent(r.JSONB), plain},
		{percent(r.Misses), plain},
		{perSecond(r.Writes), plain},
		{perSecond(r.Refused), plain},
	} {
		if i == 5 && r.Refused != nil && *r.Refused > 0 {
			c.color = red
		}
		line = append(line, cell{" " + right(c.text, columns[i+1].width), c.color})
	}
	return line
}

// notes have a line for each route of which there is something to say, behind an empty one. If these are more lines than height, one line
// says it of all.
func notes(st proxy.Stats, height int) (out [][]cell) {
	var sum Found
	for _, r := range st.Routes {
		found := FoundOf(r)
		sum.add(found)
		if found.Any() {
			out = append(out, note(r.Name, found))
		}
	}
	if len(out) > 0 && len(out)+1 > height {
		out = [][]cell{note("all", sum)}
	}
	if len(out) == 0 || len(out)+1 > height {
		return nil
	}
	return append([][]cell{nil}, out...)
}

// note is what was found on a route: counts since the sidecar's start, and not rates.
func note(name string, f Found) []cell {
	line := []cell{{name + " since the start:", plain}}
	say := func(words string, n int64, how, color string) {
		if n > 0 {
			if len(line) > 1 {
				line = append(line, cell{",", plain})
			}
			line = append(line, cell{" " + words + " " + strconv.FormatInt(n, 10) + how, color})
		}
	}
	say("no row", f.NoRow, "", yellow)
	say("compared", f.Checked, "", plain)
	say("differ", f.Differing(), " ("+f.Kinds()+")", red)
	say("dropped", f.Dropped, "", yellow)
	return line
}

// leastName is what is left of a route's name in a narrow window: enough to tell it from others. Then columns are cut on the right.
const leastName = 16

func pad(text string, n int) string {
	return text + strings.Repeat(" ", max(0, n-utf8.RuneCountInString(text)))
}

func right(text string, n int) string {
	return strings.Repeat(" ", max(0, n-utf8.RuneCountInString(text))) + text
}

// number writes a rate: with one digit behind the point where it is small, in thousands where it is large.
func number(v float64) string {
	switch {
	case v == 0:
		return "0"
	case v < 10:
		return strconv.FormatFloat(v, 'f', 1, 64)
	case v < 100_000:
		return strconv.FormatFloat(v, 'f', 0, 64)
	}
	return strconv.FormatFloat(v/1000, 'f', 0, 64) + "k"
}

// Lines are what is written where there is no terminal: one line for each route.
func Lines(before, now *Snapshot) []string {
	at := now.At.UTC().Format("2006-01-02T15:04:05Z")
	if now.Err != nil {
		return []string{at + " " + safe(now.Err.Error()) + "; trying again"}
	}
	f := between(before, now)
	routes, sum := f.all(now.Stats)
	if len(routes) != 1 {
		routes = append(routes, sum)
	}
	j := now.Stats.Journal
	found := make([]Found, len(now.Stats.Routes)+1) // the last is of all, as in routes
	for i, r := range now.Stats.Routes {
		found[i] = FoundOf(r)
		found[len(found)-1].add(found[i])
	}
	var out []string
	for i, r := range routes {
		word := func(name string, v *float64) string {
			if v == nil {
				return name + "=-"
			}
			return name + "=" + strconv.FormatFloat(*v, 'f', 3, 64)
		}
		out = append(out, strings.Join([]string{at, safe(r.Route), r.Phase,
			word("reads/s", r.Reads), word("redis", r.Redis), word("jsonb", r.JSONB), word("miss", r.Misses), word("writes/s", r.Writes), word("refused/s", r.Refused),
			"redis=" + now.Stats.Redis.Status, "postgres=" + now.Stats.Postgres.Status, fmt.Sprintf("journal=%d", j.RedisStale+j.StoreStale)}, " ")+found[i].words())
	}
	return out
}

// JSON is one line: the figures of the moment and what happened since the snapshot before.
func JSON(before, now *Snapshot) ([]byte, error) {
	type line struct {
		At     time.Time    `json:"at"`
		Error  string       `json:"error,omitempty"`
		Rates  []Rates      `json:"rates,omitempty"`
		Totals *proxy.Stats `json:"totals,omitempty"`
	}
	out := line{At: now.At.UTC()}
	if now.Err != nil {
		out.Error = now.Err.Error()
		return json.Marshal(out)
	}
	f := between(before, now)
	routes, sum := f.all(now.Stats)
	out.Rates, out.Totals = append(routes, sum), &now.Stats
	return json.Marshal(out)
}
