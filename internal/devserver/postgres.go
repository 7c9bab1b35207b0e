package devserver

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

const (
	// postgresUser owns the cluster. Nobody needs a password: the socket's directory is closed to other users, and a
	// port is for tests, and for a developer who asks for one.
	postgresUser = "cacheproxy"
	// socketPort is part of the socket's file name when no port is given.
	socketPort = 5432
	// initBound limits initdb, which takes a second or two of processor time.
	initBound = 2 * time.Minute
)

// PostgresOptions says how to start a Postgres.
type PostgresOptions struct {
	// Dir holds the socket, and below it, in postgres/, all else. It is created if need be, and a cluster that is found
	// there is used again.
	Dir string
	// Port is a port of 127.0.0.1 to listen on besides the unix socket; 0 is none. Every user of this machine may
	// connect to it.
	Port int
	// Durable makes Postgres survive the loss of power. Without it a killed server loses nothing either, but a machine
	// that crashes may destroy the cluster; tests and demonstrations run much faster.
	Durable bool
	// Preload names libraries for shared_preload_libraries, such as pg_stat_statements.
	Preload []string
	// Args are further options as on postgres' command line, for example "-c", "max_connections=20". They win over
	// ours.
	Args []string
}

// Postgres is a private cluster with its server.
type Postgres struct {
	*server
	opts PostgresOptions
	as   identity
	bin  string // the directory of the server programs
}

// StartPostgres starts a Postgres, in a new cluster if the directory has none, and returns when it accepts connections.
// ctx bounds the start only: the server runs until Stop or Kill.
//
// Postgres refuses to run as root. If we are root it runs in a user namespace, or, where that is forbidden, as the user
// nobody, to whom the cluster is given.
func StartPostgres(ctx context.Context, opts PostgresOptions) (*Postgres, error) {
	var refusals error
	for _, as := range postgresIdentities() {
		p, err := startPostgresAs(ctx, opts, as)
		if err == nil {
			return p, nil
		}
		var no *refusedError
		if !errors.As(err, &no) {
			return nil, err
		}
		refusals = errors.Join(refusals, err)
	}
	return nil, refusals
}

// refusedError says that the kernel starts no program with an identity.
type refusedError struct {
	as  identity
	err error
}

func (e *refusedError) Error() string { return fmt.Sprintf("devserver: postgres %v: %v", e.as, e.err) }
func (e *refusedError) Unwrap() error { return e.err }

