package main

import (
	"context"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"cacheproxy/internal/testenv"

	"github.com/jackc/pgx/v5"
	"github.com/redis/go-redis/v9"
)

// guarded is a store that asks for a password.
type guarded struct {
	section string                         // of the configuration
	url     func(password string) *url.URL // of the store; "" leaves the password out
	change  func(password string)          // in the server: whoever is connected stays
	cut     func()                         // ends the proxy's connections
	anew    func() bool                    // the proxy has a connection that was made after the cut
	refusal string                         // what the log says of a wrong password
	refused func() int                     // how many connections the server has refused
	writes  func(s *site, n int)           // a write reaches the store, and is read from there
	own     func(s *site)                  // a client is given a connection of its own; nil: there are none
}

// guardedRedis asks for the password "first", and knows nothing of what else the proxy needs.
func guardedRedis(t *testing.T) guarded {
	server := testenv.Redis(t, "--requirepass", "first")
	ctx := context.Background()
	admin := redis.NewClient(&redis.Options{Addr: server.Addr(), Password: "first", PoolSize: 1, MaxRetries: -1, DisableIdentity: true})
	t.Cleanup(func() { admin.Close() })
	do := func(args ...any) string {
		t.Helper()
		text, err := admin.Do(ctx, args...).Text()
		if err != nil {
			t.Fatal(err)
		}
		return text
	}
	control := func() string {
		for line := range strings.Lines(do("CLIENT", "LIST")) {
			if strings.Contains(line, " name=cacheproxy-control ") {
				id, _, _ := strings.Cut(line, " ")
				return id
			}
		}
		return ""
	}
	before := ""
	return guarded{
		section: "redis", refusal: `"reason":"auth"`,
		url: func(password string) *url.URL {
			u := &url.URL{Scheme: "redis", Host: server.Addr(), Path: "/0"}
			if password != "" {
				u.User = url.UserPassword("", password)
			}
			return u
		},
		change: func(password string) { do("CONFIG", "SET", "requirepass", password) },
		cut: func() {
			before = control()
			if err := admin.Do(ctx, "CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes").Err(); err != nil {
				t.Fatal(err)
			}
		},
		anew: func() bool { now := control(); return now != "" && now != before },
		refused: func() (n int) {
			entries, err := admin.Do(ctx, "ACL", "LOG").Slice()
			if err != nil {
				t.Fatal(err)
			}
			for _, entry := range entries {
				switch e := entry.(type) {
				case []any:
					n += int(e[1].(int64)) // count
				case map[any]any:
					n += int(e["count"].(int64))
				}
			}
			return n
		},
		writes: func(s *site, n int) {
			s.t.Helper()
			for _, key := range []string{"user:1", "elsewhere"} {
				value := fmt.Sprint(n)
				if got := s.do("SET", key, value); got != "OK" {
					s.t.Errorf("SET %s: %s", key, got)
				}
				if got := do("GET", key); got != value {
					s.t.Errorf("%s is %q in Redis, want %q", key, got, value)
				}
				if got := s.do("GET", key); got != value {
					s.t.Errorf("GET %s: %s", key, got)
				}
			}
		},
		own: func(s *site) {
			s.t.Helper()
			c := s.client()
			defer c.Close()
			if got, err := c.TxPipelined(ctx, func(p redis.Pipeliner) error { return p.Incr(ctx, "elsewhere").Err() }); err != nil || len(got) != 1 {
				s.t.Errorf("a transaction: %v, %v", got, err)
			}
		},
	}
}

