package proxy

import (
	"context"
	"crypto/sha1" //nolint:gosec // EVALSHA names scripts by it
	"encoding/hex"
	"strconv"
	"strings"
)

// Names in Redis that are ours; clients do not see them in KEYS, SCAN and the like.
const (
	reserved    = "cacheproxy:"
	journalName = "cacheproxy:journal" // hash: key -> version of the write that the store lacks
	clockName   = "cacheproxy:clock"   // Postgres's time, in Unix ms, when a sidecar last polled
	inPart      = " in part"           // behind the data set in the clock: it was verified by sidecars that do not read all rows
	closedName  = "cacheproxy:closed"  // set while Redis is empty and the rows are not dead yet: nothing is promoted
	anchorField = "\x00anchor"         // in the journal; no routed key contains NUL. No anchor: Redis lost the journal
	lease       = "cacheproxy:lease:"
)

// leaseName is the key beside K that holds its lease. It hashes to the same slot of a Redis Cluster: a
// key with a hash tag keeps it, any other becomes one. The letter keeps the two forms apart.
func leaseName(key string) string {
	if i := strings.IndexByte(key, '{'); i >= 0 {
		if j := strings.IndexByte(key[i+1:], '}'); j > 0 {
			return lease + "t:" + key
		}
	}
	return lease + "k:{" + key + "}"
}

// A lease is the string "<number>:<until>:<token>".
//   - number: the highest fence number that a writer or repair brought; lower ones are refused.
//   - until: Redis's clock in ms up to which token counts. A crashed holder frees the key by then.
//   - token: "r…" a reader's, "w…" a writer's, "n" known to be absent in both stores, empty: free, "o" free too,
//     but a phase1 writer that was at work learns from it that a write in Redis has overtaken it.
//
// leaseMS: a writer's transaction is bounded by postgres.timeout; much shorter would void leases of slow transactions (which
// costs a second invalidation, not truth), much longer would leave a key that a crashed sidecar held without promotion.
//
// readMS: a load takes 1 to 5 ms. One that takes longer than this is answered but not promoted. While a reader that died, or
// whose connection broke, still seems to hold a key, nobody else can tell "absent in both": this long, and no longer.
//
// fenceMS: how long a number outlives its writer, so that an older request that still sits in a socket is refused. CLIENT KILL ends
// those of living sidecars; a minute covers the retransmissions of one that died. Longer costs memory for every key written.
//
// closedMS: how long promotions wait for a fence whose sidecar died, or whose COMMIT may be under way. flushTime bounds what runs before it, and the server
// ends a transaction that idles for ten seconds.
const (
	leaseMS  = "5000"
	readMS   = "500"
	fenceMS  = "60000"
	closedMS = "15000"
)

// ends asks for the end itself where Redis knows it (since 7.0): what remains is counted from a clock that is read a little later than TIME
// was, by tens of milliseconds on a busy machine, and the sum would be early by as much.
const prelude = `
local now
local function ms()
  if not now then local t = redis.call('TIME'); now = t[1] * 1000 + math.floor(t[2] / 1000) end
  return now
end
local function get(L)
  local v = redis.call('GET', L)
  if not v then return 0, '' end
  local f, u, t = string.match(v, '^(%d+):(%d+):(.*)$')
  if not f then return 0, '' end
  if tonumber(u) < ms() then t = '' end
  return tonumber(f), t
end
local function put(L, f, t, live)
  local ttl = live
  if f > 0 and ttl < ` + fenceMS + ` then ttl = ` + fenceMS + ` end
  if t == '' then
    if f == 0 then redis.call('DEL', L); return end
    live = 0
  end
  redis.call('SET', L, string.format('%.0f:%.0f:%s', f, ms() + live, t), 'PX', ttl)
end
local function set(K, v, ttl, abs)
  if ttl == '-1' then redis.call('SET', K, v)
  elseif ttl == 'k' then redis.call('SET', K, v, 'KEEPTTL')
  elseif abs == '1' then redis.call('SET', K, v, 'PXAT', ttl)
  elseif tonumber(ttl) > 0 then redis.call('SET', K, v, 'PX', ttl)
  else redis.call('DEL', K) end
end
local function ends(K)
  local at = redis.pcall('PEXPIRETIME', K)
  if type(at) == 'number' then return math.max(at, -1) end
  local p = redis.call('PTTL', K)
  if p < 0 then return -1 end
  return ms() + p
end
local J = KEYS[1]
local function kind(K) return redis.call('TYPE', K)['ok'] end
`

