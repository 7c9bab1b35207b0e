package chaos

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
)

// Keys with a TTL that ends (P6). Each is written once, so that what may be read is plain: its value until it ends, and nothing from then on; and what remains.

// lateness is how much sooner or later than it should a key may end: the promise is some 10 ms, and on a busy machine the first answers that tell a sidecar what
// the stores' clocks show are slow. What the machine sleeps through otherwise lies between the call and the answer, which are known.
const lateness = 30 * time.Millisecond

// lives are the keys that are read just now, and what was wrong.
type lives struct {
	mu    sync.Mutex
	names []string   // guarded by mu: the last ones
	lasts []string   // guarded by mu: those that may have no end
	reads []lifeRead // guarded by mu
	wrong []string   // of judge
}

// lifeRead is one read, between from and to, of a key that was given its TTL between call and back.
type lifeRead struct {
	life
	from, to int64
	there    bool
	left     int64 // in ms, as PTTL says; unasked if it was not asked
}

// life is a key, and how it came by its TTL.
type life struct {
	name       string
	how        string        // "SET PX", "PEXPIRE" or "PERSIST"
	ttl        time.Duration // 0: it has none any more
	began      int64         // when the first command was sent
	call, back int64         // of the last
}

// unasked is no answer of PTTL.
const unasked = -9

// some is one of the keys, or a name that is none.
func (l *lives) some(rng *rand.Rand) string {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.names) == 0 {
		return "none"
	}
	return l.names[rng.IntN(len(l.names))]
}

// lasting are the keys that may have no end.
func (l *lives) lasting() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.lasts)
}

// spans are times in which something happened.
type spans struct {
	mu  sync.Mutex
	all [][2]int64 // guarded by mu
}

func (s *spans) add(from, to int64) {
	s.mu.Lock()
	s.all = append(s.all, [2]int64{from, to})
	s.mu.Unlock()
}

// meet: one of them overlaps with a time.
func (s *spans) meet(from, to int64) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, a := range s.all {
		if a[0] <= to && from <= a[1] {
			return true
		}
	}
	return false
}

// live writes keys one after the other, and reads each through all sidecars until it has ended.
func (r *run) live(n int) {
	rng := rand.New(rand.NewPCG(r.seed, uint64(5000+n)))
	conns := r.conns()
	defer func() {
		for _, c := range conns {
			c.Close()
		}
	}()
	ctx := context.Background()
	for i := 0; r.sleep(rng, ms, 5*ms); i++ {
		name, ttl := fmt.Sprintf("%st%d-%d", r.prefix, n, i), time.Duration(50+rng.IntN(400))*ms
		r.lives.mu.Lock()
		r.lives.names = append(r.lives.names[max(0, len(r.lives.names)-3):], name)
		r.lives.mu.Unlock()
		x, ok := r.beget(conns, rng, name, ttl)
		if !ok {
			continue // or nobody knows from when on it lives
		}
		for r.now() < x.back+int64(ttl+2*lateness) && r.sleep(rng, ms, 20*ms) {
			read := lifeRead{life: x, left: unasked}
			c, err := conns[rng.IntN(len(conns))], error(nil)
			asks := rng.IntN(3) == 0
			read.from = r.now()
			if asks {
				read.left, err = c.Do(ctx, "PTTL", name).Int64()
				read.there = read.left != -2
			} else {
				err = c.Get(ctx, name).Err()
				read.there = err == nil
			}
			read.to = r.now()
			if err == nil || errors.Is(err, redis.Nil) {
				r.lives.mu.Lock()
				r.lives.reads = append(r.lives.reads, read)
				r.lives.mu.Unlock()
			}
		}
	}
}

// beget makes a key that lives for ttl, or one that lives on though it had a TTL. false: not all that it takes was acknowledged.
func (r *run) beget(conns []*redis.Client, rng *rand.Rand, name string, ttl time.Duration) (life, bool) {
	x := life{name: name, how: "SET PX", ttl: ttl, began: r.now()}
	say := func(args ...any) bool {
		x.call = r.now()
		said, err := conns[rng.IntN(len(conns))].Do(context.Background(), args...).Result()
		x.back = r.now()
		return err == nil && (said == "OK" || said == int64(1))
	}
	kind := rng.IntN(4)
	if kind < 2 {
		r.lives.mu.Lock()
		r.lives.lasts = append(r.lives.lasts, name)
		r.lives.mu.Unlock()
	}
	switch kind {
	case 0:
		x.how = "PEXPIRE"
		return x, say("SET", name, "1") && say("PEXPIRE", name, ttl.Milliseconds())
	case 1:
		x.how, x.ttl = "PERSIST", 0
		return x, say("SET", name, "1", "PX", ttl.Milliseconds()) && say("PERSIST", name)
	}
	return x, say("SET", name, "1", "PX", ttl.Milliseconds())
}

