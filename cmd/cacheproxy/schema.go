package main

import (
	"fmt"
	"io"

	"cacheproxy/fallback"

	"github.com/spf13/cobra"
)

func (c *cli) schemaCommand() *cobra.Command {
	route := ""
	cmd := &cobra.Command{
		Use:   "schema",
		Short: "Print the SQL of the proxy's own tables, or of what records a column's changes",
		Long: "Prints the statements that create the schema cacheproxy. They may be run any number of times.\n" +
			"serve and check run them by themselves where rights allow.\n\n" +
			"With --route it prints, for a route whose store is a column, triggers that record what others change there,\n" +
			"so that it reaches Redis within journal.poll. They are optional; nobody but you runs them.",
		Args: usage(cobra.NoArgs),
		RunE: func(*cobra.Command, []string) error {
			sql := fallback.SchemaSQL()
			if route != "" {
				var err error
				if sql, err = c.triggerSQL(route); err != nil {
					return err
				}
			}
			_, err := io.WriteString(c.stdout, sql)
			return err
		},
	}
	cmd.Flags().StringVar(&route, "route", "", "print the triggers for the column of this route")
	return cmd
}

// triggerSQL is what records the changes of a route's column.
func (c *cli) triggerSQL(route string) (string, error) {
	cfg, err := c.load(c.path())
	if err != nil {
		return "", err
	}
	for _, column := range columns(cfg, cfg.PolicyRoutes()) {
		if column.Route == route {
			return fallback.TriggerSQL(column)
		}
	}
	for _, r := range cfg.Routes {
		if r.Name == route {
			return "", &failure{exitConfig, fmt.Errorf("the store of route %s is the proxy's own table, which nobody else writes", route)}
		}
	}
	return "", &failure{exitConfig, fmt.Errorf("no route is called %q", route)}
}
