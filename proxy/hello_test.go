package proxy_test

import (
	"regexp"
	"testing"

	"cacheproxy/policy"
)

// idOf is where HELLO tells the id of the connection, which is the only field that the proxy has of its own.
var idOf = regexp.MustCompile(`(id\r\n):[0-9]+\r\n`)

// Whatever the version of Redis, and whatever modules it has, HELLO answers as it does.
func TestHelloIsRedis(t *testing.T) {
	w := newWorld(t)
	s := w.sidecar(policy.Phase1)
	c, raw := s.dial(t), dial(t, w.redis.Addr())
	for _, args := range [][]string{{"HELLO"}, {"HELLO", "3"}, {"HELLO"}, {"HELLO", "2"}, {"HELLO", "3", "SETNAME", "x"}, {"HELLO", "2"}} {
		var replies [2]string
		for i, c := range []*conn{c, raw} {
			c.send(args...)
			b, err := c.frame()
			if err != nil {
				t.Fatal(err)
			}
			replies[i] = idOf.ReplaceAllString(string(b), "$1")
		}
		if replies[0] != replies[1] {
			t.Errorf("%q\nredis %q\nproxy %q", args, replies[1], replies[0])
		}
	}
}

// Also before any Redis has been met.
func TestHelloWithoutRedis(t *testing.T) {
	w := newWorld(t)
	s := w.start(sidecarOptions{redisURL: "redis://127.0.0.1:1/0", routes: []policy.Route{route(policy.Phase1)}, noWait: true})
	c := s.dial(t)
	for _, proto := range []string{"2", "3"} {
		if got := idOf.ReplaceAllString(c.do("HELLO", proto), ""); got != "[server redis version 7.0.0 proto :"+proto+" id :1 mode standalone role master modules []]" {
			t.Errorf("HELLO %s: %q", proto, got)
		}
	}
}

// SET with the conditions of Redis 8.4 is Redis's to evaluate, or to refuse.
func TestNewerSet(t *testing.T) {
	for _, phase := range []policy.Phase{policy.Phase0, policy.Phase1, policy.Phase2, policy.Drain} {
		w := newWorld(t)
		c := w.sidecar(phase).dial(t)
		c.want("+OK", "SET", "k", "v")
		want := w.raw.do("SET", "other", "v")
		if want != "+OK" {
			t.Fatal(want)
		}
		for _, args := range [][]string{{"v", "w", "IFEQ"}, {"v", "w", "ifeq"}, {"w", "x", "IFNE"}, {"w", "w", "IFEQ"}, {"x", "x", "IFDEQ"}} {
			want := w.raw.do("SET", "other", args[1], args[2], args[0])
			c.want(want, "SET", "k", args[1], args[2], args[0])
			c.want(w.raw.do("GET", "other"), "GET", "k")
		}
		c.want("-ERR syntax error", "SET", "k", "v", "NOSUCH", "v")
	}
}
