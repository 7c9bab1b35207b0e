package model

import "cacheproxy/policy"

const (
	maxKeys     = 2
	maxSidecars = 3
	maxOps      = 6
	maxEntries  = 8
	maxSockets  = 2

	first = int8(7) // the value that keys have in the beginning; that of operation i is i+1
	tomb  = int8(-1)
)

// Tokens of a lease.
const (
	free     = int8(0)
	negative = int8(1)  // "n": known to be absent in both stores
	overtake = int8(2)  // "o": overtaken by a write in Redis
	reader   = int8(10) // "r", plus the operation
	writer   = int8(30) // "w", plus the operation
)

func isReader(tok int8) bool { return tok >= reader && tok < writer }

// redis is what Redis holds, and loses as a whole. Everything beside a key is here per key.
type redis struct {
	val, exp [maxKeys]int8 // exp: the moment at which it ends, 0 never
	num, tok [maxKeys]int8 // the lease
	mark     [maxKeys]int8 // the journal: version of the write that the store lacks
	anchor   int8          // of the journal; 0: lost
	clock    int8          // Postgres's time, 0: none
	dataSet  int8          // that the clock names
	closed   bool          // to promotions, while FLUSHALL runs
}

// postgres is what the store holds.
type postgres struct {
	row, exp [maxKeys]int8
	changed  [maxKeys]int8     // when the row was: on the clock that polls write into Redis
	lock     [maxKeys]int8     // who has the key lock: 0 nobody, or thread
	names    [maxEntries]uint8 // the journal: the keys that each entry names, or named
	entries  uint8             // those that are there
	made     int8              // entries made so far
	seq      int8              // the last number drawn
}

// Threads that hold locks.
const (
	clientThread = int8(1)  // plus the sidecar
	repairThread = int8(5)  // plus the sidecar
	ghostThread  = int8(9)  // a COMMIT in a socket whose sender has given it up
	fenceThread  = int8(10) // plus the sidecar: holds all locks
)

// mark is what a sidecar remembers of its own entry in Redis's journal.
type mark struct {
	ver   int8
	left  bool // its writer is done with it
	young bool // no poll of Redis since
}

type sidecar struct {
	alive    bool
	phase    policy.Phase
	link     bool // the control connection to Redis
	trusted  bool // Redis's copies may be served
	postgres bool // Postgres can be reached
	known    uint8
	extra    uint8 // keys of entries of its own, not told apart until the next poll
	seen     [maxKeys]int8
	marks    [maxKeys]int8 // seen at two polls
	mine     [maxKeys]mark
	anchor   int8
	part     int8 // the run of Redis that it has verified in part
	c        client
	b        worker
}

// client is the one client of a sidecar, and what its command has come to.
type client struct {
	op       int8 // of its program
	at       place
	void     bool  // trust in Redis was lost since it took its lease
	lost     bool  // Redis could not be had for this command
	unlocked bool  // Postgres could not
	ran      bool  // load, run, mirror
	locked   uint8 // keys, on the way to all
	num      int8
	dirty    uint8         // keys that it changes
	wait     uint8         // keys because of which it begins again
	todo     uint8         // keys of the next script
	entry    uint8         // that it made, if entries are always made
	then     place         // after the next script
	row, rex [maxKeys]int8 // under the lock
	now, nex [maxKeys]int8 // what the keys are to hold
	code     [maxKeys]int8
	want     [maxKeys]int8 // in Redis, -1 whatever
	touched  uint8         // leases that have changed since they are watched
	waited   bool          // for somebody else's lease
	wmark    [maxKeys]int8 // the mark that it read, and the number
	wnum     [maxKeys]int8
	both     uint8  // keys that both journals name: the row wins
	excused  uint8  // keys of which it began under exception (a)
	seen     uint16 // values that a read may answer so far, if P3 is taken by its letter
	res      int8
}

