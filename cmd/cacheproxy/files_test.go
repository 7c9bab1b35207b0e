package main

import (
	"net"
	"os"
	"os/exec"
	"strings"
	"testing"

	"cacheproxy/internal/testenv"
)

// Where the limit of open files allows fewer clients than max_clients, the rest is refused in Redis's words, and those who are served are
// served in full: a connection of their own to Redis is to be had.
func TestFewOpenFiles(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	s := newSite(t, testenv.Redis(t).URL(), "")
	s.write("routes: []\n")
	s.start(exec.Command("sh", "-c", `ulimit -n 160; exec "$0" "$@"`, self, "--config", s.config))
	s.started()
	eventually(t, "the limit is spoken of", func() bool { return s.stderr.has("the limit of open files allows fewer clients") })
	say := func(c net.Conn, what string) string {
		_, err := c.Write([]byte(what + "\r\n"))
		b := make([]byte, 512)
		n, _ := c.Read(b)
		if n == 0 && err != nil { // who is refused may be told so, and be gone, before he has said a word
			t.Fatal(err)
		}
		return string(b[:n])
	}
	var served []net.Conn
	for refused := 0; refused < 3; {
		c, err := net.Dial("unix", s.socket)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		switch got := say(c, "PING"); {
		case got == "+PONG\r\n":
			served = append(served, c)
		case strings.Contains(got, "max number of clients reached"):
			refused++
		default:
			t.Fatalf("after %d clients: %q", len(served), got)
		}
	}
	if len(served) < 20 {
		t.Fatalf("%d clients are served", len(served))
	}
	for i, c := range served {
		if got := say(c, "EVAL return(1) 0"); got != ":1\r\n" {
			t.Errorf("EVAL: %q", got)
		}
		if got := say(c, "SUBSCRIBE ch"); i < 10 && !strings.Contains(got, "subscribe") {
			t.Errorf("SUBSCRIBE: %q", got)
		}
		if i == 9 {
			break
		}
	}
}
