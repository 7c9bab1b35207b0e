package proxy_test

import (
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
)

// A difference is what may differ between two servers' replies to a command, and nothing else of the reply may.
type difference struct {
	rows  []string // of the command table, or "*"
	field string   // what of the reply differs
	why   string
	proxy bool // it differs only behind the proxy; a second Redis answers alike
	store bool // and only if the keys have a store
	// level makes equal what may differ, and nothing else. It tells whether the field was there.
	level func(cmd []string, want, got *node) bool
}

// connectionFields of a line of CLIENT LIST are those that each connection has its own of, and measures in bytes.
var connectionFields = []string{"id", "addr", "laddr", "fd", "age", "idle", "qbuf", "qbuf-free", "argv-mem", "multi-mem", "rbs", "rbp", "obl", "oll", "omem", "tot-mem"}

// ofConnection matches each of them with its value.
var ofConnection = regexp.MustCompile(`\b(` + strings.Join(connectionFields, "|") + `)=[^ \n]*`)

// differences is the whole list. One that never applies fails TestOracle.
var differences = []*difference{
	{rows: []string{"client|id"}, field: "the number", why: "clients are counted by each server",
		level: numberLike(func(a, b int64) bool { return a > 0 && b > 0 })},
	{rows: []string{"hello"}, field: "the value of id", why: "clients are counted by each server",
		level: values(isNumber, "id")},
	{rows: []string{"client|list"}, field: "the order of the lines", why: "Redis rotates its list as it looks after its clients",
		level: func(_ []string, want, got *node) bool {
			for _, n := range []*node{want, got} {
				if n.isError() {
					return false
				}
				lines := strings.SplitAfter(n.text, "\n")
				key := func(line string) string { return ofConnection.ReplaceAllString(line, "") } // ages would sort by how busy the machine was
				slices.SortFunc(lines, func(a, b string) int { return strings.Compare(key(a), key(b)) })
				n.setText(strings.Join(lines, ""))
			}
			return true
		}},
	{rows: []string{"client|list", "client|info"}, field: "the values of id, addr, laddr, fd, age, idle and of what is measured in bytes",
		why:   "each connection has its own, and buffers are the server's",
		level: lineFields(" ", "=", isWord, connectionFields...)},
	{rows: []string{"acl|genpass"}, field: "the digits", why: "they are random",
		level: text(`^[0-9a-f]+$`, sameLength)},
	{rows: []string{"acl|log"}, field: "the values of age-seconds and client-info's id, addr, laddr, fd and bytes", why: "times, ids and buffers",
		level: each(func(cmd []string, want, got *node) bool {
			a := values(isAny, "age-seconds")(cmd, want, got)
			b := false
			if w, g := value(want, "client-info"), value(got, "client-info"); w != nil && g != nil {
				b = lineFields(" ", "=", isWord, connectionFields...)(cmd, w, g)
			}
			return a || b
		})},
	{rows: []string{"time"}, field: "elements 0 and 1", why: "time passes",
		level: elements(0, 1, isNumber)},
	{rows: []string{"lastsave"}, field: "the number, by ten minutes", why: "time passes, and the servers are not asked at once",
		level: numberLike(within(600))},
	{rows: []string{"ttl", "expiretime"}, field: "the seconds, by two; by more than that where the expiry is a date", why: "time passes",
		level: numberLike(lifes(2))},
	{rows: []string{"pttl", "pexpiretime"}, field: "the milliseconds, by two thousand; by more than that where the expiry is a date", why: "time passes",
		level: numberLike(lifes(2000))},
	{rows: []string{"object|idletime"}, field: "the seconds, by five", why: "time passes",
		level: numberLike(within(5))},
	{rows: []string{"object|freq"}, field: "the number", why: "a write through the proxy makes the key anew", store: true,
		level: numberLike(func(a, b int64) bool { return b > 0 })},
	{rows: []string{"client|trackinginfo"}, field: "the number behind redirect", why: "clients are counted by each server",
		level: func(cmd []string, want, got *node) bool {
			w, g := value(want, "redirect"), value(got, "redirect")
			return w != nil && g != nil && numberLike(func(a, b int64) bool { return a > 0 && b > 0 })(cmd, w, g)
		}},
	{rows: []string{"client|getredir"}, field: "the number", why: "clients are counted by each server",
		level: numberLike(func(a, b int64) bool { return a > 0 && b > 0 })},
	{rows: []string{"smembers", "sunion", "sinter", "sdiff", "keys", "command|list", "hkeys", "hvals", "pubsub|channels", "pubsub|shardchannels", "acl|cat"},
		field: "the order of the elements", why: "hash tables have no order, and each process another one",
		level: order(1)},
	{rows: []string{"hgetall", "config|get"}, field: "the order of the pairs", why: "hash tables have no order, and each process another one",
		level: order(2)},
	{rows: []string{"command|docs"}, field: "the order of commands and of subcommands", why: "hash tables have no order, and each process another one",
		level: docs},
	{rows: []string{"sscan", "scan"}, field: "the order of the elements on the page", why: "hash tables have no order, and each process another one",
		level: page(1)},
	{rows: []string{"hscan", "zscan"}, field: "the order of the pairs on the page", why: "hash tables have no order, and each process another one",
		level: page(2)},
	{rows: []string{"config|get"}, field: "the values of port, dir, unixsocket and logfile", why: "each server has its own",
		level: values(isAny, "port", "dir", "unixsocket", "logfile", "pidfile")},
	{rows: []string{"command", "command|info"}, field: "the order of commands and subcommands", why: "hash tables have no order, and each process another one",
		level: commands},
	{rows: []string{"function|list"}, field: "the order of the libraries and of their functions", why: "hash tables have no order, and each process another one",
		level: libraries},
	{rows: []string{"slowlog|get"}, field: "the client's name in an entry, and entries of connections other than clients'", why: "Redis logs whose connection it was: the proxy's", proxy: true,
		level: func(_ []string, want, got *node) bool {
			if want.kind != '*' || got.kind != '*' {
				return false
			}
			got.kids = slices.DeleteFunc(got.kids, func(e *node) bool {
				return len(e.kids) == 6 && strings.HasPrefix(e.kids[5].text, "cacheproxy") && e.kids[5].text != "cacheproxy-lane"
			})
			got.head = strconv.Itoa(len(got.kids))
			found := false
			for i := range min(len(want.kids), len(got.kids)) {
				w, g := want.kids[i], got.kids[i]
				if len(w.kids) == 6 && len(g.kids) == 6 && g.kids[5].text == "cacheproxy-lane" {
					g.kids[5].setText(w.kids[5].text)
					found = true
				}
			}
			return found
		}},
	{rows: []string{"slowlog|get"}, field: "id, time, duration and address of an entry", why: "ids, times and addresses",
		level: each(func(cmd []string, want, got *node) bool {
			a := elements(0, 2, isNumber)(cmd, want, got)
			return elements(4, 4, isWord)(cmd, want, got) || a
		})},
	{rows: []string{"memory|usage"}, field: "the number of bytes", why: "allocators round",
		level: numberLike(func(a, b int64) bool { return a > 0 && b > 0 && a/4 <= b && b/4 <= a })},
	{rows: []string{"memory|stats"}, field: "every number, and the entries of databases", why: "it is measured",
		level: measured},
	{rows: []string{"memory|malloc-stats"}, field: "the text behind its first line", why: "it is measured",
		level: afterLine(1)},
	{rows: []string{"memory|doctor", "latency|doctor"}, field: "the text behind its first word", why: "it is measured",
		level: textOf(`^(Hi Sam|Sam|Dave)`)},
	{rows: []string{"latency|histogram"}, field: "the number of calls, and the buckets", why: "it is measured",
		level: histograms},
	{rows: []string{"latency|latest", "latency|history"}, field: "times and durations", why: "it is measured",
		level: each(elementsFrom(isNumber))},
	{rows: []string{"latency|graph"}, field: "the graph behind the first line's name", why: "it is measured",
		level: textOf(`^command - high `)},
	{rows: []string{"info"}, field: "the section # Cacheproxy", why: "Redis has none (README, Operating it)", proxy: true,
		level: func(_ []string, want, got *node) bool {
			own := strings.Index(got.text, "# Cacheproxy\r\n")
			if own < 0 || strings.Contains(want.text, "# Cacheproxy") {
				return false
			}
			got.setText(strings.TrimSuffix(got.text[:own], "\r\n"))
			return true
		}},
	{rows: []string{"info"}, field: "the values of the lines named in measuredInfo, and the lines of cmdstat, errorstat and latency percentiles", why: "ids, times, measurements; what the proxy asks counts too",
		level: infoLines},
	{rows: []string{"debug"}, field: "the digest of DEBUG DIGEST", why: "the proxy's own keys are part of it", store: true,
		level: func(cmd []string, want, got *node) bool {
			return len(cmd) == 2 && strings.EqualFold(cmd[1], "DIGEST") && text(`^[0-9a-f]{40}$`, sameLength)(cmd, want, got)
		}},
	{rows: []string{"debug"}, field: "the address, lru and its age in DEBUG OBJECT", why: "each process has its own",
		level: lineFields(" ", ":", isWord, "at", "lru", "lru_seconds_idle")},
	{rows: []string{"xadd"}, field: "the id, where it is asked for with *", why: "it is a time",
		level: func(cmd []string, want, got *node) bool {
			return slices.Contains(cmd, "*") && text(`^\d{13}-\d+$`, sameLength)(cmd, want, got)
		}},
	{rows: []string{"xpending"}, field: "the milliseconds of an entry, by two thousand", why: "time passes",
		level: each(func(_ []string, want, got *node) bool {
			return len(want.kids) == 4 && len(got.kids) == 4 && numberLike(within(2000))(nil, want.kids[2], got.kids[2])
		})},
	{rows: []string{"xinfo|consumers"}, field: "the values of idle and inactive, by two thousand", why: "time passes",
		level: each(values(isNumber, "idle", "inactive"))},
	{rows: []string{"xinfo|stream"}, field: "times of delivery, and the sizes of the radix tree", why: "time passes",
		level: deliveries},
	{rows: []string{"monitor"}, field: "the time and the address", why: "times and addresses",
		level: pattern(`^\d+\.\d+ \[(\d+) [^\]]*\]`, "TIME [$1 ADDR]")},
}

