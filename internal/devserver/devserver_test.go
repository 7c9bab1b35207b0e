package devserver

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"go.uber.org/goleak"
)

// patience bounds a wait for something that must come: far beyond what it takes, so that only a real failure meets it.
const patience = 30 * time.Second

// silence is how long a paused server is listened to. Too short could miss a fault; it cannot fail a correct pause.
const silence = 100 * time.Millisecond

// helperEnv makes the test binary start servers in the directory it names, say so, and wait to be killed.
const helperEnv = "DEVSERVER_TEST_DIR"

func TestMain(m *testing.M) {
	if dir := os.Getenv(helperEnv); dir != "" {
		if err := startAndWait(dir); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	goleak.VerifyTestMain(m)
}

func startAndWait(dir string) error {
	ctx := context.Background()
	if _, err := StartRedis(ctx, RedisOptions{Dir: dir}); err != nil {
		return err
	}
	if _, err := StartPostgres(ctx, PostgresOptions{Dir: dir}); err != nil {
		return err
	}
	fmt.Println("started")
	// The test keeps our standard input open until it has killed us.
	_, err := bufio.NewReader(os.Stdin).ReadByte()
	return err
}

// privateDir is like t.TempDir, below a directory that everybody can pass.
func privateDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "devserver-")
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

// freePort is a port that nobody listens on just now.
func freePort(t *testing.T) int {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port
}

func startRedis(t *testing.T, opts RedisOptions) *Redis {
	t.Helper()
	r, err := StartRedis(context.Background(), opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { must(t, r.Stop()) })
	return r
}

func startPostgres(t *testing.T, opts PostgresOptions) *Postgres {
	t.Helper()
	p, err := StartPostgres(context.Background(), opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { must(t, p.Stop()) })
	return p
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// ask sends inline commands over one connection and returns the first line of each reply.
func ask(t *testing.T, addr string, within time.Duration, commands ...string) ([]string, error) {
	t.Helper()
	network := "tcp"
	if filepath.IsAbs(addr) {
		network = "unix"
	}
	conn, err := net.DialTimeout(network, addr, patience)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	must(t, conn.SetDeadline(time.Now().Add(within)))
	r := bufio.NewReader(conn)
	var replies []string
	for _, command := range commands {
		if _, err := conn.Write([]byte(command + "\r\n")); err != nil {
			return replies, err
		}
		line, err := r.ReadString('\n')
		if err != nil {
			return replies, err
		}
		replies = append(replies, strings.TrimSpace(line))
	}
	return replies, nil
}

func expect(t *testing.T, addr, command, want string) {
	t.Helper()
	replies, err := ask(t, addr, patience, command)
	if err != nil || replies[0] != want {
		t.Fatalf("%s: got %q, %v, want %q", command, replies, err, want)
	}
}

func query(t *testing.T, url, sql string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	conn, err := pgx.Connect(ctx, url)
	must(t, err)
	defer func() { must(t, conn.Close(ctx)) }()
	var s string
	must(t, conn.QueryRow(ctx, sql).Scan(&s))
	return s
}

// alive tells which of the processes still run.
func alive(t *testing.T, list []process) (left []process) {
	t.Helper()
	all, err := processes()
	must(t, err)
	for _, p := range all {
		for _, q := range list {
			if p.pid == q.pid && p.started == q.started && !p.ended() {
				left = append(left, p)
			}
		}
	}
	return left
}

func TestRedisLife(t *testing.T) {
	for _, c := range []struct {
		name string
		port int
	}{{"socket", 0}, {"port", freePort(t)}} {
		t.Run(c.name, func(t *testing.T) {
			r := startRedis(t, RedisOptions{Dir: privateDir(t), Port: c.port})
			addr, first := r.Addr(), r.PID()
			expect(t, addr, "SET k 1", "+OK")

			must(t, r.Pause())
			if got, err := ask(t, addr, silence, "GET k"); !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Fatalf("a paused server: %q, %v", got, err)
			}
			must(t, r.Resume())
			expect(t, addr, "EXISTS k", ":1")

			must(t, r.Restart())
			if r.PID() == first || r.Addr() != addr {
				t.Fatalf("restarted as %d at %s, was %d at %s", r.PID(), r.Addr(), first, addr)
			}
			expect(t, addr, "EXISTS k", ":0")

			done := r.Done()
			must(t, r.Kill())
			<-done
			if r.PID() != 0 {
				t.Fatal("a killed server has a pid")
			}
			if got, err := ask(t, addr, patience, "PING"); err == nil {
				t.Fatalf("a killed server answers %q", got)
			}
			if err := r.Pause(); !errors.Is(err, ErrNotRunning) {
				t.Fatalf("pause of a killed server: %v", err)
			}
			must(t, r.Kill())
			must(t, r.Restart())
			expect(t, addr, "PING", "+PONG")

			must(t, r.Pause())
			must(t, r.Stop()) // also a paused one, in order
			must(t, r.Stop())
		})
	}
}

