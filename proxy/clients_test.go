package proxy_test

import (
	"context"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"cacheproxy/internal/testenv"
	"cacheproxy/policy"
	"cacheproxy/proxy"
)

// clients returns the lines of Redis's CLIENT LIST that contain word.
func (w *world) clients(word string) (n int) {
	for line := range strings.Lines(w.raw.do("CLIENT", "LIST")) {
		if strings.Contains(line, word) {
			n++
		}
	}
	return n
}

// nobodys counts the clients of Redis that have no name. Those that have not said a word are no one's yet.
func (w *world) nobodys() (n int) {
	for line := range strings.Lines(w.raw.do("CLIENT", "LIST")) {
		if strings.Contains(line, " name= ") && !strings.Contains(line, " cmd=NULL ") {
			n++
		}
	}
	return n
}

// over waits for the end of the connection and returns what came before.
func (c *conn) over() string {
	c.t.Helper()
	c.SetReadDeadline(time.Now().Add(20 * time.Second))
	b, err := io.ReadAll(c.rd)
	if ne, ok := err.(net.Error); ok && ne.Timeout() {
		c.t.Fatalf("the connection stays open; it said %q", b)
	}
	return string(b)
}

// Nobody is told of the proxy's own keys, which it writes all the time.
func TestOwnKeysAreNotAnnounced(t *testing.T) {
	w := newWorld(t, "--notify-keyspace-events", "KEA")
	s := w.sidecar(policy.Phase1)
	direct := w.raw
	type told struct {
		name string
		*conn
	}
	subscribe := func(addr string) []told {
		sub, tracks := dial(t, addr), dial(t, addr)
		sub.want("[psubscribe __key*__:* :1]", "PSUBSCRIBE", "__key*__:*")
		tracks.do("HELLO", "3")
		tracks.want("+OK", "CLIENT", "TRACKING", "ON", "BCAST")
		return []told{{"notifications", sub}, {"invalidations", tracks}}
	}
	seen := func(c told, until string) (own int) {
		for {
			frame := c.reply()
			if strings.Contains(frame, "cacheproxy:") {
				own++
			}
			if strings.Contains(frame, until) {
				return own
			}
		}
	}
	raw, through := subscribe(w.redis.Addr()), subscribe(s.addr)
	before := direct.do("GET", "cacheproxy:clock")
	w.until("the clock is written", func() bool { return direct.do("GET", "cacheproxy:clock") != before })
	direct.want("+OK", "SET", "cacheproxy:other", "v")
	direct.want("+OK", "MSET", "one", "1", "cacheproxy:more", "2", "last", "3")
	for _, c := range raw {
		if seen(c, "last") == 0 {
			t.Errorf("%s: Redis itself told of no key of the proxy's: the test shows nothing", c.name)
		}
	}
	for _, c := range through {
		if n := seen(c, "last"); n > 0 {
			t.Errorf("%s: told %d times of the proxy's own keys", c.name, n)
		}
	}
}

func TestPubSub(t *testing.T) { eachDriver(t, testPubSub) }

