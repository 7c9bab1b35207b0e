package compose

import (
	"context"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"cacheproxy/internal/testenv"
	"cacheproxy/test/deploy/lab"

	"github.com/compose-spec/compose-go/v2/cli"
	"github.com/compose-spec/compose-go/v2/types"
	"github.com/redis/go-redis/v9"
)

func TestMain(m *testing.M) { testenv.Main(m) }

const folder = "../../../deploy/compose"

// load loads the files of a folder, with the environment of nobody.
func load(dir string, files ...string) (*types.Project, error) {
	var paths []string
	for _, f := range files {
		paths = append(paths, filepath.Join(dir, f))
	}
	options, err := cli.NewProjectOptions(paths, cli.WithWorkingDirectory(dir), cli.WithEnv(nil), cli.WithConsistency(true), cli.WithResolvedPaths(true))
	if err != nil {
		return nil, err
	}
	return options.LoadProject(context.Background())
}

// judge says what is wrong with a project.
func judge(p *types.Project) (problems []string) {
	report := func(format string, args ...any) { problems = append(problems, fmt.Sprintf(format, args...)) }
	for _, name := range p.ServiceNames() {
		s := p.Services[name]
		if user, _, _ := strings.Cut(s.User, ":"); user == "" || user == "0" || user == "root" {
			report("%s runs as root", name)
		}
		if !s.ReadOnly {
			report("%s can write to its root", name)
		}
		if !slices.Contains(s.CapDrop, "ALL") || len(s.CapAdd) > 0 || s.Privileged {
			report("%s has capabilities", name)
		}
		if !slices.Contains(s.SecurityOpt, "no-new-privileges:true") {
			report("%s may gain privileges", name)
		}
		if s.HealthCheck == nil || len(s.HealthCheck.Test) == 0 || s.HealthCheck.Disable {
			report("%s has no health check", name)
		}
		if s.MemLimit == 0 {
			report("%s has no limit for its memory", name)
		}
		if s.Restart != "unless-stopped" {
			report("%s is not started again", name)
		}
		for _, port := range s.Ports {
			if port.HostIP != "127.0.0.1" {
				report("%s is open to other machines on port %s", name, port.Published)
			}
		}
		for key := range s.Environment {
			if strings.Contains(key, "PASSWORD") && !strings.HasSuffix(key, "_FILE") || strings.HasSuffix(key, "_URL") {
				report("%s has a secret in its environment", name)
			}
		}
		for _, v := range s.Volumes {
			if v.Type != types.VolumeTypeBind {
				continue
			}
			if info, err := os.Stat(v.Source); err != nil || !info.IsDir() {
				report("%s mounts a file that is alone or missing", name)
			}
			if !v.ReadOnly {
				report("%s can write to %s", name, v.Target)
			}
		}
	}
	proxy := p.Services["cacheproxy"]
	for _, store := range []string{"redis", "postgres"} {
		if d, ok := proxy.DependsOn[store]; !ok || d.Condition != types.ServiceConditionHealthy {
			report("the proxy does not wait for %s", store)
		}
		for network := range p.Services[store].Networks {
			if !p.Networks[network].Internal {
				report("%s can be reached past the proxy", store)
			}
		}
	}
	// What is in the proxy's place in the networks: itself, or the application whose network it uses.
	front := "cacheproxy"
	if name, ok := strings.CutPrefix(proxy.NetworkMode, "service:"); ok {
		front = name
	}
	outside, stores := false, false
	for network := range p.Services[front].Networks {
		_, isStores := p.Services["redis"].Networks[network]
		stores = stores || isStores
		outside = outside || !p.Networks[network].Internal
	}
	if !outside {
		report("%s has no way out, and its ports cannot be published", front)
	}
	if !stores {
		report("%s does not reach the stores", front)
	}
	if grace := proxy.StopGracePeriod; grace == nil || grace.String() != "15s" {
		report("the proxy is killed while it finishes")
	}
	return problems
}

