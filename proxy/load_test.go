package proxy_test

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"cacheproxy/internal/testenv"
	"cacheproxy/policy"
	"cacheproxy/proxy"
)

// program is a random pipeline over a few keys, some of which a route matches.
func program(rng *rand.Rand, n int) [][]string {
	id := strconv.FormatUint(rng.Uint64(), 36)
	key := func() string { return id + [...]string{":r1", ":r2", ":r3", ":u1", ":u2"}[rng.IntN(5)] }
	list := func() string { return id + [...]string{":rl", ":ul"}[rng.IntN(2)] }
	num := func() string { return strconv.Itoa(rng.IntN(100)) }
	var out [][]string
	for range n {
		switch rng.IntN(22) {
		case 0, 1, 2:
			out = append(out, []string{"SET", key(), num()})
		case 3, 4, 5, 6:
			out = append(out, []string{"GET", key()})
		case 7, 8:
			out = append(out, []string{"INCR", key()})
		case 9:
			out = append(out, []string{"DEL", key(), key()})
		case 10:
			out = append(out, []string{"LPUSH", list(), num()})
		case 11:
			out = append(out, []string{"LRANGE", list(), "0", "-1"})
		case 12:
			out = append(out, []string{"EVAL", "return redis.call('INCRBY',KEYS[1],ARGV[1])", "1", key(), num()})
		case 13:
			// A script that makes its key up, on a key that no route matches.
			out = append(out, []string{"EVAL", "return redis.call('APPEND',ARGV[1],'7')", "0", id + ":u1"})
		case 14:
			out = append(out, []string{"PUBLISH", "ch", num()})
		case 15:
			out = append(out, []string{"MGET", key(), key(), key()})
		case 16:
			// Not over both kinds of key: that is no longer one command (session.split).
			out = append(out, []string{"MSET", id + ":r1", num(), id + ":r2", num()})
		case 17:
			out = append(out, []string{"SETRANGE", key(), "1", num()})
		case 18:
			out = append(out, []string{"EXISTS", key(), key()})
		case 19:
			out = append(out, []string{"SET", key(), num(), "NX", "GET"})
		case 20:
			out = append(out, []string{"LPOP", list()}, []string{"ECHO", num()})
		case 21:
			out = append(out, []string{"TYPE", list()}, []string{"SET", id + ":r4", num()}, []string{"LPUSH", id + ":r4", num()}, []string{"DEL", id + ":r4"})
		}
	}
	return out
}

// Pipelines give what Redis gives, whatever they mix.
func TestPipelineOrder(t *testing.T) { eachDriver(t, testPipelineOrder) }

func testPipelineOrder(t *testing.T) {
	const programs, length = 200, 50
	for _, phase := range []policy.Phase{policy.Phase1, policy.Phase2} {
		t.Run(phase.String(), func(t *testing.T) {
			w := newWorld(t)
			s := w.start(sidecarOptions{routes: []policy.Route{{Name: "r", Match: "*:r*", Phase: phase}}})
			redis := testenv.Redis(t).Addr()
			oracle := target{name: "redis", addr: redis, upstream: redis}
			own := target{name: "proxy", addr: s.addr, upstream: w.redis.Addr(), routed: true}
			rng := rand.New(rand.NewPCG(11, uint64(phase)))
			for i := range programs {
				r := run{conversation{at: fmt.Sprint("program ", i)}, 2, pieces, i}
				for _, words := range program(rng, length) {
					r.steps = append(r.steps, say(words...))
				}
				want, got := hold(oracle, r, replyBound), hold(own, r, replyBound)
				if m := compareHeard(own, r.conversation, want, got); m != nil {
					t.Fatal(report(r, m, want))
				}
			}
		})
	}
}

// Clients that share lanes which break all the time get their own replies or a clear no, and nothing runs twice.
func TestLanesIsolate(t *testing.T) { eachDriver(t, testLanesIsolate) }

