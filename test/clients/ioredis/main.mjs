// The scenario with ioredis. It speaks RESP2 only.
import Redis from 'ioredis';
import { Inbox, assert, host, port, protocol, restart, run, until, within } from '../step/step.mjs';

/** Runs do with as many clients as it takes, and ends them. */
const using = (n, act) => async () => {
  const clients = Array.from({ length: n }, () => new Redis({ host, port, connectionName: 'scenario' }));
  // Without a listener ioredis prints what it is about to repair; what it cannot repair fails a command.
  for (const c of clients) c.on('error', () => {});
  try { await act(...clients); } finally { for (const c of clients) c.disconnect(); }
};

async function info(c) {
  const got = await c.client('INFO');
  assert.ok(got.includes(` resp=${protocol}`), `CLIENT INFO: ${got}`);
  assert.ok(got.includes(' name=scenario '), `CLIENT INFO: ${got}`);
}

const source = "redis.call('SET', KEYS[1], ARGV[1]); return {KEYS[1], ARGV[1], 42}";

await run({
  connect: using(1, async (c) => {
    assert.equal(await c.ping(), 'PONG');
    await info(c);
    const bytes = Buffer.from('\0\r\n\xff $5', 'latin1');
    assert.equal(await c.set('bytes', bytes, 'EX', 3600), 'OK');
    assert.deepEqual(await c.getBuffer('bytes'), bytes);
    const ttl = await c.ttl('bytes');
    assert.ok(ttl >= 3540 && ttl <= 3600, `TTL: ${ttl}`);
    assert.equal(await c.get('nothing'), null);
    await assert.rejects(c.lpush('bytes', 'x'), /^ReplyError: WRONGTYPE /);
    await c.hset('hash', { a: '1', b: '2' });
    assert.deepEqual(await c.hgetall('hash'), { a: '1', b: '2' });
  }),

  pipeline: using(1, async (c) => {
    const p = c.pipeline();
    for (let i = 0; i < 101; i++) i === 50 ? p.lpush('n', 'x') : p.incr('n');
    const replies = await p.exec();
    assert.match(String(replies[50][0]), /^ReplyError: WRONGTYPE /);
    replies.splice(50, 1);
    assert.deepEqual(replies, Array.from({ length: 100 }, (_, i) => [null, i + 1]));
  }),

  transaction: using(2, async (c, other) => {
    assert.equal(await c.watch('tx'), 'OK');
    assert.equal(await c.get('tx'), null);
    assert.deepEqual(await c.multi().set('tx', '41').incr('tx').rpush('tx:list', 'a', 'b').exec(), [[null, 'OK'], [null, 42], [null, 2]]);
    assert.equal(await c.get('tx'), '42');

    await c.watch('tx');
    assert.equal(await other.set('tx', '7'), 'OK');
    assert.equal(await c.multi().set('tx', '8').exec(), null, 'EXEC after a watched key changed');
    assert.equal(await c.get('tx'), '7');

    const replies = await c.multi().lpush('tx', 'x').set('tx', '9').exec();
    assert.match(String(replies[0][0]), /^ReplyError: WRONGTYPE /);
    assert.deepEqual(replies[1], [null, 'OK']);
    assert.equal(await c.get('tx'), '9');

    assert.equal(await c.multi({ pipeline: false }), 'OK');
    assert.equal(await c.set('tx', '10'), 'QUEUED');
    assert.equal(await c.discard(), 'OK');
    assert.equal(await c.get('tx'), '9', 'GET after DISCARD');
  }),

  pubsub: using(2, async (c, other) => {
    const inbox = new Inbox();
    c.on('message', (...m) => inbox.push(['', ...m]));
    c.on('pmessage', (...m) => inbox.push(m));
    assert.equal(await c.subscribe('news'), 1);
    assert.equal(await c.psubscribe('wea*'), 2);
    for (const m of [['', 'news', 'glad tidings'], ['wea*', 'weather', 'rain']]) {
      assert.equal(await other.publish(m[1], m[2]), 1);
      assert.deepEqual(await inbox.next('the message'), m);
    }
    assert.equal(await c.unsubscribe('news'), 1);
    assert.equal(await c.punsubscribe('wea*'), 0);
    assert.deepEqual(await other.pubsub('NUMSUB', 'news'), ['news', 0]);
    assert.equal(await c.set('after:pubsub', 'yes'), 'OK');
    assert.equal(await c.get('after:pubsub'), 'yes');
  }),

  blocking: using(2, async (c, other) => {
    const popped = c.blpop('empty', 'queue', 0);
    await until('a client is blocked', async () => (await other.info('clients')).includes('blocked_clients:1\r'));
    assert.equal(await other.rpush('queue', 'first', 'second'), 2);
    assert.deepEqual(await within(popped, 'BLPOP'), ['queue', 'first']);
    const start = Date.now();
    assert.equal(await c.blpop('empty', 0.2), null);
    assert.ok(Date.now() - start >= 150, 'BLPOP timed out too early');
  }),

  script: using(1, async (c) => {
    assert.deepEqual(await c.eval(source, 1, 'scripted', 'one'), ['scripted', 'one', 42]);
    assert.equal(await c.get('scripted'), 'one');
    const sha = await c.script('LOAD', source);
    await c.script('FLUSH');
    await assert.rejects(c.evalsha(sha, 1, 'scripted', 'two'), /^ReplyError: NOSCRIPT /);
    c.defineCommand('remember', { numberOfKeys: 1, lua: source }); // EVALSHA, then EVAL
    assert.deepEqual(await c.remember('scripted', 'two'), ['scripted', 'two', 42]);
    assert.equal(await c.get('scripted'), 'two');
    await c.script('FLUSH');
    assert.equal(await c.script('LOAD', source), sha);
    assert.deepEqual(await c.evalsha(sha, 1, 'scripted', 'three'), ['scripted', 'three', 42]);
    assert.equal(await c.get('scripted'), 'three');
  }),

  reconnect: using(2, async (c, subscriber) => {
    const inbox = new Inbox();
    subscriber.on('message', (_, m) => inbox.push(m));
    await subscriber.subscribe('again');
    assert.equal(await c.set('kept', 'value before'), 'OK');
    await restart();
    assert.equal(await c.set('kept', 'value after'), 'OK');
    assert.equal(await c.get('kept'), 'value after');
    await info(c);
    c.defineCommand('echoes', { numberOfKeys: 0, lua: 'return ARGV[1]' });
    assert.equal(await c.echoes('run'), 'run');
    await until('it is subscribed again', async () => (await c.publish('again', 'hello')) === 1);
    assert.equal(await inbox.next('the message'), 'hello');
  }),
});
