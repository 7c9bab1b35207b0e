package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"cacheproxy/internal/testenv"

	"github.com/redis/go-redis/v9"
)

// asProgram makes the test binary be the program itself, so that tests can send it signals and see it exit.
const asProgram = "TEST_RUNS_THE_PROGRAM"

func TestMain(m *testing.M) {
	if os.Getenv(asProgram) != "" {
		main()
	}
	testenv.Main(m)
}

// patience bounds what should take milliseconds, on a machine that is busy with other tests.
const patience = 30 * time.Second

// eventually waits until done is true.
func eventually(t *testing.T, what string, done func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !done(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("it never happened: %s", what)
		}
	}
}

// output is what a program prints.
type output struct{ testenv.Output }

func (o *output) has(words ...string) bool {
	s := o.String()
	for _, w := range words {
		if !strings.Contains(s, w) {
			return false
		}
	}
	return true
}

// site is a place to run a proxy at: its files, its addresses and its environment.
type site struct {
	t                           *testing.T
	dir, socket, observe, admin string
	config                      string
	stdout, stderr              output
	redisURL, postgresURL       string
}

// newSite is a site with stores that cannot be reached, unless URLs are given.
func newSite(t *testing.T, redisURL, postgresURL string) *site {
	t.Helper()
	dir, err := os.MkdirTemp("", "cp") // a socket's path must be short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	nowhere := fmt.Sprintf("127.0.0.1:%d", testenv.FreePort(t))
	s := &site{
		t: t, dir: dir, socket: filepath.Join(dir, "s"), config: filepath.Join(dir, "config.yaml"),
		observe:  fmt.Sprintf("127.0.0.1:%d", testenv.FreePort(t)),
		admin:    fmt.Sprintf("127.0.0.1:%d", testenv.FreePort(t)),
		redisURL: redisURL, postgresURL: postgresURL,
	}
	if redisURL == "" {
		s.redisURL = "redis://" + nowhere
	}
	if postgresURL == "" {
		s.postgresURL = "postgres://" + nowhere + "/app"
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("stdout:\n%s\nstderr:\n%s", s.stdout.String(), s.stderr.String())
		}
	})
	return s
}

// write writes the configuration: the addresses of the site, and what is given.
func (s *site) write(text string) {
	s.t.Helper()
	whole := fmt.Sprintf("listen: {address: %q}\nobserve: {address: %q}\nadmin: {address: %q}\n%s\n", "unix://"+s.socket, s.observe, s.admin, text)
	// Renamed into place, as editors do it.
	if err := os.WriteFile(s.config+".new", []byte(whole), 0o600); err != nil {
		s.t.Fatal(err)
	}
	if err := os.Rename(s.config+".new", s.config); err != nil {
		s.t.Fatal(err)
	}
}

func (s *site) env() []string {
	return []string{"REDIS_URL=" + s.redisURL, "DATABASE_URL=" + s.postgresURL}
}

// run runs a command in this process and returns its error.
func (s *site) run(args ...string) error {
	return run(context.Background(), append(args, "--config", s.config), s.env(), &s.stdout, &s.stderr)
}

// serve runs the proxy in this process until the returned function is called, which tells how it ended.
func (s *site) serve(args ...string) (stop func() error) {
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() {
		ended <- run(ctx, append(args, "--config", s.config), s.env(), &s.stdout, &s.stderr)
	}()
	stop = sync.OnceValue(func() error {
		cancel()
		return <-ended
	})
	s.t.Cleanup(func() { stop() })
	s.started()
	return stop
}

func (s *site) started() {
	s.t.Helper()
	eventually(s.t, "the proxy starts", func() bool {
		code, _ := s.get("/startupz")
		return code == http.StatusOK
	})
}

// program is the program as a process.
type program struct {
	*exec.Cmd
	ended chan struct{}
}

// exec starts the program as a process of its own.
func (s *site) exec(args ...string) *program {
	s.t.Helper()
	self, err := os.Executable()
	if err != nil {
		s.t.Fatal(err)
	}
	return s.start(exec.Command(self, args...))
}

