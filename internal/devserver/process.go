package devserver

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"time"
)

// settleBound limits how long a signal that cannot be caught (SIGSTOP, SIGKILL) may take to show. It is instant unless
// the process sits in an uninterruptible system call, such as a slow disk's; then waiting longer does not help.
const settleBound = 10 * time.Second

// pollEvery is how often the process table is read while we wait for such a signal to show.
const pollEvery = 2 * time.Millisecond

// process is one line of the process table. pid and started together name a process for good: a pid alone is used
// again.
type process struct {
	pid, ppid int
	name      string
	state     byte
	started   string
}

// ended tells whether nothing of the process runs any more. A zombie waits only for its parent, which may be an init
// that never looks.
func (p process) ended() bool { return p.state == 'Z' || p.state == 'X' }

// still tells whether the process does not move: stopped or ended.
func (p process) still() bool { return p.ended() || p.state == 'T' || p.state == 't' }

// descendants returns the processes below roots, and the roots.
func descendants(all []process, roots ...process) []process {
	tree := append([]process(nil), roots...)
	seen := make(map[int]bool)
	for _, p := range tree {
		seen[p.pid] = true
	}
	for i := 0; i < len(tree); i++ {
		for _, p := range all {
			if p.ppid == tree[i].pid && !seen[p.pid] {
				seen[p.pid] = true
				tree = append(tree, p)
			}
		}
	}
	return tree
}

// child is one run of a program that we started.
type child struct {
	cmd *exec.Cmd
	// done is closed when the program has ended and was waited for.
	done chan struct{}
	// err is how it ended. Read it after done.
	err error
}

// spawn starts cmd. The parent death signal is sent when the *thread* that forked ends, so one goroutine keeps its
// thread from the start of the program to its end. That goroutine ends with the program.
func spawn(cmd *exec.Cmd) (*child, error) {
	c := &child{cmd: cmd, done: make(chan struct{})}
	started := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			c.err = cmd.Wait()
		}
		close(c.done)
	}()
	if err := <-started; err != nil {
		<-c.done
		return nil, err
	}
	return c, nil
}

func (c *child) pid() int { return c.cmd.Process.Pid }

func (c *child) running() bool {
	select {
	case <-c.done:
		return false
	default:
		return true
	}
}

// signal reaches the first process only.
func (c *child) signal(sig syscall.Signal) error {
	err := c.cmd.Process.Signal(sig)
	if errors.Is(err, os.ErrProcessDone) {
		return nil
	}
	return err
}

// tree returns the program's processes. Postgres gives every backend a session of its own, so a process group would
// name only the postmaster.
func (c *child) tree() ([]process, error) {
	all, err := processes()
	if err != nil {
		return nil, err
	}
	for _, p := range all {
		// The parent's pid guards against a pid that was reaped and used again a moment ago.
		if p.pid == c.pid() && p.ppid == os.Getpid() {
			return descendants(all, p), nil
		}
	}
	return nil, nil
}

// suspend stops every process of the program, and returns when all of them stand still. It looks again after each
// round: until the first process is seen stopped, it may fork.
func (c *child) suspend() error {
	for deadline := time.Now().Add(settleBound); ; time.Sleep(pollEvery) {
		tree, err := c.tree()
		if err != nil {
			return err
		}
		still := true
		for _, p := range tree {
			if p.still() {
				continue
			}
			still = false
			if err := sendTo(p, syscall.SIGSTOP); err != nil {
				return err
			}
		}
		if still {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("not stopped %v after SIGSTOP", settleBound)
		}
	}
}

// resume undoes suspend.
func (c *child) resume() error {
	tree, err := c.tree()
	if err != nil {
		return err
	}
	for _, p := range tree {
		if err := sendTo(p, syscall.SIGCONT); err != nil {
			return err
		}
	}
	return nil
}

// kill ends every process of the program at once, and returns when none runs any more. The program is stopped first, so
// that the list of its processes is complete and none of them can react to the end of another.
func (c *child) kill() error {
	if err := c.suspend(); err != nil {
		return err
	}
	tree, err := c.tree()
	if err != nil {
		return err
	}
	if err := killAll(tree); err != nil {
		return err
	}
	select {
	case <-c.done:
		return nil
	case <-time.After(settleBound):
		return fmt.Errorf("not ended %v after SIGKILL", settleBound)
	}
}

// killAll sends SIGKILL to each process and returns when none runs any more.
func killAll(list []process) error {
	for _, p := range list {
		if err := sendTo(p, syscall.SIGKILL); err != nil {
			return err
		}
	}
	return waitEnded(list, settleBound)
}

// waitEnded returns when none of the processes runs any more.
func waitEnded(list []process, bound time.Duration) error {
	for deadline := time.Now().Add(bound); ; time.Sleep(pollEvery) {
		all, err := processes()
		if err != nil {
			return err
		}
		left := 0
		for _, p := range all {
			for _, q := range list {
				if p.pid == q.pid && p.started == q.started && !p.ended() {
					left++
				}
			}
		}
		if left == 0 {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%d processes still run after %v", left, bound)
		}
	}
}

// sendTo sends a signal; a process that has ended meanwhile is no error.
func sendTo(p process, sig syscall.Signal) error {
	if err := syscall.Kill(p.pid, sig); err != nil && !errors.Is(err, syscall.ESRCH) {
		return fmt.Errorf("signal %v to %s: %w", sig, p.name, err)
	}
	return nil
}
