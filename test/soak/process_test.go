package soak

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"cacheproxy/internal/testenv"
)

// process is the proxy as it is shipped.
type process struct {
	t                    *testing.T
	cmd                  *exec.Cmd
	addr, observe, admin string
	log                  testenv.Output
	judged               int // how much of log has been looked at
}

func startProxy(t *testing.T, redisURL, pgURL, routes string) *process {
	t.Helper()
	addr := func() string { return fmt.Sprintf("127.0.0.1:%d", testenv.FreePort(t)) }
	p := &process{t: t, addr: addr(), observe: addr(), admin: addr()}
	requires := "redis"
	if pgURL != "" {
		requires = "all"
	}
	// Two hundred clients at once are no outage, nor is a busy machine: nothing may be refused.
	text := fmt.Sprintf(`
listen: {address: %q}
observe: {address: %q}
admin: {address: %q}
health: {ready_requires: %s}
redis: {url: %q, timeout: 60s, dial_timeout: 60s}
postgres: {url: %q, timeout: 60s, max_reads: 64, max_writes: 16}
log: {format: json}
routes: %s
`, p.addr, p.observe, p.admin, requires, redisURL, pgURL, routes)
	dir := t.TempDir()
	config := filepath.Join(dir, "config.yaml")
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	p.cmd = exec.Command(testenv.Program(t), "serve", "--config", config)
	p.cmd.Env = []string{"HOME=" + dir}
	p.cmd.Stdout, p.cmd.Stderr = &p.log, &p.log
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil {
			t.Errorf("the proxy has ended by itself: %v", err)
		}
		late := time.AfterFunc(patience, func() { _ = p.cmd.Process.Kill() })
		defer late.Stop()
		if err := p.cmd.Wait(); err != nil {
			t.Errorf("the proxy ends with %v", err)
		}
		if t.Failed() {
			t.Logf("the proxy says:\n%s", p.log.Tail(20_000))
		}
	})
	soon(t, "the proxy is ready", func() error { _, err := get("http://" + p.observe + "/readyz"); return err })
	return p
}

// soon waits for what must come true, and says what was still wrong if it does not.
func soon(t *testing.T, what string, check func() error) bool {
	t.Helper()
	var err error
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if err = check(); err == nil {
			return true
		}
	}
	t.Errorf("not true in %v: %s: %v", patience, what, err)
	return false
}

var web = &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: patience}

func get(url string) (string, error) {
	resp, err := web.Get(url)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s", resp.Status, b)
	}
	return string(b), err
}

// profile is a pprof profile in words.
func (p *process) profile(what string) string {
	s, err := get("http://" + p.admin + "/debug/pprof/" + what)
	if err != nil {
		p.t.Errorf("the admin address: %v", err)
	}
	return s
}

// status is the file of that name in /proc, or empty where there is none.
func (p *process) status() string {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
	return string(b)
}

// complaints are what the proxy has logged since the last time that is more than information: a panic, say.
func (p *process) complaints() (lines []string) {
	all := p.log.String()
	for line := range strings.Lines(all[p.judged:]) {
		var entry struct{ Level string }
		if json.Unmarshal([]byte(line), &entry) != nil || entry.Level != "info" {
			lines = append(lines, line)
		}
	}
	p.judged = len(all)
	return lines
}

// usage is what the proxy holds while it has no client.
type usage struct {
	redis      map[string]int // its connections to Redis, by what they are for
	postgres   int
	files      int // open ones that are no connections to either; 0: nobody can tell
	goroutines int64
	heap       int64 // bytes in use, after a collection
	rss, peak  int64 // kB
}

func (u usage) String() string {
	return fmt.Sprintf("connections to Redis %v, to Postgres %d, other files %d, goroutines %d, heap %d kB, RSS %d MB, at most %d MB",
		u.redis, u.postgres, u.files, u.goroutines, u.heap>>10, u.rss>>10, u.peak>>10)
}

var (
	goroutines = regexp.MustCompile(`goroutine profile: total (\d+)`)
	heapInUse  = regexp.MustCompile(`# HeapInuse = (\d+)`)
	rss        = regexp.MustCompile(`VmRSS:\s+(\d+) kB`)
	peakRSS    = regexp.MustCompile(`VmHWM:\s+(\d+) kB`)
)

func number(re *regexp.Regexp, s string) (n int64) {
	if m := re.FindStringSubmatch(s); m != nil {
		n, _ = strconv.ParseInt(m[1], 10, 64)
	}
	return n
}

// use measures.
func (w *world) use() usage {
	u := usage{redis: map[string]int{}}
	total := 0
	for line := range strings.Lines(w.redis.do("CLIENT", "LIST").text) {
		switch name := field(line, "name"); {
		case name == ours:
			continue
		case name == "" && field(line, "cmd") == "NULL":
			u.redis["spare"]++ // nobody has used it
		case strings.HasPrefix(name, "cacheproxy-"):
			u.redis[name]++
		default:
			u.redis["client "+strings.TrimSpace(line)]++
		}
		total++
	}
	if w.pgURL != "" {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		c, err := pgx.Connect(ctx, w.pgURL)
		if err != nil {
			w.t.Fatal(err)
		}
		defer c.Close(ctx) //nolint:errcheck // it was only read from
		err = c.QueryRow(ctx, "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()").Scan(&u.postgres)
		if err != nil {
			w.t.Fatal(err)
		}
	}
	if files, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", w.proxy.cmd.Process.Pid)); err == nil {
		u.files = len(files) - total - u.postgres
	}
	u.heap = number(heapInUse, w.proxy.profile("heap?gc=1&debug=1"))
	u.goroutines = number(goroutines, w.proxy.profile("goroutine?debug=1"))
	status := w.proxy.status()
	u.rss, u.peak = number(rss, status), number(peakRSS, status)
	return u
}