// measuredInfo are the lines of INFO whose values differ from server to server and from moment to moment.
var measuredInfo = regexp.MustCompile(`^(process_id|run_id|tcp_port|server_time_usec|uptime_in_\w+|lru_clock|executable|config_file|` +
	`connected_clients|client_recent_\w+|clients_in_timeout_table|tracking_clients|used_memory\w*|maxmemory_human|total_system_memory\w*|` +
	`allocator_\w+|rss_overhead_\w+|mem_\w+|number_of_cached_scripts|number_of_functions|number_of_libraries|current_\w+|rdb_\w+|aof_\w+|async_loading|` +
	`total_\w+|instantaneous_\w+|expired_\w+|evicted_\w+|keyspace_\w+|pubsub_\w+|latest_fork_usec|migrate_cached_sockets|active_defrag_\w+|` +
	`tracking_total_\w+|unexpected_error_replies|dump_payload_sanitizations|io_threaded_\w+|reply_buffer_\w+|acl_\w+|` +
	`used_cpu_\w+|master_replid2?|master_repl_offset|second_repl_offset|repl_backlog_\w+|lazyfree\w*|lazyfreed_objects)$`)

// infoMeasures are prefixes of lines of which there may be more or fewer.
var infoMeasures = regexp.MustCompile(`^(cmdstat_|errorstat_|latency_percentiles_usec_|db\d+:)`)

