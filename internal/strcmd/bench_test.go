package strcmd

import (
	"strings"
	"testing"
)

// Each command as the proxy runs it under a key's lock: its reply and its effects go into buffers that are used again.
func BenchmarkEval(b *testing.B) {
	for _, c := range []struct {
		command string
		holds   string
	}{
		{"GET k", strings.Repeat("v", 100)},
		{"SET k v EX 60", "old"},
		{"SET k v NX GET", "old"},
		{"INCR k", "41"},
		{"INCRBYFLOAT k 0.1", "3.25"},
		{"APPEND k tail", strings.Repeat("v", 100)},
		{"MGET k k k k", "v"},
		{"EXPIRE k 60", "v"},
	} {
		b.Run(strings.ReplaceAll(c.command, " ", "_"), func(b *testing.B) {
			var args [][]byte
			for _, a := range strings.Fields(c.command) {
				args = append(args, []byte(a))
			}
			values := make([]Value, len(Keys(args)))
			for i := range values {
				values[i] = Value{Exists: true, Data: []byte(c.holds), TTL: -1, ExpireAt: -1}
			}
			env := Env{NowMS: testNow, Proto: 2}
			var reply []byte
			var effects []Effect
			b.ReportAllocs()
			for b.Loop() {
				reply, effects = Eval(reply[:0], args, values, env, effects[:0])
			}
			if len(reply) == 0 || reply[0] == '-' {
				b.Fatalf("the reply is %q", reply)
			}
		})
	}
}