// wrongSidecar is what is wrong with the sidecar's file after a change.
func wrongSidecar(t *testing.T, old, new string) string {
	t.Helper()
	dir := copied(t)
	path := filepath.Join(dir, "compose.sidecar.yaml")
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(lab.Replace(t, string(text), old, new)), 0o600); err != nil {
		t.Fatal(err)
	}
	p, err := load(dir, "compose.yaml", "compose.sidecar.yaml")
	if err != nil {
		return err.Error()
	}
	return strings.Join(judge(p), "\n")
}

// copied is the folder with changes, pairs of what is there and what comes in its place in compose.yaml.
func copied(t *testing.T, changes ...string) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.CopyFS(dir, os.DirFS(folder)); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "compose.yaml")
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(lab.Replace(t, string(text), changes...)), 0o600); err != nil {
		t.Fatal(err)
	}
	return dir
}

func TestCompose(t *testing.T) {
	for _, files := range [][]string{{"compose.yaml"}, {"compose.yaml", "compose.sidecar.yaml"}} {
		p, err := load(folder, files...)
		if err != nil {
			t.Fatal(err)
		}
		if problems := judge(p); len(problems) > 0 {
			t.Error(strings.Join(problems, "\n"))
		}
	}
	p, err := load(folder, "compose.yaml", "compose.sidecar.yaml")
	if err != nil {
		t.Fatal(err)
	}
	for name, s := range p.Services {
		if len(s.Command) == 3 && s.Command[1] == "-c" {
			if out, err := exec.Command("sh", "-n", "-c", s.Command[2]).CombinedOutput(); err != nil {
				t.Errorf("%s: %v %s", name, err, out)
			}
		}
	}
	if s := p.Services["cacheproxy"]; s.NetworkMode != "service:app" || len(s.Networks)+len(s.Ports) > 0 || *s.Environment["CACHEPROXY_LISTEN"] != "127.0.0.1:6380" {
		t.Errorf("not a sidecar: %+v", s)
	}
}

