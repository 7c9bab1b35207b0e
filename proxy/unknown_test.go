package proxy_test

import (
	"strings"
	"testing"

	"cacheproxy/policy"
)

// renamed starts a Redis some of whose commands have names that the command table does not know, as those of modules and of
// later versions have.
func renamed(t *testing.T, more ...string) *world {
	t.Helper()
	args := more
	for _, name := range []string{"decr", "strlen", "lpush", "blpop", "sort", "config"} { // none that the proxy's scripts use
		args = append(args, "--rename-command", strings.ToUpper(name), "x."+name)
	}
	return newWorld(t, args...)
}

// calls is how often Redis has run a command.
func (w *world) calls(name string) string {
	for line := range strings.SplitSeq(w.raw.do("INFO", "commandstats"), "\r\n") {
		if v, ok := strings.CutPrefix(line, "cmdstat_"+name+":calls="); ok {
			n, _, _ := strings.Cut(v, ",")
			return n
		}
	}
	return "0"
}

func TestUnknownCommandsAreLearned(t *testing.T) {
	for _, proto := range []string{"2", "3"} {
		w := renamed(t)
		s := w.start(sidecarOptions{routes: []policy.Route{{Name: "r", Match: "r:*", Phase: policy.Phase1}}})
		c := s.dial(t)
		c.do("HELLO", proto)
		asked, keys := w.calls("command|info"), w.calls("command|getkeys")
		for _, want := range []string{":-1", ":-2", ":-3", ":-4"} {
			c.want(want, "x.DECR", "r:n")
		}
		c.want(":-1", "X.decr", "plain")
		if now := w.calls("command|info"); asked != "0" || now != "1" {
			t.Errorf("Redis was asked %s times, before it %s times", now, asked)
		}
		if now := w.calls("command|getkeys"); now != keys {
			t.Errorf("Redis was asked for the keys of a command that it has told of: %s, before it %s", now, keys)
		}
		// What it wrote is in the store, and only that of the route.
		if got := w.sql("SELECT string_agg(key || '=' || coalesce(convert_from(raw, 'UTF8'), value::text), ' ') FROM cacheproxy.entries"); got != "r:n=-4" {
			t.Errorf("the store has %q", got)
		}
		// What Redis lacks is loaded before an unknown command reads it.
		w.raw.do("DEL", "r:n")
		c.want(":2", "x.strlen", "r:n")
		w.raw.do("DEL", "r:n")
		c.want(":-5", "x.decr", "r:n")
		c.want("-WRONGTYPE Operation against a key holding the wrong kind of value", "x.lpush", "r:n", "v")
		if got := w.calls("command|info"); got != "3" {
			t.Errorf("Redis was asked %s times about three commands", got)
		}
		// One whose keys depend on its options is asked about each time.
		c.want(":2", "RPUSH", "l", "2", "1")
		c.want(":2", "x.sort", "l", "STORE", "r:l")
		c.want("[1 2]", "x.sort", "l")
		if got := w.calls("command|getkeys"); got != "2" {
			t.Errorf("Redis was asked for keys %s times", got)
		}
		// A container, too: its subcommands are as unknown as it is.
		c.want("[maxmemory 0]", "x.config", "GET", "maxmemory")

		// A pipeline of learned commands stays in order with the others.
		for _, cmd := range [][]string{{"SET", "r:p", "14"}, {"x.decr", "r:p"}, {"GET", "r:p"}, {"x.strlen", "r:p"}, {"DEL", "r:p"}, {"x.strlen", "r:p"}} {
			c.send(cmd...)
		}
		for _, want := range []string{"+OK", ":13", "13", ":2", ":1", ":0"} {
			if got := c.reply(); got != want {
				t.Errorf("got %q, want %q", got, want)
			}
		}
	}
}

func TestUnknownToRedisToo(t *testing.T) {
	w := renamed(t)
	c := w.sidecar(policy.Phase1).dial(t)
	for _, args := range [][]string{{"NOSUCH"}, {"NOSUCH", "k", "v"}, {"config|get", "x"}, {"x.config|get", "x"}, {"CONFIG", "GET", "x"}, {"CLIENT", "NOSUCH"}, {""}} {
		c.want(w.raw.do(args...), args...)
	}
	if got := w.calls("command|getkeys"); got != "0" {
		t.Errorf("Redis was asked %s times for the keys of what it does not know", got)
	}
}

