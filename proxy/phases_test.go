package proxy_test

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"

	"cacheproxy/policy"
	"cacheproxy/proxy"
)

// exact are values whose bytes JSONB would change or refuse.
var exact = map[string]string{
	"canonical": `{"a": 1, "b": [1, 2, 3]}`,
	"spaces":    `  {"b" :1,"a":2}  `,
	"order":     `{"z":1,"a":2}`,
	"binary":    "\x00\xff\xfe\r\n$3\r\n",
	"exponent":  "1e5",
	"empty":     "",
	"text":      "hello",
	"large":     `{"x":"` + strings.Repeat("0123456789abcdef", 1<<16) + `"}`,
}

func TestPhase1SetIsExactAndPromoted(t *testing.T) {
	w := newWorld(t)
	c := w.sidecar(policy.Phase1).dial(t)
	for name, v := range exact {
		c.want("+OK", "SET", name, v, "PX", "600000")
		if got := w.raw.do("GET", name); got != v {
			t.Errorf("%s: redis holds %.60q", name, got)
		}
		w.raw.want(":1", "DEL", name)
		c.want(v, "GET", name)
		if got := w.raw.do("GET", name); got != v {
			t.Errorf("%s: promoted as %.60q", name, got)
		}
		ttl, _ := strconv.Atoi(strings.TrimPrefix(w.raw.do("PTTL", name), ":"))
		if ttl <= 590000 || ttl > 600000 {
			t.Errorf("%s: promoted with %d ms", name, ttl)
		}
	}
	if got := w.sql("SELECT raw IS NULL FROM cacheproxy.entries WHERE key = 'canonical'"); got != "true" {
		t.Errorf("canonical JSON is stored twice")
	}
	w.journalEmpty()
}

// A conversation in every phase that has a store gives what Redis alone gives.
func TestConversation(t *testing.T) {
	script := []struct{ want, cmd string }{
		{"(nil)", "GET k"}, {"+OK", "SET k 10"}, {"10", "GET k"}, {":11", "INCR k"}, {":9", "DECRBY k 2"}, {":3", "APPEND k 77"},
		{"977", "GET k"}, {":3", "STRLEN k"}, {"77", "GETRANGE k 1 2"}, {":1", "EXISTS k"}, {":2", "EXISTS k k"}, {"+string", "TYPE k"}, {":-1", "TTL k"},
		{":1", "EXPIRE k 100"}, {":100", "TTL k"}, {":1", "PERSIST k"}, {":-1", "PTTL k"}, {"(nil)", "SET k x NX"}, {"977", "SET k 5 XX GET"}, {"5", "GETSET k 6"},
		{":0", "SETNX k 1"}, {":1", "SETNX n 1"}, {"+OK", "MSET a 1 b 2"}, {"[1 2 (nil) 6]", "MGET a b c k"}, {"1", "GETDEL a"}, {"(nil)", "GET a"},
		{":2", "DEL b n a"}, {"+OK", "SETEX e 50 v"}, {":50", "TTL e"}, {"v", "GETEX e PERSIST"}, {":-1", "TTL e"}, {":1", "UNLINK e"}, {"(nil)", "GETDEL e"},
		{":0", "STRLEN e"}, {"", "GETRANGE e 0 -1"}, {"+none", "TYPE e"}, {":-2", "TTL e"}, {"1.5", "INCRBYFLOAT f 1.5"}, {"+OK", "PSETEX p 90000 v"}, {":1", "EXPIRE p -1"}, {"(nil)", "GET p"},
		{"-ERR value is not an integer or out of range", "INCR f"}, {"-ERR wrong number of arguments for 'get' command", "GET"}, {"-ERR syntax error", "SET k v BAD"},
		// load, run, mirror
		{":5", "SETRANGE r 0 hello"}, {"hello", "GET r"}, {":0", "GETBIT r 0"}, {"+OK", "RENAME r s"}, {"(nil)", "GET r"}, {"hello", "GET s"}, {":1", "COPY s s2"}, {"hello", "GET s2"},
		{"2", "EVAL redis.call('SET',KEYS[1],'2')return(redis.call('GET',KEYS[1])) 1 ev"}, {"2", "GET ev"}, {":1", "MSETNX m1 1 m2 2"}, {"2", "GET m2"}, {":5", "STRLEN s"},
		// other types
		{":1", "LPUSH l x"}, {"+list", "TYPE l"}, {"-WRONGTYPE Operation against a key holding the wrong kind of value", "GET l"}, {"-WRONGTYPE Operation against a key holding the wrong kind of value", "LPUSH s y"},
		{":1", "EXPIRE l 100"}, {":100", "TTL l"}, {"+OK", "SET l now"}, {"now", "GET l"}, {":1", "HSET h f v"}, {":1", "DEL h"}, {"+none", "TYPE h"}, {":1", "SADD st a"}, {":1", "SINTERSTORE s2 st"}, {"+set", "TYPE s2"},
		{"[x]", "EVAL return{'x'} 0"}, {"+PONG", "PING"},
	}
	for _, phase := range []policy.Phase{policy.Phase0, policy.Phase1, policy.Phase2, policy.Drain, policy.Phase3} {
		t.Run(phase.String(), func(t *testing.T) {
			w := newWorld(t)
			c := w.sidecar(phase).dial(t)
			for _, line := range script {
				c.want(line.want, strings.Fields(line.cmd)...)
				if t.Failed() {
					t.Fatalf("at %q", line.cmd)
				}
			}
			if phase != policy.Phase3 {
				w.journalEmpty()
			}
		})
	}
}

