package fallback

import (
	"context"
	"errors"
	"io"
	"net"
	"strings"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/puddle/v2"
)

// SQLSTATEs that decide something here. See appendix A of the PostgreSQL manual.
const (
	codeInsufficientPrivilege = "42501"
	codeReadOnly              = "25006"
	codeIdleInTransaction     = "25P03"
	codeSerialization         = "40001"
	codeDeadlock              = "40P01"
	codeLockNotAvailable      = "55P03"
	codeFeatureNotSupported   = "0A000"
	codeDependentObjects      = "2BP01"
	codeUndefinedTable        = "42P01"
	codeQueryCanceled         = "57014"
)

// opError names the operation that failed. Its text never carries what was stored or asked.
type opError struct {
	op        string
	err       error
	uncertain bool // COMMIT may have been executed
}

func (e *opError) Unwrap() error { return e.err }

func (e *opError) Error() string {
	s := "fallback: " + e.op + ": " + describe(e.err)
	if e.uncertain {
		s += " (the outcome of the commit is unknown)"
	}
	return s
}

// describe is err's text without anything that a client stored. Postgres quotes the offending data in the
// messages of class 22 and 23, and pgx quotes the SQL when it cannot prepare a batch.
func describe(err error) string {
	if pg := pgError(err); pg != nil {
		if class(pg) == "22" || rejects(pg) {
			return "Postgres refused the data (SQLSTATE " + pg.Code + ")"
		}
		return pg.Error()
	}
	if pre, ok := errors.AsType[pgx.ErrPreprocessingBatch](err); ok {
		return describe(pre.Unwrap())
	}
	return err.Error()
}

// wrap adds the operation to err once; nil stays nil.
func wrap(op string, err error) error {
	if err == nil {
		return nil
	}
	if _, ok := errors.AsType[*opError](err); ok {
		return err
	}
	return &opError{op: op, err: err}
}

func pgError(err error) *pgconn.PgError {
	pg, _ := errors.AsType[*pgconn.PgError](err)
	return pg
}

func class(pg *pgconn.PgError) string {
	if len(pg.Code) < 2 {
		return ""
	}
	return pg.Code[:2]
}

// fatal tells that the server ended the session with this error.
func fatal(pg *pgconn.PgError) bool {
	sev := pg.SeverityUnlocalized
	if sev == "" { // before PostgreSQL 9.6
		sev = pg.Severity
	}
	return sev == "FATAL" || sev == "PANIC"
}

// Overloaded tells that the store's own cap turned the request away. Postgres was not asked, and nothing is
// known of its health.
func Overloaded(err error) bool { return errors.Is(err, errShed) }

// Uncertain tells that COMMIT was sent and its outcome is not known: the changes, the journal row and the
// strikes are all there or all missing. Ask it before every other question.
func Uncertain(err error) bool {
	op, ok := errors.AsType[*opError](err)
	return ok && op.uncertain
}

// Unavailable tells that Postgres could not be reached or did not answer in time. It is false for a caller
// that went away and for a request that our own cap refused.
func Unavailable(err error) bool {
	if err == nil || Overloaded(err) || errors.Is(err, context.Canceled) {
		return false
	}
	if _, ok := errors.AsType[*pgconn.ConnectError](err); ok {
		return true
	}
	if pg := pgError(err); pg != nil {
		switch class(pg) {
		case "08", "53", "57", "58": // connection, resources, operator's intervention or a timeout, I/O
			return true
		}
		return false
	}
	return errors.Is(err, context.DeadlineExceeded) || lost(err)
}

// lost tells that the connection broke, or had been broken when it was taken from the pool.
func lost(err error) bool {
	if pg := pgError(err); pg != nil {
		return fatal(pg)
	}
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return false
	}
	_, isNet := errors.AsType[net.Error](err)
	return isNet ||
		errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, net.ErrClosed) ||
		errors.Is(err, pgconn.ErrConnClosed) || errors.Is(err, puddle.ErrClosedPool) ||
		pgconn.Timeout(err) || pgconn.SafeToRetry(err) ||
		// pgconn has no name for a server that closes a pipeline in the middle.
		strings.Contains(err.Error(), "expected ReadyForQuery")
}

// errNotJSON refuses a value that a column cannot hold. BadData is true of it.
var errNotJSON = errors.New("a value is not JSON that a column can hold")

// BadData tells that Postgres refused a value (class 22), or could not hold it (class 54): the caller may repeat the group with
// CommitOptions.RawOnly, which gives Postgres nothing to parse. That is no help to a column: of those that concern one it stays
// true, and the caller finds out one by one which it is.
func BadData(err error) bool {
	if errors.Is(err, errNotJSON) {
		return true
	}
	pg := pgError(err)
	return pg != nil && (class(pg) == "22" || class(pg) == "54")
}

// Rejected tells that a constraint or a trigger of the application's table has refused a change, which may be a delete. Nothing is
// stored, and of a group the caller finds out one by one which it is.
func Rejected(err error) bool {
	pg := pgError(err)
	return pg != nil && rejects(pg)
}

// rejects: the constraints are class 23, and what functions raise is P0 unless they say otherwise.
func rejects(pg *pgconn.PgError) bool { return class(pg) == "23" || class(pg) == "P0" }

// Retryable tells that nothing was done and that the same request may succeed at once: a serialization
// failure, a deadlock, a lock not had in time, a transaction that idled too long between Begin and Commit,
// or a cached plan that a change of the schema has outdated.
func Retryable(err error) bool {
	pg := pgError(err)
	if pg == nil || Uncertain(err) {
		return false
	}
	switch pg.Code {
	case codeSerialization, codeDeadlock, codeLockNotAvailable, codeIdleInTransaction:
		return true
	}
	return outdatedPlan(pg)
}

// outdatedPlan recognises "cached plan must not change result type" by the routine, because 0A000 has
// many meanings and the text is translated.
func outdatedPlan(pg *pgconn.PgError) bool {
	return pg.Code == codeFeatureNotSupported && pg.Routine == "RevalidateCachedQuery"
}

// ReadOnly tells that the server takes no writes: a standby, or a primary that was demoted under our
// connections. Call Store.Reset, so that new connections look for the primary again.
func ReadOnly(err error) bool {
	pg := pgError(err)
	return pg != nil && pg.Code == codeReadOnly
}

// Denied tells that the role of the URL may not do what was asked.
func Denied(err error) bool {
	pg := pgError(err)
	return pg != nil && pg.Code == codeInsufficientPrivilege
}

// undefinedTable tells that a table is not there.
func undefinedTable(err error) bool {
	pg := pgError(err)
	return pg != nil && pg.Code == codeUndefinedTable
}

// notSent tells that err happened before a single byte went to the server.
func notSent(err error) bool { return pgconn.SafeToRetry(err) }
