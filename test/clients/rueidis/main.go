// The scenario with rueidis. In RESP3 it pipelines all goroutines over a few connections, and tracks the keys that it caches.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"cacheproxy/test/clients/step"

	"github.com/redis/rueidis"
)

func main() {
	steps := []step.Step{
		{Name: "connect", Do: connect},
		{Name: "pipeline", Do: pipeline},
		{Name: "transaction", Do: transaction},
		{Name: "pubsub", Do: pubsub},
		{Name: "blocking", Do: blocking},
		{Name: "script", Do: script},
		{Name: "reconnect", Do: reconnect},
	}
	if os.Args[len(os.Args)-1] == "3" { // tracking is a part of RESP3
		steps = append(steps, step.Step{Name: "cache", Do: cache})
	}
	step.Run(steps...)
}

func client() rueidis.Client {
	c, err := rueidis.NewClient(rueidis.ClientOption{
		InitAddress: []string{step.Addr()}, ClientName: "scenario",
		AlwaysRESP2: step.Protocol == 2, DisableCache: step.Protocol == 2,
	})
	step.Ok("connect", err)
	return c
}

func str(ctx context.Context, c rueidis.CoreClient, args ...string) string {
	got, err := c.Do(ctx, c.B().Arbitrary(args...).Build()).ToString()
	step.Ok(strings.Join(args[:min(2, len(args))], " "), err)
	return got
}

func fails(ctx context.Context, c rueidis.CoreClient, code string, args ...string) {
	step.Refused(args[0], c.Do(ctx, c.B().Arbitrary(args...).Build()).Error(), code)
}

func info(ctx context.Context, c rueidis.Client) {
	got := str(ctx, c, "CLIENT", "INFO")
	step.Contains("CLIENT INFO", got, fmt.Sprintf(" resp=%d", step.Protocol))
	step.Contains("CLIENT INFO", got, " name=scenario ")
}

func connect(ctx context.Context) {
	c := client()
	defer c.Close()
	step.Equal("PING", str(ctx, c, "PING"), "PONG")
	info(ctx, c)
	const bytes = "\x00\r\n\xff $5"
	step.Equal("SET", str(ctx, c, "SET", "bytes", bytes, "EX", "3600"), "OK")
	step.Equal("GET", str(ctx, c, "GET", "bytes"), bytes)
	ttl, err := c.Do(ctx, c.B().Ttl().Key("bytes").Build()).AsInt64()
	step.Ok("TTL", err)
	if ttl < 3540 || ttl > 3600 {
		step.Fail("TTL: %d", ttl)
	}
	step.Equal("GET of nothing", rueidis.IsRedisNil(c.Do(ctx, c.B().Get().Key("nothing").Build()).Error()), true)
	fails(ctx, c, "WRONGTYPE", "LPUSH", "bytes", "x")
	step.Ok("HSET", c.Do(ctx, c.B().Hset().Key("hash").FieldValue().FieldValue("a", "1").FieldValue("b", "2").Build()).Error())
	m, err := c.Do(ctx, c.B().Hgetall().Key("hash").Build()).ToMessage()
	step.Ok("HGETALL", err)
	step.Equal("HGETALL is a map", m.IsMap(), step.Protocol == 3)
	hash, err := m.AsStrMap()
	step.Ok("HGETALL", err)
	step.Equal("HGETALL", hash, map[string]string{"a": "1", "b": "2"})
	step.Ok("ZADD", c.Do(ctx, c.B().Zadd().Key("zset").ScoreMember().ScoreMember(1.5, "m").Build()).Error())
	m, err = c.Do(ctx, c.B().Zscore().Key("zset").Member("m").Build()).ToMessage()
	step.Ok("ZSCORE", err)
	step.Equal("ZSCORE is a double", m.IsFloat64(), step.Protocol == 3)
}

func pipeline(ctx context.Context) {
	c := client()
	defer c.Close()
	var cmds rueidis.Commands
	for i := range 101 {
		if i == 50 {
			cmds = append(cmds, c.B().Lpush().Key("n").Element("x").Build())
			continue
		}
		cmds = append(cmds, c.B().Incr().Key("n").Build())
	}
	want := int64(0)
	for i, r := range c.DoMulti(ctx, cmds...) {
		if i == 50 {
			step.Refused("LPUSH", r.Error(), "WRONGTYPE")
			continue
		}
		want++
		n, err := r.AsInt64()
		step.Ok("INCR", err)
		step.Equal("INCR", n, want)
	}
}

