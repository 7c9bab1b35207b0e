package proxy_test

import (
	"bytes"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"cacheproxy/internal/command"
	"cacheproxy/internal/testenv"
	"cacheproxy/policy"
	"cacheproxy/proxy"
)

// What a client may hear, a real Redis says: the same bytes, split at the same places, go to one and to the proxy.

// oracleArgs are options of the Redis servers: DEBUG shows what a key holds whatever its type is.
var oracleArgs = []string{"--enable-debug-command", "yes"}

// oracleTargets starts a Redis that is right by definition, and then the ways to others like it that must not be told from it. Each has
// its own Redis, because conversations change more of a server than its keys. The second Redis has no proxy: what differs
// there is not the proxy's doing.
func oracleTargets(t testing.TB) []target {
	redis := func(name string) target {
		r := testenv.Redis(t, oracleArgs...)
		return target{name: name, addr: r.Addr(), upstream: r.Addr()}
	}
	goroutines := false // drive what comes next
	behind := func(name string, routes ...policy.Route) target {
		r := testenv.Redis(t, oracleArgs...)
		w := &world{t: t, pgURL: "none"}
		routed := false
		for _, x := range routes {
			if routed = routed || x.Phase.Rules().UsesStore; routed {
				w.pgURL = testenv.Postgres(t)
			}
		}
		s := w.start(sidecarOptions{redisURL: r.URL(), routes: routes, change: func(c *proxy.ServerConfig) {
			c.Goroutines = goroutines
			c.Redis.Timeout = 20 * time.Second // on a busy machine P8's bounded wait would show here
		}})
		return target{name: name, addr: s.addr, upstream: r.Addr(), routed: routed}
	}
	targets := []target{
		redis("oracle"),
		behind("unrouted"),
		behind("phase1", route(policy.Phase1)),
		redis("redis"),
		behind("phase3", route(policy.Phase3)),
	}
	goroutines = true
	byGoroutines := behind("goroutines", route(policy.Phase1))
	byGoroutines.alone = true // the scheduler decides who comes first
	targets = append(targets, byGoroutines)
	for i := range targets[1:] {
		targets[i+1].half = 1 + i // of what is derived, which is much
	}
	return targets
}

// A run is a conversation in one protocol version, sent in one way.
type run struct {
	conversation
	proto int
	way   way
	seed  int // of the places where its bytes are split
}

func (r run) String() string { return fmt.Sprintf("%s: %q (resp%d, %s)", r.at, r.name, r.proto, r.way) }

// runs of conversations: each in both versions and in every way that it can be sent. Derived ones, which are many, are sent in pieces
// in one version and step by step in the other.
func runs(conversations []conversation) (out []run) {
	for _, proto := range []int{2, 3} {
		for _, way := range []way{single, pieces, bytewise} {
			for i, c := range conversations {
				if (c.proto == 0 || c.proto == proto) && (way != bytewise || c.bytes) && (way != pieces || !c.single) && (!c.derived || (way == single) == (proto == 2)) {
					out = append(out, run{c, proto, way, i})
				}
			}
		}
	}
	return out
}

// several: more than one client has something to say.
func (c conversation) several() bool {
	return slices.ContainsFunc(c.steps, func(s step) bool { return s.client != c.steps[0].client })
}

// resetCommands make one conversation's leavings nothing to the next.
var resetCommands = [][]string{{"CLIENT", "UNPAUSE"}, {"FLUSHALL"}, {"FUNCTION", "FLUSH"}, {"SCRIPT", "FLUSH"}}

// hold has the conversations of runs with a target, one after the other.
func (g target) hold(t *testing.T, runs []run) [][]heard {
	out := make([][]heard, len(runs))
	for i, r := range runs {
		if g.alone && r.several() {
			continue
		}
		if r.derived && g.half > 0 && (r.seed+int(r.way))%2 == g.half%2 {
			continue
		}
		if said, err := ask(g.addr, resetCommands...); err != nil || strings.Count(said, "+OK\r\n") != len(resetCommands)+1 {
			t.Errorf("%s before %s: %q, %v", g.name, r, said, err)
			return out
		}
		bound := replyBound
		if notYet.of(g, r) != nil {
			bound = knownBound
		}
		out[i] = hold(g, r, bound)
	}
	return out
}

// A mismatch is a step that two servers answered differently.
type mismatch struct {
	step      int
	want, got string
}

