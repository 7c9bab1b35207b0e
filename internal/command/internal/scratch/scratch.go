// Package scratch runs a redis-server that nobody else can reach: on a unix socket in a directory of its own, with
// an empty memory, gone without a trace when it is stopped. The generator of the command table asks it what it
// knows, and the tests hold the table against it.
package scratch

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/redis/go-redis/v9"
)

// startup is how long a server may take to listen. It takes some milliseconds on an idle machine; a machine that
// needs more than this has other trouble.
const startup = 20 * time.Second

// Server is a running redis-server and a client for it.
type Server struct {
	*redis.Client
	dir string
	cmd *exec.Cmd
}

// Start starts the redis-server that is found in PATH and waits until it listens. The caller must Stop it.
func Start(ctx context.Context) (*Server, error) {
	return StartProgram(ctx, "redis-server")
}

// StartProgram is Start with another program that takes the flags of redis-server.
func StartProgram(ctx context.Context, program string) (_ *Server, err error) {
	dir, err := os.MkdirTemp("", "scratch")
	if err != nil {
		return nil, fmt.Errorf("start redis: %w", err)
	}
	socket := filepath.Join(dir, "s")
	s := &Server{dir: dir, cmd: exec.Command(program, "--port", "0", "--unixsocket", socket, "--dir", dir,
		"--save", "", "--appendonly", "no", "--daemonize", "no", "--enable-debug-command", "yes")}
	if err := s.cmd.Start(); err != nil {
		os.RemoveAll(dir)
		return nil, fmt.Errorf("start redis: %w", err)
	}
	s.Client = redis.NewClient(&redis.Options{
		Network: "unix", Addr: socket, Protocol: 2, DisableIdentity: true, MaxRetries: -1,
	})
	if err := awaitListener(ctx, socket); err != nil {
		s.Stop()
		return nil, fmt.Errorf("start redis: %w", err)
	}
	return s, nil
}

func awaitListener(ctx context.Context, socket string) error {
	ctx, cancel := context.WithTimeout(ctx, startup)
	defer cancel()
	poll := time.NewTicker(5 * time.Millisecond)
	defer poll.Stop()
	for {
		conn, err := net.Dial("unix", socket)
		if err == nil {
			return conn.Close()
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("it does not listen: %w", ctx.Err())
		case <-poll.C:
		}
	}
}

// Stop kills the server, waits for its end and removes what it left.
func (s *Server) Stop() {
	_ = s.Close()            // the client; the server goes next
	_ = s.cmd.Process.Kill() // it may have ended by itself
	_ = s.cmd.Wait()         // killed: its exit status says nothing
	_ = os.RemoveAll(s.dir)  // a temporary folder
}

// Version returns the server's version, as in "7.0.15". A Valkey tells the version of Redis that it passes for.
func (s *Server) Version(ctx context.Context) (string, error) {
	info := s.InfoMap(ctx, "server")
	if err := info.Err(); err != nil {
		return "", fmt.Errorf("ask redis for its version: %w", err)
	}
	return info.Item("Server", "redis_version"), nil
}

// Product returns the server's own name and version, as in "redis-7.0.15" or "valkey-9.1.2".
func (s *Server) Product(ctx context.Context) (string, error) {
	info := s.InfoMap(ctx, "server")
	if err := info.Err(); err != nil {
		return "", fmt.Errorf("ask redis for its version: %w", err)
	}
	if version := info.Item("Server", "valkey_version"); version != "" {
		return "valkey-" + version, nil
	}
	return "redis-" + info.Item("Server", "redis_version"), nil
}
