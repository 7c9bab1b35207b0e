package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"cacheproxy/internal/transfer"

	"github.com/spf13/cobra"
)

const (
	verifyRounds = 3
	// maxRounds bounds the flag. More rounds find nothing that ten do not.
	maxRounds = 100
	// verifyPause is the least between rounds; and at least pollsBetween polls of the journal, in which every sidecar repairs what it knows of.
	verifyPause  = time.Second
	pollsBetween = 3
)

func (c *cli) verifyCommand() *cobra.Command {
	var shared transferFlags
	var opt transfer.VerifyOptions
	var sample string
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "verify",
		Short: "Compare what Redis and Postgres hold of a route",
		Long: "Compares every row of a route, or a sample, with Redis, and looks for Redis's keys in Postgres. What differs is looked at again\n" +
			"in several rounds: only keys that nobody has touched meanwhile and that wait for no repair count. A key that one store lacks\n" +
			"counts with --complete only: Redis may have evicted it, and from phase2 on Postgres is not to have it. --repair makes the\n" +
			"copies equal again as the phase says: in phase0 and phase1 the row is right, from phase2 on Redis.\n" +
			"Exits with 0 if nothing that counts is left, 1 if there is a difference, 2 for wrong usage, 3 if a store was in trouble for\n" +
			"too long, 78 if the configuration has mistakes, and 130 if it was interrupted.",
		Args: usage(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return c.verify(cmd.Context(), &shared, opt, sample, asJSON)
		},
	}
	shared.register(cmd)
	cmd.Flags().StringVar(&sample, "sample", "", "compare only about so many keys, or such a share of them (1000, 5%)")
	cmd.Flags().IntVar(&opt.Rounds, "rounds", verifyRounds, "how often a key must be found different until it counts")
	cmd.Flags().DurationVar(&opt.Pause, "pause", 0, "between rounds (default: 1s, or three times journal.poll)")
	cmd.Flags().BoolVar(&opt.Complete, "complete", false, "a key that one store lacks counts too (from phase2 on: one that Redis lacks)")
	cmd.Flags().BoolVar(&opt.Repair, "repair", false, "make the copies of what counts equal")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print the result as JSON")
	return cmd
}

func (c *cli) verify(ctx context.Context, shared *transferFlags, opt transfer.VerifyOptions, sample string, asJSON bool) error {
	var err error
	if opt.Share, opt.Sample, err = parseSample(sample); err != nil {
		return &failure{exitUsage, err}
	}
	if opt.Rounds < 1 || opt.Rounds > maxRounds {
		return &failure{exitUsage, fmt.Errorf("--rounds must be from 1 to %d", maxRounds)}
	}
	if opt.Pause < 0 {
		return &failure{exitUsage, errors.New("--pause must not be negative")}
	}
	t, err := c.openTransfer(shared, transfer.Comparable)
	if err != nil {
		return err
	}
	defer t.close()
	if opt.Pause == 0 {
		opt.Pause = max(verifyPause, pollsBetween*t.cfg.Journal.Poll)
	}
	opt.Route, opt.Router, opt.Exact = t.route, t.router, t.store.Kind == "table"
	opt.Workers, opt.Patience = shared.workers, shared.patience
	opt.Progress = transfer.NewProgress(c.stderr, columnsOf(c.stderr))
	v, err := transfer.Verify(ctx, t.stores, opt)
	if err == nil || v.StoreKeys+v.RedisKeys > 0 {
		if asJSON {
			e := json.NewEncoder(c.stdout)
			e.SetIndent("", "  ")
			if err := e.Encode(v); err != nil {
				return err
			}
		} else {
			v.Print(c.stdout)
		}
	}
	switch {
	case err != nil:
		return transferFailure(err)
	case !v.OK:
		return &failure{code: exitNot} // the verdict has been printed
	}
	return nil
}

// parseSample reads a number of keys or a share of them; "" is all.
func parseSample(text string) (share float64, keys int64, err error) {
	if text == "" {
		return 1, 0, nil
	}
	if percent, ok := strings.CutSuffix(text, "%"); ok {
		share, err = strconv.ParseFloat(percent, 64)
		if err == nil && share > 0 && share <= 100 {
			return share / 100, 0, nil
		}
	} else if keys, err = strconv.ParseInt(text, 10, 64); err == nil && keys > 0 {
		return 1, keys, nil
	}
	return 0, 0, fmt.Errorf("--sample %s is neither a number of keys nor a share of them such as 5%%", text)
}