func testPubSub(t *testing.T) {
	for _, phase := range []policy.Phase{policy.Phase1, policy.Phase3} {
		for _, proto := range []string{"2", "3"} {
			t.Run(phase.String()+"/resp"+proto, func(t *testing.T) {
				w := newWorld(t)
				s := w.sidecar(phase)
				c, p := s.dial(t), s.dial(t)
				c.do("HELLO", proto)
				c.want("[subscribe a :1]", "SUBSCRIBE", "a")
				c.send("PSUBSCRIBE", "b*", "c*")
				for _, want := range []string{"[psubscribe b* :2]", "[psubscribe c* :3]"} {
					if got := c.reply(); got != want {
						t.Errorf("got %q, want %q", got, want)
					}
				}
				c.want("[ssubscribe sh :1]", "SSUBSCRIBE", "sh")
				p.want(":1", "PUBLISH", "a", "one")
				p.want(":1", "PUBLISH", "bee", "two\r\n")
				p.want(":1", "SPUBLISH", "sh", "three")
				p.want("[a]", "PUBSUB", "CHANNELS")
				for _, want := range []string{"[message a one]", "[pmessage b* bee two\r\n]", "[smessage sh three]"} {
					if got := c.reply(); got != want {
						t.Errorf("got %q, want %q", got, want)
					}
				}
				if proto == "2" {
					c.want("[pong ]", "PING")
					c.want("[pong x]", "PING", "x")
					if got := c.do("GET", "k"); !strings.HasPrefix(got, "-ERR Can't execute 'get': only (P|S)SUBSCRIBE") {
						t.Errorf("GET of a subscriber: %q", got)
					}
				} else {
					c.want("+PONG", "PING")
					p.want("+OK", "SET", "k", "v")
					w.raw.do("DEL", "k")
					want := "v"
					if phase == policy.Phase3 {
						want = "(nil)"
					}
					c.want(want, "GET", "k") // loaded and promoted, though this connection is Redis's
				}
				c.want("[unsubscribe a :2]", "UNSUBSCRIBE", "a")
				c.want("[sunsubscribe sh :0]", "SUNSUBSCRIBE")
				c.send("PUNSUBSCRIBE")
				c.reply()
				if got := c.reply(); !strings.HasSuffix(got, " :0]") {
					t.Errorf("the last one: %q", got)
				}
				p.want(":0", "PUBLISH", "a", "x")
				c.want("+PONG", "PING")
				c.want("+OK", "SET", "k", "w")
				w.until("the connection is given back", func() bool { return w.nobodys() == 1 }) // ours to Redis itself
				c.want("+RESET", "RESET")
				c.want("+OK", "SET", "k", "w")
				c.want("w", "GET", "k")
				c.want("[subscribe again :1]", "SUBSCRIBE", "again")
				c.want("+OK", "QUIT")
				c.over()
				w.until("the subscriber's connection is gone", func() bool { return w.raw.do("PUBSUB", "NUMSUB", "again") == "[again :0]" })
			})
		}
	}
}

// replies reads n replies; pushes that come between them are told apart.
func (c *conn) replies(n int) (out, pushes []string) {
	c.t.Helper()
	for len(out) < n {
		c.SetReadDeadline(time.Now().Add(20 * time.Second))
		kind, err := c.rd.Peek(1)
		if err != nil {
			c.t.Fatal(err)
		}
		push := kind[0] == '>'
		if r := c.reply(); push {
			pushes = append(pushes, r)
		} else {
			out = append(out, r)
		}
	}
	return out, pushes
}

// A client that tracks keys or subscribes may do what anybody may, and its replies come in order, whoever gives them.
func TestPushesKeepOrder(t *testing.T) {
	for _, phase := range policy.Phases() {
		for _, first := range []string{"CLIENT TRACKING ON", "SUBSCRIBE ch"} {
			t.Run(phase.String()+"/"+first, func(t *testing.T) {
				w := newWorld(t)
				c := w.sidecar(phase).dial(t)
				c.do("HELLO", "3")
				c.Write([]byte(first + "\r\n"))
				if got := c.reply(); got != "+OK" && got != "[subscribe ch :1]" {
					t.Fatal(got)
				}
				var want []string
				for i := range 30 {
					k := fmt.Sprint("k", i)
					c.send("ECHO", k)
					c.send("SET", k, "v")
					c.send("GET", k)
					c.send("SETRANGE", k, "1", "w")
					c.send("GET", k)
					c.send("LPUSH", "list", k)
					want = append(want, k, "+OK", "v", ":2", "vw", fmt.Sprint(":", i+1))
				}
				c.send("FLUSHALL")
				c.send("GET", "k1")
				c.send("RESET")
				c.send("SET", "k", "v")
				c.send("GET", "k")
				want = append(want, "+OK", "(nil)", "+RESET", "+OK", "v")
				got, _ := c.replies(len(want))
				for i := range want {
					if got[i] != want[i] {
						t.Fatalf("reply %d: %q, want %q", i, got[i], want[i])
					}
				}
				w.until("the connection is given back", func() bool { return w.nobodys() == 1 })
			})
		}
	}
}

func TestMonitor(t *testing.T) { eachDriver(t, testMonitor) }

