package model

import (
	"reflect"
	"testing"

	"cacheproxy/policy"
)

// world is short for a Config: phases by their numbers, the clients' programs, what both stores hold at first.
func world(phases string, programs []string, redis, store int8, f Faults) Config {
	c := Config{Programs: programs, Redis: redis, Store: store, Faults: f}
	for _, p := range phases {
		c.Phases = append(c.Phases, policy.Phase(p-'0'))
	}
	return c
}

// with changes a copy of the world.
func (c Config) with(change func(*Config)) Config {
	change(&c)
	return c
}

func mortal(c *Config)    { c.Mortal = true }
func negatives(c *Config) { c.Negative = true }
func both(c *Config)      { c.BothStores = true }
func letter(c *Config)    { c.Letter = true }
func struck(c *Config)    { c.Marked, c.Apart = true, true } // a failover has brought a mark back, and the first sidecar does not trust the new Redis yet
func flushed(c *Config)   { c.Second = true }
func returned(c *Config)  { c.Unlike, c.Holds = true, 0 }

// Every rule of the protocols that is left out leads to something that must not be seen, in the world beside it; with the rule that world
// is well.
var variants = []struct {
	name  string
	why   string
	wrong func(*Rules)
	in    Config
}{
	{"promotion with NX only", "a reader promotes what a write has replaced meanwhile",
		func(r *Rules) { r.PromoteNXOnly = true }, world("11", []string{"G", "S"}, 0, First, Faults{Evict: true})},
	{"phase2 without invalidation", "the row comes back when Redis forgets the key",
		func(r *Rules) { r.KeepRow = true }, world("22", []string{"S", ""}, First, First, Faults{Evict: true})},
	{"Redis is written before the commit", "what was seen is lost with its writer",
		func(r *Rules) { r.WriteEarly = true }, world("11", []string{"S", "G"}, First, First, Faults{Crash: 1})},
	{"trust in a paused Redis", "it is trusted as soon as it answers, and its copy was not journaled",
		func(r *Rules) { r.TrustPaused = true }, world("11", []string{"S", ""}, First, First, Faults{RedisLink: 1})},
	{"no entry for a failed step", "others are never told",
		func(r *Rules) { r.NoEntry = true }, world("11", []string{"S", ""}, First, First, Faults{RedisLink: 1})},
	{"an entry outlives its write", "the row wins over a delete that only Redis saw",
		func(r *Rules) { r.EntryAlways = true }, world("11", []string{"SD", ""}, First, First, Faults{PgLink: 1})},
	{"a mark is put back though struck", "the fill leaves a marked key alone: it is absent, and reads as deleted",
		func(r *Rules) { r.PutBackAlways = true }, world("11", []string{"S", "S"}, First, First, Faults{PgLink: 1})},
	{"a repair does not look whether its entry is there", "it brings back a row that a write in Redis has replaced since",
		func(r *Rules) { r.StrikeBlind = true }, world("11", []string{"S", "D"}, First, First, Faults{RedisLink: 1, PgLink: 1})},
	{"a repair holds no locks", "the entry goes before the row that a known one spoke for is there",
		func(r *Rules) { r.StrikeUnlocked = true }, world("11", []string{"SS", "G"}, First, First, Faults{RedisLink: 1})},
	{"a known entry is not looked for", "the write relies on an entry that is struck already",
		func(r *Rules) { r.KnownUnchecked = true }, world("11", []string{"SS", "S"}, First, First, Faults{RedisLink: 1})},
	{"the lease of an older run counts", "a failover brought its token back, and the row that is gone is promoted",
		func(r *Rules) { r.OldLease = true }, world("22", []string{"G", "S"}, 0, First, Faults{Failover: 1}).with(letter)},
	{"numbers are not compared", "a request of a dead writer deletes what only Redis holds",
		func(r *Rules) { r.NoNumbers = true }, world("12", []string{"S", "S"}, First, First, Faults{Crash: 1})},
	{"a commit though the lease may have lapsed", "the writer dies, and what was promoted before its commit stays",
		func(r *Rules) { r.CommitLate = true }, world("11", []string{"S", "GG"}, First, First, Faults{Lapse: 1, Crash: 1, RedisLink: 1})},
	{"a lost lease is not answered with an invalidation", "what was promoted meanwhile stays",
		func(r *Rules) { r.NoSecondLook = true; r.CommitLate = true }, world("11", []string{"S", "G"}, First, First, Faults{Lapse: 1})},
	{"no adoption", "a value that only Redis holds is deleted by a write that then dies",
		func(r *Rules) { r.NoAdopt = true }, world("12", []string{"S", ""}, First, 0, Faults{Crash: 1, Lapse: 1})},
	{"no row is believed", "a write in Redis has removed it since the miss",
		func(r *Rules) { r.BelieveNoRow = true }, world("22", []string{"G", "S"}, 0, First, Faults{})},
	{"a delete leaves no tombstone", "without a row Redis is right, which missed the delete",
		func(r *Rules) { r.NoTombstone = true }, world("11", []string{"D", ""}, First, First, Faults{RedisLink: 1})},
	{"an expired row is no row", "a failover brings the key back without its TTL, and it lives for ever",
		func(r *Rules) { r.ExpiredIsNoRow = true }, world("11", []string{"E", ""}, First, First, Faults{Failover: 1}).with(letter)},
	{"a miss does not look at the marks", "it reads a row that a write in Redis has replaced",
		func(r *Rules) { r.IgnoreMarks = true }, world("11", []string{"D", ""}, First, First, Faults{PgLink: 1})},
	{"phase0 does not look at the marks", "it reads a row that a write in Redis has replaced",
		func(r *Rules) { r.Phase0Blind = true }, world("01", []string{"", "S"}, First, First, Faults{PgLink: 1})},
	{"nil without Redis and without a row", "Redis may hold it",
		func(r *Rules) { r.NilWithoutRedis = true }, world("22", []string{"S", ""}, First, First, Faults{RedisLink: 1})},
	{"a stale copy is written over while Postgres is down", "both journals name the key, and the row wins",
		func(r *Rules) { r.WriteOverStale = true }, world("11", []string{"SD", ""}, First, First, Faults{RedisLink: 1, PgLink: 1})},
	{"the old value is put back after a commit of unknown fate", "the row may be the new one",
		func(r *Rules) { r.PutBackUnknown = true }, world("11", []string{"S", "G"}, First, First, Faults{PgLink: 1})},
	{"a command is repeated after a commit of unknown fate", "what others wrote after it is gone",
		func(r *Rules) { r.RepeatUnknown = true }, world("11", []string{"X", "S"}, First, First, Faults{PgLink: 1})},
	{"no repair after a failover", "Redis has lost a write that the store has",
		func(r *Rules) { r.NoWindow = true }, world("11", []string{"S", ""}, First, First, Faults{Failover: 1}).with(letter)},
	{"the clock names the data before it is verified", "the next attempt finds its own clock",
		func(r *Rules) { r.ClockAtOnce = true }, world("11", []string{"S", ""}, First, First, Faults{Failover: 1, RedisLink: 1}).with(letter)},
	{"a fresh TTL", "the promoted value outlives its key",
		func(r *Rules) { r.FreshTTL = true }, world("11", []string{"G", ""}, 0, First, Faults{}).with(mortal)},
	{"a TTL is kept by the store", "the row expires before the commit, and what it becomes lives for ever",
		func(r *Rules) { r.KeepTTL = true }, world("11", []string{"A", ""}, First, First, Faults{}).with(mortal)},
	{"no fence on the way back", "the store has missed writes",
		func(r *Rules) { r.NoFence = true }, world("34", []string{"B", ""}, 0, First, Faults{}).with(returned)},
	{"FLUSHALL beside writers", "a row that was written before it stays",
		func(r *Rules) { r.FlushUnfenced = true }, world("11", []string{"F", "SG"}, First, First, Faults{Evict: true}).with(flushed)},
	{"leases are not watched", "a script runs on what another has replaced",
		func(r *Rules) { r.UnwatchedRun = true }, world("11", []string{"R", "S"}, First, First, Faults{PgLink: 1})},
	{"phase2 takes no locks", "a row that another writes is dropped",
		func(r *Rules) { r.UnlockedWrite = true }, world("12", []string{"S", "S"}, First, First, Faults{})},
	{"a write leaves what is known to be absent", "nil is remembered over the value",
		func(r *Rules) { r.KeepNegative = true }, world("11", []string{"G", "S"}, 0, 0, Faults{}).with(negatives)},
	{"a write in Redis expects nothing", "it is computed from what another has replaced",
		func(r *Rules) { r.ExpectNothing = true }, world("11", []string{"X", "X"}, First, First, Faults{PgLink: 2})},
	{"the mark wins", "a write in the store is lost to an older one in Redis",
		func(r *Rules) { r.MarkWins = true }, world("12", []string{"S", "S"}, First, First, Faults{RedisLink: 1, PgLink: 1})},
	{"a reader that waits asks a Redis that is not verified", "it is answered from a memory of before",
		func(r *Rules) { r.AwaitUntrusted = true }, world("11", []string{"S", "SG"}, First, First, Faults{Failover: 1}).with(letter)},
	{"a write in Redis compares the value only", "what it computed from is long gone",
		func(r *Rules) { r.ValueOnly = true }, world("22", []string{"D", "X"}, 0, First, Faults{PgLink: 1})},
	{"the repair of a mark does not look for entries", "a newer row is dropped, and its entry struck without one",
		func(r *Rules) { r.RepairUnaware = true }, world("12", []string{"S", "S"}, First, First, Faults{RedisLink: 1})},
	{"a mark is put back where the key has been repaired", "the key is absent and marked, and reads as deleted",
		func(r *Rules) { r.PutBackStruck = true }, world("11", []string{"S", "S"}, First, First, Faults{PgLink: 1, Restart: 1}).with(letter)},
	{"a read that avoids a copy does not look for marks", "a write in Redis stands there, and the row is older",
		func(r *Rules) { r.StaleBlind = true }, world("11", []string{"S", "S"}, First, First, Faults{RedisLink: 1, PgLink: 1})},
	{"readers promote while FLUSHALL runs", "the row dies, and without one Redis is right",
		func(r *Rules) { r.FlushOpen = true }, world("11", []string{"F", "G"}, First, First, Faults{}).with(flushed)},
	{"a row that has expired makes no entry", "a failover brings back what it replaced",
		func(r *Rules) { r.JournalExpired = true }, world("11", []string{"E", ""}, First, First, Faults{Failover: 1}).with(letter)},
	{"a number is given twice", "the older writer passes for the younger",
		func(r *Rules) { r.EqualNumbers = true }, world("11", []string{"S", "S"}, First, First, Faults{PgCrash: 1, Forgets: true})},
	{"a number is given twice where Redis is the truth", "a repair writes a row that nobody drops",
		func(r *Rules) { r.EqualNumbers = true }, world("12", []string{"", "SD"}, First, First, Faults{PgCrash: 1, Forgets: true})},
	{"a number is given twice to what only Redis can run", "it does not see the writer that came between",
		func(r *Rules) { r.EqualNumbers = true }, world("11", []string{"S", "R"}, 0, 0, Faults{PgCrash: 1, Forgets: true})},
	{"drain computes from a row", "phase3 has overtaken it",
		func(r *Rules) { r.DrainTakesRow = true }, world("34", []string{"X", "S"}, First, First, Faults{})},
	{"the end of a transaction takes out what somebody has marked", "absent and marked means deleted",
		func(r *Rules) { r.CaptureMarked = true }, world("11", []string{"T", "S"}, First, First, Faults{PgLink: 1})},
	{"phase2 takes a marked key from Redis though an entry names it", "a failover has brought back the mark, and with it what was deleted since",
		func(r *Rules) { r.BothBlind = true }, world("12", []string{"D", "X"}, First, 0, Faults{}).with(struck)},
	{"a script takes a marked key from Redis though an entry names it", "the same, of what was replaced since",
		func(r *Rules) { r.BothBlind = true }, world("12", []string{"S", "R"}, First, 0, Faults{}).with(struck)},
	{"a transaction takes a marked key from Redis though an entry names it", "the same",
		func(r *Rules) { r.BothBlind = true }, world("12", []string{"D", "T"}, First, 0, Faults{}).with(struck)},
	{"a strike leaves the row as old as it is", "a failover loses the delete, and the row is too old to be looked at",
		func(r *Rules) { r.StrikeSilent = true }, world("11", []string{"S", ""}, First, First, Faults{RedisLink: 1, Failover: 1, Hours: 1}).with(letter)},
}

func TestVariants(t *testing.T) {
	var left Rules
	for _, v := range variants {
		v.wrong(&left)
	}
	left.NoKill = true // in no world of the families is it missed: whatever it ends the numbers refuse, or the command was answered -UNCERTAIN
	for i, all := 0, reflect.ValueOf(left); i < all.NumField(); i++ {
		if !all.Field(i).Bool() {
			t.Errorf("no variant leaves out %s", all.Type().Field(i).Name)
		}
	}
	for _, v := range variants {
		t.Run(v.name, func(t *testing.T) {
			in := v.in
			in.Limit = 3_000_000
			right := Explore(in)
			if right.Wrong != "" || !right.Whole {
				t.Errorf("with the rule: %s", right)
			}
			v.wrong(&in.Rules)
			r := Explore(in)
			if r.Wrong == "" {
				t.Errorf("%s is not found: %s", v.why, r)
			}
			t.Logf("%d states, without the rule %d: %s", right.States, r.States, r)
		})
	}
}
