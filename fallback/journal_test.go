package fallback

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"cacheproxy/policy"
)

func TestIntentsLiveUntilTheyAreStruck(t *testing.T) {
	s := open(t)
	a, b := policy.Ref{Route: "r", Key: "a"}, policy.Ref{Route: "q", Key: "b,{}\"\\"}
	var ids []int64
	for _, journal := range [][]policy.Ref{{a, b}, {b}, nil, {a}} {
		tx := begin(t, s, []policy.Ref{a, b})
		id, err := tx.Commit(testContext(t), []policy.Change{put(a, "v")}, CommitOptions{Journal: journal})
		must(t, err)
		if (id == 0) != (journal == nil) {
			t.Errorf("intent %d for %v", id, journal)
		}
		if id != 0 {
			ids = append(ids, id)
		}
	}
	p, err := s.Poll(testContext(t), 0)
	must(t, err)
	if p.More || len(p.Intents) != 3 || p.Intents[0].ID != ids[0] || !slices.Equal(p.Intents[0].Refs, []policy.Ref{a, b}) ||
		!slices.Equal(p.Intents[1].Refs, []policy.Ref{b}) || p.Intents[0].Age < p.Intents[2].Age || p.Intents[2].Age < 0 || p.Now.IsZero() {
		t.Errorf("%+v", p)
	}
	must(t, s.Strike(testContext(t), []int64{ids[1], 424242}))
	must(t, s.Strike(testContext(t), nil))
	tx := begin(t, s, []policy.Ref{a})
	if there, err := tx.Strike(testContext(t), ids[:2]); err != nil || len(there) != 1 || there[0].ID != ids[0] || !slices.Equal(there[0].Refs, []policy.Ref{a, b}) {
		t.Errorf("struck %+v %v", there, err)
	}
	tx.Rollback() // not lasting
	tx, err = s.Lock(testContext(t), []policy.Ref{a})
	must(t, err)
	if there, err := tx.Strike(testContext(t), ids[:2]); err != nil || len(there) != 1 {
		t.Errorf("struck %+v %v", there, err)
	}
	if row := tx.Rows()[0]; row.State != policy.Live || len(row.Value) != 0 {
		t.Errorf("Lock reads %+v", row)
	}
	_, err = tx.Commit(testContext(t), nil, CommitOptions{})
	must(t, err)
	if _, err := tx.Strike(testContext(t), ids); err == nil {
		t.Error("struck after the end")
	}
	p, err = s.Poll(testContext(t), 0)
	must(t, err)
	if len(p.Intents) != 1 || p.Intents[0].ID != ids[2] {
		t.Errorf("%+v", p)
	}
	n, err := s.Counts(testContext(t))
	must(t, err)
	if n.Rows != 1 || n.Journal != 1 || n.Bytes <= 0 || n.Oldest <= 0 {
		t.Errorf("%+v", n)
	}
}

// What a transaction sees of the journal: the keys that are named, and that what it strikes counts as changed.
func TestNamedAndStruck(t *testing.T) {
	s := open(t)
	a, b, c := policy.Ref{Route: "r", Key: "a"}, policy.Ref{Route: "q", Key: "b"}, policy.Ref{Route: "r", Key: "c"}
	all := []policy.Ref{a, b, c}
	id, err := begin(t, s, all).Commit(testContext(t), []policy.Change{put(a, "v"), put(b, "v"), put(c, "v")}, CommitOptions{Journal: []policy.Ref{a, b}})
	must(t, err)
	p, err := s.Poll(testContext(t), 0)
	must(t, err)
	tx := begin(t, s, all)
	named, err := tx.Named(testContext(t), []string{"a", "c", "absent"})
	if err != nil || len(named) != 1 || !named["a"] {
		t.Errorf("named: %v %v", named, err)
	}
	_, err = tx.Strike(testContext(t), []int64{id})
	must(t, err)
	if named, err = tx.Named(testContext(t), []string{"a", "b"}); err != nil || len(named) != 0 {
		t.Errorf("named although struck: %v %v", named, err)
	}
	_, err = tx.Commit(testContext(t), nil, CommitOptions{})
	must(t, err)
	if _, err := tx.Named(testContext(t), []string{"a"}); err == nil {
		t.Error("looked after the end")
	}
	// ChangedSince looks ten seconds further back.
	refs, err := s.ChangedSince(testContext(t), p.Now.Add(commitLag), "", 0)
	if err != nil || !slices.Equal(refs, []policy.Ref{a, b}) {
		t.Errorf("changed: %v %v", refs, err)
	}
}

// A key that an entry names already needs no other, for as long as that one is there.
func TestKnownIntentsAreNotRepeated(t *testing.T) {
	s := open(t)
	a, b := policy.Ref{Route: "r", Key: "a"}, policy.Ref{Route: "q", Key: "b"}
	var ids []int64
	journal := func(refs []policy.Ref, known ...int64) int64 {
		t.Helper()
		id, err := begin(t, s, []policy.Ref{a, b}).Commit(testContext(t), []policy.Change{put(a, "v")}, CommitOptions{Journal: refs, Known: known})
		must(t, err)
		if id != 0 {
			ids = append(ids, id)
		}
		return id
	}
	first := journal([]policy.Ref{a}, 0)
	if first == 0 || journal([]policy.Ref{a}, first) != 0 {
		t.Error("a was not known, or not taken for known")
	}
	second := journal([]policy.Ref{a, b}, first, 0)
	if second == 0 || journal([]policy.Ref{b, a}, second, first) != 0 {
		t.Error("b was not known, or not taken for known")
	}
	must(t, s.Strike(testContext(t), []int64{first}))
	third := journal([]policy.Ref{a, b}, first, second)
	p, err := s.Poll(testContext(t), 0)
	must(t, err)
	if len(p.Intents) != 2 || p.Intents[0].ID != second || !slices.Equal(p.Intents[0].Refs, []policy.Ref{b}) || p.Intents[1].ID != third || !slices.Equal(p.Intents[1].Refs, []policy.Ref{a}) {
		t.Errorf("%+v", p)
	}
}