func testMonitor(t *testing.T) {
	w := newWorld(t)
	s := w.sidecar(policy.Phase3)
	m, c := s.dial(t), s.dial(t)
	m.want("+OK", "MONITOR")
	c.want("+OK", "SET", "seen", "v")
	for line := ""; !strings.Contains(line, `"SET" "seen" "v"`); {
		line = m.reply()
	}
	m.Close()
	w.until("the monitor's connection is gone", func() bool { return w.clients("flags=O") == 0 })
}

func TestTracking(t *testing.T) {
	for _, phase := range policy.Phases() {
		t.Run(phase.String(), func(t *testing.T) {
			w := newWorld(t)
			s := w.sidecar(phase)
			c, p := s.dial(t), w.sidecar(phase).dial(t)
			p.want("+OK", "SET", "k", "1")
			c.do("HELLO", "3")
			c.want("+OK", "CLIENT", "TRACKING", "ON")
			if phase == policy.Phase1 {
				w.raw.do("DEL", "k") // it is promoted, and tracked all the same
			}
			told := func(key string) {
				t.Helper()
				for {
					got := c.reply()
					if got == "[invalidate ["+key+"]]" {
						return
					}
					t.Fatalf("got %q", got)
				}
			}
			if got, _ := c.push("GET", "k"); got != "1" {
				t.Errorf("GET: %q", got)
			}
			p.want("+OK", "SET", "k", "2")
			told("k")
			if got, _ := c.push("GET", "k"); got != "2" {
				t.Errorf("GET: %q", got)
			}
			p.want(":1", "DEL", "k")
			told("k")
			if got, _ := c.push("GET", "k"); got != "(nil)" {
				t.Errorf("GET: %q", got)
			}
			p.want("+OK", "SET", "k", "3") // an absent key is tracked too
			told("k")

			c.want("+OK", "CLIENT", "TRACKING", "OFF")
			c.want("+OK", "CLIENT", "TRACKING", "ON", "OPTIN")
			c.want("+OK", "CLIENT", "CACHING", "YES")
			if got, _ := c.push("GET", "k"); got != "3" {
				t.Errorf("GET: %q", got)
			}
			p.want("+OK", "SET", "k", "4")
			told("k")
			c.want("+OK", "CLIENT", "CACHING", "YES") // of all of a transaction
			c.want("+OK", "MULTI")
			c.want("+QUEUED", "GET", "k")
			if got, _ := c.push("EXEC"); got != "[4]" {
				t.Errorf("EXEC: %q", got)
			}
			p.want("+OK", "SET", "k", "4")
			told("k")
			c.want("4", "GET", "k")
			p.want("+OK", "SET", "k", "5") // not asked for
			c.want("+PONG", "PING")
			c.want("+OK", "CLIENT", "TRACKING", "OFF")

			// RESP2: another connection is told.
			sub, red := s.dial(t), s.dial(t)
			id := strings.TrimPrefix(sub.do("CLIENT", "ID"), ":")
			red.want("-ERR The client ID you want redirect to does not exist", "CLIENT", "TRACKING", "ON", "REDIRECT", "99999")
			red.want("+OK", "CLIENT", "TRACKING", "ON", "REDIRECT", id)
			red.want(":"+id, "CLIENT", "GETREDIR")
			if got := red.do("CLIENT", "TRACKINGINFO"); !strings.Contains(got, " redirect :"+id+" ") {
				t.Errorf("TRACKINGINFO: %q", got)
			}
			sub.want("[subscribe __redis__:invalidate :1]", "SUBSCRIBE", "__redis__:invalidate")
			red.want("5", "GET", "k")
			p.want("+OK", "SET", "k", "6")
			if got := sub.reply(); got != "[message __redis__:invalidate [k]]" {
				t.Errorf("got %q", got)
			}
		})
	}
}

// push sends a command and returns its reply, and the pushes that came before it.
func (c *conn) push(args ...string) (string, []string) {
	c.t.Helper()
	c.send(args...)
	out, pushes := c.replies(1)
	return out[0], pushes
}