// What the README says to type first makes the secrets that the file asks for.
func TestSecretsOfREADME(t *testing.T) {
	readme, err := os.ReadFile(filepath.Join(folder, "README.md"))
	if err != nil {
		t.Fatal(err)
	}
	_, block, _ := strings.Cut(string(readme), "```sh\n")
	block, _, _ = strings.Cut(block, "```")
	dir := copied(t)
	cmd := exec.Command("sh", "-e", "-c", block)
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v %s", err, out)
	}
	p, err := load(dir, "compose.yaml")
	if err != nil {
		t.Fatal(err)
	}
	for name, s := range p.Secrets {
		if text, err := os.ReadFile(s.File); err != nil || len(strings.TrimSpace(string(text))) < 32 {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// Each of these is a mistake that somebody could make, and is found.
func TestWrongVariants(t *testing.T) {
	for _, c := range []struct{ name, old, new, says string }{
		{"a misspelt key", "read_only: true", "readonly: true", "readonly"},
		{"a word for a number", "mem_limit: 256m", "mem_limit: much", "mem_limit"},
		{"no such network", "networks: [stores]", "networks: [backend]", "undefined network backend"},
		{"no such secret", "secrets: [redis-password]", "secrets: [password]", "undefined secret password"},
		{"no such service", "postgres: {condition: service_healthy}", "database: {condition: service_healthy}", `undefined service "database"`},
		{"no such condition", "redis: {condition: service_healthy}", "redis: {condition: service_ready}", "condition"},
		{"does not wait", "redis: {condition: service_healthy}", "redis: {condition: service_started}", "does not wait for redis"},
		{"root", `user: "70:70"`, `user: "0:0"`, "postgres runs as root"},
		{"no user", `user: "65532:65532"`, `domainname: x`, "cacheproxy runs as root"},
		{"writable", "read_only: true", "read_only: false", "can write to its root"},
		{"capabilities", "cap_drop: [ALL]", "cap_drop: [CHOWN]", "has capabilities"},
		{"privileges", `["no-new-privileges:true"]`, `["no-new-privileges:false"]`, "may gain privileges"},
		{"no health check", "test: [CMD, /cacheproxy, healthcheck]", "disable: true", "no health check"},
		{"no limit", "mem_limit: 1g", "cpu_shares: 1", "redis has no limit"},
		{"not started again", "restart: unless-stopped", `restart: "no"`, "not started again"},
		{"open", "127.0.0.1:6380:6380", "6380:6380", "open to other machines on port 6380"},
		{"a secret in the environment", "POSTGRES_PASSWORD_FILE: /run/secrets/postgres-password", "POSTGRES_PASSWORD: hush", "secret in its environment"},
		{"a file alone", "./config:/etc/cacheproxy:ro", "./config/config.yaml:/etc/cacheproxy/config.yaml:ro", "a file that is alone"},
		{"a writable mount", "./config:/etc/cacheproxy:ro", "./config:/etc/cacheproxy", "can write to /etc/cacheproxy"},
		{"stores in the open", "internal: true", "internal: false", "reached past the proxy"},
		{"killed", "stop_grace_period: 15s", "stop_grace_period: 5s", "killed while it finishes"},
	} {
		t.Run(c.name, func(t *testing.T) {
			p, err := load(copied(t, c.old, c.new), "compose.yaml")
			said := fmt.Sprint(err)
			if err == nil {
				said = strings.Join(judge(p), "\n")
			}
			if !strings.Contains(said, c.says) {
				t.Errorf("%s", said)
			}
		})
	}
}

// The application beside the sidecar is in a network with a way out, and in that of the stores.
func TestWrongSidecar(t *testing.T) {
	for _, c := range []struct{ old, new, says string }{
		{"networks: [clients, stores]", "networks: [stores]", "app has no way out"},
		{"networks: [clients, stores]", "networks: [clients]", "app does not reach the stores"},
	} {
		if said := wrongSidecar(t, c.old, c.new); !strings.Contains(said, c.says) {
			t.Errorf("%s: %q", c.new, said)
		}
	}
}

// What the file says, run on this machine: Redis by its command line, its health check, the proxy with its configuration and its
// health check, a change of the configuration, and Redis closing connections that are idle.
func TestRun(t *testing.T) {
	p, err := load(folder, "compose.yaml")
	if err != nil {
		t.Fatal(err)
	}
	const named = "/run/secrets"
	const password = "s:/@ $\"'q"
	secrets := lab.Secrets(t, map[string]string{"redis-password": password + "\n", "postgres-password": "unused\n"})
	for _, s := range p.Secrets {
		if _, err := os.Stat(filepath.Join(secrets, filepath.Base(s.File))); err != nil {
			t.Errorf("the test has no secret %s", s.File)
		}
	}

	store := p.Services["redis"]
	if len(store.Command) != 3 || store.Command[0] != "sh" || store.Command[1] != "-c" {
		t.Fatalf("Redis is started by %q", store.Command)
	}
	addr := lab.Redis(t, store.Command[2], "/data", named, secrets, password)
	if err := lab.Probe(t, store.HealthCheck.Test[1], named, secrets, addr); err != nil {
		t.Errorf("the health check of Redis: %v", err)
	}
	wrong := lab.Secrets(t, map[string]string{"redis-password": "other"})
	if err := lab.Probe(t, store.HealthCheck.Test[1], named, wrong, addr); err == nil {
		t.Error("the health check of Redis succeeds with a wrong password")
	}

	postgres, err := url.Parse(testenv.PostgresServer(t).URL("postgres"))
	if err != nil {
		t.Fatal(err)
	}
	shipped, err := os.ReadFile(filepath.Join(folder, "config", "config.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	clients, observe, admin := testenv.FreePort(t), testenv.FreePort(t), testenv.FreePort(t)
	text := lab.Replace(t, string(shipped), "0.0.0.0:6380", "0.0.0.0:"+strconv.Itoa(clients), "0.0.0.0:9180", "0.0.0.0:"+strconv.Itoa(observe),
		"//redis:6379/", "//"+addr+"/", "//cacheproxy@postgres:5432/app?", "//"+postgres.User.Username()+"@"+postgres.Host+postgres.Path+"?",
		named+"/", secrets+"/")
	text += fmt.Sprintf("admin: {address: \"127.0.0.1:%d\"}\n", admin)
	file := filepath.Join(t.TempDir(), "config.yaml")
	save := func(text string) {
		t.Helper()
		if err := os.WriteFile(file+".new", []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(file+".new", file); err != nil { // as editors do it
			t.Fatal(err)
		}
	}
	save(text)

	bin := lab.Program(t)
	run := func(args ...string) *exec.Cmd {
		cmd := exec.Command(bin, args...)
		cmd.Env = []string{}
		for name, value := range p.Services["cacheproxy"].Environment {
			if name == "CACHEPROXY_CONFIG" {
				value = &file
			}
			cmd.Env = append(cmd.Env, name+"="+*value)
		}
		return cmd
	}
	if out, err := run("check").CombinedOutput(); err != nil {
		t.Fatalf("check: %v\n%s", err, out)
	}
	proxy := lab.Start(t, run(p.Services["cacheproxy"].Command...))
	health := p.Services["cacheproxy"].HealthCheck.Test
	if !slices.Equal(health[:2], []string{"CMD", "/cacheproxy"}) {
		t.Fatalf("health check %q", health)
	}
	lab.WaitFor(t, "the health check of the proxy succeeds", func() bool { return run(health[2:]...).Run() == nil })

	ctx := context.Background()
	client := redis.NewClient(&redis.Options{Addr: fmt.Sprintf("127.0.0.1:%d", clients), DisableIdentity: true, MaxRetries: -1})
	defer client.Close()
	lab.WaitFor(t, "both stores are reached", func() bool { return client.Set(ctx, "user:1", `{"a": 1}`, 0).Err() == nil })
	if got, err := client.Get(ctx, "user:1").Result(); err != nil || got != `{"a": 1}` {
		t.Errorf("%q, %v", got, err)
	}

	save(lab.Replace(t, text, "phase: phase1", "phase: phase2"))
	lab.WaitFor(t, "the changed configuration is in force", func() bool {
		return strings.Contains(fmt.Sprint(client.Do(ctx, "CACHEPROXY", "PHASE").Val()), "phase2")
	})

	// Redis closes what has been idle for its `timeout`, here a second instead of five minutes. Nobody notices.
	direct := redis.NewClient(&redis.Options{Addr: addr, Password: password, DisableIdentity: true})
	defer direct.Close()
	before := connections(t, direct)
	if err := direct.ConfigSet(ctx, "timeout", "1").Err(); err != nil {
		t.Fatal(err)
	}
	lab.WaitFor(t, "Redis closes a connection of the proxy", func() bool {
		now := connections(t, direct)
		return slices.ContainsFunc(before, func(id string) bool { return !slices.Contains(now, id) })
	})
	for range 20 {
		if err := client.Incr(ctx, "visits").Err(); err != nil {
			t.Errorf("after Redis has closed idle connections: %v", err)
		}
		if err := client.Set(ctx, "user:1", `{"a": 2}`, 0).Err(); err != nil {
			t.Errorf("after Redis has closed idle connections: %v", err)
		}
	}
	if got := client.Get(ctx, "visits").Val(); got != "20" {
		t.Errorf("%s visits", got)
	}
	if code := proxy.Stop(t); code != 0 {
		t.Errorf("the proxy ends with %d", code)
	}
	if strings.Contains(proxy.Output.String(), "s:/@") {
		t.Error("a password is in the log")
	}
}

// connections are the ids of the proxy's connections to Redis.
func connections(t *testing.T, direct *redis.Client) (ids []string) {
	t.Helper()
	list, err := direct.ClientList(context.Background()).Result()
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(list) {
		if id, _, ok := strings.Cut(line, " "); ok && strings.Contains(line, "name=cacheproxy") {
			ids = append(ids, id)
		}
	}
	if len(ids) == 0 {
		t.Fatalf("the proxy is not among the clients of Redis:\n%s", list)
	}
	return ids
}
