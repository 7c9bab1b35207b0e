package main

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"cacheproxy/internal/testenv"

	"go.yaml.in/yaml/v3"
)

const (
	alertsFile    = "../../deploy/prometheus/alerts.yaml"
	alertsTests   = "../../deploy/prometheus/alerts_test.yaml"
	dashboardFile = "../../deploy/grafana/cacheproxy.json"
	runbook       = "docs/troubleshooting.md"
)

// tool is the path of a program that a package of Prometheus brings. A missing one fails the test.
func tool(t *testing.T, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		t.Fatalf("%v; `sh scripts/install-deps.sh test` installs it", err)
	}
	return path
}

type alert struct {
	Name        string `yaml:"alert"`
	Expr        string
	For         string
	Labels      map[string]string
	Annotations map[string]string
}

func alerts(t *testing.T) (all []alert) {
	t.Helper()
	b, err := os.ReadFile(alertsFile)
	if err != nil {
		t.Fatal(err)
	}
	var file struct{ Groups []struct{ Rules []alert } }
	if err := yaml.Unmarshal(b, &file); err != nil {
		t.Fatal(err)
	}
	for _, g := range file.Groups {
		all = append(all, g.Rules...)
	}
	if len(all) < 10 {
		t.Fatalf("%d alerts", len(all))
	}
	return all
}

// grouping is how an expression of an alert takes series together: an aggregation with its labels, if it has any, or the labels by which two match.
var grouping = regexp.MustCompile(`\b(?:sum|min|max|count|avg|on)\b(?:(?: by)? ?\(([a-z_, ]*)\))?`)

// Each alert is raised by what it is about and not by what looks like it, as promtool sees it, and says where to read on.
func TestAlertRules(t *testing.T) {
	promtool := tool(t, "promtool")
	for _, args := range [][]string{{"check", "rules", alertsFile}, {"test", "rules", alertsTests}} {
		if out, err := exec.Command(promtool, args...).CombinedOutput(); err != nil {
			t.Errorf("promtool %s: %v\n%s", strings.Join(args, " "), err, out)
		}
	}
	tests, err := os.ReadFile(alertsTests)
	if err != nil {
		t.Fatal(err)
	}
	doc, err := os.ReadFile("../../" + runbook)
	if err != nil {
		t.Fatal(err)
	}
	all := alerts(t)
	for _, a := range all {
		if a.Annotations["summary"] == "" || a.Annotations["description"] == "" || a.Labels["severity"] != "warning" && a.Labels["severity"] != "critical" {
			t.Errorf("%s lacks a summary, a description or a severity", a.Name)
		}
		if want := runbook + "#" + strings.ToLower(a.Name); a.Annotations["runbook_url"] != want {
			t.Errorf("%s sends to %q, want %q", a.Name, a.Annotations["runbook_url"], want)
		}
		_, section, ok := strings.Cut(string(doc), "\n### "+a.Name+"\n")
		section, _, _ = strings.Cut(section, "\n#")
		for _, part := range []string{"**Symptom.**", "**Causes.**", "**Remedy.**", "```sh"} {
			if !ok || !strings.Contains(section, part) {
				t.Errorf("%s has no %s in %s", a.Name, part, runbook)
			}
		}
		// Without them applications that know nothing of one another would be added up.
		for _, m := range grouping.FindAllStringSubmatch(a.Expr, -1) {
			if !strings.HasPrefix(m[1]+", ", "namespace, job, ") {
				t.Errorf("%s takes together what is not of one job: %s", a.Name, m[0])
			}
		}
		if !regexp.MustCompile(`alertname: ` + a.Name + `\n\s+eval_time: \S+\n\s+exp_alerts:\n`).Match(tests) {
			t.Errorf("nothing raises %s in %s", a.Name, alertsTests)
		}
	}
	for _, m := range regexp.MustCompile(`(?m)^### (Cacheproxy\w+)$`).FindAllStringSubmatch(string(doc), -1) {
		if !slices.ContainsFunc(all, func(a alert) bool { return a.Name == m[1] }) {
			t.Errorf("%s is in %s and no alert", m[1], runbook)
		}
	}

	// What promtool must object to: each expression the other way round.
	dir := t.TempDir()
	rules, err := os.ReadFile(alertsFile)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "alerts_test.yaml"), tests, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, change := range [][2]string{{"> 60\n", "> 600\n"}, {"for: 30m", "for: 3m"}, {`source!="redis"`, `source="redis"`}, {"humanizePercentage", "humanize"},
		{"== 2\n", ">= 1\n"}, {"phase2|drain|phase3", "drain|phase3"}, {`{phase="phase3"}`, `{phase="drain"}`},
		{"count by (namespace, job, upstream)", "count by (job, upstream)"}, {`and on (namespace, job, route) cacheproxy_route_info{phase=~"phase2`, `and on (route) cacheproxy_route_info{phase=~"phase2`},
	} {
		wrong := strings.Replace(string(rules), change[0], change[1], 1)
		if wrong == string(rules) {
			t.Fatalf("the rules have no %q", change[0])
		}
		if err := os.WriteFile(filepath.Join(dir, "alerts.yaml"), []byte(wrong), 0o600); err != nil {
			t.Fatal(err)
		}
		if exec.Command(promtool, "test", "rules", filepath.Join(dir, "alerts_test.yaml")).Run() == nil {
			t.Errorf("%q instead of %q passes the tests", change[1], change[0])
		}
	}
}

