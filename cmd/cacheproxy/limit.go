package main

import (
	"io/fs"
	"math"
	"path"
	"runtime/debug"
	"strconv"
	"strings"
)

// limitMemory tells the garbage collector of the limit that the container has, unless GOMEMLIMIT says something, and
// returns the bytes it may use; 0 is no limit. Without it the collector lets the heap double where the kernel kills.
func limitMemory(getenv func(string) (string, bool), root fs.FS) int64 {
	if _, set := getenv("GOMEMLIMIT"); set {
		return 0
	}
	limit := cgroupLimit(root)
	if limit == 0 {
		return 0
	}
	limit -= limit / 10 // what is not the heap's: stacks, the binary, the kernel's share
	debug.SetMemoryLimit(limit)
	return limit
}

// cgroupLimit is the smallest memory limit of this process' cgroup and of those above it, in bytes; 0 is none. root is
// the root of the file system.
func cgroupLimit(root fs.FS) int64 {
	lowest := int64(math.MaxInt64)
	look := func(file string) {
		text, err := fs.ReadFile(root, file)
		if err != nil {
			return
		}
		// "max" is no limit; cgroup v1 writes a number near 2^63 for it.
		if n, err := strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64); err == nil && n > 0 {
			lowest = min(lowest, n)
		}
	}
	groups, err := fs.ReadFile(root, "proc/self/cgroup")
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(groups)) {
		// hierarchy:controllers:path; version 2 has the hierarchy 0 and no controllers.
		_, rest, _ := strings.Cut(strings.TrimSpace(line), ":")
		controllers, group, _ := strings.Cut(rest, ":")
		mount, file := "sys/fs/cgroup", "memory.max"
		if controllers != "" {
			if !strings.Contains(","+controllers+",", ",memory,") {
				continue
			}
			mount, file = "sys/fs/cgroup/memory", "memory.limit_in_bytes"
		}
		// In a container the path may be one of the host's, which does not exist here; the mount itself is then our group.
		for dir := path.Clean("/" + group); ; dir = path.Dir(dir) {
			look(path.Join(mount, dir, file))
			if dir == "/" {
				break
			}
		}
	}
	const none = 1 << 62 // no machine has more
	if lowest >= none {
		return 0
	}
	return lowest
}
