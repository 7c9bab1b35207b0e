//go:build linux

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"cacheproxy/internal/devserver"
)

// patience bounds a wait for what must come: far beyond what it takes.
const patience = 30 * time.Second

// stack is everything that is measured, on ports of its own.
type stack struct {
	programs map[string]string
	dir      string
	redis    *devserver.Redis
	pg       *devserver.Postgres
	pgURL    string
	procs    []*process        // in the order of starting
	addrs    map[string]string // of targets
	pids     map[string]int    // of the proxies
}

// find looks for the programs.
func find() (map[string]string, error) {
	found := map[string]string{}
	var missing []string
	postgres, err := devserver.Find("postgres")
	if err != nil {
		missing = append(missing, "postgres")
	}
	for _, name := range []string{"redis-server", "redis-benchmark", "haproxy", "nutcracker", "pgbench"} {
		candidates := []string{name, "/usr/sbin/" + name, "/usr/local/sbin/" + name}
		if name == "pgbench" {
			candidates = []string{filepath.Join(filepath.Dir(postgres), name), name}
		}
		for _, c := range candidates {
			if path, err := exec.LookPath(c); err == nil {
				found[name] = path
				break
			}
		}
		if found[name] == "" {
			missing = append(missing, name)
		}
	}
	if len(missing) > 0 {
		return nil, fmt.Errorf("not installed: %s; run sh scripts/install-deps.sh bench", strings.Join(missing, ", "))
	}
	return found, nil
}

// database is where both the proxies and the clients without them keep their rows.
const database = "bench"

func start(ctx context.Context, programs map[string]string, bin string, p plan) (s *stack, err error) {
	// A thousand clients are two thousand files to a proxy. A limit that we set ourselves is what our children get.
	limit := syscall.Rlimit{}
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		return nil, err
	}
	limit.Cur = limit.Max
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		return nil, err
	}
	if limit.Cur < 8192 {
		return nil, fmt.Errorf("%d open files are too few; run ulimit -n 8192", limit.Cur)
	}
	dir, err := os.MkdirTemp("", "cacheproxy-bench-")
	if err != nil {
		return nil, err
	}
	s = &stack{programs: programs, dir: dir, addrs: map[string]string{}, pids: map[string]int{}}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.stop())
		}
	}()
	if s.redis, err = devserver.StartRedis(ctx, devserver.RedisOptions{Dir: dir, Port: freePort()}); err != nil {
		return nil, err
	}
	s.addrs[direct] = s.redis.Addr()
	if s.pg, err = devserver.StartPostgres(ctx, devserver.PostgresOptions{
		Dir: dir, Port: freePort(), Durable: true, Preload: []string{"pg_stat_statements"},
		Args: []string{"-c", "max_connections=200", "-c", "synchronous_commit=on"},
	}); err != nil {
		return nil, err
	}
	if err := s.pg.CreateDatabase(ctx, database); err != nil {
		return nil, err
	}
	s.pgURL = s.pg.URL(database)
	if err := s.fillRedis(p); err != nil {
		return nil, fmt.Errorf("fill redis: %w", err)
	}
	host, port, _ := net.SplitHostPort(s.redis.Addr())
	if err := s.peer(ctx, haproxy, programs["haproxy"], fmt.Sprintf(`
global
  maxconn 4000
defaults
  mode tcp
  timeout connect 5s
  timeout client 1h
  timeout server 1h
listen redis
  bind %%s
  server redis %s:%s
`, host, port), "-db", "-f"); err != nil {
		return nil, err
	}
	if err := s.peer(ctx, twem, programs["nutcracker"], fmt.Sprintf(`
redis:
  listen: %%s
  redis: true
  hash: fnv1a_64
  distribution: ketama
  servers:
   - %s:%s:1
`, host, port), "-a", "127.0.0.1", "-s", fmt.Sprint(freePort()), "-c"); err != nil {
		return nil, err
	}
	for _, target := range []string{bare, phase1, phase2, phase3} {
		pgURL, routes := s.pgURL, fmt.Sprintf("[{name: %s, match: %q, phase: %s}]", target, prefix(target)+"*", target)
		switch target {
		case bare:
			pgURL, routes = "", "[]"
		case phase3:
			pgURL = ""
		}
		// Everything else is as it is by default.
		if err := s.peer(ctx, target, bin, fmt.Sprintf(`
listen: {address: "%%s"}
observe: {address: "127.0.0.1:%d"}
admin: {address: ""}
redis: {url: "redis://%s:%s/0"}
postgres: {url: %q}
log: {level: warn}
routes: %s
`, freePort(), host, port, pgURL, routes), "serve", "--config"); err != nil {
			return nil, err
		}
	}
	return s, s.fillPostgres(ctx)
}

