package model

// script is a message to Redis: it runs there at once and as a whole, now or, if it sits in a socket, later.
type script struct {
	kind     scriptKind
	owner    int8 // the sidecar whose connection it is on; -1 if that has crashed
	keys     uint8
	op       int8 // of scriptRun
	num      int8
	tok, ver int8
	force    bool
	arg, exp [maxKeys]int8
	want     [maxKeys]int8 // what is expected: -1 whatever
	wmark    [maxKeys]int8
	wnum     [maxKeys]int8
	compares bool  // the mark and the number too
	looked   bool  // the number is there already, by an earlier script of the same command
	touched  uint8 // of scriptRun: leases that have changed since they are watched
	both     uint8 // of scriptRun and scriptLoad: keys that both journals name, whose marks go
}

type scriptKind uint8

const (
	scriptNone scriptKind = iota
	scriptGet
	scriptGrant
	scriptPromote
	scriptAbsent
	scriptInvalidate
	scriptFill
	scriptRead
	scriptWrite
	scriptStrike
	scriptRepair
	scriptPoll
	scriptMark
	scriptRun
	scriptLoad
	scriptQueued
	scriptPlain
	scriptFlush
	scriptOpen
)

// reads: a script that leaves everything as it is.
func (c scriptKind) reads() bool { return c == scriptGet }

// What a script answers for a key: proxy/scripts.go has the same list.
const (
	done      = int8(1)
	marked    = int8(2)
	granted   = int8(3)
	held      = int8(4)
	leaseLost = int8(5)
	value     = int8(7)
	absentNow = int8(8) // known to be absent in both
	refused   = int8(9)
	changed   = int8(10)
)

// answer is what a script answers.
type answer struct {
	ok             bool // false: nobody knows whether it ran
	code, val, exp [maxKeys]int8
	mark, num      [maxKeys]int8
	res            int8 // of scriptRun
}

// one is the answer for one key.
func (a *answer) one(k int, code, val, exp int8) { a.code[k], a.val[k], a.exp[k] = code, val, exp }

// execute runs a script in Redis.
func (m *model) execute(st *state, c script) (a answer) {
	before := st.r
	a.ok = true
	for k := range maxKeys {
		if st.over(st.r.exp[k]) {
			st.r.val[k], st.r.exp[k] = 0, 0
		}
	}
	switch c.kind {
	case scriptWrite:
		if !m.agrees(st, c, &a) {
			return a
		}
	case scriptRun:
		if m.overtaken(c, &a) {
			return a
		}
	case scriptPoll:
		m.stamp(st, c)
	case scriptFlush:
		st.r = redis{closed: !m.rules.FlushOpen}
	case scriptOpen:
		st.r.closed = false
	}
	for k := range maxKeys {
		if c.keys&bit(k) != 0 {
			m.executeKey(st, c, k, &a)
		}
	}
	if st.left.failover > 0 && st.r != before {
		st.past[1], st.past[0] = st.past[0], before
	}
	return a
}

// low: the script's number is refused.
func (m *model) low(st *state, c script, k int) bool {
	return c.num < st.r.num[k] && !m.rules.NoNumbers
}

// twice: the script brings a number that Redis has already, and not from it: Postgres gave it twice, having forgotten it in a crash.
func (m *model) twice(st *state, c script, k int) bool {
	return c.num > 0 && c.num == st.r.num[k] && !m.rules.EqualNumbers
}

// put sets the lease of k. Whoever watches it knows.
func (st *state) put(k int, num, tok int8) {
	st.r.num[k], st.r.tok[k] = num, tok
	for s := range st.sc {
		if c := &st.sc[s].c; c.at == runExec {
			c.touched |= bit(k)
		}
	}
	for i := range st.socket {
		if c := &st.socket[i]; c.kind == scriptRun {
			c.touched |= bit(k)
		}
	}
}

func (st *state) set(k int, val, exp int8) {
	if val == 0 || st.over(exp) {
		val, exp = 0, 0
	}
	st.r.val[k], st.r.exp[k] = val, exp
}

