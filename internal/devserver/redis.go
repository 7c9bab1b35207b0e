package devserver

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
)

// redisSocket is the name of Redis's unix socket.
const redisSocket = "redis.sock"

// RedisOptions says how to start a Redis.
type RedisOptions struct {
	// Dir holds the socket, and below it, in redis/, all else. It is created if need be.
	Dir string
	// Port is a port of 127.0.0.1 to listen on besides the unix socket; 0 is none.
	Port int
	// Password is what the default user must give; "" is none. It does not show in the process table.
	Password string
	// Args are further options as on redis-server's command line, for example "--maxmemory", "10mb". They win over
	// ours, which keep nothing on disk.
	Args []string
}

// Redis is a private redis-server.
type Redis struct {
	*server
	opts RedisOptions
}

// StartRedis starts a Redis and returns when it answers. ctx bounds the start only: the server runs until Stop or Kill.
func StartRedis(ctx context.Context, opts RedisOptions) (*Redis, error) {
	program, err := Find("redis-server")
	if err != nil {
		return nil, err
	}
	dir, err := absolute(opts.Dir)
	if err != nil {
		return nil, err
	}
	home := filepath.Join(dir, "redis")
	if err := os.MkdirAll(home, 0o700); err != nil {
		return nil, err
	}
	sockets, err := socketsIn(dir, home, redisSocket, os.Geteuid(), os.Getegid())
	if err != nil {
		return nil, err
	}
	r := &Redis{opts: opts, server: &server{
		name:    "redis",
		program: filepath.Base(program),
		dir:     home,
		log:     filepath.Join(home, "log"),
		lockAt:  filepath.Join(home, "lock"),
		sockets: sockets,
		stop:    syscall.SIGTERM,
	}}
	r.command = func() *exec.Cmd {
		// A title would hide the arguments, by which a later run finds us.
		args := []string{"-", "--set-proc-title", "no", "--dir", home, "--port", strconv.Itoa(opts.Port), "--bind", "127.0.0.1",
			"--unixsocket", r.socket(), "--unixsocketperm", "700", "--daemonize", "no",
			"--save", "", "--appendonly", "no", "--loglevel", "warning"}
		cmd := exec.Command(program, append(args, opts.Args...)...)
		cmd.SysProcAttr = sysProcAttr(asIs, syscall.SIGTERM)
		if opts.Password != "" {
			cmd.Stdin = strings.NewReader("requirepass " + quote(opts.Password) + "\n")
		}
		return cmd
	}
	r.ready = r.ping
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := r.start(ctx); err != nil {
		return nil, err
	}
	return r, nil
}

func (r *Redis) socket() string { return filepath.Join(r.sockets.dir, redisSocket) }

// Addr is where to dial: host:port, or the path of the unix socket if there is no port.
func (r *Redis) Addr() string {
	if r.opts.Port == 0 {
		return r.socket()
	}
	return net.JoinHostPort("127.0.0.1", strconv.Itoa(r.opts.Port))
}

// URL is the same as Addr for clients that take a URL, with the password.
func (r *Redis) URL() string {
	u := url.URL{Scheme: "redis", Host: r.Addr(), Path: "/0"}
	if r.opts.Port == 0 {
		u = url.URL{Scheme: "unix", Path: r.Addr()}
	}
	if r.opts.Password != "" {
		u.User = url.UserPassword("", r.opts.Password)
	}
	return u.String()
}

// ping asks over the unix socket, which is private: on the port another program might answer in our server's place.
// Redis opens the socket after the port, so an answer here means that both are open.
func (r *Redis) ping(ctx context.Context) error {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", r.socket())
	if err != nil {
		return err
	}
	defer conn.Close()
	if deadline, ok := ctx.Deadline(); ok {
		if err := conn.SetDeadline(deadline); err != nil {
			return err
		}
	}
	if _, err := conn.Write([]byte("PING\r\n")); err != nil {
		return err
	}
	reply, err := bufio.NewReader(conn).ReadString('\n')
	if err != nil {
		return err
	}
	// A server that wants a password is up as well. LOADING is not: it would refuse the first command.
	if strings.HasPrefix(reply, "+PONG") || strings.HasPrefix(reply, "-NOAUTH") {
		return nil
	}
	return fmt.Errorf("PING answered %q", strings.TrimSpace(reply))
}

// quote writes s as a string of redis.conf.
func quote(s string) string {
	var b strings.Builder
	b.WriteByte('"')
	for _, c := range []byte(s) {
		fmt.Fprintf(&b, `\x%02x`, c)
	}
	b.WriteByte('"')
	return b.String()
}
