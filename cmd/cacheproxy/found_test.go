package main

import (
	"context"
	"regexp"
	"strings"
	"testing"

	"cacheproxy/internal/testenv"
)

// The table, the screen and the lines of stats say what was found on a route besides reads and writes: keys without a row, and copies
// that differ. While there is nothing of the kind they do not speak of it.
func TestStatsShowWhatWasFound(t *testing.T) {
	s := newSite(t, testenv.Redis(t).URL(), testenv.Postgres(t))
	execute(t, s.postgresURL, `CREATE TABLE public.reports (id bigint PRIMARY KEY, title text, analytics_cache jsonb)`)
	s.write(legacyRoutes)
	s.exec("--config", s.config)
	s.started()
	table := func() string {
		t.Helper()
		var out output
		if err := run(context.Background(), []string{"stats", "--observe", s.observe}, s.env(), &out, &s.stderr); err != nil {
			t.Fatal(err)
		}
		return out.String()
	}
	p := newTerminal(t, 100, 30, []string{"NO_COLOR=1"}, "stats", "--watch", "--interval", "100ms", "--observe", s.observe)
	eventually(t, "the figures are drawn", func() bool { return strings.Contains(p.frame(), "REFUSED/S") })
	if frame := p.frame(); strings.Contains(frame, "since the start") {
		t.Errorf("there is nothing to say, and it says\n%s", frame)
	}
	if text := table(); strings.Contains(text, "NO ROW") {
		t.Errorf("there is nothing to say, and it says\n%s", text)
	}

	if got := s.do("SET", "report:7", "{}"); got != "OK" { // no such row
		t.Errorf("SET: %s", got)
	}
	if got := s.do("SET", "other", "v"); got != "OK" {
		t.Errorf("SET: %s", got)
	}
	s.write(legacyRoutes + "verify: {sample: 100%}\n")
	if code, body := s.post("/reload"); code != 200 {
		t.Fatalf("reload: %d %s", code, body)
	}
	execute(t, s.postgresURL, `DELETE FROM cacheproxy.entries WHERE key = 'other'`)
	differs := regexp.MustCompile(`\nrest +0 +[1-9]\d* +\d+ +[1-9]\d* +missing [1-9]\d*\n`)
	eventually(t, "a copy is found to differ", func() bool {
		s.do("GET", "other")
		return differs.MatchString(table())
	})
	if text := table(); !strings.Contains(text, "\nROUTE   NO ROW  COMPARED  DROPPED  DIFFERING  HOW\nlegacy  1 ") {
		t.Errorf("the table:\n%s", text)
	}
	eventually(t, "the screen says so", func() bool {
		frame := p.frame()
		return strings.Contains(frame, "legacy since the start: no row 1") && regexp.MustCompile(`rest since the start: compared [1-9]\d*, differ [1-9]\d* \(missing [1-9]\d*\)`).MatchString(frame)
	})
	p.keys("q")
	<-p.ended

	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	out := &lineCounter{enough: 3, done: cancel}
	if err := run(ctx, []string{"stats", "--watch", "--interval", "100ms", "--observe", s.observe}, s.env(), out, &s.stderr); err != nil || !out.b.has(" no_row=1", " verify_checked=", " verify_mismatches=") {
		t.Errorf("%v\n%s", err, out.b.String())
	}
}