var used struct {
	sync.Mutex
	by map[*difference]bool
}

// level makes want and got equal where they may differ.
func level(g target, row string, cmd []string, want, got *node) {
	for _, d := range differences {
		if d.proxy && g.upstream == g.addr || d.store && !g.routed || !slices.Contains(d.rows, row) && d.rows[0] != "*" {
			continue
		}
		if d.level(cmd, want, got) {
			used.Lock()
			if used.by == nil {
				used.by = map[*difference]bool{}
			}
			used.by[d] = true
			used.Unlock()
		}
	}
}

type leveller = func(cmd []string, want, got *node) bool

func isAny(string) bool { return true }
func isNumber(s string) bool {
	_, err := strconv.ParseInt(s, 10, 64)
	return err == nil
}
func isWord(s string) bool { return s != "" }

func sameLength(a, b string) bool { return len(a) == len(b) }

func within(n int64) func(a, b int64) bool {
	return func(a, b int64) bool { return max(a, b)-min(a, b) <= n }
}

// lifes are times to live: -1 and -2 are none. Keys that live for thousands of years were given a date, and the servers are not
// asked at the same time.
func lifes(n int64) func(a, b int64) bool {
	return func(a, b int64) bool {
		const age = 50_000_000_000
		return a >= 0 && b >= 0 && (within(n)(a, b) || a > age && b > age && within(600*n)(a, b))
	}
}

