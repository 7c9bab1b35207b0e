package transfer

import (
	"context"
	"math/bits"
	"strconv"

	"cacheproxy/policy"
	"cacheproxy/proxy"
)

const (
	// pageRows is how many rows a page looks at: large enough to make its round trip cheap, small enough that what waits to be copied is
	// nothing beside the values that are under way.
	pageRows = 1024
	// batchKeys are one load and one or two scripts, as many as a sidecar's (see proxy's maxBatch).
	batchKeys = 256
	// batchBytes bounds what a batch holds in memory, and what one script hands to Redis, unless one value is larger.
	batchBytes = 4 << 20
	// unknownSize stands for that of a value that nobody has looked at.
	unknownSize = batchBytes / 16
)

// found is a part of a walk: keys, in the order of the walk, and where it goes on.
type found struct {
	rows  []policy.PageRow
	after string
	last  bool
	share float64 // of the walk that lies behind it; 0: not known
}

// feed is a walk over the keys of a route.
type feed interface {
	// next returns the part behind after; "" begins.
	next(ctx context.Context, after string) (found, error)
	// total is about how much there is to look at; what next returns in all may be more. found.expected knows better on the way.
	total(ctx context.Context) (int64, error)
	close()
}

// rowFeed walks over the rows of a route's store.
type rowFeed struct {
	rows   Rows
	route  *policy.Route
	router *policy.Router
}

func (f *rowFeed) request(after string) policy.PageRequest {
	return policy.PageRequest{Route: f.route.Name, Prefix: f.route.Prefix(), After: after, Limit: pageRows}
}

func (f *rowFeed) next(ctx context.Context, after string) (found, error) {
	page, err := f.rows.Page(ctx, f.request(after))
	if err != nil {
		return found{}, err
	}
	out := found{after: page.Next, last: page.Next == ""}
	for _, row := range page.Rows {
		if f.router.In([]byte(row.Key), f.route.Name) {
			out.rows = append(out.rows, row)
		}
	}
	return out, nil
}

func (f *rowFeed) total(ctx context.Context) (int64, error) {
	return f.rows.Estimate(ctx, f.request(""))
}

func (f *rowFeed) close() {}

// scanFeed walks over Redis's strings. Its places are good only for the process that gave them: another one begins anew.
type scanFeed struct {
	peer   *proxy.Peer
	route  *policy.Route
	router *policy.Router
	say    func(format string, args ...any)

	link  *proxy.PeerLink // nil: none yet
	runID string          // of the process whose places are used
}

// scanPart is how many keys of the route make a part, so that batches are full also where other keys are many.
const scanPart = 4 * batchKeys

func (f *scanFeed) connect(ctx context.Context) (fresh bool, err error) {
	if f.link != nil && !f.link.Broken() {
		return false, nil
	}
	f.close()
	if f.link, err = f.peer.Dial(ctx); err != nil {
		f.link = nil
		return false, err
	}
	fresh = f.runID != f.link.RunID()
	f.runID = f.link.RunID()
	return fresh, nil
}

func (f *scanFeed) next(ctx context.Context, after string) (found, error) {
	fresh, err := f.connect(ctx)
	if err != nil {
		return found{}, err
	}
	if fresh && after != "" {
		f.say("redis has been restarted: its keys are looked through from the beginning")
		after = ""
	}
	if after == "" {
		after = "0"
	}
	var out found
	for {
		next, keys, err := f.link.Scan(ctx, after, pageRows)
		if err != nil {
			return found{}, err
		}
		for _, key := range keys {
			if f.router.In([]byte(key), f.route.Name) {
				out.rows = append(out.rows, policy.PageRow{Key: key, State: policy.Live})
			}
		}
		after = next
		if after == "0" || len(out.rows) >= scanPart || ctx.Err() != nil {
			out.after, out.last, out.share = after, after == "0", walkedShare(after)
			return out, nil
		}
	}
}

// walkedShare is how much of a scan lies behind a cursor. Redis counts in the cursor's bits from the highest to the lowest, whatever the
// size of its table is: as a fraction they are the share of the table that it has gone through.
func walkedShare(cursor string) float64 {
	n, err := strconv.ParseUint(cursor, 10, 64)
	switch {
	case err != nil:
		return 0
	case n == 0:
		return 1
	}
	return float64(bits.Reverse64(n)) / (1 << 64)
}

// expected is about how many keys a walk finds that has found so many until here; total is what else is known.
func (f *found) expected(keys, total int64) int64 {
	if f.share > 0 {
		return int64(float64(keys) / f.share)
	}
	return total
}

func (f *scanFeed) total(ctx context.Context) (int64, error) {
	if _, err := f.connect(ctx); err != nil {
		return 0, err
	}
	return f.link.Size(ctx)
}

func (f *scanFeed) close() {
	if f.link != nil {
		f.link.Close()
		f.link = nil
	}
}
