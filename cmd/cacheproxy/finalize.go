package main

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"cacheproxy/fallback"
	"cacheproxy/internal/config"
	"cacheproxy/policy"

	"github.com/spf13/cobra"
	"go.uber.org/zap"
)

func (c *cli) finalizeCommand() *cobra.Command {
	var route string
	var yes bool
	cmd := &cobra.Command{
		Use:   "finalize --route R",
		Short: "Print the SQL that removes the store of a route in phase3; with --yes, run it",
		Long: "Drops the proxy's table if no other route uses it, else the route's rows; of an adopted column, the column.\n" +
			"Refuses while anything may still read it: a sidecar that was seen in a phase with a store within a minute, an entry of the\n" +
			"journal, a configuration that does not say phase3, or an object of the database that depends on it.\n" +
			"Exits with 1 if it refuses or fails, 3 if Postgres is unreachable.",
		Args: usage(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error { return c.finalize(cmd.Context(), route, yes) },
	}
	cmd.Flags().StringVar(&route, "route", "", "the route whose store is removed")
	cmd.Flags().BoolVar(&yes, "yes", false, "run the SQL; what is dropped does not come back")
	return cmd
}

func (c *cli) finalize(ctx context.Context, name string, yes bool) error {
	if name == "" {
		return &failure{exitUsage, errors.New("name the route with --route")}
	}
	cfg, err := c.load(c.path())
	if err != nil {
		return err
	}
	removal, against, err := removalOf(cfg, name)
	if err != nil {
		return &failure{exitUsage, err}
	}
	if cfg.Postgres.URL == "" {
		return &failure{exitUsage, errors.New("postgres.url is empty: set it, or DATABASE_URL, for this command")}
	}
	s, err := newFallback(cfg, zap.NewNop())
	if err != nil {
		return &failure{exitConfig, err}
	}
	defer s.Close()
	plan, err := s.PlanRemoval(ctx, removal)
	if err != nil {
		return c.notFinalized(plan, err)
	}
	if against = append(against, plan.Against...); len(against) > 0 {
		fmt.Fprintf(c.stdout, "The store of route %s is not removed:\n", name)
		for _, why := range against {
			fmt.Fprintf(c.stdout, "  - %s\n", why)
		}
		return &failure{code: exitNot}
	}
	if plan.Done {
		fmt.Fprintf(c.stdout, "-- Route %s has nothing in Postgres.\n", name)
		return nil
	}
	for _, what := range plan.Goes {
		fmt.Fprintf(c.stdout, "-- note: %s\n", what)
	}
	for _, sql := range plan.Statements {
		fmt.Fprintln(c.stdout, sql)
	}
	if !yes {
		if plan.Held != nil {
			fmt.Fprintf(c.stdout, "-- %s; it could not be tried now.\n", plan.Held)
		}
		fmt.Fprintln(c.stdout, "-- Nothing was changed. With --yes it is run.")
		return nil
	}
	err = s.Finalize(ctx, plan, removal, func(deleted int64, held error) {
		if held != nil {
			fmt.Fprintf(c.stderr, "waiting: %s\n", held)
		} else {
			fmt.Fprintf(c.stderr, "%d rows deleted\n", deleted)
		}
	})
	if err != nil {
		return c.notFinalized(plan, err)
	}
	fmt.Fprintf(c.stdout, "-- Done. Take the store of route %s out of the configuration of all sidecars; when no route has one, postgres.url too,\n"+
		"-- and what is left of the proxy is gone with DROP SCHEMA cacheproxy CASCADE.\n", name)
	return nil
}

// notFinalized says why it failed, and what can be done.
func (c *cli) notFinalized(plan fallback.RemovalPlan, err error) error {
	if fallback.Unavailable(err) {
		return &failure{exitUnreachable, fmt.Errorf("postgres cannot be used: %s", reason(err))}
	}
	if held, ok := errors.AsType[*fallback.HeldError](err); ok {
		return fmt.Errorf("%w; nothing was removed, try again when it has let go", held)
	}
	if blocks, ok := errors.AsType[*fallback.DependentError](err); ok {
		return blocks
	}
	if fallback.Denied(err) {
		return fmt.Errorf("this role may not do it (%s); let the owner of the table run what `cacheproxy finalize` prints: %s", reason(err), strings.Join(plan.Statements, " "))
	}
	return errors.New(reason(err))
}

// removalOf says what goes with a route, and what the configuration has against it.
func removalOf(cfg *config.Config, name string) (fallback.Removal, []string, error) {
	r := fallback.Removal{Route: name}
	var against []string
	found := false
	for i, route := range cfg.PolicyRoutes() {
		r.Known = append(r.Known, route.Name)
		if route.Name != name {
			if adopted(cfg.Routes[i]) == nil && route.Phase.Rules().UsesStore {
				r.Others = append(r.Others, route.Name)
			}
			continue
		}
		found = true
		r.Column = adopted(cfg.Routes[i])
		if route.Phase.Rules().UsesStore {
			against = append(against, fmt.Sprintf("the configuration has it in %s, which uses the store; write phase: %s there, and let all sidecars follow", route.Phase, policy.Phase3))
		}
	}
	if !found {
		return r, nil, fmt.Errorf("the configuration has no route %s", name)
	}
	for _, route := range cfg.Routes {
		if other := adopted(route); route.Name != name && other != nil && r.Column != nil && *other == *r.Column {
			against = append(against, fmt.Sprintf("route %s has the same column; take one of the two out of the configuration", route.Name))
		}
	}
	return r, against, nil
}

// adopted is the column that a route has for a store, nil if its rows are in the proxy's own table.
func adopted(r config.Route) *fallback.AdoptedColumn {
	if r.Store.Kind != "column" {
		return nil
	}
	schema, table, _ := policy.ParseTable(r.Store.Table) // the configuration was checked
	return &fallback.AdoptedColumn{Schema: schema, Table: table, Column: r.Store.ValueColumn}
}
