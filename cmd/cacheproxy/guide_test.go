package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"cacheproxy/internal/testenv"
)

const guide = "docs/migration-guide.md"

// TestMigrationGuide does what the guide says, with the built program and real stores, and compares what is printed.
func TestMigrationGuide(t *testing.T) {
	pg := testenv.Postgres(t)
	s := newSite(t, testenv.Redis(t).URL(), pg)
	execute(t, pg, `CREATE TABLE public.reports (id bigint PRIMARY KEY, title text, analytics_cache jsonb);
		INSERT INTO reports SELECT i, 'report ' || i, '{"views": 3}' FROM generate_series(1, 1000) i`)
	bin := filepath.Join(s.dir, "bin")
	if err := os.Mkdir(bin, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(testenv.Program(t), filepath.Join(bin, "cacheproxy")); err != nil {
		t.Fatal(err)
	}
	here := strings.NewReplacer("-p 6380", "-s "+s.socket)
	shell := func(command string) string {
		return s.shell(here.Replace(command), append(s.env(), "PATH="+bin+":"+os.Getenv("PATH"))...)
	}
	there := strings.NewReplacer(s.dir+"/", "")
	same := func(text string) string { return text }
	var others *exec.Cmd
	for _, b := range readTour(t, filepath.Join("..", "..", guide)) {
		switch b.do {
		case "":
			b.run(t, guide, func(command string) string { return there.Replace(shell(command)) }, same)
		case "config":
			route, err := os.ReadFile(filepath.Join("testdata", "guide.yaml"))
			if err != nil {
				t.Fatal(err)
			}
			s.write(string(route))
			if err := os.WriteFile(filepath.Join(s.dir, "routes.yaml"), route, 0o600); err != nil {
				t.Fatal(err)
			}
		case "serve":
			s.execBuilt("serve", "--config", s.config)
			s.connected()
		case "others write":
			others = exec.Command("psql", "-q", pg)
			others.Stdin = strings.NewReader(strings.Repeat("UPDATE reports SET analytics_cache = '{\"views\": 4}' WHERE id = 100 + random() * 899; SELECT pg_sleep(0.02);\n", 10_000))
			if err := others.Start(); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = others.Process.Kill(); _ = others.Wait() }) // usually it has ended
		case "others stop":
			if err := others.Process.Kill(); err != nil {
				t.Fatal("it had ended before: ", err)
			}
			_ = others.Wait()
		case "reads": // more than the next step asks for
			c := s.client()
			for range 5 {
				for i := range 1000 {
					if err := c.Get(context.Background(), fmt.Sprintf("report:%d", 1+i)).Err(); err != nil {
						t.Fatal(err)
					}
				}
			}
		case "a minute passes": // since sidecars were seen in other phases
			execute(t, pg, `UPDATE cacheproxy.phases SET since = since - interval '61 seconds', last_seen = last_seen - interval '61 seconds'`)
		default:
			t.Fatalf("%s: nobody knows how to do %q", guide, b.do)
		}
	}
}
