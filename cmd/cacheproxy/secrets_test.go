package main

import (
	"context"
	"fmt"
	"net"
	"net/url"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"cacheproxy/internal/testenv"

	"github.com/jackc/pgx/v5"
	"github.com/redis/go-redis/v9"
)

// markers stand where something of a client's or of an operator's is that no line may have.
var markers = []string{"markedkey", "markedvalue", "markedredispassword", "markedpostgrespassword", "markedclientpassword", "markedwrongpassword", "markedscript", "markedpath", "markednewpassword"}

// brief is how long an answer is waited for that nobody needs.
const brief = time.Second

// leaked runs the program through traffic and outages, at debug level, and returns the markers that its output has. wrong is a rule for a
// program that breaks it.
func leaked(t *testing.T, wrong string) (found []string) {
	server := testenv.Redis(t, "--requirepass", "markedredispassword", "--enable-debug-command", "yes")
	pg := testenv.PostgresServer(t)
	toRedis, toPostgres := testenv.NewLink(t, server.Addr()), testenv.NewLink(t, pg.Addr())
	direct, err := url.Parse(pg.URL("postgres"))
	if err != nil {
		t.Fatal(err)
	}
	via := *direct
	via.User, via.Host = url.UserPassword(direct.User.Username(), "markedpostgrespassword"), toPostgres.Addr()
	s := newSite(t, "redis://:markedredispassword@"+toRedis.Addr()+"/0", via.String())
	stores := fmt.Sprintf("redis: {url: %q}\npostgres: {url: %q}\n", s.redisURL, s.postgresURL)
	s.redisURL, s.postgresURL = "", "" // in the file, so that mistakes there are its own
	const debug = "log: {level: debug, format: json}\n"
	s.write(debug + stores + routes)
	var tags []string
	if wrong != "" {
		tags = []string{"wrong"}
	}
	p := s.start(exec.Command(testenv.Program(t, tags...), "serve", "--config", s.config), "WRONG_PROTOCOL="+wrong)
	s.started()

	ctx := context.Background()
	c := redis.NewClient(&redis.Options{Network: "unix", Addr: s.socket, MaxRetries: -1, DisableIdentity: true, ReadTimeout: brief})
	defer c.Close()
	do := func(args ...any) { _ = c.Do(ctx, args...).Err() } // what is answered is other tests' matter
	traffic := func() {
		for _, route := range []string{"user:", "report:", "elsewhere:"} {
			key := route + "markedkey"
			for _, args := range [][]any{
				{"SET", key, "markedvalue"}, {"GET", key}, {"INCR", key}, {"SETRANGE", key, 1, "markedvalue"}, {"HGET", key, "markedvalue"}, {"GET", key + "absent"},
				{"MGET", key, key + "2"}, {"EVAL", "return redis.call('markedscript', KEYS[1])", 1, key}, {"EVAL", "markedscript", 1, key}, {"XMARKEDVALUE", key}, {"SET", key, "v", "markedvalue"},
				{"HSET", key + ":h", "f", "markedvalue"}, {"GET", key + ":h"}, {"DEL", key}, {"APPEND", key, `{"markedvalue":"\u0000"}`}, {"EXPIRE", key, "markedvalue"}, {"RENAME", key, key + "2"},
				{"CACHEPROXY", "EXPLAIN", key}, {"CACHEPROXY", "DIFF", key}, {"CACHEPROXY", "markedvalue"}, {"CACHEPROXY", "PHASE", "markedkey", "markedvalue"}, {"CLIENT", "SETNAME", "markedvalue"},
				{"SET", key + "\xff", "markedvalue"}, {"SET", key + "\x00", "markedvalue"}, {"DEBUG", "markedvalue"}, {"PUBLISH", key, "markedvalue"}, {"LPUSH", key, "markedvalue"},
			} {
				do(args...)
			}
			pipe := c.TxPipeline()
			pipe.Set(ctx, key, "markedvalue", 0)
			pipe.Incr(ctx, key)
			_, _ = pipe.Exec(ctx)
		}
		for _, text := range []string{"*1\r\n!markedvalue\r\n", "AUTH markedwrongpassword\r\nGET 'markedkey\r\n", "POST /markedpath HTTP/1.1\r\n\r\n"} {
			if conn, err := net.Dial("unix", s.socket); err == nil {
				_ = conn.SetDeadline(time.Now().Add(brief))
				_, _ = conn.Write([]byte(text))
				_, _ = conn.Read(make([]byte, 4096))
				conn.Close()
			}
		}
		s.get("/markedpath?markedvalue;markedvalue")
		s.post("/phase?route=markedkey&phase=markedvalue")
		for _, address := range []string{s.observe, s.admin} {
			if conn, err := net.Dial("tcp", address); err == nil {
				_ = conn.SetDeadline(time.Now().Add(brief))
				_, _ = conn.Write([]byte("markedvalue markedvalue\r\n\r\n"))
				_, _ = conn.Read(make([]byte, 4096))
				conn.Close()
			}
		}
	}
	said := func(words ...string) {
		t.Helper()
		eventually(t, fmt.Sprintf("the log says %q", words), func() bool {
			do("GET", "user:markedkey") // that it is noticed
			return s.stderr.has(words...)
		})
	}
	usable := func(store string) {
		t.Helper()
		eventually(t, store+" is used again", func() bool {
			_, body := s.get("/readyz?verbose")
			return strings.Contains(body, "[+]redis ok") && strings.Contains(body, "[+]postgres ok")
		})
	}
	usable("both")
	traffic()

	toRedis.Cut()
	traffic()
	said(`"msg":"redis is not usable"`)
	toRedis.Heal()
	usable("redis")
	toPostgres.Cut()
	traffic()
	said(`"msg":"postgres is not usable"`)
	toPostgres.Heal()
	usable("postgres")
	toRedis.Freeze()
	do("SET", "user:markedkey", "markedvalue") // what no route matches would wait as long as Redis does
	said(`"reason":"timeout"`)
	toRedis.Thaw()
	usable("redis")

	// Redis that refuses, in words that quote what was asked.
	admin := redis.NewClient(&redis.Options{Addr: server.Addr(), Password: "markedredispassword", MaxRetries: -1, DisableIdentity: true})
	defer admin.Close()
	admin.ConfigSet(ctx, "maxmemory", "1")
	traffic()
	admin.ConfigSet(ctx, "maxmemory", "0")
	admin.Do(ctx, "ACL", "SETUSER", "default", "resetpass", ">markednewpassword")
	admin.Do(ctx, "CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
	said(`"reason":"auth"`)
	traffic()
	admin.Do(ctx, "ACL", "SETUSER", "default", "resetpass", ">markedredispassword")
	usable("redis")

	// Postgres that refuses, in words that quote rows, and one whose table is gone.
	conn, err := pgx.Connect(ctx, direct.String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(ctx)
	sql := func(text string) {
		t.Helper()
		if _, err := conn.Exec(ctx, text); err != nil {
			t.Fatal(err)
		}
	}
	sql(`ALTER TABLE cacheproxy.entries ADD CONSTRAINT picky CHECK (key NOT LIKE '%markedkey%') NOT VALID`)
	traffic()
	sql(`ALTER TABLE cacheproxy.entries DROP CONSTRAINT picky`)
	sql(`CREATE FUNCTION cacheproxy.quotes() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'markedvalue % is refused', NEW.key USING ERRCODE = '57014', DETAIL = NEW.key; END $$`)
	sql(`CREATE TRIGGER quotes BEFORE INSERT OR UPDATE ON cacheproxy.entries FOR EACH ROW EXECUTE FUNCTION cacheproxy.quotes()`)
	traffic()
	said("57014")
	sql(`DROP TRIGGER quotes ON cacheproxy.entries`)
	usable("postgres")
	sql(`ALTER TABLE cacheproxy.entries RENAME TO markedvalue`)
	traffic()
	sql(`ALTER TABLE cacheproxy.markedvalue RENAME TO entries`)
	usable("postgres")

	// Configurations with secrets and mistakes.
	for _, text := range []string{
		"redis: {url: 'http://:markedredispassword@nowhere'}", "postgres: {url: 'postgres://u:markedpostgrespassword@[nowhere'}", "listen: {password: [markedclientpassword]}",
		"routes: [{name: a, match: 'markedkey:[', phase: phase9}]", "markedvalue: {", "redis: {url: [markedredispassword]}",
	} {
		s.write(debug + text)
		do("CACHEPROXY", "RELOAD")
		s.post("/reload")
	}
	if s.scraped()[`cacheproxy_config_reloads_total{result="error"}`] < 4 {
		t.Error("the configurations are not refused")
	}
	s.write(debug + stores + routes)
	do("CACHEPROXY", "RELOAD")
	p.signal(t, syscall.SIGTERM)
	if code := p.code(t); code != exitFine {
		t.Errorf("exit code %d", code)
	}
	out := strings.ToLower(s.stdout.String() + s.stderr.String())
	for _, m := range markers {
		if strings.Contains(out, m) {
			found = append(found, m)
			if wrong == "" {
				at := strings.Index(out, m)
				from := strings.LastIndexByte(out[:at], '\n') + 1
				line, _, _ := strings.Cut(out[from:], "\n")
				t.Errorf("%s is in the line %s", m, line)
			}
		}
	}
	if !strings.Contains(out, `"level":"debug"`) && wrong != "" {
		t.Error("nothing was said at debug level")
	}
	return found
}

// Nothing that a client says, and no password, is in what the program prints, whatever happens and at whatever level. Programs that log a key or a value are
// found out.
func TestNothingOfClientsIsPrinted(t *testing.T) {
	if found := leaked(t, ""); len(found) > 0 {
		t.Errorf("printed: %q", found)
	}
}

func TestLeaksAreFound(t *testing.T) {
	for wrong, marker := range map[string]string{"a key is logged": "markedkey", "a value is logged": "markedvalue"} {
		t.Run(wrong, func(t *testing.T) {
			if found := leaked(t, wrong); !slices.Contains(found, marker) {
				t.Errorf("%s is not found, but %q", marker, found)
			}
		})
	}
}
