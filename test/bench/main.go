//go:build linux

// Command bench measures the built proxy beside Redis itself, HAProxy and twemproxy, and beside a Postgres that is asked without it.
// It starts everything privately and asserts no timing: it writes down what it saw, with the bars that the project has set itself.
//
// plan.go says what is measured. stack.go starts the servers, grid.go, latency.go and postgres.go measure, each by rounds in which every
// target has its turn. result.go is what is kept, bars.go what it is held against, report.go and picture.go how it is
// shown, compare.go how two of them are.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"
)

func main() {
	quick := flag.Bool("quick", false, "fewer points and shorter rounds, five minutes in all")
	bin := flag.String("bin", "bin/cacheproxy", "the proxy")
	dir := flag.String("dir", "bench", "where the results go")
	name := flag.String("name", "latest", "their name, without .md, .json and .svg")
	compare := flag.Bool("compare", false, "measure nothing: print two results, the .json files named behind the flags, beside each other")
	flag.Parse()
	if *compare {
		if err := printComparison(flag.Args()); err != nil {
			fmt.Fprintln(os.Stderr, "bench:", err)
			os.Exit(1)
		}
		return
	}
	runtime.LockOSThread() // children are told when the thread that started them ends: the first one ends last
	ctx, cancel := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	err := run(ctx, *quick, *bin, filepath.Join(*dir, *name))
	cancel()
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, quick bool, bin, out string) (err error) {
	begun := time.Now()
	p := full
	if quick {
		p = short
	}
	programs, err := find()
	if err != nil {
		return err
	}
	say("starting")
	s, err := start(ctx, programs, bin, p)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.stop()) }()
	r := &Result{At: begun.UTC().Truncate(time.Second), Quick: quick, Rounds: p.rounds, Slice: p.slice.Seconds(), CPUs: runtime.NumCPU()}
	r.describe(ctx, s)
	steps := []struct {
		what string
		do   func(context.Context, *stack, plan, *Result) error
	}{
		{"memory", memory}, {"one client", alone}, {"grid", grid}, {"half load", halfLoad},
		{"misses", misses}, {"writes", writes}, {"herd", herd}, {"memory afterwards", afterwards},
	}
	for _, step := range steps {
		say("%s", step.what)
		err := step.do(ctx, s, p, r)
		if ctx.Err() != nil {
			return errors.New("interrupted; nothing is written")
		}
		if err != nil {
			return fmt.Errorf("%s: %w", step.what, err)
		}
	}
	r.Seconds = time.Since(begun).Seconds()
	if err := write(r, out); err != nil {
		return err
	}
	fmt.Print(markdown(r, filepath.Base(out)))
	say("written: %s.md, .json and .svg", out)
	return nil
}

func printComparison(files []string) error {
	if len(files) != 2 {
		return errors.New("-compare wants two files, such as bench/before.json bench/latest.json")
	}
	before, err := load(files[0])
	if err != nil {
		return err
	}
	after, err := load(files[1])
	if err != nil {
		return err
	}
	fmt.Print(comparison(before, after))
	return nil
}

func write(r *Result, out string) error {
	b, err := json.MarshalIndent(r, "", " ")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(out), 0o755); err != nil {
		return err
	}
	return errors.Join(
		os.WriteFile(out+".json", append(b, '\n'), 0o644),
		os.WriteFile(out+".md", []byte(markdown(r, filepath.Base(out))), 0o644),
		os.WriteFile(out+".svg", []byte(picture(r)), 0o644))
}

// describe notes what was measured.
func (r *Result) describe(ctx context.Context, s *stack) {
	first := func(program string, args ...string) string {
		b, _ := command(ctx, program, args...).CombinedOutput()
		line, _, _ := strings.Cut(strings.TrimSpace(string(b)), "\n")
		return line
	}
	r.Commit = first("git", "describe", "--always", "--dirty", "--abbrev=12")
	r.Versions = []string{
		runtime.Version(), first(s.programs["redis-server"], "--version"), first(s.programs["haproxy"], "-v"),
		first(s.programs["nutcracker"], "--version"), first(s.programs["pgbench"], "--version"),
	}
}

var begun = time.Now()

func say(format string, args ...any) {
	fmt.Fprintf(os.Stderr, "%4.0fs  %s\n", time.Since(begun).Seconds(), fmt.Sprintf(format, args...))
}
