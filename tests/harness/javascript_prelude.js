// What the code of a test in JavaScript has at hand, in Node and in a browser.

const now = performance.now.bind(performance);
const timeout = globalThis.setTimeout.bind(globalThis);
let speed = 1;
let eagerness = 1;
let dozed = 0;

// The clock that the client sees: it can be made to run fast, and to jump.
performance.now = () => now() * speed + dozed;
globalThis.setTimeout = (fn, ms = 0, ...rest) => timeout(fn, ms / speed / eagerness, ...rest);

/** Let the clock run so many times as fast. */
export const hasten = (times) => {
  dozed = performance.now() - now() * times;
  speed = times;
};

/**
 * Let timers fire so many times as early, and the clock run as ever: waits are short then, and
 * deadlines what they are, however slow the machine.
 */
export const eager = (times) => (eagerness = times);

/** Let the clock jump: the machine was asleep. */
export const doze = (ms) => (dozed += ms);

/** Wait so long by that clock. */
export const pause = (ms) => new Promise((done) => setTimeout(done, ms));

/** Wait until it is so. */
export const until = async (what) => {
  while (!what()) await new Promise((done) => timeout(done, 2));
};

const lines = [];
let isSending = false;
const send = async () => {
  if (isSending) return;
  isSending = true;
  while (lines.length) {
    const body = lines.splice(0).join("\n");
    await fetch(location.pathname.replace("/run/", "/say/"), { method: "POST", body });
  }
  isSending = false;
};

/** Tell the test something. */
export const say = (...what) => {
  const line = JSON.stringify(what.length === 1 ? what[0] : what);
  if (globalThis.process?.stdout) {
    globalThis.process.stdout.write(`${line}\n`);
  } else {
    lines.push(line);
    send();
  }
};

/** Say each event of these types, all by default. */
export const tell = (client, types = ["state", "gap", "refused", "notice", "rtt"]) => {
  for (const type of types) {
    client.addEventListener(type, ({ detail }) => {
      const { error, retryAt, ...rest } = detail;
      const said = { ...rest };
      if (error) said.error = [error.name, error.message, error.code ?? null, error.word ?? null];
      if (retryAt) said.waitMs = Math.round(retryAt - Date.now());
      say(type, said);
    });
  }
  return client;
};

/** Say the states only, each as one word. */
export const tellStates = (client) => {
  client.addEventListener("state", ({ detail }) => say(detail.state));
  return client;
};

if (typeof window !== "undefined") {
  window.addEventListener("error", (event) => say("uncaught", String(event.message)));
  window.addEventListener("unhandledrejection", (event) => say("uncaught", String(event.reason)));
}
