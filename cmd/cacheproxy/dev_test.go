package main

import (
	"bytes"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"

	"github.com/redis/go-redis/v9"
)

// processesIn lists the command lines of processes that were started for a directory.
func processesIn(t *testing.T, dir string) (found []string) {
	t.Helper()
	all, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range all {
		line, err := os.ReadFile(file)
		if err == nil && bytes.Contains(line, []byte(dir)) {
			found = append(found, string(bytes.ReplaceAll(line, []byte{0}, []byte{' '})))
		}
	}
	return found
}

func TestDev(t *testing.T) {
	s := newSite(t, "", "") // the environment names stores: dev must not use them
	data := filepath.Join(s.dir, "data")
	dev := func() (*program, *redis.Client) {
		t.Helper()
		p := s.exec("dev", "--data", data, "--listen", "unix://"+s.socket)
		eventually(t, "dev is ready", func() bool { return s.stdout.has("cacheproxy is ready") || ended(p) })
		if ended(p) {
			t.Fatalf("dev ended with %d", p.code(t))
		}
		return p, s.client()
	}
	end := func(p *program) {
		t.Helper()
		p.signal(t, syscall.SIGTERM)
		if code := p.code(t); code != exitFine {
			t.Errorf("exit code %d after SIGTERM", code)
		}
		if left := processesIn(t, data); left != nil {
			t.Errorf("processes are left: %q", left)
		}
	}
	p, c := dev()
	if len(processesIn(t, data)) < 2 {
		t.Error("the servers are not found in the process table: the test looks in vain")
	}
	if got, err := c.Get(t.Context(), "user:1").Result(); err != nil || !strings.Contains(got, "Ada Lovelace") {
		t.Errorf("GET user:1: %q %v", got, err)
	}
	if life, err := c.TTL(t.Context(), "user:3").Result(); err != nil || life <= 0 {
		t.Errorf("TTL user:3: %v %v", life, err)
	}
	// The addresses in the tour are the real ones.
	direct := regexp.MustCompile(`redis-cli -p (\d+)  \(process`).FindStringSubmatch(s.stdout.String())
	url := regexp.MustCompile(`psql -P pager=off '([^']+)'`).FindStringSubmatch(s.stdout.String())
	if direct == nil || url == nil {
		t.Fatalf("the tour names no servers:\n%s", s.stdout.String())
	}
	store := redis.NewClient(&redis.Options{Addr: "127.0.0.1:" + direct[1], DisableIdentity: true})
	defer store.Close()
	if n, err := store.Exists(t.Context(), "user:1", "user:2").Result(); err != nil || n != 1 {
		t.Errorf("%d of the documents are in Redis, want the one that was read: %v", n, err)
	}
	if n := count(t, url[1], "SELECT count(*) FROM cacheproxy.entries WHERE value IS NOT NULL"); n != len(demo) {
		t.Errorf("%d documents in Postgres", n)
	}
	for _, do := range [][]any{{"DEL", "user:2"}, {"SET", "report:2026-01", "mine"}} {
		if err := c.Do(t.Context(), do...).Err(); err != nil {
			t.Errorf("%v: %v", do[0], err)
		}
	}
	end(p)

	// What was done stays done: the documents are not put back over it.
	s.stdout = output{}
	p, c = dev()
	if got, err := c.Get(t.Context(), "user:2").Result(); err != redis.Nil { //nolint:errorlint // go-redis returns it bare
		t.Errorf("GET user:2 after DEL: %q %v", got, err)
	}
	if got, err := c.Get(t.Context(), "report:2026-01").Result(); err != nil || got != "mine" {
		t.Errorf("GET report:2026-01: %q %v", got, err)
	}
	end(p)
}

func TestPortFinder(t *testing.T) {
	f := portFinder{}
	a, err := f.next(devRedisPort)
	if err != nil {
		t.Fatal(err)
	}
	if b, err := f.next(a); err != nil || b <= a {
		t.Errorf("%d was given out after %d: %v", b, a, err)
	}
	if _, err := f.next(70000); err == nil {
		t.Error("a port was found where there are none")
	}
}
