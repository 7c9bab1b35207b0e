package k8s

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"cacheproxy/internal/config"
	"cacheproxy/test/deploy/lab"

	core "k8s.io/api/core/v1"
	networking "k8s.io/api/networking/v1"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"sigs.k8s.io/yaml"
)

// judged renders, decodes and judges, and returns what there is and everything that is wrong with it.
func judged(t *testing.T, text string, err error) (set, []string) {
	t.Helper()
	if err != nil {
		return set{}, []string{err.Error()}
	}
	s, problems := decode(text)
	return s, append(problems, s.judge()...)
}

func demo(t *testing.T) set {
	t.Helper()
	text, err := render(filepath.Join(manifests, "overlays", "demo"))
	s, problems := judged(t, text, err)
	if len(problems) > 0 {
		t.Fatal(strings.Join(problems, "\n"))
	}
	return s
}

func (s *set) workload(t *testing.T, name string) workload {
	t.Helper()
	i := slices.IndexFunc(s.workloads, func(w workload) bool { return w.name == name })
	if i < 0 {
		t.Fatalf("there is no %s", name)
	}
	return s.workloads[i]
}

func TestDemo(t *testing.T) {
	s := demo(t)
	if len(s.workloads) != 3 || len(s.services) != 2 || len(s.policies) != 3 || len(s.namespaces) != 1 {
		t.Errorf("%d workloads, %d services, %d policies, %d namespaces", len(s.workloads), len(s.services), len(s.policies), len(s.namespaces))
	}
	for _, w := range s.workloads {
		if has := w.pod.Labels[injected] == "true"; has != (w.name == "app") {
			t.Errorf("%s has a sidecar: %v", w.name, has)
		}
	}
}

// theirs is a workload of somebody else, as they have it.
func theirs(kind string) string {
	api, restart := "apps/v1", ""
	spec := "selector: {matchLabels: {app: shop}}\n  "
	switch kind {
	case "Job":
		api, spec, restart = "batch/v1", "", "restartPolicy: Never"
	case "StatefulSet":
		spec += "serviceName: shop\n  "
	}
	return `apiVersion: ` + api + `
kind: ` + kind + `
metadata: {name: shop, labels: {cacheproxy.dev/inject: enabled}}
spec:
  ` + spec + `template:
    metadata: {labels: {app: shop}}
    spec:
      ` + restart + `
      automountServiceAccountToken: false
      securityContext: {runAsNonRoot: true, runAsUser: 1000, seccompProfile: {type: RuntimeDefault}}
      initContainers:
        - {name: migrate, image: shop, args: [migrate], securityContext: &s {allowPrivilegeEscalation: false, readOnlyRootFilesystem: true, capabilities: {drop: [ALL]}}}
      containers:
        - {name: shop, image: shop, securityContext: *s, volumeMounts: [{name: work, mountPath: /work}]}
      volumes: [{name: work, emptyDir: {}}]
`
}

const around = `
apiVersion: kustomize.config.k8s.io/v1beta1
kind: Kustomization
namespace: shop
resources: [shop.yaml, BASE/base]
components: [BASE/components/sidecar, BASE/components/podmonitor, BASE/components/networkpolicy, BASE/components/networkpolicy-rest, BASE/components/networkpolicy-egress]
images: [{name: cacheproxy, newName: registry.example.com/cacheproxy, newTag: v1.0.0}]
secretGenerator:
  - {name: cacheproxy, literals: [redis-password=a, postgres-password=b]}
generatorOptions: {disableNameSuffixHash: true}
`

// The component adds the sidecar to what somebody else has, whatever kind of workload it is, and leaves the rest as it was.
func TestSidecarForOthers(t *testing.T) {
	for _, kind := range []string{"Deployment", "StatefulSet", "DaemonSet", "Job"} {
		t.Run(kind, func(t *testing.T) {
			text, err := overlay(t, around, map[string]string{"shop.yaml": theirs(kind)})
			s, problems := judged(t, text, err)
			if len(problems) > 0 {
				t.Fatalf("%s\n%s", strings.Join(problems, "\n"), text)
			}
			pod := s.workload(t, "shop").pod
			var names []string
			for _, c := range pod.Spec.InitContainers {
				names = append(names, c.Name)
			}
			if !slices.Equal(names, []string{"cacheproxy", "migrate"}) || pod.Spec.InitContainers[0].Image != "registry.example.com/cacheproxy:v1.0.0" {
				t.Errorf("init containers %v", names)
			}
			if len(pod.Spec.Containers) != 1 || len(pod.Spec.Volumes) != 3 || pod.Labels["app"] != "shop" || len(s.monitors) != 1 || len(s.policies) != 3 {
				t.Errorf("not as it was:\n%s", text)
			}
		})
	}
	t.Run("without the label", func(t *testing.T) {
		text, err := overlay(t, around, map[string]string{"shop.yaml": strings.Replace(theirs("Deployment"), "inject: enabled", "inject: disabled", 1)})
		s, problems := judged(t, text, err)
		if len(s.workloads) != 1 || len(s.workloads[0].pod.Spec.InitContainers) != 1 {
			t.Errorf("%v\n%s", problems, text)
		}
		// What the other components are for is then not there, and the judge says so.
		if len(problems) != 4 {
			t.Errorf("problems %q", problems)
		}
	})
}

