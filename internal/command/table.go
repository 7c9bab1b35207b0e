package command

import (
	"slices"
	"strings"
)

// Info is what Redis says about one command or subcommand. The rows are shared: read them, never change them.
type Info struct {
	// Name is in lower case; a subcommand's is its container's, a bar and its own: "config|get".
	Name string
	// Arity counts the command's own name. Negative is a minimum. It is the arity of the version that the table
	// was made from, and later versions relax some (ZRANK takes a fourth argument since 7.2), so it is a hint:
	// the server has the last word about the number of arguments.
	Arity int
	Flags Flag
	ACL   Category
	// First, Last and Step are the positions of the keys in the words of COMMAND before Redis 7: zero First is
	// no keys, negative Last counts from the end. With MovableKeys they do not tell everything; see Keys.
	First, Last, Step int
	Specs             []KeySpec
	Tips              []string

	id        int
	container bool     // has subcommands
	parse     parseWay // how Keys reads the arguments
}

// ID is the row's place in All, for what is worked out once for every row. It is negative if the row is not the table's.
func (i *Info) ID() int { return i.id }

// Flag is a set of the command flags of COMMAND.
type Flag uint32

// The command flags, in the order of Redis's documentation.
const (
	Write           Flag = 1 << iota // may change data
	Readonly                         // never changes data
	DenyOOM                          // refused when Redis is out of memory
	Admin                            // administration
	PubSub                           // publishes or subscribes
	NoScript                         // refused in scripts
	Blocking                         // may wait for another client
	Loading                          // allowed while Redis loads its data
	Stale                            // allowed on a replica with stale data
	SkipMonitor                      // not shown by MONITOR
	SkipSlowlog                      // not recorded in SLOWLOG
	Asking                           // accepted by a slot that is being imported
	Fast                             // constant or logarithmic time
	NoAuth                           // allowed before authentication
	MovableKeys                      // First, Last and Step do not tell all keys
	NoMulti                          // refused in MULTI
	NoAsyncLoading                   // refused while a replica loads beside its old data
	AllowBusy                        // allowed while a script runs too long
	NoMandatoryKeys                  // may well have no keys (EVAL with numkeys 0)
	Module                           // comes from a module
)

// Category is a set of ACL categories.
type Category uint32

// The ACL categories, in the order of ACL CAT.
const (
	CatKeyspace Category = 1 << iota
	CatRead
	CatWrite
	CatSet
	CatSortedSet
	CatList
	CatHash
	CatString
	CatBitmap
	CatHyperLogLog
	CatGeo
	CatStream
	CatPubSub
	CatAdmin
	CatFast
	CatSlow
	CatBlocking
	CatDangerous
	CatConnection
	CatTransaction
	CatScripting
	CatArray // since 8.8
)

// categoryWords are Redis's words for the categories, in the order of the constants.
var categoryWords = [...]string{
	"keyspace", "read", "write", "set", "sortedset", "list", "hash", "string", "bitmap", "hyperloglog", "geo", "stream",
	"pubsub", "admin", "fast", "slow", "blocking", "dangerous", "connection", "transaction", "scripting", "array",
}

// Words returns Redis's words for the categories of a set.
func (c Category) Words() []string {
	var words []string
	for i, word := range categoryWords {
		if c&(1<<i) != 0 {
			words = append(words, word)
		}
	}
	return words
}

// Categories returns the words of all categories.
func Categories() []string { return slices.Clone(categoryWords[:]) }

// KeySpec is one of a command's key specifications: where a run of keys begins, how it goes on, and what the
// command does with these keys.
type KeySpec struct {
	Flags KeyFlag

	Begin     BeginSearch
	Index     int    // BeginIndex: the position of the first key
	Keyword   string // BeginKeyword: the first key follows this word
	StartFrom int    // BeginKeyword: where the search starts; negative searches from the end, backwards

	Find      FindKeys
	LastKey   int // FindRange: the last key counted from the first; negative counts from the end
	Limit     int // FindRange: with a LastKey of -1 only the first 1/Limit of what remains are keys
	KeyNumIdx int // FindKeyNum: where the number of keys stands, counted from the beginning of the run
	FirstKey  int // FindKeyNum: where the first key stands, counted likewise
	KeyStep   int // the distance between two keys
}

// BeginSearch is a closed list: how a run of keys is found.
type BeginSearch uint8

const (
	BeginUnknown BeginSearch = iota
	BeginIndex
	BeginKeyword
)

// FindKeys is a closed list: how the keys of a run are found.
type FindKeys uint8

const (
	FindUnknown FindKeys = iota
	FindRange
	FindKeyNum
)

