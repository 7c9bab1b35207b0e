package fallback

import (
	"context"
	"encoding/json"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/jackc/pgx/v5"

	"cacheproxy/policy"
)

// pageSQL looks at the next $3 entries of a range of keys, dead ones and tombstones included: however many of those stand together, a page
// costs what its limit says. Every row is read through the primary key; the value stays where it is, and its size is what the
// heap says of it (see sizeSQL).
//
// There is one statement for a range that ends and one for a range that does not: "$4 IS NULL OR key < $4" is no condition of an index,
// and the last page would walk to the end of the table.
var pageSQL = `
WITH clock AS MATERIALIZED (SELECT clock_timestamp() AS now)
SELECT e.key,
       CASE WHEN e.generation < (SELECT coalesce(max(g.generation), 0)
                                 FROM cacheproxy.generations g
                                 WHERE g.scope IN ('', $1::text, e.route)) THEN 0
            WHEN e.missing OR e.expires_at <= clock.now THEN 1
            ELSE 2 END::int,
       coalesce(e.expires_at <= clock.now, false) AND NOT e.missing,
       e.size
FROM clock,
     (SELECT key, generation, route, expires_at, raw IS NULL AND value IS NULL AS missing,
             coalesce(octet_length(raw), ` + sizeSQL + `, 0)::bigint AS size
      FROM cacheproxy.entries
      WHERE key >= $2::text`

// sizeSQL is about how many bytes {value} has as text, by what the heap knows without a look at it: what it takes there, as often as its compression
// can make it smaller. pglz makes one byte of 87 at most, lz4 of 255; and they do, of values that repeat themselves.
var sizeSQL = sizeOf("value")

func sizeOf(value string) string {
	return strings.ReplaceAll(`pg_column_size({value})::bigint * CASE pg_column_compression({value}) WHEN 'pglz' THEN 87 WHEN 'lz4' THEN 255 ELSE 1 END`, "{value}", value)
}

const (
	pageEndSQL  = ` AND key < $4::text ORDER BY key LIMIT $3::int) e ORDER BY e.key`
	pageOpenSQL = ` ORDER BY key LIMIT $3::int) e ORDER BY e.key`
)

// Page returns the next rows of r.Route in the order of their keys. The snapshot ends with the page, so a walk over a large table holds
// back no vacuum. Next is the last key that was looked at.
func (s *Store) Page(ctx context.Context, r policy.PageRequest) (policy.Page, error) {
	cs, err := s.known(ctx, policy.Ref{Route: r.Route})
	if err != nil {
		return policy.Page{}, wrap("page through the rows", err)
	}
	if c := cs.byRoute[r.Route]; c != nil {
		return s.columnPage(ctx, c, r)
	}
	limit := r.Limit
	if limit <= 0 || limit > maxPage {
		limit = maxPage
	}
	from := r.Prefix
	if r.After != "" {
		from = r.After + "\x01" // nothing stands between the two: text holds no NUL
	}
	sql, args := pageSQL+pageOpenSQL, []any{r.Route, from, limit}
	if end := behind(r.Prefix); end != "" {
		sql, args = pageSQL+pageEndSQL, append(args, end)
	}
	var page policy.Page
	err = s.do(ctx, s.reads, "page through the rows", func(ctx context.Context, c *pgx.Conn) error {
		page = policy.Page{}
		rows, err := c.Query(ctx, sql, args...)
		if err != nil {
			return err
		}
		var row policy.PageRow
		var state int
		_, err = pgx.ForEachRow(rows, []any{&row.Key, &state, &row.Expired, &row.Size}, func() error {
			row.State = [...]policy.State{policy.Absent, policy.Tombstone, policy.Live}[state]
			page.Rows = append(page.Rows, row)
			return nil
		})
		return err
	})
	if err != nil {
		return policy.Page{}, err
	}
	if n := len(page.Rows); n == limit {
		page.Next = page.Rows[n-1].Key
		if page.Next == "" { // one row, of the empty key
			page.Next = "\x01"
		}
	}
	return page, nil
}

// behind is the smallest text that is greater than all that begin with prefix, "" if there is none. UTF-8 sorts as its code points do.
func behind(prefix string) string {
	for prefix != "" {
		r, n := utf8.DecodeLastRuneInString(prefix)
		prefix = prefix[:len(prefix)-n]
		switch r {
		case utf8.MaxRune:
			continue // nothing is greater in this place
		case 0xD7FF: // behind it stand the surrogates, which are no text
			r = 0xE000
		default:
			r++
		}
		return prefix + string(r)
	}
	return ""
}

// Look is Load without the values: those of its rows are empty.
func (s *Store) Look(ctx context.Context, refs []policy.Ref) ([]policy.Row, error) {
	return s.loadRows(ctx, refs, nothingOf)
}

// Weigh answers how many bytes the values have that Load would return, -1 for a key that has none. It costs the server as much as Load, and nobody
// else anything.
func (s *Store) Weigh(ctx context.Context, refs []policy.Ref) ([]int64, error) {
	rows, err := s.loadRows(ctx, refs, sizesOf)
	if err != nil {
		return nil, err
	}
	out := make([]int64, len(rows))
	for i, row := range rows {
		out[i] = -1
		if row.State == policy.Live {
			if out[i], err = strconv.ParseInt(string(row.Value), 10, 64); err != nil {
				return nil, wrap("weigh", err)
			}
		}
	}
	return out, nil
}

// estimateSQL asks the planner how many rows a range of keys has. It takes part in no plan, so that it costs the same for a table of
// any size, and is as good as the table's last ANALYZE.
const estimateSQL = `EXPLAIN (FORMAT JSON) SELECT FROM cacheproxy.entries`

// Estimate is about how many rows a walk with Page looks at: exact up to 10,000, the planner's estimate beyond. It is for people to look at.
func (s *Store) Estimate(ctx context.Context, r policy.PageRequest) (int64, error) {
	cs, err := s.known(ctx, policy.Ref{Route: r.Route})
	if err != nil {
		return 0, wrap("estimate the rows", err)
	}
	if c := cs.byRoute[r.Route]; c != nil {
		return s.columnEstimate(ctx, c)
	}
	var where string // none of all keys: of a table that was never analyzed the planner knows the size, and nothing of ranges
	var args []any
	if r.Prefix != "" {
		where, args = ` WHERE key >= $1::text`, []any{r.Prefix}
	}
	if end := behind(r.Prefix); end != "" {
		where, args = where+` AND key < $2::text`, append(args, end)
	}
	var n int64
	err = s.do(ctx, s.reads, "estimate the rows", func(ctx context.Context, c *pgx.Conn) error {
		if err := c.QueryRow(ctx, `SELECT count(*) FROM (SELECT FROM cacheproxy.entries`+where+` LIMIT 10001) e`, args...).Scan(&n); err != nil || n <= countLimit {
			return err
		}
		var text []byte
		// With the values in the text: a plan for any range would know nothing of this one.
		args := append([]any{pgx.QueryExecModeSimpleProtocol}, args...)
		if err := c.QueryRow(ctx, estimateSQL+where, args...).Scan(&text); err != nil {
			return err
		}
		n = max(n, planned(text))
		return nil
	})
	return n, err
}

// planned is how many rows the planner expects of a statement, from the text of EXPLAIN (FORMAT JSON); 0 if it does not say.
func planned(text []byte) int64 {
	var said []struct {
		Plan struct {
			Rows float64 `json:"Plan Rows"`
		}
	}
	if err := json.Unmarshal(text, &said); err != nil || len(said) == 0 {
		return 0
	}
	return int64(said[0].Plan.Rows)
}
