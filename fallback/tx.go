package fallback

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"time"
	"unsafe"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"cacheproxy/policy"
)

const (
	// Classes of advisory locks (the first of the two numbers), chosen at random once and never to change:
	// sidecars of different versions must meet at the same locks.
	keyLockClass   = 0x63706b79
	storeLockClass = 0x63707374
	// The locks of storeLockClass.
	storeLock  = 0 // shared by every Tx, exclusive for a fence
	schemaLock = 1 // exclusive for EnsureSchema

	// keyLocks is how many different key locks there are. Each held lock takes a slot in a table of the
	// server that is shared by all sessions (max_locks_per_transaction * max_connections, 6,400 by default),
	// so their number must stay below it whatever the keys. Two keys that share a lock only wait in vain for
	// each other, which 4,096 make rare.
	keyLocks = 4096
	// maxKeyLocks is how many key locks one Tx takes. A larger group takes the whole store instead: that many
	// locks in several transactions at once would fill the server's table, and such a group is rare.
	maxKeyLocks = 512

	// chunkBytes bounds the values of one INSERT, unless a single value is larger. The arrays of a statement
	// must stay below 1 GB, and each statement has a statement_timeout of its own to finish in.
	chunkBytes = 16 << 20

	// rowLockWait is how long a Tx of several rows of adopted columns waits for one of them. Other programs lock the same rows in
	// orders of their own:
	//
	//	1 their statement changes row 2    2 we lock row 1, and wait for row 2    3 their statement comes to row 1: a deadlock
	//
	// After deadlock_timeout, a second, Postgres would end one of the two, and it must not be theirs. Longer would come too close to that;
	// shorter would give up before statements that end in time.
	rowLockWait = 300 * time.Millisecond

	// rollbackTimeout bounds the farewell to a transaction; after it the connection is closed instead, which
	// ends the transaction as well.
	rollbackTimeout = time.Second
	// maxExpiry is the latest moment that is stored, in Unix milliseconds: the year 223,000. timestamptz ends
	// in the year 294,276, Redis much later.
	maxExpiry = 7_000_000_000_000_000
)

const (
	beginSQL           = `BEGIN ISOLATION LEVEL READ COMMITTED`
	lockStoreSharedSQL = `SELECT pg_advisory_xact_lock_shared($1::int, $2::int)`
	lockStoreSQL       = `SELECT pg_advisory_xact_lock($1::int, $2::int)`
	// The locks are taken in the order of the array; count makes one answer of them.
	lockKeysSQL = `SELECT count(pg_advisory_xact_lock($1::int, id)) FROM unnest($2::int[]) AS id`
	numberSQL   = `SELECT nextval('cacheproxy.fence')`
	// What the triggers that `schema --route` prints do not record.
	ownSQL = `SELECT set_config('cacheproxy.own', 'on', true)`
	// For the rest of the transaction, in which nothing else waits for locks.
	lockTimeoutSQL = `SELECT set_config('lock_timeout', $1::text, true)`
	commitSQL      = `COMMIT`
	rollbackSQL    = `ROLLBACK`
)

// errEnded is the misuse of a Tx after Commit or Rollback.
var errEnded = errors.New("the transaction has ended")

// errNotLocked is the misuse of a Tx for a key that Begin was not told of.
var errNotLocked = errors.New("a change names a key that this transaction has not locked")

// Tx is an open transaction that holds the locks of its keys. It belongs to one goroutine at a time, holds a
// connection and one of MaxWrites slots, and must be ended by Commit or Rollback. The server ends it after
// ten idle seconds; Commit then fails with a Retryable error.
type Tx struct {
	s      *Store
	conn   *pgxpool.Conn
	cs     *columns // static, as all columns that known answers
	refs   []policy.Ref
	number int64
	rows   []policy.Row
	ended  bool
}

// Number is the rising number that was drawn under the locks: of two transactions on one key the later has
// the higher one. It may repeat or fall back after the server lost its last moments (a crash of the server,
// a failover to an asynchronous standby); see Store.Lift.
func (t *Tx) Number() int64 { return t.number }

// Rows is what the store knows of the refs given to Begin, in their order, read under the locks and in the terms
// of Load: a row that has expired is a Tombstone. The values belong to the caller.
func (t *Tx) Rows() []policy.Row { return t.rows }