// numberLike: an integer that need only be like the other one.
func numberLike(like func(a, b int64) bool) leveller {
	return func(_ []string, want, got *node) bool {
		if want.kind != ':' || got.kind != ':' {
			return false
		}
		a, _ := strconv.ParseInt(want.text, 10, 64)
		b, err := strconv.ParseInt(got.text, 10, 64)
		if err != nil || !like(a, b) {
			return false
		}
		got.text = want.text
		return true
	}
}

// text: a string of a form.
func text(form string, like func(a, b string) bool) leveller {
	re := regexp.MustCompile(form)
	return func(_ []string, want, got *node) bool {
		if want.kind != got.kind || !re.MatchString(want.text) || !re.MatchString(got.text) || !like(want.text, got.text) {
			return false
		}
		got.setText(want.text)
		return true
	}
}

// textOf: a text whose beginning alone is known.
func textOf(beginning string) leveller {
	return text(beginning, func(string, string) bool { return true })
}

// elementsFrom: every element of a form.
func elementsFrom(form func(string) bool) leveller {
	return func(cmd []string, want, got *node) bool {
		return elements(0, len(want.kids)-1, form)(cmd, want, got)
	}
}

// pattern: a part of a string that is replaced in both.
func pattern(form, by string) leveller {
	re := regexp.MustCompile(form)
	return func(_ []string, want, got *node) bool {
		if !re.MatchString(want.text) || !re.MatchString(got.text) {
			return false
		}
		want.setText(re.ReplaceAllString(want.text, by))
		got.setText(re.ReplaceAllString(got.text, by))
		return true
	}
}

// value finds the value of a name in a map, or in a list of pairs.
func value(n *node, name string) *node {
	for i := 0; i+1 < len(n.kids); i += 2 {
		if n.kids[i].text == name {
			return n.kids[i+1]
		}
	}
	return nil
}

// values of names in a map, or in a list of pairs.
func values(form func(string) bool, names ...string) leveller {
	return func(_ []string, want, got *node) bool {
		found := false
		for _, name := range names {
			w, g := value(want, name), value(got, name)
			if w != nil && g != nil && w.kind == g.kind && len(w.kids) == 0 && form(w.text) && form(g.text) {
				g.setText(w.text)
				found = true
			}
		}
		return found
	}
}

// elements from one to another.
func elements(from, to int, form func(string) bool) leveller {
	return func(_ []string, want, got *node) bool {
		found := false
		for i := from; i <= to && i < len(want.kids) && i < len(got.kids); i++ {
			w, g := want.kids[i], got.kids[i]
			if w.kind == g.kind && form(w.text) && form(g.text) {
				g.setText(w.text)
				found = true
			}
		}
		return found
	}
}

// each element of an array.
func each(f leveller) leveller {
	return func(cmd []string, want, got *node) bool {
		found := false
		for i := range min(len(want.kids), len(got.kids)) {
			found = f(cmd, want.kids[i], got.kids[i]) || found
		}
		return found
	}
}

// order: the elements, or groups of elements, in any order. A map has pairs by itself.
func order(group int) leveller {
	return func(_ []string, want, got *node) bool {
		if len(want.kids) == 0 || len(got.kids) == 0 {
			return false
		}
		for _, n := range []*node{want, got} {
			n.sortKids(max(group, map[byte]int{'%': 2}[n.kind]))
		}
		return true
	}
}

// page: what SCAN and its kin answer, a cursor and elements.
func page(group int) leveller {
	return func(cmd []string, want, got *node) bool {
		return len(want.kids) == 2 && len(got.kids) == 2 && order(group)(cmd, want.kids[1], got.kids[1])
	}
}

// docs of commands, and within them of subcommands.
func docs(cmd []string, want, got *node) bool {
	for _, n := range []*node{want, got} {
		for _, kid := range n.kids {
			if subs := value(kid, "subcommands"); subs != nil {
				subs.sortKids(2)
			}
		}
	}
	return order(2)(cmd, want, got)
}

