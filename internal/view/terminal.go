package view

import (
	"context"
	"errors"
	"os"
	"os/signal"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"golang.org/x/term"
)

// What a terminal is told: the other screen, whose end brings back what was there; no cursor; and a frame that is written over the one
// before, so that nothing flickers.
const (
	enterScreen = "\x1b[?1049h\x1b[?25l\x1b[?7l"
	leaveScreen = "\x1b[?7h\x1b[?25h\x1b[?1049l"
	home        = "\x1b[H"
	clearLine   = "\x1b[K"
	clearBelow  = "\x1b[J"
)

const (
	// keyPause is how long a read of the keyboard waits before it looks whether it is still wanted.
	keyPause = 100 * time.Millisecond
	// Of a terminal that does not say its size.
	usualWidth, usualHeight = 80, 24
	ctrlC                   = 0x03
)

// Terminal is a screen with a keyboard.
type Terminal struct {
	in, out *os.File
}

// NewTerminal returns nil if out is no terminal. in is the keyboard; if it is none, only ctx ends a Watch.
func NewTerminal(in, out *os.File) *Terminal {
	if !term.IsTerminal(int(out.Fd())) {
		return nil
	}
	return &Terminal{in, out}
}

// enter takes the terminal over. quit is called when somebody wants to leave; resized tells that the size has changed. leave gives the
// terminal back as it was, when everything that was started here has ended; it comes before the end of ctx.
func (t *Terminal) enter(ctx context.Context, quit func()) (resized <-chan struct{}, leave func(), err error) {
	fd := int(t.in.Fd())
	var before *term.State
	if term.IsTerminal(fd) {
		if before, err = term.MakeRaw(fd); err != nil {
			return nil, nil, errors.Join(errors.New("the terminal cannot be read key by key"), err)
		}
	}
	ctx, stop := context.WithCancel(ctx)
	var work sync.WaitGroup
	changed := make(chan struct{}, 1)
	winch := make(chan os.Signal, 1)
	signal.Notify(winch, syscall.SIGWINCH)
	work.Go(func() {
		for {
			select {
			case <-ctx.Done():
				return
			case <-winch:
			}
			select {
			case changed <- struct{}{}:
			default:
			}
		}
	})
	if before != nil {
		work.Go(func() { t.keys(ctx, quit) })
	}
	leave = func() {
		stop()
		signal.Stop(winch)
		work.Wait()
		_, _ = t.out.WriteString(leaveScreen) // nobody is left to tell
		if before != nil {
			_ = term.Restore(fd, before) // as above
		}
	}
	if _, err := t.out.WriteString(enterScreen); err != nil {
		leave()
		return nil, nil, err
	}
	return changed, leave, nil
}

// keys reads the keyboard until somebody wants to leave or ctx ends. It never waits in a read: what is typed afterwards is the shell's.
func (t *Terminal) keys(ctx context.Context, quit func()) {
	buf := make([]byte, 64)
	for ctx.Err() == nil {
		fds := []unix.PollFd{{Fd: int32(t.in.Fd()), Events: unix.POLLIN}}
		n, err := unix.Poll(fds, int(keyPause.Milliseconds()))
		if n == 0 || errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			quit()
			return
		}
		n, err = t.in.Read(buf)
		if err != nil || n == 0 { // the terminal has gone
			quit()
			return
		}
		for _, key := range buf[:n] {
			if key == 'q' || key == 'Q' || key == ctrlC {
				quit()
				return
			}
		}
	}
}

// Size is that of a terminal, in characters; that of most if it does not say its own.
func Size(f *os.File) (width, height int) {
	width, height, err := term.GetSize(int(f.Fd()))
	if err != nil || width <= 0 || height <= 0 {
		return usualWidth, usualHeight
	}
	return width, height
}

// draw writes a frame in one piece.
func (t *Terminal) draw(lines []string) error {
	var b strings.Builder
	b.WriteString(home)
	for i, line := range lines {
		if i > 0 {
			b.WriteString("\r\n")
		}
		b.WriteString(line + clearLine)
	}
	b.WriteString(clearBelow)
	_, err := t.out.WriteString(b.String())
	return err
}