// guardedPostgres asks the role app for the password "first", and others for none.
func guardedPostgres(t *testing.T) guarded {
	dir := t.TempDir()
	rules := filepath.Join(dir, "pg_hba.conf")
	const text = "local all all trust\nhost all app 127.0.0.1/32 scram-sha-256\nhost all all 127.0.0.1/32 trust\n"
	if err := os.WriteFile(rules, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	for d := dir; d != os.TempDir() && d != "/"; d = filepath.Dir(d) { // the server may run as another user
		if err := os.Chmod(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	server := testenv.PostgresServer(t, "-c", "hba_file="+rules, "-c", "password_encryption=scram-sha-256")
	ctx := context.Background()
	admin, err := pgx.Connect(ctx, server.URL("postgres"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { admin.Close(ctx) })
	sql := func(text string) {
		t.Helper()
		if _, err := admin.Exec(ctx, text); err != nil {
			t.Fatal(err)
		}
	}
	number := func(text string) (n int) {
		t.Helper()
		if err := admin.QueryRow(ctx, text).Scan(&n); err != nil {
			t.Fatal(err)
		}
		return n
	}
	sql(`CREATE ROLE app LOGIN PASSWORD 'first'`)
	sql(`CREATE DATABASE app OWNER app`)
	refusals := regexp.MustCompile(`password authentication failed for user "app"`)
	at := ""
	return guarded{
		section: "postgres", refusal: "28P01",
		url: func(password string) *url.URL {
			u := &url.URL{Scheme: "postgres", User: url.User("app"), Host: server.Addr(), Path: "/app", RawQuery: "sslmode=disable"}
			if password != "" {
				u.User = url.UserPassword("app", password)
			}
			return u
		},
		change: func(password string) { sql(`ALTER ROLE app PASSWORD '` + password + `'`) },
		cut: func() {
			if err := admin.QueryRow(ctx, `SELECT clock_timestamp()::text FROM (SELECT count(pg_terminate_backend(pid, 10000)) FROM pg_stat_activity WHERE usename = 'app') cut`).Scan(&at); err != nil {
				t.Fatal(err)
			}
		},
		anew: func() bool {
			return number(`SELECT count(*) FROM pg_stat_activity WHERE usename = 'app' AND backend_start > '`+at+`'`) > 0
		},
		refused: func() int { return len(refusals.FindAllString(server.LogTail(), -1)) },
		writes: func(s *site, n int) {
			s.t.Helper()
			key, value := fmt.Sprintf("report:%d", n), fmt.Sprint(n) // never in Redis
			conn, err := pgx.Connect(ctx, server.URL("app"))
			if err != nil {
				s.t.Fatal(err)
			}
			defer conn.Close(ctx)
			if got := s.do("SET", "user:1", value); got != "OK" {
				s.t.Errorf("SET: %s", got)
			}
			var row string
			if err := conn.QueryRow(ctx, `SELECT value FROM cacheproxy.entries WHERE key = 'user:1'`).Scan(&row); err != nil || row != value {
				s.t.Errorf("the row holds %q, %v; want %q", row, err, value)
			}
			if _, err := conn.Exec(ctx, `UPDATE cacheproxy.entries SET key = $1, route = 'report' WHERE key = 'user:1'`, key); err != nil {
				s.t.Fatal(err)
			}
			if got := s.do("GET", key); got != value {
				s.t.Errorf("GET: %s", got)
			}
		},
	}
}

// A password that is changed in its file is used by the next connection: no restart, no reload. One that stands in the URL is the same
// until the next start, and the proxy that has it there gets no further.
func TestRotatedPasswords(t *testing.T) {
	for _, c := range []struct {
		name   string
		make   func(*testing.T) guarded
		inFile bool
	}{
		{"redis", guardedRedis, true},
		{"redis, in the URL", guardedRedis, false},
		{"postgres", guardedPostgres, true},
		{"postgres, in the URL", guardedPostgres, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			g := c.make(t)
			redisURL, postgresURL := "", ""
			if g.section == "redis" {
				postgresURL = testenv.Postgres(t)
			} else {
				redisURL = testenv.Redis(t).URL()
			}
			s := newSite(t, redisURL, postgresURL)
			file := filepath.Join(s.dir, "password")
			holds := func(password string) {
				t.Helper()
				// Renamed into place, as Kubernetes does it.
				if err := os.WriteFile(file+".new", []byte(password+"\n"), 0o600); err != nil {
					t.Fatal(err)
				}
				if err := os.Rename(file+".new", file); err != nil {
					t.Fatal(err)
				}
			}
			holds("first")
			password, setting := "first", ""
			if c.inFile {
				password, setting = "", fmt.Sprintf("%s: {password_file: %q}\n", g.section, file)
			}
			if g.section == "redis" {
				s.redisURL = g.url(password).String()
			} else {
				s.postgresURL = g.url(password).String()
			}
			s.write("log: {format: json}\n" + setting + routes)
			p := s.exec("--config", s.config)
			s.started()
			usable := func() bool {
				_, body := s.get("/readyz?verbose")
				return strings.Contains(body, "[+]redis ok") && strings.Contains(body, "[+]postgres ok")
			}
			eventually(t, "both stores are usable", usable)
			g.writes(s, 1)

			g.change("second")
			if g.section == "redis" {
				g.writes(s, 2) // whoever is connected stays
			}
			g.cut()
			eventually(t, "the old password is refused", func() bool { return s.stderr.has(g.refusal) && g.refused() > 0 && !usable() })
			holds("second")
			if !c.inFile {
				had := g.refused()
				eventually(t, "it is refused again and again", func() bool { return g.refused() >= had+3 })
				if usable() {
					t.Error("the password of the URL has changed by itself")
				}
				return
			}
			works := func(n int) {
				t.Helper()
				g.writes(s, n)
				if g.own != nil {
					g.own(s)
				}
			}
			eventually(t, "the new password is used", usable)
			works(3)

			// First in the file, then in the server.
			holds("third")
			g.change("third")
			g.cut()
			eventually(t, "the third password is used", func() bool { return g.anew() && usable() })
			works(4)

			// Without a file, and with an empty one, the last password is kept, and this is said once each.
			const cannot = "a password file cannot be used; the password that was read last is kept"
			for i, spoil := range []func() error{
				func() error { return os.Remove(file) },
				func() error { return os.WriteFile(file, nil, 0o600) },
			} {
				if err := spoil(); err != nil {
					t.Fatal(err)
				}
				for n := range 2 {
					g.cut()
					eventually(t, "it has connected again", func() bool { return g.anew() && usable() })
					works(10*(i+1) + n)
				}
				if n := strings.Count(s.stderr.String(), cannot); n != i+1 {
					t.Errorf("%d lines about the file, want %d", n, i+1)
				}
			}
			holds("third")
			g.cut()
			eventually(t, "it has connected again", func() bool { return g.anew() && usable() })
			eventually(t, "it is said that the file is right", func() bool { return s.stderr.has("the password file can be used again", g.section+".password_file") })
			if strings.Contains(s.stderr.String(), "take effect at the next start") {
				t.Error("a password in a file is said to wait for a restart")
			}
			select {
			case <-p.ended:
				t.Error("the program has ended")
			default:
			}
		})
	}
}

// What looks after Redis's memory has connections of its own, and takes the password for them as the others do.
func TestRotatedPasswordForMemory(t *testing.T) {
	server := testenv.Redis(t, "--requirepass", "second")
	s := newSite(t, "redis://"+server.Addr()+"/0", "")
	file := filepath.Join(s.dir, "password")
	for _, password := range []string{"first", "second"} {
		if err := os.WriteFile(file, []byte(password), 0o600); err != nil {
			t.Fatal(err)
		}
		if password == "first" {
			s.write(fmt.Sprintf("redis: {password_file: %q, max_memory: 64MiB, manage_memory: true}\nroutes: []\n", file))
			s.exec("--config", s.config)
			s.started()
			eventually(t, "the password is refused", func() bool { return s.stderr.has(`"reason":"auth"`) })
		}
	}
	eventually(t, "the memory limit is set", func() bool {
		return s.do("CONFIG", "GET", "maxmemory") == "map[maxmemory:67108864]" || s.stderr.has("redis's memory limit was set")
	})
}

// The password of clients is read at a reload. Who is connected stays.
func TestRotatedPasswordOfClients(t *testing.T) {
	s := newSite(t, testenv.Redis(t).URL(), "")
	file := filepath.Join(s.dir, "password")
	holds := func(password string) {
		t.Helper()
		if err := os.WriteFile(file, []byte(password), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	holds("first")
	listen := fmt.Sprintf("listen: {address: %q, password_file: %q}\nobserve: {address: %q}\nadmin: {address: %q}\nroutes: []\n", "unix://"+s.socket, file, s.observe, s.admin)
	if err := os.WriteFile(s.config, []byte(listen), 0o600); err != nil {
		t.Fatal(err)
	}
	s.exec("--config", s.config)
	s.started()
	ctx := context.Background()
	client := func(password string) *redis.Client {
		c := redis.NewClient(&redis.Options{Network: "unix", Addr: s.socket, Password: password, PoolSize: 1, MaxRetries: -1, DisableIdentity: true})
		t.Cleanup(func() { c.Close() })
		return c
	}
	old := client("first")
	if err := old.Set(ctx, "k", "v", 0).Err(); err != nil {
		t.Fatal(err)
	}
	holds("second")
	if code, body := s.post("/reload"); code != 200 {
		t.Fatalf("reload: %d %s", code, body)
	}
	if got, err := client("second").Get(ctx, "k").Result(); err != nil || got != "v" {
		t.Errorf("with the new password: %q, %v", got, err)
	}
	if err := client("first").Get(ctx, "k").Err(); err == nil || !strings.HasPrefix(err.Error(), "WRONGPASS") {
		t.Errorf("with the old password: %v", err)
	}
	if got, err := old.Get(ctx, "k").Result(); err != nil || got != "v" {
		t.Errorf("who was connected: %q, %v", got, err)
	}
	if strings.Contains(s.stderr.String(), "take effect at the next start") {
		t.Error("it is said to wait for a restart")
	}
}
