package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"time"

	"cacheproxy/internal/config"
	"cacheproxy/proxy"

	"github.com/spf13/cobra"
)

// moveBound is how long a step may take: before phase0 is entered all of Redis is compared with Postgres, which takes the proxy half a
// minute at most.
const moveBound = time.Minute

// phaseFlags are those of `cacheproxy phase`.
type phaseFlags struct {
	route, observe, admin          string
	advance, rollback, force, json bool
}

func (c *cli) phaseCommand() *cobra.Command {
	var f phaseFlags
	cmd := &cobra.Command{
		Use:   "phase",
		Short: "Show where each route stands and what speaks against its next step; or take it",
		Long: "Asks the running proxy where each route stands, since when, and what speaks for and against the next step.\n" +
			"With --advance or --rollback it goes one step if nothing speaks against it, in this proxy alone and until it restarts:\n" +
			"write the new phase into the configuration, and move the other sidecars.\n" +
			"Exits with 1 if something speaks against the step, 3 if no proxy answers.",
		Args: usage(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error { return c.phase(cmd.Context(), f) },
	}
	flags := cmd.Flags()
	flags.StringVar(&f.route, "route", "", "the route (default: all; for a step, the only one)")
	flags.BoolVar(&f.advance, "advance", false, "go to the next phase")
	flags.BoolVar(&f.rollback, "rollback", false, "go back to the phase before")
	flags.BoolVar(&f.force, "force", false, "with --advance or --rollback: whatever speaks against it")
	flags.BoolVar(&f.json, "json", false, "print JSON")
	flags.StringVar(&f.observe, "observe", "", "the proxy's observe address (default: that of the configuration)")
	flags.StringVar(&f.admin, "admin", "", "the proxy's admin address (default: that of the configuration)")
	return cmd
}

func (c *cli) phase(ctx context.Context, f phaseFlags) error {
	bad := func(text string) error { return &failure{exitUsage, errors.New(text)} }
	switch {
	case f.advance && f.rollback:
		return bad("--advance and --rollback exclude each other")
	case f.force && !f.advance && !f.rollback:
		return bad("--force is for --advance and --rollback")
	}
	observe, control, err := c.addresses(f)
	if err != nil {
		return err
	}
	standings, err := askPhases(ctx, observe, f.route)
	if err != nil {
		return err
	}
	if f.advance || f.rollback {
		if len(standings) != 1 {
			var names []string
			for i := range standings {
				names = append(names, standings[i].Route)
			}
			return bad("name one route with --route: " + strings.Join(names, ", "))
		}
		return c.move(ctx, f, &standings[0], observe, control)
	}
	if f.json {
		return c.printJSON(standings)
	}
	for i := range standings {
		if i > 0 {
			fmt.Fprintln(c.stdout)
		}
		if _, err := io.WriteString(c.stdout, strings.Join(standings[i].Lines(), "\n")+"\n"); err != nil {
			return err
		}
	}
	return nil
}

// addresses are the observe and the admin address, of the flags or of the configuration.
func (c *cli) addresses(f phaseFlags) (observe, control string, err error) {
	if f.observe != "" && (f.admin != "" || !f.advance && !f.rollback) {
		return f.observe, f.admin, nil // no configuration is needed
	}
	cfg, err := c.load(c.path())
	if err != nil {
		return "", "", err
	}
	return cmp.Or(f.observe, cfg.Observe.Address), cmp.Or(f.admin, cfg.Admin.Address), nil
}

// moved is what a step prints with --json.
type moved struct {
	Route  string `json:"route"`
	From   string `json:"from"`
	Moved  bool   `json:"moved"`
	Forced bool   `json:"forced"`
	Says   string `json:"says,omitempty"` // why the proxy itself refused
	*proxy.Move
}

// move takes a step, if nothing speaks against it.
func (c *cli) move(ctx context.Context, f phaseFlags, s *proxy.Standing, observe, control string) error {
	step, word := s.Next, "next"
	if f.rollback {
		step, word = s.Back, "previous"
	}
	if step == nil {
		return fmt.Errorf("%s is in %s: there is no %s phase", s.Route, s.Phase, word)
	}
	if control == "" {
		return errors.New("admin.address is empty, so nobody can move the proxy; write the phase into the configuration instead")
	}
	out := moved{Route: s.Route, From: s.Phase, Forced: f.force, Move: step}
	if len(step.Against) > 0 && !f.force {
		return c.refused(f, out, "")
	}
	if !f.json {
		for _, r := range step.Against {
			fmt.Fprintf(c.stdout, "overruled: %s: %s\n", r.Doubt, r.Says)
		}
	}
	query := url.Values{"route": {s.Route}, "phase": {step.Phase}}
	if f.force {
		query.Set("force", "1")
	}
	ctx, cancel := context.WithTimeout(ctx, moveBound)
	defer cancel()
	code, body, err := request(ctx, http.MethodPost, control, "/phase?"+query.Encode())
	switch {
	case err != nil:
		return &failure{exitUnreachable, err}
	case code == http.StatusConflict:
		return c.refused(f, out, strings.TrimSpace(string(body)))
	case code != http.StatusOK:
		return fmt.Errorf("%s answered with status %d: %s", control, code, strings.TrimSpace(string(body)))
	}
	out.Moved = true
	if f.json {
		return c.printJSON(out)
	}
	fmt.Fprintf(c.stdout, "%s: %s to %s, in this sidecar\n", s.Route, s.Phase, step.Phase)
	// The file may have been read since we asked.
	if now, err := askPhases(ctx, observe, s.Route); err == nil && len(now) == 1 {
		s = &now[0]
	}
	if s.Configured != step.Phase {
		file := cmp.Or(c.path(), config.DefaultPath)
		fmt.Fprintf(c.stdout, "Write \"phase: %s\" for the route into %s: a restart goes by the file. Then move the other sidecars.\n", step.Phase, file)
	}
	return nil
}

// refused prints what speaks against a step.
func (c *cli) refused(f phaseFlags, m moved, says string) error {
	if f.json {
		m.Says = says
		if err := c.printJSON(m); err != nil {
			return err
		}
		return &failure{code: exitNot}
	}
	fmt.Fprintf(c.stdout, "%s stays in %s. Against %s:\n", m.Route, m.From, m.Phase)
	if says != "" {
		fmt.Fprintf(c.stdout, "  %s\n", strings.ReplaceAll(says, "\n", "\n  "))
		if f.rollback {
			fmt.Fprintf(c.stdout, "    remedy: cacheproxy migrate --reverse --route %s, then cacheproxy verify --route %s\n", m.Route, m.Route)
		}
	} else {
		for _, r := range m.Against {
			fmt.Fprintf(c.stdout, "  %s: %s\n    remedy: %s\n", r.Doubt, r.Says, r.Remedy)
		}
	}
	if !f.force && (says == "" || f.rollback) {
		fmt.Fprintln(c.stdout, "With --force it is done all the same.")
	}
	return &failure{code: exitNot}
}

func (c *cli) printJSON(v any) error {
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err
	}
	_, err = c.stdout.Write(append(b, '\n'))
	return err
}

// askPhases gets the standings of all routes, or of one.
func askPhases(ctx context.Context, observe, route string) ([]proxy.Standing, error) {
	path := "/phase"
	if route != "" {
		path += "?" + url.Values{"route": {route}}.Encode()
	}
	ctx, cancel := context.WithTimeout(ctx, 2*askBound)
	defer cancel()
	code, body, err := request(ctx, http.MethodGet, observe, path)
	switch {
	case err != nil:
		return nil, &failure{exitUnreachable, err}
	case code == http.StatusNotFound && route != "" && strings.Contains(string(body), "no such route"):
		return nil, &failure{exitUsage, fmt.Errorf("the proxy has no route %s", route)}
	case code != http.StatusOK:
		return nil, fmt.Errorf("%s answered /phase with status %d", observe, code)
	}
	var out []proxy.Standing
	if err := json.Unmarshal(body, &out); err != nil {
		return nil, errors.New("the answer to /phase is not from a cacheproxy of this version")
	}
	return out, nil
}
