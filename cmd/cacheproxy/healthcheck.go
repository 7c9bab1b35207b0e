package main

import (
	"cmp"

	"cacheproxy/internal/config"

	"github.com/spf13/cobra"
)

func (c *cli) healthcheckCommand() *cobra.Command {
	var observe string
	cmd := &cobra.Command{
		Use:   "healthcheck",
		Short: "Exit with 0 if the proxy is alive, for probes and images without a shell",
		Args:  usage(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			address, broken := c.observeAddress(observe)
			if broken != nil {
				// A bad new file must not get a process killed that runs well with the old one. Its address is asked
				// where it usually is.
				chosen, _ := c.getenv("CACHEPROXY_OBSERVE")
				address = cmp.Or(chosen, config.Defaults().Observe.Address)
			}
			if _, err := ask(cmd.Context(), address, "/livez"); err != nil {
				return cmp.Or(broken, err)
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&observe, "observe", "", "the proxy's observe address (default: that of the configuration)")
	return cmd
}