// Begin opens a transaction, takes the locks of refs (distinct keys), draws a number and reads the rows, all
// in one round trip. It waits for other holders of the locks until the server's lock_timeout (8/10 of
// QueryTimeout) and then fails with a Retryable error. ctx bounds Begin alone.
//
// The statements are separate on purpose: in READ COMMITTED each takes its snapshot when it starts, so the
// rows are read as the previous holder of the locks has left them. The rows of an adopted column are locked too: other
// programs than ours write them, and take no key locks.
func (s *Store) Begin(ctx context.Context, refs []policy.Ref) (*Tx, error) {
	return s.open(ctx, refs, true)
}

// Lock is Begin for a caller that needs no values: those of Rows are empty. However large the values are, it takes no longer.
func (s *Store) Lock(ctx context.Context, refs []policy.Ref) (*Tx, error) {
	return s.open(ctx, refs, false)
}

func (s *Store) open(ctx context.Context, refs []policy.Ref, values bool) (*Tx, error) {
	ctx, cancel := s.within(ctx)
	defer cancel()
	cs, err := s.known(ctx, refs...)
	if err != nil {
		return nil, wrap("begin", err)
	}
	if err := s.writes.acquire(ctx); err != nil {
		return nil, wrap("begin", err)
	}
	t := &Tx{s: s, cs: cs, refs: refs}
	// Nothing is committed here, so a dead connection from the pool costs no more than a second attempt.
	if err := s.try(ctx, func() error { return t.begin(ctx, values) }); err != nil {
		s.writes.release()
		return nil, wrap("begin", s.doubt(cs, err))
	}
	return t, nil
}

// begin is one attempt of Begin; after an error it holds no connection.
func (t *Tx) begin(ctx context.Context, values bool) error {
	conn, err := t.s.pool.Acquire(ctx)
	if err != nil {
		return err
	}
	var b pgx.Batch
	b.Queue(beginSQL)
	ids := lockIDs(t.refs)
	if len(ids) > maxKeyLocks {
		b.Queue(lockStoreSQL, storeLockClass, storeLock)
	} else {
		b.Queue(lockStoreSharedSQL, storeLockClass, storeLock)
		b.Queue(lockKeysSQL, keyLockClass, ids)
	}
	list, of := t.cs.among(t.refs)
	if len(list) > 0 {
		b.Queue(ownSQL)
	}
	rows := 0
	for i := range of {
		rows += len(of[i].keys)
	}
	if rows > 1 {
		b.Queue(lockTimeoutSQL, milliseconds(min(rowLockWait, t.s.cfg.QueryTimeout*8/10)))
	}
	for i, c := range list {
		if len(of[i].keys) > 0 {
			b.Queue(c.lock, of[i].args()...)
		}
	}
	locks := b.Len()
	b.Queue(numberSQL)
	what := nothingOf
	if values {
		what = allOf
	}
	l := t.cs.queueLoad(&b, t.refs, what)

	br := conn.SendBatch(ctx, &b)
	err = func() error {
		for range locks {
			if _, err := br.Exec(); err != nil {
				return err
			}
		}
		if err := br.QueryRow().Scan(&t.number); err != nil {
			return err
		}
		t.rows, err = l.read(br, t.cs)
		return err
	}()
	if cerr := br.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		rollback(conn)
		return err
	}
	t.conn = conn
	return nil
}

// lockIDs returns the distinct lock numbers of refs in ascending order, which is the order in which everybody
// takes them: whoever waits for a number holds none that is higher, so nobody waits in a circle.
func lockIDs(refs []policy.Ref) []int32 {
	ids := make([]int32, len(refs))
	for i, ref := range refs {
		ids[i] = lockID(ref.Key)
	}
	slices.Sort(ids)
	return slices.Compact(ids)
}

// lockID is FNV-1a folded to keyLocks. It must never change, for the reason given at keyLockClass.
func lockID(key string) int32 {
	h := uint32(2166136261)
	for i := range len(key) {
		h = (h ^ uint32(key[i])) * 16777619
	}
	return int32((h ^ h>>16) % keyLocks)
}

// CommitOptions says what else is part of the commit.
type CommitOptions struct {
	// Journal, if not empty, becomes one journal row: "Redis is stale for these keys".
	Journal []policy.Ref
	// Known, if not nil, names for each of Journal a journal row that has its key (0: none). A key whose row is still there is
	// left out of the new one, and if none remains, no row is made. Rows are struck only under the locks of all their keys, so
	// what is there now stays until this transaction has ended.
	Known []int64
	// RawOnly stores every value as bytes and nothing as JSON: for the second attempt after BadData. A column holds JSON
	// alone, so that it changes nothing there.
	RawOnly bool
}

