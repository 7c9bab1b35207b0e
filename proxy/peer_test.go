package proxy_test

import (
	"bytes"
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"cacheproxy/fallback"
	"cacheproxy/internal/bridge"
	"cacheproxy/policy"
	"cacheproxy/proxy"
)

// peerPatience bounds what should take milliseconds.
const peerPatience = 30 * time.Second

// peerStore is a store that the test can stop at.
type peerStore struct {
	proxy.PeerStore
	loaded, locked func()
}

func (s *peerStore) Load(ctx context.Context, refs []policy.Ref) ([]policy.Row, error) {
	rows, err := s.PeerStore.Load(ctx, refs)
	if s.loaded != nil {
		s.loaded()
	}
	return rows, err
}

func (s *peerStore) Look(ctx context.Context, refs []policy.Ref) ([]policy.Row, error) {
	rows, err := s.PeerStore.Look(ctx, refs)
	if s.locked != nil {
		s.locked()
	}
	return rows, err
}

// newPeer is a Peer in this world.
func (w *world) newPeer(timeout time.Duration) (*proxy.Peer, *peerStore) {
	w.t.Helper()
	fs, err := fallback.New(fallback.Config{URL: w.pgURL, QueryTimeout: timeout})
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(fs.Close)
	if err := fs.EnsureSchema(context.Background()); err != nil {
		w.t.Fatal(err)
	}
	store := &peerStore{PeerStore: bridge.Peer(fs)}
	p, err := proxy.NewPeer(proxy.PeerConfig{
		Redis: proxy.RedisConfig{URL: w.redis.URL(), Timeout: timeout, DialTimeout: timeout}, MaxValue: 1 << 20, Instance: fmt.Sprintf("peer%d", instances.Add(1)),
	}, store)
	if err != nil {
		w.t.Fatal(err)
	}
	return p, store
}

// peer is a Peer's connection.
func (w *world) peer() (*proxy.PeerLink, *peerStore) {
	w.t.Helper()
	p, store := w.newPeer(peerPatience)
	link, err := p.Dial(context.Background())
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(link.Close)
	if _, err := link.Measure(context.Background()); err != nil {
		w.t.Fatal(err)
	}
	return link, store
}

func refs(keys ...string) (out []policy.Ref) {
	for _, k := range keys {
		out = append(out, policy.Ref{Route: "all", Key: k})
	}
	return out
}

func fates(done []proxy.Done) (out []string) {
	for _, d := range done {
		out = append(out, d.Fate.String())
	}
	return out
}

func wantFates(t testing.TB, done []proxy.Done, err error, want ...string) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	if got := fates(done); !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
}

const insertRow = `INSERT INTO cacheproxy.entries (key, value, raw, route, generation, expires_at, updated_at)
	VALUES ($1, $2::text::jsonb, $3, 'all', 0, now() + $4 * interval '1 s', now()) RETURNING 'ok'`

func (w *world) row(key string, json, raw any, seconds any) {
	w.t.Helper()
	w.sql(insertRow, key, json, raw, seconds)
}

func TestPromote(t *testing.T) {
	w := newWorld(t)
	link, _ := w.peer()
	ctx := context.Background()
	w.row("json", `{"a": 1}`, nil, nil)
	w.row("raw", nil, []byte("\x00\xff"), nil)
	w.row("ttl", `1`, nil, 1000)
	w.row("expired", `1`, nil, -1)
	w.row("deleted", nil, nil, nil)
	w.row("there", `1`, nil, nil)
	w.row("hash", `1`, nil, nil)
	w.row("marked", `1`, nil, nil)
	w.row("large", nil, bytes.Repeat([]byte("x"), 1<<20+1), nil)
	w.row("held", `1`, nil, nil)
	w.raw.want("+OK", "SET", "there", "other")
	w.raw.want(":1", "HSET", "hash", "f", "v")
	w.raw.want(":1", "HSET", "cacheproxy:journal", "marked", "v1")
	w.row("negative", `1`, nil, nil)
	w.raw.want("+OK", "SET", "cacheproxy:lease:k:{held}", "0:9999999999999:rsomebody", "PX", "60000")
	w.raw.want("+OK", "SET", "cacheproxy:lease:k:{negative}", "0:9999999999999:n", "PX", "60000")
	keys := []string{"json", "raw", "ttl", "expired", "deleted", "there", "hash", "marked", "large", "held", "no row", "negative"}

	peek, err := link.Peek(ctx, refs(keys...))
	if err != nil {
		t.Fatal(err)
	}
	if got := fmt.Sprint(fates(peek)); got != "[promoted promoted promoted gone gone already there other type marked too large promoted gone promoted]" {
		t.Errorf("peek: %s", got)
	}
	w.raw.want(":5", "DBSIZE") // there, hash, journal, two leases: nothing was touched

	done, err := link.Promote(ctx, refs(keys...), nil)
	wantFates(t, done, err, "promoted", "promoted", "promoted", "gone", "gone", "already there", "other type", "marked", "too large", "busy", "gone", "remembered as absent")
	w.raw.want(`{"a": 1}`, "GET", "json")
	w.raw.want("\x00\xff", "GET", "raw")
	w.raw.want("other", "GET", "there")
	if redis, store := w.ends("ttl"); redis < store-10 || redis > store+10 {
		t.Errorf("ends at %d in redis and at %d in the store", redis, store)
	}
	w.raw.want(":8", "DBSIZE") // and no lease more
	done, err = link.Promote(ctx, refs("json", "raw"), map[string]bool{"raw": true})
	wantFates(t, done, err, "already there", "promoted") // it had been handed over before the answer was lost
}