func TestPollIsBounded(t *testing.T) {
	s := open(t)
	sql(t, s, fmt.Sprintf(`INSERT INTO cacheproxy.journal (keys, routes) SELECT ARRAY['k' || i], ARRAY['r'] FROM generate_series(1, %d) i`, pollLimit+5))
	p, err := s.Poll(testContext(t), 0)
	must(t, err)
	if len(p.Intents) != pollLimit || !p.More || p.Intents[0].Refs[0].Key != "k1" {
		t.Errorf("%d intents, more %v", len(p.Intents), p.More)
	}
	p, err = s.Poll(testContext(t), p.Intents[pollLimit-1].ID)
	must(t, err)
	if len(p.Intents) != 5 || p.More || p.Intents[0].Refs[0].Key != fmt.Sprint("k", pollLimit+1) {
		t.Errorf("behind the first page %d intents, more %v", len(p.Intents), p.More)
	}
}

func TestPhasesAreRemembered(t *testing.T) {
	s := open(t)
	for _, r := range [][2]string{{"r", "phase1"}, {"r", "phase2"}, {"q", "drain"}, {"r", "phase1"}} {
		must(t, s.Register(testContext(t), r[0], r[1]))
	}
	p, err := s.Poll(testContext(t), 0)
	must(t, err)
	if len(p.Phases) != 2 || !slices.Equal(p.Phases["r"], []string{"phase1", "phase2"}) || !slices.Equal(p.Phases["q"], []string{"drain"}) {
		t.Errorf("%v", p.Phases)
	}
	if !ask[bool](t, s, `SELECT last_seen > since FROM cacheproxy.phases WHERE route = 'r' AND phase = 'phase1'`) {
		t.Error("registering again was not noted")
	}
}

func TestChangedSincePagesInKeyOrder(t *testing.T) {
	s := open(t)
	var want []string
	var changes []policy.Change
	for i := range 25 {
		k := fmt.Sprintf("k%02d", i)
		want = append(want, k)
		c := put(policy.Ref{Route: "r", Key: k}, "v")
		switch i % 5 {
		case 1:
			c = policy.Change{Ref: c.Ref, Op: policy.Delete}
		case 2:
			c = lasting(c, policy.ExpiresAt, 1)
		}
		changes = append(changes, c)
	}
	write(t, s, changes...)
	sql(t, s, `INSERT INTO cacheproxy.entries (key, route, generation, updated_at) VALUES ('k00old', 'r', 0, now() - interval '1 hour')`)

	list := func(since time.Time, limit int) (keys []string, pages int) {
		after := ""
		for {
			page, err := s.ChangedSince(testContext(t), since, after, limit)
			must(t, err)
			pages++
			for _, r := range page {
				if r.Route != "r" {
					t.Errorf("route %q", r.Route)
				}
				keys = append(keys, r.Key)
				after = r.Key
			}
			if len(page) < limit || limit == 0 {
				return keys, pages
			}
		}
	}
	minute := time.Now().Add(-time.Minute)
	if got, pages := list(minute, 10); !slices.Equal(got, want) || pages != 3 {
		t.Errorf("%d pages: %v", pages, got)
	}
	if got, _ := list(time.Time{}, 7); len(got) != 26 || got[1] != "k00old" {
		t.Errorf("all: %v", got)
	}
	if got, _ := list(time.Now().Add(time.Hour), 0); len(got) != 0 {
		t.Errorf("from the future: %v", got)
	}
	if got, _ := list(time.Now().Add(commitLag/2), 0); len(got) != 25 {
		t.Errorf("rows that were written just before must be there: %v", got)
	}
	// The sweep makes tombstones of what has expired, and they stay in the list.
	sql(t, s, `UPDATE cacheproxy.entries SET updated_at = now() - interval '30 minutes', expires_at = now() WHERE key = 'k00old'`)
	if n := sweep(t, s); n != 6 {
		t.Errorf("swept %d", n)
	}
	if got, _ := list(minute, 10); !slices.Equal(got, slices.Insert(slices.Clone(want), 1, "k00old")) {
		t.Errorf("after the sweep: %v", got)
	}
}

func TestCountsEstimateALargeTable(t *testing.T) {
	s := open(t)
	sql(t, s, fmt.Sprintf(`INSERT INTO cacheproxy.entries (key, route, generation, updated_at)
		SELECT i::text, 'r', 0, now() FROM generate_series(1, %d) i; ANALYZE cacheproxy.entries`, 3*countLimit))
	n, err := s.Counts(testContext(t))
	must(t, err)
	if n.Rows < 2*countLimit || n.Journal != 0 || n.Oldest != 0 {
		t.Errorf("%+v", n)
	}
}
