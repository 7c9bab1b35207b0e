<?php
// The scenario with predis. It speaks RESP2 only.
require __DIR__ . '/../step/step.php';
require 'Predis/autoload.php'; // on Debian's include path

use Predis\Client;
use Predis\Command\ScriptCommand;
use Predis\Connection\ConnectionException;
use Predis\Response\ServerException;
use Predis\Transaction\AbortedMultiExecException;

function client(): Client
{
    global $host, $port;
    $c = new Client(['host' => $host, 'port' => $port, 'read_write_timeout' => BOUND]);
    $c->client('setname', 'scenario');
    return $c;
}

function ok(string $what, $got): void
{
    equal($what, (string) $got, 'OK');
}

function refused(string $what, string $code, callable $call): void
{
    try {
        $got = $call();
    } catch (ServerException $e) {
        equal($what, $e->getErrorType(), $code);
        return;
    }
    fail("$what: got " . var_export($got, true) . ", want $code");
}

function info(Client $c): void
{
    contains('CLIENT INFO', $c->executeRaw(['CLIENT', 'INFO']), ' resp=2');
    contains('CLIENT INFO', $c->executeRaw(['CLIENT', 'INFO']), ' name=scenario ');
}

const SOURCE = "redis.call('SET', KEYS[1], ARGV[1]); return {KEYS[1], ARGV[1], 42}";

// predis sends EVALSHA for it, and EVAL when the script is unknown.
class Remember extends ScriptCommand
{
    public function getKeysCount()
    {
        return 1;
    }

    public function getScript()
    {
        return SOURCE;
    }
}

play([
    'publish' => function () {
        $c = client();
        until('both are subscribed', fn () => $c->pubsub('numsub', 'news') == ['news' => 1] && $c->pubsub('numpat') === 1);
        equal('PUBLISH', $c->publish('news', 'glad tidings'), 1);
        equal('PUBLISH', $c->publish('weather', 'rain'), 1);
    },
    'push' => function () {
        $c = client();
        until('a client is blocked', fn () => (int) $c->info('clients')['Clients']['blocked_clients'] === 1);
        equal('RPUSH', $c->rpush('queue', ['first', 'second']), 2);
    },
]);

