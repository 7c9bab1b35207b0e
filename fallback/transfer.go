package fallback

import (
	"context"
	"errors"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

// ErrTransferring says that somebody else copies this route in this direction.
var ErrTransferring = errors.New("fallback: another process is at it")

// TransferLockClass is the first of the two numbers of the advisory lock of a transfer; the second is the hash of its name.
const TransferLockClass = 0x63707472

// The last holder may have ended this moment, as after Ctrl-C and at once --resume, and Postgres not have noticed.
const (
	lastHolder     = time.Second
	lastHolderPoll = 20 * time.Millisecond
)

// Transfer is the right to copy one route in one direction, and the place where it is written down how far that got. The right is a lock of
// a session, on a connection of its own: it ends with the process, however that ends. It belongs to one goroutine at a time.
type Transfer struct {
	s                *Store
	conn             *pgxpool.Conn // nil: lost
	route, direction string
}

// OpenTransfer takes the right, or answers ErrTransferring.
func (s *Store) OpenTransfer(ctx context.Context, route, direction string) (*Transfer, error) {
	t := &Transfer{s: s, route: route, direction: direction}
	return t, t.lock(ctx)
}

// lock takes the right on a new connection.
func (t *Transfer) lock(ctx context.Context) error {
	ctx, cancel := t.s.within(ctx)
	defer cancel()
	return wrap("begin a transfer", t.s.try(ctx, func() error {
		conn, err := t.s.pool.Acquire(ctx)
		if err != nil {
			return err
		}
		ours := false
		for end := time.Now().Add(min(lastHolder, t.s.cfg.QueryTimeout/2)); ; {
			err = conn.QueryRow(ctx, `SELECT pg_try_advisory_lock($1::int, hashtext($2::text))`, TransferLockClass, t.direction+" "+t.route).Scan(&ours)
			if ours || err != nil || time.Now().After(end) {
				break
			}
			time.Sleep(lastHolderPoll)
		}
		switch {
		case err != nil:
			conn.Release()
			return err
		case !ours:
			conn.Release()
			return ErrTransferring
		}
		t.conn = conn
		return nil
	}))
}

// Read returns what Write has written last.
func (t *Transfer) Read(ctx context.Context) (state []byte, at time.Time, found bool, err error) {
	err = t.ask(ctx, "read how far a transfer got", func(ctx context.Context) error {
		err := t.conn.QueryRow(ctx, `SELECT state::text, updated_at FROM cacheproxy.transfers WHERE route = $1 AND direction = $2`,
			t.route, t.direction).Scan(&state, &at)
		if errors.Is(err, pgx.ErrNoRows) {
			return nil
		}
		found = err == nil
		return err
	})
	return state, at, found, err
}

// Write writes down how far the transfer got; nil removes what was written.
func (t *Transfer) Write(ctx context.Context, state []byte) error {
	return t.ask(ctx, "write how far a transfer got", func(ctx context.Context) error {
		if state == nil {
			_, err := t.conn.Exec(ctx, `DELETE FROM cacheproxy.transfers WHERE route = $1 AND direction = $2`, t.route, t.direction)
			return err
		}
		_, err := t.conn.Exec(ctx, `INSERT INTO cacheproxy.transfers VALUES ($1, $2, $3::text::jsonb, clock_timestamp())
			ON CONFLICT (route, direction) DO UPDATE SET state = excluded.state, updated_at = excluded.updated_at`,
			t.route, t.direction, string(state))
		return err
	})
}

// ask works on the connection that has the lock. If that is lost, so is the lock: it is taken again first, unless somebody else has it.
func (t *Transfer) ask(ctx context.Context, op string, f func(context.Context) error) error {
	if t.conn == nil {
		if err := t.lock(ctx); err != nil {
			return err
		}
	}
	ctx, cancel := t.s.within(ctx)
	defer cancel()
	err := f(ctx)
	if err != nil && t.conn.Conn().IsClosed() {
		t.conn.Release()
		t.conn = nil
	}
	return wrap(op, err)
}

// Close gives the right back.
func (t *Transfer) Close() {
	if t.conn == nil {
		return
	}
	// The lock is the session's: with the connection it goes, whatever became of the rest.
	ctx, cancel := context.WithTimeout(context.Background(), rollbackTimeout)
	defer cancel()
	_ = t.conn.Hijack().Close(ctx)
	t.conn = nil
}
