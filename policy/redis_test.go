package policy

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"
	"time"
)

// oracle is a connection to a real Redis that lives as long as the test.
type oracle struct {
	t    testing.TB
	conn net.Conn
	in   *bufio.Reader
}

// startRedis starts a redis-server on a private socket and connects to it.
func startRedis(t testing.TB) *oracle {
	t.Helper()
	dir := t.TempDir()
	socket := filepath.Join(dir, "s")
	server := exec.Command("redis-server", "--port", "0", "--unixsocket", socket, "--dir", dir, "--save", "")
	if err := server.Start(); err != nil {
		t.Fatalf("start redis-server: %v", err)
	}
	t.Cleanup(func() {
		server.Process.Kill()
		server.Wait()
	})
	// 30 seconds are ample for a start on the busiest machine, and short of the test binary's own deadline.
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		conn, err := net.Dial("unix", socket)
		if err == nil {
			t.Cleanup(func() { conn.Close() })
			return &oracle{t: t, conn: conn, in: bufio.NewReader(conn)}
		}
		if time.Now().After(deadline) {
			t.Fatalf("connect to redis-server: %v", err)
		}
	}
}

// do sends one command and returns its reply: string, int, nil or []any. An error reply ends the test.
func (o *oracle) do(args ...string) any {
	o.t.Helper()
	out := fmt.Appendf(nil, "*%d\r\n", len(args))
	for _, arg := range args {
		out = fmt.Appendf(out, "$%d\r\n%s\r\n", len(arg), arg)
	}
	if _, err := o.conn.Write(out); err != nil {
		o.t.Fatalf("%s: %v", args[0], err)
	}
	reply, err := o.read()
	if err != nil {
		o.t.Fatalf("%s: %v", args[0], err)
	}
	return reply
}

// strings is do for a reply that is a list of strings.
func (o *oracle) strings(args ...string) []string {
	o.t.Helper()
	var list []string
	for _, e := range o.do(args...).([]any) {
		list = append(list, e.(string))
	}
	return list
}

func (o *oracle) read() (any, error) {
	line, err := o.in.ReadString('\n')
	if err != nil {
		return nil, err
	}
	kind, rest := line[0], line[1:len(line)-2]
	switch kind {
	case '+':
		return rest, nil
	case '-':
		return nil, fmt.Errorf("redis: %s", rest)
	}
	n, err := strconv.Atoi(rest)
	switch {
	case err != nil || kind == ':':
		return n, err
	case n < 0:
		return nil, nil
	case kind == '$':
		b := make([]byte, n+2)
		_, err := io.ReadFull(o.in, b)
		return string(b[:n]), err
	case kind == '*':
		list := make([]any, n)
		for i := range list {
			if list[i], err = o.read(); err != nil {
				return nil, err
			}
		}
		return list, nil
	}
	return nil, fmt.Errorf("unexpected reply %q", line)
}
