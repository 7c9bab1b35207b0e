// The steps of a scenario, as step.go describes them.
import assert from 'node:assert/strict';
import readline from 'node:readline';

export const [host, port, protocol] = [process.argv[2], Number(process.argv[3]), Number(process.argv[4])];
const bound = 10_000; // ms

export { assert };

const answers = readline.createInterface({ input: process.stdin })[Symbol.asyncIterator]();

/** Runs all steps, also when one has failed, and ends the program. */
export async function run(steps) {
  let code = 0;
  for (const [name, step] of Object.entries(steps)) {
    try {
      await within(step(), 'the step ends');
      console.log(`ok ${name}`);
    } catch (err) {
      const where = /main\.mjs:\d+/.exec(err?.stack)?.[0];
      console.log(`failed ${name}: ${String(err).replaceAll(/\s+/g, ' ')}${where ? ` (${where})` : ''}`);
      code = 1;
    }
  }
  process.exit(code);
}

/** Asks the test to restart the server and returns when it listens again. */
export async function restart() {
  console.log('restart');
  assert.equal((await answers.next()).value, 'done');
}

/** Fails if the promise takes too long. */
export async function within(promise, what) {
  let timer;
  const late = new Promise((_, reject) => { timer = setTimeout(() => reject(new Error(`it never happened: ${what}`)), bound); });
  return Promise.race([promise, late]).finally(() => clearTimeout(timer));
}

/** Waits for what another connection does to be seen. */
export async function until(what, done) {
  for (const end = Date.now() + bound; !(await done());) {
    if (Date.now() > end) throw new Error(`it never happened: ${what}`);
    await new Promise((resolve) => setTimeout(resolve, 5));
  }
}

/** A queue of messages: push from a callback, await next(). */
export class Inbox {
  #waiting = [];
  #ready = [];
  push(v) { const w = this.#waiting.shift(); w ? w(v) : this.#ready.push(v); }
  next(what) {
    if (this.#ready.length) return Promise.resolve(this.#ready.shift());
    return within(new Promise((resolve) => this.#waiting.push(resolve)), what);
  }
}
