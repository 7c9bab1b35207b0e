package view

import (
	"context"
	"io"
	"strings"
	"time"

	"cacheproxy/proxy"
)

// Options say what Watch shows and where.
type Options struct {
	// Ask gets the figures; it is bounded by its context and by itself.
	Ask func(context.Context) (proxy.Stats, error)
	// Every is how often.
	Every time.Duration
	// JSON writes a line of JSON each time.
	JSON bool
	// Title says whose figures they are, Color whether colours are wanted.
	Title string
	Color bool
	// Terminal draws the screen; nil: lines are written to Out.
	Terminal *Terminal
	Out      io.Writer
}

// Watch shows the figures until ctx ends or somebody presses q, and returns nil then. A sidecar that does not answer is asked again.
func Watch(ctx context.Context, o Options) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var resized <-chan struct{}
	if o.Terminal != nil {
		r, leave, err := o.Terminal.enter(ctx, cancel)
		if err != nil {
			return err
		}
		defer leave()
		resized = r
	}
	tick := time.NewTicker(o.Every)
	defer tick.Stop()
	var before, now, last *Snapshot
	for {
		st, err := o.Ask(ctx)
		if ctx.Err() != nil {
			return nil
		}
		before, now = now, &Snapshot{time.Now(), st, err}
		if err == nil {
			last = now
		}
		if err := o.show(before, now, last); err != nil {
			return err
		}
	wait:
		for {
			select {
			case <-ctx.Done():
				return nil
			case <-tick.C:
				break wait
			case <-resized:
				if err := o.show(before, now, last); err != nil {
					return err
				}
			}
		}
	}
}

func (o *Options) show(before, now, last *Snapshot) error {
	switch {
	case o.JSON:
		b, err := JSON(before, now)
		if err != nil {
			return err
		}
		_, err = o.Out.Write(append(b, '\n'))
		return err
	case o.Terminal != nil:
		s := Screen{Color: o.Color, Title: o.Title, Hint: "every " + o.Every.String() + ", q quits"}
		s.Width, s.Height = Size(o.Terminal.out)
		return o.Terminal.draw(Frame(before, now, last, s))
	}
	_, err := io.WriteString(o.Out, strings.Join(Lines(before, now), "\n")+"\n")
	return err
}