// An unknown command may wait: then it does on a connection of its own, which the client takes along when it leaves.
func TestUnknownCommandsThatBlock(t *testing.T) {
	w := renamed(t)
	s := w.start(sidecarOptions{routes: []policy.Route{{Name: "r", Match: "r:*", Phase: policy.Phase1}}})
	c := s.dial(t)
	c.want("(nil)", "x.blpop", "r:q", "0") // on a key of a route it runs in a transaction, where nothing waits
	c.send("x.blpop", "q", "0")
	blocked := func(n string) func() bool {
		return func() bool { return field(w.raw.do("INFO", "clients"), "blocked_clients") == n }
	}
	w.until("it blocks", blocked("1"))
	for range 8 { // more than there are shared connections
		o := s.dial(t)
		o.want("(nil)", "LPOP", "other")
	}
	c.Close()
	w.until("it has left", blocked("0"))
	o := s.dial(t)
	o.want(":1", "RPUSH", "q", "v")
	o.want("[q v]", "x.blpop", "q", "0")
}

// Where Redis does not tell, the keys of a route are not written behind the store's back.
func TestUnknownCommandsThatNobodyTells(t *testing.T) {
	w := renamed(t)
	if got := w.raw.do("ACL", "SETUSER", "p", "on", ">s", "~*", "&*", "+@all", "-command"); got != "+OK" {
		t.Fatal(got)
	}
	url := "redis://p:s@" + w.redis.Addr() + "/0"
	for _, phase := range []policy.Phase{policy.Phase1, policy.Phase3} {
		c := w.start(sidecarOptions{redisURL: url, routes: []policy.Route{route(phase)}}).dial(t)
		got := c.do("x.decr", "n")
		if phase == policy.Phase1 && got != "-DENIED redis does not let the proxy ask which keys this command names (COMMAND)" || phase == policy.Phase3 && got != ":-1" {
			t.Errorf("%s: %q", phase, got)
		}
	}
	w = renamed(t)
	s := w.sidecar(policy.Phase1)
	if err := w.redis.Kill(); err != nil {
		t.Fatal(err)
	}
	w.until("Redis is down", func() bool { return s.srv.Health().Redis.Status == "down" })
	if got := s.dial(t).do("x.decr", "n"); !strings.HasPrefix(got, "-UNAVAILABLE ") {
		t.Errorf("%q", got)
	}
}

// What one Redis has told is not believed of its successor.
func TestLearnedIsForgotten(t *testing.T) {
	w := renamed(t)
	s := w.sidecar(policy.Phase3)
	c := s.dial(t)
	c.want(":-1", "x.decr", "n")
	c.want(":-2", "x.decr", "n")
	if err := w.redis.Restart(); err != nil {
		t.Fatal(err)
	}
	w.raw = dial(t, w.redis.Addr())
	w.until("Redis is trusted again", func() bool {
		return s.srv.Health().Redis.Status == "connected" && strings.HasPrefix(s.dial(t).do("x.decr", "m"), ":")
	})
	if got := w.calls("command|info"); got == "0" {
		t.Error("the successor was not asked")
	}
}

// In a transaction they are learned, too, and mirrored when it is run.
func TestUnknownCommandsInMulti(t *testing.T) {
	w := renamed(t)
	c := w.start(sidecarOptions{routes: []policy.Route{{Name: "r", Match: "r:*", Phase: policy.Phase1}}}).dial(t)
	c.want(":2", "RPUSH", "l", "2", "1")
	c.want("+OK", "MULTI")
	c.want("+QUEUED", "x.decr", "r:n")
	c.want("+QUEUED", "x.decr", "r:n")
	c.want("+QUEUED", "x.sort", "l", "STORE", "r:l")
	c.want("[:-1 :-2 :2]", "EXEC")
	w.raw.do("DEL", "r:n")
	c.want("-2", "GET", "r:n")
	c.want("+OK", "MULTI")
	c.want("+QUEUED", "x.decr", "r:n")
	if got := c.do("NOSUCH", "r:n"); !strings.HasPrefix(got, "-ERR unknown command") {
		t.Errorf("%q", got)
	}
	c.want("-EXECABORT Transaction discarded because of previous errors.", "EXEC")
	c.want("-2", "GET", "r:n")
}
