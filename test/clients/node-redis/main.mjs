// The scenario with node-redis.
import { BasicClientSideCache, ErrorReply, RESP_TYPES, WatchError, createClient } from 'redis';
import { Inbox, assert, host, port, protocol, restart, run, until, within } from '../step/step.mjs';

/** Runs act with as many clients as it takes, and ends them. */
const using = (n, act, options = {}) => async () => {
  const clients = Array.from({ length: n }, () => createClient({ socket: { host, port }, RESP: protocol, name: 'scenario', ...options }));
  for (const c of clients) c.on('error', () => {}); // which it is about to repair
  await Promise.all(clients.map((c) => within(c.connect(), 'a client connects')));
  try { await act(...clients); } finally { for (const c of clients) c.destroy(); }
};

async function info(c) {
  const got = await c.sendCommand(['CLIENT', 'INFO']);
  assert.ok(got.includes(` resp=${protocol}`), `CLIENT INFO: ${got}`);
  assert.ok(got.includes(' name=scenario '), `CLIENT INFO: ${got}`);
}

const refused = (code) => (err) => err instanceof ErrorReply && err.message.startsWith(`${code} `);
const source = "redis.call('SET', KEYS[1], ARGV[1]); return {KEYS[1], ARGV[1], 42}";
const args = (v) => ({ keys: ['scripted'], arguments: [v] });

