// Package fallback is the Postgres side of cacheproxy: the store that answers when Redis does not know a
// key or cannot be asked, and that keeps what Redis may forget.
//
// The idea in four sentences. A key is one row of cacheproxy.entries: a value, or a tombstone that says the
// key was deleted or has expired, which is not the same as to know nothing of it. Whoever changes a key opens
// a [Tx], which holds the key's advisory lock until it ends, so that writers take turns across all sidecars
// also when there is no row to lock. What the two stores may disagree about stands in cacheproxy.journal until
// somebody has repaired it. And a row is only as good as its generation: a fence raises the generation and
// every older row is dead at once, however many there are.
//
// Order of reading: store.go (the pool, deadlines, the one retry), limit.go (how many may ask at once),
// load.go (a miss asks here), tx.go (a write passes here), gate.go (which bytes Postgres may see as JSON),
// journal.go (intents, phases, the poll), fence.go (generations and the rising number), schema.go with
// schema.sql, sweep.go (what becomes of rows that are over), errors.go (the questions a caller may ask of an
// error). Then column.go: of some routes the rows are the application's own, with columncheck.go (what the
// catalogue must say of them) and columntrigger.go (how others' changes are heard of).
//
// The package knows Postgres and the value model of package policy, and nothing of Redis or of clients.
package fallback
