// Command cacheproxy runs beside an application and speaks RESP: behind it stand a Redis and the Postgres whose JSONB
// is leaving for it. This package wires the others together and decides nothing itself.
//
// Read serve.go first, then process.go, which is what serve and dev run; every other subcommand has its file.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"cacheproxy/internal/config"

	"github.com/spf13/cobra"
)

// Exit codes.
const (
	exitFine        = 0
	exitNot         = 1  // the thing asked about is not so, or the work failed
	exitUsage       = 2  // wrong usage
	exitUnreachable = 3  // a store is unreachable
	exitConfig      = 78 // bad configuration: EX_CONFIG of sysexits.h, so that a supervisor need not try again
	// exitInterrupted is what a shell says of a command that Ctrl-C has ended: the work is not done, and can be gone on with.
	exitInterrupted = 130
)

func main() {
	ctx, cancel := context.WithCancel(context.Background())
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM)
	go func() {
		<-signals
		cancel()
		// The default action would not do: the kernel spares the first process of a container from it.
		<-signals
		os.Exit(exitNot)
	}()
	os.Exit(exitCode(run(ctx, os.Args[1:], os.Environ(), os.Stdout, os.Stderr), os.Stderr))
}

// run executes one command line. env is in the form of os.Environ. When ctx ends, what runs stops in order.
func run(ctx context.Context, args, env []string, stdout, stderr io.Writer) error {
	c := &cli{env: env, stdout: stdout, stderr: stderr}
	root := c.root()
	root.SetArgs(args)
	root.SetOut(stdout)
	root.SetErr(stderr)
	return root.ExecuteContext(ctx)
}

// cli is what all subcommands share.
type cli struct {
	env            []string
	stdout, stderr io.Writer

	config string // --config
}

func (c *cli) root() *cobra.Command {
	serve := c.serveCommand()
	root := &cobra.Command{
		Use:           "cacheproxy",
		Short:         "A Redis-compatible sidecar that falls back to Postgres JSONB",
		Long:          "cacheproxy speaks RESP in front of a Redis, answers from Postgres JSONB what Redis lacks, and moves an application\nfrom one to the other phase by phase. Without a subcommand it serves.",
		Args:          usage(cobra.NoArgs),
		RunE:          serve.RunE,
		SilenceErrors: true,
		SilenceUsage:  true,
	}
	root.PersistentFlags().StringVar(&c.config, "config", "", "configuration file (default: "+config.DefaultPath+", if there is one)")
	root.Flags().AddFlagSet(serve.Flags())
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return &failure{exitUsage, err} })
	root.AddCommand(serve, c.devCommand(), c.checkCommand(), c.schemaCommand(), c.migrateCommand(), c.verifyCommand(), c.statsCommand(), c.phaseCommand(),
		c.finalizeCommand(), c.healthcheckCommand(), c.versionCommand())
	return root
}

// usage makes what a check of the arguments refuses an error of usage.
func usage(check cobra.PositionalArgs) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if err := check(cmd, args); err != nil {
			return &failure{exitUsage, err}
		}
		return nil
	}
}

// load reads the configuration. Of the overrides, flags that were not given are left out.
func (c *cli) load(path string, overrides ...config.Option) (*config.Config, error) {
	return config.Load(path, c.getenv, append([]config.Option{config.Environ(c.env)}, overrides...)...)
}

// path is the file that load reads, "" if there is none.
func (c *cli) path() string { return config.Path(c.config, c.getenv) }

func (c *cli) getenv(name string) (string, bool) {
	for i := len(c.env) - 1; i >= 0; i-- {
		if value, ok := strings.CutPrefix(c.env[i], name+"="); ok {
			return value, true
		}
	}
	return "", false
}

// failure is an error with the exit code that it means. Without one an error means exitNot. A nil err has been reported
// already.
type failure struct {
	code int
	err  error
}

func (f *failure) Error() string {
	if f.err == nil {
		return fmt.Sprintf("exit code %d", f.code)
	}
	return f.err.Error()
}

func (f *failure) Unwrap() error { return f.err }

// exitCode reports err and returns its exit code.
func exitCode(err error, stderr io.Writer) int {
	if err == nil {
		return exitFine
	}
	f, _ := errors.AsType[*failure](err)
	bad, isConfig := errors.AsType[*config.Error](err)
	switch {
	case isConfig:
		fmt.Fprintf(stderr, "cacheproxy: the configuration has mistakes\n%s\n", bad)
		return exitConfig
	case f == nil:
		fmt.Fprintln(stderr, "cacheproxy:", err)
		return exitNot
	}
	if f.err != nil {
		fmt.Fprintln(stderr, "cacheproxy:", f.err)
	}
	if f.code == exitUsage {
		fmt.Fprintln(stderr, "Run 'cacheproxy --help' for usage.")
	}
	return f.code
}
