package command

// Key is one argument that names a key, and what the command does with it.
type Key struct {
	// Arg is the key's position in the command line; the command's name is at 0.
	Arg int
	// Read: what the key holds decides the reply or the result (RO, RW).
	Read bool
	// Write: the command may change or remove the key (RW, OW, RM).
	Write bool
	// Overwrite: a new value replaces the old one unseen (OW). Whether there was an old one may still decide if
	// the command runs, as in SETNX, SET with NX, RENAMENX and RESTORE.
	Overwrite bool
	// Flags are Redis's own, from which the three above follow.
	Flags KeyFlag
}

// Keys appends to dst the keys that the command line args names, in the order of COMMAND GETKEYS, and returns
// it. args[0] is the command's name; info is its row, or its container's, or that of its subcommand.
//
// ok is false if the keys cannot be told, and then dst comes back as it was: the command is unknown (info is
// nil), its specifications leave a gap that no code here fills, or the line is malformed in a way that Redis
// answers with an error. A command that names no keys is ok and appends none. The number of arguments is
// not held against Arity, and positions are always inside args, whatever args contains.
//
// Keys tells what a line names, not everything a command touches: the patterns of SORT's BY and GET, keys that
// a script makes up, and FLUSHALL are beyond it. The same words may mean a key in another database (COPY with DB,
// MIGRATE), and several positions may name the same key.
//
// Where Redis's own COMMAND GETKEYS is mistaken about a line that it runs, Keys follows what the command does: see
// specKeys, sortKeys, georadiusKeys and xreadKeys. Missing a key that is written would be worse than naming one too many.
func Keys(info *Info, args [][]byte, dst []Key) (keys []Key, ok bool) {
	if info == nil || len(args) == 0 {
		return dst, false
	}
	if info.container && len(args) > 1 {
		if info = LookupSub(args[0], args[1]); info == nil {
			return dst, false
		}
	}
	before := len(dst)
	switch info.parse {
	case parseSpecs:
		dst, ok = specKeys(info, args, dst)
	case parseSet:
		dst, ok = firstKey(args, setFlags(args), dst)
	case parseBitfield:
		dst, ok = firstKey(args, bitfieldFlags(args), dst)
	case parseDelex:
		dst, ok = firstKey(args, delexFlags(args), dst)
	case parseSort:
		dst, ok = sortKeys(args, dst)
	case parseSortRO:
		dst, ok = firstKey(args, KeyRO|KeyAccess, dst)
	case parseGeoradius:
		dst, ok = georadiusKeys(args, dst)
	case parseMigrate:
		dst, ok = migrateKeys(args, dst)
	case parseXread:
		dst, ok = xreadKeys(info, args, dst)
	case parseDebug:
		dst, ok = debugKeys(args, dst)
	}
	if !ok {
		dst = dst[:before]
	}
	return dst, ok
}

// parseWay is a closed list: how a command's arguments are read. All but the first are for commands whose key
// specifications are incomplete, leave flags to the arguments, or mislead.
type parseWay uint8

const (
	parseSpecs parseWay = iota
	parseSet
	parseBitfield
	parseDelex
	parseSort
	parseSortRO
	parseGeoradius
	parseMigrate
	parseXread
	parseDebug
)

var parseWays = map[string]parseWay{
	"set":               parseSet,
	"bitfield":          parseBitfield,
	"delex":             parseDelex,
	"sort":              parseSort,
	"sort_ro":           parseSortRO,
	"georadius":         parseGeoradius,
	"georadiusbymember": parseGeoradius,
	"migrate":           parseMigrate,
	"xread":             parseXread,
	"xreadgroup":        parseXread,
	"debug":             parseDebug,
}

func newKey(arg int, flags KeyFlag) Key {
	return Key{
		Arg:       arg,
		Read:      flags&(KeyRO|KeyRW) != 0,
		Write:     flags&(KeyRW|KeyOW|KeyRM) != 0,
		Overwrite: flags&KeyOW != 0,
		Flags:     flags,
	}
}

