// Package lab runs what manifests say without containers: their commands, with the paths and addresses of this machine in
// place of a container's.
package lab

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"cacheproxy/internal/devserver"
	"cacheproxy/internal/testenv"

	"github.com/redis/go-redis/v9"
)

// Patience bounds what should take milliseconds, on a machine that is busy with something else.
const Patience = time.Minute

// Program builds cacheproxy as it is shipped. It does so in the product's own module, whose dependencies this one does not have.
func Program(t testing.TB) string {
	t.Helper()
	bin := filepath.Join(t.TempDir(), "cacheproxy")
	cmd := exec.Command("go", "build", "-trimpath", "-o", bin, "./cmd/cacheproxy")
	cmd.Dir = filepath.Join("..", "..", "..")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build cacheproxy: %v\n%s", err, out)
	}
	return bin
}

// WaitFor waits until ok.
func WaitFor(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(Patience); !ok(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("in vain: %s", what)
		}
	}
}

// Process is a program that runs until the test ends.
type Process struct {
	*exec.Cmd
	Output *testenv.Output
	ended  chan struct{}
}

// Start starts a command in a process group of its own, whose rest is ended with the test.
func Start(t testing.TB, cmd *exec.Cmd) *Process {
	t.Helper()
	p := &Process{Cmd: cmd, Output: &testenv.Output{}, ended: make(chan struct{})}
	cmd.Stdout, cmd.Stderr = p.Output, p.Output
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		_ = cmd.Wait() // how it ended is in ProcessState
		close(p.ended)
	}()
	t.Cleanup(func() {
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) // usually it has ended
		<-p.ended
		if t.Failed() {
			t.Logf("%s said:\n%s", filepath.Base(cmd.Path), p.Output.Tail(4000))
		}
	})
	return p
}

// Stop sends SIGTERM to the process, as a node does, and returns its exit code.
func (p *Process) Stop(t testing.TB) int {
	t.Helper()
	if err := p.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	select {
	case <-p.ended:
		return p.ProcessState.ExitCode()
	case <-time.After(Patience):
		t.Fatalf("%s does not end", filepath.Base(p.Path))
		return -1
	}
}

// Running tells whether it has not ended.
func (p *Process) Running() bool {
	select {
	case <-p.ended:
		return false
	default:
		return true
	}
}

// Redis runs the line by which a manifest starts Redis, as a shell gets it, in a folder of the test's own for its data and on a
// port of this machine. secrets is the folder that stands where the line names the folder named.
func Redis(t testing.TB, line, data, named, secrets, password string) (addr string) {
	t.Helper()
	program, err := devserver.Find("redis-server")
	if err != nil {
		t.Fatal(err)
	}
	port := testenv.FreePort(t)
	for _, part := range []string{"redis-server ", " " + data + " ", named + "/"} {
		if !strings.Contains(line, part) {
			t.Fatalf("the line that starts Redis has no %q: %s", part, line)
		}
	}
	line = strings.Replace(line, "redis-server ", program+" --bind 127.0.0.1 --port "+strconv.Itoa(port)+" ", 1)
	line = strings.Replace(line, " "+data+" ", " "+t.TempDir()+" ", 1)
	line = strings.ReplaceAll(line, named+"/", secrets+"/")
	Start(t, exec.Command("sh", "-c", line))
	addr = net.JoinHostPort("127.0.0.1", strconv.Itoa(port))
	client := redis.NewClient(&redis.Options{Addr: addr, Password: password, DisableIdentity: true})
	defer client.Close()
	ctx := context.Background()
	WaitFor(t, "Redis answers", func() bool { return client.Ping(ctx).Err() == nil })
	for name, want := range map[string]string{
		"maxmemory": "536870912", "maxmemory-policy": "allkeys-lru", "appendonly": "yes", "timeout": "300", "tcp-keepalive": "300",
	} {
		if got := client.ConfigGet(ctx, name).Val()[name]; got != want {
			t.Errorf("Redis has %s %s instead of %s", name, got, want)
		}
	}
	stranger := redis.NewClient(&redis.Options{Addr: addr, DisableIdentity: true})
	defer stranger.Close()
	if err := stranger.Ping(ctx).Err(); err == nil || !strings.Contains(err.Error(), "NOAUTH") {
		t.Errorf("Redis answers without a password: %v", err)
	}
	return addr
}

// Probe runs the command by which a manifest asks Redis, against the one at addr.
func Probe(t testing.TB, line, named, secrets, addr string) error {
	t.Helper()
	_, port, err := net.SplitHostPort(addr)
	if err != nil {
		t.Fatal(err)
	}
	line = strings.Replace(line, "redis-cli ", "redis-cli -p "+port+" ", 1)
	line = strings.ReplaceAll(line, named+"/", secrets+"/")
	if out, err := exec.Command("sh", "-c", line).CombinedOutput(); err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	return nil
}

// Secrets writes a file for each secret.
func Secrets(t testing.TB, values map[string]string) (dir string) {
	t.Helper()
	dir = t.TempDir()
	for name, value := range values {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(value), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// Replace replaces texts that must all be there, in order.
func Replace(t testing.TB, text string, pairs ...string) string {
	t.Helper()
	for i := 0; i < len(pairs); i += 2 {
		if !strings.Contains(text, pairs[i]) {
			t.Fatalf("there is no %q in\n%s", pairs[i], text)
		}
		text = strings.ReplaceAll(text, pairs[i], pairs[i+1])
	}
	return text
}
