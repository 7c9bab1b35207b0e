package k8s

import (
	"context"
	"fmt"
	"net/http"
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

	"github.com/redis/go-redis/v9"
	core "k8s.io/api/core/v1"
)

// mount is a ConfigMap in a folder, as the kubelet keeps it: files are links into a folder with the time in its name, and one link to
// that folder is renamed to change all of them at once.
type mount struct {
	dir string
	n   int
}

func (m *mount) put(t *testing.T, files map[string]string) {
	t.Helper()
	m.n++
	version := fmt.Sprintf("..2026_11_27_08_00_00.%d", m.n)
	must := func(err error) {
		if err != nil {
			t.Fatal(err)
		}
	}
	must(os.Mkdir(filepath.Join(m.dir, version), 0o755))
	for name, content := range files {
		must(os.WriteFile(filepath.Join(m.dir, version, name), []byte(content), 0o600))
	}
	before, _ := os.Readlink(filepath.Join(m.dir, "..data"))
	must(os.Symlink(version, filepath.Join(m.dir, "..data_tmp")))
	must(os.Rename(filepath.Join(m.dir, "..data_tmp"), filepath.Join(m.dir, "..data")))
	if before != "" {
		must(os.RemoveAll(filepath.Join(m.dir, before)))
		return
	}
	for name := range files {
		must(os.Symlink(filepath.Join("..data", name), filepath.Join(m.dir, name)))
	}
}

// The pod of the demo as a kubelet runs it: the Redis of the demo, the sidecar until its startup probe is answered, the init container, the
// application; a ConfigMap that changes, well and badly; and the end, the application first.
func TestPod(t *testing.T) {
	s := demo(t)
	const named = "/run/secrets/cacheproxy"
	values := map[string]string{}
	for name, value := range s.secrets["cacheproxy"].Data {
		values[name] = string(value)
	}
	secrets := lab.Secrets(t, values)

	store := s.workload(t, "redis").pod.Spec.Containers[0]
	addr := lab.Redis(t, store.Args[0], "/data", named, secrets, values["redis-password"])
	probe := store.ReadinessProbe.Exec.Command
	if err := lab.Probe(t, probe[len(probe)-1], named, secrets, addr); err != nil {
		t.Errorf("the probe of Redis: %v", err)
	}
	wrong := lab.Secrets(t, map[string]string{"redis-password": "other"})
	if err := lab.Probe(t, probe[len(probe)-1], named, wrong, addr); err == nil {
		t.Error("the probe of Redis succeeds with a wrong password")
	}

	postgres, err := url.Parse(testenv.PostgresServer(t).URL("postgres"))
	if err != nil {
		t.Fatal(err)
	}
	clients, observe := testenv.FreePort(t), testenv.FreePort(t)
	text := lab.Replace(t, s.configMaps["cacheproxy"].Data["config.yaml"],
		"//redis:6379/", "//"+addr+"/", "//cacheproxy@postgres:5432/app?", "//"+postgres.User.Username()+"@"+postgres.Host+postgres.Path+"?",
		named+"/", secrets+"/")
	text += fmt.Sprintf("listen: {address: \"127.0.0.1:%d\"}\nadmin: {address: \"\"}\n", clients)

	app := s.workload(t, "app").pod.Spec
	sidecar := app.InitContainers[0]
	volume := mount{dir: t.TempDir()}
	volume.put(t, map[string]string{"config.yaml": text})
	cmd := exec.Command(lab.Program(t), sidecar.Args...)
	cmd.Env = []string{}
	for _, e := range sidecar.Env {
		value := e.Value
		switch e.Name {
		case "CACHEPROXY_CONFIG":
			value = filepath.Join(volume.dir, filepath.Base(value))
		case "CACHEPROXY_OBSERVE":
			value = lab.Replace(t, value, ":9180", ":"+strconv.Itoa(observe))
		}
		cmd.Env = append(cmd.Env, e.Name+"="+value)
	}
	p := lab.Start(t, cmd)
	ask := func(probe *core.Probe) bool {
		resp, err := http.Get(fmt.Sprintf("http://127.0.0.1:%d%s", observe, probe.HTTPGet.Path))
		if err != nil {
			return false
		}
		resp.Body.Close()
		return resp.StatusCode == http.StatusOK
	}
	defer http.DefaultClient.CloseIdleConnections()
	lab.WaitFor(t, "the startup probe is answered", func() bool { return ask(sidecar.StartupProbe) })
	if !ask(sidecar.LivenessProbe) {
		t.Error("the liveness probe is not answered")
	}
	for _, name := range []string{"healthcheck", "stats"} { // what one would type by kubectl exec
		inside := exec.Command(cmd.Path, name)
		inside.Env = cmd.Env
		if out, err := inside.CombinedOutput(); err != nil {
			t.Errorf("%s in the container: %v\n%s", name, err, out)
		}
	}

	// On its port, the programs of the application's containers. Their processes may take another user's rights in a pod only.
	local := func(c core.Container) *exec.Cmd {
		script := lab.Replace(t, c.Args[0], " 6380 ", " "+strconv.Itoa(clients)+" ")
		return exec.Command(c.Command[0], append(slices.Clone(c.Command[1:]), script)...)
	}
	if out, err := local(app.InitContainers[1]).CombinedOutput(); err != nil || !strings.Contains(string(out), "PONG") {
		t.Fatalf("the init container: %v %s", err, out)
	}
	running := lab.Start(t, local(app.Containers[0]))
	lab.WaitFor(t, "the application writes and reads", func() bool {
		return strings.Contains(running.Output.String(), "OK\n{\"id\": 2}\n")
	})

	client := redis.NewClient(&redis.Options{Addr: fmt.Sprintf("127.0.0.1:%d", clients), DisableIdentity: true})
	defer client.Close()
	ctx := context.Background()
	phase := func() string { return fmt.Sprint(client.Do(ctx, "CACHEPROXY", "PHASE").Val()) }
	if got := phase(); !strings.Contains(got, "phase1") {
		t.Fatalf("phase %s", got)
	}
	volume.put(t, map[string]string{"config.yaml": lab.Replace(t, text, "phase: phase1", "phase: phase2")})
	lab.WaitFor(t, "the changed ConfigMap is in force", func() bool { return strings.Contains(phase(), "phase2") })
	volume.put(t, map[string]string{"config.yaml": lab.Replace(t, text, "phase: phase1", "phase: phase9")})
	lab.WaitFor(t, "a mistake is logged", func() bool { return strings.Contains(p.Output.String(), "phase9") })
	if got := phase(); !strings.Contains(got, "phase2") || !ask(sidecar.LivenessProbe) {
		t.Errorf("after a mistake: phase %s", got)
	}
	volume.put(t, map[string]string{"config.yaml": text})
	lab.WaitFor(t, "the mended ConfigMap is in force", func() bool { return strings.Contains(phase(), "phase1") })

	if code := running.Stop(t); code != 0 {
		t.Errorf("the application ends with %d", code)
	}
	if said := running.Output.String(); strings.Contains(said, "UNAVAILABLE") || strings.Contains(said, "ERR") || strings.Contains(said, "refused") {
		t.Errorf("the application saw %s", said)
	}
	if code := p.Stop(t); code != 0 {
		t.Errorf("the sidecar ends with %d", code)
	}
	if strings.Contains(p.Output.String(), values["redis-password"]) {
		t.Error("a password is in the log")
	}
}
