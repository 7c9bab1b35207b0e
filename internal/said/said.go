// Package said keeps a log short and discreet, whoever writes to it. What has been said a moment ago is counted and not repeated, and an error
// is told by a word of a closed list and never by its text, which may quote keys, values or a password.
package said

import (
	"fmt"
	"strings"
	"sync"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

const (
	// window is for how long a line that was written is not written again. A minute of an outage is one line; longer, and somebody who
	// looks would think that it is over.
	window = time.Minute
	// maxCauses bounds what is remembered: some hundred messages, most of which have one cause. What comes beyond is counted together.
	maxCauses = 256
	// perMessage bounds the causes of one message, so that none crowds out the others.
	perMessage = 16
)

// Core returns a core that writes to c what has not been said within the last minute. The first line of a cause, which is a message with its
// words, is written at once. Those that follow are counted, and at the end of each minute in which there were any, the last of them is written with their
// number as `repeated`. Sync writes what is still to be told. Messages in each are events of their own, and always written.
func Core(c zapcore.Core, each ...string) zapcore.Core {
	l := &ledger{causes: map[string]*cause{}, of: map[string]int{}, each: map[string]bool{}, after: time.AfterFunc}
	for _, m := range each {
		l.each[m] = true
	}
	return &core{c, l, ""}
}

// core is one writer with the fields that With has given it; all that came from one share a ledger.
type core struct {
	zapcore.Core
	l    *ledger
	with string // the words of those fields
}

func (c *core) With(fields []zapcore.Field) zapcore.Core {
	fields = discreet(fields)
	return &core{c.Core.With(fields), c.l, c.with + words(fields)}
}

func (c *core) Check(e zapcore.Entry, ce *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	if c.Enabled(e.Level) {
		return ce.AddCore(e, c)
	}
	return ce
}

func (c *core) Write(e zapcore.Entry, fields []zapcore.Field) error {
	fields = discreet(fields)
	if c.l.each[e.Message] || c.l.first(c, e, fields) {
		return c.Core.Write(e, fields)
	}
	return nil
}

func (c *core) Sync() error {
	c.l.flush()
	return c.Core.Sync()
}

// ledger knows what has been said.
type ledger struct {
	each  map[string]bool                                     // static
	after func(d time.Duration, f func()) (timer *time.Timer) // static

	mu     sync.Mutex
	causes map[string]*cause // guarded by mu
	of     map[string]int    // guarded by mu: causes of a message
}

// cause is why a line was written.
type cause struct {
	key, message string
	timer        *time.Timer
	n            int // how often it came since the last line
	// The last line that was not written, and whereto.
	c      *core
	entry  zapcore.Entry
	fields []zapcore.Field
}

// first tells whether a line is to be written; if not it is counted.
func (l *ledger) first(c *core, e zapcore.Entry, fields []zapcore.Field) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	key, message := e.Message+c.with+words(fields), e.Message
	switch {
	case l.causes[key] != nil:
	case l.of[message] >= perMessage:
		key = message
	case len(l.causes) >= maxCauses:
		key, message = "", ""
	}
	if was := l.causes[key]; was != nil {
		was.n++
		was.c, was.entry, was.fields = c, e, append(was.fields[:0], fields...)
		return false
	}
	now := &cause{key: key, message: message}
	l.causes[key] = now
	l.of[message]++
	now.timer = l.after(window, func() { l.over(now) })
	return true
}

// over ends a minute.
func (l *ledger) over(c *cause) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.causes[c.key] != c {
		return // flushed
	}
	if c.n == 0 {
		l.forget(c)
		return
	}
	c.tell()
	c.timer = l.after(window, func() { l.over(c) })
}

// forget makes the next line of a cause the first. Caller holds mu.
func (l *ledger) forget(c *cause) {
	c.timer.Stop()
	delete(l.causes, c.key)
	if l.of[c.message]--; l.of[c.message] == 0 {
		delete(l.of, c.message)
	}
}

// tell writes how often a line was not. Caller holds the ledger's lock.
func (c *cause) tell() {
	_ = c.c.Core.Write(c.entry, append(c.fields[:len(c.fields):len(c.fields)], zap.Int("repeated", c.n)))
	c.n, c.fields = 0, nil
}

// flush tells all that is still to be told, and forgets everything.
func (l *ledger) flush() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, c := range l.causes {
		if c.n > 0 {
			c.tell()
		}
		l.forget(c)
	}
}

// words are the fields that make a cause: not the figures, which differ each time.
func words(fields []zapcore.Field) string {
	var b strings.Builder
	for _, f := range fields {
		switch f.Type {
		case zapcore.StringType:
			b.WriteString("\x00" + f.Key + "=" + f.String)
		case zapcore.StringerType:
			fmt.Fprintf(&b, "\x00%s=%s", f.Key, f.Interface)
		}
	}
	return b.String()
}

// discreet replaces errors by their reasons.
func discreet(fields []zapcore.Field) []zapcore.Field {
	out := fields
	for i, f := range fields {
		if f.Type != zapcore.ErrorType {
			continue
		}
		if &out[0] == &fields[0] {
			out = append([]zapcore.Field(nil), fields...) // they are the caller's
		}
		err, _ := f.Interface.(error)
		out[i] = zap.String("reason", Reason(err))
	}
	return out
}