func transaction(ctx context.Context) {
	other := client()
	defer other.Close()
	c, release := other.Dedicate()
	defer release()
	step.Equal("WATCH", str(ctx, c, "WATCH", "tx"), "OK")
	step.Equal("GET", rueidis.IsRedisNil(c.Do(ctx, c.B().Get().Key("tx").Build()).Error()), true)
	rs := c.DoMulti(ctx,
		c.B().Multi().Build(),
		c.B().Set().Key("tx").Value("41").Build(),
		c.B().Incr().Key("tx").Build(),
		c.B().Rpush().Key("tx:list").Element("a", "b").Build(),
		c.B().Exec().Build(),
	)
	got, err := rs[4].ToArray()
	step.Ok("EXEC", err)
	step.Equal("EXEC's length", len(got), 3)
	n, err := got[1].AsInt64()
	step.Ok("INCR in MULTI", err)
	step.Equal("INCR in MULTI", n, int64(42))
	step.Equal("GET after EXEC", str(ctx, c, "GET", "tx"), "42")

	step.Equal("WATCH", str(ctx, c, "WATCH", "tx"), "OK")
	step.Equal("SET by another connection", str(ctx, other, "SET", "tx", "7"), "OK")
	rs = c.DoMulti(ctx, c.B().Multi().Build(), c.B().Set().Key("tx").Value("8").Build(), c.B().Exec().Build())
	if err := rs[2].Error(); !rueidis.IsRedisNil(err) {
		step.Fail("EXEC after a watched key changed: %v", err)
	}
	step.Equal("GET after the aborted EXEC", str(ctx, c, "GET", "tx"), "7")

	rs = c.DoMulti(ctx, c.B().Multi().Build(), c.B().Lpush().Key("tx").Element("x").Build(), c.B().Set().Key("tx").Value("9").Build(), c.B().Exec().Build())
	got, err = rs[3].ToArray()
	step.Ok("EXEC with an error inside", err)
	step.Refused("LPUSH in MULTI", got[0].Error(), "WRONGTYPE")
	step.Equal("GET", str(ctx, c, "GET", "tx"), "9")

	rs = c.DoMulti(ctx, c.B().Multi().Build(), c.B().Set().Key("tx").Value("10").Build(), c.B().Arbitrary("DISCARD").Build())
	step.Ok("DISCARD", rs[2].Error())
	step.Equal("GET after DISCARD", str(ctx, c, "GET", "tx"), "9")
}

func pubsub(ctx context.Context) {
	other := client()
	defer other.Close()
	c, release := other.Dedicate()
	defer release()
	messages := make(chan rueidis.PubSubMessage, 2)
	subscriptions := make(chan rueidis.PubSubSubscription, 4)
	c.SetPubSubHooks(rueidis.PubSubHooks{
		OnMessage:      func(m rueidis.PubSubMessage) { messages <- m },
		OnSubscription: func(s rueidis.PubSubSubscription) { subscriptions <- s },
	})
	step.Ok("SUBSCRIBE", c.Do(ctx, c.B().Subscribe().Channel("news").Build()).Error())
	step.Ok("PSUBSCRIBE", c.Do(ctx, c.B().Psubscribe().Pattern("wea*").Build()).Error())
	step.Equal("the confirmation", step.Receive(ctx, "SUBSCRIBE", subscriptions), rueidis.PubSubSubscription{Kind: "subscribe", Channel: "news", Count: 1})
	step.Equal("the confirmation", step.Receive(ctx, "PSUBSCRIBE", subscriptions), rueidis.PubSubSubscription{Kind: "psubscribe", Channel: "wea*", Count: 2})
	for _, m := range []rueidis.PubSubMessage{
		{Channel: "news", Message: "glad tidings"},
		{Channel: "weather", Pattern: "wea*", Message: "rain"},
	} {
		n, err := other.Do(ctx, other.B().Publish().Channel(m.Channel).Message(m.Message).Build()).AsInt64()
		step.Ok("PUBLISH", err)
		step.Equal("PUBLISH", n, int64(1))
		step.Equal("the message", step.Receive(ctx, "the message", messages), m)
	}
	if step.Protocol == 3 {
		step.Equal("SET while subscribed", str(ctx, c, "SET", "while:pubsub", "yes"), "OK")
	}
	step.Ok("UNSUBSCRIBE", c.Do(ctx, c.B().Unsubscribe().Channel("news").Build()).Error())
	step.Ok("PUNSUBSCRIBE", c.Do(ctx, c.B().Punsubscribe().Pattern("wea*").Build()).Error())
	for range 2 {
		step.Contains("the confirmation", step.Receive(ctx, "UNSUBSCRIBE", subscriptions).Kind, "unsubscribe")
	}
	step.Equal("SET afterwards", str(ctx, c, "SET", "after:pubsub", "yes"), "OK")
	step.Equal("GET afterwards", str(ctx, c, "GET", "after:pubsub"), "yes")

	// Receive is rueidis's other way: over the shared connection, until the last UNSUBSCRIBE.
	ended := make(chan error, 1)
	go func() {
		ended <- other.Receive(ctx, other.B().Subscribe().Channel("news").Build(), func(m rueidis.PubSubMessage) { messages <- m })
	}()
	step.Until(ctx, "Receive has subscribed", func() bool {
		n, err := other.Do(ctx, other.B().Publish().Channel("news").Message("more").Build()).AsInt64()
		step.Ok("PUBLISH", err)
		return n == 1
	})
	step.Equal("the message", step.Receive(ctx, "the message", messages).Message, "more")
	step.Ok("UNSUBSCRIBE", other.Do(ctx, other.B().Unsubscribe().Channel("news").Build()).Error())
	step.Ok("Receive", step.Receive(ctx, "the end of Receive", ended))
	step.Equal("SET afterwards", str(ctx, other, "SET", "after:pubsub", "yes"), "OK")
}

