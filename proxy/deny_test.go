package proxy_test

import (
	"slices"
	"strings"
	"testing"

	"cacheproxy/internal/config"
	"cacheproxy/policy"
	"cacheproxy/proxy"
)

// denying starts a sidecar with entries for commands.deny, in front of a Redis that allows DEBUG and MODULE.
func denying(t *testing.T, entries []string, routes ...policy.Route) (*world, *sidecar) {
	t.Helper()
	w := newWorld(t, "--enable-debug-command", "yes", "--enable-module-command", "yes", "--appendonly", "yes") // LOADAOF ends a Redis without one
	return w, w.start(sidecarOptions{routes: routes, change: func(c *proxy.ServerConfig) { c.Deny = entries }})
}

func defaultDeny() []string { return config.Defaults().Commands.Deny }

// wantDenied sends a command and expects a refusal that names the command and the entry.
func (c *conn) wantDenied(name, entry string, args ...string) {
	c.t.Helper()
	c.want("-DENIED "+name+" is denied by the proxy's setting commands.deny ("+entry+")", args...)
}

func TestDeniedByDefault(t *testing.T) {
	w, s := denying(t, defaultDeny(), route(policy.Phase1))
	run := w.raw.do("INFO", "server")
	c := s.dial(t)
	for _, line := range []string{
		"SHUTDOWN", "shutdown NOSAVE", "SHUTDOWN NOW FORCE", "SHUTDOWN ABORT", "REPLICAOF NO ONE", "REPLICAOF 127.0.0.1 1", "SLAVEOF 127.0.0.1 1",
		"FAILOVER", "FAILOVER ABORT", "MODULE LOAD /tmp/x.so", "MODULE LOADEX /tmp/x.so", "MODULE UNLOAD x", "module load x",
		"DEBUG SEGFAULT", "debug segfault", "DEBUG PANIC", "DEBUG ASSERT", "DEBUG OOM", "DEBUG RESTART", "DEBUG CRASH-AND-RECOVER 0",
		"CLUSTER RESET HARD", "CLUSTER FORGET x", "CLUSTER FAILOVER", "CLUSTER REPLICATE x", "CLUSTER MEET 127.0.0.1 1", "CLUSTER SETSLOT 1 STABLE",
		"SHUTDOWN with too many words", "MODULE LOAD",
	} {
		args := strings.Fields(line)
		if got := c.do(args...); !strings.HasPrefix(got, "-DENIED "+strings.ToLower(args[0])) || !strings.Contains(got, "commands.deny") {
			t.Errorf("%s: %q", line, got)
		}
		c.want("+PONG", "PING")
	}
	// Redis reads a subcommand of DEBUG as a C string.
	c.wantDenied("debug|segfault x", "debug|segfault", "DEBUG", "SEGFAULT\x00x")
	c.wantDenied("shutdown", "shutdown", "ShutDown")
	c.wantDenied("module|load", "module|load", "MODULE", "LOAD", "x")
	if now := w.raw.do("INFO", "server"); field(now, "run_id") != field(run, "run_id") || field(now, "process_id") != field(run, "process_id") {
		t.Error("Redis is another process now")
	}
	if got := w.raw.do("ROLE"); !strings.HasPrefix(got, "[master") {
		t.Errorf("the role of Redis is %q now", got)
	}
	if got := s.srv.Stats(t.Context()).Proxy.Denied; got < 30 {
		t.Errorf("%d commands were counted as denied", got)
	}
}

// field is a field of INFO.
func field(info, name string) string {
	for line := range strings.SplitSeq(info, "\r\n") {
		if v, ok := strings.CutPrefix(line, name+":"); ok {
			return v
		}
	}
	return ""
}

// What Redis's own test suite uses passes, and so do the other subcommands of what is denied.
func TestNotDeniedByDefault(t *testing.T) {
	w, s := denying(t, defaultDeny(), route(policy.Phase3))
	c := s.dial(t)
	c.want("+OK", "SET", "k", "v")
	for _, line := range []string{
		"DEBUG OBJECT k", "DEBUG SLEEP 0", "DEBUG SET-ACTIVE-EXPIRE 0", "DEBUG SET-ACTIVE-EXPIRE 1", "DEBUG JMAP", "DEBUG QUICKLIST-PACKED-THRESHOLD 200b",
		"DEBUG QUICKLIST-PACKED-THRESHOLD 0", "DEBUG STRINGMATCH-LEN 1 a*", "DEBUG CHANGE-REPL-ID", "DEBUG RELOAD", "DEBUG LOADAOF", "DEBUG DIGEST",
		"DEBUG DIGEST-VALUE k", "DEBUG SET-SKIP-CHECKSUM-VALIDATION 0", "DEBUG PAUSE-CRON 0", "DEBUG REPLYBUFFER RESIZING 1", "DEBUG HTSTATS-KEY k",
		"DEBUG PROTOCOL bignum", "DEBUG NOSUCH", "DEBUG HELP", "DEBUG", "MODULE LIST", "MODULE HELP", "MODULE NOSUCH", "CLUSTER INFO", "CLUSTER NOSUCH",
		"CONFIG GET maxmemory", "CONFIG SET maxmemory 0", "COMMAND INFO shutdown", "COMMAND LIST FILTERBY PATTERN shutdown", "COMMAND GETKEYS GET k",
		"COMMAND DOCS replicaof", "ACL CAT dangerous", "ACL WHOAMI", "OBJECT ENCODING k", "MEMORY USAGE k", "LATENCY LATEST", "SLOWLOG LEN",
	} {
		args := strings.Fields(line)
		want, got := w.raw.do(args...), c.do(args...)
		switch args[len(args)-1] {
		case "dangerous", "replicaof", "shutdown": // sets, in the order of a hash table
			want, got = sortedWords(want), sortedWords(got)
		}
		if got != want {
			t.Errorf("%s\nredis %.300q\nproxy %.300q", line, want, got)
		}
		w.until("Redis is trusted again", func() bool { return s.srv.Health().Redis.Status == "connected" })
	}
}

