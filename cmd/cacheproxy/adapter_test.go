package main

import (
	"context"
	"errors"
	"testing"
	"time"

	"cacheproxy/fallback"
	"cacheproxy/internal/testenv"
	"cacheproxy/policy"

	"github.com/jackc/pgx/v5"
)

func openStore(t *testing.T, url string) *store {
	t.Helper()
	s, err := fallback.New(fallback.Config{URL: url})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return newStore(s)
}

func TestAdapter(t *testing.T) {
	ctx := context.Background()
	s := openStore(t, testenv.Postgres(t))
	if _, err := s.Poll(ctx, 0); !s.Unavailable(err) {
		t.Errorf("a database without the schema: %v", err)
	}
	if err := s.db.EnsureSchema(ctx); err != nil {
		t.Fatal(err)
	}
	ref := policy.Ref{Route: "user", Key: "user:1"}
	begin := func() (commit func(value string, known []int64, rawOnly bool) (int64, error)) {
		t.Helper()
		tx, err := s.Begin(ctx, []policy.Ref{ref})
		if err != nil {
			t.Fatal(err)
		}
		return func(value string, known []int64, rawOnly bool) (int64, error) {
			return tx.Commit(ctx, []policy.Change{{Ref: ref, Value: []byte(value)}}, []policy.Ref{ref}, known, rawOnly)
		}
	}
	intent, err := begin()(`{"a":1}`, nil, false)
	if err != nil || intent == 0 {
		t.Fatalf("commit: %d %v", intent, err)
	}
	p, err := s.Poll(ctx, 0)
	if err != nil || len(p.Intents) != 1 || p.Intents[0].ID != intent || p.Intents[0].Refs[0] != ref || p.Now.IsZero() {
		t.Errorf("poll: %+v %v", p, err)
	}
	if id, err := begin()(`{"a":1}`, []int64{intent}, false); err != nil || id != 0 {
		t.Errorf("commit with a known entry: %d %v", id, err)
	}
	lock, err := s.Lock(ctx, []policy.Ref{ref})
	if err != nil {
		t.Fatal(err)
	}
	if there, err := lock.Strike(ctx, []int64{intent}); err != nil || len(there) != 1 || there[0].Refs[0] != ref {
		t.Errorf("strike: %+v %v", there, err)
	}
	if _, err := lock.Commit(ctx, nil, nil, nil, false); err != nil {
		t.Error(err)
	}
	second, err := begin()(`{"a":2}`, []int64{intent}, true)
	if err != nil || second <= intent {
		t.Fatalf("commit: %d %v", second, err)
	}
	if p, err := s.Poll(ctx, 0); err != nil || len(p.Intents) != 1 || p.Intents[0].ID != second {
		t.Errorf("poll after a strike: %+v %v", p, err)
	}
	if err := s.Register(ctx, "user", "phase1"); err != nil {
		t.Error(err)
	}
	if lifted, err := s.Lift(ctx, 1_000_000); err != nil || !lifted {
		t.Errorf("lift: %v %v", lifted, err)
	}
	tx, err := s.Begin(ctx, []policy.Ref{ref})
	if err != nil || tx.Number() <= 1_000_000 || string(tx.Rows()[0].Value) != `{"a":2}` {
		t.Errorf("begin: %v", err)
	}
	tx.Rollback()
	broken := errors.New("it broke")
	if err := s.Fence(ctx, "", func(context.Context) error { return broken }); !errors.Is(err, broken) || s.Unavailable(err) {
		t.Errorf("fence: %v", err)
	}
	expired, cancel := context.WithDeadline(ctx, time.Now().Add(-time.Second))
	defer cancel()
	if _, err := s.Begin(expired, []policy.Ref{ref}); err == nil || s.BadData(err) || s.Uncertain(err) {
		t.Errorf("begin too late: %v", err)
	}
}

// A server that takes no writes any more must stay out of use although it can be polled, and come back by itself.
func TestStandby(t *testing.T) {
	ctx := context.Background()
	url := testenv.Postgres(t)
	s := openStore(t, url)
	if err := s.db.EnsureSchema(ctx); err != nil {
		t.Fatal(err)
	}
	demote := func(word string) {
		t.Helper()
		conn, err := pgx.Connect(ctx, url+"&default_transaction_read_only=off")
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close(ctx)
		name := pgx.Identifier{conn.Config().Database}.Sanitize()
		if _, err := conn.Exec(ctx, "ALTER DATABASE "+name+" SET default_transaction_read_only = "+word); err != nil {
			t.Fatal(err)
		}
	}
	demote("on")
	s.db.Reset()
	if err := s.Register(ctx, "user", "phase1"); !fallback.ReadOnly(err) || !s.Unavailable(err) {
		t.Fatalf("a write: %v", err)
	}
	for range 2 {
		if _, err := s.Poll(ctx, 0); !s.Unavailable(err) {
			t.Errorf("a poll of a server that takes no writes: %v", err)
		}
	}
	demote("off")
	eventually(t, "it is of use again", func() bool {
		_, err := s.Poll(ctx, 0)
		return err == nil && s.Register(ctx, "user", "phase1") == nil
	})
}
