package main

import (
	"io"

	"cacheproxy/fallback"

	"github.com/spf13/cobra"
)

func (c *cli) schemaCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "schema",
		Short: "Print the SQL of the proxy's own tables",
		Long:  "Prints the statements that create the schema cacheproxy. They may be run any number of times.\nserve and check run them by themselves where rights allow.",
		Args:  usage(cobra.NoArgs),
		RunE: func(*cobra.Command, []string) error {
			_, err := io.WriteString(c.stdout, fallback.SchemaSQL())
			return err
		},
	}
}