// A row that is written between its reading and its promotion is not promoted as it was; nor is one that another writer deletes.
func TestPromoteBesideAWriter(t *testing.T) {
	for _, phase := range []policy.Phase{policy.Phase0, policy.Phase1, policy.Phase2} {
		t.Run(phase.String(), func(t *testing.T) {
			w := newWorld(t)
			c := w.sidecar(phase).dial(t)
			link, store := w.peer()
			w.row("set", `1`, nil, nil)
			w.row("deleted", `1`, nil, nil)
			w.row("evicted", `1`, nil, nil)
			store.loaded = func() {
				c.want("+OK", "SET", "set", "2")
				c.want("+OK", "SET", "evicted", "2")
				w.raw.do("DEL", "evicted")
				c.want(":1", "DEL", "deleted")
			}
			done, err := link.Promote(context.Background(), refs("set", "deleted", "evicted"), nil)
			wantFates(t, done, err, "busy", "busy", "busy")
			evicted := "2"
			if phase == policy.Phase2 {
				evicted = "(nil)" // what Redis forgets is forgotten
			}
			c.want("2", "GET", "set")
			c.want(evicted, "GET", "evicted")
			c.want("(nil)", "GET", "deleted")
			w.raw.want(":0", "EXISTS", "deleted")
			store.loaded = nil
			// Copied without asking for the lease, which is what the protocol is for, it would be seen: this test sees what is stale.
			if phase != policy.Phase0 {
				w.raw.do("DEL", "evicted")
				w.raw.want("+OK", "SET", "evicted", "1", "NX")
				c.want("1", "GET", "evicted")
			}
			done, err = link.Promote(context.Background(), refs("set"), nil)
			wantFates(t, done, err, map[policy.Phase]string{policy.Phase0: "promoted", policy.Phase1: "already there", policy.Phase2: "already there"}[phase])
			c.want("2", "GET", "set")
		})
	}
}

// Warm copies are not served in phase0, and writes there take them away: they are right when phase1 begins.
func TestWarmPhase0(t *testing.T) {
	w := newWorld(t)
	c := w.sidecar(policy.Phase0).dial(t)
	c.want("+OK", "SET", "a", "1")
	c.want("+OK", "SET", "b", "1")
	link, _ := w.peer()
	done, err := link.Promote(context.Background(), refs("a", "b"), nil)
	wantFates(t, done, err, "promoted", "promoted")
	c.want("+OK", "SET", "a", "2")
	w.raw.want(":0", "EXISTS", "a")
	one := w.sidecar(policy.Phase1).dial(t)
	one.want("2", "GET", "a")
	one.want("1", "GET", "b")
}

