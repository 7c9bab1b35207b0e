package main

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"cacheproxy/internal/testenv"

	"github.com/jackc/pgx/v5"
	"github.com/redis/go-redis/v9"
)

// What an acknowledged write promised holds without the process that wrote it: real processes, and kill -9 of the writer in the
// middle of its work, while both stores are well and while one of them is not.
func TestKilledWriter(t *testing.T) {
	ctx := context.Background()
	type stores struct {
		redis interface {
			Pause() error
			Resume() error
			Kill() error
			Restart() error
		}
		pg interface {
			Kill() error
			Restart() error
		}
	}
	well := func(stores) error { return nil }
	for _, c := range []struct {
		name       string
		phase      string
		begin, end func(stores) error
	}{
		{"both stores are well", "phase1", well, well},
		{"redis hangs", "phase1", func(s stores) error { return s.redis.Pause() }, func(s stores) error { return s.redis.Resume() }},
		{"redis dies", "phase1", func(s stores) error { return s.redis.Kill() }, func(s stores) error { return s.redis.Restart() }},
		{"postgres dies", "phase1", func(s stores) error { return s.pg.Kill() }, func(s stores) error { return s.pg.Restart() }},
		{"both stores are well", "phase2", well, well},
		{"postgres dies", "phase2", func(s stores) error { return s.pg.Kill() }, func(s stores) error { return s.pg.Restart() }},
	} {
		t.Run(c.phase+"/"+c.name, func(t *testing.T) {
			direct := testenv.Redis(t)
			pg := testenv.PostgresServer(t)
			var sites [2]*site
			var programs [2]*program
			for i := range sites {
				s := newSite(t, direct.URL(), pg.URL("postgres"))
				s.write(fmt.Sprintf("routes: [{name: all, match: '*', phase: %s, on_unknown: error}]", c.phase))
				programs[i] = s.exec("serve", "--config", s.config)
				s.connected()
				sites[i] = s
			}
			writer, reader := sites[0].client(), sites[1].client()
			raw := redis.NewClient(&redis.Options{Addr: direct.Addr(), MaxRetries: -1})
			t.Cleanup(func() { raw.Close() })
			if c.phase == "phase2" { // a row from the phase before, which must never come back
				db, err := pgx.Connect(ctx, pg.URL("postgres"))
				if err != nil {
					t.Fatal(err)
				}
				if _, err := db.Exec(ctx, `INSERT INTO cacheproxy.entries (key, value, route, generation, updated_at) VALUES ('k', '0', 'all', (SELECT coalesce(max(generation), 0) FROM cacheproxy.generations), now())`); err != nil {
					t.Fatal(err)
				}
				db.Close(ctx)
			}
			if err := writer.Set(ctx, "k", 0, 0).Err(); err != nil {
				t.Fatal(err)
			}
			if err := writer.Set(ctx, "n", 0, 0).Err(); err != nil {
				t.Fatal(err)
			}
			s := stores{direct, pg}
			if err := c.begin(s); err != nil {
				t.Fatal(err)
			}
			var acked, counted, tried atomic.Int64
			stopped := make(chan struct{})
			go func() {
				defer close(stopped)
				for v := int64(1); ; v++ {
					switch err := writer.Set(ctx, "k", v, 0).Err(); {
					case err == nil:
						acked.Store(v)
					case !isReply(err):
						return // the writer is dead
					}
					tried.Add(1)
					switch err := writer.Incr(ctx, "n").Err(); {
					case err == nil:
						counted.Add(1)
					case !isReply(err):
						return
					}
				}
			}()
			eventually(t, "writes are acknowledged", func() bool { return acked.Load() > 20 && counted.Load() > 20 })
			programs[0].signal(t, syscall.SIGKILL)
			<-stopped
			low := acked.Load()
			check := func(when string) {
				t.Helper()
				var got int64
				eventually(t, when+": k is answered", func() bool {
					var err error
					got, err = reader.Get(ctx, "k").Int64()
					return err == nil || errors.Is(err, redis.Nil)
				})
				if got < low {
					t.Errorf("%s: k is %d, and %d was acknowledged", when, got, low)
				}
				low = max(low, got)
			}
			check("after the writer's end")
			if err := c.end(s); err != nil {
				t.Fatal(err)
			}
			eventually(t, "the stores are connected again", func() bool {
				_, body := sites[1].get("/healthz")
				return strings.Count(body, `"connected"`) == 2
			})
			check("after the fault")
			db, err := pgx.Connect(ctx, pg.URL("postgres"))
			if err != nil {
				t.Fatal(err)
			}
			defer db.Close(ctx)
			eventually(t, "the journals are empty", func() bool {
				var n int
				if err := db.QueryRow(ctx, "SELECT count(*) FROM cacheproxy.journal").Scan(&n); err != nil {
					t.Fatal(err)
				}
				marks, err := raw.HLen(ctx, "cacheproxy:journal").Result()
				return err == nil && n == 0 && marks <= 1
			})
			check("after the repair")
			if n, _ := reader.Get(ctx, "n").Int64(); n < counted.Load() || n > tried.Load() {
				t.Errorf("n is %d; %d increments were acknowledged and %d sent", n, counted.Load(), tried.Load())
			}
			if err := raw.Del(ctx, "k").Err(); err != nil {
				t.Fatal(err)
			}
			got, err := reader.Get(ctx, "k").Result()
			if c.phase == "phase2" {
				if !errors.Is(err, redis.Nil) {
					t.Errorf("redis lost k and the row came back: %q, %v", got, err)
				}
			} else if v, _ := strconv.ParseInt(got, 10, 64); v < low {
				t.Errorf("without redis k is %q, want %d", got, low)
			}
		})
	}
}

// isReply: the proxy answered, with an error.
func isReply(err error) bool {
	var e redis.Error
	return errors.As(err, &e)
}