// What the README for Kubernetes has for a Prometheus without the Operator is a configuration, and its job is one that CacheproxyDown looks at.
func TestScrapeConfigOfREADME(t *testing.T) {
	readme, err := os.ReadFile("../../deploy/k8s/README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, block, _ := strings.Cut(string(readme), "\n  scrape_configs:\n")
	block, _, ok := strings.Cut(block, "  ```")
	if !ok {
		t.Fatal("the README has no scrape_configs")
	}
	block = "scrape_configs:\n" + strings.ReplaceAll("\n"+block, "\n  ", "\n")
	// Debian's promtool does not know how pods are discovered; the rest it does.
	const discovery = "kubernetes_sd_configs: [{role: pod}]"
	if !strings.Contains(block, discovery) {
		t.Fatalf("the README has no %s", discovery)
	}
	block = strings.Replace(block, discovery, "static_configs: [{targets: [pod]}]", 1)
	path := filepath.Join(t.TempDir(), "prometheus.yml")
	for _, c := range []struct {
		text string
		ok   bool
	}{{block, true}, {strings.Replace(block, "action: keep", "action: retain", 1), false}} {
		if err := os.WriteFile(path, []byte(c.text), 0o600); err != nil {
			t.Fatal(err)
		}
		if out, err := exec.Command(tool(t, "promtool"), "check", "config", path).CombinedOutput(); (err == nil) != c.ok {
			t.Errorf("%v %s\n%s", err, out, c.text)
		}
	}
	name := regexp.MustCompile(`job_name: (\S+)`).FindStringSubmatch(block)
	down := regexp.MustCompile(`up\{job=~"(.*)"\}`).FindStringSubmatch(alerts(t)[0].Expr)
	if name == nil || down == nil || !regexp.MustCompile("^(?:"+down[1]+")$").MatchString(name[1]) {
		t.Errorf("%s does not look at the job %v", alerts(t)[0].Name, name)
	}
	for _, part := range []string{`[__meta_kubernetes_namespace], target_label: namespace}`, "__meta_kubernetes_pod_label_cacheproxy_dev_injected", "regex: true;cp-observe"} {
		if !strings.Contains(block, part) {
			t.Errorf("the README has no %s", part)
		}
	}
}

// prometheus is a real one that scrapes the site.
type prometheus struct {
	t       *testing.T
	address string
}

func (s *site) scrapedBy() *prometheus {
	s.t.Helper()
	p := &prometheus{s.t, fmt.Sprintf("127.0.0.1:%d", testenv.FreePort(s.t))}
	config := filepath.Join(s.dir, "prometheus.yml")
	text := fmt.Sprintf("global: {scrape_interval: 1s}\nscrape_configs:\n  - {job_name: cacheproxy, static_configs: [{targets: [%q], labels: {namespace: shop}}]}\n", s.observe)
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		s.t.Fatal(err)
	}
	s.start(exec.Command(tool(s.t, "prometheus"), "--config.file="+config, "--storage.tsdb.path="+filepath.Join(s.dir, "tsdb"), "--web.listen-address="+p.address, "--log.level=error"))
	return p
}

// ask evaluates an expression: how many series it gives, and what is wrong with it.
func (p *prometheus) ask(expr string) (series int, problem string) {
	resp, err := http.Get("http://" + p.address + "/api/v1/query?query=" + url.QueryEscape(expr))
	if err != nil {
		return 0, err.Error()
	}
	defer resp.Body.Close()
	var answer struct {
		Error string
		Data  struct{ Result json.RawMessage }
	}
	if err := json.NewDecoder(resp.Body).Decode(&answer); err != nil {
		return 0, err.Error()
	}
	if answer.Error != "" {
		return 0, answer.Error
	}
	var list []json.RawMessage
	_ = json.Unmarshal(answer.Data.Result, &list)
	return len(list), ""
}

var (
	selector = regexp.MustCompile(`\b(?:cacheproxy|process|go)_[a-z_]+(?:\{[^}]*\})?|\bup\{[^}]*\}`)
	words    = regexp.MustCompile(`(\w+)=~"(\w+(?:\|\w+)+)"`)
)

// problems are what is wrong with an expression: it must be one, and each series that it selects must be there, for each of the words that a label may be.
func (p *prometheus) problems(expr string) (out []string) {
	if _, problem := p.ask(expr); problem != "" {
		return []string{problem}
	}
	found := selector.FindAllString(expr, -1)
	if len(found) == 0 {
		out = append(out, "it selects nothing that we know")
	}
	for _, one := range found {
		each := []string{one}
		if m := words.FindStringSubmatch(one); m != nil {
			each = nil
			for _, word := range strings.Split(m[2], "|") {
				each = append(each, strings.Replace(one, m[0], m[1]+`="`+word+`"`, 1))
			}
		}
		for _, sel := range each {
			if n, problem := p.ask(sel); n == 0 {
				out = append(out, "no series "+sel+" "+problem)
			}
		}
	}
	return out
}

