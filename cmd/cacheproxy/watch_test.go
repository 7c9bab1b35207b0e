package main

import (
	"context"
	"encoding/json"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"cacheproxy/internal/testenv"

	"github.com/creack/pty"
	"golang.org/x/term"
)

// onTerminal is the program on a terminal.
type onTerminal struct {
	t      *testing.T
	screen output // everything that it has drawn
	master *os.File
	tty    *os.File // the program's side, as its shell has it
	cmd    *exec.Cmd
	read   chan struct{}
	ended  chan struct{}
}

func newTerminal(t *testing.T, width, height uint16, env []string, args ...string) *onTerminal {
	t.Helper()
	master, tty, err := pty.Open()
	if err != nil {
		t.Fatal(err)
	}
	p := &onTerminal{t: t, master: master, tty: tty, read: make(chan struct{}), ended: make(chan struct{})}
	p.resize(width, height)
	p.cmd = exec.Command(testenv.Program(t), args...)
	p.cmd.Env = append([]string{"TERM=xterm-256color", "PATH=" + os.Getenv("PATH")}, env...)
	p.cmd.Stdin, p.cmd.Stdout, p.cmd.Stderr = tty, tty, tty
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(p.read)
		buf := make([]byte, 4096)
		for {
			n, err := master.Read(buf)
			_, _ = p.screen.Write(buf[:n]) // it keeps everything
			if err != nil {
				return
			}
		}
	}()
	go func() {
		defer close(p.ended)
		_ = p.cmd.Wait() // how it ended is in ProcessState
	}()
	t.Cleanup(func() {
		_ = p.cmd.Process.Kill() // usually it has ended
		<-p.ended
		tty.Close()
		master.Close()
		<-p.read
		if t.Failed() {
			t.Logf("the terminal:\n%q", p.screen.String())
		}
	})
	return p
}

func (p *onTerminal) resize(width, height uint16) {
	p.t.Helper()
	if err := pty.Setsize(p.tty, &pty.Winsize{Cols: width, Rows: height}); err != nil {
		p.t.Fatal(err)
	}
}

func (p *onTerminal) keys(text string) {
	p.t.Helper()
	if _, err := p.master.WriteString(text); err != nil {
		p.t.Fatal(err)
	}
}

// frame is the last frame that was drawn completely.
func (p *onTerminal) frame() string {
	frames := strings.Split(p.screen.String(), "\x1b[J")
	if len(frames) < 2 {
		return ""
	}
	last := frames[len(frames)-2]
	return last[strings.LastIndex(last, "\x1b[H")+len("\x1b[H"):]
}

func TestWatchOnTerminal(t *testing.T) {
	s := newSite(t, testenv.Redis(t).URL(), testenv.Postgres(t))
	s.write(routes)
	server := s.exec("--config", s.config)
	s.started()
	for _, c := range []struct {
		name string
		quit func(*onTerminal)
		env  []string
	}{
		{"q", func(p *onTerminal) { p.keys("xq") }, nil},
		{"Ctrl-C", func(p *onTerminal) { p.keys("\x03") }, []string{"NO_COLOR=1"}},
		{"SIGTERM", func(p *onTerminal) { _ = p.cmd.Process.Signal(syscall.SIGTERM) }, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := newTerminal(t, 100, 30, c.env, "stats", "--watch", "--interval", "100ms", "--observe", s.observe)
			before, err := term.GetState(int(p.tty.Fd()))
			if err != nil {
				t.Fatal(err)
			}
			eventually(t, "the figures are drawn", func() bool { return strings.Contains(p.frame(), "REFUSED/S") })
			if colors := strings.Contains(p.frame(), "\x1b[32m"); colors != (c.env == nil) {
				t.Errorf("colours: %v", colors)
			}
			now, err := term.GetState(int(p.tty.Fd()))
			if err != nil || *now == *before {
				t.Errorf("the terminal is not read key by key: %v", err)
			}
			p.resize(30, 4)
			eventually(t, "the frame is as small as the window", func() bool {
				lines := strings.Split(p.frame(), "\r\n")
				return len(lines) == 4 && !strings.Contains(p.frame(), "REFUSED/S")
			})
			p.resize(120, 40)
			eventually(t, "and as large", func() bool { return strings.Contains(p.frame(), "REFUSED/S") })
			c.quit(p)
			select {
			case <-p.ended:
			case <-t.Context().Done():
			}
			if code := p.cmd.ProcessState.ExitCode(); code != exitFine {
				t.Errorf("exit code %d", code)
			}
			eventually(t, "the screen is given back", func() bool {
				text := p.screen.String()
				return strings.Contains(text, "\x1b[?1049h") && strings.HasSuffix(text, "\x1b[?7h\x1b[?25h\x1b[?1049l")
			})
			if after, err := term.GetState(int(p.tty.Fd())); err != nil || *after != *before {
				t.Errorf("the terminal is left changed: %v", err)
			}
		})
	}

	// It says that the proxy has gone, and goes on when it is back.
	p := newTerminal(t, 100, 30, nil, "stats", "--watch", "--interval", "100ms", "--observe", s.observe)
	eventually(t, "the figures are drawn", func() bool { return strings.Contains(p.frame(), "REFUSED/S") })
	server.signal(t, syscall.SIGTERM)
	server.code(t)
	eventually(t, "it says so", func() bool {
		return strings.Contains(p.frame(), "no cacheproxy answers") && strings.Contains(p.frame(), "trying again")
	})
	s.exec("--config", s.config)
	eventually(t, "it goes on", func() bool {
		return strings.Contains(p.frame(), "commands/s") && !strings.Contains(p.frame(), "trying again")
	})
	p.keys("q")
	<-p.ended
}

// Where there is no terminal there are lines, and what is no terminal is not told to be one.
func TestWatchLines(t *testing.T) {
	s := newSite(t, testenv.Redis(t).URL(), testenv.Postgres(t))
	s.write(routes)
	s.exec("--config", s.config)
	s.started()
	if err := s.run("stats", "--watch", "--interval", "1ms"); exitCode(err, &s.stderr) != exitUsage || !s.stderr.has("--interval is at least") {
		t.Errorf("a short interval: %v", err)
	}
	for _, args := range [][]string{nil, {"--json"}} {
		ctx, cancel := context.WithCancel(context.Background())
		out := &lineCounter{enough: 6, done: cancel}
		err := run(ctx, append([]string{"stats", "--watch", "--interval", "100ms", "--observe", s.observe}, args...), s.env(), out, &s.stderr)
		cancel()
		if err != nil || strings.ContainsRune(out.b.String(), '\x1b') {
			t.Errorf("%v: %v\n%q", args, err, out.b.String())
		}
		first, _, _ := strings.Cut(out.b.String(), "\n")
		if args == nil && !strings.Contains(first, " user phase1 reads/s=-") {
			t.Errorf("the first line: %q", first)
		}
		var line struct {
			Rates []struct{ Route string }
		}
		if args != nil && (json.Unmarshal([]byte(first), &line) != nil || len(line.Rates) != 3 || line.Rates[0].Route != "user") {
			t.Errorf("the first line: %q", first)
		}
	}
}

// lineCounter ends something when enough lines have been written.
type lineCounter struct {
	b      output // not embedded: only Write must write to it
	enough int
	done   func()
}

func (l *lineCounter) Write(p []byte) (int, error) {
	n, err := l.b.Write(p)
	if strings.Count(l.b.String(), "\n") >= l.enough {
		l.done()
	}
	return n, err
}