func testLanesIsolate(t *testing.T) {
	const clients, rounds = 50, 150
	w := newWorld(t)
	s := w.start(sidecarOptions{pgURL: "none"})
	var sent, acked, refused atomic.Int64
	var wg sync.WaitGroup
	stop := make(chan struct{})
	killer := make(chan struct{})
	go func() {
		defer close(killer)
		c := dial(t, w.redis.Addr())
		rng := rand.New(rand.NewPCG(1, 1))
		for kills := 0; ; kills++ {
			select {
			case <-stop:
				return
			case <-time.After(time.Duration(20+rng.IntN(60)) * time.Millisecond):
			}
			for line := range strings.Lines(c.do("CLIENT", "LIST")) {
				if strings.Contains(line, "name=cacheproxy-lane") && rng.IntN(2) == 0 {
					id, _, _ := strings.Cut(strings.TrimPrefix(line, "id="), " ")
					c.do("CLIENT", "KILL", "ID", id)
				}
			}
		}
	}()
	for n := range clients {
		c := s.dial(t)
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(2, uint64(n)))
			if n%2 == 0 {
				c.do("HELLO", "3")
			}
			for r := range rounds {
				var want []string
				for i := range 1 + rng.IntN(20) {
					mine := fmt.Sprintf("%d-%d-%d", n, r, i)
					switch rng.IntN(4) {
					case 0:
						c.send("ECHO", mine)
						want = append(want, mine)
					case 1:
						c.send("SET", "k"+strconv.Itoa(n), mine)
						want = append(want, "+OK")
					case 2:
						c.send("GET", "k"+strconv.Itoa(n))
						want = append(want, fmt.Sprintf("%d-", n)) // a prefix: an uncertain SET may have run
					case 3:
						sent.Add(1)
						c.send("INCR", "counter")
						want = append(want, ":")
					}
				}
				for _, x := range want {
					got := c.reply()
					switch {
					case strings.HasPrefix(got, "-UNCERTAIN ") || strings.HasPrefix(got, "-UNAVAILABLE "):
						refused.Add(1)
					case x == ":" && got[0] == ':':
						acked.Add(1)
					case strings.HasSuffix(x, "-") && (strings.HasPrefix(got, x) || got == "(nil)"):
					case got != x:
						t.Errorf("client %d: got %q, want %q", n, got, x)
						return
					}
				}
			}
		})
	}
	wg.Wait()
	close(stop)
	<-killer
	n, _ := strconv.ParseInt(w.raw.do("GET", "counter"), 10, 64)
	if n < acked.Load() || n > sent.Load() {
		t.Errorf("INCR: %d sent, %d acknowledged, counted %d", sent.Load(), acked.Load(), n)
	}
	if refused.Load() == 0 {
		t.Error("no lane was ever killed with a command in flight")
	}
	t.Logf("INCR: %d sent, %d acknowledged, counted %d; %d refusals", sent.Load(), acked.Load(), n, refused.Load())
}

// A stop under load loses no answer, takes nobody new, and does not wait for who waits for an event.
func TestDrain(t *testing.T) { eachDriver(t, testDrain) }

