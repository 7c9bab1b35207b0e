// The scenario with redigo. It speaks RESP2 only.
package main

import (
	"context"
	"fmt"
	"strings"
	"time"

	"cacheproxy/test/clients/step"

	"github.com/gomodule/redigo/redis"
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

func dial(ctx context.Context) redis.Conn {
	c, err := redis.DialContext(ctx, "tcp", step.Addr(), redis.DialClientName("scenario"))
	step.Ok("dial", err)
	return c
}

func str(c redis.Conn, cmd string, args ...any) string {
	got, err := redis.String(c.Do(cmd, args...))
	step.Ok(cmd, err)
	return got
}

func connect(ctx context.Context) {
	c := dial(ctx)
	defer c.Close()
	step.Equal("PING", str(c, "PING"), "PONG")
	step.Contains("CLIENT INFO", str(c, "CLIENT", "INFO"), fmt.Sprintf(" resp=%d", step.Protocol))
	step.Equal("CLIENT GETNAME", str(c, "CLIENT", "GETNAME"), "scenario")
	const bytes = "\x00\r\n\xff $5"
	step.Equal("SET", str(c, "SET", "bytes", bytes, "EX", 3600), "OK")
	step.Equal("GET", str(c, "GET", "bytes"), bytes)
	ttl, err := redis.Int(c.Do("TTL", "bytes"))
	step.Ok("TTL", err)
	if ttl < 3540 || ttl > 3600 {
		step.Fail("TTL: %d", ttl)
	}
	_, err = redis.String(c.Do("GET", "nothing"))
	step.Equal("GET of nothing", err, redis.ErrNil)
	_, err = c.Do("LPUSH", "bytes", "x")
	step.Refused("LPUSH to a string", err, "WRONGTYPE")
	_, err = c.Do("HSET", "hash", "a", "1", "b", "2")
	step.Ok("HSET", err)
	hash, err := redis.StringMap(c.Do("HGETALL", "hash"))
	step.Ok("HGETALL", err)
	step.Equal("HGETALL", hash, map[string]string{"a": "1", "b": "2"})
}

func pipeline(ctx context.Context) {
	c := dial(ctx)
	defer c.Close()
	for i := range 101 {
		if i == 50 {
			step.Ok("Send", c.Send("LPUSH", "n", "x"))
			continue
		}
		step.Ok("Send", c.Send("INCR", "n"))
	}
	step.Ok("Flush", c.Flush())
	want := 0
	for i := range 101 {
		n, err := redis.Int(c.Receive())
		if i == 50 {
			step.Refused("LPUSH", err, "WRONGTYPE")
			continue
		}
		want++
		step.Ok("INCR", err)
		step.Equal("INCR", n, want)
	}
}

func transaction(ctx context.Context) {
	c, other := dial(ctx), dial(ctx)
	defer c.Close()
	defer other.Close()
	step.Equal("WATCH", str(c, "WATCH", "tx"), "OK")
	_, err := redis.String(c.Do("GET", "tx"))
	step.Equal("GET", err, redis.ErrNil)
	step.Ok("Send", c.Send("MULTI"))
	step.Ok("Send", c.Send("SET", "tx", "41"))
	step.Ok("Send", c.Send("INCR", "tx"))
	step.Ok("Send", c.Send("RPUSH", "tx:list", "a", "b"))
	got, err := redis.Values(c.Do("EXEC"))
	step.Ok("EXEC", err)
	step.Equal("EXEC", got, []any{"OK", int64(42), int64(2)})
	step.Equal("GET after EXEC", str(c, "GET", "tx"), "42")

	step.Equal("WATCH", str(c, "WATCH", "tx"), "OK")
	step.Equal("SET by another connection", str(other, "SET", "tx", "7"), "OK")
	step.Equal("MULTI", str(c, "MULTI"), "OK")
	step.Equal("SET", str(c, "SET", "tx", "8"), "QUEUED")
	reply, err := c.Do("EXEC")
	step.Ok("EXEC after a watched key changed", err)
	step.Equal("EXEC after a watched key changed", reply, nil)
	step.Equal("GET after the aborted EXEC", str(c, "GET", "tx"), "7")

	step.Equal("MULTI", str(c, "MULTI"), "OK")
	step.Equal("LPUSH", str(c, "LPUSH", "tx", "x"), "QUEUED")
	step.Equal("SET", str(c, "SET", "tx", "9"), "QUEUED")
	got, err = redis.Values(c.Do("EXEC"))
	step.Ok("EXEC with an error inside", err)
	inside, _ := got[0].(error)
	step.Refused("LPUSH in MULTI", inside, "WRONGTYPE")
	step.Equal("GET", str(c, "GET", "tx"), "9")

	step.Equal("MULTI", str(c, "MULTI"), "OK")
	_, err = c.Do("NOSUCH")
	step.Refused("an unknown command in MULTI", err, "ERR")
	_, err = c.Do("EXEC")
	step.Refused("EXEC after an unknown command", err, "EXECABORT")

	step.Equal("MULTI", str(c, "MULTI"), "OK")
	step.Equal("SET", str(c, "SET", "tx", "10"), "QUEUED")
	step.Equal("DISCARD", str(c, "DISCARD"), "OK")
	step.Equal("GET after DISCARD", str(c, "GET", "tx"), "9")
}

func pubsub(ctx context.Context) {
	c, other := dial(ctx), dial(ctx)
	defer c.Close()
	defer other.Close()
	sub := redis.PubSubConn{Conn: c}
	step.Ok("SUBSCRIBE", sub.Subscribe("news"))
	step.Equal("the confirmation", sub.ReceiveContext(ctx), redis.Subscription{Kind: "subscribe", Channel: "news", Count: 1})
	step.Ok("PSUBSCRIBE", sub.PSubscribe("wea*"))
	step.Equal("the confirmation", sub.ReceiveContext(ctx), redis.Subscription{Kind: "psubscribe", Channel: "wea*", Count: 2})
	for _, m := range []redis.Message{
		{Channel: "news", Data: []byte("glad tidings")},
		{Channel: "weather", Pattern: "wea*", Data: []byte("rain")},
	} {
		n, err := redis.Int(other.Do("PUBLISH", m.Channel, m.Data))
		step.Ok("PUBLISH", err)
		step.Equal("PUBLISH", n, 1)
		step.Equal("the message", sub.ReceiveContext(ctx), m)
	}
	step.Ok("PING", sub.Ping("still"))
	step.Equal("PONG while subscribed", sub.ReceiveContext(ctx), redis.Pong{Data: "still"})
	step.Ok("UNSUBSCRIBE", sub.Unsubscribe())
	step.Equal("the confirmation", sub.ReceiveContext(ctx), redis.Subscription{Kind: "unsubscribe", Channel: "news", Count: 1})
	step.Ok("PUNSUBSCRIBE", sub.PUnsubscribe())
	step.Equal("the confirmation", sub.ReceiveContext(ctx), redis.Subscription{Kind: "punsubscribe", Channel: "wea*", Count: 0})
	step.Equal("SET afterwards", str(c, "SET", "after:pubsub", "yes"), "OK")
	step.Equal("GET afterwards", str(c, "GET", "after:pubsub"), "yes")
}

func blocking(ctx context.Context) {
	c, other := dial(ctx), dial(ctx)
	defer c.Close()
	defer other.Close()
	type popped struct {
		got []string
		err error
	}
	ch := make(chan popped, 1)
	go func() {
		got, err := redis.Strings(redis.DoWithTimeout(c, step.Bound, "BLPOP", "empty", "queue", 0))
		ch <- popped{got, err}
	}()
	step.Until(ctx, "a client is blocked", func() bool {
		return strings.Contains(str(other, "INFO", "clients"), "blocked_clients:1\r")
	})
	n, err := redis.Int(other.Do("RPUSH", "queue", "first", "second"))
	step.Ok("RPUSH", err)
	step.Equal("RPUSH", n, 2)
	p := step.Receive(ctx, "BLPOP", ch)
	step.Ok("BLPOP", p.err)
	step.Equal("BLPOP", p.got, []string{"queue", "first"})

	start := time.Now()
	reply, err := c.Do("BLPOP", "empty", "0.2")
	step.Ok("BLPOP of nothing", err)
	step.Equal("BLPOP of nothing", reply, nil)
	if took := time.Since(start); took < 150*time.Millisecond {
		step.Fail("BLPOP timed out after %v", took)
	}
}

const source = `redis.call('SET', KEYS[1], ARGV[1]); return {KEYS[1], ARGV[1], 42}`

func script(ctx context.Context) {
	c := dial(ctx)
	defer c.Close()
	got, err := redis.Values(c.Do("EVAL", source, 1, "scripted", "one"))
	step.Ok("EVAL", err)
	step.Equal("EVAL", got, []any{[]byte("scripted"), []byte("one"), int64(42)})
	step.Equal("GET after EVAL", str(c, "GET", "scripted"), "one")

	s := redis.NewScript(1, source)
	step.Equal("SCRIPT FLUSH", str(c, "SCRIPT", "FLUSH"), "OK")
	_, err = c.Do("EVALSHA", s.Hash(), 1, "scripted", "two")
	step.Refused("EVALSHA of an unknown script", err, "NOSCRIPT")
	_, err = s.Do(c, "scripted", "two") // EVALSHA, then EVAL
	step.Ok("Script.Do", err)
	step.Equal("GET after EVALSHA", str(c, "GET", "scripted"), "two")

	step.Equal("SCRIPT FLUSH", str(c, "SCRIPT", "FLUSH"), "OK")
	step.Equal("SCRIPT LOAD", str(c, "SCRIPT", "LOAD", source), s.Hash())
	step.Ok("EVALSHA", s.SendHash(c, "scripted", "three"))
	step.Ok("Flush", c.Flush())
	_, err = c.Receive()
	step.Ok("EVALSHA", err)
	step.Equal("GET after EVALSHA", str(c, "GET", "scripted"), "three")
}

func reconnect(ctx context.Context) {
	// A pool that looks at a connection before it hands it out is redigo's way to reconnect.
	pool := &redis.Pool{
		MaxIdle:      4,
		DialContext:  func(ctx context.Context) (redis.Conn, error) { return redis.DialContext(ctx, "tcp", step.Addr()) },
		TestOnBorrow: func(c redis.Conn, _ time.Time) error { _, err := c.Do("PING"); return err },
	}
	defer pool.Close()
	use := func(do func(c redis.Conn)) {
		c, err := pool.GetContext(ctx)
		step.Ok("take a connection from the pool", err)
		defer c.Close()
		do(c)
	}
	use(func(c redis.Conn) { step.Equal("SET", str(c, "SET", "kept", "value before"), "OK") })
	step.Restart()
	use(func(c redis.Conn) {
		step.Equal("SET after the restart", str(c, "SET", "kept", "value after"), "OK")
		step.Equal("GET after the restart", str(c, "GET", "kept"), "value after")
		got, err := redis.String(redis.NewScript(0, `return ARGV[1]`).Do(c, "run"))
		step.Ok("a script", err)
		step.Equal("a script", got, "run")
	})
}
