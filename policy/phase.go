package policy

import (
	"fmt"
	"strings"
)

// Phase is how far a route has moved from the store to Redis. The zero value is Phase0. Phases are ordered:
// a route moves through them one step at a time, in either direction.
type Phase uint8

const (
	// Phase0: the store only. The start, and the last resort.
	Phase0 Phase = iota
	// Phase1: dual write. Redis answers first, the store holds everything.
	Phase1
	// Phase2: Redis is primary. The store only answers for what has not been written since.
	Phase2
	// Drain: as Phase2 for writes, but nobody reads the store any more. It lets sidecars in Phase2 and Phase3
	// change over without meeting.
	Drain
	// Phase3: Redis only. The store is not even connected.
	Phase3
)

var phaseWords = [...]string{"phase0", "phase1", "phase2", "drain", "phase3"}

// Phases returns all phases in order. The slice belongs to the caller.
func Phases() []Phase { return []Phase{Phase0, Phase1, Phase2, Drain, Phase3} }

// ParsePhase returns the phase that word names, exactly as String spells it. The error lists the words.
func ParsePhase(word string) (Phase, error) {
	for i, w := range phaseWords {
		if w == word {
			return Phase(i), nil
		}
	}
	return 0, fmt.Errorf("unknown phase %q: want one of %s", word, strings.Join(phaseWords[:], ", "))
}

// String returns the word for p that the configuration uses.
func (p Phase) String() string { return enumWord("Phase", phaseWords[:], uint8(p)) }

// MarshalText writes the word, for JSON.
func (p Phase) MarshalText() ([]byte, error) { return []byte(p.String()), nil }

// UnmarshalText reads a word.
func (p *Phase) UnmarshalText(text []byte) (err error) {
	*p, err = ParsePhase(string(text))
	return err
}

var phaseMeanings = [...]string{
	"Postgres alone", "both are written", "Redis is the primary", "Redis alone is read, rows are still deleted", "Redis alone",
}

// Meaning says in a few words what p is.
func (p Phase) Meaning() string { return enumWord("Phase", phaseMeanings[:], uint8(p)) }

func (p Phase) valid() bool { return int(p) < len(phaseWords) }

// Adjacent reports whether a and b are exactly one step apart, so that sidecars in both may serve the same
// keys.
func Adjacent(a, b Phase) bool {
	return a.valid() && b.valid() && (a+1 == b || b+1 == a)
}

// stepError says why a step cannot be. It has nothing in it that a log must not have.
type stepError string

func (e stepError) Error() string  { return string(e) }
func (e stepError) Reason() string { return string(e) }

// Step returns nil if a route may go from one phase to the other at once: they are the same or adjacent.
// Otherwise the error names the step that comes next.
func Step(from, to Phase) error {
	switch {
	case !from.valid() || !to.valid():
		return stepError(fmt.Sprintf("no step from %s to %s: no such phase", from, to))
	case from == to || Adjacent(from, to):
		return nil
	case from < to:
		return stepError(fmt.Sprintf("%s to %s is more than one step: %s comes next", from, to, from+1))
	default:
		return stepError(fmt.Sprintf("%s to %s is more than one step: %s comes next", from, to, from-1))
	}
}

// WriteMode is a closed list: where a write or delete goes while both stores are well.
type WriteMode uint8

const (
	// WriteStoreOnly: the store. The copy in Redis is deleted.
	WriteStoreOnly WriteMode = iota
	// WriteBoth: both, committed in the store before it can be seen in Redis.
	WriteBoth
	// WriteRedisDropRow: Redis. The store's row is deleted, or it would come back when Redis forgets the key.
	WriteRedisDropRow
	// WriteRedisOnly: Redis. Nothing else is told.
	WriteRedisOnly
)

var writeModeWords = [...]string{"store-only", "both", "redis-drop-row", "redis-only"}

// String returns a short word for m, for logs and labels.
func (m WriteMode) String() string { return enumWord("WriteMode", writeModeWords[:], uint8(m)) }

