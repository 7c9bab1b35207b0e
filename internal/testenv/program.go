package testenv

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
)

// program is what Program returns; Main removes it.
var program struct {
	once     sync.Once
	dir, bin string
	err      error
}

// Program is the path of cacheproxy as it is shipped, static and without the race detector, which is built when a test of the process first wants it.
func Program(t testing.TB) string {
	t.Helper()
	if !shared.managed.Load() {
		t.Fatal("testenv.Program needs a TestMain that calls testenv.Main")
	}
	p := &program
	p.once.Do(func() {
		if p.dir, p.err = os.MkdirTemp("", "cpb"); p.err != nil {
			return
		}
		p.bin = filepath.Join(p.dir, "cacheproxy")
		cmd := exec.Command("go", "build", "-trimpath", "-o", p.bin, "cacheproxy/cmd/cacheproxy")
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			p.err = fmt.Errorf("build cacheproxy: %w\n%s", err, out)
		}
	})
	if p.err != nil {
		t.Fatal(p.err)
	}
	return p.bin
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