// A script that does not end can be ended, also when Redis refuses to choose a database meanwhile, and SYNC is a replica's from its
// first byte on, whichever connection it gets.
func TestScriptKillAndSync(t *testing.T) {
	w := newWorld(t)
	s := w.start(sidecarOptions{redisURL: strings.TrimSuffix(w.redis.URL(), "0") + "9", routes: []policy.Route{route(policy.Phase1)}})
	for range 2 { // once without a spare connection, once with
		c, d := s.dial(t), s.dial(t)
		c.send("EVAL", "while true do end", "0")
		w.until("redis is busy", func() bool { return strings.HasPrefix(w.raw.do("PING"), "-BUSY") })
		w.until("the script is killed", func() bool { return d.do("SCRIPT", "KILL") == "+OK" })
		if got := c.reply(); !strings.Contains(got, "Script killed") {
			t.Errorf("EVAL: %q", got)
		}
		w.until("redis is trusted", func() bool { return s.srv.Health().Redis.Status == "connected" })
		c.want("(nil)", "BLPOP", "none", "0.01")
		time.Sleep(100 * time.Millisecond)
		d.send("SYNC")
		d.SetReadDeadline(time.Now().Add(20 * time.Second))
		line := "\n"
		for line == "\n" {
			var err error
			if line, err = d.rd.ReadString('\n'); err != nil {
				t.Fatal(err)
			}
		}
		if line[0] != '$' {
			t.Errorf("SYNC: %q", line)
		}
		d.Close()
	}
}

// WAIT speaks of the writes that its client has made, whichever connection they went over.
func TestWait(t *testing.T) {
	w := newWorld(t)
	replica := testenv.Redis(t)
	host, port, _ := net.SplitHostPort(w.redis.Addr())
	dial(t, replica.Addr()).want("+OK", "REPLICAOF", host, port)
	w.until("the replica follows", func() bool { return strings.Contains(w.raw.do("INFO", "replication"), "state=online") })
	s := w.start(sidecarOptions{pgURL: "none"})
	c := s.dial(t)
	c.want(":0", "EXISTS", "warm")
	c.want(":1", "WAIT", "1", "5000") // a spare connection is there for the next one
	time.Sleep(600 * time.Millisecond)
	if err := replica.Pause(); err != nil {
		t.Fatal(err)
	}
	c.want("+OK", "SET", "k", "v")
	c.want(":0", "WAIT", "1", "100")
	if err := replica.Resume(); err != nil {
		t.Fatal(err)
	}
	c.want(":1", "WAIT", "1", "10000")
}

// A client that waits for an element and hangs up frees its connection at once and takes nothing.
func TestBlockedClientHangsUp(t *testing.T) { eachDriver(t, testBlockedClientHangsUp) }

func testBlockedClientHangsUp(t *testing.T) {
	w := newWorld(t)
	s := w.sidecar(policy.Phase1)
	for name, behind := range map[string]int{"alone": 0, "with a command behind": 1, "with many": 500, "held back": 3000} {
		for _, half := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/half=%t", name, half), func(t *testing.T) {
				c := s.dial(t)
				c.send("BLPOP", "queue", "0")
				for range behind {
					c.send("GET", "k")
				}
				w.until("it waits", func() bool { return w.clients("cmd=blpop") == 1 })
				if half {
					c.Conn.(*net.TCPConn).CloseWrite()
					c.over()
				} else {
					c.Close()
				}
				w.until("it is gone", func() bool { return w.clients("cmd=blpop") == 0 })
				w.raw.want(":1", "RPUSH", "queue", "x")
				w.raw.want("x", "LPOP", "queue")
			})
		}
	}
	// Behind a write that takes its time: it must not begin to wait when its client has gone.
	for range 20 {
		c := s.dial(t)
		c.Write(append(encode("SET", "k", strings.Repeat("x", 1000)), encode("BLPOP", "queue", "0")...))
		c.Close()
	}
	w.until("all have gone", func() bool { return s.srv.Clients() == 0 && w.clients("cmd=blpop") == 0 })
	w.raw.want(":1", "RPUSH", "queue", "x")
	w.raw.want("x", "LPOP", "queue")
}

// slowStore loads nothing before the test opens it.
type slowStore struct {
	proxy.Store
	asked chan struct{} // gets one for each load
	open  chan struct{}
}

func (s *slowStore) Load(ctx context.Context, refs []policy.Ref) ([]policy.Row, error) {
	s.asked <- struct{}{}
	<-s.open
	return s.Store.Load(ctx, refs)
}

