<?php
// The scenario with phpredis. It speaks RESP2 only.
require __DIR__ . '/../step/step.php';

function client(): Redis
{
    global $host, $port;
    $c = new Redis();
    $c->connect($host, $port, BOUND, null, 0, BOUND);
    $c->client('setname', 'scenario');
    return $c;
}

// A wrong command is false, and its words are kept until they are cleared.
function refused(string $what, Redis $c, $got, string $code): void
{
    equal($what, $got, false);
    contains($what, (string) $c->getLastError(), "$code ");
    $c->clearLastError();
}

function info(Redis $c): void
{
    contains('CLIENT INFO', $c->rawCommand('CLIENT', 'INFO'), ' resp=2');
    contains('CLIENT INFO', $c->rawCommand('CLIENT', 'INFO'), ' name=scenario ');
}

const SOURCE = "redis.call('SET', KEYS[1], ARGV[1]); return {KEYS[1], ARGV[1], 42}";

play([
    'publish' => function () {
        $c = client();
        until('both are subscribed', fn () => $c->pubsub('numsub', ['news', 'tidings']) === ['news' => 1, 'tidings' => 1]);
        equal('PUBLISH', $c->publish('news', 'glad tidings'), 1);
        until('the pattern is subscribed', fn () => $c->pubsub('numpat') === 1);
        equal('PUBLISH', $c->publish('weather', 'rain'), 1);
    },
    'push' => function () {
        $c = client();
        until('a client is blocked', fn () => (int) $c->info('clients')['blocked_clients'] === 1);
        equal('RPUSH', $c->rPush('queue', 'first', 'second'), 2);
    },
]);

run([
    'connect' => function () {
        $c = client();
        equal('PING', $c->ping(), true);
        equal('PING', $c->ping('here'), 'here');
        info($c);
        $bytes = "\0\r\n\xff $5";
        equal('SET', $c->set('bytes', $bytes, ['ex' => 3600]), true);
        equal('GET', $c->get('bytes'), $bytes);
        $ttl = $c->ttl('bytes');
        equal("TTL $ttl", $ttl >= 3540 && $ttl <= 3600, true);
        equal('GET of nothing', $c->get('nothing'), false);
        equal('no error', $c->getLastError(), null);
        refused('LPUSH to a string', $c, $c->lPush('bytes', 'x'), 'WRONGTYPE');
        $c->hMSet('hash', ['a' => '1', 'b' => '2']);
        equal('HGETALL', $c->hGetAll('hash'), ['a' => '1', 'b' => '2']);
    },

    'pipeline' => function () {
        $c = client();
        $p = $c->pipeline();
        for ($i = 0; $i < 101; $i++) {
            $i === 50 ? $p->lPush('n', 'x') : $p->incr('n');
        }
        $got = $p->exec();
        refused('LPUSH', $c, $got[50], 'WRONGTYPE');
        unset($got[50]);
        equal('INCR', array_values($got), range(1, 100));
    },

    'transaction' => function () {
        [$c, $other] = [client(), client()];
        equal('WATCH', $c->watch('tx'), true);
        equal('GET', $c->get('tx'), false);
        $got = $c->multi()->set('tx', '41')->incr('tx')->rPush('tx:list', 'a', 'b')->exec();
        equal('EXEC', $got, [true, 42, 2]);
        equal('GET after EXEC', $c->get('tx'), '42');

        $c->watch('tx');
        equal('SET by another connection', $other->set('tx', '7'), true);
        equal('EXEC after a watched key changed', $c->multi()->set('tx', '8')->exec(), false);
        equal('GET after the aborted EXEC', $c->get('tx'), '7');

        $got = $c->multi()->lPush('tx', 'x')->set('tx', '9')->exec();
        equal('EXEC with an error inside', $got, [false, true]);
        equal('GET', $c->get('tx'), '9');

        $c->multi()->set('tx', '10');
        equal('DISCARD', $c->discard(), true);
        equal('GET after DISCARD', $c->get('tx'), '9');
    },

    'pubsub' => function () {
        $c = client();
        $published = other('publish');
        // phpredis 5 goes on listening when nothing is subscribed any more: what ends it is that the connection closes. It makes
        // another one for the next command.
        $listen = function (string $how, array $to) use ($c): array {
            $got = [];
            try {
                $c->$how($to, function ($c, ...$message) use (&$got, $how, $to) {
                    $got[] = [$message, $how === 'subscribe' ? $c->unsubscribe($to) : $c->punsubscribe($to)];
                    $c->close();
                });
            } catch (RedisException $e) {
                equal('the end of the subscription', $e->getMessage(), 'Connection closed');
            }
            return $got;
        };
        equal('the message', $listen('subscribe', ['news', 'tidings']), [[['news', 'glad tidings'], ['news' => true, 'tidings' => true]]]);
        equal('SET afterwards', $c->set('after:pubsub', 'yes'), true);
        equal('the message', $listen('psubscribe', ['wea*']), [[['wea*', 'weather', 'rain'], ['wea*' => true]]]);
        $published();
        equal('PUBSUB NUMSUB', $c->pubsub('numsub', ['news']), ['news' => 0]);
        equal('GET afterwards', $c->get('after:pubsub'), 'yes');
    },

    'blocking' => function () {
        $c = client();
        $pushed = other('push');
        equal('BLPOP', $c->blPop(['empty', 'queue'], 0), ['queue', 'first']);
        $pushed();
        $start = microtime(true);
        equal('BLPOP of nothing', $c->blPop(['empty'], 1), []);
        equal('BLPOP waited', microtime(true) - $start > 0.9, true);
    },

    'script' => function () {
        $c = client();
        equal('EVAL', $c->eval(SOURCE, ['scripted', 'one'], 1), ['scripted', 'one', 42]);
        equal('GET after EVAL', $c->get('scripted'), 'one');
        $sha = sha1(SOURCE);
        $c->script('flush');
        refused('EVALSHA of an unknown script', $c, $c->evalSha($sha, ['scripted', 'two'], 1), 'NOSCRIPT');
        equal('SCRIPT EXISTS', $c->script('exists', $sha), [0]);
        equal('SCRIPT LOAD', $c->script('load', SOURCE), $sha);
        equal('SCRIPT EXISTS', $c->script('exists', $sha), [1]);
        equal('EVALSHA', $c->evalSha($sha, ['scripted', 'two'], 1), ['scripted', 'two', 42]);
        equal('GET after EVALSHA', $c->get('scripted'), 'two');
    },

    'reconnect' => function () {
        $c = client();
        equal('SET', $c->set('kept', 'value before'), true);
        restart();
        // phpredis looks at the connection before it sends, and makes a new one.
        equal('SET after the restart', $c->set('kept', 'value after'), true);
        equal('GET after the restart', $c->get('kept'), 'value after');
        equal('a script', $c->eval('return ARGV[1]', ['run'], 0), 'run');
    },
]);
