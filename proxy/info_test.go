package proxy_test

import (
	"fmt"
	"regexp"
	"slices"
	"strings"
	"testing"

	"cacheproxy/policy"
)

// infoReply asks for INFO and returns the reply as it is and the text in it.
func infoReply(t *testing.T, c *conn, args ...string) (frame, text string) {
	t.Helper()
	c.send(append([]string{"INFO"}, args...)...)
	b, err := c.frame()
	if err != nil {
		t.Fatal(err)
	}
	head, rest, _ := strings.Cut(string(b), "\r\n")
	var n int
	if _, err := fmt.Sscanf(head[1:], "%d", &n); err != nil || len(rest) != n+2 {
		t.Fatalf("INFO %q answers %.80q", args, b)
	}
	text = rest[:n]
	if head[0] == '=' {
		if !strings.HasPrefix(text, "txt:") {
			t.Fatalf("INFO %q answers %.80q", args, b)
		}
		text = text[len("txt:"):]
	}
	return string(b), text
}

// varying are the fields whose values differ between two moments.
var varying = regexp.MustCompile(`(?m)^([a-z0-9_]+):[^\r\n]*`)

// sections are the lines of INFO that begin one.
func sections(text string) []string {
	return regexp.MustCompile(`(?m)^# .*?\r$`).FindAllString(text, -1)
}

func TestInfo(t *testing.T) {
	w := newWorld(t)
	s := w.sidecar(policy.Phase1)
	for _, proto := range []string{"2", "3"} {
		c, raw := s.dial(t), dial(t, w.redis.Addr())
		c.do("HELLO", proto)
		raw.do("HELLO", proto)
		for _, tt := range []struct {
			line string
			ours bool
		}{
			{"", true}, {"default", true}, {"all", true}, {"everything", true}, {"EVERYTHING", true}, {"all nosuch", true},
			{"server cacheproxy", true}, {"CacheProxy clients", true}, {"clients server", false}, {"keyspace", false}, {"commandstats", false},
			{"server default", true},
		} {
			args := strings.Fields(tt.line)
			frame, text := infoReply(t, c, args...)
			rawFrame, rawText := infoReply(t, raw, args...)
			if frame[0] != rawFrame[0] {
				t.Errorf("INFO %s in RESP%s is a %c, Redis's a %c", tt.line, proto, frame[0], rawFrame[0])
			}
			before, own, found := strings.Cut(text, "\r\n# Cacheproxy\r\n")
			if found != tt.ours || strings.Contains(before, "Cacheproxy") {
				t.Errorf("INFO %s has our section: %v", tt.line, found)
			}
			if found && !strings.HasPrefix(own, "proxy_version:test\r\n") {
				t.Errorf("INFO %s: our section begins with %.40q", tt.line, own)
			}
			// What Redis says stands there as it is, only later.
			if got, want := sections(before), sections(rawText); !slices.Equal(got, want) {
				t.Errorf("INFO %s has the sections %q, Redis's %q", tt.line, got, want)
			}
			if got, want := names(before), names(rawText); tt.line != "commandstats" && len(missing(want, got)) > 0 {
				t.Errorf("INFO %s lacks %q of Redis's", tt.line, missing(want, got))
			}
			if strings.HasSuffix(before, "\r\n") != (strings.HasSuffix(rawText, "\r\n")) {
				t.Errorf("INFO %s: before our section stands %q, Redis's ends with %q", tt.line, before[len(before)-4:], rawText[len(rawText)-4:])
			}
		}
		// What Redis has no section for is as empty as there.
		for _, line := range []string{"nosuch", "nosuch other"} {
			if frame, _ := infoReply(t, c, strings.Fields(line)...); frame != map[string]string{"2": "$0\r\n\r\n", "3": "=4\r\ntxt:\r\n"}[proto] {
				t.Errorf("INFO %s answers %q", line, frame)
			}
		}
		_, text := infoReply(t, c, "cacheproxy")
		if !strings.HasPrefix(text, "# Cacheproxy\r\n") || strings.Count(text, "# ") != 1 || !strings.HasSuffix(text, "\r\n") {
			t.Errorf("INFO cacheproxy answers %q", text)
		}
	}
}

// names are the fields of a text, without their values and without what comes and goes with commands and clients.
func names(text string) (out []string) {
	for _, m := range varying.FindAllStringSubmatch(text, -1) {
		if !regexp.MustCompile(`^(cmdstat|latency_percentiles|errorstat|db|module)`).MatchString(m[1]) {
			out = append(out, m[1])
		}
	}
	return out
}

func missing(want, got []string) (out []string) {
	for _, n := range want {
		if !slices.Contains(got, n) {
			out = append(out, n)
		}
	}
	return out
}

