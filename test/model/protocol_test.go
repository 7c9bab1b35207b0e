package model

import (
	"testing"
)

// worlds is a family of worlds: all programs of these letters up to a length, over what the stores may hold at first.
type worlds struct {
	name    string
	phases  []string
	letters string
	total   int // of commands
	most    int // of them that TestLonger goes on to; 0: no end
	faults  Faults
	change  []func(*Config)
}

var crash, evict = Faults{Crash: 1}, Faults{Evict: true}

// families are explored whole by `go test`; TestLonger goes on from there.
var families = []worlds{
	{name: "no faults", phases: []string{"00", "01", "11", "12", "22", "23", "33", "34"}, letters: "SDGXR", total: 2},
	{name: "eviction", phases: []string{"01", "11"}, letters: "SDGXR", total: 3, faults: evict},
	{name: "eviction where it forgets", phases: []string{"12", "22", "23"}, letters: "SDGX", total: 2, faults: evict, change: []func(*Config){letter}},
	{name: "a crash", phases: []string{"01", "11", "12"}, letters: "SDGX", total: 2, faults: crash},
	{name: "a crash and a new process", phases: []string{"11"}, letters: "SDG", total: 2, faults: Faults{Crash: 1, Back: 1}},
	{name: "a lease lapses", phases: []string{"01", "11", "12", "22"}, letters: "SDGX", total: 2, faults: Faults{Lapse: 1}},
	{name: "a link to Redis", phases: []string{"01", "11"}, letters: "SDGX", total: 2, faults: Faults{RedisLink: 1}},
	{name: "a link to Postgres", phases: []string{"01", "11"}, letters: "SDGXR", total: 2, faults: Faults{PgLink: 1}},
	{name: "links where Redis is the truth", phases: []string{"12", "22"}, letters: "SDX", total: 1, faults: Faults{RedisLink: 1}, change: []func(*Config){letter}},
	{name: "links to Postgres where Redis is the truth", phases: []string{"12", "22"}, letters: "SDX", total: 2, faults: Faults{PgLink: 1}, change: []func(*Config){letter}},
	{name: "a restart where Redis is the truth", phases: []string{"12", "22"}, letters: "SD", total: 2, faults: Faults{Restart: 1}, change: []func(*Config){letter}},
	{name: "a failover where Redis is the truth", phases: []string{"12", "22"}, letters: "SD", total: 1, faults: Faults{Failover: 1}, change: []func(*Config){letter}},
	{name: "a mark that a failover has brought back", phases: []string{"12"}, letters: "DGXT", total: 2, change: []func(*Config){struck, letter}},
	{name: "a failover where the store is not read", phases: []string{"23", "33", "34"}, letters: "SD", total: 1, faults: Faults{Failover: 1}, change: []func(*Config){letter}},
	{name: "a restart", phases: []string{"01", "11"}, letters: "SDG", total: 2, faults: Faults{Restart: 1}, change: []func(*Config){letter}},
	{name: "a failover", phases: []string{"01", "11"}, letters: "SDG", total: 2, faults: Faults{Failover: 1}, change: []func(*Config){letter}},
	{name: "the clock", phases: []string{"11"}, letters: "SD", total: 1, faults: Faults{Failover: 1, Hours: 1, RedisLink: 1}, change: []func(*Config){letter}},
	{name: "a crash of Postgres", phases: []string{"11"}, letters: "SDX", total: 2, most: 2, faults: Faults{PgCrash: 1, Forgets: true}},
	{name: "a crash of Postgres beside phase0", phases: []string{"01"}, letters: "SDR", total: 1, most: 2, faults: Faults{PgCrash: 1, Forgets: true}},
	{name: "a crash of Postgres and what only Redis can run", phases: []string{"11"}, letters: "SR", total: 2, most: 2, faults: Faults{PgCrash: 1, Forgets: true}},
	{name: "a crash of Postgres where Redis is the truth", phases: []string{"12", "22"}, letters: "SDXR", total: 1, most: 2, faults: Faults{PgCrash: 1, Forgets: true}},
	{name: "two links", phases: []string{"11"}, letters: "SD", total: 1, faults: Faults{RedisLink: 1, PgLink: 1}},
	{name: "TTLs", phases: []string{"01", "11", "22"}, letters: "PEGA", total: 2, change: []func(*Config){mortal, letter}},
	{name: "TTLs and a failover", phases: []string{"11"}, letters: "PE", total: 1, most: 1, // beyond, what EXPIRE answers may tell of a write that is not acknowledged yet
		faults: Faults{Failover: 1}, change: []func(*Config){letter}},
	{name: "conditions", phases: []string{"11", "22"}, letters: "NDG", total: 2, faults: Faults{PgLink: 1}},
	{name: "absence is remembered", phases: []string{"11"}, letters: "SDG", total: 3, change: []func(*Config){negatives}},
	{name: "groups of two keys", phases: []string{"11", "22"}, letters: "MsGd", total: 2, change: []func(*Config){flushed}},
	{name: "groups and a crash", phases: []string{"11"}, letters: "MsG", total: 2, faults: crash, change: []func(*Config){flushed}},
	{name: "FLUSHALL", phases: []string{"11"}, letters: "FSG", total: 2, change: []func(*Config){letter}},
	{name: "the way back", phases: []string{"34"}, letters: "BGS", total: 2, most: 2, change: []func(*Config){returned}},
	{name: "transactions", phases: []string{"01", "11", "12"}, letters: "TSD", total: 2, faults: evict, change: []func(*Config){letter}},
	{name: "transactions and a link to Postgres", phases: []string{"11"}, letters: "TSD", total: 2, faults: Faults{PgLink: 1}},
	{name: "transactions and a link to Redis", phases: []string{"11"}, letters: "TRS", total: 2, faults: Faults{RedisLink: 1}},
	{name: "both stores or none", phases: []string{"11"}, letters: "SDGXR", total: 2, faults: Faults{PgLink: 1}, change: []func(*Config){both}},
	{name: "three sidecars", phases: []string{"111", "011", "112"}, letters: "SDG", total: 2},
	{name: "three sidecars and a crash", phases: []string{"111"}, letters: "SG", total: 2, faults: crash},
}