// The kustomization that the README tells to write is one that works, with its Secret made by hand.
func TestREADME(t *testing.T) {
	readme, err := os.ReadFile(filepath.Join(manifests, "README.md"))
	if err != nil {
		t.Fatal(err)
	}
	_, block, _ := strings.Cut(string(readme), "```yaml\n")
	block, _, ok := strings.Cut(block, "```")
	if !ok {
		t.Fatal("the README has no kustomization")
	}
	block = lab.Replace(t, strings.ReplaceAll(block, "\n   ", "\n"), "path/to/deploy/k8s", "BASE")
	config, err := os.ReadFile(filepath.Join(manifests, "base", "config.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	text, err := overlay(t, strings.TrimPrefix(block, "   "), map[string]string{"deployment.yaml": theirs("Deployment"), "config.yaml": string(config)})
	s, problems := judged(t, text, err)
	if !slices.Equal(problems, []string{
		"shop: the configuration names redis-password, which is in no Secret cacheproxy", "shop: the configuration names postgres-password, which is in no Secret cacheproxy",
	}) || len(s.monitors) != 1 || s.configMaps["cacheproxy"].Data["config.yaml"] != string(config) {
		t.Errorf("%q\n%s", problems, text)
	}
	// With stores that have no passwords nothing is missing.
	without := regexp.MustCompile(`(?m)^ +password_file: .*\n`).ReplaceAllString(string(config), "")
	text, err = overlay(t, strings.TrimPrefix(block, "   "), map[string]string{"deployment.yaml": theirs("Deployment"), "config.yaml": without})
	if _, problems := judged(t, text, err); len(problems) > 0 || without == string(config) {
		t.Errorf("%q\n%s", problems, text)
	}
	for name := range demo(t).secrets["cacheproxy"].Data {
		if !strings.Contains(string(readme), "--from-file="+name) {
			t.Errorf("the Secret of the README has no %s", name)
		}
	}
}

// Each of these is a mistake that somebody could make in an overlay, or we in ours, and is found.
func TestWrongVariants(t *testing.T) {
	const sidecar = "/spec/template/spec/initContainers/0"
	for _, c := range []struct{ name, patch, says string }{
		{"a misspelt field", `[{op: add, path: ` + sidecar + `/restartPolicyy, value: Always}]`, `unknown field "spec.template.spec.initContainers[0].restartPolicyy"`},
		{"a word for a number", `[{op: replace, path: /spec/replicas, value: two}]`, "cannot unmarshal string"},
		{"not native", `[{op: remove, path: ` + sidecar + `/restartPolicy}]`, "no restartPolicy: Always"},
		{"behind another one", `[{op: move, from: /spec/template/spec/initContainers/1, path: ` + sidecar + `}]`, "not the first init container"},
		{"preStop", `[{op: add, path: ` + sidecar + `/lifecycle, value: {preStop: {sleep: {seconds: 5}}}}]`, "has a hook"},
		{"readiness", `[{op: add, path: ` + sidecar + `/readinessProbe, value: {httpGet: {path: /readyz, port: cp-observe}}}]`, "readiness probe"},
		{"no startup probe", `[{op: remove, path: ` + sidecar + `/startupProbe}]`, "startup probe does not ask /startupz"},
		{"liveness of the stores", `[{op: replace, path: ` + sidecar + `/livenessProbe/httpGet/path, value: /readyz}]`, "liveness probe does not ask /livez"},
		{"a probe of another host", `[{op: add, path: ` + sidecar + `/livenessProbe/httpGet/host, value: 127.0.0.1}]`, "probe or lifecycle host"},
		{"a probe of no port", `[{op: replace, path: ` + sidecar + `/livenessProbe/httpGet/port, value: observe}]`, "which it does not have"},
		{"root", `[{op: replace, path: ` + sidecar + `/securityContext/runAsUser, value: 0}]`, "runAsUser=0"},
		{"another user", `[{op: replace, path: ` + sidecar + `/securityContext/runAsUser, value: 1000}]`, "the image's user"},
		{"privileges", `[{op: replace, path: ` + sidecar + `/securityContext/allowPrivilegeEscalation, value: true}]`, "allowPrivilegeEscalation"},
		{"capabilities", `[{op: remove, path: ` + sidecar + `/securityContext/capabilities}]`, "unrestricted capabilities"},
		{"no seccomp", `[{op: remove, path: ` + sidecar + `/securityContext/seccompProfile}, {op: remove, path: /spec/template/spec/securityContext/seccompProfile}]`, "seccompProfile"},
		{"a writable root", `[{op: remove, path: ` + sidecar + `/securityContext/readOnlyRootFilesystem}]`, "write to its root"},
		{"the host's network", `[{op: add, path: /spec/template/spec/hostNetwork, value: true}]`, "host namespaces"},
		{"a file alone", `[{op: add, path: ` + sidecar + `/volumeMounts/0/subPath, value: config.yaml}]`, "subPath"},
		{"a writable mount", `[{op: remove, path: ` + sidecar + `/volumeMounts/1/readOnly}]`, "can write to /run/secrets/cacheproxy"},
		{"a mount in a mount", `[{op: replace, path: ` + sidecar + `/volumeMounts/1/mountPath, value: /etc/cacheproxy/secrets}]`, "no folder can be made"},
		{"a secret in the environment", `[{op: add, path: ` + sidecar + `/env/-, value: {name: REDIS_URL, valueFrom: {secretKeyRef: {name: cacheproxy, key: redis-url}}}}]`, "secret in its environment"},
		{"an address of IPv4 alone", `[{op: replace, path: ` + sidecar + `/env/1/value, value: "0.0.0.0:9180"}]`, "reached over IPv4 and IPv6"},
		{"a Secret that must be there", `[{op: remove, path: /spec/template/spec/volumes/1/secret/optional}]`, "hangs without passwords"},
		{"a Secret of another name", `[{op: replace, path: /spec/template/spec/volumes/1/secret/secretName, value: other}]`, "names redis-password, which is in no Secret other"},
		{"no secrets", `[{op: remove, path: ` + sidecar + `/volumeMounts/1}]`, "lacks its configuration or its secrets"},
		{"another config file", `[{op: replace, path: ` + sidecar + `/env/0/value, value: /etc/cacheproxy/cacheproxy.yaml}]`, "has no cacheproxy.yaml"},
		{"a volume of nothing", `[{op: replace, path: /spec/template/spec/volumes/0/configMap/name, value: other}]`, "no ConfigMap other"},
		{"a limit of processor time", `[{op: add, path: ` + sidecar + `/resources/limits/cpu, value: 100m}]`, "processor time"},
		{"no limit of memory", `[{op: remove, path: ` + sidecar + `/resources/limits}]`, "no limit for its memory"},
		{"a token", `[{op: remove, path: /spec/template/spec/automountServiceAccountToken}]`, "token of the API server"},
		{"no account", `[{op: replace, path: /spec/template/spec/serviceAccountName, value: other}]`, "no service account other"},
		{"without its label", `[{op: remove, path: /spec/template/metadata/labels/cacheproxy.dev~1injected}]`, "is for no pod"},
	} {
		t.Run(c.name, func(t *testing.T) {
			patch, err := yaml.YAMLToJSON([]byte(c.patch))
			if err != nil {
				t.Fatal(err)
			}
			text, err := overlay(t, `
apiVersion: kustomize.config.k8s.io/v1beta1
kind: Kustomization
resources: [BASE/overlays/demo]
patches: [{path: patch.json, target: {kind: Deployment, name: app}}]
`, map[string]string{"patch.json": string(patch)})
			if err != nil {
				t.Fatal(err)
			}
			_, problems := judged(t, text, nil)
			if !strings.Contains(strings.Join(problems, "\n"), c.says) {
				t.Errorf("problems %q", problems)
			}
		})
	}
	t.Run("a monitor's field", func(t *testing.T) {
		_, problems := decode("apiVersion: monitoring.coreos.com/v1\nkind: PodMonitor\nmetadata: {name: x}\nspec: {selector: {}, podMetricEndpoints: []}\n")
		if len(problems) != 1 || !strings.Contains(problems[0], `unknown field "spec.podMetricEndpoints"`) {
			t.Errorf("%q", problems)
		}
	})
	t.Run("a field twice", func(t *testing.T) {
		_, problems := decode("apiVersion: v1\nkind: ConfigMap\nmetadata: {name: x}\ndata: {a: b}\ndata: {a: c}\n")
		if len(problems) != 1 || !strings.Contains(problems[0], "already set") {
			t.Errorf("%q", problems)
		}
	})
}

// What the README makes of the alert rules is what the Prometheus Operator takes.
func TestAlertsForTheOperator(t *testing.T) {
	readme, err := os.ReadFile(filepath.Join(manifests, "README.md"))
	if err != nil {
		t.Fatal(err)
	}
	_, command, _ := strings.Cut(string(readme), "{ printf")
	command, _, ok := strings.Cut(command, " | kubectl -n monitoring apply -f -")
	if !ok {
		t.Fatal("the README has no such command")
	}
	cmd := exec.Command("sh", "-euc", "{ printf"+command)
	cmd.Dir = filepath.Join(manifests, "..", "..")
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	s, problems := decode(string(out))
	if len(problems) > 0 || len(s.rules) != 1 {
		t.Fatalf("%q\n%s", problems, out)
	}
	alerts, err := os.ReadFile(filepath.Join(manifests, "..", "prometheus", "alerts.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, group := range s.rules[0].Spec.Groups {
		n += len(group.Rules)
	}
	if want := strings.Count(string(alerts), "- alert: "); n != want || n == 0 {
		t.Errorf("%d rules of %d", n, want)
	}
}

// Policies add up. That for the metrics admits nobody else to anything, so that it opens nothing that a namespace keeps closed; that for the rest
// opens everything but the metrics.
func TestNetworkPolicy(t *testing.T) {
	const policy = `
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: theirs}
spec:
  podSelector: {}
  policyTypes: [Ingress]
  ingress: [{from: [{podSelector: {matchLabels: {app: front}}}], ports: [{protocol: TCP, port: 8080}]}]
`
	const metrics, front, everybody = "monitoring", "front", "everybody"
	for _, c := range []struct {
		name, components string
		want             func(core.Protocol, int32) string
	}{
		{"metrics, in a namespace with policies", "BASE/components/networkpolicy", func(protocol core.Protocol, port int32) string {
			switch {
			case protocol == core.ProtocolTCP && port == 9180:
				return metrics
			case protocol == core.ProtocolTCP && port == 8080:
				return front
			}
			return ""
		}},
		{"metrics and the rest", "BASE/components/networkpolicy, BASE/components/networkpolicy-rest", func(protocol core.Protocol, port int32) string {
			if protocol == core.ProtocolTCP && port == 9180 {
				return metrics
			}
			return everybody
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			resources := "shop.yaml, BASE/base"
			if !strings.Contains(c.components, "-rest") {
				resources += ", theirs.yaml"
			}
			text, err := overlay(t, `
apiVersion: kustomize.config.k8s.io/v1beta1
kind: Kustomization
resources: [`+resources+`]
components: [BASE/components/sidecar, `+c.components+`]
`, map[string]string{"shop.yaml": theirs("Deployment"), "theirs.yaml": policy})
			if err != nil {
				t.Fatal(err)
			}
			s, _ := decode(text)
			pod := s.workload(t, "shop").pod
			for port := int32(1); port <= 65535; port++ {
				for _, protocol := range []core.Protocol{core.ProtocolTCP, core.ProtocolUDP, core.ProtocolSCTP} {
					if got, want := s.admitted(t, pod, protocol, port), c.want(protocol, port); got != want {
						t.Fatalf("%s %d is open to %q, want %q", protocol, port, got, want)
					}
				}
			}
		})
	}
}

// admitted says who may reach a port of a pod, by all policies together: nobody is "", and several are separated by commas.
func (s *set) admitted(t *testing.T, pod core.PodTemplateSpec, protocol core.Protocol, port int32) string {
	t.Helper()
	var who []string
	selected := false
	for _, p := range s.policies {
		if selector, err := meta.LabelSelectorAsSelector(&p.Spec.PodSelector); err != nil {
			t.Fatal(err)
		} else if !selector.Matches(labels.Set(pod.Labels)) || !slices.Contains(p.Spec.PolicyTypes, networking.PolicyTypeIngress) {
			continue
		}
		selected = true
		for _, rule := range p.Spec.Ingress {
			if !covers(rule.Ports, protocol, port) {
				continue
			}
			if len(rule.From) == 0 {
				return "everybody"
			}
			for _, from := range rule.From {
				for _, sel := range []*meta.LabelSelector{from.NamespaceSelector, from.PodSelector} {
					if sel != nil {
						for _, value := range sel.MatchLabels {
							who = append(who, value)
						}
					}
				}
			}
		}
	}
	if !selected {
		return "everybody"
	}
	return strings.Join(who, ",")
}

// covers tells whether a port is among those of a rule.
func covers(ports []networking.NetworkPolicyPort, protocol core.Protocol, port int32) bool {
	return slices.ContainsFunc(ports, func(p networking.NetworkPolicyPort) bool {
		last := p.Port.IntVal
		if p.EndPort != nil {
			last = *p.EndPort
		}
		return *p.Protocol == protocol && p.Port.IntVal <= port && port <= last
	})
}

// A pod may reach the stores and DNS wherever they are: a cache of names on the node is no pod, and OpenShift's listens on another port.
func TestEgress(t *testing.T) {
	policies := demo(t).policies
	i := slices.IndexFunc(policies, func(p *networking.NetworkPolicy) bool { return p.Name == "cacheproxy-egress" })
	if i < 0 {
		t.Fatal("there is no such policy")
	}
	open := map[string]bool{"TCP 6379": true, "TCP 5432": true, "UDP 53": true, "TCP 53": true, "UDP 5353": true, "TCP 5353": true}
	for _, protocol := range []core.Protocol{core.ProtocolTCP, core.ProtocolUDP, core.ProtocolSCTP} {
		for port := int32(1); port <= 65535; port++ {
			anywhere := slices.ContainsFunc(policies[i].Spec.Egress, func(r networking.NetworkPolicyEgressRule) bool {
				return len(r.To) == 0 && covers(r.Ports, protocol, port)
			})
			if anywhere != open[fmt.Sprintf("%s %d", protocol, port)] {
				t.Errorf("%s %d is open: %v", protocol, port, anywhere)
			}
		}
	}
}

// The program takes every configuration that is shipped here.
func TestConfigurations(t *testing.T) {
	secrets := lab.Secrets(t, map[string]string{"redis-password": "a", "postgres-password": "b"})
	var files []string
	for _, name := range []string{"base/config.yaml", "overlays/demo/config.yaml"} {
		text, err := os.ReadFile(filepath.Join(manifests, name))
		if err != nil {
			t.Fatal(err)
		}
		files = append(files, string(text))
	}
	// In a pod without the Secret, which may start without it.
	path := filepath.Join(t.TempDir(), "config.yaml")
	if err := os.WriteFile(path, []byte(lab.Replace(t, files[0], "/run/secrets/cacheproxy/", t.TempDir()+"/")), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := config.Load(path, nil)
	for _, setting := range []string{"redis.password_file", "postgres.password_file"} {
		if !strings.Contains(fmt.Sprint(err), setting+": the file cannot be read: no such file") {
			t.Errorf("without %s: %v", setting, err)
		}
	}
	rendered := demo(t)
	files = append(files, rendered.configMaps["cacheproxy"].Data["config.yaml"])
	if files[2] != files[1] {
		t.Error("the demo's ConfigMap is not its file")
	}
	for _, text := range files {
		path := filepath.Join(t.TempDir(), "config.yaml")
		if err := os.WriteFile(path, []byte(lab.Replace(t, text, "/run/secrets/cacheproxy/", secrets+"/")), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := config.Load(path, nil); err != nil {
			t.Errorf("%v\n%s", err, text)
		}
		// What the README says to uncomment is right too.
		var uncommented strings.Builder
		for line := range strings.Lines(text) {
			if strings.HasPrefix(line, "#routes:") || strings.HasPrefix(line, "#  ") {
				line = line[1:]
			}
			if line == "routes: []\n" {
				continue
			}
			uncommented.WriteString(line)
		}
		var parsed map[string]any
		if err := yaml.Unmarshal([]byte(uncommented.String()), &parsed); err != nil || parsed["routes"] == nil {
			t.Errorf("%v: the example in the comment:\n%s", err, uncommented.String())
		}
	}
}
