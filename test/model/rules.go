package model

// Rules are the wrong protocols: each field, if true, leaves a rule out or breaks it. The zero value is the protocol as it is built.
type Rules struct {
	PromoteNXOnly   bool // a promotion does not look at the lease: an absent key suffices
	KeepRow         bool // a write in phase2 leaves the row
	WriteEarly      bool // the value is in Redis before the COMMIT
	TrustPaused     bool // a Redis that did not answer is trusted as soon as it does, and what it missed is not journaled
	NoEntry         bool // a failed step in Redis makes no entry "Redis is stale"
	EntryAlways     bool // every write makes an entry with its COMMIT, and strikes it after it was answered
	PutBackAlways   bool // a mark that has vanished is put back, also if somebody has struck it
	StrikeBlind     bool // a repair deletes first and does not look whether its entry is still there
	StrikeUnlocked  bool // a repair holds no key locks
	KnownUnchecked  bool // a write makes no entry for a key that a known one names, without a look whether it is still there
	OldLease        bool // a lease that an older run of Redis granted counts
	NoNumbers       bool // Redis does not compare numbers
	NoKill          bool // the connections that were given up are not killed
	CommitLate      bool // a COMMIT is begun though the lease may have lapsed
	NoSecondLook    bool // a lease that was lost at step 4 is not answered with another invalidation
	NoAdopt         bool // a value without a row is deleted before it is in the row
	BelieveNoRow    bool // no row is believed without the lease
	NoTombstone     bool // a delete in phase0 and phase1 leaves no row
	ExpiredIsNoRow  bool // an expired row reads as no row
	IgnoreMarks     bool // a miss does not look at Redis's journal
	Phase0Blind     bool // phase0 does not look at Redis's journal
	NilWithoutRedis bool // phase2 without Redis and without a row answers nil
	WriteOverStale  bool // without Postgres, a key whose copy in Redis is stale is written all the same
	MarkWins        bool // where both journals name a key, the row loses
	PutBackUnknown  bool // after a COMMIT of unknown fate the old value goes back into Redis
	RepeatUnknown   bool // after a COMMIT of unknown fate the command is repeated in Redis without its lease
	NoWindow        bool // a restarted or replaced Redis is trusted without a repair of what the store has changed
	ClockAtOnce     bool // a poll names the data set before it is verified
	FreshTTL        bool // a promoted value lives for ever
	KeepTTL         bool // a TTL that is kept is kept by the store at COMMIT: what has expired until then lives for ever
	NoFence         bool // the way back from a phase without the store does not fence
	FlushUnfenced   bool // FLUSHALL runs in Redis while others write in the store
	UnwatchedRun    bool // load, run, mirror does not watch the leases
	UnlockedWrite   bool // a write in phase2 takes no key lock
	KeepNegative    bool // a write leaves "known to be absent" standing
	ExpectNothing   bool // a write in Redis does not compare with what was read
	AwaitUntrusted  bool // a reader that waits for a lease asks a Redis that has been lost meanwhile and is not verified yet
	ValueOnly       bool // a write in Redis compares the value with what was read, but not whether somebody has written meanwhile
	RepairUnaware   bool // the repair of a mark knows the entries of the last poll and not those that are there
	StaleBlind      bool // a read that avoids a copy in Redis, because of an entry that is struck meanwhile, does not look at the marks there
	FlushOpen       bool // readers promote between the moment at which FLUSHALL has emptied Redis and the end of the rows
	JournalExpired  bool // after step 4 failed, a row that has expired since its commit counts as another's, and makes no entry
	EqualNumbers    bool // a number that Postgres gives twice, having forgotten it, passes for the writer's own
	DrainTakesRow   bool // drain computes from a row that phase3 has overtaken, though it does not read the store
	CaptureMarked   bool // the end of a transaction takes a key out of Redis that somebody has marked since the load
	StrikeSilent    bool // a strike leaves the row as old as it is, and does not ask whether Redis was lost since
	PutBackStruck   bool // a mark that Redis lost is put back also where the key is not there
	BothBlind       bool // a marked key is taken from Redis although an entry names it too
}
