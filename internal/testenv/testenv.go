// Package testenv gives tests a real Redis, a real Postgres, a TCP link between them and the code under test that
// can be cut, frozen and slowed, and the program as it is shipped.
//
// A package that uses Postgres or the program calls Main from its TestMain:
//
//	func TestMain(m *testing.M) { testenv.Main(m) }
//
// A server that is not installed fails the test; nothing is ever skipped.
package testenv

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"cacheproxy/internal/devserver"
)

// statementBound limits CREATE and DROP DATABASE, which take tens of milliseconds; on a machine where all packages are
// tested at once they wait for the disk.
const statementBound = 30 * time.Second

// startAttempts is how often a server is started on another port because the one chosen was taken meanwhile.
const startAttempts = 3

// shared is the cluster of this process, in which each test has its databases.
var shared struct {
	managed atomic.Bool // Main runs, and will stop what is started
	once    sync.Once
	server  *devserver.Postgres
	dir     string
	err     error
	count   atomic.Int64
}

// Main runs the tests of a package, stops the servers and removes the program that they shared, and fails if a goroutine is left. It does not
// return.
func Main(m *testing.M) {
	shared.managed.Store(true)
	code := m.Run()
	if err := stopShared(); err != nil {
		fmt.Fprintln(os.Stderr, "testenv:", err)
		code = max(code, 1)
	}
	if code == 0 {
		if err := goleak.Find(); err != nil {
			fmt.Fprintln(os.Stderr, "testenv: goroutines are left:", err)
			code = 1
		}
	}
	os.Exit(code)
}

func stopShared() error {
	var err error
	if shared.server != nil {
		err = shared.server.Stop()
	}
	for _, dir := range []string{shared.dir, program.dir} {
		if dir != "" {
			err = errors.Join(err, os.RemoveAll(dir))
		}
	}
	return err
}

// Redis starts a Redis for this test alone, on a port of 127.0.0.1 that Restart keeps. args are further options of
// redis-server.
func Redis(t testing.TB, args ...string) *devserver.Redis {
	t.Helper()
	dir := tempDir(t)
	var r *devserver.Redis
	start(t, func() (err error) {
		r, err = devserver.StartRedis(context.Background(), devserver.RedisOptions{Dir: dir, Port: FreePort(t), Args: args})
		return err
	})
	cleanup(t, "redis", r)
	return r
}

// Postgres returns the URL of an empty database for this test alone, in a cluster that the tests of the process share.
// The database is dropped when the test ends.
func Postgres(t testing.TB) string {
	t.Helper()
	if !shared.managed.Load() {
		t.Fatal("testenv.Postgres needs a TestMain that calls testenv.Main")
	}
	shared.once.Do(func() {
		if shared.dir, shared.err = os.MkdirTemp("", "cacheproxy-test-"); shared.err == nil {
			shared.server, shared.err = devserver.StartPostgres(context.Background(), devserver.PostgresOptions{
				Dir:  shared.dir,
				Args: []string{"-c", "max_connections=200"}, // parallel tests, each with a pool or two
			})
		}
	})
	if shared.err != nil {
		t.Fatal(shared.err)
	}
	name := fmt.Sprintf("test_%d", shared.count.Add(1))
	ctx, cancel := context.WithTimeout(context.Background(), statementBound)
	defer cancel()
	if err := shared.server.CreateDatabase(ctx, name); err != nil {
		t.Fatalf("create a database: %v", err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), statementBound)
		defer cancel()
		if err := shared.server.DropDatabase(ctx, name); err != nil {
			t.Errorf("drop the test's database: %v", err)
		}
	})
	return shared.server.URL(name)
}

// PostgresServer starts a Postgres for this test alone, on a port of 127.0.0.1 that Restart keeps, for tests that kill or
// pause it. pg_stat_statements is loaded; CREATE EXTENSION makes its view.
func PostgresServer(t testing.TB, args ...string) *devserver.Postgres {
	t.Helper()
	dir := tempDir(t)
	var p *devserver.Postgres
	start(t, func() (err error) {
		p, err = devserver.StartPostgres(context.Background(), devserver.PostgresOptions{
			Dir: dir, Port: FreePort(t), Preload: []string{"pg_stat_statements"}, Args: args,
		})
		return err
	})
	cleanup(t, "postgres", p)
	return p
}

// start tries again when a start failed, because a free port is free only until somebody takes it. A server that is not
// installed is not looked for twice.
func start(t testing.TB, try func() error) {
	t.Helper()
	var err error
	for range startAttempts {
		if err = try(); err == nil {
			return
		}
		var missing *devserver.MissingError
		if errors.As(err, &missing) {
			break
		}
	}
	t.Fatal(err)
}

// cleanup stops a server when the test has ended, and shows what it said if the test failed.
func cleanup(t testing.TB, name string, s interface {
	Stop() error
	LogTail() string
}) {
	t.Cleanup(func() {
		if err := s.Stop(); err != nil {
			t.Error(err)
		}
		if log := s.LogTail(); t.Failed() && log != "" {
			t.Logf("the end of the log of %s:\n%s", name, log)
		}
	})
}

// tempDir is t.TempDir with a name that does not grow with the test's, as a unix socket's path must be short.
func tempDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "cacheproxy-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// Ports below those that Linux, the BSDs and macOS hand out to outgoing connections, one of which could otherwise sit on
// a port while the server that owns it is restarted.
const (
	firstPort = 20000
	lastPort  = 32000
)

// given holds the ports that FreePort has returned, so that parallel tests of one process never share one.
var given sync.Map

// FreePort returns a port of 127.0.0.1 that nobody listens on and that this process has not been given before.
func FreePort(t testing.TB) int {
	t.Helper()
	for range lastPort - firstPort {
		port := firstPort + rand.IntN(lastPort-firstPort)
		if _, taken := given.LoadOrStore(port, true); taken {
			continue
		}
		l, err := net.Listen("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(port)))
		if err != nil {
			continue
		}
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		return port
	}
	t.Fatalf("no free port between %d and %d", firstPort, lastPort)
	return 0
}
