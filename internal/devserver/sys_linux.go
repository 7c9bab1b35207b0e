package devserver

import (
	"bytes"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
)

const (
	userNamespaces = true
	// maxSocketPath is what sockaddr_un holds, without the closing NUL.
	maxSocketPath = 107
)

// sysProcAttr describes a child in a process group of its own (Ctrl-C in a terminal reaches only us, and we stop it in
// order) that gets signal death when the thread that started it ends.
func sysProcAttr(id identity, death syscall.Signal) *syscall.SysProcAttr {
	attr := &syscall.SysProcAttr{Setpgid: true, Pdeathsig: death}
	uid, gid := nobody()
	switch id {
	case inUserNamespace:
		attr.Cloneflags = syscall.CLONE_NEWUSER
		attr.UidMappings = []syscall.SysProcIDMap{{ContainerID: uid, HostID: os.Geteuid(), Size: 1}}
		attr.GidMappings = []syscall.SysProcIDMap{{ContainerID: gid, HostID: os.Getegid(), Size: 1}}
		attr.Credential = &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid), NoSetGroups: true}
	case asNobody:
		attr.Credential = &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}
	}
	return attr
}

// processes is a snapshot of the process table.
func processes() ([]process, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	var all []process
	for _, entry := range entries {
		pid, err := strconv.Atoi(entry.Name())
		if err != nil {
			continue
		}
		stat, err := os.ReadFile(filepath.Join("/proc", entry.Name(), "stat"))
		if err != nil {
			continue // it ended while we looked
		}
		// pid (name) state ppid … starttime: the name may hold anything, so count from its last parenthesis.
		open, end := bytes.IndexByte(stat, '('), bytes.LastIndexByte(stat, ')')
		if open < 0 || end < open {
			continue
		}
		fields := strings.Fields(string(stat[end+1:]))
		if len(fields) < 20 {
			continue
		}
		ppid, err := strconv.Atoi(fields[1])
		if err != nil {
			continue
		}
		all = append(all, process{
			pid: pid, ppid: ppid, name: string(stat[open+1 : end]), state: fields[0][0], started: fields[19],
		})
	}
	return all, nil
}

// worksIn tells whether the process stands in dir or was given it as an argument. The servers change into their data
// directory, and so do the processes that they fork, which are otherwise hard to recognise once their parent is gone.
func (p process) worksIn(dir string) bool {
	proc := filepath.Join("/proc", strconv.Itoa(p.pid))
	if cwd, err := os.Readlink(filepath.Join(proc, "cwd")); err == nil && cwd == dir {
		return true
	}
	args, err := os.ReadFile(filepath.Join(proc, "cmdline"))
	if err != nil {
		return false
	}
	for _, arg := range bytes.Split(args, []byte{0}) {
		if string(arg) == dir {
			return true
		}
	}
	return false
}