func (m *model) executeKey(st *state, c script, k int, a *answer) {
	r := &st.r
	switch c.kind {
	case scriptGet:
		a.one(k, done, r.val[k], r.exp[k])
	case scriptGrant:
		switch {
		case r.val[k] != 0:
			a.one(k, value, r.val[k], r.exp[k])
		case r.mark[k] != 0 && !m.rules.IgnoreMarks:
			a.one(k, marked, 0, 0)
		case r.tok[k] == negative:
			a.one(k, absentNow, 0, 0)
		case !r.closed && (r.tok[k] == free || r.tok[k] == overtake) || m.rules.PromoteNXOnly:
			st.put(k, r.num[k], c.tok)
			a.one(k, granted, 0, 0)
		default:
			a.one(k, held, 0, 0)
		}
	case scriptPromote:
		if r.tok[k] != c.tok && !m.rules.PromoteNXOnly {
			a.one(k, held, 0, 0)
			return
		}
		if r.val[k] == 0 {
			st.set(k, c.arg[k], c.exp[k])
		}
		if r.tok[k] == c.tok {
			st.put(k, r.num[k], free)
		}
		a.one(k, done, 0, 0)
	case scriptAbsent:
		m.scriptAbsent(st, c, k, a)
	case scriptInvalidate:
		m.scriptInvalidate(st, c, k, a)
	case scriptFill:
		m.scriptFill(st, c, k, a)
	case scriptRead:
		if c.num > 0 && (m.low(st, c, k) || m.twice(st, c, k)) {
			a.one(k, refused, 0, 0)
			return
		}
		if c.num > r.num[k] {
			st.put(k, c.num, free)
		}
		a.one(k, done, 0, 0)
		if r.val[k] != 0 {
			a.one(k, value, r.val[k], r.exp[k])
		}
		a.mark[k], a.num[k] = r.mark[k], r.num[k]
	case scriptWrite:
		r.mark[k] = c.ver
		if c.arg[k] >= 0 {
			st.set(k, c.arg[k], c.exp[k])
		}
		tok := overtake
		if m.rules.KeepNegative && r.tok[k] == negative {
			tok = negative
		}
		st.put(k, max(c.num, r.num[k]), tok)
		a.one(k, done, 0, 0)
	case scriptStrike:
		if m.low(st, c, k) {
			a.one(k, refused, 0, 0)
			return
		}
		if r.mark[k] == c.arg[k] {
			r.mark[k] = 0
		}
		a.one(k, done, 0, 0)
	case scriptRepair:
		switch {
		case m.low(st, c, k):
			a.one(k, refused, 0, 0)
		case !c.force && r.mark[k] != 0:
			a.one(k, marked, 0, 0)
		default:
			st.set(k, 0, 0)
			r.mark[k] = 0
			st.put(k, c.num, free)
			a.one(k, done, 0, 0)
		}
	case scriptMark:
		if r.mark[k] == 0 && (r.val[k] != 0 || m.rules.PutBackStruck || m.rules.PutBackAlways) {
			r.mark[k] = c.arg[k]
		}
		a.one(k, done, 0, 0)
	case scriptPlain:
		res, val, exp, same := m.hist.ops[c.op].apply(int(c.op), r.val[k], r.exp[k])
		if !same {
			st.set(k, val, exp)
		}
		a.one(k, done, res, 0)
	case scriptRun:
		m.scriptRun(st, c, k, a)
	case scriptLoad:
		m.scriptLoad(st, c, k, a)
	case scriptQueued:
		m.scriptQueued(st, c, k, a)
	}
}

func (m *model) scriptAbsent(st *state, c script, k int, a *answer) {
	r := &st.r
	mine := r.tok[k] == c.tok
	switch {
	case r.val[k] != 0:
		if mine {
			st.put(k, r.num[k], free)
		}
		a.one(k, value, r.val[k], r.exp[k])
	case mine:
		tok := free
		if c.force && m.cfg.Negative {
			tok = negative
		}
		st.put(k, r.num[k], tok)
		a.one(k, done, 0, 0)
	case r.mark[k] != 0:
		a.one(k, marked, 0, 0)
	default:
		a.one(k, held, 0, 0)
	}
}

// scriptInvalidate: arg is the row, 0 for none.
func (m *model) scriptInvalidate(st *state, c script, k int, a *answer) {
	r := &st.r
	switch {
	case m.low(st, c, k), m.twice(st, c, k):
		a.one(k, refused, 0, 0)
	case r.mark[k] != 0:
		a.one(k, marked, 0, 0)
	case c.arg[k] == 0 && r.val[k] != 0 && !m.rules.NoAdopt:
		st.put(k, c.num, c.tok)
		a.one(k, value, r.val[k], r.exp[k])
	default:
		st.set(k, 0, 0)
		if m.rules.WriteEarly {
			st.set(k, c.want[k], 0)
		}
		tok := c.tok
		if m.rules.KeepNegative && r.tok[k] == negative {
			tok = negative
		}
		st.put(k, c.num, tok)
		a.one(k, done, 0, 0)
	}
}