// specKeys reads the keys off the command's key specifications.
func specKeys(info *Info, args [][]byte, dst []Key) ([]Key, bool) {
	before, keyed := len(dst), false
	for i := range info.Specs {
		spec := &info.Specs[i]
		if spec.Flags&KeyNotKey != 0 {
			continue
		}
		keyed = true
		if spec.Flags&KeyIncomplete != 0 {
			return dst, false
		}
		var first int
		switch spec.Begin {
		case BeginIndex:
			first = spec.Index
		case BeginKeyword:
			if first = afterKeyword(spec, args); first == 0 {
				continue // an option that this line does not use
			}
		default:
			return dst, false
		}
		var last int
		switch spec.Find {
		case FindRange:
			last = rangeEnd(spec, first, len(args))
			if last == first-1 && spec.LastKey == -1 && spec.Limit == 0 && len(dst) > before {
				continue // PFMERGE with a destination only: COMMAND GETKEYS finds nothing, the command writes
			}
		case FindKeyNum:
			n, ok := keyCount(spec, first, args)
			if !ok {
				return dst, false
			}
			if n == 0 {
				continue
			}
			// Every key takes KeyStep words (MSETEX: a key and its value), so the last stands that much farther.
			first += spec.FirstKey
			last = first + (n-1)*spec.KeyStep
		default:
			return dst, false
		}
		if last < first || last >= len(args) {
			return dst, false
		}
		for arg := first; arg <= last; arg += spec.KeyStep {
			dst = append(dst, newKey(arg, spec.Flags))
		}
	}
	if keyed && len(dst) == before && info.Flags&NoMandatoryKeys == 0 {
		return dst, false
	}
	return dst, true
}

// afterKeyword returns the position that follows the specification's keyword, 0 if the line lacks it.
func afterKeyword(spec *KeySpec, args [][]byte) int {
	from, step := spec.StartFrom, 1
	if from < 0 {
		from, step = len(args)+from, -1
	}
	for i := from; i > 0 && i < len(args); i += step {
		if isWord(args[i], spec.Keyword) {
			return i + 1
		}
	}
	return 0
}

// rangeEnd returns the position of a range's last key. It may lie before first or outside the line.
func rangeEnd(spec *KeySpec, first, argc int) int {
	switch {
	case spec.LastKey >= 0:
		return first + spec.LastKey
	case spec.Limit == 0:
		return argc + spec.LastKey
	default:
		return first + (argc-first)/spec.Limit + spec.LastKey
	}
}

// keyCount reads the number of keys that a command line states. It refuses what Redis refuses to read as a
// number, and more keys than the line has words.
func keyCount(spec *KeySpec, first int, args [][]byte) (int, bool) {
	at := first + spec.KeyNumIdx
	if at >= len(args) {
		return 0, false
	}
	digits := args[at]
	if len(digits) == 0 || len(digits) > 1 && digits[0] == '0' {
		return 0, false
	}
	n := 0
	for _, c := range digits {
		if c < '0' || c > '9' {
			return 0, false
		}
		if n = 10*n + int(c-'0'); n > len(args) {
			return 0, false
		}
	}
	return n, true
}

// firstKey is for commands with one key, right behind the name.
func firstKey(args [][]byte, flags KeyFlag, dst []Key) ([]Key, bool) {
	if len(args) < 2 {
		return dst, false
	}
	return append(dst, newKey(1, flags)), true
}

// setFlags tells a SET that returns the old value from one that does not look at it.
func setFlags(args [][]byte) KeyFlag {
	for i := 3; i < len(args); i++ {
		if isWord(args[i], "get") {
			return KeyRW | KeyAccess | KeyUpdate
		}
	}
	return KeyOW | KeyUpdate
}

// bitfieldFlags tells a BITFIELD of GETs from one that may write. In doubt it may.
func bitfieldFlags(args [][]byte) KeyFlag {
	for i := 2; i < len(args); {
		rest := len(args) - i - 1
		switch {
		case isWord(args[i], "get") && rest >= 2:
			i += 3
		case isWord(args[i], "overflow") && rest >= 1:
			i += 2
		default:
			return KeyRW | KeyAccess | KeyUpdate
		}
	}
	return KeyRO | KeyAccess
}

// delexFlags tells a DELEX with a condition on the value from one that is a DEL.
func delexFlags(args [][]byte) KeyFlag {
	if len(args) > 2 {
		return KeyRW | KeyDelete
	}
	return KeyRM | KeyDelete
}

// sortKeys reads SORT's options as the command does. The last STORE wins. A destination is not taken for an
// option, whatever its name: of SORT k STORE by STORE x COMMAND GETKEYS says that it writes "by"; it writes x.
func sortKeys(args [][]byte, dst []Key) ([]Key, bool) {
	if len(args) < 2 {
		return dst, false
	}
	dst = append(dst, newKey(1, KeyRO|KeyAccess))
	store := 0
	for i := 2; i < len(args); {
		switch {
		case isWord(args[i], "limit"):
			i += 3
		case isWord(args[i], "by"), isWord(args[i], "get"):
			i += 2
		case isWord(args[i], "store") && i+1 < len(args):
			store = i + 1
			i += 2
		default:
			i++
		}
	}
	if store > 0 {
		dst = append(dst, newKey(store, KeyOW|KeyUpdate))
	}
	return dst, true
}

