package proxy_test

import (
	"fmt"
	"math/rand/v2"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"cacheproxy/internal/testenv"
	"cacheproxy/policy"
	"cacheproxy/proxy"
)

// A large value that takes longer than the bounded wait on its way is not an outage.
func TestLargeValueIsNoOutage(t *testing.T) {
	w := newWorld(t)
	link := testenv.NewLink(t, w.redis.Addr())
	s := w.start(sidecarOptions{redisURL: "redis://" + link.Addr() + "/0", routes: []policy.Route{route(policy.Phase1)},
		// With the race detector, and beside other tests, everything between the three is some ten times slower.
		storeTimeout: 30 * time.Second, change: func(c *proxy.ServerConfig) { c.Redis.Timeout, c.MaxValue = 2*time.Second, 64<<20 }})
	c := s.dial(t)
	big := strings.Repeat("x", 48<<20)
	c.want("+OK", "SET", "big", big)
	for range 3 {
		c.want(big, "GET", "big")
	}
	if n := s.srv.Stats(t.Context()).Redis.Opens; n != 0 {
		t.Errorf("the breaker opened %d times", n)
	}
}

// Redis closes idle connections after its timeout: nobody notices.
func TestIdleConnectionsAreClosedByRedis(t *testing.T) {
	w := newWorld(t, "--timeout", "1")
	s := w.sidecar(policy.Phase1)
	c := s.dial(t)
	c.want("+OK", "SET", "k", "v")
	c.want("v", "GET", "k")
	c.want(":2", "SETRANGE", "k", "1", "w")
	before := strings.Count(dial(t, w.redis.Addr()).do("CLIENT", "LIST"), "name=cacheproxy-lane")
	if before == 0 {
		t.Fatal("there is no shared connection to close")
	}
	w.until("redis has closed the idle ones", func() bool {
		return strings.Count(dial(t, w.redis.Addr()).do("CLIENT", "LIST"), "name=cacheproxy-lane") == 0
	})
	c.want("vw", "GET", "k")
	c.want(":3", "SETRANGE", "k", "2", "x")
	c.want("vwx", "GET", "k")
	if n := s.srv.Stats(t.Context()).Redis.Opens; n != 0 {
		t.Errorf("the breaker opened %d times", n)
	}
}

// The connection on which the proxy watches over Redis is not idle, also where no route has a store: were it closed, that would be an outage.
func TestControlConnectionIsNotIdle(t *testing.T) {
	w := newWorld(t, "--timeout", "3")
	s := w.start(sidecarOptions{})
	c := s.dial(t)
	c.want("+OK", "SET", "k", "v")
	list := func() string { return dial(t, w.redis.Addr()).do("CLIENT", "LIST") }
	if !strings.Contains(list(), "name=cacheproxy-lane") {
		t.Fatal("there is no shared connection to close")
	}
	w.until("redis has closed the idle ones", func() bool { return !strings.Contains(list(), "name=cacheproxy-lane") })
	c.want("v", "GET", "k")
	if n := s.srv.Stats(t.Context()).Redis.Opens; n != 0 {
		t.Errorf("the breaker opened %d times", n)
	}
}

