package testenv_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha1"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"cacheproxy/internal/testenv"
	"github.com/jackc/pgx/v5"
)

func TestMain(m *testing.M) { testenv.Main(m) }

// patience bounds a wait for something that must come: far beyond what it takes, so that only a real failure meets it.
const patience = 20 * time.Second

// silence is how long we listen for something that must not come. Too short could miss a fault; it cannot fail a
// correct link.
const silence = 100 * time.Millisecond

type client struct {
	t    *testing.T
	conn net.Conn
	r    *bufio.Reader
}

func dial(t *testing.T, addr string) *client {
	t.Helper()
	conn, err := net.DialTimeout("tcp", addr, patience)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return &client{t: t, conn: conn, r: bufio.NewReader(conn)}
}

func (c *client) send(line string) {
	c.t.Helper()
	if _, err := c.conn.Write([]byte(line + "\r\n")); err != nil {
		c.t.Fatal(err)
	}
}

func (c *client) reply(within time.Duration) (string, error) {
	c.t.Helper()
	if err := c.conn.SetReadDeadline(time.Now().Add(within)); err != nil {
		c.t.Fatal(err)
	}
	line, err := c.r.ReadString('\n')
	return strings.TrimSpace(line), err
}

func (c *client) expect(want string) {
	c.t.Helper()
	if got, err := c.reply(patience); err != nil || got != want {
		c.t.Fatalf("got %q, %v, want %q", got, err, want)
	}
}

// expectSoon asks until it is answered so.
func (c *client) expectSoon(ask, want string) {
	c.t.Helper()
	var got string
	for began := time.Now(); got != want && time.Since(began) < patience; time.Sleep(time.Millisecond) {
		c.send(ask)
		var err error
		if got, err = c.reply(patience); err != nil {
			c.t.Fatal(err)
		}
	}
	if got != want {
		c.t.Fatalf("%s: got %q, want %q", ask, got, want)
	}
}

func (c *client) expectSilence() {
	c.t.Helper()
	if got, err := c.reply(silence); !errors.Is(err, os.ErrDeadlineExceeded) {
		c.t.Fatalf("got %q, %v, want nothing", got, err)
	}
}

func (c *client) expectClosed() {
	c.t.Helper()
	if got, err := c.reply(patience); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		c.t.Fatalf("got %q, %v, want a closed connection", got, err)
	}
}

func TestRedisIsPrivateToTheTest(t *testing.T) {
	a, b := testenv.Redis(t), testenv.Redis(t, "--maxmemory", "7mb")
	ca, cb := dial(t, a.Addr()), dial(t, b.Addr())
	ca.send("SET k 1")
	ca.expect("+OK")
	cb.send("EXISTS k")
	cb.expect(":0")
	cb.send("CONFIG GET maxmemory")
	for _, want := range []string{"*2", "$9", "maxmemory", "$7", "7340032"} {
		cb.expect(want)
	}
}

func TestPostgresGivesEachTestADatabase(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	names := make(map[string]bool)
	for range 2 {
		conn, err := pgx.Connect(ctx, testenv.Postgres(t))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = conn.Close(context.Background()) })
		var name string
		if err := conn.QueryRow(ctx, "SELECT current_database()").Scan(&name); err != nil {
			t.Fatal(err)
		}
		names[name] = true
		if _, err := conn.Exec(ctx, "CREATE TABLE only_here (id int)"); err != nil {
			t.Fatal(err)
		}
	}
	if len(names) != 2 {
		t.Fatalf("two tests share a database: %v", names)
	}
}