// start starts a command at the site, with more in its environment. What it prints goes to the site's outputs, unless it has its own.
func (s *site) start(cmd *exec.Cmd, env ...string) *program {
	s.t.Helper()
	cmd.Env = slices.Concat([]string{asProgram + "=1", "PATH=" + os.Getenv("PATH"), "HOME=" + os.Getenv("HOME")}, s.env(), env)
	cmd.Dir = s.dir
	if cmd.Stdout == nil {
		cmd.Stdout, cmd.Stderr = &s.stdout, &s.stderr
	}
	if err := cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	p := &program{cmd, make(chan struct{})}
	go func() {
		_ = cmd.Wait() // how it ended is in ProcessState
		close(p.ended)
	}()
	s.t.Cleanup(func() {
		_ = cmd.Process.Kill() // usually it has ended
		<-p.ended
	})
	return p
}

// code waits for the end and returns the exit code.
func (p *program) code(t *testing.T) int {
	t.Helper()
	select {
	case <-p.ended:
		return p.ProcessState.ExitCode()
	case <-time.After(patience):
		t.Fatal("the program does not end")
		return -1
	}
}

func (p *program) signal(t *testing.T, sig syscall.Signal) {
	t.Helper()
	if err := p.Process.Signal(sig); err != nil {
		t.Fatal(err)
	}
}

// client is a client of the proxy.
func (s *site) client() *redis.Client {
	c := redis.NewClient(&redis.Options{Network: "unix", Addr: s.socket, MaxRetries: -1, DisableIdentity: true})
	s.t.Cleanup(func() { c.Close() })
	return c
}

func (s *site) get(path string, header ...string) (int, string) {
	return s.http("GET", s.observe, path, header...)
}

func (s *site) post(path string) (int, string) {
	return s.http("POST", s.admin, path, "X-Cacheproxy", "1")
}

func (s *site) http(method, address, path string, header ...string) (int, string) {
	s.t.Helper()
	req, err := http.NewRequest(method, "http://"+address+path, nil)
	if err != nil {
		s.t.Fatal(err)
	}
	for i := 0; i < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	resp, err := (&http.Client{Transport: &http.Transport{DisableKeepAlives: true}}).Do(req)
	if err != nil {
		return 0, err.Error()
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		s.t.Fatal(err)
	}
	return resp.StatusCode, string(body)
}

func TestExitCodes(t *testing.T) {
	s := newSite(t, "", "")
	s.write("journal: {pole: 1s}\nlog: {level: loud}\n")
	for _, c := range []struct {
		name string
		args []string
		code int
		says []string
	}{
		{"every mistake of the configuration", []string{"--config", s.config}, exitConfig, []string{"config.yaml:4", "pole", "config.yaml:5", "log.level"}},
		{"a configuration that does not exist", []string{"serve", "--config", s.config + "x"}, exitConfig, []string{"cannot be read"}},
		{"a flag with a bad value", []string{"serve", "--listen", "nowhere"}, exitConfig, []string{"--listen"}},
		{"an unknown command", []string{"sreve"}, exitUsage, []string{"unknown command", "--help"}},
		{"an unknown flag", []string{"serve", "--prot"}, exitUsage, []string{"unknown flag"}},
		{"too many arguments", []string{"check", "it"}, exitUsage, nil},
		{"a check of stores that are down", []string{"check"}, exitUnreachable, nil},
		{"a proxy that is not there", []string{"healthcheck", "--observe", s.observe}, exitNot, []string{"connection refused"}},
		{"statistics of a proxy that is not there", []string{"stats", "--observe", s.observe}, exitNot, []string{"connection refused"}},
		{"help", []string{"--help"}, exitFine, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			var stdout, stderr output
			err := run(context.Background(), c.args, s.env(), &stdout, &stderr)
			if code := exitCode(err, &stderr); code != c.code {
				t.Errorf("exit code %d, want %d", code, c.code)
			}
			if !stderr.has(c.says...) {
				t.Errorf("stderr does not say %q:\n%s", c.says, stderr.String())
			}
		})
	}
}

func TestUnknownErrorIsNot(t *testing.T) {
	var stderr output
	if code := exitCode(errors.New("it broke"), &stderr); code != exitNot || !stderr.has("it broke") {
		t.Errorf("exit code %d: %s", code, stderr.String())
	}
}

func TestVersionAndSchema(t *testing.T) {
	s := newSite(t, "", "")
	p := s.exec("version")
	if code := p.code(t); code != exitFine || !s.stdout.has("cacheproxy ", " go1.") {
		t.Errorf("version: exit code %d", code)
	}
	if code := s.exec("schema").code(t); code != exitFine || !s.stdout.has("cacheproxy.entries") {
		t.Errorf("schema: exit code %d", code)
	}
}
