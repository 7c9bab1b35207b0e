package fallback

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
)

//go:embed schema.sql
var schemaSQL string

// schemaTimeout bounds EnsureSchema in place of QueryTimeout. An index on a table that has rows already takes
// its time, and the processes of a fleet that starts together wait for each other.
const schemaTimeout = 60 * time.Second

// SchemaSQL returns the statements that EnsureSchema runs. They may be repeated.
func SchemaSQL() string { return schemaSQL }

// SchemaError says that the schema is incomplete and that the role of the URL may not complete it.
type SchemaError struct {
	Statement string // what has to be run
	Who       string // who may run it
	err       error  // what Postgres said; nil if it was not asked to create anything
}

func (e *SchemaError) Error() string {
	return fmt.Sprintf("fallback: the schema cacheproxy is not usable with the rights of this role; let %s run: %s", e.Who, e.Statement)
}

func (e *SchemaError) Unwrap() error { return e.err }

// EnsureSchema creates what is missing of the schema. If nothing is, it needs no right to create anything.
// Several processes may call it at once. Where rights are missing the error is a *SchemaError.
func (s *Store) EnsureSchema(ctx context.Context) error {
	const op = "create the schema"
	ctx, cancel := context.WithTimeout(ctx, schemaTimeout)
	defer cancel()
	if err := s.house.acquire(ctx); err != nil {
		return wrap(op, err)
	}
	defer s.house.release()
	var st schemaState
	look := func() (err error) { st, err = s.schemaState(ctx); return err }
	if err := s.try(ctx, look); err != nil {
		return wrap(op, err)
	}
	if st.encoding != "UTF8" {
		return wrap(op, errors.New("the database must have the encoding UTF8, not "+st.encoding))
	}
	if !st.complete() {
		if err := s.createSchema(ctx); err != nil {
			if pg := pgError(err); pg != nil && pg.Code == codeInsufficientPrivilege {
				return st.lacksCreate(err)
			}
			return wrap(op, err)
		}
		if err := look(); err != nil {
			return wrap(op, err)
		}
	}
	return st.lacksUse()
}

// createSchema runs the schema's statements in one transaction, alone among all sidecars: IF NOT EXISTS does
// not keep two sessions from creating the same thing at the same time.
func (s *Store) createSchema(ctx context.Context) error {
	conn, err := s.pool.Acquire(ctx)
	if err != nil {
		return err
	}
	defer rollback(conn)
	var b pgx.Batch
	b.Queue(beginSQL)
	queueTimeouts(&b, schemaTimeout)
	b.Queue(lockStoreSQL, storeLockClass, schemaLock)
	if err := conn.SendBatch(ctx, &b).Close(); err != nil {
		return err
	}
	if _, err := conn.Conn().PgConn().Exec(ctx, schemaSQL).ReadAll(); err != nil {
		return err
	}
	_, err = conn.Exec(ctx, commitSQL)
	return err
}

// queueTimeouts gives the transaction that b opens other limits than the session has. d is whole milliseconds.
func queueTimeouts(b *pgx.Batch, d time.Duration) {
	for _, name := range []string{"statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout"} {
		b.Queue("SET LOCAL " + name + " = " + milliseconds(d))
	}
}

// schemaState is what the catalogue says, as far as this role is concerned.
type schemaState struct {
	role, database, encoding string
	exists, usable           bool     // the schema itself
	missing                  []string // relations that are not there
	denied                   []string // tables and sequences that this role may not use
	present                  int      // relations that are there
}

func (st *schemaState) complete() bool { return st.exists && len(st.missing) == 0 }

// relations are what the schema consists of, by their names there.
var relations = []string{
	"entries", "entries_updated_at", "entries_expires_at", "entries_tombstones", "entries_generation",
	"journal", "journal_id_seq", "fence", "generations", "phases", "transfers",
	"meta", "meta_updated_at", "meta_change",
}

// The catalogue is asked by name, because a cast to regclass fails for a schema that this role may not use.
const stateSQL = `
WITH have AS (
    SELECT w.name, c.oid, c.relkind
    FROM unnest($1::text[]) AS w(name)
    LEFT JOIN (SELECT c.oid, c.relname::text AS name, c.relkind
               FROM pg_catalog.pg_class c
               JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
               WHERE n.nspname = 'cacheproxy') c ON c.name = w.name)
SELECT current_user::text, current_database()::text,
       (SELECT pg_encoding_to_char(encoding)::text FROM pg_catalog.pg_database WHERE datname = current_database()),
       EXISTS (SELECT FROM pg_catalog.pg_namespace WHERE nspname = 'cacheproxy'),
       coalesce((SELECT has_schema_privilege(oid, 'USAGE') FROM pg_catalog.pg_namespace WHERE nspname = 'cacheproxy'), false),
       (SELECT coalesce(array_agg(name), '{}') FROM have WHERE oid IS NULL),
       (SELECT count(*) FROM have WHERE oid IS NOT NULL),
       (SELECT coalesce(array_agg(name), '{}') FROM have
        WHERE CASE relkind
              WHEN 'r' THEN NOT (has_table_privilege(oid, 'SELECT') AND has_table_privilege(oid, 'INSERT')
                                 AND has_table_privilege(oid, 'UPDATE') AND has_table_privilege(oid, 'DELETE'))
              WHEN 'S' THEN NOT (has_sequence_privilege(oid, 'USAGE') AND has_sequence_privilege(oid, 'SELECT')
                                 AND has_sequence_privilege(oid, 'UPDATE'))
              ELSE false END)`

func (s *Store) schemaState(ctx context.Context) (st schemaState, err error) {
	err = s.pool.QueryRow(ctx, stateSQL, relations).Scan(&st.role, &st.database, &st.encoding,
		&st.exists, &st.usable, &st.missing, &st.present, &st.denied)
	return st, err
}

// lacksCreate turns a refusal to create something into the statement that helps.
func (st *schemaState) lacksCreate(err error) error {
	role := pgx.Identifier{st.role}.Sanitize()
	switch {
	case !st.exists:
		return &SchemaError{
			Statement: "CREATE SCHEMA cacheproxy AUTHORIZATION " + role + ";",
			Who:       "the owner of the database " + pgx.Identifier{st.database}.Sanitize() + " or a superuser",
			err:       err,
		}
	case st.present == 0:
		return &SchemaError{
			Statement: "GRANT USAGE, CREATE ON SCHEMA cacheproxy TO " + role + ";",
			Who:       "the owner of the schema or a superuser",
			err:       err,
		}
	default:
		return &SchemaError{
			Statement: "the output of `cacheproxy schema` (missing: " + strings.Join(st.missing, ", ") + "), then " + st.grants(),
			Who:       "the owner of the schema or a superuser",
			err:       err,
		}
	}
}

// lacksUse is nil if this role may use everything.
func (st *schemaState) lacksUse() error {
	if st.usable && len(st.denied) == 0 {
		return nil
	}
	return &SchemaError{Statement: st.grants(), Who: "the owner of the schema or a superuser"}
}

func (st *schemaState) grants() string {
	role := pgx.Identifier{st.role}.Sanitize()
	return "GRANT USAGE ON SCHEMA cacheproxy TO " + role + "; " +
		"GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA cacheproxy TO " + role + "; " +
		"GRANT USAGE, SELECT, UPDATE ON ALL SEQUENCES IN SCHEMA cacheproxy TO " + role + ";"
}
