package k8s

import (
	"fmt"
	"net"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"

	monitoring "github.com/prometheus-operator/prometheus-operator/pkg/apis/monitoring/v1"
	apps "k8s.io/api/apps/v1"
	batch "k8s.io/api/batch/v1"
	core "k8s.io/api/core/v1"
	networking "k8s.io/api/networking/v1"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/util/intstr"
	security "k8s.io/pod-security-admission/api"
	"k8s.io/pod-security-admission/policy"
)

// injected is the label by which components find pods with the sidecar.
const injected = "cacheproxy.dev/injected"

// secretFile is a setting that names a file of the Secret.
var secretFile = regexp.MustCompile(`(?m)^ +\w+_file: /run/secrets/cacheproxy/(\S+)`)

// decoder refuses fields that a type does not have, and fields that are given twice.
var decoder = func() runtime.Decoder {
	scheme := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{
		core.AddToScheme, apps.AddToScheme, batch.AddToScheme, networking.AddToScheme, monitoring.AddToScheme,
	} {
		if err := add(scheme); err != nil {
			panic(err)
		}
	}
	return serializer.NewCodecFactory(scheme, serializer.EnableStrict).UniversalDeserializer()
}()

var evaluator = func() policy.Evaluator {
	e, err := policy.NewEvaluator(policy.DefaultChecks(), nil)
	if err != nil {
		panic(err)
	}
	return e
}()

// workload is something that makes pods.
type workload struct {
	name string
	pod  core.PodTemplateSpec
}

// set is everything that was rendered.
type set struct {
	workloads  []workload
	services   []*core.Service
	policies   []*networking.NetworkPolicy
	monitors   []*monitoring.PodMonitor
	rules      []*monitoring.PrometheusRule
	configMaps map[string]*core.ConfigMap
	secrets    map[string]*core.Secret
	accounts   []string
	namespaces []*core.Namespace
}

// decode decodes a stream and says what a server would refuse.
func decode(text string) (s set, problems []string) {
	s.configMaps, s.secrets = map[string]*core.ConfigMap{}, map[string]*core.Secret{}
	for _, doc := range documents(text) {
		obj, _, err := decoder.Decode([]byte(doc), nil, nil)
		if err != nil {
			problems = append(problems, err.Error())
			continue
		}
		switch o := obj.(type) {
		case *apps.Deployment:
			s.workloads = append(s.workloads, workload{o.Name, o.Spec.Template})
		case *apps.StatefulSet:
			s.workloads = append(s.workloads, workload{o.Name, o.Spec.Template})
		case *apps.DaemonSet:
			s.workloads = append(s.workloads, workload{o.Name, o.Spec.Template})
		case *batch.Job:
			s.workloads = append(s.workloads, workload{o.Name, o.Spec.Template})
		case *core.Service:
			s.services = append(s.services, o)
		case *core.ConfigMap:
			s.configMaps[o.Name] = o
		case *core.Secret:
			s.secrets[o.Name] = o
		case *core.ServiceAccount:
			s.accounts = append(s.accounts, o.Name)
		case *core.Namespace:
			s.namespaces = append(s.namespaces, o)
		case *networking.NetworkPolicy:
			s.policies = append(s.policies, o)
		case *monitoring.PodMonitor:
			s.monitors = append(s.monitors, o)
		case *monitoring.PrometheusRule:
			s.rules = append(s.rules, o)
		default:
			problems = append(problems, fmt.Sprintf("a %T, of which the test knows nothing", obj))
		}
	}
	return s, problems
}