// script is a server-side script; the group's keys come in pairs (K, lease(K)) after the journal.
type script struct {
	body, sha string
	op        operation // as what it is counted
}

// newScript makes a script; its name stands in its first line, for whoever looks at what runs.
func newScript(name string, op operation, body string) *script {
	body = "-- " + name + "\n" + prelude + body
	sum := sha1.Sum([]byte(body)) //nolint:gosec // as above
	return &script{body, hex.EncodeToString(sum[:]), op}
}

// What the scripts answer for a key: a closed list.
const (
	keyDone     = 1  // the step was done
	keyMarked   = 2  // the journal says that the store is stale
	keyGranted  = 3  // the lease is the caller's
	keyHeld     = 4  // somebody else has the lease
	keyLost     = 5  // the lease was lost, and is the caller's again: begin again under the key lock
	keyOther    = 6  // K is not a string: [6, type, when it ends]
	keyValue    = 7  // K exists: [7, value, when it ends]
	keyNegative = 8  // known to be absent in both stores
	keyRefused  = 9  // overtaken: Redis has seen a higher number
	keyChanged  = 10 // K is not what the caller computed from
)

var (
	// scriptGrant: a read missed. ARGV: token, lease ms, "1" if nobody wants the values that are there. While the stores are being emptied nobody gets a lease:
	//
	//	1 FLUSHALL has emptied Redis    2 a reader takes the lease and reads a row    3 the rows are dead, and FLUSHALL is answered
	//	4 the reader promotes the row, and without one Redis is taken for the only holder
	scriptGrant = newScript("grant", redisLook, `
local closed = redis.call('EXISTS', '`+closedName+`') == 1
local r = {}
for i = 2, #KEYS, 2 do
  local K, L = KEYS[i], KEYS[i+1]
  local ty = kind(K)
  if ty == 'string' then r[#r+1] = {7, ARGV[3] and '' or redis.call('GET', K), ends(K)}
  elseif ty ~= 'none' then r[#r+1] = {6, ty, ends(K)}
  elseif redis.call('HEXISTS', J, K) == 1 then r[#r+1] = {2}
  else
    local f, t = get(L)
    if t == 'n' then r[#r+1] = {8}
    elseif not closed and (t == '' or t == 'o') then put(L, f, ARGV[1], tonumber(ARGV[2])); r[#r+1] = {3}
    else r[#r+1] = {4} end
  end
end
return r`)
	// scriptPromote: the store's values. ARGV: token, then per key value and when it ends (ms, -1 never).
	scriptPromote = newScript("promote", redisPromote, `
local r = {}
for i = 2, #KEYS, 2 do
  local K, L = KEYS[i], KEYS[i+1]
  local f, t = get(L)
  if t == ARGV[1] then
    if redis.call('EXISTS', K) == 0 then set(K, ARGV[i], ARGV[i+1], '1') end
    put(L, f, '', 0)
    r[#r+1] = {1}
  else r[#r+1] = {4} end
end
return r`)
	// scriptAbsent: the store has no row. ARGV: token, ms to remember it.
	scriptAbsent = newScript("absent", redisLook, `
local r = {}
for i = 2, #KEYS, 2 do
  local K, L = KEYS[i], KEYS[i+1]
  local ty = kind(K)
  local f, t = get(L)
  local mine = t == ARGV[1]
  if ty ~= 'none' then
    if mine then put(L, f, '', 0) end
    if ty == 'string' then r[#r+1] = {7, redis.call('GET', K), ends(K)}
    else r[#r+1] = {6, ty, ends(K)} end
  elseif mine then
    if tonumber(ARGV[2]) > 0 then put(L, f, 'n', tonumber(ARGV[2])) else put(L, f, '', 0) end
    r[#r+1] = {1}
  elseif redis.call('HEXISTS', J, K) == 1 then r[#r+1] = {2}
  else r[#r+1] = {4} end
end
return r`)
	// scriptInvalidate: step 2 of a write in phase0 and phase1. ARGV: number, token, lease ms, then per key its row: "0" none, "1" live,
	// "t" tombstone, "j" live and to be told what Redis had. A key that holds no string stays unless a live row speaks against it: a tombstone only says that the string
	// is gone, and a list may have been made since. A number that is there already is another writer's: Postgres gave it twice, having forgotten it in a crash.
	scriptInvalidate = newScript("invalidate", redisInvalidate, `
local n = tonumber(ARGV[1])
local r = {}
for i = 2, #KEYS, 2 do
  local K, L = KEYS[i], KEYS[i+1]
  local f, t = get(L)
  local row = ARGV[3 + i/2]
  if n <= f then r[#r+1] = {9, '', f}
  elseif redis.call('HEXISTS', J, K) == 1 then r[#r+1] = {2}
  else
    local ty = kind(K)
    if row == '0' and ty == 'string' then
      put(L, n, ARGV[2], tonumber(ARGV[3]))
      r[#r+1] = {7, redis.call('GET', K), ends(K)}
    elseif row ~= '1' and row ~= 'j' and ty ~= 'string' and ty ~= 'none' then
      put(L, n, ARGV[2], tonumber(ARGV[3]))
      r[#r+1] = {6, ty, ends(K)}
    else
      local had = row == 'j' and ty == 'string' and redis.call('GET', K)
      if ty ~= 'none' then redis.call('UNLINK', K) end
      put(L, n, ARGV[2], tonumber(ARGV[3]))
      if had then r[#r+1] = {1, had} else r[#r+1] = {1} end
    end
  end
end
return r`)
	// scriptFill: step 4. ARGV: number, token, lease ms, then per key op ("s" set, "d" delete, "n" delete, and tell clients that keep
	// copies of their own that it has changed although it is not there, "x" release only), value, ms, absolute.
	scriptFill = newScript("fill", redisWrite, `
local n = tonumber(ARGV[1])
local r = {}
for i = 2, #KEYS, 2 do
  local K, L = KEYS[i], KEYS[i+1]
  local f, t = get(L)
  local a = 4 + (i/2 - 1) * 4
  if n < f then r[#r+1] = {9, '', f}
  elseif redis.call('HEXISTS', J, K) == 1 then r[#r+1] = {2}
  elseif t == ARGV[2] then
    if ARGV[a] == 's' then set(K, ARGV[a+1], ARGV[a+2], ARGV[a+3])
    elseif ARGV[a] == 'd' then redis.call('UNLINK', K)
    elseif ARGV[a] == 'n' then
      redis.call('SET', K, '')
      redis.call('UNLINK', K)
    end
    put(L, n, '', 0)
    r[#r+1] = {1}
  elseif t == '' or t == 'n' or string.sub(t, 1, 1) == 'r' then
    put(L, n, ARGV[2], tonumber(ARGV[3]))
    r[#r+1] = {5}
  else r[#r+1] = {4} end
end
return r`)
	// scriptRead: what K is, for a write that is computed from it. ARGV: number (0: without the key lock; one that is there already is another's, see
	// scriptInvalidate, unless "own" follows). Of a key that is absent it says
	// whether a writer has the lease, and of each the highest number.
	scriptRead = newScript("read", redisLook, `
local n = tonumber(ARGV[1])
local r = {}
for i = 2, #KEYS, 2 do
  local K, L = KEYS[i], KEYS[i+1]
  local f, t = get(L)
  if n > 0 and (n < f or n == f and ARGV[2] ~= 'own') then r[#r+1] = {9, '', f}
  else
    if n > f then put(L, n, '', 0); f = n end
    local m = redis.call('HGET', J, K) or ''
    local ty = kind(K)
    if ty == 'string' then r[#r+1] = {7, redis.call('GET', K), ends(K), m, 0, f}
    elseif ty ~= 'none' then r[#r+1] = {6, ty, ends(K), m, 0, f}
    else r[#r+1] = {1, '', -2, m, string.sub(t, 1, 1) == 'w' and 1 or 0, f} end
  end
end
return r`)
	// scriptSize counts the keys that are not ours. SCAN comes first: it removes keys of ours that have expired, and DBSIZE counts those.
	scriptSize = newScript("size", redisLook, `
local cursor, own = '0', 0
repeat
  local page = redis.call('SCAN', cursor, 'MATCH', 'cacheproxy:*', 'COUNT', 1000)
  cursor, own = page[1], own + #page[2]
until cursor == '0'
return redis.call('DBSIZE') - own`)

	// scriptWeigh tells how many bytes the keys take.
	scriptWeigh = newScript("weigh", redisRepair, `
local r = {}
for i = 2, #KEYS, 2 do r[#r+1] = {1, '', redis.call('MEMORY', 'USAGE', KEYS[i]) or 0} end
return r`)
	// scriptLook is scriptRead without the values.
	scriptLook = newScript("look", redisRepair, `
local n = tonumber(ARGV[1])
local r = {}
for i = 2, #KEYS, 2 do
  local K, L = KEYS[i], KEYS[i+1]
  local f, t = get(L)
  if n > 0 and n <= f then r[#r+1] = {9, '', f}
  else
    if n > f then put(L, n, '', 0) end
    local m = redis.call('HGET', J, K) or ''
    local ty = kind(K)
    if ty == 'none' then r[#r+1] = {1, '', -2, m} else r[#r+1] = {6, ty, -1, m} end
  end
end
return r`)
	// scriptWrite: a write whose truth is Redis: mark, write, overtake the lease; all keys or none.
	// ARGV: number (0: without the key lock), version ("": no mark), lease ms, then per key op ("s" set, "d" delete, "x" leave),
	// value, ms, absolute, expected ("" any, "=" plus value, "!" absent, "t" plus token: the lease is the caller's), and with the two that compare
	// what K was, its mark and number then. The value alone does not tell whether somebody has written meanwhile:
	//
	//	1 cut off from Postgres, we read that k is absent, and marked as deleted    2 others repair it, write it, delete it, and that row is the truth
	//	3 we write what we have computed from what is long gone
	//
	// A caller that compares has brought its number before, with scriptRead; of any other one that is there already is not its own.
	scriptWrite = newScript("write", redisWrite, `
local n = tonumber(ARGV[1])
local r, ok = {}, true
for i = 2, #KEYS, 2 do
  local K, L = KEYS[i], KEYS[i+1]
  local f, t = get(L)
  local a = 4 + (i/2 - 1) * 7
  local want = ARGV[a+4]
  local c = string.sub(want, 1, 1)
  if n > 0 and (n < f or n == f and c ~= 't' and tonumber(ARGV[a+6]) ~= n) then r[#r+1] = {9, '', f}; ok = false
  elseif c == 't' then
    if t == string.sub(want, 2) then r[#r+1] = {1} else r[#r+1] = {10}; ok = false end
  elseif c ~= '' then
    local ty = kind(K)
    if c == '=' and (ty ~= 'string' or redis.call('GET', K) ~= string.sub(want, 2)) or c == '!' and ty ~= 'none'
      or (redis.call('HGET', J, K) or '') ~= ARGV[a+5] or f ~= tonumber(ARGV[a+6]) then
      r[#r+1] = {10}; ok = false
    else r[#r+1] = {1} end
  else r[#r+1] = {1} end
end
if not ok then return r end
for i = 2, #KEYS, 2 do
  local K, L = KEYS[i], KEYS[i+1]
  local a = 4 + (i/2 - 1) * 7
  local f = get(L)
  if n > f then f = n end
  if ARGV[2] ~= '' then redis.call('HSET', J, K, ARGV[2]) end
  if ARGV[a] == 's' then set(K, ARGV[a+1], ARGV[a+2], ARGV[a+3])
  elseif ARGV[a] == 'd' then redis.call('UNLINK', K) end
  put(L, f, 'o', tonumber(ARGV[3]))
end
return r`)
	// scriptStrike: the store has caught up. ARGV: number, version.
	scriptStrike = newScript("strike", redisRepair, `
local n = tonumber(ARGV[1])
local r = {}
for i = 2, #KEYS, 2 do
  local K, L = KEYS[i], KEYS[i+1]
  local f = get(L)
  if n < f then r[#r+1] = {9, '', f}
  else
    local v = ARGV[1 + i/2]
    if redis.call('HGET', J, K) == v then redis.call('HDEL', J, K) end
    r[#r+1] = {1}
  end
end
return r`)
	// scriptRepair: Redis is stale and the store has a row: delete K. ARGV: number, force ("1": K's mark goes too, the store is
	// right; "0": leave a marked K alone), types ("1": only a string is older than the row). In the place of a moment it answers how many marks
	// went, 0 or 1.
	scriptRepair = newScript("repair", redisRepair, `
local n = tonumber(ARGV[1])
local r = {}
for i = 2, #KEYS, 2 do
  local K, L = KEYS[i], KEYS[i+1]
  local f = get(L)
  if n < f then r[#r+1] = {9, '', f}
  elseif ARGV[2] == '0' and redis.call('HEXISTS', J, K) == 1 then r[#r+1] = {2}
  else
    if ARGV[3] == '0' or kind(K) == 'string' then redis.call('UNLINK', K) end
    local marks = redis.call('HDEL', J, K)
    -- Without memory for the number the lease must still go: a reader may hold it.
    local e = redis.pcall('SET', L, string.format('%.0f:0:', n), 'PX', `+fenceMS+`)
    if e['err'] then redis.call('DEL', L) end
    r[#r+1] = {1, '', marks}
  end
end
return r`)
	// scriptPoll: the journal's state, and Postgres's time beside it. The clock names the data set it was written into
	// ("<ms> <run id> <replication id>"): whoever finds another one there knows that Redis has been restarted or replaced since. A data set
	// that was verified in part (inPart) keeps the time that was there, for those who have their part to do, until one of them has.
	// ARGV: Postgres's time in ms or "", a new anchor, the anchor's field, data set. Answers [anchor, marks, clock before].
	scriptPoll = newScript("poll", redisPoll, `
local c = redis.call('GET', KEYS[2]) or ''
redis.call('HSETNX', J, ARGV[3], ARGV[2])
if ARGV[1] ~= '' and ARGV[4] ~= '' then
  local at, set = string.match(c, '^(%d+) (.*)$')
  local whole, parts = string.gsub(ARGV[4], '`+inPart+`$', '')
  if set ~= whole and parts == 1 then
    if set ~= ARGV[4] then redis.call('SET', KEYS[2], (at or '0') .. ' ' .. ARGV[4]) end
  elseif set ~= whole or tonumber(at) < tonumber(ARGV[1]) then redis.call('SET', KEYS[2], ARGV[1] .. ' ' .. whole) end
end
return {redis.call('HGET', J, ARGV[3]), redis.call('HLEN', J) - 1, c}`)
	// scriptMark puts marks back that Redis lost. ARGV: version per key. A mark of somebody else stays. A key that is absent gets none: somebody may have repaired it
	// since, and absent and marked it would read as deleted.
	scriptMark = newScript("mark", redisRepair, `
local r = {}
for i = 2, #KEYS, 2 do
  if redis.call('EXISTS', KEYS[i]) == 1 then redis.call('HSETNX', J, KEYS[i], ARGV[i/2]) end
  r[#r+1] = {1}
end
return r`)

	// scriptFlush empties Redis, and keeps readers from promoting until scriptOpen (see scriptGrant). The two must be one step, and two commands are none, not
	// even in one packet: since 7.4 a client waits for its FLUSHALL like one for a list, and others are served meanwhile.
	//
	//	1 FLUSHALL empties Redis    2 a reader takes the lease and reads a row    3 closedName is set, the rows are dead, FLUSHALL is answered, Redis is open
	//	4 the reader, whose lease has outlived all this, promotes the row
	//
	// MULTI would be refused by a Redis that has no memory left. A script that has written is not. ARGV: value, ms, the command. Answers what the command said, and
	// what SET did.
	scriptFlush = newScript("flush", redisCommand, `
local r = redis.pcall(unpack(ARGV, 3))
if type(r) == 'table' and r['err'] then return r end
return {r, redis.pcall('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])}`)

	// scriptOpen ends what closedName began. ARGV: its value.
	scriptOpen = newScript("open", redisCommand, `
if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end
return 1`)

	scripts = []*script{scriptGrant, scriptPromote, scriptAbsent, scriptInvalidate, scriptFill, scriptRead, scriptWeigh, scriptLook, scriptWrite, scriptStrike, scriptRepair, scriptPoll, scriptMark, scriptOpen, scriptLoad}
)

