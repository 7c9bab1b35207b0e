package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"testing"

	"cacheproxy/internal/testenv"

	"github.com/redis/go-redis/v9"
)

// execBuilt starts the program as it is shipped.
func (s *site) execBuilt(args ...string) *program {
	s.t.Helper()
	return s.start(exec.Command(testenv.Program(s.t), args...))
}

// memory reads a figure in MiB of the process's status.
func (p *program) memory(t *testing.T, name string) int {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) == 3 && f[0] == name+":" {
			n, _ := strconv.Atoi(f[1])
			return n / 1024
		}
	}
	t.Fatal("no " + name)
	return 0
}

// A value of 100 MB passes in both directions in less than three times its size: what is received is held once, beside what it took
// to grow the buffer; what is sent passes through, and is held once at most for a client that reads more slowly than Redis writes.
func TestLargeValuePasses(t *testing.T) {
	const size, bound = 100 << 20, 300
	direct := testenv.Redis(t)
	s := newSite(t, direct.URL(), "")
	s.write("routes: []")
	p := s.execBuilt("serve", "--config", s.config)
	s.started()
	idle := p.memory(t, "VmRSS")
	dial := func() (net.Conn, *bufio.Reader) {
		c, err := net.Dial("unix", s.socket)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c, bufio.NewReader(c)
	}
	c, rd := dial()
	fmt.Fprintf(c, "*3\r\n$3\r\nSET\r\n$3\r\nbig\r\n$%d\r\n", size)
	pattern := []byte(strings.Repeat("0123456789abcdef", 4096))
	for n := 0; n < size; n += len(pattern) {
		if _, err := c.Write(pattern); err != nil {
			t.Fatal(err)
		}
	}
	fmt.Fprint(c, "\r\n")
	if line, err := rd.ReadString('\n'); line != "+OK\r\n" {
		t.Fatal(line, err)
	}
	set := p.memory(t, "VmHWM")
	fetch := func(c net.Conn, rd *bufio.Reader) error {
		fmt.Fprint(c, "*2\r\n$3\r\nGET\r\n$3\r\nbig\r\n*1\r\n$4\r\nPING\r\n")
		if line, err := rd.ReadString('\n'); line != fmt.Sprintf("$%d\r\n", size) {
			return fmt.Errorf("%q, %w", line, err)
		}
		b := make([]byte, len(pattern))
		for n := 0; n < size; n += len(b) {
			if _, err := io.ReadFull(rd, b); err != nil {
				return err
			}
			if string(b) != string(pattern) {
				return fmt.Errorf("other bytes at %d", n)
			}
		}
		rest := make([]byte, len("\r\n+PONG\r\n"))
		if _, err := io.ReadFull(rd, rest); err != nil || string(rest) != "\r\n+PONG\r\n" {
			return fmt.Errorf("%q, %w", rest, err)
		}
		return nil
	}
	for range 3 {
		if err := fetch(c, rd); err != nil {
			t.Fatal(err)
		}
	}
	alone := p.memory(t, "VmHWM")
	unread, _ := dial()
	fmt.Fprint(unread, "*2\r\n$3\r\nGET\r\n$3\r\nbig\r\n")
	var wg sync.WaitGroup
	for range 3 {
		c, rd := dial()
		wg.Go(func() {
			if err := fetch(c, rd); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	peak := p.memory(t, "VmHWM")
	t.Logf("idle %d MiB; at most %d to receive it, %d to send it to one who reads, %d to three more beside one who does not", idle, set, alone, peak)
	if alone > bound || peak > bound+3*size>>20 {
		t.Errorf("%d and %d MiB at most, for a value of %d MiB", alone, peak, size>>20)
	}
}

// A thousand clients that say nothing special share a few connections to Redis.
func TestThousandClients(t *testing.T) {
	direct := testenv.Redis(t)
	for _, routes := range []string{"routes: []", "routes: [{name: all, match: '*', phase: phase1}]"} {
		t.Run(routes, func(t *testing.T) {
			pg := ""
			if routes != "routes: []" {
				pg = testenv.Postgres(t)
			}
			s := newSite(t, direct.URL(), pg)
			s.write(routes)
			p := s.execBuilt("serve", "--config", s.config)
			s.started()
			control := s.client()
			ctx := context.Background()
			eventually(t, "it serves", func() bool { return control.Set(ctx, "k", "v", 0).Err() == nil })
			var all []net.Conn
			for i := range 1000 {
				c, err := net.Dial("unix", s.socket)
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { c.Close() })
				fmt.Fprintf(c, "HELLO %d\r\n", 2+i%2)
				all = append(all, c)
			}
			for i, c := range all {
				rd := bufio.NewReader(c)
				fmt.Fprintf(c, "GET k\r\nSET k%d v\r\nECHO last\r\n", i)
				for {
					line, err := rd.ReadString('\n')
					if err != nil {
						t.Fatal(err)
					}
					if line == "last\r\n" {
						break
					}
				}
			}
			n := 0
			list := clientList(t, direct.Addr())
			for line := range strings.Lines(list) {
				if strings.Contains(line, " name=cacheproxy-") {
					n++
				}
			}
			t.Logf("%d connections, RSS %d MiB", n, p.memory(t, "VmRSS"))
			if n == 0 || n > 8 {
				t.Errorf("%d connections to Redis:\n%s", n, list)
			}
		})
	}
}

// clientList asks Redis itself.
func clientList(t *testing.T, addr string) string {
	t.Helper()
	c := redis.NewClient(&redis.Options{Addr: addr, Network: network(addr)})
	defer c.Close()
	list, err := c.ClientList(context.Background()).Result()
	if err != nil {
		t.Fatal(err)
	}
	return list
}

func network(addr string) string {
	if strings.HasPrefix(addr, "/") {
		return "unix"
	}
	return "tcp"
}
