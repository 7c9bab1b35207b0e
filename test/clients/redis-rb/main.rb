# The scenario with redis-rb. Version 4 speaks RESP2 only. The line protocol is that of step/step.go.
require 'redis'

HOST, PORT, PROTOCOL = ARGV[0], ARGV[1].to_i, ARGV[2].to_i
BOUND = 10 # seconds; what should take milliseconds has not happened when they are over
SOURCE = "redis.call('SET', KEYS[1], ARGV[1]); return {KEYS[1], ARGV[1], 42}".freeze
$stdout.sync = true

def client
  Redis.new(host: HOST, port: PORT, id: 'scenario', timeout: BOUND)
end

def equal(what, got, want)
  raise "#{what}: got #{got.inspect}, want #{want.inspect}" if got != want
end

def refused(what, code)
  got = yield
  raise "#{what}: got #{got.inspect}, want #{code}"
rescue Redis::CommandError => e
  raise "#{what}: got #{e.message.inspect}, want #{code}" unless e.message.start_with?("#{code} ")
end

def eventually(what)
  finish = Process.clock_gettime(Process::CLOCK_MONOTONIC) + BOUND
  until yield
    raise "it never happened: #{what}" if Process.clock_gettime(Process::CLOCK_MONOTONIC) > finish

    sleep 0.005
  end
end

def restart
  puts 'restart'
  equal('the restart', $stdin.gets, "done\n")
end

def info(c)
  got = c.call(%w[CLIENT INFO])
  [" resp=#{PROTOCOL}", ' name=scenario '].each do |part|
    raise "CLIENT INFO: #{got.inspect} lacks #{part}" unless got.include?(part)
  end
end

