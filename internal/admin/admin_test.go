package admin

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"cacheproxy/policy"

	"go.uber.org/goleak"
	"go.uber.org/zap"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// proxy is a process in a state that a test chooses.
type proxy struct {
	health   Health
	requires string
	reload   error
	phase    error
	moved    string
}

func (p *proxy) Health() Health              { return p.health }
func (p *proxy) Stats(context.Context) any   { return map[string]int{"redis_hits": 7} }
func (p *proxy) ReadyRequires() string       { return p.requires }
func (p *proxy) Identity() map[string]string { return map[string]string{"instance": "abc"} }
func (p *proxy) Reload() error               { return p.reload }
func (p *proxy) Phases(_ context.Context, route string) (any, error) {
	if route == "other" {
		return nil, ErrNoRoute
	}
	return []string{"standing of " + route}, nil
}
func (p *proxy) SetPhase(route string, to policy.Phase, force bool) error {
	p.moved = route + " " + to.String()
	if force {
		p.moved += " by force"
	}
	return p.phase
}

func ask(h http.Handler, method, target string, header ...string) (int, string) {
	r := httptest.NewRequest(method, target, nil)
	r.Host = "localhost:9181"
	for i := 0; i < len(header); i += 2 {
		if header[i] == "Host" {
			r.Host = header[i+1]
		}
		r.Header.Set(header[i], header[i+1])
	}
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	return w.Code, w.Body.String()
}

func TestReadiness(t *testing.T) {
	up, down, healing, unused := Store{Status: Connected}, Store{Status: Down, Reason: "refused"}, Store{Status: Recovering}, Store{Status: Unused}
	for _, c := range []struct {
		name            string
		redis, postgres Store
		ready           string // the words of ready_requires that are met
	}{
		{"both up", up, up, "none any redis postgres all"},
		{"redis down", down, up, "none any postgres"},
		{"redis recovering", healing, up, "none any postgres"},
		{"postgres down", up, down, "none any redis"},
		{"both down", down, down, "none"},
		{"postgres unused", up, unused, "none any redis postgres all"},
		{"redis down, postgres unused", down, unused, "none postgres"},
	} {
		for _, requires := range []string{"none", "any", "redis", "postgres", "all"} {
			p := &proxy{health: Health{Serving: true, Redis: c.redis, Postgres: c.postgres}, requires: requires}
			want := http.StatusServiceUnavailable
			if strings.Contains(" "+c.ready+" ", " "+requires+" ") {
				want = http.StatusOK
			}
			if code, body := ask(Observe(p, http.NotFoundHandler()), "GET", "/readyz"); code != want {
				t.Errorf("%s, requires %s: %d\n%s", c.name, requires, code, body)
			}
		}
	}
}

func TestReadyzWords(t *testing.T) {
	p := &proxy{requires: "none", health: Health{Serving: true, Redis: Store{Status: Down, Reason: "refused"}, Postgres: Store{Status: Connected}}}
	h := Observe(p, http.NotFoundHandler())
	if _, body := ask(h, "GET", "/readyz"); body != "[+]proxy ok\n[-]redis down: refused\n[+]postgres ok\nready (stores required: none)\n" {
		t.Errorf("text:\n%s", body)
	}
	if code, body := ask(h, "GET", "/readyz", "Accept", "application/json"); code != 200 || !strings.Contains(body, `"ready": true`) || !strings.Contains(body, `"reason": "refused"`) {
		t.Errorf("json: %d\n%s", code, body)
	}
	p.health.Draining = true
	if code, body := ask(h, "GET", "/readyz"); code != 503 || !strings.HasPrefix(body, "[-]proxy draining\n") || !strings.Contains(body, "\nnot ready") {
		t.Errorf("draining: %d\n%s", code, body)
	}
	if code, body := ask(h, "GET", "/readyz", "Accept", "application/json"); code != 503 || !strings.Contains(body, `"ready": false`) {
		t.Errorf("draining, json: %d\n%s", code, body)
	}
	p.health = Health{}
	if code, body := ask(h, "GET", "/readyz"); code != 503 || !strings.HasPrefix(body, "[-]proxy not listening yet\n") {
		t.Errorf("starting: %d\n%s", code, body)
	}
}

func TestObserve(t *testing.T) {
	up, down := Store{Status: Connected}, Store{Status: Down}
	p := &proxy{health: Health{Redis: up, Postgres: up}}
	h := Observe(p, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { text(w, http.StatusOK, "cacheproxy_draining 0\n") }))
	status := func(want string) {
		t.Helper()
		if code, body := ask(h, "GET", "/healthz"); code != 200 || !strings.Contains(body, `{
  "status": "`+want+`"`) {
			t.Errorf("/healthz, want %s: %d\n%s", want, code, body)
		}
	}
	if code, _ := ask(h, "GET", "/startupz"); code != 503 {
		t.Errorf("/startupz before the start: %d", code)
	}
	status("starting")
	p.health.Serving = true
	if code, _ := ask(h, "GET", "/startupz"); code != 200 {
		t.Errorf("/startupz: %d", code)
	}
	status("ok")
	p.health.Redis = down
	status("degraded")
	p.health.Postgres = down
	status("down")
	p.health.Draining = true
	status("draining")
	if code, body := ask(h, "GET", "/livez"); code != 200 || body != "ok\n" {
		t.Errorf("/livez: %d %s", code, body)
	}
	if code, body := ask(h, "GET", "/cache/stats"); code != 200 || !strings.Contains(body, `"redis_hits": 7`) {
		t.Errorf("/cache/stats: %d %s", code, body)
	}
	if code, body := ask(h, "GET", "/metrics"); code != 200 || body != "cacheproxy_draining 0\n" {
		t.Errorf("/metrics: %d %s", code, body)
	}
	for _, c := range []struct {
		method, path string
		code         int
	}{{"POST", "/livez", 405}, {"POST", "/metrics", 405}, {"GET", "/", 404}, {"GET", "/debug/pprof/", 404}, {"POST", "/reload", 404}} {
		if code, _ := ask(h, c.method, c.path); code != c.code {
			t.Errorf("%s %s: %d, want %d", c.method, c.path, code, c.code)
		}
	}
}

