package transfer

import (
	"fmt"
	"io"
	"text/tabwriter"
	"time"

	"cacheproxy/proxy"
)

// maxExamples of one kind are kept.
const maxExamples = 5

// Example is a key that something is wrong with. Keys stand in no log, only in what the tool prints for whoever runs it.
type Example struct {
	Key string `json:"key"`
	Why string `json:"why"`
}

// Report is what a migration did, or with a dry run would do. It is also part of the checkpoint.
type Report struct {
	Route   string `json:"route"`
	Reverse bool   `json:"reverse"`
	DryRun  bool   `json:"dry_run"`

	Rows     int64 `json:"rows"`       // rows of the route, or with reverse keys of it
	Copied   int64 `json:"copied"`     // promoted, or with reverse copied into the store
	There    int64 `json:"there"`      // the other side had the key
	Expired  int64 `json:"expired"`    // rows, also those that ended meanwhile
	Deleted  int64 `json:"deleted"`    // tombstones
	Dead     int64 `json:"dead"`       // rows that say nothing: from before a fence, or of a column that nobody has written, or that was emptied because Redis has the value
	Marked   int64 `json:"marked"`     // left to the repair
	Other    int64 `json:"other_type"` // Redis has something else there
	TooLarge int64 `json:"too_large"`
	NotJSON  int64 `json:"not_json"`
	NoRow    int64 `json:"no_row"`   // an adopted column has no row of that key
	Negative int64 `json:"negative"` // readers remember that both stores lack it
	Failed   int64 `json:"failed"`
	Restarts int64 `json:"redis_restarts"` // of Redis, after rows had been copied: it may have lost some of them
	Bytes    int64 `json:"bytes"`

	Seconds  float64              `json:"seconds"`
	Examples map[string][]Example `json:"examples,omitempty"`
}

// note counts a key's fate.
func (r *Report) note(key string, d proxy.Done) {
	switch d.Fate {
	case proxy.Promoted, proxy.Copied:
		r.Copied++
		r.Bytes += int64(d.Size)
	case proxy.There:
		r.There++
	case proxy.OtherType:
		r.Other++
		r.example("other type", key, "redis has another type there")
	case proxy.Marked:
		r.Marked++
	case proxy.Gone:
		r.Expired++
	case proxy.Deleted:
		r.Deleted++
	case proxy.TooLarge:
		r.TooLarge++
		r.example("too large", key, fmt.Sprintf("%d bytes", d.Size))
	case proxy.NotJSON:
		r.NotJSON++
		r.example("not JSON", key, "the column takes JSON only")
	case proxy.NoPlace:
		r.NoRow++
		r.example("no row", key, "the table has none that could hold it")
	case proxy.Refused:
		r.fail(key, "a constraint or a trigger of the table refuses the value")
	case proxy.Remembered:
		r.Negative++
	case proxy.Late:
		r.fail(key, fmt.Sprintf("its row could not be read within %s", proxy.PatientLease))
	default:
		r.fail(key, "somebody was at the key all the time")
	}
}

// fail counts a key that could not be copied.
func (r *Report) fail(key, why string) {
	r.Failed++
	r.example("failed", key, why)
}

func (r *Report) example(kind, key, why string) {
	if r.Examples == nil {
		r.Examples = map[string][]Example{}
	}
	if len(r.Examples[kind]) < maxExamples {
		r.Examples[kind] = append(r.Examples[kind], Example{key, why})
	}
}

// OK tells that everything that can be is where it should be.
func (r *Report) OK() bool {
	return r.Failed+r.NotJSON+r.TooLarge+r.Other+r.NoRow+r.Negative+r.Restarts == 0
}

// Print writes the report for people. What is zero is left out, except the first two lines.
func (r *Report) Print(w io.Writer) {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	always := func(n int64, what string) { fmt.Fprintf(t, "%d\t %s\n", n, what) }
	line := func(n int64, what string) {
		if n != 0 {
			always(n, what)
		}
	}
	rows, copied, other := "rows of the route "+r.Route, "promoted", "redis"
	if r.Reverse {
		rows, copied, other = "keys of the route "+r.Route+" in redis", "copied into the store", "the store"
	}
	if r.DryRun {
		copied = "would be " + copied
	}
	always(r.Rows, rows)
	always(r.Copied, copied)
	line(r.There, "were in "+other+" already")
	line(r.Expired, "have expired or were deleted meanwhile")
	line(r.Deleted, "are known to be deleted")
	line(r.Dead, "do not count: nothing was written there, a fence stands above them, or only redis is to have the value")
	line(r.Marked, "are marked in redis's journal: the repair brings them")
	line(r.NoRow, "have no row in the table")
	line(r.Negative, "are remembered as absent: run again after negative_ttl")
	line(r.Other, "redis has another type of key there")
	line(r.TooLarge, "are larger than postgres.max_value")
	line(r.NotJSON, "are not JSON, which is all that the column takes")
	line(r.Failed, "failed")
	line(r.Restarts, "restarts of redis, which may have lost what was copied before: run once more")
	t.Flush() //nolint:errcheck // w's error shows in the lines below
	d := time.Duration(r.Seconds * float64(time.Second))
	fmt.Fprintf(w, "%s in %s, %.0f rows a second\n", bytesText(r.Bytes), d.Round(10*time.Millisecond), float64(r.Rows)/max(r.Seconds, 0.001))
	for _, kind := range []string{"other type", "too large", "not JSON", "no row", "failed"} {
		for _, e := range r.Examples[kind] {
			fmt.Fprintf(w, "%s: %q: %s\n", kind, e.Key, e.Why)
		}
	}
}

func bytesText(n int64) string {
	switch {
	case n >= 1<<30:
		return fmt.Sprintf("%.1f GiB", float64(n)/(1<<30))
	case n >= 1<<20:
		return fmt.Sprintf("%.1f MiB", float64(n)/(1<<20))
	case n >= 1<<10:
		return fmt.Sprintf("%.1f KiB", float64(n)/(1<<10))
	}
	return fmt.Sprintf("%d bytes", n)
}
