// Package proxy is everything that speaks RESP or touches Redis: it serves clients, and keeps the two copies of every routed key
// right.
//
// The idea: a command about keys that no route matches is forwarded as the bytes it came in, and its reply as the bytes
// that Redis sent. A read of a routed key is forwarded too, and a hit passes on unparsed. Only what Redis lacks, and what
// writes, leaves this path: misses are loaded from the store under a lease (fill.go), writes are evaluated under the key's lock and
// committed in groups (write.go), and what only Redis can evaluate runs there between a load and a mirror (generic.go).
// What could not be done in one of the stores stands in a journal until it is repaired (journal.go, engine.go).
//
// The order of reading, as a GET passes: guard.go and scan.go cut the client's bytes into commands; server.go drives a session;
// session.go plans the command and keeps the order of replies; lane.go carries it to Redis and frame.go finds the reply's end; a miss
// goes to fill.go. upstream.go knows what Redis may be used for. scripts.go holds what runs inside Redis, and what a lease is.
//
// docs/consistency.md tells what the protocols promise, and which interleaving forced which line.
package proxy