func TestPostgresServerCountsStatements(t *testing.T) {
	p := testenv.PostgresServer(t)
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	conn, err := pgx.Connect(ctx, p.URL("postgres"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close(ctx) }()
	if _, err := conn.Exec(ctx, "CREATE EXTENSION pg_stat_statements"); err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Exec(ctx, "SELECT 41 + 1"); err != nil {
		t.Fatal(err)
	}
	var calls int
	err = conn.QueryRow(ctx, "SELECT calls FROM pg_stat_statements WHERE query = 'SELECT $1 + $2'").Scan(&calls)
	if err != nil || calls != 1 {
		t.Fatalf("calls = %d, %v, want 1", calls, err)
	}
}

func TestFreePortIsNeverGivenTwice(t *testing.T) {
	seen := make(map[int]bool)
	for range 200 {
		port := testenv.FreePort(t)
		if seen[port] {
			t.Fatalf("port %d given twice", port)
		}
		seen[port] = true
	}
}

func TestLinkCut(t *testing.T) {
	link := testenv.NewLink(t, testenv.Redis(t).Addr())
	c := dial(t, link.Addr())
	c.send("PING")
	c.expect("+PONG")

	link.Cut()
	c.expectClosed()
	if conn, err := net.DialTimeout("tcp", link.Addr(), patience); !errors.Is(err, syscall.ECONNREFUSED) {
		if err == nil {
			_ = conn.Close()
		}
		t.Fatalf("dial a cut link: %v, want connection refused", err)
	}

	link.Heal()
	c = dial(t, link.Addr())
	c.send("PING")
	c.expect("+PONG")
}

func TestLinkFreeze(t *testing.T) {
	link := testenv.NewLink(t, testenv.Redis(t).Addr())
	before := dial(t, link.Addr())
	before.send("SET k v")
	before.expect("+OK")

	link.Freeze()
	during := dial(t, link.Addr()) // accepted
	before.send("APPEND k w")
	during.send("PING")
	before.expectSilence()
	during.expectSilence()

	link.Thaw()
	before.expect(":2") // nothing was lost, and nothing doubled
	during.expect("+PONG")
}

func TestLinkDrop(t *testing.T) {
	r := testenv.Redis(t)
	link := testenv.NewLink(t, r.Addr())
	direct := dial(t, r.Addr())
	for _, request := range []bool{true, false} {
		before := dial(t, link.Addr())
		before.send("SET k v")
		before.expect("+OK")
		link.Drop(request)
		during := dial(t, link.Addr()) // accepted
		before.send("APPEND k w")
		during.send("APPEND k w")
		before.expectSilence()
		during.expectSilence()
		link.Heal()
		after := dial(t, link.Addr())
		if request { // what was lost never arrived
			after.send("STRLEN k")
			after.expect(":1")
		} else { // or the answer never came back
			after.expectSoon("STRLEN k", ":3")
		}
		before.send("APPEND k w") // and nothing comes behind what was lost
		during.send("APPEND k w")
		before.expectSilence()
		during.expectSilence()
		if request {
			direct.send("STRLEN k")
			direct.expect(":1")
		} else {
			direct.expectSoon("STRLEN k", ":5")
		}
	}
}

// The server does not learn that the client is gone, as with a path that is.
func TestDroppingLinkHidesTheEndOfTheClient(t *testing.T) {
	r := testenv.Redis(t)
	link := testenv.NewLink(t, r.Addr())
	c, direct := dial(t, link.Addr()), dial(t, r.Addr())
	c.send("CLIENT ID")
	id, err := c.reply(patience)
	if err != nil {
		t.Fatal(err)
	}
	link.Drop(true)
	if err := c.conn.Close(); err != nil {
		t.Fatal(err)
	}
	direct.expectSilence()
	direct.send("CLIENT KILL ID " + strings.TrimPrefix(id, ":"))
	direct.expect(":1")
}

func TestFrozenLinkHidesTheEndOfTheServer(t *testing.T) {
	r := testenv.Redis(t)
	link := testenv.NewLink(t, r.Addr())
	c := dial(t, link.Addr())
	c.send("PING")
	c.expect("+PONG")
	link.Freeze()
	if err := r.Kill(); err != nil {
		t.Fatal(err)
	}
	c.expectSilence()
	link.Heal()
	c.expectClosed()
}

func TestCutReachesAFrozenLink(t *testing.T) {
	link := testenv.NewLink(t, testenv.Redis(t).Addr())
	c := dial(t, link.Addr())
	c.send("PING")
	c.expect("+PONG")
	link.Freeze()
	c.send("PING")
	link.Cut()
	c.expectClosed()
	link.Heal()
	c = dial(t, link.Addr())
	c.send("PING")
	c.expect("+PONG")
}

// New connections go to the new target, those that there are stay.
func TestLinkAims(t *testing.T) {
	a, b := testenv.Redis(t), testenv.Redis(t)
	link := testenv.NewLink(t, a.Addr())
	before := dial(t, link.Addr())
	before.send("SET k a")
	before.expect("+OK")
	link.Aim(b.Addr())
	after := dial(t, link.Addr())
	after.send("EXISTS k")
	after.expect(":0")
	before.send("EXISTS k")
	before.expect(":1")
}

// Who looks sees both directions, may wait, and may end a connection instead of letting pass what it saw.
func TestLook(t *testing.T) {
	link := testenv.NewLink(t, testenv.Redis(t).Addr())
	seen := make(chan testenv.Passing, 8)
	link.Look(func(p testenv.Passing) bool {
		seen <- testenv.Passing{Conn: p.Conn, Request: p.Request, Bytes: bytes.Clone(p.Bytes)}
		return !bytes.Contains(p.Bytes, []byte("SECRET"))
	})
	c := dial(t, link.Addr())
	c.send("SET k v")
	c.expect("+OK")
	if p := <-seen; !p.Request || string(p.Bytes) != "SET k v\r\n" {
		t.Errorf("saw %+v", p)
	}
	if p := <-seen; p.Request || string(p.Bytes) != "+OK\r\n" || p.Conn != 1 {
		t.Errorf("saw %+v", p)
	}
	c.send("SET k SECRET")
	c.expectClosed()
	link.Look(nil)
	c = dial(t, link.Addr())
	c.send("STRLEN k")
	c.expect(":1")
	if len(seen) != 1 {
		t.Errorf("%d more were seen", len(seen))
	}
}

// Scripts are known by their digests, and statements by the names they were prepared under.
func TestSteps(t *testing.T) {
	link := testenv.NewLink(t, testenv.Redis(t).Addr())
	url := testenv.Postgres(t)
	cfg, err := pgx.ParseConfig(url)
	if err != nil {
		t.Fatal(err)
	}
	target := net.JoinHostPort(cfg.Host, strconv.Itoa(int(cfg.Port)))
	if strings.HasPrefix(cfg.Host, "/") {
		target = filepath.Join(cfg.Host, fmt.Sprintf(".s.PGSQL.%d", cfg.Port))
	}
	toStore := testenv.NewLink(t, target)
	steps := testenv.NewSteps(link, toStore)
	var mu sync.Mutex
	var got []string
	steps.At(func(s testenv.Step) bool {
		mu.Lock()
		defer mu.Unlock()
		got = append(got, fmt.Sprint(s.Name, " ", s.Done))
		return true
	})
	c := dial(t, link.Addr())
	ask := func(args ...string) {
		t.Helper()
		text := fmt.Sprintf("*%d\r\n", len(args))
		for _, a := range args {
			text += fmt.Sprintf("$%d\r\n%s\r\n", len(a), a)
		}
		c.send(strings.TrimSuffix(text, "\r\n"))
		if got, err := c.reply(patience); err != nil || strings.HasPrefix(got, "-") {
			t.Fatalf("%v: %q %v", args, got, err)
		}
	}
	body := "-- promote\nreturn 1"
	ask("SCRIPT", "LOAD", body)
	c.reply(patience) // the digest
	ask("EVALSHA", fmt.Sprintf("%x", sha1.Sum([]byte(body))), "0")
	ask("EVAL", "-- load\nreturn 1", "0")
	ask("GET", "cacheproxy:clock")
	ask("GET", "k")

	host, port, _ := strings.Cut(toStore.Addr(), ":")
	n, _ := strconv.Atoi(port)
	cfg.Host, cfg.Port, cfg.Fallbacks = host, uint16(n), nil
	db, err := pgx.ConnectConfig(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close(t.Context())
	for range 2 { // prepared, and then known
		var b pgx.Batch
		b.Queue("BEGIN")
		b.Queue("SELECT pg_advisory_xact_lock($1::int, 0)", 7)
		b.Queue("SELECT 1")
		if err := db.SendBatch(t.Context(), &b).Close(); err != nil {
			t.Fatal(err)
		}
		if _, err := db.Exec(t.Context(), "COMMIT"); err != nil {
			t.Fatal(err)
		}
	}
	want := []string{"promote false", "promote true", "load false", "load true", "clock false", "clock true", "GET false", "GET true"}
	for range 2 {
		want = append(want, "lock false", "lock true", "COMMIT false", "COMMIT true")
	}
	mu.Lock()
	defer mu.Unlock()
	if !slices.Equal(got, want) {
		t.Errorf("%q\nwant\n%q", got, want)
	}
}

func TestLinkDelays(t *testing.T) {
	link := testenv.NewLink(t, testenv.Redis(t).Addr())
	link.Delay(time.Hour)
	slow := dial(t, link.Addr())
	slow.send("PING")
	slow.expectSilence()
	link.Heal()
	fast := dial(t, link.Addr())
	fast.send("PING")
	fast.expect("+PONG")
}

func TestLinkKeepsOrderWhenTheDelayChanges(t *testing.T) {
	link := testenv.NewLink(t, testenv.Redis(t).Addr())
	c := dial(t, link.Addr())
	c.send("SET n 0")
	c.expect("+OK")
	link.Delay(50 * time.Millisecond)
	for range 50 {
		c.send("INCR n")
	}
	link.Delay(0) // what was sent under the delay still comes first
	c.send("PING")
	for i := range 50 {
		c.expect(":" + strconv.Itoa(i+1))
	}
	c.expect("+PONG")
}

func TestLinkPassesAHalfClose(t *testing.T) {
	link := testenv.NewLink(t, testenv.Redis(t).Addr())
	c := dial(t, link.Addr())
	c.send("ECHO bye")
	if err := c.conn.(*net.TCPConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	c.expect("$3")
	c.expect("bye")
	c.expectClosed()
}

func TestOutput(t *testing.T) {
	var o testenv.Output
	var all sync.WaitGroup
	for range 10 {
		all.Go(func() {
			for range 100 {
				fmt.Fprintln(&o, "a line")
				_ = o.String()
			}
		})
	}
	all.Wait()
	if got := strings.Count(o.String(), "a line\n"); got != 1000 || len(o.String()) != 1000*len("a line\n") {
		t.Errorf("%d lines in %d bytes", got, len(o.String()))
	}
	if o.Tail(5) != "line\n" || o.Tail(1<<20) != o.String() {
		t.Errorf("the tail is %q", o.Tail(5))
	}
}