// KeepsRow tells whether the store holds the value of every write, and has it before Redis.
func (m WriteMode) KeepsRow() bool { return m == WriteStoreOnly || m == WriteBoth }

// Outage is a closed list: what becomes of a read or a write while one of the two stores is down.
type Outage uint8

const (
	// NoEffect: the answer does not depend on the store that is down.
	NoEffect Outage = iota
	// FromStore: a read is answered by the store. In Phase2 a missing row cannot be decided: OnUnknown says what
	// the client gets.
	FromStore
	// ToStoreAndJournal: a write goes to the store, and to the journal that Redis's copy is stale.
	ToStoreAndJournal
	// FromRedis: a read is answered by Redis. A miss there cannot be decided: OnUnknown says what the client gets.
	FromRedis
	// ToRedisAndJournal: a write goes to Redis, and to the journal that the store's copy is stale.
	ToRedisAndJournal
	// Refuse: the client gets -UNAVAILABLE.
	Refuse
	// RedisError: the client gets the error that Redis itself answered, or -UNAVAILABLE if Redis answered none.
	RedisError
)

var outageWords = [...]string{
	"no-effect", "from-store", "to-store-and-journal", "from-redis", "to-redis-and-journal", "refuse", "redis-error",
}

// String returns a short word for o, for logs and labels.
func (o Outage) String() string { return enumWord("Outage", outageWords[:], uint8(o)) }

// Rules is what a phase means: the only source of that knowledge. Code asks for a rule, never for a phase.
type Rules struct {
	UsesStore  bool // the store is connected: its rows, its journal or its fence matter
	ReadsRedis bool // a read asks Redis first
	ReadsStore bool // a read asks the store, for what Redis lacks or (without ReadsRedis) for everything
	Promotes   bool // what the store answered is written into Redis

	Write WriteMode

	RedisDownRead, RedisDownWrite Outage
	StoreDownRead, StoreDownWrite Outage
}

// rules is the table of phases: every line is one phase.
var rules = [...]Rules{
	Phase0: {
		UsesStore: true, ReadsStore: true,
		Write:         WriteStoreOnly,
		RedisDownRead: NoEffect, RedisDownWrite: NoEffect,
		StoreDownRead: Refuse, StoreDownWrite: Refuse,
	},
	Phase1: {
		UsesStore: true, ReadsRedis: true, ReadsStore: true, Promotes: true,
		Write:         WriteBoth,
		RedisDownRead: FromStore, RedisDownWrite: ToStoreAndJournal,
		StoreDownRead: FromRedis, StoreDownWrite: ToRedisAndJournal,
	},
	Phase2: {
		UsesStore: true, ReadsRedis: true, ReadsStore: true, Promotes: true,
		Write:         WriteRedisDropRow,
		RedisDownRead: FromStore, RedisDownWrite: Refuse,
		StoreDownRead: FromRedis, StoreDownWrite: ToRedisAndJournal,
	},
	Drain: {
		UsesStore: true, ReadsRedis: true,
		Write:         WriteRedisDropRow,
		RedisDownRead: RedisError, RedisDownWrite: RedisError,
		StoreDownRead: NoEffect, StoreDownWrite: ToRedisAndJournal,
	},
	Phase3: {
		ReadsRedis:    true,
		Write:         WriteRedisOnly,
		RedisDownRead: RedisError, RedisDownWrite: RedisError,
		StoreDownRead: NoEffect, StoreDownWrite: NoEffect,
	},
}

// Rules returns what p means. It panics if p is none of Phases; a Router holds no such phase.
func (p Phase) Rules() Rules { return rules[p] }

// enumWord returns the word of value v, or the type and number of a value that is not in the list.
func enumWord(kind string, words []string, v uint8) string {
	if int(v) < len(words) {
		return words[v]
	}
	return fmt.Sprintf("%s(%d)", kind, v)
}
