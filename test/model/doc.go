// Package model explores the protocols of docs/consistency.md exhaustively: a small world of one or two keys, two or three sidecars,
// both stores and everything that may fail, in every order of its steps. What clients are told must have a linearization; what
// docs/consistency.md excepts from that is excepted here, and nothing else.
//
// The world is proxy/ and fallback/ as they are built, one step for each message to a store. Whoever changes a step there changes it here:
//
//	here            there
//	redis.go        proxy/scripts.go, script by script
//	postgres.go     fallback/tx.go: key locks, numbers, COMMIT and its fates
//	read.go         proxy/fill.go
//	write.go        proxy/write.go, storeFirst
//	overtake.go     proxy/write.go, redisFirst
//	generic.go      proxy/generic.go, runAlone
//	queued.go       proxy/generic.go, runQueued
//	repair.go       proxy/journal.go: polls and repairs
//	recover.go      proxy/engine.go: before Redis is trusted
//	fence.go        FLUSHALL, and the way back from a phase without the store
//
// Read world.go first, which says what there is, then rules.go: every rule of the protocols that can be left out, to see what it is for.
// explore.go goes through the worlds, environment.go breaks things, judge.go and history.go say what must not be seen, and replay.go
// tells whether steps that a real program took are steps of the model.
package model