func TestCopy(t *testing.T) {
	w := newWorld(t)
	link, store := w.peer()
	ctx := context.Background()
	w.row("there", `1`, nil, nil)
	w.row("deleted", nil, nil, nil)
	for _, k := range []string{"plain", "there", "deleted", "marked", "soon gone"} {
		w.raw.want("+OK", "SET", k, "7")
	}
	w.raw.want("+OK", "SET", "bytes", "\xff\x00")
	w.raw.want("+OK", "SET", "ttl", "1", "PX", "1000000")
	w.raw.want("+OK", "SET", "large", strings.Repeat("x", 1<<20+1))
	w.raw.want(":1", "HSET", "hash", "f", "v")
	w.raw.want(":1", "HSET", "cacheproxy:journal", "marked", "v1")
	keys := []string{"plain", "there", "deleted", "marked", "bytes", "ttl", "large", "hash", "soon gone"}
	dry, err := link.PeekCopy(ctx, refs(keys...), false)
	if err != nil || dry[0].Fate != proxy.Copied || dry[1].Fate != proxy.There || dry[6].Fate != proxy.TooLarge {
		t.Errorf("dry: %q, %v", fates(dry), err)
	}
	if got := w.sql("SELECT count(*) FROM cacheproxy.entries"); got != "2" {
		t.Errorf("a dry run has left %s rows", got)
	}
	store.locked = func() { w.raw.want(":1", "DEL", "soon gone") }
	done, err := link.Copy(ctx, refs(keys...), nil)
	store.locked = nil
	wantFates(t, done, err, "copied", "already there", "deleted", "marked", "copied", "copied", "too large", "other type", "gone")
	if got := w.sql("SELECT value::text FROM cacheproxy.entries WHERE key = 'plain'"); got != "7" {
		t.Errorf("plain: %s", got)
	}
	if got := w.sql("SELECT encode(raw, 'hex') FROM cacheproxy.entries WHERE key = 'bytes'"); got != "ff00" {
		t.Errorf("bytes: %s", got)
	}
	if redis, store := w.ends("ttl"); redis < store-10 || redis > store+10 {
		t.Errorf("ends at %d in redis and at %d in the store", redis, store)
	}
	if got := w.sql("SELECT count(*) FROM cacheproxy.entries"); got != "5" {
		t.Errorf("%s rows", got)
	}
	w.raw.want("7", "GET", "plain")
}

// No write is lost that goes on beside a copy: the row is what the last one left, or there is none.
func TestCopyBesideWriters(t *testing.T) {
	for _, phase := range []policy.Phase{policy.Phase1, policy.Phase2} {
		t.Run(phase.String(), func(t *testing.T) {
			w := newWorld(t)
			s := w.sidecar(phase)
			link, _ := w.peer()
			var keys []string
			for i := range 50 {
				keys = append(keys, "k"+strconv.Itoa(i))
				w.raw.want("+OK", "SET", keys[i], "0")
			}
			stop := make(chan struct{})
			ended := make(chan struct{})
			go func() {
				defer close(ended)
				c := s.dial(t)
				for n := 1; ; n++ {
					for _, k := range keys {
						c.want(":"+strconv.Itoa(n), "INCR", k)
					}
					select {
					case <-stop:
						return
					default:
					}
				}
			}()
			for range 20 {
				if _, err := link.Copy(context.Background(), refs(keys...), nil); err != nil {
					t.Error(err)
				}
			}
			close(stop)
			<-ended
			w.journalEmpty()
			pairs, err := link.Compare(context.Background(), refs(keys...))
			if err != nil {
				t.Fatal(err)
			}
			for i, p := range pairs {
				if p.Row.State == policy.Live && p.Kind == "string" && !bytes.Equal(p.Row.Value, p.Value) {
					t.Errorf("%s is %s in the store and %s in redis", keys[i], p.Row.Value, p.Value)
				}
			}
		})
	}
}

func TestPreferStore(t *testing.T) {
	w := newWorld(t)
	c := w.sidecar(policy.Phase1).dial(t)
	link, _ := w.peer()
	ctx := context.Background()
	w.row("value", `1`, nil, nil)
	w.row("ttl", `1`, nil, 1000)
	w.row("deleted", nil, nil, nil)
	for _, k := range []string{"value", "ttl", "deleted", "only in redis"} {
		w.raw.want("+OK", "SET", k, "1x")
	}
	done, err := link.PreferStore(ctx, refs("value", "ttl", "deleted", "only in redis"))
	wantFates(t, done, err, "repaired", "repaired", "repaired", "gone")
	w.raw.want("1", "GET", "value")
	w.raw.want(":0", "EXISTS", "deleted")
	w.raw.want("1x", "GET", "only in redis")
	if redis, store := w.ends("ttl"); redis < store-10 || redis > store+10 {
		t.Errorf("ends at %d in redis and at %d in the store", redis, store)
	}
	c.want("+OK", "SET", "value", "2") // and what it left there is in nobody's way
	c.want("2", "GET", "value")
	// Of a key that is marked the row is not the truth.
	w.row("marked", `1`, nil, nil)
	w.raw.want("+OK", "SET", "marked", "2")
	w.raw.want("+OK", "SET", "cacheproxy:lease:k:{marked}", "0:0:", "PX", "60000")
	w.raw.want(":1", "HSET", "cacheproxy:journal", "marked", "v")
	done, err = link.PreferStore(ctx, refs("marked"))
	if err != nil {
		t.Fatal(err)
	}
	c.want("2", "GET", "marked")
	if got := done[0].Fate; got != proxy.Marked && got != proxy.Repaired { // the sidecar may have repaired it meanwhile
		t.Errorf("marked: %s", got)
	}
	w.raw.want("2", "GET", "marked")
}

