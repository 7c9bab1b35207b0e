// Package transfer is what `cacheproxy migrate` and `cacheproxy verify` do: it walks over the rows of a route, or over Redis's keys, and
// copies what the other store lacks, or compares both. It runs beside sidecars and writers. Every step that could make anything
// stale is a proxy.Peer's, which keeps the protocols; what is here is the walk: how fast, how far, what was found, and going on after an end.
//
// Read migrate.go first, then feed.go (where the keys come from), brake.go and trouble.go (what slows it down), progress.go and report.go
// (what it tells). verify.go shares them.
package transfer

import (
	"context"
	"time"

	"cacheproxy/policy"
	"cacheproxy/proxy"
)

// Rows is a route's store, to be walked over.
type Rows interface {
	// Page returns the next rows of a route in the store's order, without their values. A page costs what its limit says, whatever the rows are.
	Page(ctx context.Context, r policy.PageRequest) (policy.Page, error)
	// Estimate is about how many rows a walk looks at.
	Estimate(ctx context.Context, r policy.PageRequest) (int64, error)
}

// Ledger is where it is written down how far a transfer got. It belongs to whoever may transfer this route in this direction: if that is
// lost to somebody else, the error is Stores.Taken.
type Ledger interface {
	Read(ctx context.Context) (state []byte, at time.Time, found bool, err error)
	// Write replaces the state; nil removes it.
	Write(ctx context.Context, state []byte) error
}

// Stores is what a transfer works on.
type Stores struct {
	Peer *proxy.Peer
	Rows Rows
	// Ledger may be nil: then nothing is written down.
	Ledger Ledger
	// Trouble says why the store did not do what it was asked, if that may pass; "" for other errors.
	Trouble func(error) string
	// Taken tells that somebody else has the right to this transfer.
	Taken func(error) bool
}