// What is too large for the store's time is refused before anything has changed, however it comes about, and Redis goes on for everybody.
func TestValueTooLargeForTheStore(t *testing.T) {
	w := newWorld(t)
	s := w.start(sidecarOptions{routes: []policy.Route{{Name: "one", Match: "one:*", Phase: policy.Phase1}, {Name: "two", Match: "two:*", Phase: policy.Phase2}},
		change: func(c *proxy.ServerConfig) { c.MaxValue = 1 << 20 }})
	c := s.dial(t)
	fits, big := strings.Repeat("x", 1<<20), strings.Repeat("x", 1<<20+1)
	c.want("+OK", "SET", "one:k", "v")
	denied := func(args ...string) {
		t.Helper()
		if got := c.do(args...); !strings.HasPrefix(got, "-DENIED ") || !strings.Contains(got, "postgres.max_value") {
			t.Errorf("%s: %.100q", args[0], got)
		}
	}
	denied("SET", "one:k", big)
	denied("APPEND", "one:k", fits)
	denied("MSET", "one:k", "w", "one:l", big)
	denied("SETRANGE", "one:k", strconv.Itoa(2<<20), "x")
	denied("EVAL", "return redis.call('SET', KEYS[1], string.rep('x', 2^21))", "1", "one:k")
	for _, server := range []*conn{c, w.raw} {
		server.want("v", "GET", "one:k")
		server.want("(nil)", "GET", "one:l")
	}
	if got := w.sql("select count(*) from cacheproxy.entries"); got != "1" {
		t.Errorf("%s rows", got)
	}
	c.want("+OK", "SET", "one:l", fits)
	c.want("+OK", "SET", "two:k", big) // Redis alone has it
	w.raw.do("DEL", "one:l")
	c.want(fits, "GET", "one:l")

	// One that came in without us, while Postgres was to be told of the key.
	w.raw.do("HSET", "cacheproxy:journal", "one:m", "some version")
	w.raw.want("+OK", "SET", "one:m", strings.Repeat("x", 8<<20))
	w.journalEmpty()
	c.want(":"+strconv.Itoa(8<<20), "STRLEN", "one:m")
	if n := s.srv.Stats(t.Context()).Redis.Opens; n != 0 {
		t.Errorf("the breaker opened %d times", n)
	}
}

// A long reply is passed on whatever it holds: in the middle of it a ">" begins no push, and a ":" no number. Who shares its connection gets his own.
func TestLongRepliesOfAnything(t *testing.T) { eachDriver(t, testLongRepliesOfAnything) }

func testLongRepliesOfAnything(t *testing.T) {
	w := newWorld(t)
	s := w.start(sidecarOptions{routes: []policy.Route{{Name: "one", Match: "one:*", Phase: policy.Phase1}}, storeTimeout: 20 * time.Second,
		change: func(c *proxy.ServerConfig) { c.Redis.Timeout = 5 * time.Second }})
	random := rand.New(rand.NewPCG(5, 5))
	noise := make([]byte, 3<<20)
	for i := range noise {
		noise[i] = byte(random.Uint32())
	}
	const chunk = 72 << 10 // what is longer is passed on while it comes
	values := []string{string(noise), strings.Repeat("x", chunk-len("$73920\r\n")) + strings.Repeat(">", 200)}
	for _, text := range []string{">", "*", "$", "-", ":", "_", "\r\n", ">2\r\n$10\r\ninvalidate\r\n"} {
		for _, n := range []int{chunk - 20 + random.IntN(40), 2*chunk - 20 + random.IntN(40), 300 << 10} {
			values = append(values, strings.Repeat(text, n/len(text)))
		}
	}
	stop := make(chan struct{})
	var others sync.WaitGroup
	for n := range 4 {
		c := s.dial(t)
		others.Go(func() {
			for i := 0; ; i++ {
				select {
				case <-stop:
					return
				default:
				}
				if mine := fmt.Sprintf("%d-%d", n, i); c.do("ECHO", mine) != mine {
					t.Error("another client's reply")
					return
				}
			}
		})
	}
	plain, pinned := s.dial(t), s.dial(t)
	pinned.want("+OK", "CLIENT", "NO-EVICT", "ON")
	for i, v := range values {
		key := []string{"one:k", "none:k"}[i%2]
		w.raw.want("+OK", "SET", key, v)
		for _, c := range []*conn{plain, pinned} {
			for range 2 { // on the shared connection, then on one of its own
				if got := c.do("GET", key); got != v {
					t.Errorf("value %d of %d bytes: got %d, %.40q", i, len(v), len(got), got)
				}
			}
			c.send("MGET", key, key)
			c.send("ECHO", "after")
			if got := c.reply(); len(got) < 2*len(v) {
				t.Errorf("value %d: MGET: %d bytes", i, len(got))
			}
			if got := c.reply(); got != "after" {
				t.Errorf("value %d: after MGET: %.40q", i, got)
			}
		}
	}
	close(stop)
	others.Wait()
	if n := s.srv.Stats(t.Context()).Redis.Opens; n != 0 {
		t.Errorf("the breaker opened %d times", n)
	}
}
