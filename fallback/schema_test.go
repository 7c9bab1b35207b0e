package fallback

import (
	"errors"
	"net/url"
	"strings"
	"testing"

	"cacheproxy/internal/testenv"
	"cacheproxy/policy"
)

func TestEnsureSchemaMayRaceAndRepeat(t *testing.T) {
	u := testenv.Postgres(t)
	done := make(chan error)
	const n = 6
	for range n {
		s := openURL(t, Config{URL: u})
		go func() { done <- s.EnsureSchema(testContext(t)) }()
	}
	for range n {
		must(t, <-done)
	}
	s := openURL(t, Config{URL: u})
	must(t, s.EnsureSchema(testContext(t)))
	sql(t, s, SchemaSQL()) // by hand, as often as you like
	sql(t, s, SchemaSQL())
}

// stranger returns a store of a role that owns nothing, on the database of s.
func stranger(t *testing.T, s *Store) (*Store, string) {
	t.Helper()
	u, err := url.Parse(s.cfg.URL)
	must(t, err)
	role := "stranger_" + strings.TrimPrefix(u.Path, "/")
	sql(t, s, "CREATE ROLE "+role+" LOGIN")
	t.Cleanup(func() { sql(t, s, "DROP OWNED BY "+role+" CASCADE; DROP ROLE "+role) })
	u.User = url.User(role)
	return openURL(t, Config{URL: u.String()}), role
}

// Each refusal names the statement that helps, and the statement does help.
func TestMissingRightsAreNamed(t *testing.T) {
	owner := openURL(t, Config{URL: testenv.Postgres(t)})
	s, role := stranger(t, owner)

	refused := func(part string) *SchemaError {
		t.Helper()
		err := s.EnsureSchema(testContext(t))
		se, ok := errors.AsType[*SchemaError](err)
		if !ok || !strings.Contains(se.Statement, part) || !strings.Contains(err.Error(), se.Statement) ||
			!strings.Contains(err.Error(), se.Who) || Unavailable(err) {
			t.Fatalf("expected %q in: %v", part, err)
		}
		return se
	}
	e := refused("CREATE SCHEMA cacheproxy AUTHORIZATION \"" + role + "\"")
	if pg := pgError(e); pg == nil || pg.Code != codeInsufficientPrivilege {
		t.Error("the cause is lost")
	}
	sql(t, owner, e.Statement)
	must(t, s.EnsureSchema(testContext(t)))
	write(t, s, put(policy.Ref{Route: "r", Key: "k"}, "v"))

	// A schema of somebody else's, empty.
	sql(t, owner, `DROP SCHEMA cacheproxy CASCADE; CREATE SCHEMA cacheproxy`)
	e = refused("GRANT USAGE, CREATE ON SCHEMA")
	sql(t, owner, e.Statement)
	must(t, s.EnsureSchema(testContext(t)))

	// Somebody else's, incomplete: the owner completes it, then rights are missing.
	sql(t, owner, `DROP SCHEMA cacheproxy CASCADE;`+SchemaSQL()+`; DROP INDEX cacheproxy.entries_generation`)
	refused("entries_generation")
	sql(t, owner, SchemaSQL())
	e = refused("GRANT SELECT, INSERT, UPDATE, DELETE")
	sql(t, owner, e.Statement)
	must(t, s.EnsureSchema(testContext(t)))
	write(t, s, put(policy.Ref{Route: "r", Key: "k"}, "v"))
	must(t, s.Fence(testContext(t), "", nothing))
	_, err := s.Lift(testContext(t), 100)
	must(t, err)
	must(t, s.Register(testContext(t), "r", "phase1"))
	_, err = s.Sweep(testContext(t))
	must(t, err)
	_, err = s.Counts(testContext(t))
	must(t, err)
}

func TestTheDatabaseMustBeUTF8(t *testing.T) {
	owner := openURL(t, Config{URL: testenv.Postgres(t)})
	u, err := url.Parse(owner.cfg.URL)
	must(t, err)
	name := strings.TrimPrefix(u.Path, "/") + "_latin"
	sql(t, owner, "CREATE DATABASE "+name+" TEMPLATE template0 ENCODING 'LATIN1' LC_COLLATE 'C' LC_CTYPE 'C'")
	t.Cleanup(func() { sql(t, owner, "DROP DATABASE "+name+" WITH (FORCE)") })
	u.Path = "/" + name
	s := openURL(t, Config{URL: u.String()})
	if err := s.EnsureSchema(testContext(t)); err == nil || !strings.Contains(err.Error(), "UTF8") {
		t.Error(err)
	}
}

func TestAMissingSchemaIsNoOutage(t *testing.T) {
	s := openURL(t, Config{URL: testenv.Postgres(t)})
	if _, err := s.Load(testContext(t), refs("r", "k")); err == nil || Unavailable(err) || BadData(err) || Retryable(err) || strings.Contains(err.Error(), "WITH clock") {
		t.Error(err)
	}
	if _, err := s.Begin(testContext(t), refs("r", "k")); err == nil || Unavailable(err) || strings.Contains(err.Error(), "nextval") {
		t.Error(err)
	}
	if st := s.Stats(); st.InUse != 0 || st.Writes.Busy != 0 {
		t.Errorf("%+v", st)
	}
}