// Commit applies changes, writes the journal and commits, in one round trip. Of several changes
// to one key the last wins; if it keeps the expiry, it keeps that of the change before it. All keys must be
// among the refs of Begin. The values are not kept after the call. intent is the number of the new journal
// row, or 0 if there is none.
//
// After an error nothing is stored, unless Uncertain is true of it. In all cases the Tx has ended.
func (t *Tx) Commit(ctx context.Context, changes []policy.Change, opt CommitOptions) (intent int64, err error) {
	if t.ended {
		return 0, wrap("commit", errEnded)
	}
	defer t.Rollback() // gives the connection back; after COMMIT there is nothing left to roll back
	changes, err = t.settle(changes)
	if err != nil {
		return 0, wrap("commit", err)
	}

	var b pgx.Batch
	if err := t.cs.queueAll(&b, changes, opt.RawOnly); err != nil {
		return 0, wrap("commit", err)
	}
	for _, c := range t.cs.list {
		if keys := t.rowless(c, changes); len(keys) > 0 {
			b.Queue(letGoSQL, c.Route, keys)
		}
	}
	before := b.Len()
	if len(opt.Journal) > 0 {
		queueIntent(&b, opt.Journal, opt.Known)
	}
	b.Queue(commitSQL)

	ctx, cancel := t.s.within(ctx)
	defer cancel()
	br := t.conn.SendBatch(ctx, &b)
	defer br.Close()
	for range before {
		if _, err := br.Exec(); err != nil {
			return 0, commitError(t.s.doubt(t.cs, err), false)
		}
	}
	if len(opt.Journal) > 0 {
		// Without a row every key was known.
		if err := br.QueryRow().Scan(&intent); err != nil && !errors.Is(err, pgx.ErrNoRows) {
			return 0, commitError(err, false)
		}
	}
	tag, err := br.Exec()
	if err != nil {
		return 0, commitError(err, true)
	}
	if tag.String() != commitSQL {
		// COMMIT answers ROLLBACK when the transaction had failed before.
		return 0, wrap("commit", errors.New("the server rolled back"))
	}
	return intent, nil
}

// Strike deletes journal rows and returns those that were there; Commit makes that lasting. The rows of their keys count as changed now (see ChangedSince). All their keys should be among the refs
// of Begin (see CommitOptions.Known), which the caller judges by what is returned. After an error the Tx is to be rolled back.
func (t *Tx) Strike(ctx context.Context, ids []int64) (_ []Intent, err error) {
	if t.ended {
		return nil, wrap("strike", errEnded)
	}
	ctx, cancel := t.s.within(ctx)
	defer cancel()
	var b pgx.Batch
	b.Queue(takeSQL, ids, t.cs.inUse())
	if len(t.cs.list) > 0 {
		b.Queue(toldSQL, ids)
	}
	br := t.conn.SendBatch(ctx, &b)
	var intents []Intent
	for range b.Len() {
		rows, rerr := br.Query()
		if err = rerr; err != nil {
			break
		}
		var id int64
		var keys, routes []string
		if _, err = pgx.ForEachRow(rows, []any{&id, &keys, &routes}, func() error {
			intents = append(intents, newIntent(id, keys, routes))
			return nil
		}); err != nil {
			break
		}
	}
	if cerr := br.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return nil, wrap("strike", err)
	}
	return intents, nil
}

// Named tells which of keys a journal row names. Of keys among the refs of Begin that is so until this Tx ends. After an error the Tx is to be rolled back.
func (t *Tx) Named(ctx context.Context, keys []string) (map[string]bool, error) {
	if t.ended {
		return nil, wrap("look into the journal", errEnded)
	}
	ctx, cancel := t.s.within(ctx)
	defer cancel()
	rows, err := t.conn.Query(ctx, namedSQL, keys, t.cs.inUse())
	if err != nil {
		return nil, wrap("look into the journal", err)
	}
	named := map[string]bool{}
	var key string
	_, err = pgx.ForEachRow(rows, []any{&key}, func() error {
		named[key] = true
		return nil
	})
	return named, wrap("look into the journal", err)
}