const steps = {
  connect: using(1, async (c) => {
    assert.equal(await c.ping(), 'PONG');
    await info(c);
    const bytes = Buffer.from('\0\r\n\xff $5', 'latin1');
    assert.equal(await c.set('bytes', bytes, { expiration: { type: 'EX', value: 3600 } }), 'OK');
    assert.deepEqual(await c.withTypeMapping({ [RESP_TYPES.BLOB_STRING]: Buffer }).get('bytes'), bytes);
    const ttl = await c.ttl('bytes');
    assert.ok(ttl >= 3540 && ttl <= 3600, `TTL: ${ttl}`);
    assert.equal(await c.get('nothing'), null);
    await assert.rejects(c.lPush('bytes', 'x'), refused('WRONGTYPE'));
    await c.hSet('hash', { a: '1', b: '2' });
    assert.deepEqual({ ...(await c.hGetAll('hash')) }, { a: '1', b: '2' });
    await c.zAdd('zset', { score: 1.5, value: 'm' });
    assert.equal(await c.sendCommand(['ZSCORE', 'zset', 'm']), protocol === 3 ? 1.5 : '1.5');
  }),

  pipeline: using(1, async (c) => {
    // Commands of one tick go out together.
    const replies = await Promise.allSettled(Array.from({ length: 101 }, (_, i) => i === 50 ? c.lPush('n', 'x') : c.incr('n')));
    assert.ok(refused('WRONGTYPE')(replies[50].reason), String(replies[50].reason));
    replies.splice(50, 1);
    assert.deepEqual(replies.map((r) => r.value), Array.from({ length: 100 }, (_, i) => i + 1));
    assert.deepEqual(await c.multi().incr('n').incr('n').execAsPipeline(), [101, 102]);
  }),

  transaction: using(2, async (c, other) => {
    assert.equal(await c.watch('tx'), 'OK');
    assert.equal(await c.get('tx'), null);
    assert.deepEqual(await c.multi().set('tx', '41').incr('tx').rPush('tx:list', ['a', 'b']).exec(), ['OK', 42, 2]);
    assert.equal(await c.get('tx'), '42');

    await c.watch('tx');
    assert.equal(await other.set('tx', '7'), 'OK');
    await assert.rejects(c.multi().set('tx', '8').exec(), WatchError);
    assert.equal(await c.get('tx'), '7');

    await assert.rejects(c.multi().lPush('tx', 'x').set('tx', '9').exec(), (err) => {
      assert.ok(refused('WRONGTYPE')(err.replies?.[0]), `EXEC with an error inside: ${err}`);
      assert.equal(err.replies[1], 'OK');
      return true;
    });
    assert.equal(await c.get('tx'), '9');

    await c.sendCommand(['MULTI']);
    assert.equal(await c.sendCommand(['SET', 'tx', '10']), 'QUEUED');
    assert.equal(await c.sendCommand(['DISCARD']), 'OK');
    assert.equal(await c.get('tx'), '9', 'GET after DISCARD');
  }),

  pubsub: using(2, async (c, other) => {
    const inbox = new Inbox();
    await c.subscribe('news', (message, channel) => inbox.push(['subscribe', channel, message]));
    await c.pSubscribe('wea*', (message, channel) => inbox.push(['psubscribe', channel, message]));
    for (const m of [['subscribe', 'news', 'glad tidings'], ['psubscribe', 'weather', 'rain']]) {
      assert.equal(await other.publish(m[1], m[2]), 1);
      assert.deepEqual(await inbox.next('the message'), m);
    }
    if (protocol === 3) assert.equal(await c.set('while:pubsub', 'yes'), 'OK');
    await c.unsubscribe('news');
    await c.pUnsubscribe('wea*');
    assert.equal(await other.sendCommand(['PUBSUB', 'NUMPAT']), 0);
    // In RESP2 node-redis 5.9 gives the first replies after a subscription as buffers, also without a proxy.
    assert.equal(String(await c.set('after:pubsub', 'yes')), 'OK');
    assert.equal(String(await c.get('after:pubsub')), 'yes');
  }),

  blocking: using(2, async (c, other) => {
    const popped = c.blPop(['empty', 'queue'], 0);
    await until('a client is blocked', async () => (await other.info('clients')).includes('blocked_clients:1\r'));
    assert.equal(await other.rPush('queue', ['first', 'second']), 2);
    assert.deepEqual({ ...(await within(popped, 'BLPOP')) }, { key: 'queue', element: 'first' });
    const start = Date.now();
    assert.equal(await c.blPop('empty', 0.2), null);
    assert.ok(Date.now() - start >= 150, 'BLPOP timed out too early');
  }),

  script: using(1, async (c) => {
    assert.deepEqual(await c.eval(source, args('one')), ['scripted', 'one', 42]);
    assert.equal(await c.get('scripted'), 'one');
    const sha = await c.scriptLoad(source);
    await c.scriptFlush();
    await assert.rejects(c.evalSha(sha, args('two')), refused('NOSCRIPT'));
    assert.equal(await c.scriptLoad(source), sha);
    assert.deepEqual(await c.scriptExists(sha), [1]);
    assert.deepEqual(await c.evalSha(sha, args('two')), ['scripted', 'two', 42]);
    assert.equal(await c.get('scripted'), 'two');
  }),

  reconnect: using(2, async (c, subscriber) => {
    const inbox = new Inbox();
    await subscriber.subscribe('again', (m) => inbox.push(m));
    assert.equal(await c.set('kept', 'value before'), 'OK');
    await restart();
    // It rejects a command whose reply was under way when the connection broke, and queues those that come after.
    assert.equal(await c.set('kept', 'value after'), 'OK');
    assert.equal(await c.get('kept'), 'value after');
    await info(c);
    assert.equal(await c.eval('return ARGV[1]', { arguments: ['run'] }), 'run');
    await until('it is subscribed again', async () => (await c.publish('again', 'hello')) === 1);
    assert.equal(await inbox.next('the message'), 'hello');
  }),
};

if (protocol === 3) { // tracking is a part of it
  const clientSideCache = new BasicClientSideCache({ ttl: 0, maxEntries: 100, evictPolicy: 'LRU' });
  steps.cache = async () => {
    await using(1, async (other) => {
      await using(1, async (c) => {
        assert.equal(await other.set('cached', 'v0'), 'OK');
        assert.equal(await c.get('cached'), 'v0');
        for (const [want, ...change] of [
          ['v1', 'SET', 'cached', 'v1'],
          ['v1+', 'APPEND', 'cached', '+'],
          ['v3', 'EVAL', "return redis.call('SET', KEYS[1], ARGV[1])", '1', 'cached', 'v3'],
          [null, 'DEL', 'cached'],
        ]) {
          const before = await c.get('cached');
          const { hitCount } = clientSideCache.stats();
          assert.equal(await c.get('cached'), before);
          assert.equal(clientSideCache.stats().hitCount, hitCount + 1, 'a repeated read comes from the cache');
          await other.sendCommand(change);
          await until(`the cached copy is invalidated by ${change[0]}`, async () => {
            const got = await c.get('cached');
            assert.ok(got === before || got === want, `read ${got} after ${change[0]}, want ${want}`);
            return got === want;
          });
        }
      }, { clientSideCache })();
    })();
  };
}

await run(steps);
