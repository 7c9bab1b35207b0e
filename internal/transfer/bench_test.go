package transfer_test

import (
	"context"
	"fmt"
	"io"
	"runtime"
	"sync"
	"testing"
	"time"

	"cacheproxy/fallback"
	"cacheproxy/internal/bridge"
	"cacheproxy/internal/testenv"
	"cacheproxy/internal/transfer"
	"cacheproxy/policy"
	"cacheproxy/proxy"

	"github.com/jackc/pgx/v5"
	"github.com/redis/go-redis/v9"
)

func TestMain(m *testing.M) { testenv.Main(m) }

// lab is two stores and a route between them.
type lab struct {
	db     *fallback.Store
	seen   *seen
	redis  *redis.Client
	stores transfer.Stores
	router *policy.Router
	route  *policy.Route
	conn   *pgx.Conn
}

func newLab(t testing.TB, redisURL string, phase policy.Phase) *lab {
	t.Helper()
	x := &lab{}
	var err error
	fail := func() {
		if err != nil {
			t.Helper()
			t.Fatal(err)
		}
	}
	url := testenv.Postgres(t)
	x.db, err = fallback.New(fallback.Config{URL: url, QueryTimeout: time.Minute, MaxReads: 8, MaxWrites: 8})
	fail()
	t.Cleanup(x.db.Close)
	err = x.db.EnsureSchema(context.Background())
	fail()
	x.conn, err = pgx.Connect(context.Background(), url)
	fail()
	t.Cleanup(func() { x.conn.Close(context.Background()) })
	x.seen = &seen{PeerStore: bridge.Peer(x.db)}
	peer, err := proxy.NewPeer(proxy.PeerConfig{
		Redis: proxy.RedisConfig{URL: redisURL, Timeout: time.Minute, DialTimeout: time.Minute}, MaxValue: 1 << 20, Instance: "lab",
	}, x.seen)
	fail()
	x.stores = transfer.Stores{Peer: peer, Rows: x.db, Trouble: func(error) string { return "" }, Taken: func(error) bool { return false }}
	x.router, err = policy.NewRouter([]policy.Route{{Name: "all", Match: "*", Phase: phase}})
	fail()
	x.route = &x.router.Routes()[0]
	opt, err := redis.ParseURL(redisURL)
	fail()
	opt.DisableIdentity = true
	x.redis = redis.NewClient(opt)
	t.Cleanup(func() { x.redis.Close() })
	return x
}

// fill makes rows of about 1 KiB through the store's own path.
func (x *lab) fill(t testing.TB, n int) {
	t.Helper()
	const part = 500
	for from := 0; from < n; from += part {
		var changes []policy.Change
		var refs []policy.Ref
		for i := from; i < min(from+part, n); i++ {
			ref := policy.Ref{Route: "all", Key: fmt.Sprintf("bench:%08d", i)}
			text := fmt.Sprintf(`{"id": %d, "name": "number %d", "tags": [`, i, i)
			for j := 0; len(text) < 1000; j++ {
				if j > 0 {
					text += ", "
				}
				text += fmt.Sprintf(`"%016x"`, uint64(i*7919+j)*0x9E3779B97F4A7C15)
			}
			refs = append(refs, ref)
			changes = append(changes, policy.Change{Ref: ref, Op: policy.Put, Value: []byte(text + "]}")})
		}
		tx, err := x.db.Begin(context.Background(), refs)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := tx.Commit(context.Background(), changes, fallback.CommitOptions{}); err != nil {
			t.Fatal(err)
		}
	}
}

func (x *lab) options() transfer.Options {
	return transfer.Options{
		Route: x.route, Router: x.router, Workers: 4, MaxValue: 1 << 20, Patience: time.Minute,
		Progress: transfer.NewProgress(io.Discard, nil),
	}
}

func (x *lab) verifyOptions() transfer.VerifyOptions {
	return transfer.VerifyOptions{
		Route: x.route, Router: x.router, Share: 1, Rounds: 2, Pause: time.Millisecond, Exact: true, Workers: 4, Patience: time.Minute,
		Progress: transfer.NewProgress(io.Discard, nil),
	}
}

// heap watches how large the heap gets until stop.
func heap() (stop func() (grown uint64)) {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	before, most := m.HeapAlloc, m.HeapAlloc
	done := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			select {
			case <-done:
				return
			case <-time.After(20 * time.Millisecond):
				var m runtime.MemStats
				runtime.ReadMemStats(&m)
				most = max(most, m.HeapAlloc)
			}
		}
	})
	return func() uint64 {
		close(done)
		wg.Wait()
		return most - before
	}
}

// Rows of 1 KiB from a Postgres to a Redis on the same machine, and how much more memory that takes at any moment.
//
//	go test -run '^$' -bench Migrate -benchtime 3x ./internal/transfer
func BenchmarkMigrate(b *testing.B) {
	for _, rows := range []int{20_000, 200_000} {
		b.Run(fmt.Sprint(rows), func(b *testing.B) {
			x := newLab(b, testenv.Redis(b).URL(), policy.Phase1)
			x.fill(b, rows)
			seconds, grown := 0.0, uint64(0)
			for b.Loop() {
				b.StopTimer()
				if err := x.redis.FlushAll(context.Background()).Err(); err != nil {
					b.Fatal(err)
				}
				stop := heap()
				b.StartTimer()
				r, err := transfer.Migrate(context.Background(), x.stores, x.options())
				if err != nil || r.Copied != int64(rows) {
					b.Fatalf("%+v, %v", r, err)
				}
				seconds += r.Seconds
				grown = max(grown, stop())
			}
			b.ReportMetric(float64(b.N)*float64(rows)/seconds, "rows/s")
			b.ReportMetric(float64(grown)/(1<<20), "MiB-heap")
			b.ReportMetric(0, "ns/op")
		})
	}
}