STEPS = {
  connect: lambda {
    c = client
    equal('PING', c.ping, 'PONG')
    equal('CLIENT SETNAME', c.client(:setname, 'scenario'), 'OK')
    info(c)
    bytes = "\0\r\n\xff $5".b
    equal('SET', c.set('bytes', bytes, ex: 3600), 'OK')
    equal('GET', c.get('bytes').b, bytes)
    equal('TTL', c.ttl('bytes').between?(3540, 3600), true)
    equal('GET of nothing', c.get('nothing'), nil)
    refused('LPUSH to a string', 'WRONGTYPE') { c.lpush('bytes', 'x') }
    c.hset('hash', 'a', '1', 'b', '2')
    equal('HGETALL', c.hgetall('hash'), { 'a' => '1', 'b' => '2' })
  },

  pipeline: lambda {
    c = client
    futures = []
    c.pipelined { |p| 100.times { futures << p.incr('n') } }
    equal('INCR', futures.map(&:value), (1..100).to_a)
    # redis-rb raises the first error of a pipeline and gives no replies then. The commands behind it have run all the same.
    refused('LPUSH', 'WRONGTYPE') do
      c.pipelined { |p| 101.times { |i| i == 50 ? p.lpush('n', 'x') : p.incr('n') } }
    end
    equal('GET', c.get('n'), '200')
  },

  transaction: lambda {
    c = client
    other = client
    got = c.watch('tx') do
      equal('GET', c.get('tx'), nil)
      c.multi do |m|
        m.set('tx', '41')
        m.incr('tx')
        m.rpush('tx:list', %w[a b])
      end
    end
    equal('EXEC', got, ['OK', 42, 2])
    equal('GET after EXEC', c.get('tx'), '42')

    got = c.watch('tx') do
      equal('SET by another connection', other.set('tx', '7'), 'OK')
      c.multi { |m| m.set('tx', '8') }
    end
    equal('EXEC after a watched key changed', got, nil)
    equal('GET after the aborted EXEC', c.get('tx'), '7')

    refused('EXEC with an error inside', 'WRONGTYPE') do
      c.multi do |m|
        m.lpush('tx', 'x')
        m.set('tx', '9')
      end
    end
    equal('GET', c.get('tx'), '9')

    equal('MULTI', c.call(%w[MULTI]), 'OK')
    equal('SET', c.call(%w[SET tx 10]), 'QUEUED')
    equal('DISCARD', c.call(%w[DISCARD]), 'OK')
    equal('GET after DISCARD', c.get('tx'), '9')
  },

  pubsub: lambda {
    c = client
    other = client
    inbox = Queue.new
    # redis-rb listens to one kind of subscription at a time.
    [[:subscribe, 'news', 'news', 'glad tidings'], [:psubscribe, 'wea*', 'weather', 'rain']].each do |kind, what, channel, text|
      listener = Thread.new do
        Thread.current.report_on_exception = false
        c.public_send(kind, what) do |on|
          on.public_send(kind) { |*m| inbox << m }
          on.message { |*m| inbox << m; c.unsubscribe }
          on.pmessage { |*m| inbox << m; c.punsubscribe }
          on.unsubscribe { |*m| inbox << m }
          on.punsubscribe { |*m| inbox << m }
        end
      end
      equal('the confirmation', inbox.pop, [what, 1])
      equal('PUBLISH', other.publish(channel, text), 1)
      equal('the message', inbox.pop, kind == :subscribe ? [channel, text] : [what, channel, text])
      equal('the confirmation', inbox.pop, [what, 0])
      equal('the end of the subscription', listener.join(BOUND), listener)
      equal('SET afterwards', c.set('after:pubsub', 'yes'), 'OK')
      equal('GET afterwards', c.get('after:pubsub'), 'yes')
    end
    equal('PUBSUB NUMSUB', other.call(%w[PUBSUB NUMSUB news]), ['news', 0])
  },

  blocking: lambda {
    c = client
    other = client
    popper = Thread.new { c.blpop('empty', 'queue', timeout: BOUND) }
    eventually('a client is blocked') { other.info('clients')['blocked_clients'] == '1' }
    equal('RPUSH', other.rpush('queue', %w[first second]), 2)
    equal('BLPOP', popper.value, %w[queue first])
    start = Process.clock_gettime(Process::CLOCK_MONOTONIC)
    equal('BLPOP of nothing', c.blpop('empty', timeout: 0.2), nil)
    equal('BLPOP waited', Process.clock_gettime(Process::CLOCK_MONOTONIC) - start >= 0.15, true)
  },

  script: lambda {
    c = client
    equal('EVAL', c.eval(SOURCE, ['scripted'], ['one']), ['scripted', 'one', 42])
    equal('GET after EVAL', c.get('scripted'), 'one')
    sha = c.script(:load, SOURCE)
    c.script(:flush)
    refused('EVALSHA of an unknown script', 'NOSCRIPT') { c.evalsha(sha, ['scripted'], ['two']) }
    equal('SCRIPT EXISTS', c.script(:exists, sha), false)
    equal('SCRIPT LOAD', c.script(:load, SOURCE), sha)
    equal('SCRIPT EXISTS', c.script(:exists, sha), true)
    equal('EVALSHA', c.evalsha(sha, ['scripted'], ['two']), ['scripted', 'two', 42])
    equal('GET after EVALSHA', c.get('scripted'), 'two')
  },

  reconnect: lambda {
    c = client
    equal('SET', c.set('kept', 'value before'), 'OK')
    restart
    equal('SET after the restart', c.set('kept', 'value after'), 'OK')
    equal('GET after the restart', c.get('kept'), 'value after')
    equal('a script', c.eval('return ARGV[1]', [], ['run']), 'run')
  }
}.freeze

code = 0
STEPS.each do |name, step|
  step.call
  puts "ok #{name}"
rescue StandardError => e
  where = e.backtrace.find { |l| l.include?('main.rb') }
  puts "failed #{name}: #{e.class}: #{e.message.tr("\r\n", ' ')} (#{where})"
  code = 1
end
exit code
