package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"

	"cacheproxy/internal/config"

	"github.com/spf13/cobra"
	"go.uber.org/zap"
)

// overrides are the flags that stand above the configuration file and the environment.
type overrides struct{ listen, logLevel string }

func (o *overrides) register(cmd *cobra.Command) {
	cmd.Flags().StringVar(&o.listen, "listen", "", "address for clients: host:port or unix:///path")
	cmd.Flags().StringVar(&o.logLevel, "log-level", "", "debug, info, warn or error")
}

func (o *overrides) options() []config.Option {
	var out []config.Option
	if o.listen != "" {
		out = append(out, config.Override("--listen", "listen.address", o.listen))
	}
	if o.logLevel != "" {
		out = append(out, config.Override("--log-level", "log.level", o.logLevel))
	}
	return out
}

func (c *cli) serveCommand() *cobra.Command {
	var flags overrides
	cmd := &cobra.Command{
		Use:   "serve",
		Short: "Run the proxy (the default command)",
		Args:  usage(cobra.NoArgs),
		RunE:  func(cmd *cobra.Command, _ []string) error { return c.serve(cmd.Context(), &flags) },
	}
	flags.register(cmd)
	return cmd
}

func (c *cli) serve(ctx context.Context, flags *overrides) error {
	path := c.path()
	load := func() (*config.Config, error) { return c.load(path, flags.options()...) }
	cfg, err := load()
	if err != nil {
		return err
	}
	p, err := newProcess(cfg, source{path, load}, c.stderr)
	if err != nil {
		return err
	}
	if limit := limitMemory(c.getenv, os.DirFS("/")); limit > 0 {
		p.log.Info("the memory limit of the container is heeded", zap.Int64("bytes", limit))
	}
	hangup := make(chan os.Signal, 1)
	signal.Notify(hangup, syscall.SIGHUP)
	defer signal.Stop(hangup)
	p.hangup = hangup
	return p.run(ctx)
}
