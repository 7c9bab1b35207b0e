//go:build linux

package main

import (
	"encoding/json"
	"encoding/xml"
	"errors"
	"io"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestSpread(t *testing.T) {
	for _, c := range []struct {
		in   []float64
		want Spread
	}{
		{nil, Spread{}},
		{[]float64{3}, Spread{3, 3, 3, 1}},
		{[]float64{4, 1, 3}, Spread{3, 1, 4, 3}},
		{[]float64{4, 1, 3, 2}, Spread{2.5, 1, 4, 4}},
	} {
		if got := spread(c.in); got != c.want {
			t.Errorf("%v: %+v, want %+v", c.in, got, c.want)
		}
	}
	sorted := []float64{1, 2, 3, 4}
	if quantile(nil, 0.5) != 0 || quantile(sorted, 0.5) != 3 || quantile(sorted, 0.99) != 4 || quantile(sorted, 1) != 4 {
		t.Error("quantiles")
	}
}

func TestParseCSV(t *testing.T) {
	const head = `"test","rps","avg_latency_ms","min_latency_ms","p50_latency_ms","p95_latency_ms","p99_latency_ms","max_latency_ms"` + "\n"
	for _, c := range []struct {
		in   string
		want Run
	}{
		{head + `"GET direct:000100:__rand_int__","51020.41","0.510","0.088","0.487","0.871","1.271","2.047"` + "\n", Run{Rate: 51020.41, P50: 0.487, P99: 1.271}},
		// The value that is set stands in the name, with its quotes.
		{head + `"SET k {"name": "x","b": "y","c":"z"}","1.00","2.000","3.000","4.000","5.000","6.000","7.000"`, Run{Rate: 1, P50: 4, P99: 6}},
	} {
		if got, err := parseCSV(c.in); err != nil || got != c.want {
			t.Errorf("%+v, %v, want %+v", got, err, c.want)
		}
	}
	for _, bad := range []string{"", head, "Error from server: ERR no", head + `"GET k","a","2","3","4","5","6","7"`, `"GET k","1","2","3","4","5","6","7"`} {
		if got, err := parseCSV(bad); err == nil {
			t.Errorf("%q is %+v", bad, got)
		}
	}
}

func TestParseProc(t *testing.T) {
	stat := "4242 (a ) b (c) S 1 4242 4242 0 -1 4194560 2150 0 0 0 137 63 9 9 20 0 8 0 12345 1276000000 7000 18446744073709551615"
	if got, err := parseStat([]byte(stat)); err != nil || got != 2*time.Second {
		t.Errorf("%v, %v", got, err)
	}
	for _, bad := range []string{"", "1 (x) S 1 2", "1 (x) S 1 2 3 4 5 6 7 8 9 10 user 1"} {
		if got, err := parseStat([]byte(bad)); err == nil {
			t.Errorf("%q is %v", bad, got)
		}
	}
	if got, err := parseRSS("Name:\tx\nVmHWM:\t 99999 kB\nVmRSS:\t   20480 kB\nThreads:\t3\n"); err != nil || got != 20 {
		t.Errorf("%v, %v", got, err)
	}
	if got, err := parseRSS("Name:\tx\n"); err == nil {
		t.Errorf("without VmRSS: %v", got)
	}
	if n, err := cpu(os.Getpid()); err != nil || n < 0 {
		t.Errorf("this process: %v, %v", n, err)
	}
	if n, err := rss(os.Getpid()); err != nil || n < 1 {
		t.Errorf("this process: %v MiB, %v", n, err)
	}
}

func TestParsePgbench(t *testing.T) {
	const out = "transaction type: script.sql\nlatency average = 0.118 ms\ninitial connection time = 3.151 ms\ntps = 8478.123456 (without initial connection time)\n"
	if got, err := parsePgbench(out); err != nil || got != 8478.123456 {
		t.Errorf("%v, %v", got, err)
	}
	if got, err := parsePgbench("pgbench: error: no\n"); err == nil {
		t.Error(got)
	}
	log := filepath.Join(t.TempDir(), "log.1")
	if err := os.WriteFile(log, []byte("0 1 118 0 1795446772 1\n0 2 2500 0 1795446772 9\n0 3"), 0o600); err != nil {
		t.Fatal(err)
	}
	if got, err := readLog([]float64{1}, log); err != nil || !slices.Equal(got, []float64{1, 0.118, 2.5}) {
		t.Errorf("%v, %v", got, err)
	}
}

// Every round begins with another target, and everybody has a turn in each.
func TestInTurn(t *testing.T) {
	var s Series
	var order []string
	if err := s.inTurn(2, []string{"a", "b", "c"}, func(target string) (Run, error) {
		order = append(order, target)
		return Run{Rate: 1}, nil
	}); err != nil {
		t.Fatal(err)
	}
	if got := strings.Join(order, ""); got != "abcbca" {
		t.Error(got)
	}
	stop := errors.New("stop")
	if err := s.inTurn(1, []string{"a"}, func(string) (Run, error) { return Run{}, stop }); err != stop || len(s.Runs) != 6 {
		t.Errorf("%v, %d runs", err, len(s.Runs))
	}
}

// sample is a result in which the proxy without a route does what factor says, in five rounds of a machine that becomes slower.
func sample(factor float64) *Result {
	r := &Result{Commit: "abc<&>", Memory: []Memory{{bare, 14, 30, 25}}, Herd: []Herd{{Clients: 500, Queries: 1, Seconds: 0.02}, {Clients: 500, Failed: "no"}}}
	s := &Series{What: "GET, 50 connections, pipeline 1, 100 B", Op: "GET", Conns: 50, Depth: 1, Size: 100}
	for round := 1; round <= 5; round++ {
		base := 90000 / float64(round)
		s.Runs = append(s.Runs,
			Run{Round: round, Target: direct, Rate: base, P50: 1, RedisCPU: 10},
			Run{Round: round, Target: twem, Rate: base * 0.5, P50: 1, ProxyCPU: 18, RedisCPU: 3},
			Run{Round: round, Target: bare, Rate: base * factor, P50: 1, ProxyCPU: 12, RedisCPU: 4})
	}
	s.Runs = append(s.Runs, Run{Round: 6, Target: bare, Failed: "it broke"}, Run{Round: 6, Target: direct, Rate: 1})
	r.Grid = []*Series{s}
	return r
}

func TestRatios(t *testing.T) {
	s := sample(0.5).Grid[0]
	if got := s.ratio(bare, rate, direct, rate); math.Abs(got.Min-0.5) > 1e-9 || math.Abs(got.Max-0.5) > 1e-9 || got.N != 5 {
		t.Errorf("within each round: %+v", got)
	}
	if got := s.of(direct, rate); got != (Spread{(22500 + 30000) / 2., 1, 90000, 6}) {
		t.Errorf("%+v", got)
	}
	if got := s.more(twem, direct, proxyCPU); got.N != 0 {
		t.Errorf("what was not measured: %+v", got)
	}
	if got := (*Series)(nil).ratio(bare, rate, direct, rate); got.N != 0 {
		t.Errorf("a series that is not there: %+v", got)
	}
	if got := s.targets(); !slices.Equal(got, []string{direct, twem, bare}) {
		t.Error(got)
	}
}

func TestBars(t *testing.T) {
	up, down := bar{bar: 0.75, aim: 0.95}, bar{bar: 1.6, aim: 1.3, most: true}
	for _, c := range []struct {
		b    bar
		v    float64
		want string
	}{
		{up, 0.74, "**miss**"}, {up, 0.75, "pass"}, {up, 0.95, "pass, and the aim"},
		{down, 1.61, "**miss**"}, {down, 1.6, "pass"}, {down, 1.3, "pass, and the aim"}, {down, 1, "pass, and the aim"},
		{bar{aim: 0.5, most: true}, 0.6, "misses the aim"}, {bar{}, 1, ""},
	} {
		if got := c.b.verdict(spread([]float64{c.v})); got != c.want {
			t.Errorf("%v against %+v: %q, want %q", c.v, c.b, got, c.want)
		}
	}
	if got := up.verdict(Spread{}); got != "not measured" {
		t.Error(got)
	}
}

func TestMarkdown(t *testing.T) {
	r := sample(0.7)
	got := markdown(r, "latest")
	for _, want := range []string{
		"| GET hits, 50 connections, no pipeline, against direct | 0.70 (0.70–0.70) | ≥ 0.75 | ≥ 0.95 | **miss** |",
		"| the same against twemproxy | 1.40 (1.40–1.40) | ≥ 0.95 | ≥ 1.2 | pass, and the aim |",
		"| the same: Redis's CPU per command, against direct | 0.40 (0.40–0.40) |  | ≤ 0.5 | pass, and the aim |",
		"| RSS, 1,000 idle connections | 30.0 MiB | ≤ 40 MiB | ≤ 20 MiB | pass |",
		"| phase1 SET, 50 clients, against one transaction per SET: one client |  | ≥ 10 | ≥ 15 | not measured |",
		"| GET, 50 connections, pipeline 1, 100 B | 10.0 |  | 18.0 + 3.0 | 12.0 + 4.0 |",
		"- GET, 50 connections, pipeline 1, 100 B, no route, round 6: it broke",
		"- herd 2: no",
		"A herd of 500 clients that miss one cold key: 1.00 queries",
	} {
		if !strings.Contains(got, want) {
			t.Errorf("no %q in\n%s", want, got)
		}
	}
	if strings.Contains(got, "%!") {
		t.Errorf("a mistake of format:\n%s", got)
	}
}

func TestPicture(t *testing.T) {
	got := picture(sample(1.5))
	d := xml.NewDecoder(strings.NewReader(got))
	for {
		if _, err := d.Token(); err == io.EOF {
			break
		} else if err != nil {
			t.Fatalf("%v in\n%s", err, got)
		}
	}
	if n := strings.Count(got, "<rect"); n != 1+2 || strings.Contains(got, "%!") {
		t.Errorf("%d rectangles in\n%s", n, got)
	}
}

// What is written can be read again, with every round.
func TestWrite(t *testing.T) {
	r := sample(1)
	out := filepath.Join(t.TempDir(), "bench", "x")
	if err := write(r, out); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(out + ".json")
	if err != nil {
		t.Fatal(err)
	}
	var again Result
	if err := json.Unmarshal(b, &again); err != nil || len(again.Grid[0].Runs) != len(r.Grid[0].Runs) || markdown(&again, "x") != markdown(r, "x") {
		t.Errorf("%v: %+v", err, again)
	}
}

func TestComparison(t *testing.T) {
	dir := t.TempDir()
	kept := func(name string, r *Result) string {
		if err := write(r, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
		return filepath.Join(dir, name+".json")
	}
	slow, fast := kept("slow", sample(0.5)), kept("fast", sample(0.8))
	compared := func(a, b string) string {
		t.Helper()
		x, err := load(a)
		if err != nil {
			t.Fatal(err)
		}
		y, err := load(b)
		if err != nil {
			t.Fatal(err)
		}
		return comparison(x, y)
	}
	const row = "| GET, 50 connections, pipeline 1, 100 B, no route | "
	for _, c := range []struct{ a, b, want string }{
		{slow, fast, row + "0.50 (0.50–0.50) | 0.80 (0.80–0.80) | +60 % | better |"},
		{fast, slow, row + "0.80 (0.80–0.80) | 0.50 (0.50–0.50) | -38 % | **worse** |"},
		{slow, slow, row + "0.50 (0.50–0.50) | 0.50 (0.50–0.50) | +0 % |  |"},
	} {
		if got := compared(c.a, c.b); !strings.Contains(got, c.want) || strings.Contains(got, "not of the same form") {
			t.Errorf("%s\nlacks %s", got, c.want)
		}
	}
	short := sample(0.5)
	short.Quick = true
	if got := compared(slow, kept("short", short)); !strings.Contains(got, "not of the same form") {
		t.Error(got)
	}
	if judge(Spread{2, 1, 3, 5}, Spread{0.5, 0.4, 0.6, 5}, true) != "better" || judge(Spread{0.5, 0.4, 0.6, 5}, Spread{2, 1, 3, 5}, true) != "**worse**" ||
		judge(Spread{2, 1, 3, 5}, Spread{4, 3, 5, 5}, false) != "" || judge(Spread{24, 24, 24, 1}, Spread{25, 25, 25, 1}, true) != "" {
		t.Error("what is to be less, overlaps, or is seen too seldom")
	}
	for _, text := range []string{"no JSON", "{}"} {
		file := filepath.Join(dir, "bad.json")
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := printComparison([]string{file, fast}); err == nil || !strings.Contains(err.Error(), "is no result") {
			t.Errorf("%q: %v", text, err)
		}
	}
	if printComparison([]string{slow, filepath.Join(dir, "none.json")}) == nil || printComparison([]string{slow}) == nil {
		t.Error("a file that is not there")
	}
}

func TestPlans(t *testing.T) {
	for _, p := range []plan{full, short} {
		for _, c := range []struct{ conns, depth int }{{50, 1}, {50, 16}} {
			if !slices.ContainsFunc(p.cells, func(x cell) bool {
				return x.op == "GET" && x.conns == c.conns && x.depth == c.depth && x.size == 100 && x.needsMoreTimes
			}) {
				t.Errorf("a bar stands on %+v, which is not measured", c)
			}
		}
		for _, c := range p.cells {
			if c.targets[0] != direct {
				t.Errorf("%+v is not compared with Redis", c)
			}
		}
	}
	if v := value(100); len(v) != 100 || !json.Valid([]byte(v)) {
		t.Errorf("the value is %q", v)
	}
}
