package command

import (
	"bytes"
	"strings"
)

// corpus has at least one line that Redis runs for every command that names keys. An argument that begins with
// "key" is a key and no other is, so each line says itself what Keys must find. "" is an empty argument and
// \0 a NUL.
var corpus = lines(`
APPEND key1 v
ARCOUNT key1
ARDEL key1 0 1
ARDELRANGE key1 0 1
ARGET key1 0
ARGETRANGE key1 0 1
ARGREP key1 0 1 MATCH x
ARINFO key1
ARINSERT key1 v w
ARLASTITEMS key1 2
ARLEN key1
ARMGET key1 0 1
ARMSET key1 0 v 1 w
ARNEXT key1
AROP key1 0 1 SUM
ARRING key1 3 v
ARSCAN key1 0 1
ARSEEK key1 0
ARSET key1 0 v
BITCOUNT key1
BITCOUNT key1 0 -1 BIT
BITFIELD key1
BITFIELD key1 GET u8 0
BITFIELD key1 GET u8 0 OVERFLOW SAT GET u4 8
BITFIELD key1 GET u8 0 SET u8 0 255
BITFIELD key1 OVERFLOW FAIL INCRBY u2 100 1
BITFIELD_RO key1 GET u8 0
BITOP AND key1 key2 key3
BITOP NOT key1 key2
BITPOS key1 1 2
BLMOVE key1 key2 LEFT RIGHT 0.01
BLMPOP 0.01 2 key1 key2 LEFT COUNT 10
BLPOP key1 key2 key3 0.01
BRPOP key1 0.01
BRPOPLPUSH key1 key2 0.01
BZMPOP 0.01 1 key1 MIN
BZPOPMAX key1 key2 0.01
BZPOPMIN key1 0.01
COPY key1 key2
COPY key1 key2 DB 1 REPLACE
DEBUG OBJECT key1
DEBUG SDSLEN key1
DEBUG DIGEST-VALUE key1 key2
DEBUG SLEEP 0
DECR key1
DECRBY key1 2
DEL key1
DEL key1 key2 key3
DELEX key1
DELEX key1 IFEQ v
DELIFEQ key1 v
DIGEST key1
DUMP key1
EVAL script 0
EVAL script 0 arg
EVAL script 2 key1 key2 arg
EVAL_RO script 1 key1
EVALSHA sha 1 key1 arg
EVALSHA_RO sha 0
EVALSHA_RO sha 1 key1
EXISTS key1 key2
EXPIRE key1 10
EXPIRE key1 10 NX
EXPIREAT key1 10
EXPIRETIME key1
FCALL f 0
FCALL f 1 key1 arg
FCALL_RO f 2 key1 key2
GEOADD key1 1 2 m
GEODIST key1 m n
GEOHASH key1 m
GEOPOS key1 m
GEORADIUS key1 1 2 3 m
GEORADIUS key1 1 2 3 m COUNT 1 ASC STORE key2
GEORADIUS key1 1 2 3 m storedist key2
GEORADIUS key1 1 2 3 m STORE key2 STOREDIST key3
GEORADIUS_RO key1 1 2 3 m WITHDIST
GEORADIUSBYMEMBER key1 mem 3 m
GEORADIUSBYMEMBER key1 mem 3 m STORE key2
GEORADIUSBYMEMBER key1 STORE 3 m STOREDIST key2
GEORADIUSBYMEMBER_RO key1 mem 3 m
GEOSEARCH key1 FROMMEMBER m BYRADIUS 1 m
GEOSEARCHSTORE key1 key2 FROMMEMBER m BYRADIUS 1 m
GET key1
GETBIT key1 1
GETDEL key1
GETEX key1
GETEX key1 EX 10
GETRANGE key1 0 1
GETSET key1 v
HDEL key1 f
HEXISTS key1 f
HEXPIRE key1 10 FIELDS 1 f
HEXPIREAT key1 10 FIELDS 1 f
HEXPIRETIME key1 FIELDS 1 f
HGET key1 f
HGETALL key1
HGETDEL key1 FIELDS 1 f
HGETEX key1 FIELDS 1 f
HINCRBY key1 f 1
HINCRBYFLOAT key1 f 1
HKEYS key1
HLEN key1
HMGET key1 f g
HMSET key1 f v
HPERSIST key1 FIELDS 1 f
HPEXPIRE key1 10 FIELDS 1 f
HPEXPIREAT key1 10 FIELDS 1 f
HPEXPIRETIME key1 FIELDS 1 f
HPTTL key1 FIELDS 1 f
HRANDFIELD key1 2 WITHVALUES
HSCAN key1 0
HSET key1 f v g w
HSETEX key1 EX 10 FIELDS 1 f v
HSETNX key1 f v
HSTRLEN key1 f
HTTL key1 FIELDS 1 f
HVALS key1
INCR key1
INCRBY key1 1
INCRBYFLOAT key1 1
INCREX key1 BYINT 2
LCS key1 key2 LEN
LINDEX key1 0
LINSERT key1 BEFORE p v
LLEN key1
LMOVE key1 key2 LEFT RIGHT
LMPOP 2 key1 key2 LEFT
LPOP key1 2
LPOS key1 v
LPUSH key1 v w
LPUSHX key1 v
LRANGE key1 0 1
LREM key1 0 v
LSET key1 0 v
LTRIM key1 0 1
MEMORY USAGE key1 SAMPLES 5
MGET key1
MGET key1 key2 key3
MIGRATE h 6379 key1 0 10
MIGRATE h 6379 key1 0 10 COPY REPLACE AUTH keys
MIGRATE h 6379 "" 0 10 KEYS key1
MIGRATE h 6379 "" 0 10 AUTH2 keys keys REPLACE KEYS key1 key2 key3
MOVE key1 1
MSET key1 v
MSET key1 v key2 w
MSETEX 1 key1 v
MSETEX 2 key1 v key2 w NX EX 10
MSETNX key1 v key2 w
OBJECT ENCODING key1
OBJECT FREQ key1
OBJECT HELP
OBJECT IDLETIME key1
OBJECT REFCOUNT key1
PERSIST key1
PEXPIRE key1 10
PEXPIREAT key1 10
PEXPIRETIME key1
PFADD key1 e
PFCOUNT key1 key2
PFDEBUG ENCODING key1
PFMERGE key1 key2 key3
PSETEX key1 10 v
PTTL key1
PUBLISH channel message
RENAME key1 key2
RENAMENX key1 key2
RESTORE key1 0 v
RESTORE-ASKING key1 0 v
RPOP key1
RPOPLPUSH key1 key2
RPUSH key1 v
RPUSHX key1 v
SADD key1 m
SCARD key1
SDIFF key1 key2
SDIFFSTORE key1 key2 key3
SET key1 v
SET key1 GET
SET key1 v EX 10 NX
SET key1 v XX GET
SET key1 v get\0
SETBIT key1 1 1
SETEX key1 10 v
SETNX key1 v
SETRANGE key1 0 v
SINTER key1 key2
SINTERCARD 2 key1 key2 LIMIT 1
SINTERSTORE key1 key2
SISMEMBER key1 m
SMEMBERS key1
SMISMEMBER key1 m n
SMOVE key1 key2 m
SORT key1
SORT key1 BY w_* LIMIT 0 1 GET o_* GET # DESC ALPHA
SORT key1 BY store STORE key2
SORT key1 get STORE store key2
SORT key1 LIMIT 0 1 STORE\0x key2
SORT_RO key1 BY w_* GET o_*
SPOP key1 1
SPUBLISH channel message
SRANDMEMBER key1 1
SREM key1 m
SSCAN key1 0
SSUBSCRIBE channel
STRLEN key1
SUBSTR key1 0 1
SUNION key1 key2
SUNIONSTORE key1 key2 key3
SUNSUBSCRIBE
TOUCH key1 key2
TTL key1
TYPE key1
UNLINK key1 key2
VADD key1 VALUES 1 1 e
VCARD key1
VDIM key1
VEMB key1 e
VGETATTR key1 e
VINFO key1
VISMEMBER key1 e
VLINKS key1 e
VRANDMEMBER key1
VRANGE key1 - +
VREM key1 e
VSETATTR key1 e {}
VSIM key1 ELE e
WATCH key1 key2
XACK key1 g 0-1
XACKDEL key1 g KEEPREF IDS 1 0-1
XADD key1 * f v
XAUTOCLAIM key1 g c 0 0
XCFGSET key1 IDMP-DURATION 10
XCLAIM key1 g c 0 0-1
XDEL key1 0-1
XDELEX key1 KEEPREF IDS 1 0-1
XGROUP CREATE key1 g $ MKSTREAM
XGROUP CREATECONSUMER key1 g c
XGROUP DELCONSUMER key1 g c
XGROUP DESTROY key1 g
XGROUP HELP
XGROUP SETID key1 g 0
XIDMPRECORD key1 p i 0-1
XINFO CONSUMERS key1 g
XINFO GROUPS key1
XINFO STREAM key1 FULL
XLEN key1
XNACK key1 g FAIL IDS 1 0-1
XPENDING key1 g
XRANGE key1 - +
XREAD STREAMS key1 0
XREAD COUNT 2 BLOCK 1 STREAMS key1 key2 0 0
XREADGROUP GROUP g c STREAMS key1 >
XREADGROUP GROUP streams streams COUNT 1 NOACK STREAMS key1 key2 > 0
XREVRANGE key1 + -
XSETID key1 0-1
XTRIM key1 MAXLEN 1
ZADD key1 1 m
ZCARD key1
ZCOUNT key1 0 1
ZDIFF 2 key1 key2
ZDIFFSTORE key1 2 key2 key3
ZINCRBY key1 1 m
ZINTER 2 key1 key2 WEIGHTS 1 2
ZINTERCARD 1 key1
ZINTERSTORE key1 2 key2 key3 AGGREGATE MAX
ZLEXCOUNT key1 - +
ZMPOP 1 key1 MIN
ZMSCORE key1 m
ZPOPMAX key1
ZPOPMIN key1
ZRANDMEMBER key1
ZRANGE key1 0 1
ZRANGEBYLEX key1 - +
ZRANGEBYSCORE key1 0 1
ZRANGESTORE key1 key2 0 1
ZRANK key1 m
ZREM key1 m
ZREMRANGEBYLEX key1 - +
ZREMRANGEBYRANK key1 0 1
ZREMRANGEBYSCORE key1 0 1
ZREVRANGE key1 0 1
ZREVRANGEBYLEX key1 + -
ZREVRANGEBYSCORE key1 1 0
ZREVRANK key1 m
ZSCAN key1 0
ZSCORE key1 m
ZUNION 2 key1 key2
ZUNIONSTORE key1 2 key2 key3
`)

