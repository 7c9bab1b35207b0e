package testenv

import (
	"bytes"
	"crypto/sha1" //nolint:gosec // EVALSHA names scripts by it
	"encoding/hex"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
)

// Step is one message of the proxy to a store, or the answer to it.
type Step struct {
	Name string // of the script, such as "promote", or what the SQL does, such as "COMMIT"; see statements
	Done bool   // the store has done it, and its answer is on the way
	Said string // that answer, as far as it has come
}

// Steps recognizes the messages of one sidecar on its links to the stores. Its methods are safe for concurrent use.
type Steps struct {
	mu      sync.Mutex
	scripts map[string]string            // guarded by mu: digest -> name
	sql     map[string]string            // guarded by mu: name of a prepared statement -> name of the step
	asked   map[*Link]map[int64][]string // guarded by mu: steps of a connection that are not answered
	f       func(Step) bool              // guarded by mu
}

// NewSteps looks at what passes through a sidecar's links; nil is no link. It must be called before the sidecar starts, for it learns the names of
// scripts and statements from what is said first.
func NewSteps(toRedis, toPostgres *Link) *Steps {
	s := &Steps{scripts: map[string]string{}, sql: map[string]string{}, asked: map[*Link]map[int64][]string{}}
	for link, find := range map[*Link]func([]byte) []string{toRedis: s.inRedis, toPostgres: s.inPostgres} {
		if link != nil {
			s.asked[link] = map[int64][]string{}
			link.Look(func(p Passing) bool { return s.pass(link, p, find) })
		}
	}
	return s
}

// At calls f with every step from now on, twice: before the store has it, and before its answer passes. f decides whether it passes; if not, the connection ends. nil
// ends it. f may wait, and is called for several connections at once.
func (s *Steps) At(f func(Step) bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.f = f
}

func (s *Steps) pass(link *Link, p Passing, find func([]byte) []string) bool {
	s.mu.Lock()
	var names []string
	if p.Request {
		names = find(p.Bytes)
		s.asked[link][p.Conn] = append(s.asked[link][p.Conn], names...)
	} else {
		names = s.asked[link][p.Conn]
		delete(s.asked[link], p.Conn)
	}
	f := s.f
	s.mu.Unlock()
	pass := true
	for _, name := range names {
		step := Step{Name: name, Done: !p.Request}
		if step.Done {
			step.Said = string(p.Bytes)
		}
		if f != nil && !f(step) {
			pass = false
		}
	}
	return pass
}

var (
	loadsScript = regexp.MustCompile(`SCRIPT\r\n\$4\r\nLOAD\r\n\$(\d+)\r\n-- (\w+)\n`)
	hits        = regexp.MustCompile(`\*2\r\n\$3\r\nGET\r\n\$\d+\r\n([^\r]*)\r\n`)
	runsScript  = regexp.MustCompile(`EVALSHA\r\n\$40\r\n([0-9a-f]{40})\r\n|EVAL\r\n\$\d+\r\n-- (\w+)\n`)
)

// commands are what the proxy says to Redis without a script, where it is a step of its own.
var commands = []struct {
	bytes []byte
	name  string
}{
	{[]byte("GET\r\n$16\r\ncacheproxy:clock\r\n"), "clock"},
	{[]byte("SET\r\n$17\r\ncacheproxy:closed\r\n"), "flush"},
}

// inRedis finds steps in requests to Redis. The caller holds mu.
func (s *Steps) inRedis(b []byte) (names []string) {
	for _, m := range loadsScript.FindAllSubmatchIndex(b, -1) {
		size, err := strconv.Atoi(string(b[m[2]:m[3]]))
		begin := m[4] - len("-- ")
		if err == nil && begin+size <= len(b) {
			sum := sha1.Sum(b[begin : begin+size]) //nolint:gosec // as above
			s.scripts[hex.EncodeToString(sum[:])] = string(b[m[4]:m[5]])
		}
	}
	for _, m := range runsScript.FindAllSubmatch(b, -1) {
		name := string(m[2])
		if name == "" {
			name = s.scripts[string(m[1])]
		}
		if name != "" {
			names = append(names, name)
		}
	}
	for _, m := range hits.FindAllSubmatch(b, -1) {
		if !bytes.HasPrefix(m[1], []byte("cacheproxy:")) {
			names = append(names, "GET")
		}
	}
	for _, c := range commands {
		if bytes.Contains(b, c.bytes) {
			names = append(names, c.name)
		}
	}
	return names
}

// statements are what the SQL of a step begins with, and the step's name. Of those that are sent together the first of this list counts.
var statements = []struct{ sql, name string }{
	{"COMMIT", "COMMIT"},
	{"INSERT INTO cacheproxy.generations", "fence"},
	{"SELECT count(pg_advisory_xact_lock", "lock"},
	{"SELECT pg_advisory_xact_lock($1", "lock"},
	{"WITH struck", "take"},
	{"SELECT DISTINCT u.key", "named"},
	{"SELECT route, key", "changed"},
	{"SELECT clock_timestamp()", "journal"},
	{"WITH clock", "row"},
}

var (
	prepares = regexp.MustCompile(`(?s)P....(stmtcache_[0-9a-f]+)\x00\s*([^\x00]*)\x00`)
	binds    = regexp.MustCompile(`(?s)B....\x00(stmtcache_[0-9a-f]+)\x00`)
	unnamed  = regexp.MustCompile(`(?s)P....\x00\s*([^\x00]*)\x00`)
	simple   = regexp.MustCompile(`(?s)Q....(COMMIT)\x00`)
)

// stepOf is the name of the step that a statement is, "" for none.
func stepOf(sql string) string {
	for _, known := range statements {
		if strings.HasPrefix(sql, known.sql) {
			return known.name
		}
	}
	return ""
}

// inPostgres finds a step in requests to Postgres. The caller holds mu.
func (s *Steps) inPostgres(b []byte) []string {
	for _, m := range prepares.FindAllSubmatch(b, -1) {
		s.sql[string(m[1])] = stepOf(string(m[2]))
	}
	var found []string
	for _, m := range binds.FindAllSubmatch(b, -1) {
		found = append(found, s.sql[string(m[1])])
	}
	for _, m := range unnamed.FindAllSubmatch(b, -1) {
		found = append(found, stepOf(string(m[1])))
	}
	for range simple.FindAll(b, -1) {
		found = append(found, "COMMIT")
	}
	for _, known := range statements {
		if slices.Contains(found, known.name) {
			return []string{known.name}
		}
	}
	return nil
}