func TestRedisPassword(t *testing.T) {
	const password = `with "quotes", spaces and \`
	r := startRedis(t, RedisOptions{Dir: privateDir(t), Password: password})
	expect(t, r.Addr(), "PING", "-NOAUTH Authentication required.")
	expect(t, r.Addr(), "AUTH "+quote(password), "+OK")
	if args, err := exec.Command("ps", "-ww", "-o", "args=", "-p", fmt.Sprint(r.PID())).Output(); err == nil &&
		strings.Contains(string(args), "quotes") {
		t.Error("the password shows in the process table")
	}
	u, err := url.Parse(r.URL())
	must(t, err)
	if got, _ := u.User.Password(); u.Scheme != "unix" || u.Path != r.Addr() || got != password {
		t.Errorf("URL is %s", u)
	}
}

func TestRedisArgsWin(t *testing.T) {
	dir := privateDir(t)
	r := startRedis(t, RedisOptions{Dir: dir, Args: []string{"--appendonly", "yes"}})
	expect(t, r.Addr(), "SET k 1", "+OK")
	must(t, r.Restart())
	expect(t, r.Addr(), "EXISTS k", ":1")
}

func TestPortInUse(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	defer l.Close()
	port := l.Addr().(*net.TCPAddr).Port
	if _, err := StartRedis(context.Background(), RedisOptions{Dir: privateDir(t), Port: port}); err == nil ||
		!strings.Contains(err.Error(), "in use") {
		t.Errorf("redis: %v", err)
	}
	if _, err := StartPostgres(context.Background(), PostgresOptions{Dir: privateDir(t), Port: port}); err == nil ||
		!strings.Contains(err.Error(), "in use") {
		t.Errorf("postgres: %v", err)
	}
}

func TestOneRunPerDirectory(t *testing.T) {
	dir := privateDir(t)
	startRedis(t, RedisOptions{Dir: dir})
	if _, err := StartRedis(context.Background(), RedisOptions{Dir: dir}); err == nil ||
		!strings.Contains(err.Error(), "in use by another run") {
		t.Fatalf("a second server in one directory: %v", err)
	}
}

// A child that another goroutine has just forked holds a copy of every file until it executes its program.
func TestUnlockedInSpiteOfAChild(t *testing.T) {
	at := filepath.Join(t.TempDir(), "lock")
	var s server
	var err error
	if s.lock, err = lockFile(at); err != nil {
		t.Fatal(err)
	}
	child, err := syscall.Dup(int(s.lock.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	defer syscall.Close(child)
	s.unlock()
	again, err := lockFile(at)
	if err != nil {
		t.Fatal(err)
	}
	again.Close()
}

func TestLongDirectory(t *testing.T) {
	dir := filepath.Join(privateDir(t), strings.Repeat("long", 30))
	r := startRedis(t, RedisOptions{Dir: dir})
	expect(t, r.Addr(), "PING", "+PONG")
	p := startPostgres(t, PostgresOptions{Dir: dir})
	if got := query(t, p.URL("postgres"), "SELECT 'here'"); got != "here" {
		t.Fatal(got)
	}
	must(t, r.Kill())
	must(t, r.Restart())
	expect(t, r.Addr(), "PING", "+PONG")
	must(t, r.Stop())
	must(t, p.Stop())
	for _, addr := range []string{r.Addr(), p.Addr()} {
		if _, err := os.Stat(filepath.Dir(addr)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is left: %v", filepath.Dir(addr), err)
		}
	}
}

func TestPostgresLife(t *testing.T) {
	for _, c := range []struct {
		name string
		port int
	}{{"socket", 0}, {"port", freePort(t)}} {
		t.Run(c.name, func(t *testing.T) {
			p := startPostgres(t, PostgresOptions{
				Dir: privateDir(t), Port: c.port, Preload: []string{"pg_stat_statements"},
				Args: []string{"-c", "max_connections=17"},
			})
			testPostgresLife(t, p)
		})
	}
}

// TestPostgresAsEachIdentity covers the ways that the kernel of this machine would otherwise never make us choose. An
// ordinary user has one way only.
func TestPostgresAsEachIdentity(t *testing.T) {
	dir := privateDir(t)
	for _, as := range postgresIdentities() {
		t.Run(as.String(), func(t *testing.T) {
			// The same directory each time: the cluster changes hands.
			p, err := startPostgresAs(context.Background(), PostgresOptions{
				Dir: dir, Preload: []string{"pg_stat_statements"}, Args: []string{"-c", "max_connections=17"},
			}, as)
			must(t, err)
			t.Cleanup(func() { must(t, p.Stop()) })
			testPostgresLife(t, p)
		})
	}
}

func testPostgresLife(t *testing.T, p *Postgres) {
	const name = `app "one"`
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	must(t, p.DropDatabase(ctx, name))
	must(t, p.CreateDatabase(ctx, name))
	must(t, p.CreateDatabase(ctx, name)) // there is one already
	url, first := p.URL(name), p.PID()
	for setting, want := range map[string]string{
		"max_connections": "17", "shared_preload_libraries": "pg_stat_statements", "fsync": "off",
	} {
		if got := query(t, url, "SHOW "+setting); got != want {
			t.Errorf("%s is %s, want %s", setting, got, want)
		}
	}
	conn, err := pgx.Connect(ctx, url)
	must(t, err)
	defer func() { _ = conn.Close(ctx) }()
	_, err = conn.Exec(ctx, "CREATE TABLE t (v text)")
	must(t, err)
	_, err = conn.Exec(ctx, "INSERT INTO t VALUES ('kept')")
	must(t, err)

	must(t, p.Pause())
	short, stop := context.WithTimeout(ctx, silence)
	if c, err := pgx.Connect(short, url); err == nil {
		_ = c.Close(ctx)
		t.Error("a paused server accepts a session")
	}
	stop()
	must(t, p.Resume())
	if got := query(t, url, "SELECT v FROM t"); got != "kept" {
		t.Fatalf("read %q", got)
	}

	tree, err := p.run.tree()
	must(t, err)
	if len(tree) < 3 {
		t.Fatalf("the server has %d processes: its backends were not seen", len(tree))
	}
	must(t, p.Kill())
	if left := alive(t, tree); len(left) > 0 {
		t.Fatalf("still alive after Kill: %+v", left)
	}
	if err := conn.Ping(ctx); err == nil {
		t.Fatal("a session survived Kill")
	}
	must(t, p.Restart()) // over the postmaster.pid and the socket of the killed one
	if got := query(t, url, "SELECT v FROM t"); got != "kept" {
		t.Fatalf("read %q after a crash", got)
	}
	if p.PID() == first || p.PID() == 0 {
		t.Fatalf("restarted as %d, was %d", p.PID(), first)
	}
	must(t, p.Pause())
	must(t, p.Stop()) // also a paused one, in order
	must(t, p.Stop())
}

func TestPostgresUsesItsClusterAgain(t *testing.T) {
	dir := privateDir(t)
	p := startPostgres(t, PostgresOptions{Dir: dir, Durable: true})
	if got := query(t, p.URL("postgres"), "SHOW fsync"); got != "on" {
		t.Fatalf("fsync is %s in a durable cluster", got)
	}
	system := query(t, p.URL("postgres"), "SELECT system_identifier::text FROM pg_control_system()")
	must(t, p.Stop())
	// What a container leaves behind when it is killed: a pid that some other process has now.
	data := filepath.Join(dir, "postgres", "data")
	stale := fmt.Sprintf("%d\n%s\n1\n5432\n%s\n\n", os.Getpid(), data, dir)
	must(t, os.WriteFile(filepath.Join(data, "postmaster.pid"), []byte(stale), 0o600))
	must(t, os.WriteFile(p.Addr()+".lock", []byte(stale), 0o600))
	// And a cluster that was being made when the machine went down.
	must(t, os.MkdirAll(filepath.Join(data+".new", "base"), 0o700))

	p = startPostgres(t, PostgresOptions{Dir: dir})
	if got := query(t, p.URL("postgres"), "SELECT system_identifier::text FROM pg_control_system()"); got != system {
		t.Fatalf("another cluster: %s, was %s", got, system)
	}
}

func TestStartGivesUpWithItsContext(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	dir := privateDir(t)
	if _, err := StartRedis(ctx, RedisOptions{Dir: dir}); !errors.Is(err, context.Canceled) {
		t.Errorf("redis: %v", err)
	}
	if _, err := StartPostgres(ctx, PostgresOptions{Dir: dir}); !errors.Is(err, context.Canceled) {
		t.Errorf("postgres: %v", err)
	}
	startRedis(t, RedisOptions{Dir: dir}) // nothing holds the directory
}

// TestServersEndWithTheirParent kills a process that has started servers, and starts again in its directory.
func TestServersEndWithTheirParent(t *testing.T) {
	for _, paused := range []bool{false, true} {
		t.Run(fmt.Sprintf("paused=%v", paused), func(t *testing.T) {
			dir := privateDir(t)
			helper := exec.Command(os.Args[0])
			helper.Env = append(os.Environ(), helperEnv+"="+dir)
			helper.Stderr = os.Stderr
			stdin, err := helper.StdinPipe()
			must(t, err)
			defer stdin.Close()
			stdout, err := helper.StdoutPipe()
			must(t, err)
			must(t, helper.Start())
			line, err := bufio.NewReader(stdout).ReadString('\n')
			if err != nil || line != "started\n" {
				_ = helper.Process.Kill()
				_ = helper.Wait()
				t.Fatalf("the helper said %q, %v", line, err)
			}
			all, err := processes()
			must(t, err)
			tree := descendants(all, process{pid: helper.Process.Pid})[1:]
			if len(tree) < 4 {
				t.Errorf("the helper has %d children", len(tree))
			}
			if paused {
				for _, p := range tree {
					must(t, sendTo(p, syscall.SIGSTOP))
				}
			}
			must(t, helper.Process.Kill())
			if err := helper.Wait(); err == nil {
				t.Error("the helper ended by itself")
			}
			if userNamespaces && !paused { // on Linux they are told; elsewhere, and if they stand still, the next start ends them
				must(t, waitEnded(tree, patience))
			}
			r := startRedis(t, RedisOptions{Dir: dir})
			p := startPostgres(t, PostgresOptions{Dir: dir})
			if left := alive(t, tree); len(left) > 0 {
				t.Errorf("still alive: %+v", left)
			}
			expect(t, r.Addr(), "PING", "+PONG")
			if got := query(t, p.URL("postgres"), "SELECT 'here'"); got != "here" {
				t.Error(got)
			}
		})
	}
}

func TestMissing(t *testing.T) {
	// Not a server at all: Find must look everywhere, fail, and say how to install.
	_, err := Find("no-such-server")
	var missing *MissingError
	if !errors.As(err, &missing) || missing.Program != "no-such-server" {
		t.Fatalf("got %v", err)
	}
	for _, program := range []string{"redis-server", "postgres"} {
		text := (&MissingError{Program: program}).Error()
		for _, manager := range []string{"apt-get install", "dnf install", "apk add", "pacman -S", "brew install"} {
			if !strings.Contains(text, program) || !strings.Contains(text, manager) {
				t.Errorf("%s: %q lacks %q", program, text, manager)
			}
		}
	}
}

func TestFindPrefersPathAndNeedsInitdb(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("PATH", dir+string(filepath.ListSeparator)+os.Getenv("PATH"))
	write := func(name string) {
		must(t, os.WriteFile(filepath.Join(dir, name), []byte("#!/bin/sh\n"), 0o700))
	}
	write("redis-server")
	write("postgres")
	if got, err := Find("redis-server"); err != nil || got != filepath.Join(dir, "redis-server") {
		t.Errorf("redis-server: %s, %v", got, err)
	}
	if got, err := Find("postgres"); err != nil || got == filepath.Join(dir, "postgres") {
		t.Errorf("postgres without initdb: %s, %v", got, err)
	}
	write("initdb")
	if got, err := Find("postgres"); err != nil || got != filepath.Join(dir, "postgres") {
		t.Errorf("postgres: %s, %v", got, err)
	}
}

func TestVersion(t *testing.T) {
	for path, want := range map[string]float64{
		"/usr/lib/postgresql/15/bin": 15, "/usr/lib/postgresql/9.6/bin": 9.6, "/usr/pgsql-17/bin": 17, "/opt/bin": 0,
	} {
		if got := version(path); got != want {
			t.Errorf("version(%s) = %v, want %v", path, got, want)
		}
	}
}
