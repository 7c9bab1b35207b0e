package main

import (
	"net/http"
	"strings"
	"testing"

	"cacheproxy/internal/testenv"
)

// commands.deny has its default without a file's word, is taken over by a running process, and stays with a bad file.
func TestDenyIsReloaded(t *testing.T) {
	s := newSite(t, testenv.Redis(t).URL(), testenv.Postgres(t))
	s.write(routes)
	stop := s.serve()
	denied := func(entry string, args ...any) bool {
		return strings.HasPrefix(s.do(args...), "DENIED ") && strings.Contains(s.do(args...), "commands.deny ("+entry+")")
	}
	if !denied("shutdown", "SHUTDOWN", "NOSAVE") || denied("keys", "KEYS", "*") {
		t.Error("the default rules are not in force")
	}
	s.write(routes + "commands: {deny: [keys, \"@pubsub\"]}\n")
	if code, body := s.post("/reload"); code != http.StatusOK {
		t.Fatalf("reload: %d %s", code, body)
	}
	if !denied("keys", "KEYS", "*") || !denied("@pubsub", "PUBLISH", "a", "b") {
		t.Error("the new rules are not in force")
	}
	if got := s.do("CACHEPROXY", "CONFIG"); !strings.Contains(got, "- keys") || strings.Contains(got, "- shutdown") {
		t.Errorf("CONFIG does not show what is in force:\n%s", got)
	}
	s.write(routes + "commands: {deny: [kes]}\n")
	if code, body := s.post("/reload"); code != http.StatusUnprocessableEntity || !strings.Contains(body, "did you mean keys?") {
		t.Errorf("a bad file: %d %s", code, body)
	}
	if !denied("keys", "KEYS", "*") {
		t.Error("a bad file changed the rules")
	}
	s.write(routes + "commands: {deny: []}\n")
	if code, body := s.post("/reload"); code != http.StatusOK {
		t.Fatalf("reload: %d %s", code, body)
	}
	if got := s.do("KEYS", "nothing"); got != "[]" {
		t.Errorf("KEYS: %s", got)
	}
	if s.stderr.has("take effect at the next start") {
		t.Error("commands.deny waits for a restart")
	}
	if err := stop(); err != nil {
		t.Error(err)
	}
}
