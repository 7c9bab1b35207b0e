package fallback

import (
	"context"
	"encoding/json"
	"errors"
	"math/rand/v2"
	"strings"

	"github.com/jackc/pgx/v5"

	"cacheproxy/policy"
)

// columnWalkSQL looks at the next rows of a column's table in the order of its unique index, empty ones included. Values stay where they are,
// but for those whose life cacheproxy.meta knows.
var columnWalkSQL = `
WITH clock AS MATERIALIZED (SELECT clock_timestamp() AS now),
     fence AS MATERIALIZED (SELECT coalesce(max(g.generation), 0) AS floor FROM cacheproxy.generations g WHERE g.scope = {scope}::text)
SELECT k.texts, k.state, k.state = 1 AND NOT k.empty, k.size
FROM (SELECT e.*, {state} AS state
      FROM (SELECT r.n, {texts} AS texts, r.{value} IS NULL AS empty, {life} AS ends,
                   coalesce(m.generation, 0) AS generation, coalesce(m.dropped, true) AS dropped, fence.floor, clock.now,
                   coalesce({size}, 0)::bigint AS size
            FROM clock, fence,
                 (SELECT {columns}, row_number() OVER (ORDER BY {order}) AS n
                  FROM {table} r WHERE {begin} {named} ORDER BY {order} LIMIT {limit}::bigint) r
            ` + metaOf("{route}", "{key}") + `
            OFFSET 0) e) k
ORDER BY k.n`

// columnSampleSQL is the same for rows of blocks chosen at random, in no order; $4 is how many of a hundred.
var columnSampleSQL = strings.NewReplacer("{begin}", "", "{route}", "$1", "{scope}", "$2", "{limit}", "$3",
	"OVER (ORDER BY {order})", "OVER ()", " ORDER BY {order} LIMIT", " LIMIT", "{table} r WHERE", "{table} r TABLESAMPLE SYSTEM ($4::float8) WHERE").Replace(columnWalkSQL)

// errPlace is a place that is none of this column's.
var errPlace = errors.New("the place to go on from is not one of this column")

// columnPage is Page for a route whose store is a column. A row that has no key (see Template.Join) is looked at and left out. Next is the
// key of the last row looked at, in parts.
func (s *Store) columnPage(ctx context.Context, c *column, r policy.PageRequest) (policy.Page, error) {
	limit := r.Limit
	if limit <= 0 || limit > maxPage {
		limit = maxPage
	}
	sql, args := c.begin, []any{}
	if r.After != "" {
		var behind []string
		if err := json.Unmarshal([]byte(r.After), &behind); err != nil || len(behind) != len(c.Keys) {
			return policy.Page{}, wrap("page through the rows", errPlace)
		}
		for i, part := range behind {
			if !c.types[i].fits(part) {
				return policy.Page{}, wrap("page through the rows", errPlace)
			}
			args = append(args, part)
		}
		sql = c.walk
	}
	args = append(args, c.Route, c.scope(), limit)
	var page policy.Page
	looked := 0
	var last []string
	err := s.do(ctx, s.reads, "page through the rows", func(ctx context.Context, conn *pgx.Conn) error {
		page, looked = policy.Page{}, 0
		rows, err := conn.Query(ctx, sql, args...)
		if err != nil {
			return err
		}
		for rows.Next() {
			var parts []string
			var state int
			var row policy.PageRow
			if err := rows.Scan(&parts, &state, &row.Expired, &row.Size); err != nil {
				rows.Close()
				return err
			}
			looked, last = looked+1, parts
			if row.Key = c.Template.Join(parts); row.Key != "" {
				row.State = policy.State(state)
				page.Rows = append(page.Rows, row)
			}
		}
		return rows.Err()
	})
	if err != nil {
		return policy.Page{}, err
	}
	if looked == limit {
		next, err := json.Marshal(last) // no part holds a NUL, and each is UTF-8
		if err != nil {
			return policy.Page{}, wrap("page through the rows", err)
		}
		page.Next = string(next)
	}
	return page, nil
}

// columnEstimate is Estimate for a route whose store is a column: how many rows its table has.
func (s *Store) columnEstimate(ctx context.Context, c *column) (n int64, err error) {
	err = s.do(ctx, s.reads, "estimate the rows", func(ctx context.Context, conn *pgx.Conn) error {
		if err := conn.QueryRow(ctx, `SELECT count(*) FROM (SELECT FROM `+c.relation()+` LIMIT $1) e`, countLimit+1).Scan(&n); err != nil || n <= countLimit {
			return err
		}
		var text []byte
		if err := conn.QueryRow(ctx, `EXPLAIN (FORMAT JSON) SELECT FROM `+c.relation()).Scan(&text); err != nil {
			return err
		}
		n = max(n, planned(text))
		return nil
	})
	return n, err
}

// longest asks for the longest life that a row has left, among standingLooked of the rows that know one.
func (c *column) longest() (sql string, args []any) {
	ends, from, args := "expires_at", "(SELECT route, expires_at FROM cacheproxy.meta ORDER BY updated_at DESC LIMIT $1::bigint) r WHERE route = $2::text", []any{standingLooked, c.Route}
	if c.Expires != "" {
		ends, from, args = quoted(c.Expires), "(SELECT "+quoted(c.Expires)+" FROM "+c.relation()+" LIMIT $1::bigint) r WHERE isfinite("+quoted(c.Expires)+")", args[:1]
	}
	return "SELECT coalesce(greatest((extract(epoch FROM max(" + ends + ") - clock_timestamp()) * 1000000)::bigint, 0), 0) FROM " + from, args
}

// columnKeys are the keys of n live rows, chosen at random among about standingLooked rows that are. partial tells that they are fewer, and that not all
// rows were looked at.
func (s *Store) columnKeys(ctx context.Context, c *column, n int) (keys []string, partial bool, err error) {
	rows, err := s.columnEstimate(ctx, c)
	if err != nil {
		return nil, false, err
	}
	percent := 100.0
	if rows > standingLooked {
		percent *= float64(standingLooked) / float64(rows) * 0.8 // a limit that cut much off would leave out the table's end
	}
	looked := 0
	err = s.do(ctx, s.reads, "look at phases", func(ctx context.Context, conn *pgx.Conn) error {
		keys, looked = nil, 0
		rows, err := conn.Query(ctx, c.sample, c.Route, c.scope(), standingLooked, percent)
		if err != nil {
			return err
		}
		var parts []string
		var state int
		var expired bool
		var size int64
		_, err = pgx.ForEachRow(rows, []any{&parts, &state, &expired, &size}, func() error {
			looked++
			if key := c.Template.Join(parts); key != "" && policy.State(state) == policy.Live {
				keys = append(keys, key)
			}
			parts = nil
			return nil
		})
		return err
	})
	if err != nil {
		return nil, false, err
	}
	if len(keys) < n {
		return keys, percent < 100 || looked == standingLooked, nil
	}
	rand.Shuffle(len(keys), func(i, j int) { keys[i], keys[j] = keys[j], keys[i] })
	return keys[:n], false, nil
}
