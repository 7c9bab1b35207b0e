package devserver

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"syscall"
)

// identity is a closed list: as whom a child runs. Postgres refuses to run as root, and initdb refuses a user that
// has no passwd entry.
type identity uint8

const (
	// asIs: as the user who runs us.
	asIs identity = iota
	// inUserNamespace: the kernel still sees our own user, so files stay ours wherever they lie; the child sees
	// itself as nobody. Linux only, and an administrator may have forbidden it.
	inUserNamespace
	// asNobody: really as nobody, which only root can arrange. The directory must be one that nobody can reach.
	asNobody
)

func (id identity) String() string {
	return [...]string{"as is", "in a user namespace", "as nobody"}[id]
}

// postgresIdentities lists what to try, best first.
func postgresIdentities() []identity {
	if uid := os.Geteuid(); uid != 0 {
		if _, err := user.LookupId(strconv.Itoa(uid)); err != nil && userNamespaces {
			return []identity{inUserNamespace, asIs}
		}
		return []identity{asIs}
	}
	if userNamespaces {
		return []identity{inUserNamespace, asNobody}
	}
	return []identity{asNobody}
}

// nobody looks up the user that owns nothing. 65534 is its number on every Linux distribution.
func nobody() (uid, gid int) {
	uid, gid = 65534, 65534
	u, err := user.Lookup("nobody")
	if err != nil {
		return uid, gid
	}
	// Parsed as int64 because macOS writes nobody's number as -2.
	if n, err := strconv.ParseInt(u.Uid, 10, 64); err == nil {
		uid = int(uint32(n))
	}
	if n, err := strconv.ParseInt(u.Gid, 10, 64); err == nil {
		gid = int(uint32(n))
	}
	return uid, gid
}

// owner is who must own the files of a child with this identity.
func (id identity) owner() (uid, gid int) {
	if id == asNobody {
		return nobody()
	}
	return os.Geteuid(), os.Getegid()
}

// own makes the tree at root the child's, if it is not already. An earlier run may have had another identity.
func (id identity) own(root string) error {
	uid, gid := id.owner()
	info, err := os.Lstat(root)
	if err != nil {
		return err
	}
	if st, ok := info.Sys().(*syscall.Stat_t); ok && int(st.Uid) == uid {
		return nil
	}
	if os.Geteuid() != 0 {
		return fmt.Errorf("%s belongs to another user", root)
	}
	return filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		return os.Lchown(path, uid, gid)
	})
}

// reach checks that the child can walk to dir. Our own directory is opened for passage if need be; the way to it is
// not ours to change.
func (id identity) reach(dir string) error {
	if id != asNobody {
		return nil
	}
	info, err := os.Stat(dir)
	if err != nil {
		return err
	}
	if info.Mode()&0o001 == 0 {
		if err := os.Chmod(dir, info.Mode().Perm()|0o011); err != nil {
			return err
		}
	}
	for parent := filepath.Dir(dir); ; parent = filepath.Dir(parent) {
		info, err := os.Stat(parent)
		if err != nil {
			return err
		}
		if info.Mode()&0o001 == 0 {
			return fmt.Errorf("postgres refuses to run as root, user namespaces are forbidden here, and the user nobody "+
				"cannot pass %s: run as an ordinary user or choose a directory under %s", parent, os.TempDir())
		}
		if parent == filepath.Dir(parent) {
			return nil
		}
	}
}

// refused tells whether the kernel would not start a child with an identity, as opposed to a program that does not
// work: forbidden (EPERM, EACCES), limits used up or zero (ENOSPC, EUSERS, EAGAIN), or not built in (EINVAL, ENOSYS).
func refused(err error) bool {
	for _, e := range []syscall.Errno{
		syscall.EPERM, syscall.EACCES, syscall.ENOSPC, syscall.EUSERS, syscall.EAGAIN, syscall.EINVAL, syscall.ENOSYS,
	} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}