// KeyFlag is a set of the flags of a key specification. A key has exactly one of KeyRO, KeyRW, KeyOW and KeyRM,
// which speak of the value, its type and its expiry together; the four that follow speak of the user's data.
type KeyFlag uint16

const (
	KeyRO         KeyFlag = 1 << iota // read, not changed
	KeyRW                             // read and changed
	KeyOW                             // overwritten, whatever it was
	KeyRM                             // removed, whatever it was
	KeyAccess                         // data may be returned, copied or used
	KeyUpdate                         // data may be changed
	KeyInsert                         // data is only added
	KeyDelete                         // data is only deleted
	KeyNotKey                         // looks like a key to a cluster, but is none (a shard channel)
	KeyIncomplete                     // the specification may miss keys
	KeyVariable                       // the flags depend on the arguments
)

// ArityOK reports whether a command line of n words, its name included, has a length that Arity allows.
func (i *Info) ArityOK(n int) bool {
	if i.Arity < 0 {
		return n >= -i.Arity
	}
	return n == i.Arity
}

// Container reports whether the command has subcommands with rows of their own.
func (i *Info) Container() bool { return i.container }

// Keyed reports whether the command can name keys at all. It is asked of a subcommand, not of its container.
func (i *Info) Keyed() bool {
	if i.parse == parseDebug {
		return true
	}
	return slices.ContainsFunc(i.Specs, func(s KeySpec) bool { return s.Flags&KeyNotKey == 0 })
}

// maxName is the longest name that can be found, so that a name is folded on the stack. The longest real one,
// sentinel|is-master-down-by-addr, has 31 bytes.
const maxName = 48

// index finds a row by its name in lower case; all has the rows in the order of their names. Both are static
// once the package is initialised.
var (
	index = indexTable()
	all   = allRows()
)

func indexTable() map[string]*Info {
	m := make(map[string]*Info, len(table))
	for i := range table {
		info := &table[i]
		info.id = i
		info.parse = parseWays[info.Name]
		m[info.Name] = info
	}
	for name := range m {
		if container, _, ok := strings.Cut(name, "|"); ok {
			m[container].container = true
		}
	}
	return m
}

func allRows() []*Info {
	rows := make([]*Info, len(table))
	for i := range table {
		rows[i] = &table[i]
	}
	return rows
}

// Lookup finds a command by its name, whatever the case. It returns nil if the command is unknown. It does not
// find subcommands: "config|get" is no command that a client could send.
func Lookup(name []byte) *Info {
	var buf [maxName]byte
	folded, ok := appendFolded(buf[:0], name)
	if !ok {
		return nil
	}
	return index[string(folded)]
}

// LookupSub finds a container's subcommand: CONFIG and GET give config|get. It returns nil if either is unknown
// or name is not a container.
func LookupSub(name, sub []byte) *Info {
	var buf [maxName]byte
	folded, ok := appendFolded(buf[:0], name)
	if !ok || len(folded) == maxName {
		return nil
	}
	folded, ok = appendFolded(append(folded, '|'), sub)
	if !ok {
		return nil
	}
	return index[string(folded)]
}

// Resolve finds the row of a whole command line as Redis does: the subcommand's where the first word is a
// container and more words follow. It returns nil if Redis would answer that it does not know the command or
// the subcommand, and for an empty line.
func Resolve(args [][]byte) *Info {
	if len(args) == 0 {
		return nil
	}
	info := Lookup(args[0])
	if info != nil && info.container && len(args) > 1 {
		return LookupSub(args[0], args[1])
	}
	return info
}

// Static reports whether Resolve finds the row for every command line that begins with its name: it is one of the table, and neither
// a container nor of one.
func Static(info *Info) bool {
	return info != nil && !info.container && index[info.Name] == info && !strings.Contains(info.Name, "|")
}

// All returns the rows of all commands and subcommands in the order of their names. The slice is the caller's,
// the rows are not.
func All() []*Info { return slices.Clone(all) }

// appendFolded appends word in lower case to dst. It refuses what no name contains: the bar that joins
// subcommands to containers in the table, and more bytes than dst has room for.
func appendFolded(dst, word []byte) ([]byte, bool) {
	if len(word) > cap(dst)-len(dst) {
		return dst, false
	}
	for _, c := range word {
		if c == '|' {
			return dst, false
		}
		dst = append(dst, lower(c))
	}
	return dst, true
}

// lower folds ASCII only, as Redis does in the C locale.
func lower(c byte) byte {
	if 'A' <= c && c <= 'Z' {
		return c + ('a' - 'A')
	}
	return c
}
