// The scenario with go-redis.
package main

import (
	"context"
	"errors"
	"strings"
	"time"

	"cacheproxy/test/clients/step"

	"github.com/redis/go-redis/v9"
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

func client() *redis.Client {
	return redis.NewClient(&redis.Options{Addr: step.Addr(), Protocol: step.Protocol, ClientName: "scenario"})
}

func info(ctx context.Context, rdb *redis.Client) {
	got, err := rdb.ClientInfo(ctx).Result()
	step.Ok("CLIENT INFO", err)
	step.Equal("the name", got.Name, "scenario")
	step.Equal("the protocol", got.Resp, step.Protocol)
}

func connect(ctx context.Context) {
	rdb := client()
	defer rdb.Close()
	pong, err := rdb.Ping(ctx).Result()
	step.Ok("PING", err)
	step.Equal("PING", pong, "PONG")
	info(ctx, rdb)

	const bytes = "\x00\r\n\xff $5"
	step.Ok("SET", rdb.Set(ctx, "bytes", bytes, time.Hour).Err())
	got, err := rdb.Get(ctx, "bytes").Result()
	step.Ok("GET", err)
	step.Equal("GET", got, bytes)
	ttl, err := rdb.TTL(ctx, "bytes").Result()
	step.Ok("TTL", err)
	if ttl < 59*time.Minute || ttl > time.Hour {
		step.Fail("TTL: %v", ttl)
	}
	step.Equal("GET of nothing", rdb.Get(ctx, "nothing").Err(), redis.Nil)
	step.Refused("LPUSH to a string", rdb.LPush(ctx, "bytes", "x").Err(), "WRONGTYPE")
	step.Ok("HSET", rdb.HSet(ctx, "hash", "a", "1", "b", "2").Err())
	hash, err := rdb.HGetAll(ctx, "hash").Result()
	step.Ok("HGETALL", err)
	step.Equal("HGETALL", hash, map[string]string{"a": "1", "b": "2"})
	step.Ok("ZADD", rdb.ZAdd(ctx, "zset", redis.Z{Score: 1.5, Member: "m"}).Err())
	score, err := rdb.Do(ctx, "ZSCORE", "zset", "m").Result()
	step.Ok("ZSCORE", err)
	if step.Protocol == 3 {
		step.Equal("ZSCORE", score, 1.5)
	} else {
		step.Equal("ZSCORE", score, "1.5")
	}
}

func pipeline(ctx context.Context) {
	rdb := client()
	defer rdb.Close()
	var wrong *redis.IntCmd
	cmds, err := rdb.Pipelined(ctx, func(p redis.Pipeliner) error {
		for range 50 {
			p.Incr(ctx, "n")
		}
		wrong = p.LPush(ctx, "n", "x")
		for range 50 {
			p.Incr(ctx, "n")
		}
		return nil
	})
	step.Refused("the pipeline", err, "WRONGTYPE")
	step.Refused("the wrong command", wrong.Err(), "WRONGTYPE")
	want := int64(0)
	for i, cmd := range cmds {
		if i == 50 {
			continue
		}
		want++
		step.Ok("INCR", cmd.Err())
		step.Equal("INCR", cmd.(*redis.IntCmd).Val(), want)
	}
}

func transaction(ctx context.Context) {
	rdb := client()
	defer rdb.Close()
	var incr *redis.IntCmd
	step.Ok("WATCH and EXEC", rdb.Watch(ctx, func(tx *redis.Tx) error {
		step.Equal("GET", tx.Get(ctx, "tx").Err(), redis.Nil)
		_, err := tx.TxPipelined(ctx, func(p redis.Pipeliner) error {
			p.Set(ctx, "tx", "41", 0)
			incr = p.Incr(ctx, "tx")
			p.RPush(ctx, "tx:list", "a", "b")
			return nil
		})
		return err
	}, "tx"))
	step.Equal("INCR in MULTI", incr.Val(), int64(42))
	step.Equal("GET after EXEC", rdb.Get(ctx, "tx").Val(), "42")

	err := rdb.Watch(ctx, func(tx *redis.Tx) error {
		step.Ok("SET by another connection", rdb.Set(ctx, "tx", "7", 0).Err())
		_, err := tx.TxPipelined(ctx, func(p redis.Pipeliner) error { return p.Set(ctx, "tx", "8", 0).Err() })
		return err
	}, "tx")
	step.Equal("EXEC after a watched key changed", err, redis.TxFailedErr)
	step.Equal("GET after the aborted EXEC", rdb.Get(ctx, "tx").Val(), "7")

	cmds, err := rdb.TxPipelined(ctx, func(p redis.Pipeliner) error {
		p.LPush(ctx, "tx", "x")
		p.Set(ctx, "tx", "9", 0)
		return nil
	})
	step.Refused("EXEC with an error inside", err, "WRONGTYPE")
	step.Refused("LPUSH in MULTI", cmds[0].Err(), "WRONGTYPE")
	step.Ok("SET in MULTI", cmds[1].Err())
	step.Equal("GET", rdb.Get(ctx, "tx").Val(), "9")

	conn := rdb.Conn()
	defer conn.Close()
	for _, args := range [][]any{{"MULTI"}, {"SET", "tx", "10"}, {"DISCARD"}} {
		step.Ok(args[0].(string), conn.Do(ctx, args...).Err())
	}
	step.Equal("GET after DISCARD", conn.Get(ctx, "tx").Val(), "9")
}

func pubsub(ctx context.Context) {
	rdb := client()
	defer rdb.Close()
	sub := rdb.Subscribe(ctx, "news")
	defer sub.Close()
	step.Ok("PSUBSCRIBE", sub.PSubscribe(ctx, "wea*"))
	for i, want := range []string{"news", "wea*"} {
		m, err := sub.Receive(ctx)
		step.Ok("the confirmation", err)
		s, ok := m.(*redis.Subscription)
		step.Equal("is a subscription", ok, true)
		step.Equal("the channel", s.Channel, want)
		step.Equal("the count", s.Count, i+1)
	}
	for _, m := range []redis.Message{{Channel: "news", Payload: "glad tidings"}, {Channel: "weather", Pattern: "wea*", Payload: "rain"}} {
		n, err := rdb.Publish(ctx, m.Channel, m.Payload).Result()
		step.Ok("PUBLISH", err)
		step.Equal("PUBLISH", n, int64(1))
		got, err := sub.ReceiveMessage(ctx)
		step.Ok("the message", err)
		step.Equal("the message", *got, m)
	}
	step.Ok("UNSUBSCRIBE", sub.Unsubscribe(ctx, "news"))
	step.Ok("PUNSUBSCRIBE", sub.PUnsubscribe(ctx, "wea*"))
	for range 2 {
		m, err := sub.Receive(ctx)
		step.Ok("the confirmation", err)
		step.Contains("the kind", m.(*redis.Subscription).Kind, "unsubscribe")
	}
	step.Equal("PUBSUB NUMSUB", rdb.PubSubNumSub(ctx, "news").Val(), map[string]int64{"news": 0})
	step.Equal("PUBSUB NUMPAT", rdb.PubSubNumPat(ctx).Val(), int64(0))
	// go-redis keeps this connection for subscriptions: PING is what can be sent over it.
	step.Ok("PING afterwards", sub.Ping(ctx, "still"))
	pong, err := sub.Receive(ctx)
	step.Ok("PONG afterwards", err)
	step.Equal("PONG afterwards", pong.(*redis.Pong).Payload, "still")
}

func blocking(ctx context.Context) {
	rdb := client()
	defer rdb.Close()
	other := client()
	defer other.Close()
	type popped struct {
		got []string
		err error
	}
	ch := make(chan popped, 1)
	go func() {
		got, err := rdb.BLPop(ctx, step.Bound, "empty", "queue").Result()
		ch <- popped{got, err}
	}()
	step.Until(ctx, "a client is blocked", func() bool {
		return strings.Contains(other.Info(ctx, "clients").Val(), "blocked_clients:1\r")
	})
	step.Ok("RPUSH", other.RPush(ctx, "queue", "first", "second").Err())
	p := step.Receive(ctx, "BLPOP", ch)
	step.Ok("BLPOP", p.err)
	step.Equal("BLPOP", p.got, []string{"queue", "first"})

	start := time.Now()
	step.Equal("BLPOP of nothing", rdb.BLPop(ctx, time.Second, "empty").Err(), redis.Nil)
	if took := time.Since(start); took < 900*time.Millisecond {
		step.Fail("BLPOP timed out after %v", took)
	}
}

const source = `redis.call('SET', KEYS[1], ARGV[1]); return {KEYS[1], ARGV[1], 42}`

func script(ctx context.Context) {
	rdb := client()
	defer rdb.Close()
	want := []any{"scripted", "one", int64(42)}
	got, err := rdb.Eval(ctx, source, []string{"scripted"}, "one").Result()
	step.Ok("EVAL", err)
	step.Equal("EVAL", got, want)
	step.Equal("GET after EVAL", rdb.Get(ctx, "scripted").Val(), "one")

	step.Ok("SCRIPT FLUSH", rdb.ScriptFlush(ctx).Err())
	s := redis.NewScript(source)
	step.Refused("EVALSHA of an unknown script", s.EvalSha(ctx, rdb, []string{"scripted"}, "two").Err(), "NOSCRIPT")
	got, err = s.Run(ctx, rdb, []string{"scripted"}, "two").Result() // EVALSHA, then EVAL
	step.Ok("Script.Run", err)
	step.Equal("Script.Run", got, []any{"scripted", "two", int64(42)})
	step.Equal("GET after EVALSHA", rdb.Get(ctx, "scripted").Val(), "two")

	step.Ok("SCRIPT FLUSH", rdb.ScriptFlush(ctx).Err())
	sha, err := s.Load(ctx, rdb).Result()
	step.Ok("SCRIPT LOAD", err)
	step.Equal("SCRIPT LOAD", sha, s.Hash())
	exists, err := s.Exists(ctx, rdb).Result()
	step.Ok("SCRIPT EXISTS", err)
	step.Equal("SCRIPT EXISTS", exists, []bool{true})
	step.Ok("EVALSHA", s.EvalSha(ctx, rdb, []string{"scripted"}, "three").Err())
	step.Equal("GET after EVALSHA", rdb.Get(ctx, "scripted").Val(), "three")
	step.Refused("EVAL with an error", rdb.Eval(ctx, `return redis.error_reply('MINE it is')`, nil).Err(), "MINE")
}

func reconnect(ctx context.Context) {
	rdb := client()
	defer rdb.Close()
	sub := rdb.Subscribe(ctx, "again")
	defer sub.Close()
	_, err := sub.Receive(ctx)
	step.Ok("SUBSCRIBE", err)
	messages := sub.Channel()
	step.Ok("SET", rdb.Set(ctx, "kept", "value before", 0).Err())
	step.Restart()
	step.Ok("SET after the restart", rdb.Set(ctx, "kept", "value after", 0).Err())
	got, err := rdb.Get(ctx, "kept").Result()
	step.Ok("GET", err)
	step.Equal("GET", got, "value after")
	info(ctx, rdb)
	got, err = redis.NewScript(`return ARGV[1]`).Run(ctx, rdb, nil, "run").Text()
	step.Ok("a script", err)
	step.Equal("a script", got, "run")
	step.Until(ctx, "it is subscribed again", func() bool {
		n, err := rdb.Publish(ctx, "again", "hello").Result()
		if err != nil && !errors.Is(err, context.DeadlineExceeded) {
			step.Fail("PUBLISH: %v", err)
		}
		return n == 1
	})
	step.Equal("the message", step.Receive(ctx, "the message", messages).Payload, "hello")
}