// Every line of ours is a field that INFO's readers can parse, and none has the name of one of Redis's.
func TestInfoFields(t *testing.T) {
	w := newWorld(t)
	s := w.start(sidecarOptions{routes: []policy.Route{
		{Name: "user", Match: "user:*", Phase: policy.Phase1}, {Name: "a:b", Match: "ab:*", Phase: policy.Phase2},
	}})
	c := s.dial(t)
	c.want("(nil)", "GET", "user:1")
	c.want("+OK", "SET", "user:1", "v")
	c.want("v", "GET", "user:1")
	w.raw.do("DEL", "user:1")
	c.want("v", "GET", "user:1")
	_, text := infoReply(t, c, "cacheproxy")
	_, theirs := infoReply(t, w.raw, "everything")
	for line := range strings.SplitSeq(strings.TrimSuffix(text, "\r\n"), "\r\n") {
		if line == "# Cacheproxy" {
			continue
		}
		if !regexp.MustCompile(`^[a-z0-9_]+:[^\r\n]*$`).MatchString(line) {
			t.Errorf("%q is no field", line)
		}
		name, _, _ := strings.Cut(line, ":")
		if strings.Count(text, "\r\n"+name+":") != 1 || strings.Contains(theirs, "\r\n"+name+":") {
			t.Errorf("%s is there twice", name)
		}
	}
	for name, want := range map[string]string{
		"proxy_version": "test", "proxy_connected_clients": "1", "proxy_draining": "0", "migration_phase": "mixed",
		"redis_hits": "1", "jsonb_hits": "1", "cache_misses": "1", "redis_hit_rate": "0.333", "overall_hit_rate": "0.667",
		"redis_status": "connected", "redis_status_reason": "", "postgres_status": "connected", "journal_redis_stale": "0", "journal_store_stale": "0",
		"route0": "name=user,phase=phase1,redis_hits=1,jsonb_hits=1,cache_misses=1,writes=1,refused=0,no_row=0,verify_checked=0,verify_dropped=0,verify_missing=0,verify_ttl=0,verify_value=0",
		"route1": "name=a:b,phase=phase2,redis_hits=0,jsonb_hits=0,cache_misses=0,writes=0,refused=0,no_row=0,verify_checked=0,verify_dropped=0,verify_missing=0,verify_ttl=0,verify_value=0",
	} {
		if got := field(text, name); got != want {
			t.Errorf("%s is %q, want %q", name, got, want)
		}
	}
}

func TestInfoInOrder(t *testing.T) {
	w := newWorld(t)
	c := w.sidecar(policy.Phase1).dial(t)
	for _, cmd := range [][]string{{"PING", "1"}, {"INFO", "cacheproxy"}, {"PING", "2"}, {"INFO"}, {"PING", "3"}, {"INFO", "server"}, {"PING", "4"}} {
		c.send(cmd...)
	}
	for _, want := range []string{"1", "# Cacheproxy", "2", "# Server", "3", "# Server", "4"} {
		if got := c.reply(); !strings.HasPrefix(got, want) {
			t.Errorf("got %.40q, want %q", got, want)
		}
	}
}

// In MULTI it is Redis's own.
func TestInfoInMulti(t *testing.T) {
	w := newWorld(t)
	c := w.sidecar(policy.Phase1).dial(t)
	c.want("+OK", "MULTI")
	c.want("+QUEUED", "INFO", "cacheproxy")
	c.want("+QUEUED", "INFO")
	if got := c.do("EXEC"); !strings.HasPrefix(got, "[ # Server") || strings.Contains(got, "Cacheproxy") {
		t.Errorf("EXEC answers %.80q", got)
	}
}

func TestInfoDuringAnOutage(t *testing.T) {
	w := newWorld(t)
	s := w.sidecar(policy.Phase1)
	if err := w.redis.Kill(); err != nil {
		t.Fatal(err)
	}
	w.until("Redis is down", func() bool { return s.srv.Health().Redis.Status == "down" })
	c := s.dial(t)
	c.want("+OK", "SET", "k", "v")
	_, text := infoReply(t, c, "cacheproxy")
	if field(text, "redis_status") != "down" || field(text, "redis_status_reason") == "" || field(text, "journal_redis_stale") != "1" {
		t.Errorf("INFO cacheproxy answers %q", text)
	}
	if got := c.do("INFO"); !strings.HasPrefix(got, "-UNAVAILABLE ") {
		t.Errorf("INFO answers %q", got)
	}
}

// A user who may not ask Redis is told what Redis tells him.
func TestInfoForbidden(t *testing.T) {
	w := newWorld(t)
	c := w.sidecar(policy.Phase1).dial(t)
	if got := w.raw.do("ACL", "SETUSER", "u", "on", ">p", "~*", "+@all", "-info"); got != "+OK" {
		t.Fatal(got)
	}
	c.want("+OK", "AUTH", "u", "p")
	if got := c.do("INFO"); !strings.HasPrefix(got, "-NOPERM ") || strings.Contains(got, "Cacheproxy") {
		t.Errorf("INFO answers %q", got)
	}
	c.want("+PONG", "PING")
}
