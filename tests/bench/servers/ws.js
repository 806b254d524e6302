// Node's `ws`, compression off (its default): the server broadcast of its README.
"use strict";
const readline = require("node:readline");
const { WebSocket, WebSocketServer } = require("ws");

const topics = Array.from({ length: 10 }, (_, number) => `SYM${number}USDT`);
const numbers = new Map(topics.map((symbol) => [symbol, 0]));
const SIZE = 161;

function payload(symbol, size) {
  const n = numbers.get(symbol) + 1;
  numbers.set(symbol, n);
  const at = Number(process.hrtime.bigint());
  const data = { symbol, n, at, last: "61837.63" };
  const message = { channel: `ticker.${symbol}`, type: "update", seq: n, data };
  return Buffer.from(JSON.stringify(message).padEnd(size));
}

const server = new WebSocketServer(
  { host: "127.0.0.1", port: 0, backlog: 4096, perMessageDeflate: false },
  () => say({ port: server.address().port }),
);
server.on("connection", (client) => client.on("error", console.error));

function say(answer) {
  process.stdout.write(JSON.stringify(answer) + "\n");
}

function publish(count, size) {
  for (const symbol of topics.slice(0, count)) {
    const data = payload(symbol, size);
    for (const client of server.clients) {
      if (client.readyState === WebSocket.OPEN) client.send(data, { binary: false });
    }
  }
}

const sleep = (ms) => new Promise((done) => setTimeout(done, Math.max(0, ms)));

async function publishBatches(command) {
  let due = performance.now();
  for (let batch = 0; batch < command.batches; batch++) {
    publish(command.topics, command.bytes ?? SIZE);
    due += command.interval_s * 1000;
    await sleep(due - performance.now());
  }
}

const commands = readline.createInterface({ input: process.stdin });
commands.on("line", async (line) => {
  const command = JSON.parse(line);
  if (command.do === "collect") global.gc();
  else await publishBatches(command);
  say({});
});
commands.on("close", () => process.exit(0));
