//go:build linux

package main

import (
	"slices"
	"time"
)

// Targets, in the order in which they are shown. The first is what all others are compared with.
const (
	direct  = "Redis"
	haproxy = "HAProxy"
	twem    = "twemproxy"
	bare    = "no route"
	phase1  = "phase1"
	phase2  = "phase2"
	phase3  = "phase3"
)

var (
	everyone = []string{direct, haproxy, twem, bare, phase1, phase2, phase3}
	// routed1 is everyone but the phases that do the same as phase1 on a hit.
	routed1 = []string{direct, haproxy, twem, bare, phase1}
	// redisOnly is everyone who writes to Redis alone: the others wait for Postgres at any depth of the pipeline.
	redisOnly = []string{direct, haproxy, twem, bare, phase3}
)

// cell is one point of the grid.
type cell struct {
	op             string
	conns, depth   int
	size, keys     int
	targets        []string
	alsoWhenQuick  bool
	needsMoreTimes bool // a bar stands on it
}

// keySpace is how many keys there are: all of them exist, so that a GET is a hit. Of the large values there are fewer, or they would
// not fit.
const (
	keySpace      = 100_000
	largeKeySpace = 1_000
)

// cells leaves out what tells nothing new: large values are not pipelined (64 of 64 KiB by 50 clients is 200 MB under way), and
// SETs are as GETs in all that does not wait for Postgres.
var cells = []cell{
	{"GET", 1, 1, 100, keySpace, everyone, true, true},
	{"GET", 50, 1, 100, keySpace, everyone, true, true},
	{"GET", 500, 1, 100, keySpace, routed1, true, false},
	{"GET", 1, 16, 100, keySpace, routed1, false, false},
	{"GET", 50, 16, 100, keySpace, everyone, true, true},
	{"GET", 500, 16, 100, keySpace, routed1, false, false},
	{"GET", 1, 64, 100, keySpace, routed1, false, false},
	{"GET", 50, 64, 100, keySpace, routed1, true, false},
	{"GET", 50, 1, 1 << 10, keySpace, routed1, true, false},
	{"GET", 50, 16, 1 << 10, keySpace, routed1, false, false},
	{"GET", 1, 1, 64 << 10, largeKeySpace, routed1, false, false},
	{"GET", 50, 1, 64 << 10, largeKeySpace, routed1, true, false},
	{"SET", 1, 1, 100, keySpace, everyone, false, false},
	{"SET", 50, 1, 100, keySpace, everyone, true, false},
	{"SET", 500, 1, 100, keySpace, redisOnly, false, false},
	{"SET", 50, 16, 100, keySpace, redisOnly, true, false},
	{"SET", 50, 64, 100, keySpace, redisOnly, false, false},
	{"SET", 50, 1, 1 << 10, keySpace, redisOnly, false, false},
	{"SET", 50, 1, 64 << 10, largeKeySpace, redisOnly, false, false},
}

// plan is how much is measured.
type plan struct {
	cells       []cell
	rounds      int // of what a bar stands on
	otherRounds int
	slice       time.Duration // what one target gets in one round
}

var (
	full  = plan{cells: cells, rounds: 9, otherRounds: 5, slice: 2 * time.Second}
	short = plan{
		cells:  slices.DeleteFunc(slices.Clone(cells), func(c cell) bool { return !c.alsoWhenQuick }),
		rounds: 5, otherRounds: 3, slice: 400 * time.Millisecond,
	}
)