func testDrain(t *testing.T) {
	for _, phase := range []policy.Phase{policy.Phase1, policy.Phase3} {
		t.Run(phase.String(), func(t *testing.T) {
			for round := range 3 {
				w := newWorld(t)
				const grace = 20 * time.Second
				s := w.start(sidecarOptions{routes: []policy.Route{route(phase)}, change: func(c *proxy.ServerConfig) {
					c.Grace = grace
					c.Redis.Timeout = grace // on a busy machine P8's bounded wait would show here
				}})
				blocked, subscribed := s.dial(t), s.dial(t)
				blocked.Write(append(encode("SET", "b", "1"), encode("BLPOP", "nothing", "0")...))
				if got := blocked.reply(); got != "+OK" {
					t.Fatal(got)
				}
				subscribed.want("[subscribe ch :1]", "SUBSCRIBE", "ch")
				var stopping atomic.Bool
				var lost, answered atomic.Int64
				var wg sync.WaitGroup
				began := make(chan struct{}, 40)
				for n := range 20 {
					c := s.dial(t)
					wg.Go(func() {
						depth := 1 + n*10
						if n == 19 {
							depth = 5000 // more than a client may have in flight
						}
						for r := 0; ; r++ {
							var batch []byte
							for i := range depth {
								if i%3 == 0 && depth < 5000 {
									batch = append(batch, encode("SET", fmt.Sprint("k", n), "v")...)
								} else {
									batch = append(batch, encode("ECHO", fmt.Sprint(r))...)
								}
							}
							before := !stopping.Load()
							_, err := c.Write(batch)
							before = before && err == nil && !stopping.Load()
							for i := range depth {
								c.SetReadDeadline(time.Now().Add(20 * time.Second))
								got, err := c.read()
								if err != nil {
									if before {
										lost.Add(int64(depth - i))
										t.Errorf("client %d lost %d of %d answers: %v", n, depth-i, depth, err)
									}
									return
								}
								if got != "+OK" && got != fmt.Sprint(r) {
									t.Errorf("client %d: %q", n, got)
								}
								answered.Add(1)
							}
							if r == 3 {
								began <- struct{}{}
							}
						}
					})
				}
				for range 20 {
					<-began
				}
				// Clients whose first command is on its way when the stop comes.
				var fresh []*conn
				for range 5 {
					c := s.dial(t)
					c.send("PING")
					fresh = append(fresh, c)
				}
				w.until("they are accepted", func() bool { return s.srv.Clients() >= 20 })
				stopping.Store(true)
				start := time.Now()
				s.stop()
				if d := time.Since(start); d >= grace {
					t.Errorf("the stop took the whole grace")
				}
				wg.Wait()
				blocked.over()
				subscribed.over()
				if n := lost.Load(); n > 0 {
					t.Errorf("round %d: %d answers lost, %d came", round, n, answered.Load())
				}
				for _, c := range fresh {
					if got := c.over(); got != "+PONG\r\n" {
						t.Errorf("a fresh client got %q", got)
					}
				}
				if c, err := net.Dial("tcp", s.addr); err == nil {
					c.Close()
					t.Error("a new connection was taken")
				}
			}
		})
	}
}

// After the grace the rest is cut off.
func TestDrainEndsWithTheGrace(t *testing.T) { eachDriver(t, testDrainEndsWithTheGrace) }

func testDrainEndsWithTheGrace(t *testing.T) {
	w := newWorld(t)
	s := w.start(sidecarOptions{pgURL: "none", change: func(c *proxy.ServerConfig) { c.Grace = 50 * time.Millisecond }})
	w.raw.want("+OK", "SET", "big", strings.Repeat("x", 32<<20))
	c := s.dial(t)
	c.send("GET", "big") // and never reads
	if _, err := c.rd.ReadByte(); err != nil {
		t.Fatal(err)
	}
	s.stop()
	if b, _ := io.ReadAll(c.rd); len(b) >= 32<<20 {
		t.Error("it was not cut off")
	}
}

func heap() uint64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapInuse
}

// A client that asks for 10 GB and reads nothing costs at most a few times its limit, and others do not notice.
func TestBackPressure(t *testing.T) { eachDriver(t, testBackPressure) }

func testBackPressure(t *testing.T) {
	const limitMB = 16
	w := newWorld(t)
	s := w.start(sidecarOptions{pgURL: "none", change: func(c *proxy.ServerConfig) { c.MaxInflightBytes = limitMB << 20 }})
	w.raw.want("+OK", "SET", "k", strings.Repeat("x", 100<<10))
	other := s.dial(t)
	other.want("+OK", "SET", "small", "v")
	before := heap()
	greedy := s.dial(t)
	wrote := make(chan struct{})
	go func() {
		defer close(wrote)
		line := bytes.Repeat(encode("GET", "k"), 1000)
		for range 100 {
			if _, err := greedy.Write(line); err != nil {
				return
			}
		}
	}()
	peak := uint64(0)
	for range 40 {
		for range 20 {
			other.want("v", "GET", "small")
		}
		peak = max(peak, heap())
		time.Sleep(10 * time.Millisecond)
	}
	t.Logf("heap in use: %d MB before, %d MB at most", before>>20, peak>>20)
	// What waits is held once as replies and, while it is moved to the socket, once more; growing doubles a buffer.
	if grown := int64(peak) - int64(before); grown > 5*limitMB<<20 {
		t.Errorf("a client that reads nothing costs %d MB; its limit is %d", grown>>20, limitMB)
	}
	// It begins to read: everything comes.
	greedy.rd = bufio.NewReaderSize(greedy, 1<<20)
	for range 3000 {
		if got := greedy.reply(); len(got) != 100<<10 {
			t.Fatalf("%d bytes", len(got))
		}
	}
	greedy.Close()
	<-wrote
	w.until("it is gone", func() bool { return s.srv.Clients() == 1 })
}

