package fallback

import (
	"context"
	"errors"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
)

// fenceTimeout bounds a fence, what runs during it included, because it holds up every write of the fleet.
// It must exceed idleInTransaction, or one dead sidecar could keep fences from ever getting their lock.
const fenceTimeout = 30 * time.Second

const (
	raiseSQL = `
INSERT INTO cacheproxy.generations AS g (scope, generation)
SELECT $1::text, coalesce(max(o.generation), 0) + 1 FROM cacheproxy.generations o
ON CONFLICT (scope) DO UPDATE SET generation = excluded.generation`
	liftSQL = `SELECT setval('cacheproxy.fence', $1::bigint) FROM cacheproxy.fence WHERE last_value < $1::bigint`
)

// Fence makes every row that is stored now dead, those of one route or, if scope is "", all of the table: columns of the
// application are not flushed with it. It waits until
// no Tx is open, keeps new ones waiting, runs during, and commits. Readers see the rows until the commit and
// none of them afterwards. If during fails, nothing has changed and its error is returned as it is. ctx as
// given to during ends after thirty seconds at the latest. After an error that is Uncertain the caller may
// simply call again: a second fence does no harm.
//
// The rows are not touched, so a fence costs the same however many they are; the sweep removes them.
func (s *Store) Fence(ctx context.Context, scope string, during func(context.Context) error) error {
	// A column has fences of its own; its name as a route may have been another store's before.
	if c := s.columns.Load().byRoute[scope]; c != nil {
		scope = c.scope()
	}
	return s.exclusive(ctx, "fence", func(b *pgx.Batch) { b.Queue(raiseSQL, scope) }, during)
}

// Lift makes the next numbers (see Tx.Number) higher than above, if they are not already. It is for a server
// that forgot its last moments: numbers that it gave to transactions that never committed may come again,
// and whoever remembers the higher one elsewhere would refuse them. It tells whether they were not.
func (s *Store) Lift(ctx context.Context, above int64) (lifted bool, err error) {
	queue := func(b *pgx.Batch) {
		b.Queue(liftSQL, above).Exec(func(tag pgconn.CommandTag) error {
			lifted = tag.RowsAffected() > 0
			return nil
		})
	}
	err = s.exclusive(ctx, "lift the number", queue, func(context.Context) error { return nil })
	return lifted && err == nil, err
}

// exclusive runs what queue adds and then during in one transaction that no Tx overlaps.
func (s *Store) exclusive(ctx context.Context, op string, queue func(*pgx.Batch), during func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, fenceTimeout)
	defer cancel()
	if err := s.fence.acquire(ctx); err != nil {
		return wrap(op, err)
	}
	defer s.fence.release()

	var conn *pgxpool.Conn
	// Nothing is committed and during has not run, so a dead connection from the pool costs a second attempt.
	err := s.try(ctx, func() error {
		c, err := s.pool.Acquire(ctx)
		if err != nil {
			return err
		}
		var b pgx.Batch
		b.Queue(beginSQL)
		queueTimeouts(&b, fenceTimeout)
		b.Queue(lockStoreSQL, storeLockClass, storeLock)
		queue(&b)
		if err := c.SendBatch(ctx, &b).Close(); err != nil {
			rollback(c)
			return err
		}
		conn = c
		return nil
	})
	if err != nil {
		return wrap(op, err)
	}
	defer rollback(conn)
	if err := during(ctx); err != nil {
		return err
	}
	tag, err := conn.Exec(ctx, commitSQL)
	if err != nil {
		e := commitError(err, true)
		e.op = op
		return e
	}
	if tag.String() != commitSQL {
		return wrap(op, errors.New("the server rolled back"))
	}
	return nil
}
