// The scenario with hiredis. Version 0.14 speaks RESP2 only: it takes a map for a broken stream. The line protocol is that of
// step/step.go.
#include <hiredis.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static const char *host;
static int port;
static const struct timeval bound = {10, 0}; // what should take milliseconds has not happened when it is over
static jmp_buf failed;
static char why[512];

static void fail(const char *fmt, ...) {
	va_list args;
	va_start(args, fmt);
	vsnprintf(why, sizeof why, fmt, args);
	va_end(args);
	for (char *p = why; *p; p++)
		if (*p == '\r' || *p == '\n') *p = ' ';
	longjmp(failed, 1);
}

static redisContext *client(void) {
	redisContext *c = redisConnectWithTimeout(host, port, bound);
	if (c == NULL || c->err) fail("connect: %s", c ? c->errstr : "no memory");
	redisSetTimeout(c, bound);
	return c;
}

// show writes a reply as one line: +OK, :1, $text, *[…], nil, -ERR …
static void show(const redisReply *r, char *out, size_t size) {
	size_t n;
	switch (r->type) {
	case REDIS_REPLY_STATUS: snprintf(out, size, "+%s", r->str); break;
	case REDIS_REPLY_ERROR: snprintf(out, size, "-%s", r->str); break;
	case REDIS_REPLY_INTEGER: snprintf(out, size, ":%lld", r->integer); break;
	case REDIS_REPLY_STRING: snprintf(out, size, "$%s", r->str); break;
	case REDIS_REPLY_NIL: snprintf(out, size, "nil"); break;
	default:
		snprintf(out, size, "*[");
		for (size_t i = 0; i < r->elements; i++) {
			n = strlen(out);
			if (i > 0) n += (size_t)snprintf(out + n, size - n, " ");
			if (n + 2 >= size) return;
			show(r->element[i], out + n, size - n);
		}
		n = strlen(out);
		snprintf(out + n, size - n, "]");
	}
}

// next takes the next reply and fails unless it is as wanted. A want that ends in `...` is a beginning.
static void next(redisContext *c, const char *what, const char *want) {
	redisReply *r = NULL;
	if (redisGetReply(c, (void **)&r) != REDIS_OK) fail("%s: %s", what, c->errstr);
	char got[4096] = "";
	show(r, got, sizeof got);
	freeReplyObject(r);
	size_t n = strlen(want);
	int same = n > 3 && strcmp(want + n - 3, "...") == 0 ? strncmp(got, want, n - 3) == 0 : strcmp(got, want) == 0;
	if (!same) fail("%s: got %.200s, want %s", what, got, want);
}

// ask sends one command and checks its reply.
static void ask(redisContext *c, const char *want, const char *fmt, ...) {
	va_list args;
	va_start(args, fmt);
	int err = redisvAppendCommand(c, fmt, args);
	va_end(args);
	if (err != REDIS_OK) fail("%s: %s", fmt, c->errstr);
	next(c, fmt, want);
}

static void flush(redisContext *c) {
	for (int done = 0; !done;)
		if (redisBufferWrite(c, &done) != REDIS_OK) fail("write: %s", c->errstr);
}

