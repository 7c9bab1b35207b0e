package chaos

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"cacheproxy/internal/testenv"
	"cacheproxy/policy"
	protocol "cacheproxy/test/model"

	"github.com/redis/go-redis/v9"
)

// What two sidecars say to the stores, message by message in an order of chance, is what the model of the protocols says.

// scheduler lets one message at a time reach a store, and notes them. Whoever waits is let through by chance.
type scheduler struct {
	rng   *rand.Rand // guarded by one
	one   sync.Mutex
	mu    sync.Mutex
	trace []protocol.Message // guarded by mu
}

// coded are the scripts that answer the model's codes. The first key's counts.
var (
	coded  = map[string]bool{"grant": true, "promote": true, "absent": true, "invalidate": true, "fill": true, "write": true, "strike": true}
	answer = regexp.MustCompile(`^\*\d+\r\n\*\d+\r\n:(\d+)\r\n`)
)

// at is what a sidecar's links call. The locks are not given one after the other: Postgres lets one wait until another is done, and they count when they are given.
func (s *scheduler) at(sidecar int) func(testenv.Step) bool {
	return func(step testenv.Step) bool {
		m := protocol.Message{Sidecar: sidecar, Name: step.Name}
		switch {
		case slices.Contains(background, step.Name), step.Name == "clock", step.Name == "named":
		case step.Name == "lock" && !step.Done:
		case step.Name == "lock":
			s.turn()
			s.note(m)
			s.one.Unlock()
		case !step.Done:
			s.turn()
			s.note(m)
		default:
			s.mu.Lock()
			last := &s.trace[len(s.trace)-1]
			if code := answer.FindStringSubmatch(step.Said); coded[step.Name] && code != nil {
				last.Answer, _ = strconv.Atoi(code[1])
			}
			if step.Name == "GET" && strings.HasPrefix(step.Said, "$-1") {
				s.trace = s.trace[:len(s.trace)-1] // a miss: the protocol begins with what follows
			}
			s.mu.Unlock()
			s.one.Unlock()
		}
		return true
	}
}

// turn waits for the right to send the next message, long enough that another may be faster.
func (s *scheduler) turn() {
	s.one.Lock()
	wait := time.Duration(s.rng.IntN(300)) * time.Microsecond
	s.one.Unlock()
	time.Sleep(wait)
	s.one.Lock()
}

func (s *scheduler) note(m protocol.Message) {
	s.mu.Lock()
	s.trace = append(s.trace, m)
	s.mu.Unlock()
}

// told is the trace without what the model leaves out: the looks of a reader that waits, which finds time and again that somebody else has the lease, and those of a
// reader in phase0 for a list or the like.
func (s *scheduler) told(serve []policy.Phase) (trace []protocol.Message) {
	s.mu.Lock()
	defer s.mu.Unlock()
	waits, ran := map[int]bool{}, map[int]bool{}
	for _, m := range s.trace {
		held := m.Name == "grant" && m.Answer == 4
		if held && waits[m.Sidecar] || m.Name == "read" && !ran[m.Sidecar] && serve[m.Sidecar] == policy.Phase0 {
			continue
		}
		ran[m.Sidecar] = ran[m.Sidecar] || m.Name == "lock"
		waits[m.Sidecar] = held || waits[m.Sidecar] && m.Name == "grant"
		trace = append(trace, m)
	}
	return trace
}

// letters are commands by the model's letters.
var letters = map[byte]string{
	'G': "GET {}", 'S': "SET {} v", 'D': "DEL {}", 'X': "GETSET {} v", 'N': "SET {} v NX", 'A': "APPEND {} v", 'R': "EVAL return(redis.call('GETSET',KEYS[1],ARGV[1])) 1 {} v",
}

func TestTracesAreTheModels(t *testing.T) {
	program := testenv.Program(t)
	const each = 3 // schedules of each two programs
	for _, phases := range []string{"11", "12", "22", "01"} {
		t.Run(phases, func(t *testing.T) {
			var names []string
			var serve []policy.Phase
			for _, p := range phases {
				serve = append(serve, policy.Phase(p-'0'))
				names = append(names, policy.Phase(p-'0').String())
			}
			c := newCluster(t, options{program: program, steps: true, poll: time.Minute}, names...)
			direct := client(c.redis().Addr())
			defer direct.Close()
			ctx := context.Background()
			rng := rand.New(rand.NewPCG(1, uint64(serve[0])<<8|uint64(serve[1])))
			runs, steps, swapped, followed := 0, 0, 0, 0
			programs := slices.Sorted(maps.Keys(letters)) // so that a seed says what is run
			for _, a := range programs {
				for _, b := range programs {
					for n := range each {
						key := fmt.Sprintf("%c%c%d", a, b, n)
						world := protocol.Config{Phases: serve, Programs: []string{string(a), string(b)}}
						x := &stepped{t: t, c: c, a: c.sidecars[1], direct: direct, key: key}
						switch {
						case n == 0: // absent
						case serve[1] == policy.Phase2:
							x.must(say("SET {} old")(x))
							world.Redis = protocol.First
						default:
							x.must(say("SET {} old")(x))
							world.Store, world.Redis = protocol.First, protocol.First
							if n == 2 {
								x.raw("DEL", key)
								world.Redis = 0
							}
						}
						x.raw("DEL", "cacheproxy:lease:k:{"+key+"}")
						s := &scheduler{rng: rng}
						for i, sc := range c.sidecars {
							sc.steps.At(s.at(i))
						}
						var both sync.WaitGroup
						for i, letter := range []byte{a, b} {
							both.Go(func() {
								x := &stepped{t: t, c: c, a: c.sidecars[i], key: key}
								if err := say(strings.Replace(letters[letter], " v", fmt.Sprint(" v", i), 1))(x); err != nil && !errors.Is(err, redis.Nil) {
									t.Errorf("%s: %v", key, err)
								}
							})
						}
						both.Wait()
						for _, sc := range c.sidecars {
							sc.steps.At(nil)
						}
						trace := s.told(serve)
						if got := protocol.ReplayMessages(world, trace); got != len(trace) {
							t.Errorf("%s beside %s (%s): the model follows %d of %d messages: %v", letters[a], letters[b], key, got, len(trace), trace)
						}
						runs++
						steps += len(trace)
						// It does not follow just anything.
						if i := rng.IntN(max(len(trace)-1, 1)); len(trace) > 1 && trace[i].Sidecar == trace[i+1].Sidecar && trace[i] != trace[i+1] {
							trace[i], trace[i+1] = trace[i+1], trace[i]
							swapped++
							if protocol.ReplayMessages(world, trace) == len(trace) {
								followed++
							}
						}
						if err := direct.Del(ctx, key).Err(); err != nil {
							t.Error(err)
						}
					}
				}
			}
			t.Logf("%d traces with %d messages; with two messages of a sidecar swapped, %d of %d are followed", runs, steps, followed, swapped)
			if followed > 0 {
				t.Errorf("the model follows %d traces in which two messages of a sidecar are swapped", followed)
			}
		})
	}
}