// scriptFill: arg is the value, 0 to release only.
func (m *model) scriptFill(st *state, c script, k int, a *answer) {
	r := &st.r
	switch {
	case m.low(st, c, k):
		a.one(k, refused, 0, 0)
	case r.mark[k] != 0:
		a.one(k, marked, 0, 0)
	case r.tok[k] == c.tok:
		if c.arg[k] != 0 {
			st.set(k, c.arg[k], c.exp[k])
		}
		st.put(k, c.num, free)
		a.one(k, done, 0, 0)
	case m.rules.KeepNegative && r.tok[k] == negative:
		a.one(k, held, 0, 0)
	case r.tok[k] == free || r.tok[k] == negative || isReader(r.tok[k]):
		st.put(k, c.num, c.tok)
		a.one(k, leaseLost, 0, 0)
	default:
		a.one(k, held, 0, 0)
	}
}

// agrees is the first half of scriptWrite: all keys or none.
func (m *model) agrees(st *state, c script, a *answer) bool {
	ok := true
	for k := range maxKeys {
		if c.keys&bit(k) == 0 {
			continue
		}
		a.one(k, done, 0, 0)
		switch {
		case c.num > 0 && m.low(st, c, k), c.tok == 0 && !c.looked && m.twice(st, c, k):
			a.one(k, refused, 0, 0)
			ok = false
		case c.tok != 0 && st.r.tok[k] != c.tok,
			c.want[k] >= 0 && st.r.val[k] != c.want[k] && !m.rules.ExpectNothing,
			c.compares && !m.rules.ExpectNothing && (st.r.mark[k] != c.wmark[k] || st.r.num[k] != c.wnum[k]):
			a.one(k, changed, 0, 0)
			ok = false
		}
	}
	return ok
}

// overtaken: a lease that scriptRun watches has changed.
func (m *model) overtaken(c script, a *answer) bool {
	over := false
	for k := range maxKeys {
		if c.keys&bit(k) != 0 && c.touched&bit(k) != 0 && !m.rules.UnwatchedRun {
			a.one(k, changed, 0, 0)
			over = true
		}
	}
	return over
}

// scriptRun loads, runs and captures in one MULTI. arg is the row. force: Redis is the truth, and K is marked.
func (m *model) scriptRun(st *state, c script, k int, a *answer) {
	r := &st.r
	if c.both&bit(k) != 0 {
		r.mark[k] = 0
	}
	switch {
	case r.mark[k] != 0:
	case live(c.arg[k]):
		st.set(k, c.arg[k], c.exp[k])
	case c.arg[k] == tomb:
		st.set(k, 0, 0)
	}
	res, val, exp, same := m.hist.ops[c.op].apply(int(c.op), r.val[k], r.exp[k])
	if same {
		val, exp = r.val[k], r.exp[k]
	}
	a.one(k, done, val, exp)
	a.res = res
	if c.force {
		st.set(k, val, exp)
		r.mark[k] = c.ver
		st.put(k, max(c.num, r.num[k]), overtake)
		return
	}
	if r.mark[k] != 0 && !m.rules.CaptureMarked { // by a late EXEC of another, which leaves the lease alone
		st.set(k, val, exp)
		r.mark[k] = c.ver
		st.put(k, c.num, overtake)
		a.one(k, refused, 0, 0)
		return
	}
	st.set(k, 0, 0)
	st.put(k, max(c.num, r.num[k]), c.tok)
}

// stamp is scriptPoll: the anchor and the clock. ver is a new anchor, arg Postgres's time (0: unknown), op the data set that it is
// known of.
func (m *model) stamp(st *state, c script) {
	if st.r.anchor == 0 {
		st.r.anchor = c.ver
	}
	if c.arg[0] == 0 || c.op == 0 {
		return
	}
	if st.r.dataSet != c.op || st.r.clock < c.arg[0] {
		st.r.clock, st.r.dataSet = c.arg[0], c.op
	}
}