static double now(void) {
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

// text asks and returns a string, which lives until the next call.
static const char *text(redisContext *c, const char *cmd) {
	static char out[8192];
	redisReply *r = redisCommand(c, cmd);
	if (r == NULL) fail("%s: %s", cmd, c->errstr);
	snprintf(out, sizeof out, "%s", r->str ? r->str : "");
	freeReplyObject(r);
	return out;
}

static void until_blocked(redisContext *c) {
	for (double end = now() + (double)bound.tv_sec; strstr(text(c, "INFO clients"), "blocked_clients:1\r") == NULL; usleep(5000))
		if (now() > end) fail("it never happened: a client is blocked");
}

static void info(redisContext *c) {
	ask(c, "+OK", "CLIENT SETNAME scenario");
	const char *got = text(c, "CLIENT INFO");
	if (strstr(got, " resp=2") == NULL || strstr(got, " name=scenario ") == NULL) fail("CLIENT INFO: %s", got);
}

static void step_connect(void) {
	redisContext *c = client();
	ask(c, "+PONG", "PING");
	info(c);
	ask(c, "+OK", "SET bytes %b EX 3600", "\0\r\n\xff $5", (size_t)7);
	redisReply *r = redisCommand(c, "GET bytes");
	if (r == NULL || r->type != REDIS_REPLY_STRING || r->len != 7 || memcmp(r->str, "\0\r\n\xff $5", 7) != 0) fail("GET: not what was set");
	freeReplyObject(r);
	r = redisCommand(c, "TTL bytes");
	if (r == NULL || r->integer < 3540 || r->integer > 3600) fail("TTL: not the one that was set");
	freeReplyObject(r);
	ask(c, "nil", "GET nothing");
	ask(c, "-WRONGTYPE ...", "LPUSH bytes x");
	ask(c, ":2", "HSET hash a 1 b 2");
	ask(c, "*[$a $1 $b $2]", "HGETALL hash");
	redisFree(c);
}

static void step_pipeline(void) {
	redisContext *c = client();
	for (int i = 0; i < 101; i++) redisAppendCommand(c, i == 50 ? "LPUSH n x" : "INCR n");
	for (int i = 0, n = 0; i < 101; i++) {
		char want[32];
		if (i != 50) snprintf(want, sizeof want, ":%d", ++n);
		next(c, "the pipeline", i == 50 ? "-WRONGTYPE ..." : want);
	}
	redisFree(c);
}

static void step_transaction(void) {
	redisContext *c = client(), *other = client();
	ask(c, "+OK", "WATCH tx");
	ask(c, "nil", "GET tx");
	ask(c, "+OK", "MULTI");
	ask(c, "+QUEUED", "SET tx 41");
	ask(c, "+QUEUED", "INCR tx");
	ask(c, "+QUEUED", "RPUSH tx:list a b");
	ask(c, "*[+OK :42 :2]", "EXEC");
	ask(c, "$42", "GET tx");

	ask(c, "+OK", "WATCH tx");
	ask(other, "+OK", "SET tx 7");
	ask(c, "+OK", "MULTI");
	ask(c, "+QUEUED", "SET tx 8");
	ask(c, "nil", "EXEC");
	ask(c, "$7", "GET tx");

	// The whole of it in one write.
	redisAppendCommand(c, "MULTI");
	redisAppendCommand(c, "LPUSH tx x");
	redisAppendCommand(c, "SET tx 9");
	redisAppendCommand(c, "EXEC");
	next(c, "MULTI", "+OK");
	next(c, "LPUSH in MULTI", "+QUEUED");
	next(c, "SET in MULTI", "+QUEUED");
	next(c, "EXEC with an error inside", "*[-WRONGTYPE ...");
	ask(c, "$9", "GET tx");

	ask(c, "+OK", "MULTI");
	ask(c, "-ERR ...", "NOSUCH");
	ask(c, "-EXECABORT ...", "EXEC");

	ask(c, "+OK", "MULTI");
	ask(c, "+QUEUED", "SET tx 10");
	ask(c, "+OK", "DISCARD");
	ask(c, "$9", "GET tx");
	redisFree(c);
	redisFree(other);
}

static void step_pubsub(void) {
	redisContext *c = client(), *other = client();
	ask(c, "*[$subscribe $news :1]", "SUBSCRIBE news");
	ask(c, "*[$psubscribe $wea* :2]", "PSUBSCRIBE wea*");
	ask(other, ":1", "PUBLISH news %s", "glad tidings");
	next(c, "the message", "*[$message $news $glad tidings]");
	ask(other, ":1", "PUBLISH weather rain");
	next(c, "the message", "*[$pmessage $wea* $weather $rain]");
	ask(c, "*[$pong $]", "PING");
	ask(c, "-ERR ...", "GET bytes");
	ask(c, "*[$unsubscribe $news :1]", "UNSUBSCRIBE");
	ask(c, "*[$punsubscribe $wea* :0]", "PUNSUBSCRIBE");
	ask(other, "*[$news :0]", "PUBSUB NUMSUB news");
	ask(c, "+OK", "SET after:pubsub yes");
	ask(c, "$yes", "GET after:pubsub");
	redisFree(c);
	redisFree(other);
}

static void step_blocking(void) {
	redisContext *c = client(), *other = client();
	redisAppendCommand(c, "BLPOP empty queue 0");
	flush(c);
	until_blocked(other);
	ask(other, ":2", "RPUSH queue first second");
	next(c, "BLPOP", "*[$queue $first]");
	double start = now();
	ask(c, "nil", "BLPOP empty 0.2");
	if (now() - start < 0.15) fail("BLPOP timed out after %.3f s", now() - start);
	redisFree(c);
	redisFree(other);
}

static void step_script(void) {
	const char *source = "redis.call('SET', KEYS[1], ARGV[1]); return {KEYS[1], ARGV[1], 42}";
	redisContext *c = client();
	ask(c, "*[$scripted $one :42]", "EVAL %s 1 scripted one", source);
	ask(c, "$one", "GET scripted");
	char sha[64];
	redisReply *r = redisCommand(c, "SCRIPT LOAD %s", source);
	if (r == NULL || r->type != REDIS_REPLY_STRING || r->len != 40) fail("SCRIPT LOAD: no digest");
	snprintf(sha, sizeof sha, "%s", r->str);
	freeReplyObject(r);
	ask(c, "*[$scripted $two :42]", "EVALSHA %s 1 scripted two", sha);
	ask(c, "$two", "GET scripted");
	ask(c, "+OK", "SCRIPT FLUSH");
	ask(c, "*[:0]", "SCRIPT EXISTS %s", sha);
	ask(c, "-NOSCRIPT ...", "EVALSHA %s 1 scripted three", sha);
	ask(c, "$two", "GET scripted");
	redisFree(c);
}

static void step_reconnect(void) {
	redisContext *c = client();
	ask(c, "+OK", "SET kept %s", "value before");
	puts("restart");
	char line[16];
	if (fgets(line, sizeof line, stdin) == NULL || strcmp(line, "done\n") != 0) fail("the server was not restarted");
	// hiredis reports the broken connection once and leaves it to the application to make it again.
	freeReplyObject(redisCommand(c, "PING"));
	if (c->err == 0) fail("PING over the old connection was answered");
	if (redisReconnect(c) != REDIS_OK) fail("reconnect: %s", c->errstr);
	ask(c, "+OK", "SET kept %s", "value after");
	ask(c, "$value after", "GET kept");
	info(c);
	ask(c, "$run", "EVAL %s 0 run", "return ARGV[1]");
	redisFree(c);
}

int main(int argc, char **argv) {
	if (argc != 4) {
		fprintf(stderr, "usage: %s host port protocol\n", argv[0]);
		return 2;
	}
	host = argv[1];
	port = atoi(argv[2]);
	setvbuf(stdout, NULL, _IOLBF, 0);
	static const struct {
		const char *name;
		void (*run)(void);
	} steps[] = {
		{"connect", step_connect}, {"pipeline", step_pipeline}, {"transaction", step_transaction}, {"pubsub", step_pubsub},
		{"blocking", step_blocking}, {"script", step_script}, {"reconnect", step_reconnect},
	};
	static volatile int code; // outlives the jump
	for (volatile size_t i = 0; i < sizeof steps / sizeof steps[0]; i++) {
		if (setjmp(failed) == 0) {
			steps[i].run();
			printf("ok %s\n", steps[i].name);
		} else { // the step's connections are left to the end of the program
			printf("failed %s: %s\n", steps[i].name, why);
			code = 1;
		}
	}
	return code;
}
