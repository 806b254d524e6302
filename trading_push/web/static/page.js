/**
 * The page of a trader: signs in, keeps one client, and hands what comes to the panels.
 * @module page
 */

import { Account } from "./account.js";
import { inNextFrame } from "./cells.js";
import { Chart } from "./chart.js";
import { Market } from "./market.js";
import { connect } from "./trading-push.js";
import { clock, decimal, duration, showLanguage, shownLanguage, signed, word } from "./words.js";

const LINES_SHOWN = 200;
const PALETTES = ["green", "red", "blue"];
const root = document.documentElement;
const isDemo = root.dataset.demo === "true";
const staleAfterMs = Number(root.dataset.staleAfter) * 1000 || 30_000;

/** @param {string} id @returns {any} */
const at = (id) => document.getElementById(id);

/** Settings of this browser; a browser that keeps none is as good. */
const kept = {
  /** @param {string} key */
  get(key) {
    try { return localStorage.getItem(`trading-push.${key}`); } catch { return null; }
  },
  /** @param {string} key @param {string} value */
  set(key, value) {
    try { localStorage.setItem(`trading-push.${key}`, value); } catch { /* it is shown all the same */ }
  },
};

const chart = new Chart(at("chart"), at("chart-legend"));
let client = /** @type {import("./trading-push.js").Client | null} */ (null);
let market = /** @type {Market | null} */ (null);
let account = /** @type {Account | null} */ (null);
let stopCandles = () => {};
let user = kept.get("user") ?? "4";
let pushes = 0;
let lostAt = 0;

// --- the connection --------------------------------------------------------------------------

/** A token of the demo, for a page of this machine. @returns {Promise<string>} */
async function demoToken() {
  const answer = await fetch("/demo/token", { method: "POST", body: JSON.stringify({ user }) });
  if (!answer.ok) throw new Error(`/demo/token: ${answer.status}`);
  return (await answer.json()).token;
}

/** @param {string | (() => Promise<string>)} token */
function begin(token) {
  client?.close();
  stopCandles();
  chart.clear();
  for (const body of document.querySelectorAll("tbody")) body.replaceChildren();
  client = connect({ url: root.dataset.socket ?? "/ws", token });
  client.addEventListener("state", ({ detail }) => showState(detail));
  client.addEventListener("gap", ({ detail }) => {
    say(`${detail.channel}: ${detail.reason === "slow" ? `${word("slow")} ${detail.dropped}` : word("gap")}`);
  });
  client.addEventListener("refused", ({ detail }) => {
    const symbol = /^(?:ticker|candles)\.(.*)$/.exec(detail.channel)?.[1];
    if (symbol === undefined) account?.refuse(detail.channel, detail.code);
    else market?.refuse(symbol, detail.message);
    say(`${detail.channel} ${word("refused")}: ${detail.message}`);
  });
  client.addEventListener("notice", ({ detail }) => say(`${word("notice")}: ${word(detail.code)}`));
  client.addEventListener("rtt", () => inNextFrame(showFigures));
  market = new Market(at("market"), client, staleAfterMs, {
    chosen: showChart,
    priced,
    refused: (symbol, why) => { at("market-note").textContent = `${symbol}: ${why}`; },
  });
  market.preferred = kept.get("chosen") ?? "BTCUSDT";
  account = new Account(client, market);
  for (const symbol of (kept.get("symbols") ?? "").split(" ").filter(Boolean)) market.watch(symbol);
}

/** @param {import("./trading-push.js").State} state */
function showState(state) {
  const line = at("connection");
  line.dataset.state = state.state;
  let text = word(state.state);
  if (state.state === "open") {
    text = `${word("open")}${state.user === null ? "" : ` · ${word("user")} ${state.user}`}`;
    say(lostAt === 0 ? text : `${word("resumed")} (${duration(Date.now() - lostAt)})`);
    lostAt = 0;
    client?.ping();
  } else if (state.state === "waiting") {
    text = `${word("waiting")} ${duration(state.retryAt - Date.now())}`;
    if (lostAt === 0) {
      lostAt = Date.now();
      say(state.reason);
    }
  } else if (state.state === "ended" && state.error !== null) {
    lostAt ||= Date.now();
    say(state.error.message);
    if (!isDemo) at("sign-in").hidden = false;
    at("sign-in-error").textContent = state.error.message;
  }
  if (line.textContent !== text) line.textContent = text;
  const isLost = lostAt !== 0 && state.state !== "open";
  root.classList.toggle("offline", isLost);
  const banner = at("banner");
  banner.hidden = !isLost;
  banner.dataset.kind = state.state;
  const why = state.state === "waiting" ? ` · ${state.reason}` : "";
  banner.textContent = isLost ? `${word("lost")} ${clock(lostAt)} · ${text}${why}` : "";
}

