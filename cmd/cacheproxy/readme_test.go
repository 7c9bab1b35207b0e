package main

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// tourStep is one command of the README's tour and what the README says that it prints.
type tourStep struct {
	line          int // of the README
	command, want string
}

// tourBlock is one ```console block of the tour. A comment right above it may say what differs from run to run:
//
//	<!-- varies: REGEX -->   what matches counts as equal, in the README and in the output
//	<!-- soon -->            the proxy needs a moment: the block is run again until it is as the README says
//	<!-- exit: 1 -->         the last command of the block ends with this code, which a shell does not print
//
// A comment by itself says what the test does between two blocks, such as what is started in another terminal: <!-- do: … -->.
//
// Everything else must be equal, except that a line of three dots stands for any lines.
type tourBlock struct {
	steps  []tourStep
	varies []*regexp.Regexp
	soon   bool
	exit   int    // of the last command
	do     string // what the test does instead
}

const (
	tourBegins = "<!-- tour: begin -->"
	tourEnds   = "<!-- tour: end -->"
)

var (
	varies   = regexp.MustCompile(`^<!-- varies: (.*) -->$`)
	exitsBy  = regexp.MustCompile(`^<!-- exit: (\d+) -->$`)
	betweens = regexp.MustCompile(`^<!-- do: (.*) -->$`)
)

// readTour reads the blocks of the tour.
func readTour(t *testing.T, path string) (blocks []*tourBlock) {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Contains(text, []byte(tourBegins)) || !bytes.Contains(text, []byte(tourEnds)) {
		t.Fatalf("%s has no tour between %q and %q", path, tourBegins, tourEnds)
	}
	inTour, inBlock := false, false
	next := &tourBlock{}
	lines := bufio.NewScanner(bytes.NewReader(text))
	for n := 1; lines.Scan(); n++ {
		line := lines.Text()
		switch m := varies.FindStringSubmatch(line); {
		case line == tourBegins:
			inTour = true
		case line == tourEnds:
			inTour = false
		case !inTour:
		case inBlock && line == "```":
			inBlock = false
			blocks, next = append(blocks, next), &tourBlock{}
		case inBlock && strings.HasPrefix(line, "$ "):
			next.steps = append(next.steps, tourStep{line: n, command: line[2:]})
		case inBlock && len(next.steps) == 0:
			t.Fatalf("%s:%d: a console block begins with a command", path, n)
		case inBlock:
			next.steps[len(next.steps)-1].want += line + "\n"
		case line == "```console":
			inBlock = true
		case strings.HasPrefix(line, "```"):
			t.Fatalf("%s:%d: every block of the tour is a console block", path, n)
		case m != nil:
			next.varies = append(next.varies, regexp.MustCompile(m[1]))
		case line == "<!-- soon -->":
			next.soon = true
		case exitsBy.MatchString(line):
			next.exit, _ = strconv.Atoi(exitsBy.FindStringSubmatch(line)[1])
		case betweens.MatchString(line):
			blocks = append(blocks, &tourBlock{do: betweens.FindStringSubmatch(line)[1]})
		case line != "": // prose between a comment and its block would leave the comment to another one
			if next.soon || next.varies != nil || next.exit != 0 {
				t.Fatalf("%s:%d: a comment for the test stands right above its block", path, n)
			}
		}
	}
	if lines.Err() != nil || inTour || inBlock {
		t.Fatalf("%s: the tour or one of its blocks does not end (%v)", path, lines.Err())
	}
	return blocks
}

// same compares an output with what the README says.
func (b *tourBlock) same(got, want string) bool {
	for _, re := range b.varies {
		got, want = re.ReplaceAllString(got, "*"), re.ReplaceAllString(want, "*")
	}
	var pattern strings.Builder
	pattern.WriteString(`\A`)
	for line := range strings.Lines(want) {
		if line == "...\n" {
			pattern.WriteString(`(?:.*\n)*`)
		} else {
			pattern.WriteString(regexp.QuoteMeta(line))
		}
	}
	pattern.WriteString(`\z`)
	return regexp.MustCompile(pattern.String()).MatchString(got)
}

// trimLines drops blanks at the ends of lines, which psql prints and editors remove, and empty lines at the end.
func trimLines(s string) string {
	var b strings.Builder
	for line := range strings.Lines(s) {
		b.WriteString(strings.TrimRight(line, " \r\n") + "\n")
	}
	return strings.TrimRight(b.String(), "\n") + "\n"
}

// whereabouts finds the ports and the process that dev tells of, in the order clients, Redis, its process, Postgres, HTTP.
var whereabouts = regexp.MustCompile(`redis-cli -p (\d+)\n.*redis-cli -p (\d+)  \(process (\d+)\)\n.*:(\d+)/app.*\n.*:(\d+)/healthz`)

