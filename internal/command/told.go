package command

import (
	"slices"
	"strings"
)

// Told is what a server tells of a command in its reply to COMMAND INFO, in its own words.
type Told struct {
	Name  string
	Arity int
	Flags []string
	Specs []ToldSpec
}

// ToldSpec is a key specification. Begin and Find are the types of the two searches, and Args holds their numbers under Redis's
// names.
type ToldSpec struct {
	Flags       []string
	Begin, Find string
	Keyword     string
	Args        map[string]int
}

// flagWords and keyFlagWords are Redis's words for flags, in the order of the constants.
var (
	flagWords = strings.Fields(`write readonly denyoom admin pubsub noscript blocking loading stale skip_monitor
		skip_slowlog asking fast no_auth movablekeys no_multi no_async_loading allow_busy no_mandatory_keys module`)
	keyFlagWords = strings.Fields(`RO RW OW RM access update insert delete not_key incomplete variable_flags`)
)

// Learn makes a row of what a server tells of a command that the table lacks: one of a module or of a later version. It
// returns nil if that does not say where all the keys are, so that the server must be asked about every single line. The
// row has no ID.
//
// A flag that is unknown here is passed over. A key whose use is not told is taken to be read and written. A module's command
// that is flagged read-only writes none, although Redis declares every key of modules read and written; of PFCOUNT, which is
// Redis's own, both are true.
func Learn(t Told) *Info {
	info := &Info{Name: strings.ToLower(t.Name), Arity: t.Arity, id: noID}
	for _, word := range t.Flags {
		if i := slices.Index(flagWords, word); i >= 0 {
			info.Flags |= 1 << i
		}
	}
	for _, s := range t.Specs {
		k := KeySpec{
			Keyword: s.Keyword, Index: s.Args["index"], StartFrom: s.Args["startfrom"], LastKey: s.Args["lastkey"],
			Limit: s.Args["limit"], KeyNumIdx: s.Args["keynumidx"], FirstKey: s.Args["firstkey"], KeyStep: s.Args["keystep"],
			Begin: map[string]BeginSearch{"index": BeginIndex, "keyword": BeginKeyword}[s.Begin],
			Find:  map[string]FindKeys{"range": FindRange, "keynum": FindKeyNum}[s.Find],
		}
		for _, word := range s.Flags {
			if i := slices.Index(keyFlagWords, word); i >= 0 {
				k.Flags |= 1 << i
			}
		}
		if k.Flags&KeyNotKey == 0 && (k.Begin == BeginUnknown || k.Find == FindUnknown || k.Flags&(KeyIncomplete|KeyVariable) != 0 || k.KeyStep < 1) {
			return nil
		}
		if k.Flags&(KeyRO|KeyRW|KeyOW|KeyRM) == 0 {
			k.Flags |= KeyRW
		}
		if info.Flags&(Module|Readonly|Write) == Module|Readonly && k.Flags&KeyRW != 0 {
			k.Flags = k.Flags&^(KeyRW|KeyUpdate|KeyInsert|KeyDelete) | KeyRO
		}
		info.Specs = append(info.Specs, k)
	}
	if info.Flags&MovableKeys != 0 && len(info.Specs) == 0 {
		return nil // a module's code finds them
	}
	return info
}

// noID is the ID of rows that are not the table's.
const noID = -1