// georadiusKeys names every destination of GEORADIUS and GEORADIUSBYMEMBER, in the order of the line. The command
// writes the last one only. COMMAND GETKEYS names the first of each kind, so that it misses the one that is written
// if STORE is said twice.
func georadiusKeys(args [][]byte, dst []Key) ([]Key, bool) {
	if len(args) < 2 {
		return dst, false
	}
	dst = append(dst, newKey(1, KeyRO|KeyAccess))
	for i := 5; i+1 < len(args); i++ {
		if isWord(args[i], "store") || isWord(args[i], "storedist") {
			i++
			dst = append(dst, newKey(i, KeyOW|KeyUpdate))
		}
	}
	return dst, true
}

// migrateKeys reads both forms of MIGRATE: one key in the third place, or an empty third place and keys behind
// KEYS. Both at once is an error. KEYS with nothing behind it leaves the empty third place, as COMMAND GETKEYS
// has it; the command answers NOKEY.
func migrateKeys(args [][]byte, dst []Key) ([]Key, bool) {
	if len(args) < 4 {
		return dst, false
	}
	const flags = KeyRW | KeyAccess | KeyDelete
	for i := 6; i < len(args); i++ {
		switch {
		case isWord(args[i], "auth"):
			i++
		case isWord(args[i], "auth2"):
			i += 2
		case isWord(args[i], "keys"):
			if len(args[3]) > 0 {
				return dst, false
			}
			if i+1 < len(args) {
				for arg := i + 1; arg < len(args); arg++ {
					dst = append(dst, newKey(arg, flags))
				}
				return dst, true
			}
		}
	}
	return append(dst, newKey(3, flags)), true
}

// xreadKeys walks the options of XREAD and XREADGROUP to the word STREAMS; half of what follows are keys. The
// specification would take a group or consumer of that name for the word. A line with an odd half is an error.
func xreadKeys(info *Info, args [][]byte, dst []Key) ([]Key, bool) {
	for i := 1; i < len(args); {
		switch {
		case isWord(args[i], "block"), isWord(args[i], "count"), isWord(args[i], "claim"):
			i += 2
		case isWord(args[i], "group"):
			i += 3
		case isWord(args[i], "noack"):
			i++
		case isWord(args[i], "streams"):
			first, words := i+1, len(args)-i-1
			if words == 0 || words%2 != 0 {
				return dst, false
			}
			for arg := first; arg < first+words/2; arg++ {
				dst = append(dst, newKey(arg, info.Specs[0].Flags))
			}
			return dst, true
		default:
			return dst, false
		}
	}
	return dst, false
}

// debugKeys knows the subcommands of DEBUG that look at a key; Redis gives none of them a specification. POPULATE
// makes up names of its own, and REPLICATE hands a whole command to the replicas: what they touch cannot be told.
func debugKeys(args [][]byte, dst []Key) ([]Key, bool) {
	if len(args) < 2 {
		return dst, true
	}
	last := 0
	switch sub := args[1]; {
	case isWord(sub, "populate"), isWord(sub, "replicate"):
		return dst, false
	case isWord(sub, "digest-value"):
		last = len(args) - 1
	case isWord(sub, "object"), isWord(sub, "sdslen"), isWord(sub, "listpack"), isWord(sub, "ziplist"),
		isWord(sub, "quicklist"), isWord(sub, "htstats-key"):
		if last = 2; last >= len(args) {
			return dst, false
		}
	}
	for arg := 2; arg <= last; arg++ {
		dst = append(dst, newKey(arg, KeyRO|KeyAccess))
	}
	return dst, true
}

// isWord compares an argument with an option as Redis does: without regard to ASCII case, and as C strings, so
// that bytes behind a NUL do not count.
func isWord(arg []byte, word string) bool {
	if len(arg) > len(word) && arg[len(word)] == 0 {
		arg = arg[:len(word)]
	}
	if len(arg) != len(word) {
		return false
	}
	for i, c := range arg {
		if lower(c) != lower(word[i]) {
			return false
		}
	}
	return true
}