func sortedWords(s string) string {
	words := strings.Fields(s)
	slices.Sort(words)
	return strings.Join(words, " ")
}

func TestDenyRules(t *testing.T) {
	_, s := denying(t, []string{"KEYS", "config set", "@pubsub", "debug|s*", "nosuch.*", "cacheproxy|phase"}, route(policy.Phase1))
	c := s.dial(t)
	c.wantDenied("keys", "keys", "KEYS", "*")
	c.wantDenied("config|set", "config|set", "CONFIG", "SET", "maxmemory", "1")
	c.want("[maxmemory 0]", "CONFIG", "GET", "maxmemory")
	c.wantDenied("publish", "@pubsub", "PUBLISH", "a", "b")
	c.wantDenied("subscribe", "@pubsub", "SUBSCRIBE", "a")
	c.wantDenied("debug|sleep", "debug|s*", "DEBUG", "SLEEP", "0")
	c.want("+OK", "DEBUG", "QUICKLIST-PACKED-THRESHOLD", "0")
	c.wantDenied("nosuch.thing", "nosuch.*", "NOSUCH.THING", "k")
	c.wantDenied(strings.Repeat("nosuch.", 9)+"n", "nosuch.*", strings.Repeat("NOSUCH.", 50))
	c.want("-ERR unknown command 'NOSUCH', with args beginning with: 'k' ", "NOSUCH", "k")
	c.wantDenied("cacheproxy", "cacheproxy|phase", "CACHEPROXY", "PHASE")
	c.want("test", "CACHEPROXY", "VERSION")
	c.want("+OK", "SET", "k", "v")
	c.want("v", "GET", "k")
}

func TestDenyIsLive(t *testing.T) {
	w, s := denying(t, nil, route(policy.Phase1))
	c := s.dial(t)
	c.want("[k]", "EVAL", "return KEYS", "1", "k") // nothing is denied without entries
	c.want("+OK", "DEBUG", "SET-ACTIVE-EXPIRE", "1")
	if err := s.srv.SetDeny([]string{"debug", "eval"}); err != nil {
		t.Fatal(err)
	}
	c.wantDenied("debug", "debug", "DEBUG", "SET-ACTIVE-EXPIRE", "1")
	c.wantDenied("eval", "eval", "EVAL", "return KEYS", "1", "k")
	if err := s.srv.SetDeny([]string{"a|b|c"}); err == nil {
		t.Error("a mistake was taken over")
	}
	c.wantDenied("debug", "debug", "DEBUG", "SET-ACTIVE-EXPIRE", "1") // the rules before it stay
	if err := s.srv.SetDeny(nil); err != nil {
		t.Fatal(err)
	}
	c.want("+OK", "DEBUG", "SET-ACTIVE-EXPIRE", "1")
	_ = w
}

// A denied command takes no part in a transaction and spoils it, as any that cannot be queued.
func TestDeniedInMulti(t *testing.T) {
	for _, phase := range []policy.Phase{policy.Phase1, policy.Phase3} {
		w, s := denying(t, defaultDeny(), policy.Route{Name: "r", Match: "r:*", Phase: phase})
		c := s.dial(t)
		c.want("+OK", "MULTI")
		c.want("+QUEUED", "SET", "k", "v")
		c.wantDenied("shutdown", "shutdown", "SHUTDOWN", "NOSAVE")
		c.want("+QUEUED", "PING")
		c.want("-EXECABORT Transaction discarded because of previous errors.", "EXEC")
		c.want("(nil)", "GET", "k")
		c.want("-ERR EXEC without MULTI", "EXEC")

		// All at once: the refusal stands in its place.
		c.send("MULTI")
		c.send("SET", "k", "v")
		c.send("DEBUG", "SEGFAULT")
		c.send("EXEC")
		c.send("GET", "k")
		for _, want := range []string{"+OK", "+QUEUED", "-DENIED debug|segfault is denied by the proxy's setting commands.deny (debug|segfault)",
			"-EXECABORT Transaction discarded because of previous errors.", "(nil)"} {
			if got := c.reply(); got != want {
				t.Errorf("got %q, want %q", got, want)
			}
		}
		// DISCARD, and a new transaction, begin anew.
		c.want("+OK", "MULTI")
		c.wantDenied("failover", "failover", "FAILOVER")
		c.want("+OK", "DISCARD")
		c.want("+OK", "MULTI")
		c.want("+QUEUED", "SET", "k", "w")
		c.want("[+OK]", "EXEC")
		if got := w.raw.do("GET", "k"); got != "w" {
			t.Errorf("Redis has %q", got)
		}
	}
}