// A client hangs up while the keys that it is about to wait for are loaded: it must not begin to wait.
func TestHangsUpBeforeItWaits(t *testing.T) {
	w := newWorld(t)
	slow := &slowStore{asked: make(chan struct{}, 8), open: make(chan struct{})}
	s := w.start(sidecarOptions{routes: []policy.Route{route(policy.Phase1)}, store: func(s proxy.Store) proxy.Store { slow.Store = s; return slow }})
	c := s.dial(t)
	c.send("BLPOP", "queue", "0")
	<-slow.asked
	c.Close()
	id := s.dial(t)
	w.until("the proxy knows", func() bool { return strings.Contains(id.do("CLIENT", "LIST"), "flags=c ") })
	close(slow.open)
	w.until("it is gone", func() bool { return s.srv.Clients() == 1 && w.clients("cmd=blpop") == 0 })
	w.raw.want(":1", "RPUSH", "queue", "x")
	w.raw.want("x", "LPOP", "queue")
}

func TestBlockingCommands(t *testing.T) { eachDriver(t, testBlockingCommands) }

func testBlockingCommands(t *testing.T) {
	w := newWorld(t)
	s := w.sidecar(policy.Phase1)
	a, b := s.dial(t), s.dial(t)
	a.send("BLPOP", "q", "0")
	a.send("PING", "after")
	w.until("it waits", func() bool { return w.clients("cmd=blpop") == 1 })
	b.want("+OK", "SET", "other", "1") // nobody else waits
	b.want(":1", "LPUSH", "q", "e")
	if x, y := a.reply(), a.reply(); x != "[q e]" || y != "after" {
		t.Errorf("got %q, %q", x, y)
	}
	w.until("the connection of its own is given up with the next plain command", func() bool {
		a.want("+PONG", "PING")
		return w.clients("cmd=blpop") == 0
	})
	id := strings.TrimPrefix(a.do("CLIENT", "ID"), ":")
	b.want(":0", "CLIENT", "UNBLOCK", id)
	a.send("BLPOP", "q", "0")
	w.until("it can be unblocked", func() bool { return b.do("CLIENT", "UNBLOCK", id, "ERROR") == ":1" })
	if got := a.reply(); got != "-UNBLOCKED client unblocked via CLIENT UNBLOCK" {
		t.Errorf("got %q", got)
	}
	a.want("+PONG", "PING")
}

// fieldNames are those of a line of CLIENT LIST.
func fieldNames(line string) (names []string) {
	for f := range strings.FieldsSeq(line) {
		name, _, _ := strings.Cut(f, "=")
		names = append(names, name)
	}
	return names
}

func TestClientListAndKill(t *testing.T) { eachDriver(t, testClientListAndKill) }

