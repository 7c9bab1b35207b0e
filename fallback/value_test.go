package fallback

import (
	"bytes"
	"crypto/rand"
	"fmt"
	"strings"
	"testing"

	"cacheproxy/internal/testenv"
	"cacheproxy/policy"
)

// corpus is what clients may store: all that the gate's own tests know, up to a size, and bytes that are no text.
func corpus(size int) map[string]string {
	m := map[string]string{}
	for i, v := range append(append([]string{}, gatePasses...), gateRefuses...) {
		if len(v) <= size {
			m[fmt.Sprintf("case:%03d", i)] = v
		}
	}
	noise := make([]byte, 4096)
	_, _ = rand.Read(noise)
	m["noise"] = string(noise)
	m["msgpack"] = "\x82\xa1a\x01\xa1b\xc0"
	m["nul"] = "a\x00b"
	return m
}

func TestEveryValueComesBackExactly(t *testing.T) {
	for _, mode := range []string{"", "cache_describe", "exec", "simple_protocol"} {
		t.Run("mode "+mode, func(t *testing.T) {
			u, size := testenv.Postgres(t), gateSize+2
			if mode != "" { // the modes differ in how a value is written, whatever its size
				size = 1 << 17
				u = withParam(t, u, "default_query_exec_mode", mode)
			}
			s := openURL(t, Config{URL: u})
			must(t, s.EnsureSchema(testContext(t)))
			for _, rawOnly := range []bool{false, true} {
				want := corpus(size)
				var changes []policy.Change
				for k, v := range want {
					changes = append(changes, put(policy.Ref{Route: "r", Key: k}, v))
				}
				tx := begin(t, s, refsOf(changes))
				// One group: what Postgres would refuse must not take the others with it.
				_, err := tx.Commit(testContext(t), changes, CommitOptions{RawOnly: rawOnly})
				must(t, err)
				for i, row := range read(t, s, refsOf(changes)...) {
					key := changes[i].Ref.Key
					if row.State != policy.Live || string(row.Value) != want[key] || row.TTL != -1 || row.ExpiresAt != -1 {
						t.Errorf("%s: got state %d, %d bytes, ttl %d; stored %.60q", key, row.State, len(row.Value), row.TTL, want[key])
					}
				}
				if n := ask[int](t, s, `SELECT count(*) FROM cacheproxy.entries WHERE value IS NOT NULL`); rawOnly != (n == 0) {
					t.Errorf("rawOnly %v left %d values", rawOnly, n)
				}
				// Whatever is a value can be printed.
				ask[int64](t, s, `SELECT coalesce(sum(length(value::text)), 0) FROM cacheproxy.entries`)
			}
		})
	}
}

func TestCanonicalJSONIsStoredOnce(t *testing.T) {
	s := open(t)
	for _, c := range []struct {
		value       string
		isJSON, raw bool
	}{
		{`{"A": 4, "a": 2, "b": 1, "aa": 3}`, true, false},
		{`{"a": [1, 2.50, null, true, "é"]}`, true, false},
		{`{"b":1}`, true, true},
		{`1e5`, true, true},
		{`100000`, true, false},
		{`null`, true, false},
		{` null`, true, true},
		{`hello`, false, true},
		{``, false, true},
		{`"\u0000"`, false, true},
	} {
		write(t, s, put(policy.Ref{Route: "r", Key: "k"}, c.value))
		isJSON := ask[bool](t, s, `SELECT value IS NOT NULL FROM cacheproxy.entries WHERE key = 'k'`)
		raw := ask[bool](t, s, `SELECT raw IS NOT NULL FROM cacheproxy.entries WHERE key = 'k'`)
		if isJSON != c.isJSON || raw != c.raw {
			t.Errorf("%q: value %v, raw %v", c.value, isJSON, raw)
		}
		if rows := read(t, s, policy.Ref{Route: "r", Key: "k"}); states(rows) != "L" || string(rows[0].Value) != c.value {
			t.Errorf("%q came back as %q", c.value, rows[0].Value)
		}
	}
}

func TestLargeGroupsAreSentInPieces(t *testing.T) {
	s := open(t)
	big := strings.Repeat("x", chunkBytes/2+1)
	var changes []policy.Change
	for i := range 4 {
		changes = append(changes, put(policy.Ref{Route: "r", Key: fmt.Sprint(i)}, big))
	}
	changes = append(changes, put(policy.Ref{Route: "r", Key: "9"}, big+big+big))
	write(t, s, changes...)
	for i, row := range read(t, s, refsOf(changes)...) {
		if !bytes.Equal(row.Value, changes[i].Value) {
			t.Errorf("value %d differs", i)
		}
	}
}

func TestLoadAnswersInTheOrderOfRefs(t *testing.T) {
	s := open(t)
	a, b, gone, other := policy.Ref{Route: "r", Key: "a"}, policy.Ref{Route: "r", Key: "b"}, policy.Ref{Route: "r", Key: "gone"}, policy.Ref{Route: "q", Key: "o"}
	write(t, s, put(a, "1"), put(b, "two"), policy.Change{Ref: gone, Op: policy.Delete}, put(other, "3"))
	rows := read(t, s, b, policy.Ref{Route: "r", Key: "never"}, other, gone, a, b)
	if got := states(rows); got != "LALTLL" {
		t.Fatal(got)
	}
	if string(rows[0].Value) != "two" || string(rows[2].Value) != "3" || string(rows[4].Value) != "1" || string(rows[5].Value) != "two" {
		t.Errorf("%v", rows)
	}
	rows[0].Value[0] = 'X'
	if string(rows[5].Value) != "two" {
		t.Error("two answers share their bytes")
	}
	if rows, err := s.Load(testContext(t), nil); rows != nil || err != nil {
		t.Error(rows, err)
	}
}

// A write of a value that Postgres cannot take in spite of the gate fails as a whole and says so.
func TestBadDataLeavesNothing(t *testing.T) {
	s := open(t)
	sql(t, s, `ALTER TABLE cacheproxy.entries ADD CONSTRAINT picky CHECK (value IS NULL OR (value->>'n')::int IS NOT NULL)`)
	bad, good := put(policy.Ref{Route: "r", Key: "a"}, `{"n":"secret"}`), put(policy.Ref{Route: "r", Key: "b"}, "plain")
	tx := begin(t, s, refsOf([]policy.Change{bad, good}))
	_, err := tx.Commit(testContext(t), []policy.Change{bad, good}, CommitOptions{Journal: []policy.Ref{bad.Ref}})
	if !BadData(err) || Uncertain(err) || Unavailable(err) || strings.Contains(err.Error(), "secret") {
		t.Fatal(err)
	}
	if got := states(read(t, s, bad.Ref, good.Ref)); got != "AA" {
		t.Fatal(got)
	}
	if p, err := s.Poll(testContext(t), 0); err != nil || len(p.Intents) != 0 {
		t.Fatal(p, err)
	}
	tx = begin(t, s, refsOf([]policy.Change{bad, good}))
	_, err = tx.Commit(testContext(t), []policy.Change{bad, good}, CommitOptions{RawOnly: true})
	must(t, err)
	if got := states(read(t, s, bad.Ref, good.Ref)); got != "LL" {
		t.Fatal(got)
	}
}