// Recalls tells whether something is known of keys that have no row in their columns: a journal row names one, or it counts as deleted. A row that somebody
// inserts would be read so; a change that drops such a key has that forgotten. After an error the Tx is to be rolled back.
func (t *Tx) Recalls(ctx context.Context, keys []string) (recalls bool, err error) {
	if t.ended {
		return false, wrap("look into the journal", errEnded)
	}
	ctx, cancel := t.s.within(ctx)
	defer cancel()
	err = t.conn.QueryRow(ctx, recallsSQL, keys, t.cs.inUse()).Scan(&recalls)
	return recalls, wrap("look into the journal", err)
}

// rowless are the keys of c among changes that were dropped and had no row when they were locked.
func (t *Tx) rowless(c *column, changes []policy.Change) (keys []string) {
	for _, ch := range changes {
		if ch.Op != policy.Drop || ch.Ref.Route != c.Route {
			continue
		}
		if i := slices.Index(t.refs, ch.Ref); i >= 0 && t.rows[i].State == policy.NoRow {
			keys = append(keys, ch.Ref.Key)
		}
	}
	return keys
}

// commitError decides whether COMMIT may have been executed. The whole batch ends in one Sync, so after an
// error of any statement the server skips the rest: an error that the server itself reports before COMMIT
// is certain, and so is an ordinary one at COMMIT. A session that the server ends at COMMIT may be past the
// point of no return, and a connection that breaks tells nothing at all, unless nothing had been sent.
func commitError(err error, atCommit bool) *opError {
	e := &opError{op: "commit", err: err}
	if pg := pgError(err); pg != nil {
		e.uncertain = atCommit && fatal(pg)
	} else {
		e.uncertain = !notSent(err)
	}
	return e
}

// Rollback ends the transaction without a change. It may be called at any time and any number of times, also
// after Commit, and does not depend on the caller's context: it always gives the connection and the slot back.
func (t *Tx) Rollback() {
	if t.ended {
		return
	}
	t.ended = true
	rollback(t.conn)
	t.s.writes.release()
}

// rollback ends whatever transaction conn is in and gives conn back to the pool, which closes it if it is
// still not idle.
func rollback(conn *pgxpool.Conn) {
	if pc := conn.Conn().PgConn(); !pc.IsClosed() && !pc.IsBusy() && pc.TxStatus() != 'I' {
		ctx, cancel := context.WithTimeout(context.Background(), rollbackTimeout)
		defer cancel()
		// If this fails the connection is not idle, and Release closes it.
		_, _ = conn.Exec(ctx, rollbackSQL)
	}
	conn.Release()
}

// settle sorts changes by key and leaves one for each. The caller's slice stays as it is.
func (t *Tx) settle(changes []policy.Change) ([]policy.Change, error) {
	locked := make(map[string]struct{}, len(t.refs))
	for _, ref := range t.refs {
		locked[ref.Key] = struct{}{}
	}
	for i := range changes {
		if _, ok := locked[changes[i].Ref.Key]; !ok {
			return nil, errNotLocked
		}
	}
	sorted := slices.Clone(changes)
	slices.SortStableFunc(sorted, func(a, b policy.Change) int { return cmp.Compare(a.Ref.Key, b.Ref.Key) })
	out := sorted[:0]
	for _, c := range sorted {
		if n := len(out); n > 0 && out[n-1].Ref.Key == c.Ref.Key {
			if c.Op == policy.Put && c.Expiry.Kind == policy.KeepExpiry {
				c.Expiry = policy.Expiry{Kind: policy.NoExpiry}
				if out[n-1].Op == policy.Put {
					c.Expiry = out[n-1].Expiry
				}
			}
			out[n-1] = c
			continue
		}
		out = append(out, c)
	}
	return out, nil
}

