package chaos

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
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

// cluster is a Redis, a Postgres, and the sidecars before them, each with links of its own to both.
type cluster struct {
	t        *testing.T
	redis    *devserver.Redis
	pg       *devserver.Postgres
	sidecars []*sidecar
}

// sidecar is one process of the proxy as it is shipped.
type sidecar struct {
	t                *testing.T
	config           string
	phase            string
	addr, observe    string
	toRedis, toStore *testenv.Link
	log              testenv.Output

	mu  sync.Mutex
	cmd *exec.Cmd // guarded by mu; nil: it is down
}

func newCluster(t *testing.T, phases []string) *cluster {
	t.Helper()
	c := &cluster{t: t, redis: testenv.Redis(t), pg: testenv.PostgresServer(t)}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if err := c.pg.CreateDatabase(ctx, "app"); err != nil {
		t.Fatal(err)
	}
	for _, phase := range phases {
		s := &sidecar{t: t, phase: phase, toRedis: testenv.NewLink(t, c.redis.Addr()), toStore: testenv.NewLink(t, c.pg.Addr())}
		addr := func() string { return fmt.Sprintf("127.0.0.1:%d", testenv.FreePort(t)) }
		s.addr, s.observe = addr(), addr()
		s.config = filepath.Join(t.TempDir(), "config.yaml")
		// What stands here is not the default: a miss while the store that might hold the value cannot be asked is an error, so that nil means nil.
		text := fmt.Sprintf(`
listen: {address: %q}
observe: {address: %q}
admin: {address: ""}
redis: {url: "redis://%s/0"}
postgres: {url: %q}
log: {level: warn}
routes: [{name: all, match: "*", phase: %s, on_unknown: error}]
`, s.addr, s.observe, s.toRedis.Addr(), c.pg.URLVia(s.toStore.Addr(), "app"), phase)
		if err := os.WriteFile(s.config, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		c.sidecars = append(c.sidecars, s)
		s.start()
		t.Cleanup(func() {
			s.kill()
			if t.Failed() {
				t.Logf("the log of the sidecar in %s ends:\n%s", phase, s.log.Tail(4000))
			}
		})
	}
	c.ready()
	return c
}

func (s *sidecar) start() {
	s.mu.Lock()
	defer s.mu.Unlock()
	cmd := exec.Command(testenv.Program(s.t), "serve", "--config", s.config)
	cmd.Env = []string{"HOME=" + filepath.Dir(s.config)}
	cmd.Stdout, cmd.Stderr = &s.log, &s.log
	if err := cmd.Start(); err != nil {
		s.t.Errorf("start a sidecar: %v", err)
		return
	}
	s.cmd = cmd
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

func (c *cluster) ready() {
	c.t.Helper()
	for _, s := range c.sidecars {
		soon(c.t, "a sidecar is ready", s.isReady)
	}
}

// client has one connection and asks once.
func client(addr string) *redis.Client {
	return redis.NewClient(&redis.Options{
		Addr: addr, PoolSize: 1, MaxRetries: -1, DialerRetries: 1, DialTimeout: time.Second, ReadTimeout: 20 * time.Second, WriteTimeout: 20 * time.Second,
		DisableIdentity: true, ContextTimeoutEnabled: true, Protocol: 2,
	})
}

// journals waits until neither store is journaled as stale, and returns how long that took.
func (c *cluster) journals() time.Duration {
	direct := client(c.redis.Addr())
	defer direct.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 2*patience)
	defer cancel()
	return soon(c.t, "the journals are empty", func() error {
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