// peer starts a proxy whose configuration has a place for its address, and waits until a GET comes through.
func (s *stack) peer(ctx context.Context, target, program, config string, args ...string) error {
	addr := fmt.Sprintf("127.0.0.1:%d", freePort())
	file := filepath.Join(s.dir, strings.ReplaceAll(target, " ", "-")+".conf")
	if err := os.WriteFile(file, []byte(fmt.Sprintf(config, addr)), 0o600); err != nil {
		return err
	}
	p, err := spawn(program, append(args, file)...)
	if err != nil {
		return err
	}
	s.procs = append(s.procs, p)
	s.addrs[target], s.pids[target] = addr, p.cmd.Process.Pid
	for end := time.Now().Add(patience); ; time.Sleep(20 * time.Millisecond) {
		if err = hit(addr, keyOf(target, 100, 0)); err == nil {
			return nil
		}
		select {
		case <-p.done:
			return fmt.Errorf("%s ended at once:\n%s", target, p.out.String())
		case <-ctx.Done():
			return ctx.Err()
		default:
		}
		if time.Now().After(end) {
			return fmt.Errorf("%s is not ready: %w\n%s", target, err, p.out.String())
		}
	}
}

// hit asks for a key that exists.
func hit(addr, key string) error {
	c, err := dial(addr)
	if err != nil {
		return err
	}
	defer c.Close()
	return c.gets(key)
}

// stop ends everything, the last first.
func (s *stack) stop() error {
	var errs []error
	for i := len(s.procs) - 1; i >= 0; i-- {
		s.procs[i].stop()
	}
	if s.pg != nil {
		errs = append(errs, s.pg.Stop())
	}
	if s.redis != nil {
		errs = append(errs, s.redis.Stop())
	}
	return errors.Join(append(errs, os.RemoveAll(s.dir))...)
}

// process is a peer.
type process struct {
	cmd  *exec.Cmd
	done chan struct{} // closed when it has ended
	out  bytes.Buffer  // read it after done, or to explain a failure
}

// attr keeps Ctrl-C from children, which are ended in order, and ends those of a bench that was killed.
func attr() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGTERM}
}

// command is a program that ends by itself, or with ctx.
func command(ctx context.Context, program string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.SysProcAttr = attr()
	return cmd
}

func spawn(program string, args ...string) (*process, error) {
	p := &process{cmd: exec.Command(program, args...), done: make(chan struct{})}
	p.cmd.SysProcAttr = attr()
	p.cmd.Stdout, p.cmd.Stderr = &p.out, &p.out
	if err := p.cmd.Start(); err != nil {
		return nil, err
	}
	go func() {
		_ = p.cmd.Wait() // however it ends
		close(p.done)
	}()
	return p, nil
}

func (p *process) stop() {
	_ = p.cmd.Process.Signal(syscall.SIGTERM) // it may have ended
	select {
	case <-p.done:
	case <-time.After(patience / 2):
		_ = p.cmd.Process.Kill()
		<-p.done
	}
}

func freePort() int {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0 // whoever is to listen there will say so
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port
}