var anyNumber = regexp.MustCompile(`\b\d+\b`)

// TestREADME does what the tour of the README says, with the program that these tests are, and compares what is printed.
// The ports and the process in the README's first block stand for those that dev tells of here.
func TestREADME(t *testing.T) {
	for _, name := range []string{"redis-cli", "psql"} {
		if _, err := exec.LookPath(name); err != nil {
			t.Fatalf("the tour needs %s: %v", name, err)
		}
	}
	blocks := readTour(t, filepath.Join("..", "..", "README.md"))
	if len(blocks) < 2 || blocks[0].steps[0].command != "make run" {
		t.Fatal("the tour begins with make run and goes on")
	}

	// In a directory of its own dev is what make run makes of it; the ports it finds by itself.
	s := newSite(t, "", "")
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(s.dir, "bin"), 0o755); err != nil {
		t.Fatal(err)
	}
	script := fmt.Sprintf("#!/bin/sh\n%s=1 exec %q \"$@\"\n", asProgram, self)
	if err := os.WriteFile(filepath.Join(s.dir, "bin", "cacheproxy"), []byte(script), 0o755); err != nil { //nolint:gosec // it is run
		t.Fatal(err)
	}
	dev := s.exec("dev")
	eventually(t, "dev is ready", func() bool { return s.stdout.has("What was counted.") || ended(dev) })
	if ended(dev) {
		t.Fatalf("dev ended with %d", dev.code(t))
	}

	here, there := whereabouts.FindStringSubmatch(s.stdout.String()), whereabouts.FindStringSubmatch(blocks[0].steps[0].want)
	if here == nil || there == nil {
		t.Fatalf("the addresses are not found in what dev says or in the README:\n%s", s.stdout.String())
	}
	actual := map[string]string{}
	for i, n := range there[1:] {
		actual[n] = here[1+i]
	}
	translate := func(text string) string {
		return anyNumber.ReplaceAllStringFunc(text, func(n string) string {
			if a, ok := actual[n]; ok {
				return a
			}
			return n
		})
	}

	// A tour that breaks off must not leave a server that hangs.
	pid, err := strconv.Atoi(here[3])
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = syscall.Kill(pid, syscall.SIGCONT) }) // usually it runs, or has ended

	for _, b := range blocks {
		b.run(t, "README.md", func(command string) string {
			if command == "make run" {
				return s.stdout.String()
			}
			return s.shell(translate(command))
		}, translate)
	}
	dev.signal(t, syscall.SIGINT)
	if code := dev.code(t); code != exitFine {
		t.Errorf("exit code %d after Ctrl-C", code)
	}
}

// run types the commands of a block and compares what is printed. shell runs one; translate says what stands for what in the document.
func (b *tourBlock) run(t *testing.T, document string, shell, translate func(string) string) {
	t.Helper()
	for tries := time.Now().Add(patience); ; time.Sleep(50 * time.Millisecond) {
		wrong := ""
		for i, step := range b.steps {
			got, want := trimLines(shell(step.command)), step.want
			if b.exit != 0 && i == len(b.steps)-1 {
				want += fmt.Sprintf("exit status %d\n", b.exit)
			}
			if want = trimLines(translate(want)); !b.same(got, want) {
				wrong = fmt.Sprintf("%s:%d: $ %s\nprints\n%sand the document says\n%s", document, step.line, step.command, got, want)
				break
			}
		}
		if wrong == "" {
			break
		}
		if !b.soon || time.Now().After(tries) {
			t.Fatal(wrong)
		}
	}
	for _, re := range b.varies {
		used := false
		for _, step := range b.steps {
			used = used || re.MatchString(step.want)
		}
		if !used {
			t.Errorf("%s:%d: nothing varies like %q", document, b.steps[0].line, re)
		}
	}
}

// shell runs a command of the tour and returns what it prints, as it prints it on a terminal.
func (s *site) shell(command string, env ...string) string {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, "sh", "-c", command)
	cmd.Dir = s.dir
	// redis-cli writes replies for people only to a terminal, unless this says that there is one.
	cmd.Env = append([]string{"FAKETTY=1", "PATH=" + os.Getenv("PATH"), "HOME=" + s.dir, "LC_ALL=C.UTF-8", "PAGER=cat"}, env...)
	cmd.WaitDelay = time.Second
	out, err := cmd.CombinedOutput()
	if ctx.Err() != nil {
		return string(out) + "no answer in time\n"
	}
	if err != nil {
		return string(out) + err.Error() + "\n"
	}
	return string(out)
}
