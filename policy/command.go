package policy

import "strings"

// Class is a closed list: what a command needs on keys that are routed. On all other keys every class but
// Flush, Keyspace, Session, Pinning and Own means that the command passes to Redis as it is.
type Class uint8

const (
	// LoadRunMirror: it may change, replace or remove a string in ways that only Redis evaluates. Routed keys that
	// Redis lacks are loaded first; what it left behind is mirrored. The zero value, and the class of every command
	// that is not known, because to mirror too much costs time and to mirror too little costs the truth.
	LoadRunMirror Class = iota
	// ReadThrough: it reads strings. For keys that Redis lacks the store answers.
	ReadThrough
	// Write: it writes or removes strings, and the proxy can evaluate it on the value itself.
	Write
	// LoadPass: it cannot change a string. Routed keys that Redis lacks are loaded first, so that it reads the
	// value or fails with WRONGTYPE as it should.
	LoadPass
	// Flush: it empties or exchanges whole databases, so the stores are fenced too.
	Flush
	// Keyspace: it lists or counts keys: Redis's view, without the proxy's own keys.
	Keyspace
	// Session: it changes or describes the client's own connection, and the proxy answers for that.
	Session
	// Pinning: its meaning, or its effect, is bound to one connection to Redis, so the client needs its own.
	Pinning
	// Own: the proxy answers it.
	Own
	// Passthrough: it names no keys.
	Passthrough
)

var classWords = [...]string{
	"load-run-mirror", "read-through", "write", "load-pass", "flush", "keyspace", "session", "pinning", "own", "passthrough",
}

// String returns a short word for c, for logs and labels.
func (c Class) String() string { return enumWord("Class", classWords[:], uint8(c)) }

// maxCommandName is the longest name, in bytes, that is looked up. The longest known has 20; what is longer
// is not known.
const maxCommandName = 32

// ClassOf returns the class of the command called name, in any case. A container command (CONFIG, XGROUP,
// MEMORY …) has one class for all its subcommands. An unknown name is LoadRunMirror. ClassOf allocates nothing and
// does not keep name.
func ClassOf(name []byte) Class {
	if len(name) > maxCommandName {
		return LoadRunMirror
	}
	var lower [maxCommandName]byte
	for i, c := range name {
		if 'A' <= c && c <= 'Z' {
			c += 'a' - 'A'
		}
		lower[i] = c
	}
	return classes[string(lower[:len(name)])]
}

// classes has the class of every known command, by its lower-case name.
var classes = indexCommands(commands)

