package chaos

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"cacheproxy/internal/devserver"
	"cacheproxy/internal/testenv"

	"github.com/jackc/pgx/v5"
	"github.com/redis/go-redis/v9"
	"github.com/redis/go-redis/v9/logging"
)

// go-redis would write every failed dial to standard error.
func init() { logging.Disable() }

// patience bounds what must come true once everything is well again.
const patience = 60 * time.Second

// cluster is two Redis, of which one is in use, a Postgres, and the sidecars before them, each with links of its own to both.
type cluster struct {
	t        *testing.T
	servers  [2]*devserver.Redis
	copies   [2]*testenv.Link // in front of each, for its replica
	pg       *devserver.Postgres
	sidecars []*sidecar

	mu  sync.Mutex
	use int // guarded by mu: the server in use
}

// sidecar is one process of the proxy as it is shipped.
type sidecar struct {
	t *testing.T
	options
	config           string
	addr, observe    string
	toRedis, toStore *testenv.Link
	steps            *testenv.Steps
	log              testenv.Output

	mu    sync.Mutex
	phase string    // guarded by mu
	cmd   *exec.Cmd // guarded by mu; nil: it is down
}

// options are what the sidecars of a cluster have in common.
type options struct {
	program string
	wrong   string        // the rule that it breaks, if it is built to
	policy  string        // write_policy; "": the default
	poll    time.Duration // journal.poll; 0: the default
	steps   bool          // their messages to the stores can be looked at
	query   time.Duration // postgres.timeout; 0: storeWait
	column  bool          // the values stand in a column of the application's
	patient bool          // they wait for the stores as long as a busy machine may take, for no store is to be down
}

// newCluster starts sidecars in phases.
func newCluster(t *testing.T, o options, phases ...string) *cluster {
	t.Helper()
	c := &cluster{t: t, pg: testenv.PostgresServer(t)}
	for i := range c.servers {
		c.servers[i] = testenv.Redis(t, "--repl-diskless-sync-delay", "0")
		c.copies[i] = testenv.NewLink(t, c.servers[i].Addr())
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if err := c.pg.CreateDatabase(ctx, "app"); err != nil {
		t.Fatal(err)
	}
	if o.column {
		c.sql(t, "CREATE TABLE caches (id text PRIMARY KEY, cache jsonb, name text)")
	}
	for _, phase := range phases {
		s := &sidecar{t: t, options: o, toRedis: testenv.NewLink(t, c.redis().Addr()), toStore: testenv.NewLink(t, c.pg.Addr())}
		addr := func() string { return fmt.Sprintf("127.0.0.1:%d", testenv.FreePort(t)) }
		s.addr, s.observe = addr(), addr()
		s.config = filepath.Join(t.TempDir(), "config.yaml")
		if o.steps {
			s.steps = testenv.NewSteps(s.toRedis, s.toStore)
		}
		s.configure(c, phase)
		c.sidecars = append(c.sidecars, s)
		s.start()
		t.Cleanup(func() {
			s.kill()
			if t.Failed() {
				t.Logf("the log of the sidecar in %s ends:\n%s", phase, s.log.Tail(4000))
			}
		})
	}
	c.ready(t)
	return c
}

// configure writes its configuration. What stands here is not the default: a miss while the store that might hold the value cannot be asked is an error, so
// that nil means nil.
func (s *sidecar) configure(c *cluster, phase string) {
	s.mu.Lock()
	s.phase = phase
	s.mu.Unlock()
	wait, dial, query := redisWait, redisDial, cmp.Or(s.query, storeWait)
	if s.patient {
		wait, dial, query = patientWait, patientWait, patientWait
	}
	match, store := "*", ""
	if s.column {
		match, store = "{id}", ", store: {kind: column, table: caches, key_column: id, value_column: cache}"
	}
	text := fmt.Sprintf(`
listen: {address: %q}
observe: {address: %q}
admin: {address: ""}
health: {ready_requires: all}
redis: {url: "redis://%s/0", timeout: %v, dial_timeout: %v}
postgres: {url: %q, timeout: %v}
log: {level: warn}
routes: [{name: all, match: %q, phase: %s, write_policy: %s, on_unknown: error%s}]
journal: {poll: %v}
`, s.addr, s.observe, s.toRedis.Addr(), wait, dial, c.pg.URLVia(s.toStore.Addr(), "app"), query, match, phase, cmp.Or(s.policy, "any"), store, cmp.Or(s.poll, journalPoll))
	// Written beside and moved into place, so that it is never read in half.
	if err := os.WriteFile(s.config+".new", []byte(text), 0o600); err != nil {
		s.t.Error(err)
	}
	if err := os.Rename(s.config+".new", s.config); err != nil {
		s.t.Error(err)
	}
}

// serves: it is in the phase that it was configured for.
func (s *sidecar) serves() error {
	s.mu.Lock()
	want := "phase=" + s.phase + ","
	s.mu.Unlock()
	c := client(s.addr)
	defer c.Close()
	info, err := c.Info(context.Background(), "cacheproxy").Result()
	if err == nil && !strings.Contains(info, want) {
		err = fmt.Errorf("no %s in INFO", want)
	}
	return err
}

func (s *sidecar) start() {
	s.mu.Lock()
	defer s.mu.Unlock()
	cmd := exec.Command(s.program, "serve", "--config", s.config)
	cmd.Env = []string{"HOME=" + filepath.Dir(s.config)}
	if s.wrong != "" {
		cmd.Env = append(cmd.Env, "WRONG_PROTOCOL="+s.wrong)
	}
	cmd.Stdout, cmd.Stderr = &s.log, &s.log
	if err := cmd.Start(); err != nil {
		s.t.Errorf("start a sidecar: %v", err)
		return
	}
	s.cmd = cmd
}

// dead: it was killed.
func (s *sidecar) dead() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.cmd == nil
}