func TestPreferRedis(t *testing.T) {
	w := newWorld(t)
	c := w.sidecar(policy.Phase2).dial(t)
	link, _ := w.peer()
	w.row("value", `1`, nil, nil)
	w.row("only in the store", `1`, nil, nil)
	w.raw.want("+OK", "SET", "value", "2")
	w.raw.want("+OK", "SET", "only in redis", "2")
	done, err := link.PreferRedis(context.Background(), refs("value", "only in the store", "only in redis"))
	wantFates(t, done, err, "repaired", "gone", "gone")
	w.raw.want("2", "GET", "value")
	if got := w.sql("SELECT string_agg(key, ',') FROM cacheproxy.entries"); got != "only in the store" {
		t.Errorf("rows are left of: %s", got)
	}
	w.raw.want(":0", "HEXISTS", "cacheproxy:journal", "value")
	c.want("1", "GET", "only in the store")
	c.want("+OK", "SET", "value", "3")
	c.want("3", "GET", "value")
}

// A row that an entry names is the truth, also from phase2 on: a sidecar in phase1 has written it, cut off from Redis.
func TestPreferRedisBesideAnEntry(t *testing.T) {
	w := newWorld(t)
	link, _ := w.peer()
	w.row("k", `2`, nil, nil)
	w.raw.want("+OK", "SET", "k", "1")
	w.sql("INSERT INTO cacheproxy.journal (keys, routes) VALUES ('{k}', '{all}') RETURNING 'ok'")
	done, err := link.PreferRedis(context.Background(), refs("k"))
	wantFates(t, done, err, "marked")
	if got := w.sql("SELECT value::text FROM cacheproxy.entries"); got != "2" {
		t.Errorf("the row is %s", got)
	}
}

func TestTrust(t *testing.T) {
	w := newWorld(t)
	ctx := context.Background()
	link, _ := w.peer()
	want := func(want proxy.Trust) {
		t.Helper()
		if got, err := link.Trust(ctx); err != nil || got != want {
			t.Errorf("%d, %v; want %d", got, err, want)
		}
	}
	w.raw.want("+OK", "SET", "old", "1")
	want(proxy.Unknown)
	w.raw.want(":1", "DEL", "old")
	want(proxy.Verified) // it is empty, and has a clock now
	w.row("k", "1", nil, nil)
	done, err := link.Promote(ctx, refs("k"), nil)
	wantFates(t, done, err, "promoted")
	w.sidecar(policy.Phase1)
	w.raw.want("1", "GET", "k") // the first sidecar drops nothing
	w.raw.want("+OK", "SET", "cacheproxy:clock", "1 another one")
	want(proxy.Unverified)
	w.until("a sidecar has looked", func() bool { got, err := link.Trust(ctx); return err == nil && got == proxy.Verified })
}

// A connection that is given up is of no use any more, and the next one works.
func TestPeerLinkBreaks(t *testing.T) {
	w := newWorld(t)
	link, _ := w.peer()
	if err := w.redis.Kill(); err != nil {
		t.Fatal(err)
	}
	_, err := link.Promote(context.Background(), refs("k"), nil)
	if err == nil || !link.Broken() || proxy.RedisTrouble(err) == "" {
		t.Errorf("error %v, broken %t, trouble %q", err, link.Broken(), proxy.RedisTrouble(err))
	}
	if err := w.redis.Restart(); err != nil {
		t.Fatal(err)
	}
	if link, _ := w.peer(); link.Broken() || link.RunID() == "" {
		t.Error("the next connection is broken")
	}
	ctx, cancel := context.WithCancel(context.Background())
	link, _ = w.peer()
	if err := w.redis.Pause(); err != nil {
		t.Fatal(err)
	}
	go func() { time.Sleep(10 * time.Millisecond); cancel() }()
	if _, err := link.Peek(ctx, refs("k")); ctx.Err() == nil || err == nil {
		t.Errorf("a question that was given up: %v", err)
	}
	if err := w.redis.Resume(); err != nil {
		t.Fatal(err)
	}
}