function showFigures() {
  const { rtt = null } = client ?? {};
  at("rtt").textContent = rtt === null ? "" : `${rtt < 10 ? rtt.toFixed(1) : Math.round(rtt)} ms`;
}

// --- the log of this connection --------------------------------------------------------------

/** @param {string} text */
function say(text) {
  const list = at("log");
  const line = document.createElement("li");
  const time = document.createElement("time");
  time.textContent = clock(Date.now());
  line.className = "own";
  line.append(time, text);
  const isAtEnd = list.scrollHeight - list.scrollTop - list.clientHeight < 30;
  list.append(line);
  while (list.children.length > LINES_SHOWN) list.firstElementChild?.remove();
  if (isAtEnd) list.scrollTop = list.scrollHeight;
}

// --- the chart -------------------------------------------------------------------------------

/** @param {string} symbol */
function showChart(symbol) {
  stopCandles();
  chart.clear();
  const channel = `candles.${symbol}`;
  const mine = client;
  at("chart-symbol").textContent = symbol;
  kept.set("chosen", symbol);
  if (mine === null) return;
  stopCandles = mine.subscribe(channel, (push) => {
    const quote = market?.quote(symbol);
    if (push.type !== "status" && push.data) chart.take(push, mine.latest(channel) ?? push, quote?.decimals || 2);
  });
  priced(symbol);
}

/** @param {string} symbol */
function priced(symbol) {
  pushes += 1;
  const quote = market?.quote(symbol);
  if (quote === undefined) return;
  account?.refresh();
  if (symbol !== market?.chosen) return;
  chart.trade(quote.ts, quote.last);
  inNextFrame(showPrice);
}

function showPrice() {
  const symbol = market?.chosen ?? "";
  const quote = market?.quote(symbol);
  const price = quote?.ticker ? decimal(quote.ticker.last, quote.decimals) : "";
  at("chart-price").textContent = price;
  const change = Number(quote?.ticker?.change_pct ?? NaN);
  at("chart-change").textContent = Number.isNaN(change) ? "" : `${signed(change, 2)} %`;
  at("chart-change").className = change > 0 ? "up" : change < 0 ? "down" : "";
  document.title = price === "" ? "trading_push" : `${price} ${symbol} · trading_push`;
}

/** @param {string} interval */
function showInterval(interval) {
  chart.setInterval(interval);
  kept.set("interval", interval);
  for (const button of document.querySelectorAll("[data-interval]")) {
    const is = /** @type {HTMLElement} */ (button).dataset.interval === interval;
    button.setAttribute("aria-pressed", String(is));
  }
}

// --- choices and keys ------------------------------------------------------------------------

/** @param {string} theme */
function showTheme(theme) {
  root.dataset.theme = theme;
  chart.restyle();
  market?.refresh();
}

/** @param {string} palette */
function showPalette(palette) {
  root.dataset.palette = palette;
  at("palette").value = palette;
  chart.restyle();
  market?.refresh();
}

/** @param {"en" | "zh"} language */
function chooseLanguage(language) {
  showLanguage(language);
  at("language").textContent = language === "zh" ? "English" : "中文";
  if (kept.get("palette") === null) showPalette(language === "zh" ? "red" : "green");
  chart.restyle();
  market?.refresh();
  account?.refresh();
  if (client !== null) showState(client.state);
}

const actions = /** @type {Record<string, () => void>} */ ({
  j: () => market?.step(1),
  k: () => market?.step(-1),
  i: () => showInterval(chart.interval === "1s" ? "1m" : "1s"),
  t: () => {
    const theme = root.dataset.theme === "dark" ? "light" : "dark";
    kept.set("theme", theme);
    showTheme(theme);
  },
  l: () => {
    const language = shownLanguage() === "zh" ? "en" : "zh";
    kept.set("language", language);
    chooseLanguage(language);
  },
  p: () => {
    const palette = PALETTES[(PALETTES.indexOf(root.dataset.palette ?? "") + 1) % PALETTES.length];
    kept.set("palette", palette);
    showPalette(palette);
  },
  "/": () => at("add-symbol").focus(),
  "?": () => {
    const list = at("help-keys");
    list.replaceChildren();
    const keys = { "j  k": "symbol", i: "interval", t: "theme", l: "language", p: "palette", "/": "add", "?": "help" };
    for (const [key, name] of Object.entries(keys)) {
      const [term, meaning] = [document.createElement("dt"), document.createElement("dd")];
      [term.textContent, meaning.textContent] = [key, word(`key-${name}`)];
      list.append(term, meaning);
    }
    at("help").showModal();
  },
});