// judge says everything that is wrong with a set: with each pod, and with what names something else.
func (s *set) judge() (problems []string) {
	report := func(format string, args ...any) { problems = append(problems, fmt.Sprintf(format, args...)) }
	for _, w := range s.workloads {
		for _, result := range evaluator.EvaluatePod(security.LevelVersion{Level: security.LevelRestricted, Version: security.LatestVersion()},
			&w.pod.ObjectMeta, &w.pod.Spec) {
			if !result.Allowed {
				report("%s is not restricted: %s: %s", w.name, result.ForbiddenReason, result.ForbiddenDetail)
			}
		}
		s.judgePod(w, func(format string, args ...any) { report(w.name+": "+format, args...) })
	}
	for _, svc := range s.services {
		pods := s.selected(labels.SelectorFromSet(svc.Spec.Selector))
		for _, port := range svc.Spec.Ports {
			if len(pods) == 0 || !slices.ContainsFunc(pods, func(w workload) bool { return listens(w, port.TargetPort) }) {
				report("service %s: no pod has the port %s", svc.Name, port.TargetPort.String())
			}
		}
	}
	for _, p := range s.policies {
		selector, err := meta.LabelSelectorAsSelector(&p.Spec.PodSelector)
		if err != nil {
			report("policy %s: %v", p.Name, err)
			continue
		}
		if len(s.selected(selector)) == 0 {
			report("policy %s is for no pod", p.Name)
		}
	}
	for _, m := range s.monitors {
		selector, err := meta.LabelSelectorAsSelector(&m.Spec.Selector)
		if err != nil {
			report("monitor %s: %v", m.Name, err)
			continue
		}
		pods := s.selected(selector)
		for _, e := range m.Spec.PodMetricsEndpoints {
			if e.Port == nil || len(pods) == 0 || !slices.ContainsFunc(pods, func(w workload) bool { return listens(w, intstr.FromString(*e.Port)) }) {
				report("monitor %s: no pod has its port", m.Name)
			}
		}
	}
	for _, n := range s.namespaces {
		if n.Labels["pod-security.kubernetes.io/enforce"] != "restricted" {
			report("namespace %s enforces %q", n.Name, n.Labels["pod-security.kubernetes.io/enforce"])
		}
	}
	return problems
}

// selected are the workloads whose pods a selector selects.
func (s *set) selected(selector labels.Selector) (found []workload) {
	for _, w := range s.workloads {
		if selector.Matches(labels.Set(w.pod.Labels)) {
			found = append(found, w)
		}
	}
	return found
}

func containers(w workload) []core.Container {
	return slices.Concat(w.pod.Spec.InitContainers, w.pod.Spec.Containers)
}

// listens tells whether a pod has a port, by its name or number.
func listens(w workload, port intstr.IntOrString) bool {
	for _, c := range containers(w) {
		for _, p := range c.Ports {
			if port.Type == intstr.String && p.Name == port.StrVal || port.Type == intstr.Int && p.ContainerPort == port.IntVal {
				return true
			}
		}
	}
	return false
}

// judgePod says what is wrong with a pod.
func (s *set) judgePod(w workload, report func(string, ...any)) {
	spec := w.pod.Spec
	if spec.AutomountServiceAccountToken == nil || *spec.AutomountServiceAccountToken {
		report("a token of the API server is mounted")
	}
	if name := spec.ServiceAccountName; name != "" && !slices.Contains(s.accounts, name) {
		report("there is no service account %s", name)
	}
	volumes := map[string]core.Volume{}
	for _, v := range spec.Volumes {
		volumes[v.Name] = v
		if v.ConfigMap != nil && s.configMaps[v.ConfigMap.Name] == nil {
			report("there is no ConfigMap %s", v.ConfigMap.Name)
		}
		if v.Secret != nil && s.secrets[v.Secret.SecretName] == nil && (v.Secret.Optional == nil || !*v.Secret.Optional) {
			report("there is no Secret %s", v.Secret.SecretName)
		}
	}
	for _, c := range containers(w) {
		for _, e := range c.Env {
			if e.ValueFrom != nil && e.ValueFrom.SecretKeyRef != nil {
				report("%s has a secret in its environment", c.Name)
			}
		}
		for _, p := range []*core.Probe{c.StartupProbe, c.LivenessProbe, c.ReadinessProbe} {
			if p != nil && p.HTTPGet != nil && !slices.ContainsFunc(c.Ports, func(port core.ContainerPort) bool { return port.Name == p.HTTPGet.Port.StrVal }) {
				report("%s is probed on the port %s, which it does not have", c.Name, p.HTTPGet.Port.String())
			}
		}
		if c.SecurityContext == nil || c.SecurityContext.ReadOnlyRootFilesystem == nil || !*c.SecurityContext.ReadOnlyRootFilesystem {
			report("%s can write to its root", c.Name)
		}
		for _, m := range c.VolumeMounts {
			if _, ok := volumes[m.Name]; !ok {
				report("%s mounts %s, which is no volume", c.Name, m.Name)
			}
		}
	}
	if w.pod.Labels[injected] == "true" {
		s.judgeSidecar(w, volumes, report)
	}
}