// worker is a sidecar's goroutine that polls, repairs and recovers.
type worker struct {
	at     place
	keys   uint8
	locked uint8
	ids    uint8
	void   bool // trust in Redis was lost since it began
	num    int8
	val    [maxKeys]int8
	exp    [maxKeys]int8
	ver    [maxKeys]int8
}

// budget is what may still go wrong.
type budget struct {
	crash, redisLink, pgLink, lapse, restart, failover, journal, stamp, back, pgCrash int8
}

type state struct {
	mon    [maxKeys]int32
	r      redis
	past   [2]redis // what a replica may have: without the last write, and without the last two
	run    int8     // which data set Redis has
	anchor int8     // the last one drawn
	p      postgres
	time   int8 // of the clock
	sc     [maxSidecars]sidecar
	socket [maxSockets]script
	ghost  change
	passed uint8 // moments that are over
	doubt  uint8 // keys of which exception (b) holds
	left   budget
}

// place is where a client or worker stands.
type place uint8

const (
	idle place = iota

	missGrant   // "A miss", 1, and the hit before it
	missLoad    // 2
	missPromote // 3, with a row
	missAbsent  // 3, without
	missHeld    // 4
	missLock
	missResolve
	missLook
	direct // without Redis

	begin // "A write in phase0 and phase1", 1
	invalidate
	commit
	fill
	againLock
	again
	staleLock
	staleCommit
	putBack
	giveUp
	writeOn
	awaitRepair
	strikeOwn // only if entries are always made

	lock2 // "A write in phase2 and drain", 1
	read2
	write2
	drop2
	strike2
	plain

	runLock // "Commands that only Redis can run"
	runPrepare
	runAdopt
	runExec

	queuedLoad // "Transactions"
	queuedForce
	queuedExec

	fenceLock
	fenceFlush
	fenceCommit
	fenceOpen

	repairLock // of entries
	repairDelete
	repairStrike
	markLock // of marks
	markRead
	markCommit
	markStrike
	recoverWindow
	recoverLock
	recoverDelete
	recoverPoll
	putMarks
	pollStore // a poll has read the journal in Postgres
	pollRedis // and the one in Redis
)

func bit(k int) uint8 { return 1 << uint(k) }

// renumber replaces numbers by their ranks: only their order counts, and so the worlds remain finitely many.
func (st *state) renumber(live bool) {
	var have, rank [64]int8
	each := func(f func(n *int8)) {
		for k := range maxKeys {
			f(&st.r.num[k])
			for s := range st.sc {
				f(&st.sc[s].c.wnum[k])
			}
			if live {
				f(&st.past[0].num[k])
				f(&st.past[1].num[k])
			}
		}
		f(&st.p.seq)
		for s := range st.sc {
			f(&st.sc[s].c.num)
			f(&st.sc[s].b.num)
		}
		for i := range st.socket {
			f(&st.socket[i].num)
			for k := range maxKeys {
				f(&st.socket[i].wnum[k])
			}
		}
	}
	each(func(n *int8) { have[*n] = 1 })
	next := int8(0)
	for i := 1; i < len(have); i++ {
		if have[i] == 1 {
			next++
			rank[i] = next
		}
	}
	each(func(n *int8) { *n = rank[*n] })
}

// val is what Redis answers for a key, whose life may be over.
func (st *state) val(k int) int8 {
	if st.over(st.r.exp[k]) {
		return 0
	}
	return st.r.val[k]
}

func (st *state) over(moment int8) bool { return moment > 0 && st.passed>>uint(moment)&1 == 1 }

// row is what Postgres answers for a key: absent, a tombstone, or a value. One that has expired is a tombstone.
func (m *model) row(st *state, k int) int8 {
	if v := st.p.row[k]; v <= 0 || !st.over(st.p.exp[k]) {
		return v
	}
	if m.rules.ExpiredIsNoRow {
		return 0
	}
	return tomb
}

func live(row int8) bool { return row > 0 }
