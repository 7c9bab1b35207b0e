"""The scenario with redis-py. Version 4 speaks RESP2 only. The line protocol is that of step/step.go."""
import queue
import sys
import threading
import time

import redis

HOST, PORT, PROTOCOL = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
BOUND = 10  # seconds; what should take milliseconds has not happened when they are over
SOURCE = "redis.call('SET', KEYS[1], ARGV[1]); return {KEYS[1], ARGV[1], 42}"


def client():
    return redis.Redis(HOST, PORT, decode_responses=True, client_name="scenario", socket_timeout=BOUND)


def equal(what, got, want):
    if got != want:
        raise AssertionError(f"{what}: got {got!r}, want {want!r}")


def refused(what, error, call, *args, **kwargs):
    try:
        got = call(*args, **kwargs)
    except error:
        return
    raise AssertionError(f"{what}: got {got!r}, want {error.__name__}")


def until(what, done):
    end = time.monotonic() + BOUND
    while not done():
        if time.monotonic() > end:
            raise AssertionError(f"it never happened: {what}")
        time.sleep(0.005)


def restart():
    print("restart", flush=True)
    equal("the restart", sys.stdin.readline(), "done\n")


def info(c):
    got = c.execute_command("CLIENT", "INFO")
    text = str(got)
    # redis-py turns the line into a dictionary if it knows the command, and leaves a text otherwise.
    for part in (f"resp={PROTOCOL}", "name=scenario"):
        key, value = part.split("=")
        if isinstance(got, dict):
            equal(f"CLIENT INFO {key}", got.get(key), value)
        elif part not in text:
            raise AssertionError(f"CLIENT INFO: {text!r} lacks {part}")


def connect():
    c = client()
    equal("PING", c.ping(), True)
    info(c)
    value = b"\0\r\n\xff $5"
    equal("SET", c.set("bytes", value, ex=3600), True)
    equal("GET", redis.Redis(HOST, PORT).get("bytes"), value)
    ttl = c.ttl("bytes")
    equal(f"TTL {ttl}", 3540 <= ttl <= 3600, True)
    equal("GET of nothing", c.get("nothing"), None)
    refused("LPUSH to a string", redis.ResponseError, c.lpush, "bytes", "x")
    c.hset("hash", mapping={"a": "1", "b": "2"})
    equal("HGETALL", c.hgetall("hash"), {"a": "1", "b": "2"})


def pipeline():
    p = client().pipeline(transaction=False)
    for i in range(101):
        if i == 50:
            p.lpush("n", "x")
        else:
            p.incr("n")
    got = p.execute(raise_on_error=False)
    wrong = got.pop(50)
    equal(f"LPUSH {wrong}", str(wrong).startswith("WRONGTYPE "), True)
    equal("INCR", got, list(range(1, 101)))


def transaction():
    c, other = client(), client()
    with c.pipeline() as p:
        p.watch("tx")
        equal("GET", p.get("tx"), None)
        p.multi()
        p.set("tx", "41").incr("tx").rpush("tx:list", "a", "b")
        equal("EXEC", p.execute(), [True, 42, 2])
    equal("GET after EXEC", c.get("tx"), "42")

    with c.pipeline() as p:
        p.watch("tx")
        equal("SET by another connection", other.set("tx", "7"), True)
        p.multi()
        p.set("tx", "8")
        refused("EXEC after a watched key changed", redis.WatchError, p.execute)
    equal("GET after the aborted EXEC", c.get("tx"), "7")

    got = c.pipeline().lpush("tx", "x").set("tx", "9").execute(raise_on_error=False)
    equal(f"EXEC with an error inside {got}", (str(got[0]).split()[0], got[1]), ("WRONGTYPE", True))
    equal("GET", c.get("tx"), "9")

    one = redis.Redis(HOST, PORT, decode_responses=True, single_connection_client=True)
    one.execute_command("MULTI")
    equal("SET", one.connection.send_command("SET", "tx", "10") or one.connection.read_response(), "QUEUED")
    one.execute_command("DISCARD")
    equal("GET after DISCARD", one.get("tx"), "9")


