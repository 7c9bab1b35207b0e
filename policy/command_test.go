package policy

import (
	"slices"
	"strings"
	"testing"
)

func TestClassOf(t *testing.T) {
	tests := []struct {
		class Class
		names string
	}{
		{ReadThrough, `GET MGET STRLEN GETRANGE SUBSTR EXISTS TTL PTTL EXPIRETIME PEXPIRETIME TYPE`},
		{Write, `SET SETEX PSETEX SETNX GETSET MSET DEL UNLINK GETDEL GETEX EXPIRE PEXPIRE EXPIREAT PEXPIREAT
			PERSIST INCR DECR INCRBY DECRBY INCRBYFLOAT APPEND`},
		{LoadPass, `GETBIT BITCOUNT BITPOS BITFIELD_RO LCS DUMP OBJECT TOUCH SORT_RO MEMORY
			EVAL_RO EVALSHA_RO FCALL_RO`},
		{LoadPass, `HSET HGETALL LPUSH LRANGE SADD SMOVE ZADD ZRANGE XADD XREAD XREADGROUP BLPOP BRPOP BLMPOP
			BZPOPMIN BZMPOP BLMOVE LMOVE RPOPLPUSH BRPOPLPUSH GEOADD GEOSEARCH GEORADIUS_RO HEXPIRE HGETDEL VADD
			JSON.SET BF.ADD TS.ADD FT.SEARCH DIGEST ARSET ARGET XIDMPRECORD XNACK`},
		{LoadRunMirror, `PFCOUNT SETRANGE SETBIT BITOP BITFIELD RENAME RENAMENX COPY MOVE MSETNX RESTORE EVAL EVALSHA FCALL
			PFADD PFMERGE PFDEBUG SORT GEORADIUS GEORADIUSBYMEMBER GEOSEARCHSTORE SINTERSTORE SUNIONSTORE SDIFFSTORE
			ZINTERSTORE ZUNIONSTORE ZDIFFSTORE ZRANGESTORE MIGRATE MSETEX DELEX DELIFEQ INCREX`},
		{Flush, `FLUSHDB FLUSHALL SWAPDB`},
		{Keyspace, `KEYS SCAN RANDOMKEY DBSIZE`},
		{Session, `HELLO AUTH SELECT RESET QUIT CLIENT`},
		{Pinning, `MULTI EXEC DISCARD WATCH UNWATCH SUBSCRIBE UNSUBSCRIBE PSUBSCRIBE PUNSUBSCRIBE SSUBSCRIBE
			SUNSUBSCRIBE MONITOR WAIT WAITAOF SYNC PSYNC REPLCONF ASKING READONLY READWRITE POST Host:`},
		{Own, `CACHEPROXY`},
		{Passthrough, `PING ECHO INFO CONFIG PUBLISH SPUBLISH SCRIPT FUNCTION COMMAND ACL CLUSTER LATENCY SLOWLOG
			TIME LASTSAVE SAVE BGSAVE BGREWRITEAOF ROLE LOLWUT SHUTDOWN REPLICAOF SLAVEOF FAILOVER MODULE PUBSUB DEBUG`},
		{LoadRunMirror, `NOSUCHCOMMAND GE GETT GET|SET CONFIG|GET gеt ` + strings.Repeat("x", maxCommandName) + " " +
			strings.Repeat("x", maxCommandName+1)},
	}
	for _, tt := range tests {
		for _, name := range strings.Fields(tt.names) {
			for _, spelled := range []string{name, strings.ToLower(name), name[:1] + strings.ToLower(name[1:])} {
				if got := ClassOf([]byte(spelled)); got != tt.class {
					t.Errorf("ClassOf(%q) = %v, want %v", spelled, got, tt.class)
				}
			}
		}
	}
	for _, name := range []string{"", "get\x00", "\xc7ET", "get ", "@GET"} {
		if got := ClassOf([]byte(name)); got != LoadRunMirror {
			t.Errorf("ClassOf(%q) = %v, want %v", name, got, LoadRunMirror)
		}
	}
}

// TestCommandTable holds that every name is written as it is looked up, and stands in one place only.
func TestCommandTable(t *testing.T) {
	seen := make(map[string]bool)
	for _, line := range commands {
		for _, name := range strings.Fields(line.names) {
			if seen[name] {
				t.Errorf("%s stands in the table twice", name)
			}
			seen[name] = true
			if name != strings.ToLower(name) || len(name) > maxCommandName {
				t.Errorf("%s can never be found", name)
			}
			if got := ClassOf([]byte(strings.ToUpper(name))); got != line.class {
				t.Errorf("ClassOf(%q) = %v, the table says %v", name, got, line.class)
			}
		}
	}
}

func TestClassOfAllocatesNothing(t *testing.T) {
	for _, name := range []string{"get", "GET", "GEORADIUSBYMEMBER_RO", "NOSUCHCOMMAND", strings.Repeat("x", 1000)} {
		b := []byte(name)
		if n := testing.AllocsPerRun(100, func() { ClassOf(b) }); n != 0 {
			t.Errorf("ClassOf(%.20q) allocates %v times", name, n)
		}
	}
}

func BenchmarkClassOf(b *testing.B) {
	name := []byte("GET")
	b.ReportAllocs()
	for b.Loop() {
		ClassOf(name)
	}
}