// kill is kill -9.
func (s *sidecar) kill() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.cmd == nil {
		return
	}
	_ = s.cmd.Process.Kill() // it may have ended by itself, which others find out
	_ = s.cmd.Wait()         // it says that it was killed
	s.cmd = nil
}

var web = &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: 5 * time.Second}

// isReady: it reaches both stores.
func (s *sidecar) isReady() error {
	resp, err := web.Get("http://" + s.observe + "/readyz")
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("/readyz: %s", resp.Status)
	}
	return nil
}

// soon waits for what must come true.
func soon(t *testing.T, what string, check func() error) time.Duration {
	t.Helper()
	var err error
	began := time.Now()
	for time.Since(began) < patience {
		if err = check(); err == nil {
			return time.Since(began)
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Errorf("not true in %v: %s: %v", patience, what, err)
	return patience
}

func (c *cluster) ready(t *testing.T) {
	t.Helper()
	for _, s := range c.sidecars {
		soon(t, "a sidecar is ready", s.isReady)
	}
}

// redis is the server in use, other the one that may become its replica.
func (c *cluster) redis() *devserver.Redis { return c.servers[c.inUse()] }
func (c *cluster) other() *devserver.Redis { return c.servers[1-c.inUse()] }

func (c *cluster) inUse() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.use
}

// ask says one command to a Redis itself.
func ask(r *devserver.Redis, args ...any) (any, error) {
	c := client(r.Addr())
	defer c.Close()
	return c.Do(context.Background(), args...).Result()
}

// forget removes what a Redis has on disk: it will start empty.
func (c *cluster) forget(r *devserver.Redis) error {
	dir, err := ask(r, "CONFIG", "GET", "dir")
	if err != nil {
		return err
	}
	err = os.Remove(filepath.Join(dir.([]any)[1].(string), "dump.rdb"))
	if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	return err
}

// replicate makes the other Redis a replica of the one in use, and waits until it is.
func (c *cluster) replicate(t *testing.T) {
	t.Helper()
	link := c.copies[c.inUse()]
	link.Heal()
	host, port, _ := strings.Cut(link.Addr(), ":")
	if _, err := ask(c.other(), "REPLICAOF", host, port); err != nil {
		t.Errorf("REPLICAOF: %v", err)
		return
	}
	soon(t, "the replica follows", func() error {
		info, err := ask(c.other(), "INFO", "replication")
		if err == nil && !strings.Contains(info.(string), "master_link_status:up") {
			err = errors.New("its link is down")
		}
		return err
	})
}

// failOver puts the replica in the place of its primary, which is gone.
func (c *cluster) failOver() error {
	if _, err := ask(c.other(), "REPLICAOF", "NO", "ONE"); err != nil {
		return err
	}
	c.mu.Lock()
	c.use = 1 - c.use
	addr := c.servers[c.use].Addr()
	c.mu.Unlock()
	for _, s := range c.sidecars {
		s.toRedis.Aim(addr)
	}
	return nil
}

// client has one connection and asks once.
func client(addr string) *redis.Client {
	return redis.NewClient(&redis.Options{
		Addr: addr, PoolSize: 1, MaxRetries: -1, DialerRetries: 1, DialTimeout: time.Second, ReadTimeout: 20 * time.Second, WriteTimeout: 20 * time.Second,
		DisableIdentity: true, ContextTimeoutEnabled: true, Protocol: 2,
	})
}

// unrepaired is the longest that a key has stood in a journal before a sidecar that lives repaired it. A sidecar counts since it started.
func (c *cluster) unrepaired(t *testing.T) (longest time.Duration) {
	for _, s := range c.sidecars {
		resp, err := web.Get("http://" + s.observe + "/cache/stats")
		if err != nil {
			t.Error(err)
			continue
		}
		var stats struct {
			Journal struct {
				RedisStale float64 `json:"redis_stale_longest_seconds"`
				StoreStale float64 `json:"store_stale_longest_seconds"`
			} `json:"journal"`
		}
		err = json.NewDecoder(resp.Body).Decode(&stats)
		resp.Body.Close()
		if err != nil {
			t.Error(err)
		}
		longest = max(longest, time.Duration(max(stats.Journal.RedisStale, stats.Journal.StoreStale)*float64(time.Second)))
	}
	return longest
}

// rows are those of every key that a run may have: it never has more than these.
func (c *cluster) rows(t *testing.T, prefix string) {
	c.sql(t, "INSERT INTO caches (id) SELECT $1::text || 'k' || i FROM generate_series(0, 1999) i", prefix)
	c.sql(t, "INSERT INTO caches (id) SELECT $1::text || 't' || n || '-' || i FROM generate_series(0, 3) n, generate_series(0, 1999) i", prefix)
}

func (c *cluster) sql(t *testing.T, text string, args ...any) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	pg, err := pgx.Connect(ctx, c.pg.URL("app"))
	if err != nil {
		t.Fatal(err)
	}
	defer pg.Close(ctx) //nolint:errcheck // what was done is done
	if _, err := pg.Exec(ctx, text, args...); err != nil {
		t.Fatal(err)
	}
}

// journals waits until neither store is journaled as stale, and returns how long that took.
func (c *cluster) journals(t *testing.T) time.Duration {
	direct := client(c.redis().Addr())
	defer direct.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 2*patience)
	defer cancel()
	return soon(t, "the journals are empty", func() error {
		n, err := direct.HLen(ctx, "cacheproxy:journal").Result()
		switch {
		case err != nil:
			return err
		case n > 1: // the anchor
			return fmt.Errorf("Redis has %d marks", n-1)
		}
		pg, err := pgx.Connect(ctx, c.pg.URL("app"))
		if err != nil {
			return err
		}
		defer pg.Close(ctx) //nolint:errcheck // it was only read from
		if err = pg.QueryRow(ctx, "SELECT count(*) FROM cacheproxy.journal").Scan(&n); err == nil && n > 0 {
			err = fmt.Errorf("Postgres has %d entries", n)
		}
		return err
	})
}
