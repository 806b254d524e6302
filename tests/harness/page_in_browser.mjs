// Opens the page as a trader would, and tells what there is: a line of JSON.
import { createRequire } from "node:module";

const { url, modules, browser: executablePath, width, height, scheme, locale, reduced } = JSON.parse(process.argv[2]);
const { chromium } = createRequire(modules + "/")("playwright-core");

const browser = await chromium.launch({ executablePath, args: ["--no-sandbox"] });
const context = await browser.newContext({
  viewport: { width, height }, colorScheme: scheme, locale, reducedMotion: reduced ? "reduce" : "no-preference",
});
const page = await context.newPage();
const said = [];
const asked = [];
page.on("console", (message) => said.push(`${message.type()}: ${message.text()}`));
page.on("pageerror", (error) => said.push(String(error.stack)));
page.on("request", (request) => asked.push(request.url()));
await page.addInitScript(() => {
  globalThis.marks = new Map();
  addEventListener("DOMContentLoaded", () => {
    new MutationObserver((changes) => {
      const now = performance.now();
      for (const { target, oldValue } of changes) {
        const had = /changed/.test(oldValue ?? "");
        if (!had && /changed/.test(target.className)) {
          const times = globalThis.marks.get(target) ?? [];
          globalThis.marks.set(target, times);
          if (times.at(-1) !== now) times.push(now);  // several changes of one mark
        }
      }
    }).observe(document.body, { subtree: true, attributes: true, attributeFilter: ["class"], attributeOldValue: true });
  });
});
await page.goto(url);
const price = () => page.textContent("#chart-price");
await page.waitForFunction(() => document.querySelector("#chart-price")?.textContent !== "");
const first = await price();
await page.waitForFunction((before) => document.querySelector("#chart-price")?.textContent !== before, first);
const isThere = (id) => page.waitForFunction((id) => document.querySelectorAll(`#${id} tbody td:not(.empty)`).length > 0, id);
for (const id of ["market", "balance", "positions", "orders"]) await isThere(id);
await page.waitForFunction(() => document.querySelector("#pnl dd")?.textContent.length > 1);
await page.waitForFunction(() => document.querySelector("#chart-legend")?.textContent !== "");
// Longer than two marks of one cell are apart.
await page.waitForTimeout(2500);
const seen = await page.evaluate(() => ({
  wider: [...document.querySelectorAll("body, .bar, .panel, .scroll, .totals, .lines")]
    .filter((each) => each.scrollWidth > each.clientWidth)
    .map((each) => `${each.className} ${each.parentElement?.className}: ${each.scrollWidth} > ${each.clientWidth}`),
  closest: Math.min(...[...globalThis.marks.values()].flatMap(
    (times) => times.slice(1).map((time, at) => time - times[at]),
  )),
  marked: globalThis.marks.size,
  canvases: document.querySelectorAll("#chart canvas").length,
  connection: document.querySelector("#connection")?.textContent,
  language: document.documentElement.lang,
  theme: document.documentElement.dataset.theme,
  palette: document.documentElement.dataset.palette,
  text: document.body.innerText,
}));
console.log(JSON.stringify({ ...seen, said, asked }));
await browser.close();
