// Package devserver starts a real Redis and a real Postgres as private child processes: for `cacheproxy dev`, and for
// tests, which also kill, pause and restart them.
//
// A server keeps everything it writes in the directory that it is given, listens on a unix socket and, if asked, on a
// port of 127.0.0.1, and ends when we end, even if we are killed (on Linux; elsewhere the next start in the same
// directory ends what was left). The directory may be used again; one lock per server keeps two runs apart.
//
// Read server.go for the life of a server, redis.go and postgres.go for what the two add, process.go for signals, and
// identity.go for how Postgres runs when we are root.
package devserver

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
)

const (
	// startBound limits a start, under whatever deadline the caller's context has. A start takes a tenth of a second; a
	// machine with all cores busy, or Postgres recovering after a crash, may take a hundred times as long.
	startBound = 30 * time.Second
	// attemptBound limits one question whether the server is ready: one that does not answer must not use up startBound.
	attemptBound = 2 * time.Second
	// readyEvery is the pause between two such questions: short against a start, long enough not to slow it down.
	readyEvery = 10 * time.Millisecond
	// stopBound limits an orderly end. Postgres writes a checkpoint, Redis perhaps a snapshot; what takes longer is
	// stuck, and is killed.
	stopBound = 15 * time.Second
	// logTail is how much of a server's log an error quotes: the last few lines, which say why.
	logTail = 2048
)

// ErrNotRunning is returned by methods that need a running server.
var ErrNotRunning = errors.New("devserver: the server is not running")

// server is what Redis and Postgres have in common. Its methods are safe for concurrent use.
type server struct {
	// Static after construction.
	name    string                          // for errors
	program string                          // the name in the process table
	dir     string                          // the server's working directory, absolute and without symbolic links
	log     string                          // its standard output and error
	lockAt  string                          // the file that is locked while the server runs
	sockets sockets                         // the directory of the unix socket
	stop    syscall.Signal                  // asks for an orderly end
	command func() *exec.Cmd                // a fresh command for each run
	prepare func(ctx context.Context) error // makes dir fit for a start; nobody uses it when it is called
	ready   func(ctx context.Context) error

	mu   sync.Mutex
	run  *child   // the latest run, nil before the first
	lock *os.File // held while the server runs
}

// start takes the lock, clears what an earlier run left, and starts the server. The caller holds mu.
func (s *server) start(ctx context.Context) (err error) {
	if s.lock == nil {
		if s.lock, err = lockFile(s.lockAt); err != nil {
			return fmt.Errorf("devserver: %s: %w", s.name, err)
		}
	}
	defer func() {
		if err != nil {
			s.unlock()
			err = fmt.Errorf("devserver: start %s: %w", s.name, err)
		}
	}()
	if err := s.clear(); err != nil {
		return err
	}
	if err := s.sockets.open(); err != nil {
		return err
	}
	if s.prepare != nil {
		if err := s.prepare(ctx); err != nil {
			return err
		}
	}
	log, err := os.OpenFile(s.log, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	cmd := s.command()
	cmd.Stdout, cmd.Stderr = log, log
	run, err := spawn(cmd)
	if closeErr := log.Close(); err == nil && closeErr != nil {
		err = errors.Join(closeErr, run.kill())
	}
	if err != nil {
		return err
	}
	if err := s.await(ctx, run); err != nil {
		if killErr := run.kill(); killErr != nil {
			err = errors.Join(err, killErr)
		}
		return fmt.Errorf("%w\n%s", err, s.LogTail())
	}
	s.run = run
	return nil
}

// await returns when the server answers. It fails when ctx ends or the server does.
func (s *server) await(ctx context.Context, run *child) error {
	ctx, cancel := context.WithTimeout(ctx, startBound)
	defer cancel()
	var last error
	for {
		attempt, cancel := context.WithTimeout(ctx, attemptBound)
		err := s.ready(attempt)
		cancel()
		if err == nil {
			return nil
		}
		if ctx.Err() == nil {
			last = err // afterwards an attempt only fails for the lack of time
		}
		select {
		case <-run.done:
			return fmt.Errorf("it ended at once: %v", run.cmd.ProcessState)
		case <-ctx.Done():
			return errors.Join(fmt.Errorf("it is not ready: %w", ctx.Err()), last)
		case <-time.After(readyEvery):
		}
	}
}

// clear ends processes that a killed run left in our directory. We hold the lock, so no living run owns them.
func (s *server) clear() error {
	all, err := processes()
	if err != nil {
		return err
	}
	var left []process
	for _, p := range all {
		if (p.name == s.program || strings.HasPrefix(p.name, s.program+":")) && !p.ended() && p.worksIn(s.dir) {
			left = append(left, p)
		}
	}
	if len(left) > 0 {
		left = descendants(all, left...)
		// They have been asked to end when their parent died. Let them do it in order if they can; one that was paused
		// could not hear it until now.
		for _, p := range left {
			if err := sendTo(p, syscall.SIGCONT); err != nil {
				return fmt.Errorf("an earlier run: %w", err)
			}
		}
		if waitEnded(left, stopBound/3) != nil {
			if err := killAll(left); err != nil {
				return fmt.Errorf("an earlier run: %w", err)
			}
		}
	}
	return nil
}

// PID is the process id of the server (Postgres: of the postmaster), or 0 if it does not run.
func (s *server) PID() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.run == nil || !s.run.running() {
		return 0
	}
	return s.run.pid()
}

// Done returns a channel that is closed when the run that is current now has ended, for whatever reason. Restart begins
// a new run.
func (s *server) Done() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.run.done
}

