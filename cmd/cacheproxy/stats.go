package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"slices"
	"text/tabwriter"
	"time"

	"cacheproxy/internal/view"
	"cacheproxy/proxy"

	"github.com/spf13/cobra"
)

const (
	// statsEvery is how often --watch asks, statsOften how often it may; each time the proxy asks Redis for its INFO.
	statsEvery = time.Second
	statsOften = 100 * time.Millisecond
	// askBound is how long a process on this machine may take to answer HTTP.
	askBound = 5 * time.Second
	// answerMax bounds what is read of an answer; a thousand routes are some 300 KB.
	answerMax = 16 << 20
)

func (c *cli) statsCommand() *cobra.Command {
	var observe string
	var raw, watch bool
	var every time.Duration
	cmd := &cobra.Command{
		Use:   "stats",
		Short: "Show what this sidecar counts",
		Long: "Prints the figures of GET /cache/stats as a table. With --watch they are a screen that follows them until q or Ctrl-C, or where\n" +
			"there is no terminal a line for each route; with --watch --json a line of JSON each time.",
		Args: usage(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			address, err := c.observeAddress(observe)
			if err != nil {
				return err
			}
			if every < statsOften {
				return &failure{exitUsage, fmt.Errorf("--interval is at least %s", statsOften)}
			}
			if watch {
				return c.watchStats(cmd.Context(), address, every, raw)
			}
			text, err := statsText(cmd.Context(), address, raw)
			if err != nil {
				return err
			}
			_, err = io.WriteString(c.stdout, text)
			return err
		},
	}
	cmd.Flags().StringVar(&observe, "observe", "", "the proxy's observe address (default: that of the configuration)")
	cmd.Flags().BoolVar(&raw, "json", false, "print the JSON of /cache/stats")
	cmd.Flags().BoolVar(&watch, "watch", false, "follow the figures")
	cmd.Flags().DurationVar(&every, "interval", statsEvery, "with --watch: how often")
	return cmd
}

// observeAddress is the address given, or that of the configuration.
func (c *cli) observeAddress(given string) (string, error) {
	if given != "" {
		return given, nil
	}
	cfg, err := c.load(c.path())
	if err != nil {
		return "", err
	}
	return cfg.Observe.Address, nil
}

// watchStats shows the figures until ctx ends. A proxy that is restarted meanwhile is waited for.
func (c *cli) watchStats(ctx context.Context, address string, every time.Duration, raw bool) error {
	o := view.Options{
		Ask:   func(ctx context.Context) (proxy.Stats, error) { return askStats(ctx, address) },
		Every: every, JSON: raw, Title: address, Out: c.stdout,
	}
	if out, ok := c.stdout.(*os.File); ok && !raw {
		if name, _ := c.getenv("TERM"); name != "dumb" {
			o.Terminal = view.NewTerminal(os.Stdin, out)
		}
		none, _ := c.getenv("NO_COLOR")
		o.Color = none == ""
	}
	return view.Watch(ctx, o)
}

func askStats(ctx context.Context, address string) (s proxy.Stats, err error) {
	body, err := ask(ctx, address, "/cache/stats")
	if err != nil {
		return s, err
	}
	if json.Unmarshal(body, &s) != nil {
		return s, errors.New("the answer to /cache/stats is not from a cacheproxy of this version")
	}
	return s, nil
}

func statsText(ctx context.Context, address string, raw bool) (string, error) {
	if raw {
		body, err := ask(ctx, address, "/cache/stats")
		return string(body), err
	}
	s, err := askStats(ctx, address)
	if err != nil {
		return "", err
	}
	return statsTable(s), nil
}

// ask gets a path of the observe address.
func ask(ctx context.Context, address, path string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, askBound)
	defer cancel()
	code, body, err := request(ctx, http.MethodGet, address, path)
	if err == nil && code != http.StatusOK {
		err = fmt.Errorf("%s answered %s with status %d", address, path, code)
	}
	return body, err
}