def pubsub():
    c = client()
    # One connection alone, so that it is the one that is used afterwards.
    pool = redis.ConnectionPool(host=HOST, port=PORT, decode_responses=True, max_connections=1)
    one = redis.Redis(connection_pool=pool)
    p = one.pubsub()

    def message():
        end = time.monotonic() + BOUND
        while time.monotonic() < end:
            m = p.get_message(timeout=BOUND)
            if m:
                return m
        raise AssertionError("no message came")

    p.subscribe("news")
    equal("SUBSCRIBE", message(), {"type": "subscribe", "pattern": None, "channel": "news", "data": 1})
    p.psubscribe("wea*")
    equal("PSUBSCRIBE", message(), {"type": "psubscribe", "pattern": None, "channel": "wea*", "data": 2})
    equal("PUBLISH", c.publish("news", "glad tidings"), 1)
    equal("the message", message(), {"type": "message", "pattern": None, "channel": "news", "data": "glad tidings"})
    equal("PUBLISH", c.publish("weather", "rain"), 1)
    equal("the message", message(), {"type": "pmessage", "pattern": "wea*", "channel": "weather", "data": "rain"})
    p.ping("still")
    equal("PING while subscribed", message()["data"], "still")
    p.unsubscribe()
    equal("UNSUBSCRIBE", message(), {"type": "unsubscribe", "pattern": None, "channel": "news", "data": 1})
    p.punsubscribe()
    equal("PUNSUBSCRIBE", message(), {"type": "punsubscribe", "pattern": None, "channel": "wea*", "data": 0})
    equal("PUBSUB NUMSUB", c.pubsub_numsub("news"), [("news", 0)])
    connection, p.connection = p.connection, None
    for command, want in ((("SET", "after:pubsub", "yes"), "OK"), (("GET", "after:pubsub"), "yes")):
        connection.send_command(*command)
        equal(f"{command[0]} afterwards", connection.read_response(), want)


def blocking():
    c, other = client(), client()
    popped = queue.Queue()
    thread = threading.Thread(target=lambda: popped.put(c.blpop(["empty", "queue"], BOUND - 1)), daemon=True)
    thread.start()
    until("a client is blocked", lambda: other.info("clients")["blocked_clients"] == 1)
    equal("RPUSH", other.rpush("queue", "first", "second"), 2)
    equal("BLPOP", popped.get(timeout=BOUND), ("queue", "first"))
    thread.join()
    start = time.monotonic()
    equal("BLPOP of nothing", c.blpop("empty", 0.2), None)
    equal("BLPOP waited", time.monotonic() - start >= 0.15, True)


def script():
    c = client()
    equal("EVAL", c.eval(SOURCE, 1, "scripted", "one"), ["scripted", "one", 42])
    equal("GET after EVAL", c.get("scripted"), "one")
    remember = c.register_script(SOURCE)
    c.script_flush()
    refused("EVALSHA of an unknown script", redis.exceptions.NoScriptError, c.evalsha, remember.sha, 1, "scripted", "two")
    equal("the script", remember(["scripted"], ["two"]), ["scripted", "two", 42])  # EVALSHA, SCRIPT LOAD, EVALSHA
    equal("GET after EVALSHA", c.get("scripted"), "two")
    c.script_flush()
    equal("SCRIPT EXISTS", c.script_exists(remember.sha), [False])
    equal("SCRIPT LOAD", c.script_load(SOURCE), remember.sha)
    equal("SCRIPT EXISTS", c.script_exists(remember.sha), [True])
    equal("EVALSHA", c.evalsha(remember.sha, 1, "scripted", "three"), ["scripted", "three", 42])
    equal("GET after EVALSHA", c.get("scripted"), "three")
    # A pipeline loads the scripts that it needs before it sends anything.
    c.script_flush()
    p = c.pipeline(transaction=False)
    remember(["scripted"], ["four"], client=p)
    equal("the script in a pipeline", p.execute(), [["scripted", "four", 42]])
    equal("GET after EVALSHA", c.get("scripted"), "four")


def reconnect():
    c = client()
    p = c.pubsub(ignore_subscribe_messages=False)
    p.subscribe("again")
    equal("SUBSCRIBE", p.get_message(timeout=BOUND)["type"], "subscribe")
    equal("SET", c.set("kept", "value before"), True)
    restart()
    equal("SET after the restart", c.set("kept", "value after"), True)
    equal("GET after the restart", c.get("kept"), "value after")
    info(c)
    equal("a script", c.register_script("return ARGV[1]")(args=["run"]), "run")

    def again():
        try:
            m = p.get_message(timeout=0.01)  # subscribes again when it sees the broken connection
        except redis.ConnectionError:
            return False
        return bool(m) and m["type"] == "message" or c.publish("again", "hello") == 1

    until("it is subscribed again", again)


code = 0
for step in (connect, pipeline, transaction, pubsub, blocking, script, reconnect):
    try:
        step()
        print("ok", step.__name__, flush=True)
    except Exception as err:  # whatever it is, the other steps run
        why = f"{type(err).__name__}: {err}".replace("\r", " ").replace("\n", " ")
        print(f"failed {step.__name__}: {why} (line {err.__traceback__.tb_next.tb_lineno})", flush=True)
        code = 1
sys.exit(code)