func testClientListAndKill(t *testing.T) {
	w := newWorld(t)
	s := w.start(sidecarOptions{pgURL: "none"})
	a, b, c := s.dial(t), s.dial(t), s.dial(t)
	a.want("+OK", "CLIENT", "SETNAME", "alice")
	a.want("-ERR Client names cannot contain spaces, newlines or special characters.", "CLIENT", "SETNAME", "a b")
	if info := w.raw.do("CLIENT", "INFO"); strings.Contains(info, "lib-name=") { // Redis 7.2
		a.want("+OK", "CLIENT", "SETINFO", "lib-name", "x")
		a.want("-ERR lib-ver cannot contain spaces, newlines or special characters.", "CLIENT", "SETINFO", "lib-ver", "a b")
		a.want("-ERR Unrecognized option 'nope'", "CLIENT", "SETINFO", "nope", "x")
	} else {
		a.want("-ERR unknown subcommand 'SETINFO'. Try CLIENT HELP.", "CLIENT", "SETINFO", "lib-name", "x")
	}
	b.want("[subscribe ch :1]", "SUBSCRIBE", "ch")
	c.want("+PONG", "PING")
	list := a.do("CLIENT", "LIST")
	if n := strings.Count(list, "\n"); n != 3 || !strings.Contains(list, "name=alice ") || !strings.Contains(list, "addr="+c.LocalAddr().String()) {
		t.Errorf("three clients: %q", list)
	}
	id := strings.TrimPrefix(c.do("CLIENT", "ID"), ":")
	if got := a.do("CLIENT", "LIST", "ID", id); strings.Count(got, "\n") != 1 || !strings.HasPrefix(got, "id="+id+" ") {
		t.Errorf("LIST ID: %q", got)
	}
	if got := a.do("CLIENT", "LIST", "TYPE", "pubsub"); strings.Count(got, "\n") != 1 {
		t.Errorf("LIST TYPE: %q", got)
	}
	if got := a.do("CLIENT", "INFO"); !strings.Contains(got, "name=alice ") || !slices.Equal(fieldNames(got), fieldNames(w.raw.do("CLIENT", "INFO"))) {
		t.Errorf("INFO: %q", got)
	}
	a.want(":1", "CLIENT", "KILL", "TYPE", "pubsub")
	b.over()
	a.want("+OK", "CLIENT", "KILL", c.LocalAddr().String())
	c.over()
	c = s.dial(t)
	c.want("+PONG", "PING")
	a.want(":0", "CLIENT", "KILL", "ID", strings.TrimPrefix(a.do("CLIENT", "ID"), ":"))
	a.want("-ERR No such user 'nobody'", "CLIENT", "KILL", "USER", "nobody")
	a.want(":0", "CLIENT", "KILL", "LADDR", "1.2.3.4:5")
	a.want(":1", "CLIENT", "KILL", "USER", "default", "ADDR", c.LocalAddr().String(), "SKIPME", "yes")
	c.over()
	a.want(":1", "CLIENT", "KILL", "SKIPME", "no", "ADDR", a.LocalAddr().String())
	a.over()
	w.until("all are gone", func() bool { return s.srv.Clients() == 0 })
}