run([
    'connect' => function () {
        $c = client();
        equal('PING', (string) $c->ping(), 'PONG');
        info($c);
        $bytes = "\0\r\n\xff $5";
        ok('SET', $c->set('bytes', $bytes, 'EX', 3600));
        equal('GET', $c->get('bytes'), $bytes);
        $ttl = $c->ttl('bytes');
        equal("TTL $ttl", $ttl >= 3540 && $ttl <= 3600, true);
        equal('GET of nothing', $c->get('nothing'), null);
        refused('LPUSH to a string', 'WRONGTYPE', fn () => $c->lpush('bytes', ['x']));
        ok('HMSET', $c->hmset('hash', ['a' => '1', 'b' => '2']));
        equal('HGETALL', $c->hgetall('hash'), ['a' => '1', 'b' => '2']);
    },

    'pipeline' => function () {
        global $host, $port;
        $c = new Client(['host' => $host, 'port' => $port], ['exceptions' => false]);
        $got = $c->pipeline(function ($p) {
            for ($i = 0; $i < 101; $i++) {
                $i === 50 ? $p->lpush('n', ['x']) : $p->incr('n');
            }
        });
        contains('LPUSH', (string) $got[50]->getMessage(), 'WRONGTYPE ');
        unset($got[50]);
        equal('INCR', array_values($got), range(1, 100));
    },

    'transaction' => function () {
        [$c, $other] = [client(), client()];
        $cas = ['cas' => true, 'watch' => 'tx', 'retry' => 0];
        $got = $c->transaction($cas, function ($tx) {
            equal('GET', $tx->get('tx'), null);
            $tx->multi();
            $tx->set('tx', '41');
            $tx->incr('tx');
            $tx->rpush('tx:list', ['a', 'b']);
        });
        ok('SET in MULTI', $got[0]);
        equal('EXEC', array_slice($got, 1), [42, 2]);
        equal('GET after EXEC', $c->get('tx'), '42');

        $aborted = false;
        try {
            $c->transaction($cas, function ($tx) use ($other) {
                equal('GET', $tx->get('tx'), '42'); // WATCH goes before the first command
                ok('SET by another connection', $other->set('tx', '7'));
                $tx->multi();
                $tx->set('tx', '8');
            });
        } catch (AbortedMultiExecException $e) {
            $aborted = true;
        }
        equal('EXEC after a watched key changed is aborted', $aborted, true);
        equal('GET after the aborted EXEC', $c->get('tx'), '7');

        refused('EXEC with an error inside', 'WRONGTYPE', fn () => $c->transaction(function ($tx) {
            $tx->set('tx', '9');
            $tx->lpush('tx', ['x']);
        }));
        equal('GET', $c->get('tx'), '9');

        ok('MULTI', $c->multi());
        equal('SET', (string) $c->set('tx', '10'), 'QUEUED');
        ok('DISCARD', $c->discard());
        equal('GET after DISCARD', $c->get('tx'), '9');
    },

    'pubsub' => function () {
        $c = client();
        $published = other('publish');
        $loop = $c->pubSubLoop(['subscribe' => 'news', 'psubscribe' => 'wea*']);
        $got = [];
        foreach ($loop as $m) {
            $got[] = implode(' ', array_values((array) $m));
            if (count($got) === 4) {
                $loop->unsubscribe('news');
                $loop->punsubscribe('wea*');
            }
        }
        equal('the messages', $got, [
            'subscribe news 1', 'psubscribe wea* 2', 'message news glad tidings', 'pmessage wea* weather rain',
            'unsubscribe news 1', 'punsubscribe wea* 0',
        ]);
        $published();
        ok('SET afterwards', $c->set('after:pubsub', 'yes'));
        equal('GET afterwards', $c->get('after:pubsub'), 'yes');
    },

    'blocking' => function () {
        $c = client();
        $pushed = other('push');
        equal('BLPOP', $c->blpop(['empty', 'queue'], 0), ['queue', 'first']);
        $pushed();
        $start = microtime(true);
        equal('BLPOP of nothing', $c->blpop(['empty'], 0.2), null);
        equal('BLPOP waited', microtime(true) - $start > 0.15, true);
    },

    'script' => function () {
        $c = client();
        equal('EVAL', $c->eval(SOURCE, 1, 'scripted', 'one'), ['scripted', 'one', 42]);
        equal('GET after EVAL', $c->get('scripted'), 'one');
        $sha = sha1(SOURCE);
        ok('SCRIPT FLUSH', $c->script('flush'));
        refused('EVALSHA of an unknown script', 'NOSCRIPT', fn () => $c->evalsha($sha, 1, 'scripted', 'two'));
        $c->getProfile()->defineCommand('remember', Remember::class);
        equal('the script', $c->remember('scripted', 'two'), ['scripted', 'two', 42]);
        equal('GET after EVALSHA', $c->get('scripted'), 'two');
        ok('SCRIPT FLUSH', $c->script('flush'));
        equal('SCRIPT LOAD', $c->script('load', SOURCE), $sha);
        equal('SCRIPT EXISTS', $c->script('exists', $sha), [1]);
        equal('EVALSHA', $c->evalsha($sha, 1, 'scripted', 'three'), ['scripted', 'three', 42]);
        equal('GET after EVALSHA', $c->get('scripted'), 'three');
    },

    'reconnect' => function () {
        $c = client();
        ok('SET', $c->set('kept', 'value before'));
        restart();
        // predis throws away a broken connection and leaves it to the application to repeat the command.
        try {
            $c->ping();
        } catch (ConnectionException $e) {
        }
        ok('SET after the restart', $c->set('kept', 'value after'));
        equal('GET after the restart', $c->get('kept'), 'value after');
        equal('a script', $c->eval('return ARGV[1]', 0, 'run'), 'run');
    },
]);