// LogTail returns the last lines that the server printed since it was started.
func (s *server) LogTail() string {
	f, err := os.Open(s.log)
	if err != nil {
		return ""
	}
	defer f.Close()
	if end, err := f.Seek(0, io.SeekEnd); err != nil || end <= logTail {
		_, err = f.Seek(0, io.SeekStart)
		if err != nil {
			return ""
		}
	} else if _, err := f.Seek(-logTail, io.SeekEnd); err != nil {
		return ""
	}
	tail, err := io.ReadAll(io.LimitReader(f, logTail))
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(tail))
}

// Stop ends the server in order, also a paused one, and returns when it has ended. One that does not end is killed.
// Stopping a stopped server does nothing.
func (s *server) Stop() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.end((*server).halt)
}

// Kill ends the server and every process it started with SIGKILL, and returns when none of them runs any more.
func (s *server) Kill() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.end(func(s *server) error { return s.run.kill() })
}

// Restart stops the server if it runs and starts it again, with the same directory, port and arguments.
func (s *server) Restart() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.end((*server).halt); err != nil {
		return err
	}
	return s.start(context.Background())
}

// Pause stops every process of the server with SIGSTOP, and returns when all of them stand still: connections stay open
// and the kernel accepts new ones, but nobody answers.
func (s *server) Pause() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.run == nil || !s.run.running() {
		return ErrNotRunning
	}
	if err := s.run.suspend(); err != nil {
		return fmt.Errorf("devserver: pause %s: %w", s.name, err)
	}
	return nil
}

// Resume lets a paused server run on.
func (s *server) Resume() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.run == nil || !s.run.running() {
		return ErrNotRunning
	}
	if err := s.run.resume(); err != nil {
		return fmt.Errorf("devserver: resume %s: %w", s.name, err)
	}
	return nil
}

// end brings the run to its end in the given way and gives up what it held. The caller holds mu.
func (s *server) end(how func(*server) error) error {
	if s.run != nil && s.run.running() {
		if err := how(s); err != nil {
			return fmt.Errorf("devserver: stop %s: %w", s.name, err)
		}
	}
	s.sockets.close()
	s.unlock()
	return nil
}

// halt asks the run to end, and kills it if it does not. The caller holds mu.
func (s *server) halt() error {
	// Continued first: a stopped process handles no signal that can be caught.
	if err := s.run.resume(); err != nil {
		return err
	}
	if err := s.run.signal(s.stop); err != nil {
		return err
	}
	timer := time.NewTimer(stopBound)
	defer timer.Stop()
	select {
	case <-s.run.done:
		return nil
	case <-timer.C:
		return s.run.kill()
	}
}

func (s *server) unlock() {
	if s.lock != nil {
		// Closing our file is not enough for a restart at once, because the lock ends with the last copy of the file:
		//  1. another goroutine forks, and its child has a copy until it executes its program;
		//  2. we close ours and lock the file again;
		//  3. the kernel answers that it is locked.
		_ = syscall.Flock(int(s.lock.Fd()), syscall.LOCK_UN) // what it refuses the close does
		_ = s.lock.Close()                                   // nothing was written
		s.lock = nil
	}
}

// lockFile takes a lock that the kernel gives back when we end, however we end.
func lockFile(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		_ = f.Close()
		if errors.Is(err, syscall.EWOULDBLOCK) {
			return nil, fmt.Errorf("%s is in use by another run", filepath.Dir(path))
		}
		return nil, err
	}
	return f, nil
}

// absolute makes dir if need be and returns its one true name, by which processes that stand in it can be recognised.
func absolute(dir string) (string, error) {
	if dir == "" {
		return "", errors.New("devserver: no directory given")
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return "", err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", err
	}
	return filepath.EvalSymlinks(dir)
}

// sockets is a directory for the unix socket of one server.
type sockets struct {
	dir string
	// private tells that dir is not the caller's but a short one of our own, made when the server starts and removed
	// when it has ended.
	private  bool
	uid, gid int
}

// socketsIn chooses where a socket with the given file name can lie: in dir, or, if that makes too long a path for the
// kernel, in a short directory below os.TempDir that is named after the server's home.
func socketsIn(dir, home, name string, uid, gid int) (sockets, error) {
	if len(filepath.Join(dir, name)) <= maxSocketPath {
		return sockets{dir: dir}, nil
	}
	sum := sha256.Sum256([]byte(home))
	short := filepath.Join(os.TempDir(), "cacheproxy-"+hex.EncodeToString(sum[:6]))
	if len(filepath.Join(short, name)) > maxSocketPath {
		return sockets{}, fmt.Errorf("devserver: %s and %s are both too long for a unix socket", dir, short)
	}
	return sockets{dir: short, private: true, uid: uid, gid: gid}, nil
}

// open makes the directory if it is ours to make.
func (d sockets) open() error {
	if !d.private {
		return nil
	}
	if err := os.Mkdir(d.dir, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	// The name can be guessed and the directory above is everybody's: what is there must be ours.
	info, err := os.Lstat(d.dir)
	if err != nil {
		return err
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	if !info.IsDir() || !ok || info.Mode().Perm()&0o077 != 0 || !slices.Contains([]int{os.Geteuid(), d.uid}, int(st.Uid)) {
		return fmt.Errorf("%s exists and is not a private directory of ours", d.dir)
	}
	if int(st.Uid) != d.uid {
		return os.Chown(d.dir, d.uid, d.gid)
	}
	return nil
}

// close removes the directory if it was ours to make, with the sockets that a killed server left. What cannot be removed
// is a few bytes that the next start uses again.
func (d sockets) close() {
	if d.private {
		_ = os.RemoveAll(d.dir)
	}
}
