package main

import (
	"fmt"
	"strings"
	"testing"

	"cacheproxy/internal/testenv"
)

func TestCheck(t *testing.T) {
	for _, c := range []struct {
		name  string
		redis []string // options of redis-server
		text  string
		code  int
		says  []string
		not   []string
	}{
		{
			name: "all is well", text: "routes: [{name: user, match: \"user:*\", phase: phase1}]",
			says: []string{"ok    redis     reached", "role: primary", "no limit with noeviction", "all that are used", "encoding: UTF8", "cacheproxy: created"},
			not:  []string{"warn", "fail"},
		},
		{
			name: "no route has a store", text: "routes: [{name: user, match: \"user:*\", phase: phase3}]",
			says: []string{"not used", "no append-only file"}, not: []string{"fail"},
		},
		{
			name: "memory", redis: []string{"--maxmemory", "10mb", "--maxmemory-policy", "allkeys-lru"}, text: "redis: {max_memory: 64mb}",
			says: []string{"memory: 10MiB with allkeys-lru, but redis.max_memory is 64MiB", "can evict the proxy's journal"}, not: []string{"fail"},
		},
		{
			name: "memory that serve will set", redis: []string{"--maxmemory", "10mb"}, text: "redis: {max_memory: 64mb, manage_memory: true}",
			says: []string{"serve sets 64MiB with allkeys-lru"}, not: []string{"fail"},
		},
		{
			name: "a limit without eviction", redis: []string{"--maxmemory", "10mb"}, says: []string{"warn  redis     noeviction"},
		},
		{
			name: "a replica", redis: []string{"--replicaof", "127.0.0.1 1"}, code: exitNot, says: []string{"fail  redis     role: slave"},
		},
		{
			name: "forbidden comforts", redis: []string{"--rename-command", "CONFIG", "", "--user", "default", "on", "nopass", "~*", "&*", "+@all", "-client|kill"},
			text: "redis: {max_memory: 64mb, manage_memory: true}",
			says: []string{"right for CLIENT KILL is missing", "right for CONFIG SET is missing"}, not: []string{"fail", "EVAL"},
		},
		{
			name: "forbidden necessities", redis: []string{"--user", "default", "on", "nopass", "~app:*", "&*", "+@all", "-eval", "-script"}, code: exitNot,
			says: []string{"fail  redis     the right for EVAL", "fail  redis     the right for SCRIPT", "fail  redis     the right for keys cacheproxy:*"},
		},
		{
			name: "no INFO", redis: []string{"--user", "default", "on", "nopass", "~*", "&*", "+@all", "-info"}, code: exitNot, says: []string{"fail  redis     the right for INFO"},
		},
		{
			name: "a password is missing", redis: []string{"--requirepass", "hush"}, code: exitUnreachable, says: []string{"fail  redis     cannot be used: NOAUTH"},
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := newSite(t, testenv.Redis(t, c.redis...).URL(), testenv.Postgres(t))
			s.write(c.text)
			if code := exitCode(s.run("check"), &s.stderr); code != c.code {
				t.Errorf("exit code %d, want %d", code, c.code)
			}
			if !s.stdout.has(c.says...) {
				t.Errorf("it does not say %q", c.says)
			}
			for _, word := range c.not {
				if s.stdout.has(word) {
					t.Errorf("it says %q", word)
				}
			}
		})
	}
}

func TestCheckUnreachable(t *testing.T) {
	s := newSite(t, "", "")
	s.redisURL = fmt.Sprintf("redis://someone:hush@127.0.0.1:%d", testenv.FreePort(t))
	s.postgresURL = fmt.Sprintf("postgres://someone:hush@127.0.0.1:%d/app", testenv.FreePort(t))
	s.write("")
	if code := exitCode(s.run("check"), &s.stderr); code != exitUnreachable {
		t.Errorf("exit code %d", code)
	}
	if !s.stdout.has("fail  redis     cannot be used: connect: connection refused", "fail  postgres  cannot be used: connect: connection refused") {
		t.Error("it does not say why")
	}
	if all := s.stdout.String() + s.stderr.String(); strings.Contains(all, "hush") || strings.Contains(all, "someone") {
		t.Error("credentials are printed")
	}
	if s.stderr.String() != "" {
		t.Errorf("a finding is reported twice: %s", s.stderr.String())
	}
}