// mistaken has lines that Redis runs and whose keys COMMAND GETKEYS gets wrong. They are written like corpus.
var mistaken = lines(`
PFMERGE key1
GEORADIUS key1 1 2 3 m STORE key2 STORE key3
GEORADIUS key1 1 2 3 m COUNT 1 STOREDIST key2 STORE key3 STOREDIST key4
XREADGROUP NOACK GROUP g streams STREAMS key1 >
`)

// malformed has lines that Redis does not run, or does not know, so that their keys cannot be told.
var malformed = lines(`
GET
SET
SORT
DELEX
BITFIELD
SORT_RO
GEORADIUS
MIGRATE
MIGRATE h 6379
MIGRATE h 6379 k 0 10 KEYS a b
DEBUG OBJECT
DEBUG POPULATE 10
DEBUG REPLICATE ALL DEL a
RENAME a
LMPOP
LMPOP 2
LMPOP 0 a LEFT
LMPOP x a LEFT
LMPOP -1 a LEFT
LMPOP 01 a LEFT
LMPOP +1 a LEFT
LMPOP 1x a LEFT
LMPOP "" a LEFT
LMPOP 3 a LEFT
LMPOP 18446744073709551617 a LEFT
EVAL script
EVAL script x
EVAL script 2 a
MSETEX 2 a v
XREAD COUNT 2
XREAD COUNT
XREAD GROUP
XREAD STREAMS
XREAD STREAMS a
XREAD STREAMS a b 0
XREAD WHAT STREAMS a 0
XGROUP WHAT a
CONFIG|GET a
WHAT a
`)

// lines splits a text into command lines.
func lines(text string) [][][]byte {
	var out [][][]byte
	for line := range strings.Lines(strings.TrimSpace(text)) {
		var args [][]byte
		for _, word := range strings.Fields(line) {
			args = append(args, []byte(strings.NewReplacer(`""`, "", `\0`, "\x00").Replace(word)))
		}
		out = append(out, args)
	}
	return out
}

// keysOf returns the keys that a line of corpus declares.
func keysOf(args [][]byte) []string {
	var keys []string
	for _, arg := range args {
		if bytes.HasPrefix(arg, []byte("key")) && string(arg) != "keys" {
			keys = append(keys, string(arg))
		}
	}
	return keys
}
