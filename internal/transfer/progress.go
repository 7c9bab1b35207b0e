package transfer

import (
	"fmt"
	"io"
	"strings"
	"sync"
	"time"
)

const (
	// drawEvery is how often a terminal's line is drawn anew: smooth enough to look at.
	drawEvery = 200 * time.Millisecond
	// sayEvery is how often a line is written where nobody watches, as in a log of a job.
	sayEvery = 5 * time.Second
	barWidth = 20
)

// Progress shows how far something is: a bar that is drawn over on a terminal, and a line now and then elsewhere.
type Progress struct {
	w       io.Writer
	columns func() int // of the terminal; nil: there is none
	every   time.Duration

	mu     sync.Mutex
	drawn  bool // guarded by mu: the terminal's line is not empty
	begun  time.Time
	before int64     // what was done when it began
	last   time.Time // guarded by mu
	recent []point   // guarded by mu: of the last seconds, for the rate
}

type point struct {
	at   time.Time
	done int64
}

// NewProgress shows on w. columns says how wide the terminal is that w is, and is nil if w is none.
func NewProgress(w io.Writer, columns func() int) *Progress {
	p := &Progress{w: w, columns: columns, every: sayEvery}
	if columns != nil {
		p.every = drawEvery
	}
	return p
}

// Every sets how often it shows; it is not to be called once something runs.
func (p *Progress) Every(d time.Duration) { p.every = d }

// begin starts the clock; before is what was done by an earlier run.
func (p *Progress) begin(before int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.begun, p.before, p.last = time.Now(), before, time.Now()
	p.recent = []point{{p.begun, before}}
}

// say writes a line of its own.
func (p *Progress) say(format string, args ...any) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.clear()
	fmt.Fprintf(p.w, format+"\n", args...)
}

// clear empties the terminal's line. Caller holds mu.
func (p *Progress) clear() {
	if p.drawn {
		fmt.Fprint(p.w, "\r\x1b[K")
		p.drawn = false
	}
}

// end leaves the line.
func (p *Progress) end() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.clear()
}

// show tells that done of about total are done, if it is time to.
func (p *Progress) show(done, total int64, what string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	if now.Sub(p.last) < p.every {
		return
	}
	p.last = now
	p.recent = append(p.recent, point{now, done})
	for len(p.recent) > 2 && now.Sub(p.recent[0].at) > 10*time.Second {
		p.recent = p.recent[1:]
	}
	rate := float64(done-p.recent[0].done) / max(now.Sub(p.recent[0].at).Seconds(), 0.001)
	text := fmt.Sprintf("%d %s, %.0f/s", done, what, rate)
	switch {
	case done > total && total > 0:
		text += fmt.Sprintf(", more than the %d expected", total)
	case total > 0:
		share := float64(done) / float64(total)
		eta := "?"
		if rate > 0 {
			eta = (time.Duration(float64(total-done)/rate) * time.Second).String()
		}
		text = fmt.Sprintf("%3.0f %%  %d of about %d %s, %.0f/s, %s left", 100*share, done, total, what, rate, eta)
		if full := int(share * barWidth); p.columns != nil && barWidth+3+len(text) < p.columns() {
			text = "[" + strings.Repeat("#", full) + strings.Repeat(".", barWidth-full) + "] " + text
		}
	}
	if p.columns == nil {
		fmt.Fprintln(p.w, text)
		return
	}
	// A line that wraps could not be drawn over: the bar goes first, then what does not fit.
	fmt.Fprint(p.w, "\r\x1b[K"+text[:min(len(text), max(p.columns()-1, 0))])
	p.drawn = true
}