// keyReply is a script's answer for one key.
type keyReply struct {
	code  int64
	value []byte // keyValue: the value; keyOther: the type
	at    int64  // keyValue, keyOther: when it ends, in Unix ms of Redis's clock, -1 never; keyRefused: the number
	mark  string // of scriptRead
	held  bool   // of scriptRead, keyDone: a writer is at work, and may put the key there
	num   int64  // of scriptRead: the highest number
}

// script runs s for keys on the control connection.
func (u *upstream) script(ctx context.Context, s *script, keys []string, argv ...string) ([]keyReply, error) {
	frame, err := u.eval(ctx, s, keyArgs(keys, argv))
	if err != nil {
		return nil, err
	}
	return keyReplies(frame, len(keys))
}

// keyArgs are a script's arguments behind its name: the journal, each key with its lease, and argv.
func keyArgs(keys, argv []string) func([]string) []string {
	return func(dst []string) []string {
		dst = append(dst, strconv.Itoa(1+2*len(keys)), journalName)
		for _, k := range keys {
			dst = append(dst, k, leaseName(k))
		}
		return append(dst, argv...)
	}
}

// keyReplies reads a script's answers for n keys. They are views of the frame, which must be the caller's.
func keyReplies(frame []byte, n int) ([]keyReply, error) {
	rows, ok := elements(frame, nil)
	if !ok || len(rows) != n {
		return nil, &outageError{why: outOther, reply: "script answered out of shape"}
	}
	out := make([]keyReply, n)
	var cols [][]byte
	for i, row := range rows {
		cols, ok = elements(row, cols[:0])
		if !ok || len(cols) == 0 {
			return nil, &outageError{why: outOther, reply: "script answered out of shape"}
		}
		out[i].code, _ = parseInt(cols[0])
		if len(cols) > 1 {
			out[i].value, _ = bulk(cols[1])
		}
		if len(cols) > 2 {
			out[i].at, _ = parseInt(cols[2])
		}
		if len(cols) > 3 {
			m, _ := bulk(cols[3])
			out[i].mark = string(m)
		}
		if len(cols) > 4 {
			held, _ := parseInt(cols[4])
			out[i].held = held == 1
		}
		if len(cols) > 5 {
			out[i].num, _ = parseInt(cols[5])
		}
	}
	return out, nil
}

// eval runs a script by its digest.
func (u *upstream) eval(ctx context.Context, s *script, args func([]string) []string) ([]byte, error) {
	return s.eval(args, func(args ...string) ([]byte, error) { return u.timed(ctx, s.op, appendCommand(nil, args...)) })
}

// eval runs a script by its digest. A client's SCRIPT FLUSH makes Redis forget it; NOSCRIPT means that nothing ran,
// so it is sent again whole.
func (s *script) eval(args func([]string) []string, do func(...string) ([]byte, error)) ([]byte, error) {
	frame, err := do(args([]string{"EVALSHA", s.sha})...)
	if oe, ok := err.(*outageError); ok && strings.HasPrefix(oe.reply, "NOSCRIPT") { //nolint:errorlint // do returns it bare
		frame, err = do(args([]string{"EVAL", s.body})...)
	}
	return frame, err
}