// each calls f with every world of the family whose programs have n commands in total, until f answers false.
func (w worlds) each(n int, f func(Config) bool) {
	for _, phases := range w.phases {
		starts := [][2]int8{{0, 0}, {First, First}, {0, First}}
		switch last := phases[len(phases)-1]; {
		case last >= '3': // drain presumes that what is wanted has been promoted
			starts = [][2]int8{{0, 0}, {First, First}, {First, 0}}
		case last == '2':
			starts = append(starts, [2]int8{First, 0})
		}
		for _, programs := range divide(w.letters, n, len(phases)) {
			for _, at := range starts {
				c := world(phases, programs, at[0], at[1], w.faults)
				for _, change := range w.change {
					change(&c)
				}
				if c.Marked && c.Store != 0 { // the row went with the write that marked the key
					continue
				}
				if c.Unlike { // rows that have missed writes
					c.Redis, c.Store = 0, First
				}
				if !f(c) {
					return
				}
			}
		}
	}
}

// divide gives n letters to so many clients, in every way.
func divide(letters string, n, clients int) (all [][]string) {
	if clients == 0 {
		if n == 0 {
			return [][]string{nil}
		}
		return nil
	}
	for mine := 0; mine <= n; mine++ {
		for _, p := range wordsOf(letters, mine) {
			for _, rest := range divide(letters, n-mine, clients-1) {
				all = append(all, append([]string{p}, rest...))
			}
		}
	}
	return all
}

// wordsOf are all words of n letters.
func wordsOf(letters string, n int) []string {
	out := []string{""}
	for range n {
		var longer []string
		for _, w := range out {
			for _, l := range letters {
				longer = append(longer, w+string(l))
			}
		}
		out = longer
	}
	return out
}

func TestProtocol(t *testing.T) {
	for _, w := range families {
		t.Run(w.name, func(t *testing.T) {
			states, n := 0, 0
			for total := 1; total <= w.total; total++ {
				w.each(total, func(c Config) bool {
					r := Explore(c)
					states, n = states+r.States, n+1
					if r.Wrong != "" || !r.Whole {
						t.Error(r)
						return false
					}
					return true
				})
			}
			t.Logf("%d worlds, %d states", n, states)
		})
	}
}