func TestControlIsForThisMachine(t *testing.T) {
	h := Control(&proxy{})
	own := []string{"X-Cacheproxy", "1"}
	for _, c := range []struct {
		name   string
		method string
		header []string
		code   int
	}{
		{"localhost", "POST", own, 200},
		{"an address", "POST", append([]string{"Host", "127.0.0.1:9181"}, own...), 200},
		{"another loopback address", "POST", append([]string{"Host", "127.1.2.3"}, own...), 200},
		{"IPv6", "POST", append([]string{"Host", "[::1]:9181"}, own...), 200},
		{"IPv6 without a port", "POST", append([]string{"Host", "[::1]"}, own...), 200},
		{"a name that somebody rebound", "POST", append([]string{"Host", "evil.example:9181"}, own...), 403},
		{"a name that looks right", "POST", append([]string{"Host", "localhost.evil.example"}, own...), 403},
		{"an address of the network", "POST", append([]string{"Host", "10.0.0.1:9181"}, own...), 403},
		{"no name", "POST", append([]string{"Host", ""}, own...), 403},
		{"a page of somebody else", "POST", append([]string{"Origin", "https://evil.example"}, own...), 403},
		{"a page without an origin", "POST", append([]string{"Origin", "null"}, own...), 403},
		{"a page of ours", "POST", append([]string{"Origin", "http://localhost:9181"}, own...), 200},
		{"without the header", "POST", nil, 403},
		{"reading what changes things", "GET", own, 405},
	} {
		if code, body := ask(h, c.method, "/reload", c.header...); code != c.code {
			t.Errorf("%s: %d %s", c.name, code, body)
		}
	}
	if code, _ := ask(h, "GET", "/debug/pprof/", "Host", "evil.example"); code != 403 {
		t.Errorf("profiles for a rebound name: %d", code)
	}
	if code, body := ask(h, "GET", "/debug/pprof/goroutine?debug=1"); code != 200 || !strings.Contains(body, "goroutine profile") {
		t.Errorf("a profile: %d", code)
	}
}

func TestControl(t *testing.T) {
	p := &proxy{reload: errors.New("config.yaml:3: listn: unknown key")}
	h := Control(p)
	post := func(target string) (int, string) { return ask(h, "POST", target, "X-Cacheproxy", "1") }
	if code, body := post("/reload"); code != 422 || body != "config.yaml:3: listn: unknown key\n" {
		t.Errorf("a bad file: %d %s", code, body)
	}
	if code, _ := post("/phase?route=user&phase=phase2"); code != 200 || p.moved != "user phase2" {
		t.Errorf("a step: %d %s", code, p.moved)
	}
	if code, _ := post("/phase?route=user&phase=phase2&force=1"); code != 200 || p.moved != "user phase2 by force" {
		t.Errorf("by force: %d, moved %q", code, p.moved)
	}
	p.phase = ErrNoRoute
	if code, _ := post("/phase?route=user&phase=phase2"); code != 404 {
		t.Errorf("no route: %d", code)
	}
	p.phase = errors.New("go to phase2 first")
	if code, body := post("/phase?route=user&phase=phase3"); code != 409 || body != "go to phase2 first\n" {
		t.Errorf("no step: %d %s", code, body)
	}
	if code, _ := post("/phase?route=user&phase=4"); code != 400 {
		t.Errorf("no phase: %d", code)
	}
	if code, _ := post("/phase?phase=phase1"); code != 400 {
		t.Errorf("no name: %d", code)
	}
}

func TestServe(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	asked := make(chan struct{})
	slow := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.WriteString(w, "begun")
		w.(http.Flusher).Flush()
		close(asked)
		<-r.Context().Done()
	})
	go func() { ended <- Serve(ctx, ln, slow, zap.NewNop()) }()
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	answered := make(chan struct{})
	go func() {
		defer close(answered)
		resp, err := client.Get("http://" + ln.Addr().String())
		if err != nil {
			t.Error(err)
			return
		}
		defer resp.Body.Close()
		_, _ = io.ReadAll(resp.Body) // it is cut off
	}()
	<-asked
	cancel()
	if err := <-ended; err != nil { // although a request would go on for ever
		t.Error(err)
	}
	<-answered
	if conn, err := net.Dial("tcp", ln.Addr().String()); err == nil {
		conn.Close()
		t.Error("it still listens")
	}
	if err := Serve(context.Background(), ln, slow, zap.NewNop()); err == nil {
		t.Error("a closed listener was served")
	}
}
