// The scenario with redis-cli: sessions that are typed into its prompt, and its ways for scripts.
package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os/exec"
	"regexp"
	"strings"
	"time"

	"cacheproxy/test/clients/step"
)

func main() {
	step.Run(
		step.Step{Name: "connect", Do: connect},
		step.Step{Name: "pipeline", Do: pipeline},
		step.Step{Name: "transaction", Do: transaction},
		step.Step{Name: "pubsub", Do: pubsub},
		step.Step{Name: "blocking", Do: blocking},
		step.Step{Name: "script", Do: script},
		step.Step{Name: "reconnect", Do: reconnect},
	)
}

// cli is redis-cli with the options that every use of it has.
func cli(ctx context.Context, args ...string) *exec.Cmd {
	all := []string{"-h", step.Host, "-p", step.Port, "--no-raw"}
	if step.Protocol == 3 {
		all = append(all, "-3")
	}
	return exec.CommandContext(ctx, "redis-cli", append(all, args...)...)
}

// once runs redis-cli for one command.
func once(ctx context.Context, stdin string, args ...string) string {
	cmd := cli(ctx, args...)
	cmd.Stdin = strings.NewReader(stdin)
	out, err := cmd.CombinedOutput()
	if err != nil {
		step.Fail("redis-cli %s: %v: %s", strings.Join(args, " "), err, out)
	}
	return strings.TrimRight(string(out), "\n")
}

// timing is how redis-cli tells how long a command took, when that was half a second.
var timing = regexp.MustCompile(`^\([0-9.]+s\)$`)

// session is a redis-cli at its prompt.
type session struct {
	cmd   *exec.Cmd
	in    io.WriteCloser
	lines chan string // closed when it has ended
}

func open(ctx context.Context, args ...string) *session {
	cmd := cli(ctx, args...)
	in, err := cmd.StdinPipe()
	step.Ok("stdin", err)
	out, err := cmd.StdoutPipe()
	step.Ok("stdout", err)
	cmd.Stderr = cmd.Stdout
	step.Ok("start redis-cli", cmd.Start())
	s := &session{cmd, in, make(chan string, 64)}
	go func() {
		defer close(s.lines)
		for r := bufio.NewScanner(out); r.Scan(); {
			if !timing.MatchString(r.Text()) {
				s.lines <- r.Text()
			}
		}
	}()
	return s
}

// close ends redis-cli. What it printed and nobody asked for is wrong.
func (s *session) close() {
	_ = s.in.Close() // the end of the input is the end of redis-cli
	var left []string
	for line := range s.lines {
		if line != "" { // it ends its own line when its input ends
			left = append(left, line)
		}
	}
	_ = s.cmd.Wait() // killed, in pubsub
	if left != nil {
		step.Fail("redis-cli also said %q", left)
	}
}

// say types a line.
func (s *session) say(command string) {
	_, err := io.WriteString(s.in, command+"\n")
	step.Ok("type into redis-cli", err)
}

// hear takes as many lines as are wanted. One that ends in `...` is a beginning.
func (s *session) hear(ctx context.Context, what string, want ...string) {
	for _, want := range want {
		got := step.Receive(ctx, what, s.lines)
		if begin, ok := strings.CutSuffix(want, "..."); ok && strings.HasPrefix(got, begin) {
			continue
		}
		step.Equal(what, got, want)
	}
}

func (s *session) ask(ctx context.Context, command string, want ...string) {
	s.say(command)
	s.hear(ctx, command, want...)
}

func (s *session) info(ctx context.Context) {
	s.ask(ctx, "CLIENT SETNAME scenario", "OK")
	s.say("CLIENT INFO")
	got := step.Receive(ctx, "CLIENT INFO", s.lines)
	step.Contains("CLIENT INFO", got, fmt.Sprintf(" resp=%d", step.Protocol))
	step.Contains("CLIENT INFO", got, " name=scenario ")
}