// panels are the expressions of the dashboard, by title, with what Grafana puts in for variables.
func panels(t *testing.T) map[string][]string {
	t.Helper()
	b, err := os.ReadFile(dashboardFile)
	if err != nil {
		t.Fatal(err)
	}
	var d struct {
		Panels []struct {
			ID      int
			Type    string
			Title   string
			Targets []struct{ Expr string }
		}
		Templating struct {
			List []struct{ Name, Type, Definition string }
		}
	}
	if err := json.Unmarshal(b, &d); err != nil {
		t.Fatal(err)
	}
	known := strings.NewReplacer("$__rate_interval", "1m", "$namespace", ".*", "$job", ".*", "$instance", ".*", "$route", ".*")
	out, ids := map[string][]string{}, map[int]bool{}
	for _, p := range d.Panels {
		if ids[p.ID] || p.Title == "" {
			t.Errorf("the panel %d %q has an id or a title that is not its own", p.ID, p.Title)
		}
		ids[p.ID] = true
		for _, target := range p.Targets {
			for _, sel := range selector.FindAllString(target.Expr, -1) {
				if !strings.Contains(sel, `{namespace=~"$namespace",job=~"$job",instance=~"$instance"`) {
					t.Errorf("%s does not heed what was chosen: %s", p.Title, sel)
				}
			}
			expr := known.Replace(target.Expr)
			if strings.Contains(expr, "$") {
				t.Errorf("%s: unknown variable in %s", p.Title, expr)
			}
			out[p.Title] = append(out[p.Title], expr)
		}
		if p.Type != "row" && len(out[p.Title]) == 0 {
			t.Errorf("%s has no expression", p.Title)
		}
	}
	for _, v := range d.Templating.List {
		if v.Type != "query" {
			continue
		}
		m := regexp.MustCompile(`^label_values\((\w+)(?:\{(.*)\})?, (\w+)\)$`).FindStringSubmatch(v.Definition)
		if m == nil {
			t.Errorf("variable %s: %q", v.Name, v.Definition)
			continue
		}
		out["variable "+v.Name] = []string{m[1] + `{` + m[3] + `!="",` + known.Replace(m[2]) + `}`}
	}
	if len(out) < 20 {
		t.Fatalf("%d panels", len(out))
	}
	return out
}

// A real Prometheus that scrapes the program evaluates every expression of the alerts and of the dashboard.
func TestExpressionsAgainstPrometheus(t *testing.T) {
	server := testenv.Redis(t)
	link := testenv.NewLink(t, server.Addr())
	s := newSite(t, "redis://"+link.Addr()+"/0", testenv.Postgres(t))
	every := routes
	for _, phase := range []string{"phase0", "drain", "phase3"} { // the others have a route there
		every += fmt.Sprintf("  - {name: %s, match: \"%s:*\", phase: %s}\n", phase, phase, phase)
	}
	s.write(every)
	s.execBuilt("serve", "--config", s.config)
	p := s.scrapedBy()
	s.started()
	eventually(t, "it is scraped", func() bool { n, _ := p.ask("cacheproxy_build_info"); return n == 1 })
	traffic := func() {
		for _, args := range [][]any{{"SET", "user:1", "v"}, {"GET", "user:1"}, {"GET", "user:2"}, {"SET", "report:1", "v"}, {"GET", "elsewhere"}} {
			s.do(args...)
		}
	}
	traffic()
	link.Cut()
	s.do("SET", "user:1", "new")
	link.Heal()
	eventually(t, "it is repaired", func() bool { return s.do("GET", "user:1") == "new" })

	for _, a := range alerts(t) {
		for _, problem := range p.problems(a.Expr) {
			t.Errorf("%s: %s", a.Name, problem)
		}
	}
	for title, exprs := range panels(t) {
		for _, expr := range exprs {
			for _, problem := range p.problems(expr) {
				t.Errorf("%s: %s", title, problem)
			}
			eventually(t, title+" shows something: "+expr, func() bool {
				traffic() // a rate has two values at least
				n, _ := p.ask(expr)
				return n > 0
			})
		}
	}

	// What must be found.
	for _, wrong := range []string{
		"sum(rate(cacheproxy_commands_total[5m])", "rate(cacheproxy_no_such_total[5m])", `cacheproxy_reads_total{source="postgres"}`, "vector(1)",
		`cacheproxy_redis_errors_total{reason=~"oom|out_of_memory"}`, `sum by (route) (rate(cacheproxy_commands_total{route="user"}[5m]))`,
	} {
		if len(p.problems(wrong)) == 0 {
			t.Errorf("nothing is said against %s", wrong)
		}
	}
}
