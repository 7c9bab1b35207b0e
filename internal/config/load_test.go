package config

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/redis/go-redis/v9"
	"go.yaml.in/yaml/v3"
)

var update = flag.Bool("update", false, "write the words that testdata/*.bad.yaml produce")

// environment is an environment of the test's own.
func environment(pairs ...string) func(string) (string, bool) {
	return func(name string) (string, bool) {
		for i := 0; i < len(pairs); i += 2 {
			if pairs[i] == name {
				return pairs[i+1], true
			}
		}
		return "", false
	}
}

// write puts a configuration into a file of the test's own.
func write(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "config.yaml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func mustLoad(t *testing.T, path string, env func(string) (string, bool), options ...Option) *Config {
	t.Helper()
	c, err := Load(path, env, options...)
	if err != nil {
		t.Fatalf("Load:\n%v", err)
	}
	return c
}

// problems loads a configuration that must be refused.
func problems(t *testing.T, path string, env func(string) (string, bool), options ...Option) []Problem {
	t.Helper()
	c, err := Load(path, env, options...)
	var refused *Error
	if !errors.As(err, &refused) {
		t.Fatalf("Load = %v, %v; want an *Error", c, err)
	}
	if c != nil {
		t.Error("a refused configuration was returned")
	}
	return refused.Problems
}