// commands are rows of COMMAND; the tenth element of a row has those of its subcommands.
func commands(_ []string, want, got *node) bool {
	for _, n := range []*node{want, got} {
		for _, row := range n.kids {
			if len(row.kids) == 10 {
				row.kids[9].sortKids(1)
			}
		}
		n.sortKids(1)
	}
	return len(want.kids) > 1
}

// libraries of FUNCTION LIST and their functions.
func libraries(_ []string, want, got *node) bool {
	if len(want.kids) == 0 {
		return false
	}
	for _, n := range []*node{want, got} {
		for _, lib := range n.kids {
			if f := value(lib, "functions"); f != nil {
				f.sortKids(1)
			}
		}
		n.sortKids(1)
	}
	return true
}

// measured: numbers are alike, and what describes a database is left away.
func measured(cmd []string, want, got *node) bool {
	if len(want.kids) == 0 {
		return false
	}
	for _, n := range []*node{want, got} {
		for i := 0; i+1 < len(n.kids); i += 2 {
			if strings.HasPrefix(n.kids[i].text, "db.") {
				n.kids = slices.Delete(n.kids, i, i+2)
				i -= 2
				continue
			}
			if v := n.kids[i+1]; v.kind != '*' && v.kind != '%' {
				v.setText("0")
			}
		}
		n.head = strconv.Itoa(len(n.kids))
	}
	return true
}

// afterLine: what follows the first lines is not compared.
func afterLine(lines int) leveller {
	return func(_ []string, want, got *node) bool {
		w, g := strings.SplitAfterN(want.text, "\n", lines+1), strings.SplitAfterN(got.text, "\n", lines+1)
		if len(w) <= lines || len(g) <= lines {
			return false
		}
		want.setText(strings.Join(w[:lines], ""))
		got.setText(strings.Join(g[:lines], ""))
		return true
	}
}

// histograms of LATENCY HISTOGRAM.
func histograms(_ []string, want, got *node) bool {
	for _, n := range []*node{want, got} {
		for _, row := range n.kids {
			if h := value(row, "histogram_usec"); h != nil {
				h.kids, h.head = nil, "0"
			}
		}
	}
	return each(values(isNumber, "calls"))(nil, want, got)
}

// deliveries: in XINFO STREAM FULL, times of delivery and of being seen.
func deliveries(cmd []string, want, got *node) bool {
	found := values(isNumber, "seen-time", "active-time", "radix-tree-keys", "radix-tree-nodes")(cmd, want, got)
	for i := range min(len(want.kids), len(got.kids)) {
		w, g := want.kids[i], got.kids[i]
		if w.kind == ':' && g.kind == ':' && len(w.text) == 13 && len(g.text) == 13 {
			g.text = w.text
			found = true
		}
		found = deliveries(cmd, w, g) || found
	}
	return found
}

// lineFields: lines of fields, whose names and order are compared, and whose values need only be of a form for some.
func lineFields(between, is string, form func(string) bool, names ...string) leveller {
	mask := func(s string) (string, bool) {
		found := false
		lines := strings.SplitAfter(s, "\n")
		for i, line := range lines {
			fields := strings.Split(line, between)
			for j, field := range fields {
				name, v, ok := strings.Cut(field, is)
				if ok && slices.Contains(names, name) && form(strings.TrimSpace(v)) {
					end := ""
					if strings.HasSuffix(v, "\n") {
						end = "\n"
					}
					fields[j] = name + is + "*" + end
					found = true
				}
			}
			lines[i] = strings.Join(fields, between)
		}
		return strings.Join(lines, ""), found
	}
	return func(_ []string, want, got *node) bool {
		w, a := mask(want.text)
		g, b := mask(got.text)
		if !a || !b {
			return false
		}
		want.setText(w)
		got.setText(g)
		return true
	}
}

// infoLines: lines of INFO.
func infoLines(_ []string, want, got *node) bool {
	mask := func(s string) (string, bool) {
		found := false
		var out []string
		for _, line := range strings.Split(s, "\r\n") {
			name, _, ok := strings.Cut(line, ":")
			switch {
			case infoMeasures.MatchString(line):
				found = true
				continue
			case ok && measuredInfo.MatchString(name):
				found = true
				line = name + ":*"
			}
			out = append(out, line)
		}
		return strings.Join(out, "\r\n"), found
	}
	w, a := mask(want.text)
	g, b := mask(got.text)
	if !a && !b {
		return false
	}
	want.setText(w)
	got.setText(g)
	return true
}
