package main

import (
	"math"
	"runtime/debug"
	"testing"
	"testing/fstest"
)

func TestCgroupLimit(t *testing.T) {
	for _, c := range []struct {
		name  string
		files map[string]string
		want  int64
	}{
		{"no cgroup", nil, 0},
		{"v2, in a container", map[string]string{"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "134217728\n"}, 128 << 20},
		{"v2, unlimited", map[string]string{"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "max\n"}, 0},
		{"v2, the parent's is lower", map[string]string{
			"proc/self/cgroup":                     "0::/pod/app\n",
			"sys/fs/cgroup/pod/app/memory.max":     "268435456\n",
			"sys/fs/cgroup/pod/memory.max":         "134217728\n",
			"sys/fs/cgroup/pod/other/memory.max":   "1048576\n",
			"sys/fs/cgroup/pod/app/sub/memory.max": "1048576\n",
		}, 128 << 20},
		{"v2, a path of the host", map[string]string{"proc/self/cgroup": "0::/../../kubepods/x\n", "sys/fs/cgroup/memory.max": "134217728\n"}, 128 << 20},
		{"v1", map[string]string{
			"proc/self/cgroup": "5:cpu,cpuacct:/a\n4:memory:/a\n0::/a\n",
			"sys/fs/cgroup/memory/a/memory.limit_in_bytes": "134217728\n",
			"sys/fs/cgroup/memory/memory.limit_in_bytes":   "9223372036854771712\n",
		}, 128 << 20},
		{"v1, unlimited", map[string]string{"proc/self/cgroup": "4:memory:/\n", "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n"}, 0},
		{"nonsense", map[string]string{"proc/self/cgroup": "what\n0::\n", "sys/fs/cgroup/memory.max": "lots\n"}, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			root := fstest.MapFS{}
			for name, text := range c.files {
				root[name] = &fstest.MapFile{Data: []byte(text)}
			}
			if got := cgroupLimit(root); got != c.want {
				t.Errorf("got %d, want %d", got, c.want)
			}
		})
	}
}

func TestLimitMemory(t *testing.T) {
	defer debug.SetMemoryLimit(debug.SetMemoryLimit(-1))
	debug.SetMemoryLimit(math.MaxInt64)
	root := fstest.MapFS{
		"proc/self/cgroup":         &fstest.MapFile{Data: []byte("0::/\n")},
		"sys/fs/cgroup/memory.max": &fstest.MapFile{Data: []byte("1000000000\n")},
	}
	set := func(string) (string, bool) { return "off", true }
	unset := func(string) (string, bool) { return "", false }
	if got := limitMemory(set, root); got != 0 || debug.SetMemoryLimit(-1) != math.MaxInt64 {
		t.Errorf("GOMEMLIMIT was overruled: %d", got)
	}
	if got := limitMemory(unset, root); got != 900_000_000 || debug.SetMemoryLimit(-1) != got {
		t.Errorf("the limit is %d, want 90 %%", got)
	}
}