func TestEveryRedisCommandHasAClass(t *testing.T) {
	names := startRedis(t).strings("COMMAND", "LIST")
	if len(names) < 200 {
		t.Fatalf("Redis lists %d commands", len(names))
	}
	for _, name := range names {
		container, _, _ := strings.Cut(strings.ToLower(name), "|") // modules may shout
		if _, ok := classes[container]; !ok {
			t.Errorf("%s has no class of its own", name)
		}
	}
}

// commandInfo is what Redis says of a command, its subcommands included.
type commandInfo struct {
	name     string
	flags    []string // of the command
	keys     bool     // it has keys; a channel, which Cluster hashes like one, is none
	keyFlags []string // of all its keys: RO, RW, OW (overwritten), RM (removed), insert, update, delete …
}

// parseCommandInfo reads one element of the reply of COMMAND INFO: name, arity, flags, first key, last key,
// step, ACL categories, tips, key specifications, subcommands.
func parseCommandInfo(reply any) commandInfo {
	e := reply.([]any)
	c := commandInfo{name: e[0].(string)}
	for _, flag := range e[2].([]any) {
		c.flags = append(c.flags, flag.(string))
	}
	c.keys = slices.Contains(c.flags, "movablekeys")
	for _, spec := range e[8].([]any) {
		fields := spec.([]any)
		for i := 0; i+1 < len(fields); i += 2 {
			if fields[i] != "flags" {
				continue
			}
			var flags []string
			for _, flag := range fields[i+1].([]any) {
				flags = append(flags, flag.(string))
			}
			if !slices.Contains(flags, "not_key") {
				c.keys = true
				c.keyFlags = append(c.keyFlags, flags...)
			}
		}
	}
	for _, sub := range e[9].([]any) {
		s := parseCommandInfo(sub)
		c.keys = c.keys || s.keys
		c.keyFlags = append(c.keyFlags, s.keyFlags...)
	}
	return c
}

// TestClassesAgreeWithRedis holds what Redis says of its commands against what their class promises.
func TestClassesAgreeWithRedis(t *testing.T) {
	redis := startRedis(t)
	var withKeys int
	for _, reply := range redis.do("COMMAND", "INFO").([]any) {
		c := parseCommandInfo(reply)
		class := ClassOf([]byte(c.name))
		write := slices.Contains(c.flags, "write")
		overwrites := slices.Contains(c.keyFlags, "OW") || slices.Contains(c.keyFlags, "RM")
		if c.keys {
			withKeys++
		}
		switch class {
		case Passthrough, Keyspace, Session, Own:
			if c.keys {
				t.Errorf("%s is %v and has keys", c.name, class)
			}
		case ReadThrough:
			if !c.keys || write {
				t.Errorf("%s is %v: keys %v, write %v", c.name, class, c.keys, write)
			}
		case Write:
			if !c.keys || !write {
				t.Errorf("%s is %v: keys %v, write %v", c.name, class, c.keys, write)
			}
		case LoadPass:
			module := strings.Contains(c.name, ".") // some of theirs name an index, or a label
			if !c.keys && !module || overwrites {
				t.Errorf("%s is %v: keys %v, replaces or removes one %v", c.name, class, c.keys, overwrites)
			}
		case Flush:
			if !write {
				t.Errorf("%s is %v and writes nothing", c.name, class)
			}
		}
	}
	if withKeys < 150 {
		t.Errorf("Redis lists %d commands with keys: the reply is misread", withKeys)
	}
}

// TestLoadPassLeavesStringsAlone runs every command that is called LoadPass and may write on a key that holds a
// string, with arguments that are plausible for most, and looks at the string.
func TestLoadPassLeavesStringsAlone(t *testing.T) {
	redis := startRedis(t)
	const script = `redis.pcall(unpack(ARGV))` // pcall: an error ends nothing
	for _, reply := range redis.do("COMMAND", "INFO").([]any) {
		c := parseCommandInfo(reply)
		if ClassOf([]byte(c.name)) != LoadPass || !slices.Contains(c.flags, "write") || slices.Contains(c.flags, "noscript") {
			continue
		}
		for _, args := range [][]string{
			{"k"}, {"k", "1"}, {"k", "1", "1"}, {"k", "1", "1", "1"}, {"k", "k", "LEFT", "LEFT"}, {"k", "k", "LEFT", "LEFT", "0"},
			{"1", "k", "LEFT"}, {"1", "k", "MIN"}, {"0", "1", "k", "LEFT"}, {"0", "1", "k", "MIN"}, {"k", "*", "f", "v"},
			{"k", "BEFORE", "1", "1"}, {"k", "MAXLEN", "0"}, {"k", "13.4", "38.1", "m"}, {"k", "k"}, {"other", "k", "1"},
			{"k", "other", "1"}, {"k", "g", "c", "0", "0-1"}, {"k", "g", "0-1"},
		} {
			redis.do("SET", "k", "before")
			call := append([]string{"EVAL", script, "1", "k", c.name}, args...)
			redis.do(call...)
			if got := redis.do("GET", "k"); got != "before" {
				t.Errorf("%s %q changed a string to %q", c.name, args, got)
			}
		}
	}
}