// judgeSidecar says what is wrong with the sidecar of a pod.
func (s *set) judgeSidecar(w workload, volumes map[string]core.Volume, report func(string, ...any)) {
	init := w.pod.Spec.InitContainers
	if len(init) == 0 || init[0].Name != "cacheproxy" {
		report("the sidecar is not the first init container: what stands before it, and the application, could not use it")
		return
	}
	c := init[0]
	if c.RestartPolicy == nil || *c.RestartPolicy != core.ContainerRestartPolicyAlways {
		report("the sidecar has no restartPolicy: Always: the pod would wait for its end")
	}
	if c.Lifecycle != nil {
		report("the sidecar has a hook, which would run while the application still needs it")
	}
	if c.ReadinessProbe != nil {
		report("the sidecar has a readiness probe, which would take every pod out of service at once")
	}
	for name, p := range map[string]*core.Probe{"startup": c.StartupProbe, "liveness": c.LivenessProbe} {
		want := map[string]string{"startup": "/startupz", "liveness": "/livez"}[name]
		if p == nil || p.HTTPGet == nil || p.HTTPGet.Path != want {
			report("the sidecar's %s probe does not ask %s", name, want)
		}
	}
	if c.SecurityContext == nil || c.SecurityContext.RunAsUser == nil || *c.SecurityContext.RunAsUser != 65532 {
		report("the sidecar does not run as the image's user")
	}
	if _, ok := c.Resources.Limits[core.ResourceCPU]; ok {
		report("the sidecar has a limit for its processor time, which makes it late")
	}
	if _, ok := c.Resources.Limits[core.ResourceMemory]; !ok {
		report("the sidecar has no limit for its memory")
	}
	var config, secrets *core.Volume
	for _, m := range c.VolumeMounts {
		v := volumes[m.Name]
		switch {
		case m.SubPath != "":
			report("the sidecar mounts a subPath, which is never updated")
		case !m.ReadOnly:
			report("the sidecar can write to %s", m.MountPath)
		case v.ConfigMap != nil:
			config = &v
		case v.Secret != nil:
			secrets = &v
		}
		for _, other := range c.VolumeMounts {
			if other.MountPath != m.MountPath && strings.HasPrefix(other.MountPath+"/", m.MountPath+"/") {
				report("the sidecar mounts %s inside of %s, where no folder can be made for it", other.MountPath, m.MountPath)
			}
		}
	}
	if config == nil || secrets == nil {
		report("the sidecar lacks its configuration or its secrets")
		return
	}
	if o := secrets.Secret.Optional; o == nil || !*o {
		report("the pod hangs without passwords where its stores have none")
	}
	at, observe := "", ""
	for _, e := range c.Env {
		switch e.Name {
		case "CACHEPROXY_CONFIG":
			at = e.Value
		case "CACHEPROXY_OBSERVE":
			observe = e.Value
		}
	}
	if host, port, err := net.SplitHostPort(observe); err != nil || host != "" || len(c.Ports) != 1 || port != strconv.Itoa(int(c.Ports[0].ContainerPort)) {
		report("the sidecar's port %q cannot be reached over IPv4 and IPv6", observe)
	}
	cm := s.configMaps[config.ConfigMap.Name]
	if cm == nil {
		return
	}
	if cm.Data[path.Base(at)] == "" {
		report("the ConfigMap %s has no %s", cm.Name, path.Base(at))
	}
	// The pod starts without an optional Secret, and the sidecar does not without a file that it is to read.
	for _, file := range secretFile.FindAllStringSubmatch(cm.Data[path.Base(at)], -1) {
		if secret := s.secrets[secrets.Secret.SecretName]; secret == nil || secret.Data[file[1]] == nil {
			report("the configuration names %s, which is in no Secret %s", file[1], secrets.Secret.SecretName)
		}
	}
}
