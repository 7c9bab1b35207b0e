// Package step lets a client's program run its scenario in named steps and tell the test how each one went.
//
// A program is started as `program host port protocol`. It prints one line for each step, `ok NAME` or `failed NAME: why`,
// and exits with 1 if any failed. When it prints `restart` the test restarts the server on the same port and answers `done`.
// step.mjs and step.php are the same in JavaScript and PHP; the other languages have one program each and say it in there.
package step

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"os"
	"reflect"
	"strconv"
	"strings"
	"time"
)

// Bound limits a step, and every wait in it: what should take milliseconds has not happened when it is over.
const Bound = 10 * time.Second

// Step is a part of the scenario. Do fails it by calling Ok, Equal or Fail.
type Step struct {
	Name string
	Do   func(ctx context.Context)
}

// Where the server is, and which version of its protocol to speak.
var (
	Host     string
	Port     string
	Protocol int
)

// Addr is host:port.
func Addr() string { return net.JoinHostPort(Host, Port) }

// Run runs all steps, also when one has failed, and ends the program.
func Run(steps ...Step) {
	if len(os.Args) != 4 {
		fmt.Fprintf(os.Stderr, "usage: %s host port protocol\n", os.Args[0])
		os.Exit(2)
	}
	Host, Port = os.Args[1], os.Args[2]
	var err error
	if Protocol, err = strconv.Atoi(os.Args[3]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(2)
	}
	code := 0
	for _, s := range steps {
		if why := s.run(); why != "" {
			fmt.Printf("failed %s: %s\n", s.Name, oneLine(why))
			code = 1
		} else {
			fmt.Printf("ok %s\n", s.Name)
		}
	}
	os.Exit(code)
}

type failure string

func (s Step) run() (why string) {
	ctx, cancel := context.WithTimeout(context.Background(), Bound)
	defer cancel()
	defer func() {
		switch r := recover().(type) {
		case nil:
		case failure:
			why = string(r)
		default:
			panic(r)
		}
	}()
	s.Do(ctx)
	return ""
}

// oneLine makes a line of it, of a length that can be read.
func oneLine(s string) string {
	s = strings.NewReplacer("\r", `\r`, "\n", `\n`).Replace(s)
	return s[:min(len(s), 1000)]
}

// Fail ends the step.
func Fail(format string, args ...any) { panic(failure(fmt.Sprintf(format, args...))) }

// Ok fails the step if there is an error.
func Ok(what string, err error) {
	if err != nil {
		Fail("%s: %v", what, err)
	}
}

// Equal fails the step unless both are the same.
func Equal(what string, got, want any) {
	if !reflect.DeepEqual(got, want) {
		Fail("%s: got %#v, want %#v", what, got, want)
	}
}

// Refused fails the step unless the error is Redis's own and begins with code.
func Refused(what string, err error, code string) {
	if err == nil || !strings.HasPrefix(err.Error(), code+" ") {
		Fail("%s: got the error %v, want %s", what, err, code)
	}
}

// Contains fails the step unless s has part in it.
func Contains(what, s, part string) {
	if !strings.Contains(s, part) {
		Fail("%s: %q lacks %q", what, s, part)
	}
}

// Until waits for what another connection does to be seen.
func Until(ctx context.Context, what string, done func() bool) {
	for !done() {
		select {
		case <-ctx.Done():
			Fail("it never happened: %s", what)
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// Receive takes one value from ch.
func Receive[T any](ctx context.Context, what string, ch <-chan T) T {
	select {
	case v := <-ch:
		return v
	case <-ctx.Done():
	}
	Fail("nothing came: %s", what)
	panic("unreachable")
}

var stdin = bufio.NewReader(os.Stdin)

// Restart asks the test to restart the server and returns when it listens again.
func Restart() {
	fmt.Println("restart")
	if line, err := stdin.ReadString('\n'); err != nil || line != "done\n" {
		Fail("the server was not restarted: %q, %v", line, err)
	}
}
