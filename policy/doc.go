// Package policy holds the rules that every part of cacheproxy must agree on: which keys are routed and
// how, what a phase means, how long a value lives, and what a command needs. It is pure. Nothing here opens a
// socket, reads a clock or draws a random number; what a rule needs it is handed, so each rule is tested
// without a store and read without a detour.
//
// The order of reading is that of a GET on its way through the proxy: command.go says that a GET is
// answered by reading through; route.go finds the route of its key (glob.go is the pattern language, that of
// Redis); phase.go says whom the route's phase asks, and what an outage changes; ttl.go says how long a value
// lives that a client has written without saying so. deny.go is about commands that come no further. entry.go is the vocabulary in which the packages proxy and
// fallback speak of one key.
package policy