func TestPhase2RowNeverComesBack(t *testing.T) {
	w := newWorld(t)
	one := w.sidecar(policy.Phase1)
	c := one.dial(t)
	for i := range 20 {
		c.want("+OK", "SET", fmt.Sprint("k", i), "old")
	}
	c.want("+OK", "CACHEPROXY", "PHASE", "all", "phase2")
	two := w.sidecar(policy.Phase2).dial(t)
	for i := range 20 {
		k := fmt.Sprint("k", i)
		switch i % 4 {
		case 0:
			c.want("+OK", "SET", k, "new")
		case 1:
			two.want(":1", "DEL", k)
		case 2:
			c.want(":6", "APPEND", k, "new")
		case 3:
			two.want(":5", "SETRANGE", k, "3", "xx")
		}
		w.raw.do("DEL", k)
		c.want("(nil)", "GET", k)
		two.want("(nil)", "GET", k)
		if got := w.sql("SELECT count(*) FROM cacheproxy.entries WHERE key = $1", k); got != "0" {
			t.Errorf("%s: the row is still there", k)
		}
	}
}

// A list that is made where a string was deleted is Redis's own: the tombstone in the store must not take it away.
func TestListAfterDeletedString(t *testing.T) {
	for _, phase := range []policy.Phase{policy.Phase0, policy.Phase1, policy.Phase2} {
		t.Run(phase.String(), func(t *testing.T) {
			w := newWorld(t)
			c := w.sidecar(phase).dial(t)
			wrong := "-WRONGTYPE Operation against a key holding the wrong kind of value"
			for _, line := range []struct{ want, cmd string }{
				{"+OK", "SET k 1"}, {":1", "DEL k"}, {":1", "LPUSH k x"},
				{wrong, "INCR k"}, {wrong, "APPEND k y"}, {":0", "SETNX k 1"}, {"(nil)", "SET k 1 NX"}, {wrong, "GETDEL k"}, {wrong, "GETSET k 1"},
				{":1", "EXPIRE k 100"}, {":100", "TTL k"}, {"+list", "TYPE k"}, {":1", "LLEN k"}, {wrong, "GET k"}, {":1", "DEL k"}, {"+none", "TYPE k"},
			} {
				c.want(line.want, strings.Fields(line.cmd)...)
			}
		})
	}
}

// lateStore gives no answer in time once the test says so.
type lateStore struct {
	proxy.Store
	late atomic.Bool
}

func (s *lateStore) Load(ctx context.Context, refs []policy.Ref) ([]policy.Row, error) {
	if s.late.Load() {
		return nil, context.DeadlineExceeded
	}
	return s.Store.Load(ctx, refs)
}

func (s *lateStore) Look(ctx context.Context, refs []policy.Ref) ([]policy.Row, error) {
	if s.late.Load() {
		return nil, context.DeadlineExceeded
	}
	return s.Store.Look(ctx, refs)
}

// A step back compares all of Redis with Postgres. That this takes too long refuses the step, and is no outage: readers miss nothing.
func TestStepBackThatTakesTooLong(t *testing.T) {
	w := newWorld(t)
	store := &lateStore{}
	s := w.start(sidecarOptions{routes: []policy.Route{route(policy.Phase1)}, store: func(inner proxy.Store) proxy.Store { store.Store = inner; return store }})
	c := s.dial(t)
	c.want("+OK", "SET", "k", "v")
	store.late.Store(true)
	if err := s.srv.SetPhase("all", policy.Phase0); err == nil {
		t.Error("the step is taken without the comparison")
	}
	store.late.Store(false)
	if h := s.srv.Health(); h.Postgres.Status != "connected" {
		t.Errorf("postgres is %s: %s", h.Postgres.Status, h.Postgres.Reason)
	}
	w.raw.want(":1", "DEL", "k")
	c.want("v", "GET", "k")
	c.want("+OK", "CACHEPROXY", "PHASE", "all", "phase0")
}