func blocking(ctx context.Context) {
	c, other := client(), client()
	defer c.Close()
	defer other.Close()
	type popped struct {
		got []string
		err error
	}
	ch := make(chan popped, 1)
	go func() {
		got, err := c.Do(ctx, c.B().Blpop().Key("empty", "queue").Timeout(0).Build()).AsStrSlice()
		ch <- popped{got, err}
	}()
	step.Until(ctx, "a client is blocked", func() bool {
		return strings.Contains(str(ctx, other, "INFO", "clients"), "blocked_clients:1\r")
	})
	// The connection that others share does not wait for the blocked one.
	step.Equal("PING meanwhile", str(ctx, c, "PING"), "PONG")
	step.Ok("RPUSH", other.Do(ctx, other.B().Rpush().Key("queue").Element("first", "second").Build()).Error())
	p := step.Receive(ctx, "BLPOP", ch)
	step.Ok("BLPOP", p.err)
	step.Equal("BLPOP", p.got, []string{"queue", "first"})

	start := time.Now()
	err := c.Do(ctx, c.B().Blpop().Key("empty").Timeout(0.2).Build()).Error()
	step.Equal("BLPOP of nothing", rueidis.IsRedisNil(err), true)
	if took := time.Since(start); took < 150*time.Millisecond {
		step.Fail("BLPOP timed out after %v", took)
	}
}

const source = `redis.call('SET', KEYS[1], ARGV[1]); return {KEYS[1], ARGV[1], 42}`

func script(ctx context.Context) {
	c := client()
	defer c.Close()
	keys := []string{"scripted"}
	got, err := c.Do(ctx, c.B().Eval().Script(source).Numkeys(1).Key(keys...).Arg("one").Build()).ToAny()
	step.Ok("EVAL", err)
	step.Equal("EVAL", got, []any{"scripted", "one", int64(42)})
	step.Equal("GET after EVAL", str(ctx, c, "GET", "scripted"), "one")

	step.Equal("SCRIPT FLUSH", str(ctx, c, "SCRIPT", "FLUSH"), "OK")
	sha := str(ctx, c, "SCRIPT", "LOAD", source)
	step.Equal("SCRIPT FLUSH", str(ctx, c, "SCRIPT", "FLUSH"), "OK")
	fails(ctx, c, "NOSCRIPT", "EVALSHA", sha, "1", "scripted", "two")
	s := rueidis.NewLuaScript(source)
	for _, v := range []string{"two", "three"} { // EVALSHA, then EVAL; then EVALSHA only
		got, err = s.Exec(ctx, c, keys, []string{v}).ToAny()
		step.Ok("Lua.Exec", err)
		step.Equal("Lua.Exec", got, []any{"scripted", v, int64(42)})
		step.Equal("GET after EVALSHA", str(ctx, c, "GET", "scripted"), v)
	}
	step.Equal("SCRIPT FLUSH", str(ctx, c, "SCRIPT", "FLUSH"), "OK")
	step.Equal("SCRIPT LOAD", str(ctx, c, "SCRIPT", "LOAD", source), sha)
	step.Ok("EVALSHA", c.Do(ctx, c.B().Evalsha().Sha1(sha).Numkeys(1).Key(keys...).Arg("four").Build()).Error())
	step.Equal("GET after EVALSHA", str(ctx, c, "GET", "scripted"), "four")
}

