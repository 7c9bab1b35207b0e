package clients

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
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
	"golang.org/x/sync/errgroup"
)

const (
	// patience bounds what should take milliseconds, on a machine that is busy with other clients.
	patience = 30 * time.Second
	// bound is for a whole program, in which each of seven or eight steps may wait ten seconds for what does not happen.
	bound = 100 * time.Second
)

func TestMain(m *testing.M) { testenv.Main(m) }

// client is a program in a folder of its own.
type client struct {
	name      string
	protocols []int
	// command is what starts it: arguments follow. A name with a slash is below this folder, one with bin/ was built.
	command []string
	// caches says that with RESP3 it has a step more.
	caches bool
}

var steps = []string{"connect", "pipeline", "transaction", "pubsub", "blocking", "script", "reconnect"}

var clients = []client{
	{"redis-cli", []int{2, 3}, []string{"bin/redis-cli"}, false},
	{"go-redis", []int{2, 3}, []string{"bin/go-redis"}, false},
	{"rueidis", []int{2, 3}, []string{"bin/rueidis"}, true},
	{"redigo", []int{2}, []string{"bin/redigo"}, false},
	{"ioredis", []int{2}, []string{"node", "ioredis/main.mjs"}, false},
	{"node-redis", []int{2, 3}, []string{"node", "node-redis/main.mjs"}, true},
	{"redis-py", []int{2}, []string{"python3", "redis-py/main.py"}, false},
	{"hiredis", []int{2}, []string{"bin/hiredis"}, false},
	{"predis", []int{2}, []string{"php", "predis/main.php"}, false},
	{"phpredis", []int{2}, []string{"php", "phpredis/main.php"}, false},
	{"redis-rb", []int{2}, []string{"ruby", "redis-rb/main.rb"}, false},
}

// server is what a program talks to. restart ends it and starts it on the same port.
type server struct {
	addr    string
	restart func(t *testing.T)
	// passed looks, once the program has passed, whether the server did what it was there for.
	passed func(t *testing.T)
}

var targets = []struct {
	name  string
	start func(t *testing.T, bin string) server
}{
	{"redis", direct},
	{"no routes", func(t *testing.T, bin string) server { return proxied(t, bin, "", "[]") }},
	{"phase1", routed},
}

// Each client does what its users do with it. Against Redis itself it is a control.
func TestClients(t *testing.T) {
	bin := build(t)
	for _, c := range clients {
		for _, protocol := range c.protocols {
			for _, target := range targets {
				t.Run(fmt.Sprintf("%s/resp%d/%s", c.name, protocol, target.name), func(t *testing.T) {
					t.Parallel()
					s := target.start(t, bin)
					results := c.run(t, bin, protocol, s)
					for _, r := range results {
						if r.why != "" {
							t.Errorf("%s: %s", r.step, r.why)
						}
					}
					if !t.Failed() && s.passed != nil {
						s.passed(t)
					}
				})
			}
			// A check that cannot fail says nothing: here each step is told one lie, and must notice it.
			t.Run(fmt.Sprintf("%s/resp%d/lies", c.name, protocol), func(t *testing.T) {
				t.Parallel()
				for _, r := range c.run(t, bin, protocol, liar(t)) {
					if r.why == "" {
						t.Errorf("%s passes in spite of a lie", r.step)
					}
				}
			})
		}
	}
}

// build builds the proxy and the programs that need a compiler, and installs what npm brings. It returns the folder of the
// binaries.
func build(t *testing.T) string {
	t.Helper()
	bin := t.TempDir()
	var all errgroup.Group
	run := func(dir, name string, args ...string) {
		all.Go(func() error {
			cmd := exec.Command(name, args...)
			cmd.Dir = dir
			if out, err := cmd.CombinedOutput(); err != nil {
				return fmt.Errorf("%s %s: %w\n%s`make clients` installs what is missing", name, strings.Join(args, " "), err, out)
			}
			return nil
		})
	}
	run(filepath.Join("..", ".."), "go", "build", "-o", filepath.Join(bin, "cacheproxy"), "./cmd/cacheproxy")
	run(".", "go", "build", "-o", bin+"/", "./redis-cli", "./go-redis", "./rueidis", "./redigo")
	run(".", "cc", "-std=c11", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Werror", "-O1", "-I/usr/include/hiredis",
		"-o", filepath.Join(bin, "hiredis"), "hiredis/main.c", "-lhiredis")
	run("ioredis", "npm", "ci")
	run("node-redis", "npm", "ci")
	if err := all.Wait(); err != nil {
		t.Fatal(err)
	}
	return bin
}

