package k8s

import (
	"os"
	"reflect"
	"strings"
	"testing"

	core "k8s.io/api/core/v1"
)

// The Job that the guide shows is one that a server takes, and its pod has of the sidecar's what migrate needs.
func TestGuidesJob(t *testing.T) {
	guide, err := os.ReadFile("../../../docs/migration-guide.md")
	if err != nil {
		t.Fatal(err)
	}
	_, text, _ := strings.Cut(string(guide), "\n## In Kubernetes and Compose\n")
	_, text, _ = strings.Cut(text, "```yaml\n")
	text, _, ok := strings.Cut(text, "```")
	if !ok {
		t.Fatal("the guide has no manifest")
	}
	job, problems := decode(text)
	if len(problems) > 0 || len(job.workloads) != 1 {
		t.Fatalf("%d workloads\n%s", len(job.workloads), strings.Join(problems, "\n"))
	}
	w := job.workloads[0]
	if w.pod.Labels[injected] != "true" {
		t.Errorf("the policies keep its pod from the stores: %v", w.pod.Labels)
	}
	w.pod.Labels = nil // it has no sidecar to judge
	s := demo(t)
	sidecar := s.workload(t, "app").pod.Spec.InitContainers[0]
	app := s.workload(t, "app").pod.Spec
	s.workloads = append(s.workloads, w)
	for _, problem := range s.judge() {
		t.Error(problem)
	}

	c := w.pod.Spec.Containers[0]
	if len(c.Args) != 3 || c.Args[0] != "migrate" || len(c.Command) > 0 {
		t.Errorf("it runs %q %q", c.Command, c.Args)
	}
	if !reflect.DeepEqual(c.VolumeMounts, sidecar.VolumeMounts) || !reflect.DeepEqual(c.SecurityContext, sidecar.SecurityContext) {
		t.Errorf("it has not the mounts and rights of the sidecar:\n%+v\n%+v", c, sidecar)
	}
	for _, name := range []string{"cacheproxy-config", "cacheproxy-secrets"} {
		if got, want := source(w.pod.Spec, name), source(app, name); got != want || got == "" {
			t.Errorf("%s is %q, and the sidecar's %q", name, got, want)
		}
	}
	value := func(c core.Container) string {
		for _, e := range c.Env {
			if e.Name == "CACHEPROXY_CONFIG" {
				return e.Value
			}
		}
		return ""
	}
	if got, want := value(c), value(sidecar); got != want || got == "" {
		t.Errorf("its configuration is %q, and the sidecar's %q", got, want)
	}
	if c.Resources.Limits.Memory().Cmp(*sidecar.Resources.Limits.Memory()) <= 0 {
		t.Error("it has no more memory than the sidecar")
	}
}

// source names what a volume of a pod is made of.
func source(pod core.PodSpec, name string) string {
	for _, v := range pod.Volumes {
		switch {
		case v.Name != name:
		case v.ConfigMap != nil:
			return "ConfigMap " + v.ConfigMap.Name
		case v.Secret != nil:
			return "Secret " + v.Secret.SecretName
		}
	}
	return ""
}