// commands are those of Redis 7.0 to 8.8 with the modules that Redis 8 brings along, and of Valkey 9.
var commands = []struct {
	class Class
	names string
}{
	{ReadThrough, `get mget strlen getrange substr exists ttl pttl expiretime pexpiretime type`},

	{Write, `set setex psetex setnx getset mset del unlink getdel getex
		expire pexpire expireat pexpireat persist incr decr incrby decrby incrbyfloat append`},

	// Strings that are read in ways of their own, and what reads a value of any type.
	{LoadPass, `getbit bitcount bitpos bitfield_ro lcs digest
		dump object touch sort_ro memory eval_ro evalsha_ro fcall_ro`},
	// Other types. Where there is a destination, it is added to and not replaced.
	{LoadPass, `hdel hexists hexpire hexpireat hexpiretime hget hgetall hgetdel hgetex hincrby hincrbyfloat
		hkeys hlen hmget hmset hpersist hpexpire hpexpireat hpexpiretime hpttl hrandfield hscan hset hsetex
		hsetnx hstrlen httl hvals`},
	{LoadPass, `blmove blmpop blpop brpop brpoplpush lindex linsert llen lmove lmpop lpop lpos lpush lpushx
		lrange lrem lset ltrim rpop rpoplpush rpush rpushx`},
	{LoadPass, `sadd scard sdiff sinter sintercard sismember smembers smismember smove spop srandmember srem
		sscan sunion`},
	{LoadPass, `bzmpop bzpopmax bzpopmin zadd zcard zcount zdiff zincrby zinter zintercard zlexcount zmpop
		zmscore zpopmax zpopmin zrandmember zrange zrangebylex zrangebyscore zrank zrem zremrangebylex
		zremrangebyrank zremrangebyscore zrevrange zrevrangebylex zrevrangebyscore zrevrank zscan zscore zunion`},
	{LoadPass, `xack xackdel xadd xautoclaim xcfgset xclaim xdel xdelex xgroup xidmprecord xinfo xlen xnack
		xpending xrange xread xreadgroup xrevrange xsetid xtrim`},
	{LoadPass, `arcount ardel ardelrange arget argetrange argrep arinfo arinsert arlastitems arlen armget armset arnext arop
		arring arscan arseek arset`},
	{LoadPass, `geoadd geodist geohash geopos georadius_ro georadiusbymember_ro geosearch`},
	{LoadPass, `vadd vcard vdim vemb vgetattr vinfo vismember vlinks vrandmember vrange vrem vsetattr vsim`},
	{LoadPass, `json.arrappend json.arrindex json.arrinsert json.arrlen json.arrpop json.arrtrim json.clear
		json.debug json.del json.forget json.get json.merge json.mget json.mset json.numincrby json.nummultby
		json.numpowby json.objkeys json.objlen json.resp json.set json.strappend json.strlen json.toggle json.type`},
	{LoadPass, `bf.add bf.card bf.debug bf.exists bf.info bf.insert bf.loadchunk bf.madd bf.mexists bf.reserve
		bf.scandump cf.add cf.addnx cf.compact cf.count cf.debug cf.del cf.exists cf.info cf.insert cf.insertnx
		cf.loadchunk cf.mexists cf.reserve cf.scandump cms.incrby cms.info cms.initbydim cms.initbyprob cms.merge
		cms.query topk.add topk.count topk.incrby topk.info topk.list topk.query topk.reserve tdigest.add
		tdigest.byrank tdigest.byrevrank tdigest.cdf tdigest.create tdigest.info tdigest.max tdigest.merge
		tdigest.min tdigest.quantile tdigest.rank tdigest.reset tdigest.revrank tdigest.trimmed_mean`},
	{LoadPass, `ts.add ts.alter ts.create ts.createrule ts.decrby ts.del ts.deleterule ts.get ts.incrby ts.info
		ts.madd ts.mget ts.mrange ts.mrevrange ts.queryindex ts.range ts.revrange`},
	// An index covers hashes and JSON; to drop it with its documents removes no string.
	{LoadPass, `ft._list ft.aggregate ft.aliasadd ft.aliasdel ft.aliasupdate ft.alter ft.config ft.create
		ft.cursor ft.dictadd ft.dictdel ft.dictdump ft.drop ft.dropindex ft.explain ft.explaincli ft.hybrid ft.info
		ft.profile ft.search ft.spellcheck ft.sugadd ft.sugdel ft.sugget ft.suglen ft.syndump ft.synupdate ft.tagvals`},

	{LoadRunMirror, `setrange setbit bitop bitfield pfadd pfcount pfmerge pfdebug msetnx msetex delex delifeq increx gcra
		rename renamenx copy move restore restore-asking migrate trimslots eval evalsha fcall`},
	// These replace their destination, whatever its type.
	{LoadRunMirror, `sort georadius georadiusbymember geosearchstore sinterstore sunionstore sdiffstore
		zinterstore zunionstore zdiffstore zrangestore`},

	{Flush, `flushdb flushall swapdb`},
	{Keyspace, `keys scan randomkey dbsize`},
	{Session, `hello auth select reset quit client`},

	{Pinning, `multi exec discard watch unwatch subscribe unsubscribe psubscribe punsubscribe ssubscribe
		sunsubscribe monitor wait waitaof sync psync replconf`},
	// On a connection that clients share, these would change what Redis answers to the others.
	{Pinning, `asking readonly readwrite`},
	// Not commands, but the first words of an HTTP request: Redis closes the connection that sends them.
	{Pinning, `post host:`},

	{Own, `cacheproxy`},

	{Passthrough, `ping echo time lolwut info role lastsave command publish spublish pubsub
		config acl latency slowlog commandlog hotkeys debug module script function
		save bgsave bgrewriteaof shutdown replicaof slaveof failover cluster clusterscan pfselftest`},
}

// indexCommands returns the class of each name in table.
func indexCommands(table []struct {
	class Class
	names string
}) map[string]Class {
	index := make(map[string]Class)
	for _, line := range table {
		for _, name := range strings.Fields(line.names) {
			index[name] = line.class
		}
	}
	return index
}