// result is how a step went.
type result struct{ step, why string }

// run runs the program against a server and returns how its steps went, in their order.
func (c client) run(t *testing.T, bin string, protocol int, s server) []result {
	t.Helper()
	host, port, err := net.SplitHostPort(s.addr)
	if err != nil {
		t.Fatal(err)
	}
	name, ours := strings.CutPrefix(c.command[0], "bin/")
	switch {
	case ours:
		name = filepath.Join(bin, name)
	case name == "python3":
		name = python()
	}
	ctx, cancel := context.WithTimeout(context.Background(), bound)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, append(slices.Clone(c.command[1:]), host, port, fmt.Sprint(protocol))...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.WaitDelay = patience // for what it started itself and left
	if err := cmd.Start(); err != nil {
		t.Fatalf("%v; `make clients` installs what is missing", err)
	}
	var results []result
	r := bufio.NewScanner(stdout)
	r.Buffer(nil, 1<<20)
	for r.Scan() {
		if r.Text() == "restart" {
			s.restart(t)
			if _, err := io.WriteString(stdin, "done\n"); err != nil {
				t.Error(err)
			}
			continue
		}
		kind, rest, _ := strings.Cut(r.Text(), " ")
		step, why, _ := strings.Cut(rest, ": ")
		if kind != "ok" && kind != "failed" || (kind == "ok") != (why == "") {
			t.Errorf("the program says %q", r.Text())
			continue
		}
		results = append(results, result{step, why})
	}
	err = cmd.Wait()
	failed := slices.ContainsFunc(results, func(r result) bool { return r.why != "" })
	if code := cmd.ProcessState.ExitCode(); failed && code != 1 || !failed && code != 0 {
		t.Errorf("the program ends with %v", err)
	}
	if stderr.Len() > 0 {
		t.Errorf("stderr:\n%s", stderr.String())
	}
	want := steps
	if c.caches && protocol == 3 {
		want = append(slices.Clone(steps), "cache")
	}
	var got []string
	for _, r := range results {
		got = append(got, r.step)
	}
	if !slices.Equal(got, want) {
		t.Errorf("steps %q, want %q", got, want)
	}
	return results
}

// python is the one that sees Debian's packages, also where another one comes first.
func python() string {
	for _, name := range []string{"/usr/bin/python3", "python3"} {
		if exec.Command(name, "-I", "-c", "import redis").Run() == nil {
			return name
		}
	}
	return "python3" // fails with the reason
}

// direct is Redis itself.
func direct(t *testing.T, _ string) server {
	r := testenv.Redis(t)
	return server{addr: r.Addr(), restart: func(t *testing.T) {
		if err := r.Restart(); err != nil {
			t.Fatal(err)
		}
	}}
}

// proxied is a proxy with these routes in front of a Redis of its own, and of a Postgres if postgres is not empty.
func proxied(t *testing.T, bin, postgres, routes string) server {
	dir := t.TempDir()
	p := &proxy{
		program: filepath.Join(bin, "cacheproxy"),
		config:  filepath.Join(dir, "config.yaml"),
		addr:    fmt.Sprintf("127.0.0.1:%d", testenv.FreePort(t)),
		observe: fmt.Sprintf("127.0.0.1:%d", testenv.FreePort(t)),
	}
	// A busy machine is no outage: the stores get as long as the programs.
	requires := "redis"
	if postgres != "" {
		requires = "all"
	}
	text := fmt.Sprintf(`
listen: {address: %q}
observe: {address: %q}
admin: {address: ""}
health: {ready_requires: %s}
redis: {url: %q, timeout: 10s, dial_timeout: 10s}
postgres: {url: %q, timeout: 10s}
routes: %s
`, p.addr, p.observe, requires, testenv.Redis(t).URL(), postgres, routes)
	if err := os.WriteFile(p.config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		p.stop(t)
		if t.Failed() {
			t.Logf("the proxy says:\n%s", p.log.String())
		}
	})
	p.start(t)
	return server{addr: p.addr, restart: func(t *testing.T) {
		p.stop(t)
		p.start(t)
	}}
}