// On connections whose bytes go through as they are a denied command does not.
func TestDeniedToSubscribers(t *testing.T) {
	w, s := denying(t, append(defaultDeny(), "echo"), route(policy.Phase1))
	for _, proto := range []string{"2", "3"} {
		c := s.dial(t)
		c.do("HELLO", proto)
		c.want("[subscribe a :1]", "SUBSCRIBE", "a")
		c.wantDenied("shutdown", "shutdown", "SHUTDOWN", "NOSAVE")
		c.wantDenied("debug|segfault", "debug|segfault", "DEBUG", "SEGFAULT")
		if got := w.raw.do("PUBLISH", "a", "x"); got != ":1" {
			t.Errorf("PUBLISH: %q", got)
		}
		if got := c.reply(); got != "[message a x]" {
			t.Errorf("got %q", got)
		}
		c.want("[unsubscribe a :0]", "UNSUBSCRIBE", "a")
		c.wantDenied("echo", "echo", "ECHO", "x")
	}
	m := s.dial(t)
	m.want("+OK", "MONITOR")
	m.send("SHUTDOWN", "NOSAVE")
	for {
		got := m.reply()
		if strings.HasPrefix(got, "-DENIED shutdown ") {
			break
		}
		if !strings.HasPrefix(got, "+") { // the commands of others, and the proxy's own
			t.Fatalf("got %q", got)
		}
	}
	k := s.dial(t)
	k.do("HELLO", "3")
	k.want("+OK", "CLIENT", "TRACKING", "ON")
	k.wantDenied("replicaof", "replicaof", "REPLICAOF", "NO", "ONE")
	k.want("+PONG", "PING")
}

func TestDeniedOnOtherConnections(t *testing.T) {
	w, s := denying(t, defaultDeny(), route(policy.Phase1))
	c := s.dial(t)
	c.want("+OK", "SELECT", "3") // a connection of its own
	c.wantDenied("shutdown", "shutdown", "SHUTDOWN")
	c.want("+OK", "WATCH", "k")
	c.wantDenied("shutdown", "shutdown", "SHUTDOWN")
	c.want("+OK", "UNWATCH")
	if got := w.raw.do("ACL", "SETUSER", "u", "on", ">p", "~*", "+@all"); got != "+OK" {
		t.Fatal(got)
	}
	c.want("+OK", "AUTH", "u", "p")
	c.wantDenied("debug|panic", "debug|panic", "DEBUG", "PANIC")
	c.want("u", "ACL", "WHOAMI")

	// Without a reply: it is denied all the same.
	c = s.dial(t)
	c.send("CLIENT", "REPLY", "OFF")
	c.send("SHUTDOWN", "NOSAVE")
	c.send("CLIENT", "REPLY", "ON")
	if got := c.reply(); got != "+OK" {
		t.Errorf("got %q", got)
	}
	c.want("+PONG", "PING")
	if got := w.raw.do("PING"); got != "+PONG" {
		t.Errorf("Redis: %q", got)
	}

	// Who has not authenticated is told nothing else.
	p := w.start(sidecarOptions{routes: []policy.Route{route(policy.Phase1)}, change: func(c *proxy.ServerConfig) {
		c.Deny, c.Password = defaultDeny(), "secret"
	}})
	c = p.dial(t)
	c.want("-NOAUTH Authentication required.", "SHUTDOWN")
	c.want("+OK", "AUTH", "secret")
	c.wantDenied("shutdown", "shutdown", "SHUTDOWN")
}

func TestDeniedWhileRedisIsDown(t *testing.T) {
	w, s := denying(t, defaultDeny(), route(policy.Phase1))
	if err := w.redis.Kill(); err != nil {
		t.Fatal(err)
	}
	w.until("Redis is down", func() bool { return s.srv.Health().Redis.Status == "down" })
	c := s.dial(t)
	c.wantDenied("shutdown", "shutdown", "SHUTDOWN")
	c.want("+OK", "SET", "k", "v")
	c.want("v", "GET", "k")
}

func TestNewRefusesBadDeny(t *testing.T) {
	if _, err := proxy.New(proxy.ServerConfig{Config: proxy.Config{Redis: proxy.RedisConfig{URL: "redis://127.0.0.1:1"}}, Deny: []string{"@"}}, nil); err == nil {
		t.Error("started with a rule that cannot be read")
	}
}