// compareHeard compares what two servers answered in one conversation.
func compareHeard(g target, c conversation, want, got []heard) *mismatch {
	type client struct {
		last  []string   // what it said last
		multi [][]string // what it has queued
	}
	clients := map[string]*client{}
	for i := range max(len(want), len(got)) {
		if i >= len(want) || i >= len(got) {
			end := func(h []heard) string {
				if len(h) == 0 {
					return "nothing"
				}
				return fmt.Sprintf("%q", h[len(h)-1])
			}
			return &mismatch{i, end(want), end(got)}
		}
		var s step
		if i < len(c.steps) {
			s = c.steps[i]
		}
		k := clients[s.client]
		if k == nil {
			k = &client{}
			clients[s.client] = k
		}
		if s.op == opSend || s.op == opSay {
			k.last = s.words
		}
		if len(want[i]) != len(got[i]) {
			return &mismatch{i, fmt.Sprintf("%q", want[i]), fmt.Sprintf("%q", got[i])}
		}
		for j := range want[i] {
			w, g2 := parseNode(want[i][j]), parseNode(got[i][j])
			queued := k.multi
			if len(k.last) > 0 {
				switch first := strings.ToLower(k.last[0]); {
				case string(want[i][j]) == "+QUEUED\r\n":
					k.multi = append(k.multi, k.last)
				case first == "exec" || first == "discard" || first == "reset":
					k.multi = nil
				}
				if strings.EqualFold(k.last[0], "exec") && len(w.kids) == len(queued) && len(g2.kids) == len(queued) {
					for n, cmd := range queued {
						level(g, rowOf(cmd), cmd, w.kids[n], g2.kids[n])
					}
				} else {
					level(g, rowOf(k.last), k.last, w, g2)
				}
			}
			if a, b := w.bytes(), g2.bytes(); !bytes.Equal(a, b) {
				return &mismatch{i, fmt.Sprintf("%q", a), fmt.Sprintf("%q", b)}
			}
		}
	}
	return nil
}

// rowOf names the row of the command table that a command belongs to; "" if there is none.
func rowOf(words []string) string {
	args := make([][]byte, len(words))
	for i, w := range words {
		args[i] = []byte(w)
	}
	if info := command.Resolve(args); info != nil {
		return info.Name
	}
	return ""
}

// clip keeps a long reply readable: what is around the first difference.
func clip(a, b string) (string, string) {
	const around = 160
	i := 0
	for i < len(a) && i < len(b) && a[i] == b[i] {
		i++
	}
	cut := func(s string) string {
		from, to := max(0, i-around), min(len(s), i+around)
		if from > 0 {
			return "…" + s[from:to]
		}
		return s[from:to]
	}
	return cut(a), cut(b)
}

// report prints a conversation up to where it went apart.
func report(r run, m *mismatch, want []heard) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s: step %d\n", r, m.step+1)
	const before = 12
	for i := max(0, m.step-before); i < min(m.step, len(r.steps)); i++ {
		fmt.Fprintf(&b, "    %-40s", r.steps[i].text)
		for _, f := range want[i] {
			fmt.Fprintf(&b, " %.60q", f)
		}
		b.WriteByte('\n')
	}
	text := "(the silence after the last step)"
	if m.step < len(r.steps) {
		text = r.steps[m.step].text
	}
	w, g := clip(m.want, m.got)
	fmt.Fprintf(&b, "  > %s\n    redis %s\n    proxy %s", text, w, g)
	return b.String()
}

// TestOracle has every conversation of the corpus, and those derived from the command table, with Redis and with each target.
//
//	ORACLE_CASE=hashes go test -run TestOracle ./proxy    # only conversations whose name contains that
func TestOracle(t *testing.T) {
	t.Parallel()
	corpus := readConversations(t)
	derived, covers := derive(corpus)
	all := append(slices.Clone(corpus), derived...)
	filter := os.Getenv("ORACLE_CASE")
	all = slices.DeleteFunc(all, func(c conversation) bool { return !strings.Contains(c.name, filter) })
	runs := runs(all)
	targets := oracleTargets(t)
	results := make([][][]heard, len(targets))
	var wg sync.WaitGroup
	for i, g := range targets {
		wg.Go(func() {
			results[i] = g.hold(t, runs)
		})
	}
	wg.Wait()
	if t.Failed() {
		return
	}
	t.Run("corpus", func(t *testing.T) {
		for i, r := range runs {
			for n, h := range results[0][i] {
				if len(h) == 1 && n == len(results[0][i])-1 && n <= len(r.steps) && (n < len(r.steps) || len(h[0]) > 0) && !isFrames(h) {
					t.Errorf("%s: step %d: Redis says %q", r, n+1, h)
				}
			}
		}
	})
	for n, g := range targets[1:] {
		t.Run(g.name, func(t *testing.T) {
			fails := map[*exemption]bool{}
			for i, r := range runs {
				if results[n+1][i] == nil {
					continue
				}
				m := compareHeard(g, r.conversation, results[0][i], results[n+1][i])
				if e := notYet.of(g, r); e != nil {
					fails[e] = fails[e] || m != nil
					continue
				}
				if m != nil {
					t.Error(report(r, m, results[0][i]))
				}
			}
			for e, fails := range fails {
				if !fails {
					t.Errorf("%q is answered like Redis now, though %s: take it off the list notYet", e.name, e.why)
				}
			}
		})
	}
	if filter != "" {
		return
	}
	for _, e := range notYet {
		n := 0
		for _, c := range all {
			if c.name == e.name {
				n++
			}
		}
		if n != 1 {
			t.Errorf("%d conversations are called %q", n, e.name)
		}
	}
	t.Run("coverage", func(t *testing.T) { covers.check(t, targets[0], runs, results[0]) })
	for _, d := range differences {
		if !used.by[d] {
			t.Errorf("no reply to %v has %s: take that off the list of differences", d.rows, d.field)
		}
	}
	t.Logf("%d conversations in %d runs with %d targets", len(all), len(runs), len(targets)-1)
}

// isFrames tells whether what was heard are replies.
func isFrames(h heard) bool {
	for _, f := range h {
		if parseNode(f).kind == 0 {
			return false
		}
	}
	return true
}
