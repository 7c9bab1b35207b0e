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

// Every command of docs/troubleshooting.md does what it should where nothing is wrong: it ends well.
func TestTroubleshootingCommands(t *testing.T) {
	b, err := os.ReadFile("../../" + runbook)
	if err != nil {
		t.Fatal(err)
	}
	s := newSite(t, testenv.Redis(t).URL(), testenv.Postgres(t))
	s.write(routes)
	s.execBuilt("serve", "--config", s.config)
	s.started()
	s.do("SET", "user:1", "v")
	program := testenv.Program(t)
	bin := filepath.Join(s.dir, "bin")
	if err := os.Mkdir(bin, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(program, filepath.Join(bin, "cacheproxy")); err != nil {
		t.Fatal(err)
	}
	here := strings.NewReplacer("-p 6380", "-s "+s.socket, "127.0.0.1:9180", s.observe)
	ran := map[string]bool{}
	for _, block := range regexp.MustCompile("(?s)```sh\n(.*?)```").FindAllStringSubmatch(string(b), -1) {
		for _, command := range strings.Split(strings.TrimSpace(block[1]), "\n") {
			if ran[command] {
				continue
			}
			ran[command] = true
			cmd := exec.Command("bash", "-o", "pipefail", "-c", here.Replace(command))
			cmd.Env = append(s.env(), "PATH="+bin+":"+os.Getenv("PATH"), "HOME="+s.dir, "CACHEPROXY_CONFIG="+s.config)
			cmd.Dir = s.dir
			out, err := cmd.CombinedOutput()
			if err != nil || strings.HasPrefix(string(out), "ERR") || strings.Contains(string(out), "rror: ") {
				t.Errorf("%s: %v\n%s", command, err, out)
			}
		}
	}
	if len(ran) < 20 {
		t.Errorf("only %d commands", len(ran))
	}
}