func connect(ctx context.Context) {
	s := open(ctx)
	defer s.close()
	s.ask(ctx, "PING", "PONG")
	s.info(ctx)
	s.ask(ctx, `SET bytes "\x00\r\n\xff $5" EX 3600`, "OK")
	s.ask(ctx, "GET bytes", `"\x00\r\n\xff $5"`)
	s.ask(ctx, "TTL bytes", "(integer) 3...")
	s.ask(ctx, "GET nothing", "(nil)")
	s.ask(ctx, "LPUSH bytes x", "(error) WRONGTYPE ...")
	s.ask(ctx, "HSET hash a 1 b 2", "(integer) 2")
	s.ask(ctx, "ZADD zset 1.5 m", "(integer) 1")
	if step.Protocol == 3 {
		s.ask(ctx, "HGETALL hash", `1# "a" => "1"`, `2# "b" => "2"`)
		s.ask(ctx, "ZSCORE zset m", "(double) 1.5")
	} else {
		s.ask(ctx, "HGETALL hash", `1) "a"`, `2) "1"`, `3) "b"`, `4) "2"`)
		s.ask(ctx, "ZSCORE zset m", `"1.5"`)
	}
	step.Equal("a value from stdin", once(ctx, "from stdin", "-x", "SET", "stdin"), "OK")
	s.ask(ctx, "GET stdin", `"from stdin"`)
}

func pipeline(ctx context.Context) {
	var in strings.Builder
	for i := range 201 {
		if i == 100 {
			in.WriteString("LPUSH n x\r\n") // an inline command between others
			continue
		}
		in.WriteString("*2\r\n$4\r\nINCR\r\n$1\r\nn\r\n")
	}
	cmd := cli(ctx, "--pipe")
	cmd.Stdin = strings.NewReader(in.String())
	out, err := cmd.CombinedOutput()
	step.Contains("--pipe", string(out), "errors: 1, replies: 201")
	step.Contains("--pipe", string(out), "WRONGTYPE")
	if err == nil {
		step.Fail("--pipe exits with 0 in spite of an error")
	}
	step.Equal("GET", once(ctx, "", "GET", "n"), `"200"`)
}

func transaction(ctx context.Context) {
	s, other := open(ctx), open(ctx)
	defer s.close()
	defer other.close()
	s.ask(ctx, "WATCH tx", "OK")
	s.ask(ctx, "GET tx", "(nil)")
	s.ask(ctx, "MULTI", "OK")
	s.ask(ctx, "SET tx 41", "QUEUED")
	s.ask(ctx, "INCR tx", "QUEUED")
	s.ask(ctx, "RPUSH tx:list a b", "QUEUED")
	s.ask(ctx, "EXEC", "1) OK", "2) (integer) 42", "3) (integer) 2")
	s.ask(ctx, "GET tx", `"42"`)

	s.ask(ctx, "WATCH tx", "OK")
	other.ask(ctx, "SET tx 7", "OK")
	s.ask(ctx, "MULTI", "OK")
	s.ask(ctx, "SET tx 8", "QUEUED")
	s.ask(ctx, "EXEC", "(nil)")
	s.ask(ctx, "GET tx", `"7"`)

	s.ask(ctx, "MULTI", "OK")
	s.ask(ctx, "LPUSH tx x", "QUEUED")
	s.ask(ctx, "SET tx 9", "QUEUED")
	s.ask(ctx, "EXEC", "1) (error) WRONGTYPE ...", "2) OK")
	s.ask(ctx, "GET tx", `"9"`)

	s.ask(ctx, "MULTI", "OK")
	s.ask(ctx, "NOSUCH", "(error) ERR unknown command...")
	s.ask(ctx, "EXEC", "(error) EXECABORT ...")

	s.ask(ctx, "MULTI", "OK")
	s.ask(ctx, "SET tx 10", "QUEUED")
	s.ask(ctx, "DISCARD", "OK")
	s.ask(ctx, "GET tx", `"9"`)
}

