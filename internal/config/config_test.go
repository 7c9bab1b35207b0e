package config

import (
	"bytes"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"

	"cacheproxy/policy"
)

// manual is the file that documents every setting.
var manual = filepath.Join("..", "..", DefaultPath)

func TestManualIsTheDefaults(t *testing.T) {
	if got, want := *mustLoad(t, manual, nil), Defaults(); !reflect.DeepEqual(got, want) {
		t.Errorf("config.yaml is\n%+v\nthe defaults are\n%+v", got, want)
	}
}

// TestManualIsComplete: each setting stands in the manual, with a comment, and those of a route in
// its example.
func TestManualIsComplete(t *testing.T) {
	text, err := os.ReadFile(manual)
	if err != nil {
		t.Fatal(err)
	}
	var doc yaml.Node
	if err := yaml.Unmarshal(text, &doc); err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(string(text), "\n")
	stated := map[string]*yaml.Node{}
	var collect func(n *yaml.Node, path string)
	collect = func(n *yaml.Node, path string) {
		for i := 0; i+1 < len(n.Content); i += 2 {
			at := join(path, n.Content[i].Value)
			stated[at] = n.Content[i]
			collect(n.Content[i+1], at)
		}
	}
	collect(doc.Content[0], "")
	c := Defaults()
	for path, s := range settings(reflect.ValueOf(&c).Elem()) {
		if s.field.Type.Kind() == reflect.Slice {
			continue
		}
		key, ok := stated[path]
		if !ok {
			t.Errorf("%s is not in the manual", path)
		} else if !strings.Contains(lines[key.Line-1], " # ") {
			t.Errorf("%s has no comment", path)
		}
	}
	for path := range settings(reflect.ValueOf(&c.Routes[0]).Elem()) {
		key, _, _ := strings.Cut(path, ".") // store: {kind: …} stands on one line
		if !regexp.MustCompile(`(?m)^#  [- ] ` + key + `: `).Match(text) {
			t.Errorf("routes[].%s is not in the manual's example", path)
		}
	}
	for _, v := range variables {
		if !bytes.Contains(text, []byte("["+v.name+"]")) {
			t.Errorf("%s is not in the manual", v.name)
		}
	}
}

// TestManualsExampleWorks: what the manual has commented out is a valid configuration.
func TestManualsExampleWorks(t *testing.T) {
	text, err := os.ReadFile(manual)
	if err != nil {
		t.Fatal(err)
	}
	// Prose has one space behind the #, an example none or several.
	example := regexp.MustCompile(`(?m)^#(\S|  )`).ReplaceAll(text, []byte("$1"))
	c := mustLoad(t, write(t, string(example)), nil)
	if len(c.Routes) != 3 || c.Routes[0].TTL != time.Hour || c.Routes[1].Phase != "phase2" || c.Routes[2].Store.ValueColumn != "analytics_cache" {
		t.Errorf("%+v", c.Routes)
	}
}

func TestColumnRoutes(t *testing.T) {
	c := mustLoad(t, write(t, `
routes:
  - {name: t, match: "t:{id}*"}
  - name: one
    match: "r:{id}"
    store: {kind: column, table: '"my app".reports', key_column: id, value_column: v, expires_column: until}
  - name: several
    match: "u:{tenant}:{id}"
    store: {kind: column, table: users, key_columns: {id: user_id, tenant: tenant_id}, value_column: v, updated_column: changed}
`), nil)
	got := c.ColumnRoutes()
	if len(got) != 2 || got[0].Route != "one" || got[0].Keys[0] != "id" || got[0].Store.ExpiresColumn != "until" ||
		!reflect.DeepEqual(got[1].Keys, []string{"tenant_id", "user_id"}) || got[1].Store.UpdatedColumn != "changed" {
		t.Errorf("%+v", got)
	}
	routes := c.PolicyRoutes()
	if routes[0].Column() || !routes[1].Column() || !reflect.DeepEqual(routes[2].Template.Names(), []string{"tenant", "id"}) {
		t.Errorf("%+v", routes)
	}
}

// TestWordsArePolicys: the words of the file are those that policy knows, all of them.
func TestWordsArePolicys(t *testing.T) {
	words := func(name string) []string {
		f, ok := reflect.TypeFor[Rules]().FieldByName(name)
		if !ok {
			t.Fatalf("no field %s", name)
		}
		return strings.Fields(f.Tag.Get("words"))
	}
	var phases []string
	for _, p := range policy.Phases() {
		phases = append(phases, p.String())
	}
	if got := words("Phase"); !reflect.DeepEqual(got, phases) {
		t.Errorf("phases %v, policy has %v", got, phases)
	}
	if got, want := words("OnUnknown"), []string{policy.UnknownMiss.String(), policy.UnknownError.String()}; !reflect.DeepEqual(got, want) {
		t.Errorf("on_unknown %v, policy has %v", got, want)
	}
	if got, want := words("WritePolicy"), []string{policy.WriteAny.String(), policy.WriteBothStores.String()}; !reflect.DeepEqual(got, want) {
		t.Errorf("write_policy %v, policy has %v", got, want)
	}
}