func startPostgresAs(ctx context.Context, opts PostgresOptions, as identity) (*Postgres, error) {
	program, err := Find("postgres")
	if err != nil {
		return nil, err
	}
	if err := try(ctx, program, as); err != nil {
		return nil, err
	}
	dir, err := absolute(opts.Dir)
	if err != nil {
		return nil, err
	}
	home := filepath.Join(dir, "postgres")
	if err := os.MkdirAll(home, 0o700); err != nil {
		return nil, err
	}
	if err := as.reach(dir); err != nil {
		return nil, err
	}
	p := &Postgres{opts: opts, as: as, bin: filepath.Dir(program)}
	uid, gid := as.owner()
	at := dir
	if as == asNobody {
		at = home // the one directory that is the server's to write
	}
	sockets, err := socketsIn(at, home, p.socketName()+".lock", uid, gid)
	if err != nil {
		return nil, err
	}
	data := filepath.Join(home, "data")
	p.server = &server{
		name:    "postgres",
		program: "postgres",
		dir:     data,
		log:     filepath.Join(home, "log"),
		lockAt:  filepath.Join(home, "lock"),
		sockets: sockets,
		stop:    syscall.SIGINT, // "fast": the default, SIGTERM, waits for the clients to leave
	}
	p.command = func() *exec.Cmd { return p.postgres(program, data) }
	p.prepare = func(ctx context.Context) error { return p.cluster(ctx, home, data) }
	p.ready = func(ctx context.Context) error {
		conn, err := pgconn.Connect(ctx, p.socketURL("postgres"))
		if err != nil {
			return err
		}
		return conn.Close(ctx)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.start(ctx); err != nil {
		return nil, err
	}
	return p, nil
}

// try runs the program as a child with the identity would run.
func try(ctx context.Context, program string, as identity) error {
	cmd := exec.Command(program, "--version")
	cmd.SysProcAttr = sysProcAttr(as, syscall.SIGKILL)
	cmd.Env = environment()
	run, err := spawn(cmd)
	if err != nil {
		if refused(err) {
			return &refusedError{as: as, err: err}
		}
		return err
	}
	return finish(ctx, run)
}

// finish waits for a program that ends by itself, and kills it when ctx ends first.
func finish(ctx context.Context, run *child) error {
	select {
	case <-run.done:
		return run.err
	case <-ctx.Done():
		return errors.Join(ctx.Err(), run.kill())
	}
}

// postgres is the command of the server.
func (p *Postgres) postgres(program, data string) *exec.Cmd {
	args := []string{"-D", data, "-p", strconv.Itoa(p.port()),
		"-c", `unix_socket_directories="` + strings.ReplaceAll(p.sockets.dir, `"`, `""`) + `"`,
		"-c", "unix_socket_permissions=0700",
		"-c", "logging_collector=off",
		"-c", "shared_buffers=32MB",
		"-c", "max_connections=100",
	}
	if p.opts.Port == 0 {
		args = append(args, "-c", "listen_addresses=")
	} else {
		args = append(args, "-c", "listen_addresses=127.0.0.1")
	}
	if !p.opts.Durable {
		// Not synchronous_commit=off: then a killed server forgets commits that it has acknowledged. Without fsync a
		// commit waits only until the kernel has the bytes, and the kernel outlives the server.
		args = append(args, "-c", "fsync=off", "-c", "full_page_writes=off")
	}
	if len(p.opts.Preload) > 0 {
		args = append(args, "-c", "shared_preload_libraries="+strings.Join(p.opts.Preload, ","))
	}
	cmd := exec.Command(program, append(args, p.opts.Args...)...)
	cmd.SysProcAttr = sysProcAttr(p.as, syscall.SIGINT)
	cmd.Env = environment()
	return cmd
}

// cluster prepares the data directory: a new cluster if there is none, else without what a killed server left. Nobody
// uses the directory now.
func (p *Postgres) cluster(ctx context.Context, home, data string) error {
	if err := p.as.own(home); err != nil {
		return err
	}
	if _, err := os.Stat(data); errors.Is(err, os.ErrNotExist) {
		if err := p.initdb(ctx, home, data); err != nil {
			return err
		}
	} else if err != nil {
		return err
	}
	// Postgres trusts these files if a process with the pid in them exists; in a container, where the same few pids come
	// back with each start, some other process often has it.
	for _, stale := range []string{
		filepath.Join(data, "postmaster.pid"), p.socket(), p.socket() + ".lock",
	} {
		if err := os.Remove(stale); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	return nil
}

// initdb makes a cluster beside its place and moves it there when it is complete: one that was interrupted is not
// mistaken for a cluster.
func (p *Postgres) initdb(ctx context.Context, home, data string) error {
	ctx, cancel := context.WithTimeout(ctx, initBound)
	defer cancel()
	fresh := data + ".new"
	if err := os.RemoveAll(fresh); err != nil {
		return err
	}
	args := []string{"-D", fresh, "-U", postgresUser, "-A", "trust", "-E", "UTF8", "--locale=C", "--no-instructions"}
	if !p.opts.Durable {
		args = append(args, "--no-sync")
	}
	cmd := exec.Command(filepath.Join(p.bin, "initdb"), args...)
	cmd.SysProcAttr = sysProcAttr(p.as, syscall.SIGTERM)
	cmd.Env = environment()
	var out strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &out
	run, err := spawn(cmd)
	if err != nil {
		return err
	}
	if err := finish(ctx, run); err != nil {
		return fmt.Errorf("initdb %v: %w\n%s", p.as, err, strings.TrimSpace(out.String()))
	}
	return os.Rename(fresh, data)
}

// environment is ours without the variables that change what Postgres does.
func environment() []string {
	var env []string
	for _, v := range os.Environ() {
		if !strings.HasPrefix(v, "PG") && !strings.HasPrefix(v, "LC_") && !strings.HasPrefix(v, "LANG") {
			env = append(env, v)
		}
	}
	return append(env, "LC_ALL=C")
}

func (p *Postgres) port() int {
	if p.opts.Port == 0 {
		return socketPort
	}
	return p.opts.Port
}

func (p *Postgres) socketName() string { return ".s.PGSQL." + strconv.Itoa(p.port()) }

func (p *Postgres) socket() string { return filepath.Join(p.sockets.dir, p.socketName()) }

func (p *Postgres) socketURL(db string) string {
	return p.url(db, url.Values{"host": {p.sockets.dir}, "port": {strconv.Itoa(p.port())}})
}

func (p *Postgres) url(db string, where url.Values) string {
	where.Set("sslmode", "disable")
	u := url.URL{Scheme: "postgres", User: url.User(postgresUser), Path: "/" + db, RawQuery: where.Encode()}
	return u.String()
}

// Addr is where to dial: host:port, or the path of the unix socket if there is no port.
func (p *Postgres) Addr() string {
	if p.opts.Port == 0 {
		return p.socket()
	}
	return net.JoinHostPort("127.0.0.1", strconv.Itoa(p.opts.Port))
}

// URL names a database of the cluster; "postgres" always exists.
func (p *Postgres) URL(db string) string {
	if p.opts.Port == 0 {
		return p.socketURL(db)
	}
	return p.URLVia(p.Addr(), db)
}

// URLVia is URL for a client that reaches the server at another host:port.
func (p *Postgres) URLVia(addr, db string) string {
	u := url.URL{Scheme: "postgres", User: url.User(postgresUser), Host: addr, Path: "/" + db, RawQuery: "sslmode=disable"}
	return u.String()
}

// CreateDatabase makes a database if it does not exist.
func (p *Postgres) CreateDatabase(ctx context.Context, name string) error {
	err := p.exec(ctx, "CREATE DATABASE "+pgx.Identifier{name}.Sanitize())
	var pgErr *pgconn.PgError
	if errors.As(err, &pgErr) && pgErr.Code == "42P04" { // duplicate_database
		return nil
	}
	return err
}

// DropDatabase removes a database if it exists, and ends the sessions that use it.
func (p *Postgres) DropDatabase(ctx context.Context, name string) error {
	return p.exec(ctx, "DROP DATABASE IF EXISTS "+pgx.Identifier{name}.Sanitize()+" WITH (FORCE)")
}

// exec runs one statement as the owner of the cluster.
func (p *Postgres) exec(ctx context.Context, sql string) error {
	conn, err := pgconn.Connect(ctx, p.socketURL("postgres"))
	if err != nil {
		return err
	}
	_, err = conn.Exec(ctx, sql).ReadAll()
	return errors.Join(err, conn.Close(ctx))
}