func reconnect(ctx context.Context) {
	c := client()
	defer c.Close()
	messages := make(chan rueidis.PubSubMessage, 16)
	ctxReceive, stop := context.WithCancel(ctx)
	ended := make(chan struct{})
	// Receive subscribes again by itself, until it is stopped.
	go func() {
		defer close(ended)
		_ = c.Receive(ctxReceive, c.B().Subscribe().Channel("again").Build(), func(m rueidis.PubSubMessage) { messages <- m })
	}()
	defer func() {
		stop()
		<-ended
	}()
	step.Equal("SET", str(ctx, c, "SET", "kept", "value before"), "OK")
	step.Restart()
	// Each of rueidis's connections notices that it is broken when it is used. It repeats reads then, and leaves it to the
	// application to repeat what may have run.
	insist := func(what string, do func() rueidis.RedisResult) (got string) {
		step.Until(ctx, what+" after the restart", func() bool {
			r := do()
			var reply *rueidis.RedisError
			if err := r.Error(); errors.As(err, &reply) {
				step.Fail("%s after the restart: %v", what, err)
			} else if err != nil {
				return false
			}
			got, _ = r.ToString() // empty for a number
			return true
		})
		return got
	}
	insist("SET", func() rueidis.RedisResult { return c.Do(ctx, c.B().Set().Key("kept").Value("value after").Build()) })
	got, err := c.Do(ctx, c.B().Get().Key("kept").Build()).ToString()
	step.Ok("GET after the restart", err)
	step.Equal("GET after the restart", got, "value after")
	got = insist("CLIENT INFO", func() rueidis.RedisResult { return c.Do(ctx, c.B().ClientInfo().Build()) })
	step.Contains("CLIENT INFO", got, fmt.Sprintf(" resp=%d", step.Protocol))
	run := rueidis.NewLuaScript(`return ARGV[1]`)
	got = insist("a script", func() rueidis.RedisResult { return run.Exec(ctx, c, nil, []string{"run"}) })
	step.Equal("a script", got, "run")
	step.Until(ctx, "it is subscribed again", func() bool {
		n, _ := c.Do(ctx, c.B().Publish().Channel("again").Message("hello").Build()).AsInt64()
		return n == 1
	})
	step.Equal("the message", step.Receive(ctx, "the message", messages).Message, "hello")
}

// cache is client side caching: what another client writes, however it writes it, must reach this one as an invalidation.
func cache(ctx context.Context) {
	c, other := client(), client()
	defer c.Close()
	defer other.Close()
	step.Equal("SET", str(ctx, other, "SET", "cached", "v0"), "OK")
	read := func() (string, bool) {
		r := c.DoCache(ctx, c.B().Get().Key("cached").Cache(), time.Minute)
		got, err := r.ToString()
		if rueidis.IsRedisNil(err) {
			got, err = "nil", nil
		}
		step.Ok("DoCache", err)
		return got, r.IsCacheHit()
	}
	got, hit := read()
	step.Equal("the first read", got, "v0")
	step.Equal("the first read comes from the cache", hit, false)
	for _, change := range []struct {
		want string
		args []string
	}{
		{"v1", []string{"SET", "cached", "v1"}},
		{"v1+", []string{"APPEND", "cached", "+"}},
		{"v3", []string{"EVAL", `return redis.call('SET', KEYS[1], ARGV[1])`, "1", "cached", "v3"}},
		{"v4", []string{"SET", "cached", "v4", "PX", "600000"}},
		{"nil", []string{"DEL", "cached"}},
	} {
		before, hit := read()
		step.Equal("a repeated read comes from the cache", hit, true)
		step.Ok(change.args[0], other.Do(ctx, other.B().Arbitrary(change.args...).Build()).Error())
		step.Until(ctx, "the cached copy is invalidated by "+change.args[0], func() bool {
			got, _ := read()
			if got != before && got != change.want {
				step.Fail("read %q after %s, want %q", got, change.args[0], change.want)
			}
			return got == change.want
		})
	}
}