// judgeLives judges all reads, when it is known what was lost meanwhile.
func (r *run) judgeLives() {
	for _, x := range r.lives.reads {
		if what := x.wrong(r.losses.meet(x.began, x.to), r.most); what != "" {
			r.lives.wrong = append(r.lives.wrong, fmt.Sprintf("%s, by %s to live %v, %s, %v after that was acknowledged", x.name, x.how, x.ttl, what, time.Duration(x.from-x.back)))
		}
	}
}

// wrong says what must not be, "" for nothing. lost: Redis may have lost what it alone had of the key. most is for how long a write may be missed.
func (x lifeRead) wrong(lost bool, most time.Duration) string {
	// It ends between the first and the last of these.
	first, last := x.call+int64(x.ttl-lateness), x.back+int64(x.ttl+lateness)
	over := func(a, b int64) time.Duration { return time.Duration(a - b).Round(time.Microsecond) }
	switch {
	case lost && (x.how != "SET PX" || !x.there), time.Duration(x.from-x.back) < most:
		return "" // it may be as it was before, or gone
	case x.ttl == 0 && !x.there:
		return "is gone"
	case x.ttl == 0 && x.left >= 0:
		return fmt.Sprintf("is to end in %d ms", x.left)
	case x.ttl == 0:
		return ""
	case x.there && x.from > last:
		return fmt.Sprintf("is there %v too long", over(x.from, last)+lateness)
	case !x.there && x.to < first:
		return fmt.Sprintf("is gone %v too soon", over(first, x.to)+lateness)
	case x.left == -1:
		return "has no end"
	case x.left >= 0 && x.from+x.left*int64(ms) > last:
		return fmt.Sprintf("is to end %v too late", over(x.from+x.left*int64(ms), last)+lateness)
	case x.left >= 0 && x.to+x.left*int64(ms) < first:
		return fmt.Sprintf("is to end %v too soon", over(first, x.to+x.left*int64(ms))+lateness)
	}
	return ""
}

// A key that ends when it should not is found out.
func TestLives(t *testing.T) {
	at := func(n int) int64 { return int64(n) * int64(ms) }
	read := func(how string, ttl, from, to int, there bool, left int64) lifeRead {
		return lifeRead{life{"k", how, time.Duration(ttl) * ms, at(0), at(10), at(20)}, at(from), at(to), there, left}
	}
	for _, c := range []struct {
		name  string
		x     lifeRead
		lost  bool
		most  time.Duration
		wrong bool
	}{
		{"there in time", read("SET PX", 100, 90, 95, true, unasked), false, 0, false},
		{"gone in time", read("SET PX", 100, 125, 130, false, unasked), false, 0, false},
		{"a moment late", read("SET PX", 100, 149, 200, true, unasked), false, 0, false},
		{"too long", read("SET PX", 100, 151, 200, true, unasked), false, 0, true},
		{"too long, whatever was lost", read("SET PX", 100, 151, 200, true, unasked), true, 0, true},
		{"too long, with its SET back", read("PEXPIRE", 100, 151, 200, true, unasked), true, 0, false},
		{"too soon", read("SET PX", 100, 70, 79, false, unasked), false, 0, true},
		{"lost", read("SET PX", 100, 70, 79, false, unasked), true, 0, false},
		{"not seen yet", read("SET PX", 100, 70, 79, false, unasked), false, time.Second, false},
		{"what remains", read("PEXPIRE", 100, 50, 60, true, 65), false, 0, false},
		{"too much remains", read("PEXPIRE", 100, 50, 60, true, 101), false, 0, true},
		{"too little remains", read("PEXPIRE", 100, 50, 60, true, 19), false, 0, true},
		{"for ever", read("PEXPIRE", 100, 50, 60, true, -1), false, 0, true},
		{"it lives on", read("PERSIST", 0, 500, 510, true, -1), false, 0, false},
		{"it does not", read("PERSIST", 0, 500, 510, false, unasked), false, 0, true},
		{"it will not", read("PERSIST", 0, 50, 60, true, 40), false, 0, true},
	} {
		if what := c.x.wrong(c.lost, c.most); (what != "") != c.wrong {
			t.Errorf("%s: %q", c.name, what)
		}
	}
}