// TestMistakes holds every testdata/*.bad.yaml against the words beside it. After a change of words,
// run it with -update and read the difference.
func TestMistakes(t *testing.T) {
	t.Chdir("testdata")
	files, err := filepath.Glob("*.bad.yaml")
	if err != nil || len(files) == 0 {
		t.Fatalf("no files: %v", err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(file, ".bad.yaml"), func(t *testing.T) {
			_, err := Load(file, nil)
			if err == nil {
				t.Fatal("accepted")
			}
			got := err.Error() + "\n"
			wordsFile := strings.TrimSuffix(file, ".yaml") + ".txt"
			if *update {
				if err := os.WriteFile(wordsFile, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(wordsFile)
			if err != nil {
				t.Fatal(err)
			}
			if got != string(want) {
				t.Errorf("got\n%s\nwant\n%s", got, want)
			}
			if strings.Contains(got, "sesame") {
				t.Error("a password is printed")
			}
		})
	}
}

// The password of a store may stand in a file; what it needs in a URL is escaped here and not by who writes it.
func TestPasswordFiles(t *testing.T) {
	password := write(t, "s:/@?#%&= ame\nsecond line\n")
	for _, c := range []struct{ redis, postgres string }{
		{"redis://127.0.0.1:6379/0", "postgres://app@127.0.0.1:5432/app"},
		{"rediss://user@redis:6380/3?protocol=3", "postgres://app@a:1,b:2/app?sslmode=require&application_name=a@b"},
		{"unix:///run/r.sock?db=2", "postgresql://app@/app?host=/run"},
	} {
		c2 := mustLoad(t, write(t, fmt.Sprintf("redis: {url: %q, password_file: %q}\npostgres: {url: %q, password_file: %q}\n", c.redis, password, c.postgres, password)), nil)
		r, err := redis.ParseURL(c2.Redis.URL)
		if err != nil || r.Password != "s:/@?#%&= ame" {
			t.Errorf("%s: %q, %v", c.redis, r.Password, err)
		}
		if plain, _ := redis.ParseURL(c.redis); err == nil && (r.Username != plain.Username || r.Addr != plain.Addr || r.DB != plain.DB || r.Protocol != plain.Protocol) {
			t.Errorf("%s: more than the password has changed: %s", c.redis, c2.Redis.URL)
		}
		p, err := pgx.ParseConfig(c2.Postgres.URL)
		if err != nil || p.Password != "s:/@?#%&= ame" || p.User != "app" || p.Database != "app" {
			t.Errorf("%s: %v, %+v", c.postgres, err, p)
		}
		if printed := c2.Redacted(); printed.Redis.URL != c.redis || printed.Postgres.URL != c.postgres {
			t.Errorf("printed: %s, %s", printed.Redis.URL, printed.Postgres.URL)
		}
	}
}

func TestNoFile(t *testing.T) {
	want := Defaults()
	for name, path := range map[string]string{
		"none":          "",
		"empty":         write(t, ""),
		"null device":   os.DevNull,
		"comments":      write(t, "# nothing\n"),
		"null":          write(t, "~\n"),
		"empty section": write(t, "listen:\n  # address: :1\nredis:\n"),
	} {
		if got := mustLoad(t, path, environment()); !reflect.DeepEqual(*got, want) {
			t.Errorf("%s: got %+v\nwant %+v", name, *got, want)
		}
	}
}

func TestUnreadableFile(t *testing.T) {
	dir := t.TempDir()
	pipe := filepath.Join(dir, "pipe")
	if err := syscall.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	big := write(t, strings.Repeat("# a comment\n", maxFile/10))
	for _, c := range []struct{ path, want string }{
		{filepath.Join(dir, "absent.yaml"), "cannot be read: no such file or directory"},
		{dir, "cannot be read: is a directory"},
		{pipe, "cannot be read: is not a regular file"},
		{big, "cannot be read: is larger than 4 MiB"},
	} {
		ps := problems(t, c.path, nil)
		if len(ps) != 1 || ps[0].File != c.path || ps[0].Problem != c.want || ps[0].Key != "" {
			t.Errorf("%s: %+v", c.path, ps)
		}
	}
}

func TestFileSetsEveryKindOfValue(t *testing.T) {
	password := write(t, "open sesame\r\nsecond line\n")
	c := mustLoad(t, write(t, `
listen:
  address: unix:///run/cacheproxy.sock
  password_file: `+password+`
  tls: {cert_file: &pem `+password+`, key_file: *pem, client_ca_file: *pem}
redis: {url: "rediss://u:p@redis:6380/3", max_memory: 1500m, manage_memory: true, tls: {insecure_skip_verify: true, ca_file: `+password+`}}
limits: {max_query_buffer: 2 GB}
admin: {address: ""}
default: {ttl: 90s, ttl_jitter: 25%, negative_ttl: 0}
routes:
  - {name: inherits, match: "a:*"}
  - {name: states, match: "{tag}:*", phase: phase3, ttl: 0, ttl_jitter: 0.5, on_unknown: error, write_policy: both, store: {kind: table}}
`), nil)
	if c.Listen.Password != "open sesame" {
		t.Errorf("password %q", c.Listen.Password)
	}
	if !c.Listen.TLS.Enabled() || c.Listen.TLS.KeyFile != password {
		t.Errorf("listen.tls %+v", c.Listen.TLS)
	}
	if c.Redis.MaxMemory != 1_500_000_000 || c.Limits.MaxQueryBuffer != 2*GiB || c.Admin.Address != "" {
		t.Errorf("%v %v %q", c.Redis.MaxMemory, c.Limits.MaxQueryBuffer, c.Admin.Address)
	}
	shared := Rules{Phase: "phase1", TTL: 90 * time.Second, TTLJitter: 0.25, OnUnknown: "miss", WritePolicy: "any"}
	own := Rules{Phase: "phase3", TTLJitter: 0.5, OnUnknown: "error", WritePolicy: "both"}
	want := []Route{
		{Name: "inherits", Match: "a:*", Rules: shared, Store: Store{Kind: "table"}},
		{Name: "states", Match: "{tag}:*", Rules: own, Store: Store{Kind: "table"}},
	}
	if !reflect.DeepEqual(c.Routes, want) {
		t.Errorf("routes\n%+v\nwant\n%+v", c.Routes, want)
	}
}

func TestEmptyRoutesAreNone(t *testing.T) {
	c := mustLoad(t, write(t, "routes: []\npostgres: {url: ''}\n"), environment("REDIS_KEY_PREFIX", "app"))
	if c.Routes == nil || len(c.Routes) != 0 {
		t.Errorf("routes %v", c.Routes)
	}
	if c.UsesStore() {
		t.Error("a store is used by no route")
	}
}

func TestLayers(t *testing.T) {
	file := write(t, "listen: {address: ':1'}\nobserve: {address: ':2'}\nadmin: {address: 'localhost:3'}\nlog: {level: debug}\n")
	env := environment("CACHEPROXY_OBSERVE", ":20", "CACHEPROXY_ADMIN", "[::1]:30", "CACHEPROXY_LOG_LEVEL", "")
	c := mustLoad(t, file, env, Override("--admin", "admin.address", "127.0.0.1:300"), Override("--manage", "redis.manage_memory", "false"))
	if c.Listen.Address != ":1" || c.Observe.Address != ":20" || c.Admin.Address != "127.0.0.1:300" || c.Log.Level != "debug" {
		t.Errorf("%+v %+v %+v %+v", c.Listen, c.Observe, c.Admin, c.Log)
	}
}

func TestEnvironment(t *testing.T) {
	c := mustLoad(t, "", environment(
		"REDIS_URL", "unix:///run/redis.sock?db=2",
		"DATABASE_URL", "postgresql://u:p%40@one:5432,[::1]:5433/app?sslmode=require",
		"REDIS_CACHE_TTL_SECONDS", "3600",
		"REDIS_MAX_CACHE_SIZE_MB", "512",
		"REDIS_KEY_PREFIX", "a*b",
		"CACHEPROXY_PHASE", "phase2",
		"CACHEPROXY_LISTEN", "0.0.0.0:7000",
		"CACHEPROXY_OBSERVE", "0.0.0.0:7001",
		"CACHEPROXY_ADMIN", "127.0.0.1:7002",
		"CACHEPROXY_LOG_LEVEL", "debug",
	))
	if c.Redis.URL != "unix:///run/redis.sock?db=2" || c.Redis.MaxMemory != 512*MiB ||
		c.Postgres.URL != "postgresql://u:p%40@one:5432,[::1]:5433/app?sslmode=require" ||
		c.Listen.Address != "0.0.0.0:7000" || c.Observe.Address != "0.0.0.0:7001" || c.Admin.Address != "127.0.0.1:7002" ||
		c.Log.Level != "debug" {
		t.Errorf("%+v", c)
	}
	r := c.Routes[0]
	if len(c.Routes) != 1 || r.Name != "default" || r.Match != `a\*b:*` || r.Phase != "phase2" || r.TTL != time.Hour {
		t.Errorf("routes %+v", c.Routes)
	}
	if c := mustLoad(t, "", environment("REDIS_KEY_PREFIX", "emg:")); c.Routes[0].Match != "emg:*" {
		t.Errorf("a prefix with its colon: %q", c.Routes[0].Match)
	}
}

func TestEnvironmentMistakes(t *testing.T) {
	ps := problems(t, "", environment(
		"REDIS_URL", "http://user:sesame@host/",
		"DATABASE_URL", "mysql://user:sesame@host/",
		"REDIS_CACHE_TTL_SECONDS", "1h",
		"REDIS_MAX_CACHE_SIZE_MB", "-1",
		"REDIS_KEY_PREFIX", "cacheproxy",
		"CACHEPROXY_PHASE", "phase9",
		"CACHEPROXY_LISTEN", "7000",
		"CACHEPROXY_OBSERVE", "host",
		"CACHEPROXY_ADMIN", "0.0.0.0:1",
		"CACHEPROXY_LOG_LEVEL", "trace",
	))
	var named []string
	for _, p := range ps {
		if p.File != "environment" || p.Line != 0 || p.Remedy == "" {
			t.Errorf("%+v", p)
		}
		if strings.Contains(p.String(), "sesame") {
			t.Errorf("a password is printed: %s", p)
		}
		named = append(named, p.Key)
	}
	want := []string{
		"REDIS_CACHE_TTL_SECONDS", "REDIS_MAX_CACHE_SIZE_MB", "CACHEPROXY_PHASE", "CACHEPROXY_LOG_LEVEL",
		"CACHEPROXY_LISTEN", "CACHEPROXY_OBSERVE", "CACHEPROXY_ADMIN", "REDIS_URL", "DATABASE_URL", "REDIS_KEY_PREFIX",
	}
	if !reflect.DeepEqual(named, want) {
		t.Errorf("named %v\nwant  %v", named, want)
	}
}

func TestUnknownVariables(t *testing.T) {
	ps := problems(t, "", environment(), Environ([]string{
		"PATH=/bin",
		"CACHEPROXY_CONFIG=config.yaml",
		"CACHEPROXY_PHASE=phase1",
		"CACHEPROXY_PORT=tcp://10.0.0.1:6380",
		"CACHEPROXY_SERVICE_HOST=10.0.0.1",
		"CACHEPROXY_SERVICE_PORT_RESP=6380",
		"CACHEPROXY_METRICS_PORT_9180_TCP_ADDR=10.0.0.1",
		"CACHEPROXY_LISTEM=127.0.0.1:1",
		"CACHEPROXY_ADMIN_PORT=9181",
		"CACHEPROXY_COLOUR=red",
	}))
	var got []string
	for _, p := range ps {
		got = append(got, p.String())
	}
	all := "CONFIG, PHASE, LISTEN, OBSERVE, ADMIN or LOG_LEVEL"
	want := []string{
		"environment: CACHEPROXY_LISTEM: unknown variable; did you mean CACHEPROXY_LISTEN?",
		"environment: CACHEPROXY_ADMIN_PORT: unknown variable; did you mean CACHEPROXY_ADMIN?",
		"environment: CACHEPROXY_COLOUR: unknown variable; remove it; CACHEPROXY_ can be followed by " + all,
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

// TestMistakesOfAllLayersAtOnce: the file's come first, whatever found them.
func TestMistakesOfAllLayersAtOnce(t *testing.T) {
	file := write(t, "log: {level: loud}\nlimits: {max_inflight_per_client: 0}\n")
	_, err := Load(file, environment("CACHEPROXY_PHASE", "4"),
		Override("--listen", "listen.address", "nowhere"),
		Override("--tls", "listen.tls.cert_fil", "x"),
		Override("--verify", "redis.tls.insecure_skip_verify", "yes"),
		Override("--routes", "routes", "[]"))
	want := strings.Join([]string{
		file + `:1: log.level: unknown word "loud"; write debug, info, warn or error`,
		file + `:2: limits.max_inflight_per_client: is below the minimum of 1; write 1 or more`,
		`environment: CACHEPROXY_PHASE: unknown word "4"; write phase0, phase1, phase2, drain or phase3`,
		`command line: --tls: no setting is called listen.tls.cert_fil; did you mean listen.tls.cert_file?`,
		`command line: --verify: "yes" is neither true nor false; write true or false, without quotes`,
		`command line: --routes: no setting is called routes; config.yaml of the distribution lists every setting`,
		`command line: --listen: "nowhere" is not host:port; write host:port, such as 127.0.0.1:6380`,
	}, "\n")
	if err == nil || err.Error() != want {
		t.Errorf("got\n%v\nwant\n%s", err, want)
	}
}

// TestLaterLayerMendsNothing: a mistake in the file is a mistake, also where a variable wins.
func TestLaterLayerMendsNothing(t *testing.T) {
	ps := problems(t, write(t, "log: {level: loud}\n"), environment("CACHEPROXY_LOG_LEVEL", "info"))
	if len(ps) != 1 || ps[0].Line != 1 {
		t.Errorf("%+v", ps)
	}
}

func TestDefaultsClash(t *testing.T) {
	ps := problems(t, "", environment("CACHEPROXY_LISTEN", "127.0.0.1:9181"))
	if len(ps) != 1 || ps[0].Key != "CACHEPROXY_LISTEN" || ps[0].Problem != "is the same address as admin.address" {
		t.Errorf("%+v", ps)
	}
	ps = problems(t, "", nil, Override("--probe-max", "breaker.probe_max", "10ms"))
	if len(ps) != 1 || ps[0].Key != "--probe-max" {
		t.Errorf("%+v", ps)
	}
}

func TestPath(t *testing.T) {
	t.Chdir(t.TempDir())
	named := environment("CACHEPROXY_CONFIG", "/etc/cacheproxy/config.yaml")
	if got := Path("flag.yaml", named); got != "flag.yaml" {
		t.Errorf("flag: %q", got)
	}
	if got := Path("", named); got != "/etc/cacheproxy/config.yaml" {
		t.Errorf("variable: %q", got)
	}
	if got := Path("", environment()); got != "" {
		t.Errorf("neither: %q", got)
	}
	if err := os.WriteFile(DefaultPath, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if got := Path("", environment()); got != DefaultPath {
		t.Errorf("working directory: %q", got)
	}
}

func TestPatterns(t *testing.T) {
	for _, wrong := range []string{"", strings.Repeat("a", 2001), "\xff*", "cacheproxy:lease:*"} {
		if checkPattern(wrong) == nil {
			t.Errorf("%.20q was accepted", wrong)
		}
	}
	for _, ok := range []string{"*", "ключ:*", "{tag}:?", "a[b-c]\\*", "cacheproxy*"} {
		if bad := checkPattern(ok); bad != nil {
			t.Errorf("%q: %v", ok, bad)
		}
	}
}

func TestURLs(t *testing.T) {
	for _, ok := range []string{
		"redis://host", "redis://:p%40w@host:1/2", "rediss://u:p@[::1]:6380/0", "unix:///run/r.sock", "unix://u:p@/run/r.sock?db=3",
		"redis://host:6379?db=4",
	} {
		if bad := checkRedisURL(ok); bad != nil {
			t.Errorf("%s: %v", ok, bad)
		}
	}
	for _, wrong := range []string{
		"", "localhost:6379", "http://h", "redis://", "redis://:6379", "redis-cluster://h:1", "unix://run/r.sock", "unix://",
		"redis://h/a", "redis://h/-1", "redis://h/0?nonsense=1", "redis://u:p#q@h", "redis://:12?34@h", "redis://h:port",
		"unix:///" + strings.Repeat("x", 110),
	} {
		if checkRedisURL(wrong) == nil {
			t.Errorf("%q was accepted", wrong)
		}
	}
	for _, ok := range []string{
		"postgres://h/db", "postgresql://u:p?q#r@h:5432/db?sslmode=disable", "postgres:///db?host=/run/postgresql",
		"postgres://%2Frun%2Fpostgresql/db", "postgres://h1,h2:5433/db", "postgres://[::1]/db",
	} {
		if bad := checkPostgresURL(ok); bad != nil {
			t.Errorf("%s: %v", ok, bad)
		}
	}
	for _, wrong := range []string{
		"host=/run dbname=app", "mysql://h/db", "jdbc:postgresql://h/db", "postgres://u:p@q@h/db", "postgres://u:p/q@h/db",
		"postgres://u:100%@h/db", "postgres://h:port/db", "postgres://h:0/db", "postgres://h/db?sslmode=no-verify", "postgres://h/db?a=%zz",
	} {
		if checkPostgresURL(wrong) == nil {
			t.Errorf("%q was accepted", wrong)
		}
	}
}

func TestSameListener(t *testing.T) {
	for _, c := range []struct {
		a, b string
		want bool
	}{
		{"127.0.0.1:1", "127.0.0.1:1", true},
		{"127.0.0.1:1", "localhost:01", true},
		{":1", "10.0.0.1:1", true},
		{"[::]:1", "[::1]:1", true},
		{"[::ffff:127.0.0.1]:1", "127.0.0.1:1", true},
		{"Host:1", "host:1", true},
		{"127.0.0.1:1", "127.0.0.2:1", false},
		{"127.0.0.1:1", "127.0.0.1:2", false},
		{"127.0.0.1:0", "127.0.0.1:0", false},
		{"unix:///a", "unix:///a", true},
		{"unix:///a", "127.0.0.1:1", false},
		{"broken", "127.0.0.1:1", false},
	} {
		if got := sameListener(c.a, c.b); got != c.want {
			t.Errorf("sameListener(%q, %q) = %v", c.a, c.b, got)
		}
	}
}

func TestScalarsAsText(t *testing.T) {
	for _, c := range []struct {
		size Size
		want string
	}{{0, "0B"}, {1, "1B"}, {1500, "1500B"}, {KiB, "1KiB"}, {1536 * MiB, "1536MiB"}, {3 * TiB, "3TiB"}} {
		if got := c.size.String(); got != c.want {
			t.Errorf("%d: %q, want %q", int64(c.size), got, c.want)
		}
		if back, bad := parseSize(c.want); bad != nil || back != c.size {
			t.Errorf("%q: %d %v", c.want, back, bad)
		}
	}
	for _, text := range []string{"9999999999tb", "-5mb", "1.5gb", "mb"} {
		if _, bad := parseSize(text); bad == nil {
			t.Errorf("size %q was accepted", text)
		}
	}
	for _, text := range []string{"NaN", "Inf%", "%", "-1%", "101"} {
		if _, bad := parseFraction(text); bad == nil {
			t.Errorf("fraction %q was accepted", text)
		}
	}
	if _, bad := parseText(reflect.StructField{}, "a\x00b"); bad == nil {
		t.Error("a NUL byte was accepted")
	}
}

// FuzzLoad: whatever the file holds, Load answers with a configuration that it would accept again
// after it was printed, or with problems that say something.
func FuzzLoad(f *testing.F) {
	files, err := filepath.Glob("testdata/*.bad.yaml")
	if err != nil {
		f.Fatal(err)
	}
	for _, file := range append(files, filepath.Join("..", "..", DefaultPath)) {
		text, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(string(text))
	}
	f.Add("a: &a {b: *a}\nroutes: &r [*r]\n")
	f.Add("log: &a {level: *a}\nredis: &b *b\n")
	f.Add("? [a]\n: b\n!!binary x: 1\n")
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, text string) {
		path := filepath.Join(dir, "fuzz.yaml")
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		c, err := Load(path, nil)
		if err != nil {
			for _, p := range err.(*Error).Problems {
				if p.Problem == "" || p.Remedy == "" || p.File == "" {
					t.Errorf("%+v", p)
				}
			}
			return
		}
		printed, err := yaml.Marshal(c)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, printed, 0o600); err != nil {
			t.Fatal(err)
		}
		if again, err := Load(path, nil); err != nil || !reflect.DeepEqual(again, c) {
			t.Errorf("printed\n%s\nbecame %+v, %v", printed, again, err)
		}
	})
}
