package proxy_test

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"cacheproxy/fallback"
	"cacheproxy/internal/bridge"
	"cacheproxy/internal/devserver"
	"cacheproxy/internal/testenv"
	"cacheproxy/policy"
	"cacheproxy/proxy"

	"github.com/jackc/pgx/v5"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest"
)

func TestMain(m *testing.M) { testenv.Main(m) }

// world is a Redis, a Postgres and any number of sidecars in front of them.
type world struct {
	t     testing.TB
	redis *devserver.Redis
	pgURL string
	raw   *conn // to Redis itself
}

func newWorld(t *testing.T, redisArgs ...string) *world {
	t.Helper()
	return newWorldWith(t, testenv.Redis(t, redisArgs...), testenv.Postgres(t))
}

func newWorldWith(t *testing.T, r *devserver.Redis, pgURL string) *world {
	t.Helper()
	w := &world{t: t, redis: r, pgURL: pgURL}
	if r != nil {
		w.raw = dial(t, r.Addr())
	}
	return w
}

func route(phase policy.Phase) policy.Route {
	return policy.Route{Name: "all", Match: "*", Phase: phase}
}

// sidecar is one running proxy.
type sidecar struct {
	srv  *proxy.Server
	db   *fallback.Store // nil: none
	addr string
	stop func()
}

type sidecarOptions struct {
	redisURL string
	pgURL    string
	routes   []policy.Route
	change   func(*proxy.ServerConfig)
	store    func(proxy.Store) proxy.Store // stands between the proxy and the store
	columns  []fallback.Column
	noWait   bool
	// storeTimeout is for values so large that a busy machine needs longer than the default; 0: the default.
	storeTimeout time.Duration
	storeSlots   int // for reads of the store, and for writes; 0: the default
}

func (w *world) sidecar(phase policy.Phase) *sidecar {
	return w.start(sidecarOptions{routes: []policy.Route{route(phase)}})
}

// drivenByGoroutines is the name of the tests in which goroutines drive the clients, where an event loop could.
const drivenByGoroutines = "goroutines"

// eachDriver runs a test with clients on an event loop, and with goroutines.
func eachDriver(t *testing.T, test func(t *testing.T)) {
	t.Run("loop", test)
	t.Run(drivenByGoroutines, test)
}

var instances atomic.Int64

func (w *world) start(o sidecarOptions) *sidecar {
	t := w.t
	t.Helper()
	if o.redisURL == "" {
		o.redisURL = w.redis.URL()
	}
	if o.pgURL == "" {
		o.pgURL = w.pgURL
	}
	var log *zap.Logger
	if testing.Verbose() {
		log = zaptest.NewLogger(t)
	} else {
		log = zap.NewNop()
	}
	var store proxy.Store
	var fs *fallback.Store
	if o.pgURL != "none" {
		var err error
		if fs, err = fallback.New(fallback.Config{URL: o.pgURL, Log: log, QueryTimeout: o.storeTimeout, Columns: o.columns, MaxReads: o.storeSlots, MaxWrites: o.storeSlots}); err != nil {
			t.Fatal(err)
		}
		if !o.noWait {
			if err := fs.EnsureSchema(context.Background()); err != nil {
				t.Fatal(err)
			}
		}
		store = bridge.Store(fs)
		if o.store != nil {
			store = o.store(store)
		}
	}
	cfg := proxy.ServerConfig{
		Config: proxy.Config{Redis: proxy.RedisConfig{URL: o.redisURL}, Routes: o.routes, Instance: fmt.Sprintf("t%d", instances.Add(1)), Log: log,
			StoreTimeout: o.storeTimeout},
		Version: "test", Grace: 2 * time.Second, Goroutines: slices.Contains(strings.Split(t.Name(), "/"), drivenByGoroutines),
	}
	if o.change != nil {
		o.change(&cfg)
	}
	srv, err := proxy.New(cfg, store)
	if err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- srv.Serve(ctx, ln) }()
	stopped := false
	s := &sidecar{srv: srv, db: fs, addr: ln.Addr().String()}
	s.stop = func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		if err := <-done; err != nil {
			t.Errorf("serve: %v", err)
		}
		if fs != nil {
			fs.Close()
		}
	}
	t.Cleanup(s.stop)
	if !o.noWait {
		w.until("the sidecar trusts both stores", func() bool {
			h := srv.Health()
			return h.Redis.Status == "connected" && h.Postgres.Status != "down"
		})
	}
	return s
}

