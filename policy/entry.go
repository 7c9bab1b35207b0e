package policy

// Ref names one routed key: the route that matched it and the key itself. A key is always valid UTF-8
// without NUL and at most MaxKey bytes (see Eligible).
type Ref struct {
	Route string
	Key   string
}

// State tells what a store knows of a key.
type State uint8

const (
	// Absent: the store has no row. Redis may be the only holder of the key.
	Absent State = iota
	// Tombstone: the store knows that the key was deleted or has expired. It reads as a miss, and it is the truth.
	Tombstone
	// Live: the store has a value that has not expired.
	Live
	// NoRow: the store has no place for the key: an adopted column without a row of that key. A change of the key
	// changes nothing there.
	NoRow
)

// Row is what a store answers for one key. Value belongs to the caller.
type Row struct {
	State State
	// Bare goes with Absent: the store has a place for the key and nothing in it, and has not noted why. An adopted column is empty
	// there, and as far as is known nobody has ever written or deleted the key.
	Bare  bool
	Value []byte
	// TTL is what remained, in milliseconds, on the store's own clock when it answered; -1 is no expiry.
	TTL int64
	// ExpiresAt is the same as an absolute time in Unix milliseconds; -1 is no expiry.
	ExpiresAt int64
}

// ExpiryKind is a closed list: how a write sets the life of a key.
type ExpiryKind uint8

const (
	// NoExpiry: the key lives until it is deleted.
	NoExpiry ExpiryKind = iota
	// ExpiresIn: MS milliseconds after the store executes the write, on the store's clock.
	ExpiresIn
	// ExpiresAt: at MS Unix milliseconds.
	ExpiresAt
	// KeepExpiry: what the key has now stays (KEEPTTL, INCR, APPEND).
	KeepExpiry
)

// Expiry is the life that a write gives a key.
type Expiry struct {
	Kind ExpiryKind
	MS   int64
}

// ChangeOp is a closed list: what a write does to a key's row. A key that is NoRow has none, and every op leaves it so.
type ChangeOp uint8

const (
	// Put sets value and expiry.
	Put ChangeOp = iota
	// Delete leaves a tombstone: the key is known to be gone.
	Delete
	// Drop removes the row altogether: the store no longer speaks for the key.
	Drop
)

// Change is one key's part of a write to a store.
type Change struct {
	Ref    Ref
	Op     ChangeOp
	Value  []byte // with Put; not kept after the call
	Expiry Expiry // with Put
}

// PageRequest asks a store for the next rows of a route, in the store's own order.
type PageRequest struct {
	Route string
	// Prefix is the literal that every key of the route begins with; it may be empty. A store may leave out what does not begin with it,
	// and may return it: whether a key is the route's is the caller's to decide.
	Prefix string
	After  string // the Next of the page before; "" begins
	Limit  int    // how many rows are looked at
}

// PageRow is one row without its value.
type PageRow struct {
	Key     string
	State   State // a row of a dead generation is Absent, one that has expired a Tombstone
	Expired bool  // with Tombstone: it has expired, and was not deleted
	// Size is about how many bytes the value has when it is read; of one that is kept compressed, the most that there can be in it.
	Size int64
}

// Page is a part of a store. Next is opaque, text without NUL; it stays good for as long as the route's store is the same, whoever asks.
// Without Next it is the last page. Rows may be empty where there is a Next.
type Page struct {
	Rows []PageRow
	Next string
}
