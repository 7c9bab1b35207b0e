//go:build wrong

package proxy

import (
	"context"
	"os"
	"strings"
	"time"

	"cacheproxy/internal/said"
	"cacheproxy/policy"

	"go.uber.org/zap"
)

// breakRules breaks the rule that WRONG_PROTOCOL names, to show that the tests notice. Each is a rule of docs/consistency.md, left out.
func breakRules(e *engine) {
	wrong := wrongStore{Store: e.store.Store, e: e}
	switch name := os.Getenv("WRONG_PROTOCOL"); name {
	case "promotion with NX only":
		replace(scriptPromote, "if t == ARGV[1] then", "if true then")
	case "phase2 without invalidation":
		wrong.changes = func(c policy.Change) (policy.Change, bool) { return c, c.Op != policy.Drop }
	case "Redis before the commit":
		wrong.before = func(ctx context.Context, changes []policy.Change) {
			for _, c := range changes {
				if c.Op == policy.Put {
					_, _ = e.up.do(ctx, "SET", c.Ref.Key, string(c.Value))
				}
			}
			time.Sleep(time.Millisecond)
		}
	case "trust in a paused Redis": // what it missed is journaled nowhere
		wrong.unjournaled = true
	case "trust before recovery":
		e.up.recover = func(context.Context, *link) error { return nil }
	case "no tombstone":
		wrong.changes = func(c policy.Change) (policy.Change, bool) {
			if c.Op == policy.Delete {
				c.Op = policy.Drop
			}
			return c, true
		}
	case "no repair after a restart":
		wrong.unchanged = true
	case "a key is logged":
		wrong.changes = func(c policy.Change) (policy.Change, bool) {
			e.log.Debug("wrong", zap.String("key", c.Ref.Key))
			return c, true
		}
	case "a value is logged":
		wrong.changes = func(c policy.Change) (policy.Change, bool) {
			e.log.Warn("wrong", zap.Error(said.Sentence(c.Value)))
			return c, true
		}
	case "a write in Redis expects nothing":
		replace(scriptWrite, "elseif c ~= '' then", "elseif false then")
	default:
		panic("WRONG_PROTOCOL names no rule: " + name)
	}
	e.store.Store = wrong
}

func replace(s *script, old, new string) {
	body := strings.Replace(s.body, old, new, 1)
	if body == s.body {
		panic("the script has changed: " + old)
	}
	*s = *newScript("wrong", s.op, body)
}

// wrongStore changes what is committed.
type wrongStore struct {
	Store
	e                      *engine
	before                 func(context.Context, []policy.Change)
	changes                func(policy.Change) (policy.Change, bool)
	unjournaled, unchanged bool
}

func (s wrongStore) Begin(ctx context.Context, refs []policy.Ref) (Tx, error) {
	tx, err := s.Store.Begin(ctx, refs)
	if err != nil {
		return nil, err
	}
	return wrongTx{tx, s}, nil
}

func (s wrongStore) ChangedSince(ctx context.Context, since time.Time, after string, limit int) ([]policy.Ref, error) {
	if s.unchanged {
		return nil, nil
	}
	return s.Store.ChangedSince(ctx, since, after, limit)
}

type wrongTx struct {
	Tx
	s wrongStore
}

func (t wrongTx) Commit(ctx context.Context, changes []policy.Change, journal []policy.Ref, known []int64, rawOnly bool) (int64, error) {
	if t.s.before != nil {
		t.s.before(ctx, changes)
	}
	if t.s.changes != nil {
		var kept []policy.Change
		for _, c := range changes {
			if c, ok := t.s.changes(c); ok {
				kept = append(kept, c)
			}
		}
		changes = kept
	}
	if t.s.unjournaled {
		journal, known = nil, nil
	}
	return t.Tx.Commit(ctx, changes, journal, known, rawOnly)
}