// until waits for a condition; half a minute bounds a wait for what takes milliseconds on an idle machine.
func (w *world) until(what string, ok func() bool) {
	w.t.Helper()
	until(w.t, what, ok)
}

func until(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if ok() {
			return
		}
	}
	t.Fatalf("never: %s", what)
}

// sql runs a query and returns the first column of the first row as text.
func (w *world) sql(query string, args ...any) string {
	w.t.Helper()
	c, err := pgx.Connect(context.Background(), w.pgURL)
	if err != nil {
		w.t.Fatal(err)
	}
	defer c.Close(context.Background())
	var out any
	err = c.QueryRow(context.Background(), query, args...).Scan(&out)
	if err == pgx.ErrNoRows {
		return "no row"
	}
	if err != nil {
		w.t.Fatal(err)
	}
	return fmt.Sprint(out)
}

// journalEmpty waits until neither journal has an entry.
func (w *world) journalEmpty() {
	w.t.Helper()
	w.until("both journals are empty", func() bool {
		return w.sql("SELECT count(*) FROM cacheproxy.journal") == "0" && w.raw.do("HLEN", "cacheproxy:journal") <= ":1"
	})
}

// conn speaks RESP without a client library.
type conn struct {
	t testing.TB
	net.Conn
	rd *bufio.Reader
}

func dial(t testing.TB, addr string) *conn {
	t.Helper()
	network := "tcp"
	if strings.HasPrefix(addr, "/") {
		network = "unix"
	}
	c, err := net.Dial(network, addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return &conn{t: t, Conn: c, rd: bufio.NewReader(c)}
}

func (s *sidecar) dial(t *testing.T) *conn { return dial(t, s.addr) }

func encode(args ...string) []byte {
	var b bytes.Buffer
	fmt.Fprintf(&b, "*%d\r\n", len(args))
	for _, a := range args {
		fmt.Fprintf(&b, "$%d\r\n%s\r\n", len(a), a)
	}
	return b.Bytes()
}

// do sends a command and returns its reply in a short form: "+OK", ":1", "value", "(nil)", "-ERR …", "[a b]".
func (c *conn) do(args ...string) string {
	c.t.Helper()
	c.send(args...)
	return c.reply()
}

func (c *conn) send(args ...string) {
	c.t.Helper()
	if _, err := c.Write(encode(args...)); err != nil {
		c.t.Fatal(err)
	}
}

func (c *conn) reply() string {
	c.t.Helper()
	c.SetReadDeadline(time.Now().Add(20 * time.Second))
	r, err := c.read()
	if err != nil {
		c.t.Fatalf("reading a reply: %v", err)
	}
	return r
}

// frame reads one reply as it is.
func (c *conn) frame() ([]byte, error) {
	c.SetReadDeadline(time.Now().Add(20 * time.Second))
	return readRaw(c.rd)
}

func (c *conn) read() (string, error) {
	line, err := c.rd.ReadString('\n')
	if err != nil {
		return "", err
	}
	line = strings.TrimSuffix(line, "\r\n")
	switch line[0] {
	case '$', '=':
		n, _ := strconv.Atoi(line[1:])
		if n < 0 {
			return "(nil)", nil
		}
		b := make([]byte, n+2)
		if _, err := io.ReadFull(c.rd, b); err != nil {
			return "", err
		}
		return string(b[:n]), nil
	case '*', '%', '~', '>':
		n, _ := strconv.Atoi(line[1:])
		if n < 0 {
			return "(nil)", nil
		}
		if line[0] == '%' {
			n *= 2
		}
		parts := make([]string, n)
		for i := range parts {
			if parts[i], err = c.read(); err != nil {
				return "", err
			}
		}
		return "[" + strings.Join(parts, " ") + "]", nil
	case '_':
		return "(nil)", nil
	}
	return line, nil
}

func (c *conn) want(want string, args ...string) {
	c.t.Helper()
	if got := c.do(args...); got != want {
		c.t.Errorf("%.80q: got %.200q, want %.200q", args, got, want)
	}
}
