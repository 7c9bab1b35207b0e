//go:build unix && !linux

package devserver

import (
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
)

const (
	userNamespaces = false
	// maxSocketPath is what sockaddr_un holds on the BSDs and macOS, without the closing NUL.
	maxSocketPath = 103
)

// sysProcAttr describes a child in a process group of its own, so that Ctrl-C in a terminal reaches only us, and we stop
// it in order. There is no parent death signal here: what a killed run left behind is ended by the next start.
func sysProcAttr(id identity, _ syscall.Signal) *syscall.SysProcAttr {
	attr := &syscall.SysProcAttr{Setpgid: true}
	if id == asNobody {
		uid, gid := nobody()
		attr.Credential = &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}
	}
	return attr
}

// processes is a snapshot of the process table.
func processes() ([]process, error) {
	out, err := exec.Command("ps", "-A", "-o", "pid=,ppid=,stat=,comm=").Output()
	if err != nil {
		return nil, err
	}
	var all []process
	for line := range strings.Lines(string(out)) {
		fields := strings.Fields(line)
		if len(fields) < 4 {
			continue
		}
		pid, err := strconv.Atoi(fields[0])
		if err != nil {
			continue
		}
		ppid, err := strconv.Atoi(fields[1])
		if err != nil {
			continue
		}
		all = append(all, process{pid: pid, ppid: ppid, name: filepath.Base(fields[3]), state: fields[2][0]})
	}
	return all, nil
}

// worksIn tells whether the process was given dir as an argument.
func (p process) worksIn(dir string) bool {
	out, err := exec.Command("ps", "-ww", "-o", "command=", "-p", strconv.Itoa(p.pid)).Output()
	return err == nil && strings.Contains(" "+strings.TrimSpace(string(out))+" ", " "+dir+" ")
}