// request asks an address of a proxy on this machine.
func request(ctx context.Context, method, address, path string) (code int, body []byte, err error) {
	req, err := http.NewRequestWithContext(ctx, method, "http://"+address+path, nil)
	if err != nil {
		return 0, nil, errors.New("the address is not host:port")
	}
	req.Header.Set("X-Cacheproxy", "1") // what changes something is not for pages in a browser
	// Of its own: the default one would obey HTTP_PROXY and keep the connection.
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := client.Do(req)
	if err != nil {
		return 0, nil, fmt.Errorf("no cacheproxy answers on %s: %s", address, reason(err))
	}
	defer resp.Body.Close()
	body, err = io.ReadAll(io.LimitReader(resp.Body, answerMax))
	if err != nil {
		return 0, nil, fmt.Errorf("read the answer of %s: %s", address, reason(err))
	}
	return resp.StatusCode, body, nil
}

// statsTable is the statistics for people.
func statsTable(s proxy.Stats) string {
	var b bytes.Buffer
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	row := func(cells ...any) {
		for i, cell := range cells {
			if i > 0 {
				fmt.Fprint(w, "\t")
			}
			fmt.Fprint(w, cell)
		}
		fmt.Fprintln(w)
	}
	percent := func(f float64) string { return fmt.Sprintf("%.1f %%", 100*f) }
	seconds := func(s float64) string {
		return time.Duration(s * float64(time.Second)).Round(100 * time.Millisecond).String()
	}
	state := func(status, why string) string {
		if why != "" {
			status += " (" + why + ")"
		}
		return status
	}
	row("phase", s.MigrationPhase)
	row("redis", state(s.Redis.Status, s.Redis.Reason), fmt.Sprintf("%.1f MB", s.Redis.MemoryMB), "breaker opened", s.Redis.Opens)
	row("postgres", state(s.Postgres.Status, s.Postgres.Reason), "", "breaker opened", s.Postgres.Opens)
	journal := func(name string, length int, oldest, longest float64) {
		row("journal", fmt.Sprintf("%s %d", name, length), "oldest "+seconds(oldest), "longest repaired", seconds(longest))
	}
	journal("redis stale", s.Journal.RedisStale, s.Journal.RedisStaleOldest, s.Journal.RedisStaleLongest)
	journal("store stale", s.Journal.StoreStale, s.Journal.StoreStaleOldest, s.Journal.StoreStaleLongest)
	row("clients", s.Proxy.Clients, fmt.Sprintf("commands %d", s.Proxy.Commands), "up", (time.Duration(s.Proxy.UptimeSeconds) * time.Second).String())
	row("promotions", s.Proxy.Promotions, fmt.Sprintf("refused by lease %d", s.Proxy.PromotionsRefused), "failed", s.Proxy.PromotionsFailed)
	row("writes", fmt.Sprintf("lost leases %d", s.Proxy.LostLeases), fmt.Sprintf("shed %d", s.Proxy.Shed), "uncertain", s.Proxy.Uncertain)
	row("stores", fmt.Sprintf("fences %d", s.Proxy.Fences), "", "numbers lifted", s.Proxy.NumbersLifted)
	w.Flush() //nolint:errcheck // a buffer takes everything
	b.WriteByte('\n')

	row("REPAIRED BECAUSE OF", "KEYS")
	for _, cause := range slices.Sorted(maps.Keys(s.Journal.Repairs)) {
		row(cause, s.Journal.Repairs[cause])
	}
	w.Flush() //nolint:errcheck // as above
	b.WriteByte('\n')

	row("ROUTE", "PHASE", "REDIS HITS", "JSONB HITS", "MISSES", "REDIS RATE", "OVERALL", "WRITES", "REFUSED")
	line := func(name, phase string, p proxy.Performance, writes, refused any) {
		row(name, phase, p.RedisHits, p.JSONBHits, p.CacheMisses, percent(p.RedisHitRate), percent(p.OverallHitRate), writes, refused)
	}
	for _, r := range s.Routes {
		line(r.Name, r.Phase, r.Performance, r.Writes, r.Refused)
	}
	line("all", s.MigrationPhase, s.Performance, "", "")
	w.Flush() //nolint:errcheck // as above

	titled := false
	for _, r := range s.Routes {
		found := view.FoundOf(r)
		if !found.Any() {
			continue
		}
		if !titled {
			titled = true
			b.WriteByte('\n')
			row("ROUTE", "NO ROW", "COMPARED", "DROPPED", "DIFFERING", "HOW")
		}
		row(r.Name, found.NoRow, found.Checked, found.Dropped, found.Differing(), found.Kinds())
	}
	w.Flush() //nolint:errcheck // as above
	return b.String()
}
