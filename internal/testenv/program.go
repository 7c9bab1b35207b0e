package testenv

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
)

// program is what Program returns; Main removes it.
var program struct {
	mu  sync.Mutex
	dir string            // guarded by mu
	bin map[string]string // guarded by mu: by build tags
}

// Program is the path of cacheproxy as it is shipped, static and without the race detector, which is built when a test of the process first wants it. With
// build tags it is not as it is shipped.
func Program(t testing.TB, tags ...string) string {
	t.Helper()
	if !shared.managed.Load() {
		t.Fatal("testenv.Program needs a TestMain that calls testenv.Main")
	}
	p := &program
	p.mu.Lock()
	defer p.mu.Unlock()
	with := strings.Join(tags, ",")
	if bin := p.bin[with]; bin != "" {
		return bin
	}
	if p.dir == "" {
		dir, err := os.MkdirTemp("", "cpb")
		if err != nil {
			t.Fatal(err)
		}
		p.dir, p.bin = dir, map[string]string{}
	}
	bin := filepath.Join(p.dir, "cacheproxy"+strings.Join(tags, "-"))
	cmd := exec.Command("go", "build", "-trimpath", "-tags", with, "-o", bin, "cacheproxy/cmd/cacheproxy")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build cacheproxy: %v\n%s", err, out)
	}
	p.bin[with] = bin
	return bin
}

// Output collects what a program prints while tests read it. The zero value is empty. Its methods are safe for concurrent use.
type Output struct {
	mu sync.Mutex
	b  bytes.Buffer // guarded by mu
}

func (o *Output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.Write(p)
}

// String is all that has been printed so far.
func (o *Output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.String()
}

// Tail is at most the last n bytes of it.
func (o *Output) Tail(n int) string {
	s := o.String()
	return s[max(0, len(s)-n):]
}
