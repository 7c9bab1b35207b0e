package fallback

import (
	"bytes"
	"context"

	"github.com/jackc/pgx/v5"

	"cacheproxy/policy"
)

// loadSQL reads the rows that $1 names and that are of no dead generation. A row that has expired is answered
// as the tombstone that the sweep will make of it, and its value stays where it is. One reading of the server's
// clock decides that and counts the remaining time, so that a value is never returned with none left. Expiry is
// kept in whole milliseconds; the clock is cut to them as Redis does it.
//
// An expired row is not the same as none:
//  1. A key is stored in both stores without a TTL.
//  2. EXPIRE reaches both, and its time passes.
//  3. Redis fails over to a memory older than the EXPIRE: there the key is back, with no TTL.
//  4. With "no row", Redis would be taken for the only holder, and the key would live for ever.
//
// A row is dead if the fence of the store, of the route that asks ($2) or of the route that wrote it stands
// above its generation. The last matters when a key moves to another route: what was fenced stays dead, and
// the sweep, which knows only the row, agrees with the reader.
//
// $3 says what of the values is wanted. With nothingOf a value is empty, and stays where it is.
const loadSQL = `
WITH clock AS MATERIALIZED (SELECT clock_timestamp() AS now)
SELECT e.key,
       CASE WHEN e.expires_at <= clock.now OR e.raw IS NULL AND e.value IS NULL THEN NULL
            WHEN $3::smallint = 0 THEN ''
            WHEN $3::smallint = 2 THEN convert_to(coalesce(octet_length(e.raw), octet_length(e.value::text))::text, 'UTF8')
            ELSE coalesce(e.raw, convert_to(e.value::text, 'UTF8')) END,
       coalesce((extract(epoch FROM e.expires_at) * 1000)::bigint, -1),
       coalesce((extract(epoch FROM e.expires_at) * 1000)::bigint
                - floor(extract(epoch FROM clock.now) * 1000)::bigint, -1)
FROM clock, cacheproxy.entries e
WHERE e.key = ANY ($1::text[])
  AND e.generation >= (SELECT coalesce(max(g.generation), 0)
                       FROM cacheproxy.generations g
                       WHERE g.scope IN ('', $2::text, e.route))`

// Load answers what the store knows of refs, in their order. A row that has expired reads Tombstone until the
// sweep removes it, a row of a dead generation Absent, and a key that its route's column has no row for NoRow. It asks one statement per distinct route of refs, all in
// one round trip, and repeats that once when a pooled connection turns out to be dead. The values belong to the
// caller.
func (s *Store) Load(ctx context.Context, refs []policy.Ref) ([]policy.Row, error) {
	return s.loadRows(ctx, refs, allOf)
}

// wanted is what a load answers of values.
type wanted int16

const (
	nothingOf wanted = iota // none
	allOf                   // their bytes
	sizesOf                 // how many bytes they have, in digits
)

func (s *Store) loadRows(ctx context.Context, refs []policy.Ref, values wanted) ([]policy.Row, error) {
	if len(refs) == 0 {
		return nil, nil
	}
	cs, err := s.known(ctx, refs...)
	if err != nil {
		return nil, wrap("load", err)
	}
	var rows []policy.Row
	err = s.do(ctx, s.reads, "load", func(ctx context.Context, c *pgx.Conn) error {
		var b pgx.Batch
		l := cs.queueLoad(&b, refs, values)
		br := c.SendBatch(ctx, &b)
		var err error
		rows, err = l.read(br, cs)
		if cerr := br.Close(); err == nil {
			err = cerr
		}
		return err
	})
	if err != nil {
		return nil, s.doubt(cs, err)
	}
	return rows, nil
}

// load is the reading part of a batch: queued first, read in the same place of the answers.
type load struct {
	refs  []policy.Ref
	parts []loadPart
}

// loadPart is one statement: the keys of one route.
type loadPart struct {
	route  string
	column *column // nil: the rows of cacheproxy.entries
}

// queueLoad adds one statement per distinct route of refs to b.
func (cs *columns) queueLoad(b *pgx.Batch, refs []policy.Ref, values wanted) load {
	l := load{refs: refs}
	list, of := cs.among(refs)
	for i, c := range list {
		if len(of[i].keys) > 0 { // the others name no row
			l.parts = append(l.parts, loadPart{c.Route, c})
			b.Queue(c.load, of[i].args(c.Route, c.scope(), int16(values))...)
		}
	}
	var routes []string
	keys := make(map[string][]string, 1)
	for _, ref := range refs {
		if cs.byRoute[ref.Route] != nil {
			continue
		}
		if _, seen := keys[ref.Route]; !seen {
			routes = append(routes, ref.Route)
		}
		keys[ref.Route] = append(keys[ref.Route], ref.Key)
	}
	for _, route := range routes {
		l.parts = append(l.parts, loadPart{route: route})
		b.Queue(loadSQL, keys[route], route, int16(values))
	}
	return l
}

// read takes the answers to what queueLoad queued from br. What is not among them is missing.
func (l load) read(br pgx.BatchResults, cs *columns) ([]policy.Row, error) {
	found := make(map[policy.Ref]policy.Row, len(l.refs))
	for _, part := range l.parts {
		rows, err := br.Query()
		if err != nil {
			return nil, err
		}
		var key string
		var state int32
		var row policy.Row
		columns := []any{&key, &row.Value, &row.ExpiresAt, &row.TTL}
		if part.column != nil {
			columns = []any{&key, &state, &row.Value, &row.ExpiresAt, &row.TTL, &row.Bare}
		}
		_, err = pgx.ForEachRow(rows, columns, func() error {
			row.State = policy.Live
			if part.column != nil {
				row.State = policy.State(state)
			} else if row.Value == nil { // an empty value is not nil: only deleted and expired keys have none
				row.State = policy.Tombstone
			}
			if row.State != policy.Live {
				row = policy.Row{State: row.State, Bare: row.Bare, TTL: -1, ExpiresAt: -1}
			}
			found[policy.Ref{Route: part.route, Key: key}] = row
			row = policy.Row{} // the next row gets bytes of its own
			return nil
		})
		if err != nil {
			return nil, err
		}
	}
	out := make([]policy.Row, len(l.refs))
	given := make(map[policy.Ref]bool, len(found))
	for i, ref := range l.refs {
		row, ok := found[ref]
		switch {
		case !ok && cs.byRoute[ref.Route] != nil:
			row = policy.Row{State: policy.NoRow, TTL: -1, ExpiresAt: -1}
		case !ok:
			row = policy.Row{State: policy.Absent, TTL: -1, ExpiresAt: -1}
		case given[ref]: // named twice, as in MGET k k: each answer owns its bytes
			row.Value = bytes.Clone(row.Value)
		}
		given[ref] = true
		out[i] = row
	}
	return out, nil
}