// pubsub: redis-cli 7.0 listens until it is interrupted, so its subscriptions end with its connection.
func pubsub(ctx context.Context) {
	other := open(ctx)
	defer other.close()
	news, weather := open(ctx), open(ctx)
	news.say("SUBSCRIBE news")
	weather.say("PSUBSCRIBE wea*")
	hear := func(s *session, what string, words ...string) {
		for i, w := range words {
			s.hear(ctx, what, fmt.Sprintf("%d) %s", i+1, w))
		}
	}
	const reading = "Reading messages... (press Ctrl-C to quit)"
	news.hear(ctx, "SUBSCRIBE", reading)
	hear(news, "SUBSCRIBE", `"subscribe"`, `"news"`, "(integer) 1")
	weather.hear(ctx, "PSUBSCRIBE", reading)
	hear(weather, "PSUBSCRIBE", `"psubscribe"`, `"wea*"`, "(integer) 1")
	other.ask(ctx, `PUBLISH news "glad tidings"`, "(integer) 1")
	hear(news, "the message", `"message"`, `"news"`, `"glad tidings"`)
	other.ask(ctx, "PUBLISH weather rain", "(integer) 1")
	hear(weather, "the message", `"pmessage"`, `"wea*"`, `"weather"`, `"rain"`)
	for _, s := range []*session{news, weather} {
		step.Ok("interrupt redis-cli", s.cmd.Process.Kill())
		s.close()
	}
	step.Until(ctx, "the subscriptions end with their connections", func() bool {
		return once(ctx, "", "PUBLISH", "news", "more") == "(integer) 0" && once(ctx, "", "PUBSUB", "NUMPAT") == "(integer) 0"
	})
}

func blocking(ctx context.Context) {
	s, other := open(ctx), open(ctx)
	defer s.close()
	defer other.close()
	s.say("BLPOP empty queue 0")
	step.Until(ctx, "a client is blocked", func() bool {
		return strings.Contains(once(ctx, "", "INFO", "clients"), "blocked_clients:1")
	})
	other.ask(ctx, "RPUSH queue first second", "(integer) 2")
	s.hear(ctx, "BLPOP", `1) "queue"`, `2) "first"`)
	start := time.Now()
	s.ask(ctx, "BLPOP empty 0.2", "(nil)")
	if took := time.Since(start); took < 150*time.Millisecond {
		step.Fail("BLPOP timed out after %v", took)
	}
}

func script(ctx context.Context) {
	const source = `redis.call('SET', KEYS[1], ARGV[1]); return {KEYS[1], ARGV[1], 42}`
	s := open(ctx)
	defer s.close()
	s.ask(ctx, `EVAL "`+source+`" 1 scripted one`, `1) "scripted"`, `2) "one"`, "3) (integer) 42")
	s.ask(ctx, "GET scripted", `"one"`)
	s.say(`SCRIPT LOAD "` + source + `"`)
	sha := strings.Trim(step.Receive(ctx, "SCRIPT LOAD", s.lines), `"`)
	step.Equal("the digest's length", len(sha), 40)
	s.ask(ctx, "EVALSHA "+sha+" 1 scripted two", `1) "scripted"`, `2) "two"`, "3) (integer) 42")
	s.ask(ctx, "GET scripted", `"two"`)
	s.ask(ctx, "SCRIPT FLUSH", "OK")
	s.ask(ctx, "SCRIPT EXISTS "+sha, "1) (integer) 0")
	s.ask(ctx, "EVALSHA "+sha+" 1 scripted three", "(error) NOSCRIPT ...")
	s.ask(ctx, "GET scripted", `"two"`)
	step.Equal("--eval", once(ctx, source, "--eval", "/dev/stdin", "scripted", ",", "four"), "1) \"scripted\"\n2) \"four\"\n3) (integer) 42")
	s.ask(ctx, "GET scripted", `"four"`)
}

func reconnect(ctx context.Context) {
	s := open(ctx)
	defer s.close()
	s.ask(ctx, `SET kept "value before"`, "OK")
	step.Restart()
	// It may report the broken connection once, and makes a new one for the next command.
	s.say("PING")
	if got := step.Receive(ctx, "PING after the restart", s.lines); got != "PONG" {
		step.Equal("PING after the restart", got, "Error: Server closed the connection")
		s.ask(ctx, "PING", "PONG")
	}
	s.ask(ctx, `SET kept "value after"`, "OK")
	s.ask(ctx, "GET kept", `"value after"`)
	s.info(ctx)
	s.ask(ctx, `EVAL "return ARGV[1]" 0 run`, `"run"`)
}