// proxy is the program as a process.
type proxy struct {
	program, config, addr, observe string
	cmd                            *exec.Cmd    // nil while it does not run
	log                            bytes.Buffer // is written while it runs
}

func (p *proxy) start(t *testing.T) {
	t.Helper()
	cmd := exec.Command(p.program, "serve", "--config", p.config)
	cmd.Env = []string{"HOME=" + filepath.Dir(p.config)}
	cmd.Stdout, cmd.Stderr = &p.log, &p.log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	p.cmd = cmd
	for end := time.Now().Add(patience); !p.ready(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("the proxy does not start")
		}
	}
}

// ready asks as an orchestrator does: with ready_requires the proxy is not ready before it has its stores.
func (p *proxy) ready() bool {
	resp, err := (&http.Client{Transport: &http.Transport{DisableKeepAlives: true}}).Get("http://" + p.observe + "/readyz")
	if err != nil {
		return false
	}
	resp.Body.Close()
	return resp.StatusCode == http.StatusOK
}

func (p *proxy) stop(t *testing.T) {
	t.Helper()
	if p.cmd == nil {
		return
	}
	cmd := p.cmd
	p.cmd = nil
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Error(err)
	}
	late := time.AfterFunc(patience, func() { _ = cmd.Process.Kill() })
	defer late.Stop()
	if err := cmd.Wait(); err != nil {
		t.Errorf("the proxy ends with %v", err)
	}
}

// routed is a proxy whose keys are all in phase1, in front of a Postgres as well.
func routed(t *testing.T, bin string) server {
	s := proxied(t, bin, testenv.Postgres(t), "[{name: all, match: '*', phase: phase1, on_unknown: error}]")
	s.passed = func(t *testing.T) {
		c := redis.NewClient(&redis.Options{Addr: s.addr})
		defer c.Close()
		got, err := c.Do(context.Background(), "CACHEPROXY", "DIFF", "kept").StringSlice()
		if err != nil || len(got) == 0 || !strings.HasPrefix(got[0], "same: 11 bytes") {
			t.Errorf("CACHEPROXY DIFF kept: %q, %v: the route had no effect", got, err)
		}
	}
	return s
}

// lies has something for every step that its program must notice, and that no other step meets before its own. Each pair has
// the same length, so that the protocol stays whole.
var lies = struct{ requests, replies *strings.Replacer }{
	requests: strings.NewReplacer(
		"INCR\r\n$1\r\nn\r\n", "DECR\r\n$1\r\nn\r\n", // pipeline
		"incr\r\n$1\r\nn\r\n", "decr\r\n$1\r\nn\r\n",
		"INCRBY\r\n$1\r\nn\r\n", "DECRBY\r\n$1\r\nn\r\n", // redis-py's incr
		"$2\r\ntx\r\n$1\r\n7\r\n", "$2\r\nty\r\n$1\r\n7\r\n", // transaction: the write that aborts EXEC
		"BLPOP", "BRPOP", "blpop", "brpop", // blocking
	),
	replies: strings.NewReplacer(
		"\xff $5", "\xfe $5", // connect
		"glad tidings", "sad tidings!", // pubsub
		"-NOSCRIPT", "-NOSCRYPT", // script
		"value after", "value befor", // reconnect
		"invalidate", "invalidat3", // cache
	),
}

// liar is a Redis behind somebody who changes what passes.
func liar(t *testing.T) server {
	s := direct(t, "")
	redisAddr := s.addr
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s.addr = l.Addr().String()
	var all sync.WaitGroup
	carry := func(dst, src net.Conn, change *strings.Replacer) {
		defer dst.Close()
		defer src.Close()
		// One read is one write of the other side: all of them are small.
		for buf := make([]byte, 64<<10); ; {
			n, err := src.Read(buf)
			if err != nil {
				return
			}
			if _, err := change.WriteString(dst, string(buf[:n])); err != nil {
				return
			}
		}
	}
	all.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			up, err := net.Dial("tcp", redisAddr)
			if err != nil {
				conn.Close()
				continue
			}
			all.Go(func() { carry(up, conn, lies.requests) })
			all.Go(func() { carry(conn, up, lies.replies) })
		}
	})
	t.Cleanup(func() { // the program has ended, and with it its connections
		l.Close()
		all.Wait()
	})
	return s
}