/** Have the rows of the market choose a symbol; once, whatever becomes of the client. */
function listenToRows() {
  const table = at("market");
  const choose = (/** @type {Event} */ event) => {
    const row = /** @type {HTMLElement} */ (event.target).closest("tr");
    if (row?.dataset.key) market?.choose(row.dataset.key);
  };
  table.addEventListener("click", choose);
  table.addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => {
    if (event.key === "Enter") choose(event);
  });
}

function listen() {
  listenToRows();
  document.addEventListener("keydown", (event) => {
    const target = /** @type {HTMLElement} */ (event.target);
    if (event.ctrlKey || event.metaKey || event.altKey || target.closest("input, select, dialog")) return;
    const action = actions[event.key];
    if (action !== undefined) {
      event.preventDefault();
      action();
    }
  });
  at("theme").addEventListener("click", actions.t);
  at("language").addEventListener("click", actions.l);
  at("keys").addEventListener("click", actions["?"]);
  at("palette").addEventListener("change", () => {
    kept.set("palette", at("palette").value);
    showPalette(at("palette").value);
  });
  for (const button of document.querySelectorAll("[data-interval]")) {
    button.addEventListener("click", () => showInterval(/** @type {HTMLElement} */ (button).dataset.interval ?? "1m"));
  }
  at("add").addEventListener("submit", (/** @type {Event} */ event) => {
    event.preventDefault();
    const symbol = at("add-symbol").value.trim().replace(/[a-z]/g, (/** @type {string} */ each) => each.toUpperCase());
    if (symbol === "") return;
    at("market-note").textContent = "";
    market?.watch(symbol);
    market?.choose(symbol);
    kept.set("symbols", [...new Set([...(kept.get("symbols") ?? "").split(" ").filter(Boolean), symbol])].join(" "));
    at("add-symbol").value = "";
  });
  at("user").addEventListener("change", () => {
    user = at("user").value;
    kept.set("user", user);
    begin(demoToken);
  });
  at("sign-in").addEventListener("submit", (/** @type {Event} */ event) => {
    event.preventDefault();
    const token = at("token").value.trim();
    at("sign-in-error").textContent = token === "" ? word("no_token") : "";
    if (token === "") return;
    if (at("remember").checked) sessionStorage.setItem("trading-push.token", token);
    at("token").value = "";
    at("sign-in").hidden = true;
    begin(token);
  });
}

function start() {
  const light = matchMedia("(prefers-color-scheme: light)").matches ? "light" : "dark";
  root.dataset.theme = kept.get("theme") ?? light;
  const chinese = navigator.languages.some((each) => each.toLowerCase().startsWith("zh"));
  const palette = kept.get("palette");
  if (palette !== null && PALETTES.includes(palette)) root.dataset.palette = palette;
  chooseLanguage(/** @type {"en" | "zh"} */ (kept.get("language")) ?? (chinese ? "zh" : "en"));
  at("palette").value = root.dataset.palette;
  showInterval(kept.get("interval") === "1s" ? "1s" : "1m");
  at("chart-credit").hidden = !chart.isLibrary;
  listen();
  setInterval(() => {
    at("rate").textContent = `${pushes}/s`;
    pushes = 0;
    market?.refresh();
    account?.refresh();
    if (client !== null && client.state.state !== "open") showState(client.state);
  }, 1000);
  setInterval(() => client?.ping(), 5000);
  if (isDemo) {
    at("user-pick").hidden = false;
    for (const each of ["1", "2", "3", "4", "5"]) at("user").append(new Option(each, each));
    at("user").value = user;
    begin(demoToken);
    return;
  }
  const token = sessionStorage.getItem("trading-push.token");
  if (token === null) at("sign-in").hidden = false;
  else begin(token);
}

start();