func TestOtherDatabase(t *testing.T) {
	w := newWorld(t)
	s := w.sidecar(policy.Phase1)
	c := s.dial(t)
	c.want("+OK", "SET", "k", "home")
	// In one write: each command must see the database that the one before it chose.
	for range 20 {
		c.Write([]byte("SELECT 5\r\nSET k away\r\nGET k\r\nDBSIZE\r\nSELECT 0\r\nGET k\r\nSELECT 5\r\nFLUSHDB\r\nSELECT 0\r\nGET k\r\n"))
		for _, want := range []string{"+OK", "+OK", "away", ":1", "+OK", "home", "+OK", "+OK", "+OK", "home"} {
			if got := c.reply(); got != want {
				t.Fatalf("got %q, want %q", got, want)
			}
		}
	}
	if got := w.sql("SELECT count(*) FROM cacheproxy.entries WHERE value IS NOT NULL OR raw IS NOT NULL"); got != "1" {
		t.Errorf("%s rows", got)
	}
	c.want("+OK", "SELECT", "5")
	c.want("+OK", "SET", "k", "away")
	// Its connection breaks: the database is still chosen.
	w.raw.do("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
	w.until("it is served again", func() bool { return c.do("GET", "k") == "away" })
	c.want("+RESET", "RESET")
	w.until("it is home again", func() bool { return c.do("GET", "k") == "home" })
}

// A transaction or a WATCH does not survive the connection that it was on.
func TestTransactionEndsWithItsConnection(t *testing.T) {
	for _, begin := range [][]string{{"MULTI"}, {"WATCH", "k"}} {
		w := newWorld(t)
		c := w.start(sidecarOptions{pgURL: "none"}).dial(t)
		c.want("+OK", begin...)
		w.raw.do("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
		c.Write(encode("SET", "k", "v"))
		c.over()
		w.raw.want("(nil)", "GET", "k")
	}
}

func TestACLUser(t *testing.T) {
	w := newWorld(t)
	w.raw.want("+OK", "ACL", "SETUSER", "app", "on", ">secret", "~mine:*", "+get", "+set", "+del", "+select", "+ping", "+eval")
	w.raw.want("+OK", "ACL", "SETUSER", "boss", "on", ">top", "~*", "&*", "+@all")
	s := w.sidecar(policy.Phase1)
	c := s.dial(t)
	c.want("+OK", "SET", "other", "x")
	c.want("-WRONGPASS invalid username-password pair or user is disabled.", "AUTH", "app", "wrong")
	c.want("x", "GET", "other")
	c.want("+OK", "AUTH", "app", "secret")
	c.want("+OK", "SET", "mine:k", "v")
	w.raw.do("DEL", "mine:k")
	c.want("v", "GET", "mine:k")
	for _, cmd := range [][]string{{"GET", "other"}, {"SET", "other", "y"}, {"DEL", "mine:k", "other"}, {"INCR", "mine:k"}, {"FLUSHALL"}, {"KEYS", "*"}, {"APPEND", "mine:k", "x"}} {
		if got := c.do(cmd...); !strings.HasPrefix(got, "-NOPERM") {
			t.Errorf("%q: %q", cmd, got)
		}
	}
	script := []string{"EVAL", "return redis.call('append', KEYS[1], 'x')", "1", "mine:k"}
	if got := w.raw.do(append([]string{"ACL", "DRYRUN", "app"}, script...)...); got != "+OK" {
		t.Fatalf("the user may not say EVAL: %q", got)
	}
	if got := c.do(script...); !strings.HasPrefix(got, "-DENIED ") { // as the proxy's user it would be allowed what this one is not
		t.Errorf("EVAL: %q", got)
	}
	c.want("v", "GET", "mine:k")
	c.want("+OK", "AUTH", "default", "anything")
	c.want("x", "GET", "other")
	if got := c.do("HELLO", "3", "AUTH", "boss", "top", "SETNAME", "b"); !strings.Contains(got, "proto :3") {
		t.Errorf("HELLO: %q", got)
	}
	c.want("boss", "ACL", "WHOAMI")
	c.want("b", "CLIENT", "GETNAME")
	c.want(":2", "APPEND", "other", "y")
	c.want("+RESET", "RESET")
	c.want("default", "ACL", "WHOAMI")
}

func TestListenPassword(t *testing.T) {
	w := newWorld(t)
	s := w.start(sidecarOptions{pgURL: "none", change: func(c *proxy.ServerConfig) { c.Password = "pw" }})
	c := s.dial(t)
	for _, cmd := range [][]string{{"GET", "k"}, {"PING"}, {"CACHEPROXY", "STATS"}, {"CLIENT", "LIST"}, {"MULTI"}, {"SUBSCRIBE", "x"}, {"FLUSHALL"}} {
		c.want("-NOAUTH Authentication required.", cmd...)
	}
	if got := c.do("HELLO", "3"); !strings.HasPrefix(got, "-NOAUTH HELLO must be called with the client already authenticated") {
		t.Errorf("HELLO: %q", got)
	}
	c.want("-WRONGPASS invalid username-password pair or user is disabled.", "AUTH", "no")
	c.want("-WRONGPASS invalid username-password pair or user is disabled.", "AUTH", "app", "pw")
	c.want("+RESET", "RESET")
	// AUTH and a command beyond the limits of strangers, in one write.
	long := strings.Repeat("x", 20000)
	c.Write(append(encode("AUTH", "pw"), encode("SET", "k", long)...))
	if x, y := c.reply(), c.reply(); x != "+OK" || y != "+OK" {
		t.Errorf("AUTH %q, SET %q", x, y)
	}
	c.want(long, "GET", "k")
	c.want("+RESET", "RESET")
	c.want("-NOAUTH Authentication required.", "GET", "k")
	for _, cmd := range [][]string{{"SET", "k", long}, make([]string, 11)} {
		c := s.dial(t)
		c.send(cmd...)
		if got := c.over(); !strings.HasPrefix(got, "-ERR Protocol error: unauthenticated") {
			t.Errorf("got %q", got)
		}
	}
	if got := s.dial(t).do("HELLO", "2", "AUTH", "default", "pw", "SETNAME", "n"); !strings.Contains(got, "proto :2") {
		t.Errorf("HELLO AUTH: %q", got)
	}
}

// QUIT answers what came before it and ignores what comes after; the same at the end of the stream and at a breach of
// the protocol.
func TestEndOfConversation(t *testing.T) { eachDriver(t, testEndOfConversation) }

func testEndOfConversation(t *testing.T) {
	w := newWorld(t)
	s := w.sidecar(policy.Phase1)
	for range 20 {
		c := s.dial(t)
		c.Write([]byte("SET k 1\r\nINCR k\r\nGET k\r\nQUIT\r\nINCR k\r\nSET k lost\r\n"))
		if got := c.over(); got != "+OK\r\n:2\r\n$1\r\n2\r\n+OK\r\n" {
			t.Fatalf("QUIT: %q", got)
		}
		c = s.dial(t)
		c.Write([]byte("SET k 5\r\nINCR k\r\nGET k\r\n"))
		c.Conn.(*net.TCPConn).CloseWrite()
		if got := c.over(); got != "+OK\r\n:6\r\n$1\r\n6\r\n" {
			t.Fatalf("half-closed: %q", got)
		}
		c = s.dial(t)
		c.Write([]byte("SET k 7\r\nINCR k\r\nGET k\r\n*1\r\n!bad\r\nSET k lost\r\n"))
		if got := c.over(); got != "+OK\r\n:8\r\n$1\r\n8\r\n-ERR Protocol error: expected '$', got '!'\r\n" {
			t.Fatalf("breach: %q", got)
		}
	}
	s.dial(t).want("8", "GET", "k")
}

func TestClientReply(t *testing.T) {
	w := newWorld(t)
	c := w.sidecar(policy.Phase1).dial(t)
	c.send("CLIENT", "REPLY", "OFF")
	c.send("SET", "k", "1")
	c.send("INCR", "k")
	c.send("CLIENT", "REPLY", "ON")
	if got := c.reply(); got != "+OK" {
		t.Errorf("ON: %q", got)
	}
	c.want("2", "GET", "k")
	c.send("CLIENT", "REPLY", "SKIP")
	c.send("INCR", "k")
	c.want("3", "GET", "k")
	for _, c := range []*conn{c, dial(t, w.redis.Addr())} {
		c.send("CLIENT", "REPLY", "OFF")
		c.send("PING")
		c.want("[subscribe ch :1]", "SUBSCRIBE", "ch") // an event, which is never silenced
		c.want("+RESET", "RESET")
		c.want("3", "GET", "k")
	}
}

// A script on a key without a store has no deadline, also while Redis tells us on another connection that it is running one.
func TestLongScript(t *testing.T) { eachDriver(t, testLongScript) }

func testLongScript(t *testing.T) {
	w := newWorld(t, "--busy-reply-threshold", "10")
	s := w.start(sidecarOptions{})
	a, b := s.dial(t), s.dial(t)
	a.want("+OK", "SET", "k", "1")
	a.send("EVAL", "while redis.call('GET', 'k') do end", "0")
	w.until("the other client is told", func() bool { return strings.HasPrefix(b.do("PING"), "-BUSY") })
	time.Sleep(3 * time.Second) // longer than a connection that leads nowhere is given
	w.until("the script is killed", func() bool { return b.do("SCRIPT", "KILL") == "+OK" || b.do("PING") == "+PONG" })
	if got := a.reply(); !strings.Contains(got, "killed") {
		t.Errorf("EVAL: %q", got)
	}
	a.want("1", "GET", "k")
}

// While a script keeps Redis busy, those who share connections with its client are told so, as by Redis.
func TestBusyScript(t *testing.T) { eachDriver(t, testBusyScript) }

func testBusyScript(t *testing.T) {
	w := newWorld(t, "--busy-reply-threshold", "10")
	s := w.start(sidecarOptions{pgURL: "none"})
	a, b := s.dial(t), s.dial(t)
	for _, c := range []*conn{a, b} {
		c.want("+PONG", "PING")
	}
	a.send("SET", "before", "1")
	a.send("EVAL", "while redis.call('GET', 'before') do end", "0")
	a.send("GET", "before")
	if got := a.reply(); got != "+OK" {
		t.Fatal(got)
	}
	w.until("the other client is told", func() bool { return strings.HasPrefix(b.do("PING"), "-BUSY") })
	w.until("the script is killed", func() bool { return b.do("SCRIPT", "KILL") == "+OK" || b.do("PING") == "+PONG" })
	if got := a.reply(); !strings.HasPrefix(got, "-") {
		t.Errorf("EVAL: %q", got)
	}
	if got := a.reply(); got != "1" {
		t.Errorf("GET: %q", got)
	}
	b.want("+PONG", "PING")
}