// upsertSQL writes rows from parallel arrays: key, route, JSON text, raw bytes, kind and amount of expiry.
// A value comes either as JSON or raw; a tombstone has neither.
//
//   - The server's own canonicaliser decides whether JSON has to be kept raw as well. The subquery parses it
//     once; OFFSET 0 keeps the planner from pasting the cast into each place that uses the result.
//   - Kind 1 counts from the server's clock, cut to milliseconds as Redis does; kind 2 is absolute; kind 3
//     keeps what a row has that is alive, and nothing else has a life to keep.
//   - The generation is the highest of all. The shared lock of the store keeps it from rising meanwhile.
const upsertSQL = `
INSERT INTO cacheproxy.entries AS t (key, value, raw, route, generation, expires_at, updated_at)
SELECT i.key,
       i.value,
       CASE WHEN i.json IS NULL THEN i.raw
            WHEN i.value::text COLLATE "C" = i.json COLLATE "C" THEN NULL
            ELSE convert_to(i.json, 'UTF8') END,
       i.route,
       (SELECT coalesce(max(g.generation), 0) FROM cacheproxy.generations g),
       CASE i.kind
            WHEN 1 THEN date_trunc('milliseconds', clock_timestamp())
                        + (i.ms / 1000) * interval '1 second' + (i.ms % 1000) * interval '1 millisecond'
            WHEN 2 THEN to_timestamp(i.ms / 1000) + (i.ms % 1000) * interval '1 millisecond'
            WHEN 3 THEN (SELECT e.expires_at
                         FROM cacheproxy.entries e
                         WHERE e.key = i.key
                           AND (e.value IS NOT NULL OR e.raw IS NOT NULL)
                           AND e.expires_at > clock_timestamp()
                           AND e.generation >= (SELECT coalesce(max(g.generation), 0)
                                                FROM cacheproxy.generations g
                                                WHERE g.scope IN ('', i.route, e.route)))
       END,
       clock_timestamp()
FROM (SELECT u.key, u.route, u.json, u.json::jsonb AS value, u.raw, u.kind, u.ms
      FROM unnest($1::text[], $2::text[], $3::text[], $4::bytea[], $5::smallint[], $6::bigint[])
           AS u(key, route, json, raw, kind, ms)
      OFFSET 0) AS i
ON CONFLICT (key) DO UPDATE
SET value = excluded.value, raw = excluded.raw, route = excluded.route, generation = excluded.generation,
    expires_at = excluded.expires_at, updated_at = excluded.updated_at`

const dropSQL = `DELETE FROM cacheproxy.entries WHERE key = ANY ($1::text[])`

// chunk is one INSERT's arrays. Its values are the caller's bytes, read while the batch is sent.
type chunk struct {
	keys, routes []string
	json         []*string
	raw          [][]byte
	kinds        []int16
	amounts      []int64
	bytes        int
}

func (c *chunk) queue(b *pgx.Batch) {
	if len(c.keys) > 0 {
		b.Queue(upsertSQL, c.keys, c.routes, c.json, c.raw, c.kinds, c.amounts)
	}
}

// queueChanges adds what changes ask for to b: one DELETE for all drops, and as few INSERTs as chunkBytes
// allows. changes are sorted by key and distinct.
func queueChanges(b *pgx.Batch, changes []policy.Change, rawOnly bool) {
	var drops []string
	var c chunk
	for i := range changes {
		ch := &changes[i]
		if ch.Op == policy.Drop {
			drops = append(drops, ch.Ref.Key)
			continue
		}
		var json *string
		var raw []byte
		var kind int16
		var amount int64
		size := 0
		if ch.Op == policy.Put {
			json, raw, size = body(ch.Value, rawOnly)
			kind, amount = expiry(ch.Expiry)
		}
		if c.bytes > 0 && c.bytes+size > chunkBytes {
			c.queue(b)
			c = chunk{}
		}
		c.keys, c.routes = append(c.keys, ch.Ref.Key), append(c.routes, ch.Ref.Route)
		c.json, c.raw = append(c.json, json), append(c.raw, raw)
		c.kinds, c.amounts = append(c.kinds, kind), append(c.amounts, amount)
		c.bytes += size
	}
	c.queue(b)
	if len(drops) > 0 {
		b.Queue(dropSQL, drops)
	}
}

// body decides how value is stored: as JSON text or as raw bytes, of which exactly one is not nil. size is
// what the server has to handle.
//
// JSON goes as a string: pgx's modes without prepared statements would send []byte as bytea.
func body(value []byte, rawOnly bool) (json *string, raw []byte, size int) {
	if !rawOnly {
		if canonical, ok := gate(value); ok {
			s := unsafe.String(unsafe.SliceData(value), len(value)) // the caller's bytes rest until Commit returns
			return &s, nil, max(canonical, len(value))
		}
	}
	if value == nil {
		value = []byte{} // nil would be NULL, and the row a tombstone
	}
	return nil, value, len(value)
}

// expiry is e in the numbers of upsertSQL.
func expiry(e policy.Expiry) (kind int16, ms int64) {
	ms = min(max(e.MS, 0), maxExpiry)
	switch e.Kind {
	case policy.ExpiresIn:
		return 1, ms
	case policy.ExpiresAt:
		return 2, ms
	case policy.KeepExpiry:
		return 3, 0
	default:
		return 0, 0
	}
}
