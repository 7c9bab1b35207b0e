package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"

	"cacheproxy/fallback"
	"cacheproxy/internal/transfer"
	"cacheproxy/policy"

	"github.com/spf13/cobra"
)

func (c *cli) migrateCommand() *cobra.Command {
	var shared transferFlags
	var opt transfer.Options
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "migrate",
		Short: "Copy what Redis lacks of a route from Postgres, or back with --reverse",
		Long: "Promotes every row of a route that Redis lacks, with its remaining TTL, beside sidecars and writers: nothing that Redis\n" +
			"has is touched, and nothing becomes stale. It slows down when a store does. Ctrl-C ends it with a checkpoint, from which\n" +
			"--resume goes on, on this machine or another. --reverse copies what only Redis has into Postgres, as a write would.\n" +
			"Exits with 0 if everything is where it should be, 1 if some rows could not be copied, 2 for wrong usage, 3 if a store\n" +
			"was in trouble for too long, 78 if the configuration has mistakes, and 130 if it was interrupted.",
		Args: usage(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return c.migrate(cmd.Context(), &shared, opt, asJSON)
		},
	}
	shared.register(cmd)
	cmd.Flags().BoolVar(&opt.Reverse, "reverse", false, "copy what only Redis has into Postgres")
	cmd.Flags().BoolVar(&opt.DryRun, "dry-run", false, "touch nothing, and say what would be done")
	cmd.Flags().BoolVar(&opt.Resume, "resume", false, "go on from the checkpoint of the last run")
	cmd.Flags().IntVar(&opt.Rate, "rate", 0, "rows a second at most (default: as fast as the stores allow)")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print the report as JSON")
	return cmd
}

func (c *cli) migrate(ctx context.Context, shared *transferFlags, opt transfer.Options, asJSON bool) error {
	switch {
	case opt.Rate < 0:
		return &failure{exitUsage, errors.New("--rate must not be negative")}
	case opt.Resume && opt.DryRun:
		return &failure{exitUsage, errors.New("--resume has nothing to do in a --dry-run, which looks at everything")}
	}
	t, err := c.openTransfer(shared, func(r *policy.Route) error { return transfer.Allowed(r, opt.Reverse) })
	if err != nil {
		return err
	}
	defer t.close()
	opt.Route, opt.Router = t.route, t.router
	opt.Workers, opt.Patience = shared.workers, shared.patience
	opt.MaxValue, opt.Store = int64(t.cfg.Postgres.MaxValue), t.identity()
	opt.Progress = transfer.NewProgress(c.stderr, columnsOf(c.stderr))

	if !opt.DryRun {
		if err := t.reach(ctx, shared, t.db.EnsureSchema); err != nil {
			return transferFailure(err)
		}
		var right *fallback.Transfer
		err := t.reach(ctx, shared, func(ctx context.Context) (err error) {
			right, err = t.db.OpenTransfer(ctx, t.route.Name, direction(opt.Reverse))
			return err
		})
		if err != nil {
			return transferFailure(taken(err, t.route.Name))
		}
		defer right.Close()
		t.stores.Ledger = right
	}
	report, err := transfer.Migrate(ctx, t.stores, opt)
	if report.Rows > 0 || err == nil {
		if err := c.printReport(&report, asJSON); err != nil {
			return err
		}
	}
	gave, hopeless := errors.AsType[*transfer.Unreachable](err)
	unsaved, lost := errors.AsType[*transfer.Unsaved](err)
	switch {
	case errors.Is(err, transfer.ErrInterrupted) && lost:
		return &failure{exitInterrupted, fmt.Errorf("interrupted: %w", unsaved)}
	case hopeless && lost:
		return &failure{exitUnreachable, fmt.Errorf("%w: %w", gave, unsaved)}
	case errors.Is(err, transfer.ErrInterrupted) && !opt.DryRun:
		fmt.Fprintln(c.stderr, "cacheproxy: interrupted; the same command with --resume goes on")
		return &failure{code: exitInterrupted}
	case err != nil:
		return transferFailure(taken(err, t.route.Name))
	case !report.OK():
		return &failure{code: exitNot} // the report says why
	}
	return nil
}

func (c *cli) printReport(r *transfer.Report, asJSON bool) error {
	if asJSON {
		e := json.NewEncoder(c.stdout)
		e.SetIndent("", "  ")
		return e.Encode(r)
	}
	r.Print(c.stdout)
	return nil
}

// direction is a word for the ledger.
func direction(reverse bool) string {
	if reverse {
		return "reverse"
	}
	return "forward"
}

// taken says what to do about somebody who is at it already.
func taken(err error, route string) error {
	if !errors.Is(err, fallback.ErrTransferring) {
		return err
	}
	return fmt.Errorf("another migrate of the route %s runs in this direction: wait for it, or end it; SELECT pid, client_addr FROM pg_stat_activity JOIN pg_locks USING (pid) WHERE locktype = 'advisory' AND classid = %d says where it is", route, fallback.TransferLockClass)
}