// A subscriber that does not read is Redis's to judge: it ends, and others do not notice.
func TestSlowSubscriber(t *testing.T) { eachDriver(t, testSlowSubscriber) }

func testSlowSubscriber(t *testing.T) {
	w := newWorld(t, "--client-output-buffer-limit", "pubsub 1mb 1mb 0")
	s := w.start(sidecarOptions{pgURL: "none", change: func(c *proxy.ServerConfig) { c.MaxInflightBytes = 4 << 20 }})
	slow, p := s.dial(t), s.dial(t)
	slow.want("[subscribe ch :1]", "SUBSCRIBE", "ch")
	before := heap()
	msg := strings.Repeat("x", 256<<10)
	peak, n := uint64(0), 0
	w.until("redis ends the subscription", func() bool {
		n++
		peak = max(peak, heap())
		return p.do("PUBLISH", "ch", msg) == ":0"
	})
	if grown := int64(peak) - int64(before); grown > 40<<20 {
		t.Errorf("%d MB for a subscriber that does not read", grown>>20)
	}
	slow.over()
}

func TestLargeValues(t *testing.T) { eachDriver(t, testLargeValues) }

func testLargeValues(t *testing.T) {
	w := newWorld(t)
	s := w.start(sidecarOptions{pgURL: "none"})
	c, other := s.dial(t), s.dial(t)
	large := strings.Repeat("0123456789", 10<<20)
	c.want("+OK", "SET", "small", "v")
	c.Write(bytes.Join([][]byte{encode("SET", "k", large), encode("STRLEN", "k"), encode("APPEND", "k", large[:2<<20]), encode("SET", "small", "w")}, nil))
	for _, want := range []string{"+OK", fmt.Sprint(":", len(large)), fmt.Sprint(":", len(large)+2<<20), "+OK"} {
		other.want("+PONG", "PING")
		if got := c.reply(); got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
	if got := c.do("GET", "k"); got != large+large[:2<<20] {
		t.Errorf("%d bytes came back", len(got))
	}
	c.want("w", "GET", "small")
	w.until("its connection is given up", func() bool { c.do("PING"); return w.clients("cmd=append") == 0 && w.clients("cmd=set") <= 1 })
}

// A client's first commands keep their order also if others look at it before its driver has begun.
func TestFirstCommandsKeepTheirOrder(t *testing.T) { eachDriver(t, testFirstCommandsKeepTheirOrder) }

func testFirstCommandsKeepTheirOrder(t *testing.T) {
	w := newWorld(t)
	s := w.start(sidecarOptions{pgURL: "none"})
	stop := make(chan struct{})
	var lookers, clients sync.WaitGroup
	for range 4 {
		c := s.dial(t)
		lookers.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
					c.do("CLIENT", "LIST")
				}
			}
		})
	}
	words := encode("ECHO", "1")
	words = append(append(words, encode("ECHO", "2")...), encode("ECHO", "3")...)
	for range 8 {
		clients.Go(func() {
			for range 400 {
				c, err := net.Dial("tcp", s.addr)
				if err != nil {
					t.Error(err)
					return
				}
				c.Write(words)
				got := make([]byte, len("$1\r\n1\r\n")*3)
				if _, err := io.ReadFull(c, got); err != nil || string(got) != "$1\r\n1\r\n$1\r\n2\r\n$1\r\n3\r\n" {
					t.Errorf("%q %v", got, err)
				}
				c.Close()
			}
		})
	}
	clients.Wait()
	close(stop)
	lookers.Wait()
}