// TestTagsAreValid: a bound that does not parse would never hold.
func TestTagsAreValid(t *testing.T) {
	c := Defaults()
	for _, v := range []any{&c, &c.Routes[0]} {
		for path, s := range settings(reflect.ValueOf(v).Elem()) {
			for _, tag := range []string{"min", "max"} {
				bound, ok := s.field.Tag.Lookup(tag)
				if !ok {
					continue
				}
				if _, bad := parse(s.field, scalar{text: bound}); bad != nil {
					t.Errorf("%s: %s %q: %v", path, tag, bound, bad)
				}
			}
			if s.field.Type == durationType {
				d := time.Duration(s.value.Int())
				if got, want := s.field.Tag.Get("unit") == "ms", d > 0 && d < time.Second; got != want {
					t.Errorf("%s: the unit of %v is not the one that a number without is taken to have", path, d)
				}
			}
		}
	}
}

func TestPolicyRoutes(t *testing.T) {
	c := mustLoad(t, write(t, `
routes:
  - {name: a, match: "a:*", phase: drain, ttl: 1m, ttl_jitter: 10%, negative_ttl: 5s, on_unknown: error, write_policy: both}
  - {name: b, match: "b:*", phase: phase0}
`), nil)
	want := []policy.Route{
		{Name: "a", Match: "a:*", Phase: policy.Drain, TTL: time.Minute, Jitter: 0.1, NegativeTTL: 5 * time.Second,
			OnUnknown: policy.UnknownError, WritePolicy: policy.WriteBothStores},
		{Name: "b", Match: "b:*", Phase: policy.Phase0},
	}
	got := c.PolicyRoutes()
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got\n%+v\nwant\n%+v", got, want)
	}
	if _, err := policy.NewRouter(got); err != nil {
		t.Errorf("policy refuses what Load accepts: %v", err)
	}
	if !c.UsesStore() {
		t.Error("drain needs the store")
	}
}

func TestRedacted(t *testing.T) {
	c := Defaults()
	c.Listen.Password = "sesame"
	c.Redis.URL = "redis://user:sesame@host:6379/0"
	c.Postgres.URL = "postgres://user:sesame@h1,h2:5432/app?sslmode=require&sslpassword=sesame"
	r := c.Redacted()
	printed, err := yaml.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(printed, []byte("sesame")) {
		t.Errorf("a secret is printed:\n%s", printed)
	}
	if r.Listen.Password != "xxxxx" || r.Redis.URL != "redis://user:xxxxx@host:6379/0" ||
		r.Postgres.URL != "postgres://user:xxxxx@h1,h2:5432/app?sslmode=require&sslpassword=xxxxx" {
		t.Errorf("%+v", r)
	}
	if c.Listen.Password != "sesame" || !strings.Contains(c.Redis.URL, "sesame") {
		t.Error("the original was changed")
	}
	mustLoad(t, write(t, string(printed)), nil)

	c = Defaults()
	if r := c.Redacted(); !reflect.DeepEqual(*r, c) {
		t.Errorf("without secrets: %+v", r)
	}
	c.Listen.Password, c.Listen.PasswordFile = "sesame", "/run/secrets/password"
	if r := c.Redacted(); r.Listen.Password != "" || r.Listen.PasswordFile != "/run/secrets/password" {
		t.Errorf("with a password file: %+v", r.Listen)
	}
}

func TestRedactURL(t *testing.T) {
	for raw, want := range map[string]string{
		"":                                  "",
		"sesame":                            "xxxxx",
		"redis://host/0":                    "redis://host/0",
		"redis://:sesame@host":              "redis://:xxxxx@host",
		"redis://u:ses@me@host":             "redis://u:xxxxx@host",
		"unix://u:sesame@/run/r.sock?db=1":  "unix://u:xxxxx@/run/r.sock?db=1",
		"redis://u:ses/ame@host":            "redis://xxxxx",
		"postgres://u:ses?ame@host/db":      "postgres://xxxxx",
		"postgres://h?password=sesame":      "postgres://h?password=xxxxx",
		"postgres://h/db?a=1&Password=s&b=": "postgres://h/db?a=1&Password=xxxxx&b=",
		"postgres://user@h/db":              "postgres://user@h/db",
	} {
		if got := redactURL(raw); got != want {
			t.Errorf("%s: %s, want %s", raw, got, want)
		}
	}
}

func TestDiff(t *testing.T) {
	a, b := Defaults(), Defaults()
	if got := Diff(&a, &b); got != nil {
		t.Errorf("equal: %v", got)
	}
	b.Routes, b.Default.TTL, b.Log.Level, b.Health.ReadyRequires = nil, time.Hour, "debug", "any"
	if got := Diff(&a, &b); got != nil {
		t.Errorf("only what a running proxy takes over: %v", got)
	}
	b.Listen.Address, b.Listen.TLS.CertFile, b.Listen.Password = ":1", "x", "x"
	b.Limits.MaxQueryBuffer, b.Redis.URL, b.Postgres.URL, b.Admin.Address = MiB, "", "", ""
	want := []string{"listen.address", "listen.tls.cert_file", "listen.password", "limits.max_query_buffer", "admin.address", "redis.url", "postgres.url"}
	if got := Diff(&a, &b); !reflect.DeepEqual(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}
