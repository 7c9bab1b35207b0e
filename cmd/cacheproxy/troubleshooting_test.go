package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"cacheproxy/internal/testenv"
)

// refuses finds the error replies in what redis-cli prints; it ends with 0 all the same.
var refuses = regexp.MustCompile(`(?m)^[A-Z]+ `)

// Every command of docs/troubleshooting.md does what it should where nothing is wrong: it ends well.
func TestTroubleshootingCommands(t *testing.T) {
	b, err := os.ReadFile("../../" + runbook)
	if err != nil {
		t.Fatal(err)
	}
	s := newSite(t, testenv.Redis(t).URL(), testenv.Postgres(t))
	s.write(routes + "\ncommands: {deny: [KEYS]}\n")
	s.execBuilt("serve", "--config", s.config)
	s.connected()
	s.do("SET", "user:1", "v")
	program := testenv.Program(t)
	bin := filepath.Join(s.dir, "bin")
	if err := os.Mkdir(bin, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(program, filepath.Join(bin, "cacheproxy")); err != nil {
		t.Fatal(err)
	}
	// curl too ends with 0 when it is answered with an error, unless it is asked with -f.
	here := strings.NewReplacer("-p 6380", "-s "+s.socket, "127.0.0.1:9180", s.observe, "curl -s ", "curl -sf ")
	// run tells what a command prints, and whether that or its end is an error.
	run := func(command string) (string, bool) {
		cmd := exec.Command("bash", "-o", "pipefail", "-c", here.Replace(command))
		cmd.Env = append(s.env(), "PATH="+bin+":"+os.Getenv("PATH"), "HOME="+s.dir, "CACHEPROXY_CONFIG="+s.config)
		cmd.Dir = s.dir
		out, err := cmd.CombinedOutput()
		bad := err != nil || strings.Contains(string(out), "rror: ") || strings.HasPrefix(command, "redis-cli ") && refuses.Match(out)
		return string(out), bad
	}
	ran := map[string]bool{}
	for _, block := range regexp.MustCompile("(?s)```sh\n(.*?)```").FindAllStringSubmatch(string(b), -1) {
		for _, command := range strings.Split(strings.TrimSpace(block[1]), "\n") {
			if ran[command] {
				continue
			}
			ran[command] = true
			if out, bad := run(command); bad {
				t.Errorf("%s:\n%s", command, out)
			}
		}
	}
	if len(ran) < 20 {
		t.Errorf("only %d commands", len(ran))
	}

	// What the test must notice.
	for _, command := range []string{
		"redis-cli -p 6380 KEYS '*'",
		"redis-cli -p 6380 NOSUCHCOMMAND",
		"redis-cli -p 6380 AUTH wrong",
		"redis-cli -p 6380 CACHEPROXY NOSUCHCOMMAND",
		"curl -s http://127.0.0.1:9180/nowhere",
		`psql "$DATABASE_URL" -c 'SELECT * FROM nowhere'`,
		"cacheproxy nothing",
	} {
		if out, bad := run(command); !bad {
			t.Errorf("%s is not noticed:\n%s", command, out)
		}
	}
}