// least measures until nothing becomes less any more: connections are still being closed, and buffers given back.
func (w *world) least() usage {
	u := w.use()
	for same := 0; same < 5; same++ {
		time.Sleep(100 * time.Millisecond)
		now := w.use()
		if now.files < u.files || now.goroutines < u.goroutines || now.heap < u.heap-1<<20 {
			same = 0
		}
		u = now
	}
	return u
}

func field(line, name string) string {
	_, rest, _ := strings.Cut(" "+line, " "+name+"=")
	v, _, _ := strings.Cut(rest, " ")
	return strings.TrimSpace(v)
}

// bounds are what the proxy keeps for the next client: connections in reserve, and for commands that only Redis can run, of each RESP version.
var bounds = map[string]int{"spare": 16, "cacheproxy-run": 2 * 4}

const (
	// maxPostgres is the sum of max_reads, max_writes and what keeps house.
	maxPostgres = 64 + 16 + 2 + 1
	// moreGoroutines are those of net/http and pgx that come and go. A leak with each connection or command would be thousands.
	moreGoroutines = 4
	// moreHeap: buffers that wait for reuse, and the half-empty spans around them. 1 kB a client would be more within a minute.
	moreHeap = 8 << 20
	// moreRSS, in kB: what the runtime has not given back yet after it held values of 8 MB for several clients.
	moreRSS = 300 << 10
)

// more tells what is more than it was at first.
func (u usage) more(base usage) error {
	var wrong []error
	atMost := func(what string, is, most int64) {
		if is > most {
			wrong = append(wrong, fmt.Errorf("%s: %d, may be %d", what, is, most))
		}
	}
	for what, n := range u.redis {
		most, ok := bounds[what]
		if !ok {
			most = base.redis[what]
		}
		atMost("connections to Redis for "+what, int64(n), int64(most))
	}
	atMost("connections to Postgres", int64(u.postgres), maxPostgres)
	atMost("other files", int64(u.files), int64(base.files))
	atMost("goroutines", u.goroutines, base.goroutines+moreGoroutines)
	atMost("bytes of heap", u.heap, base.heap+moreHeap)
	atMost("kB of RSS", u.rss, base.rss+moreRSS)
	return errors.Join(wrong...)
}

// nobody waits until the proxy knows no client, Redis has no connection of one, nor a subscription, and nothing is left to repair.
func (w *world) nobody() {
	soon(w.t, "the proxy has no client", func() error {
		text, err := get("http://" + w.proxy.observe + "/cache/stats")
		if err != nil {
			return err
		}
		var stats struct {
			Proxy struct {
				Clients int
			}
			Journal struct {
				RedisStale int `json:"redis_stale"`
				StoreStale int `json:"store_stale"`
			}
		}
		if err := json.Unmarshal([]byte(text), &stats); err != nil {
			return err
		}
		if stats.Proxy.Clients+stats.Journal.RedisStale+stats.Journal.StoreStale > 0 {
			return fmt.Errorf("it has %+v", stats)
		}
		for line := range strings.Lines(w.redis.do("CLIENT", "LIST").text) {
			if name := field(line, "name"); name != ours && !strings.HasPrefix(name, "cacheproxy-") && field(line, "cmd") != "NULL" {
				return fmt.Errorf("Redis has %s", line)
			}
		}
		channels, patterns := w.redis.do("PUBSUB", "CHANNELS"), w.redis.do("PUBSUB", "NUMPAT")
		if len(channels.elems) > 0 || !patterns.is(':', "0") {
			return fmt.Errorf("Redis has subscribers: %s, and patterns: %s", channels, patterns)
		}
		return nil
	})
}

// ours is the name of the test's own connection to Redis, which is no leak.
const ours = "soak"

// plain is a connection that asks one thing at a time, for what the test itself wants to know.
type plain struct {
	t    *testing.T
	addr string
	nc   net.Conn
	rd   *bufio.Reader
}

func dialPlain(t *testing.T, addr string) *plain {
	t.Helper()
	nc, err := net.DialTimeout("tcp", addr, patience)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { nc.Close() })
	return &plain{t, addr, nc, bufio.NewReader(nc)}
}

func (p *plain) do(args ...string) frame {
	p.t.Helper()
	_ = p.nc.SetDeadline(time.Now().Add(patience))
	_, err := p.nc.Write(appendCommand(nil, args...))
	if err == nil {
		var f frame
		if f, err = readFrame(p.rd); err == nil {
			return f
		}
	}
	p.t.Fatalf("%q: %v", args[0], err)
	return frame{}
}

// in is do in the database that a queue's name names.
func (p *plain) in(queue string, args ...string) frame {
	p.do("SELECT", queue[3:4])
	return p.do(args...)
}
