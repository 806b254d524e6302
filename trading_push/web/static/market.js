/**
 * The market table: what each symbol costs, and how old that is.
 * @module market
 */

import { inNextFrame, Rows } from "./cells.js";
import { spark } from "./chart.js";
import { clock, decimal, decimalsOf, duration, signed, word } from "./words.js";

/** How many symbols are watched one by one, and how many of them with their trend. */
const WATCHED = 30;
const TRENDS = 8;
const TREND_BARS = 120;

/** One symbol as it is known by now. */
class Quote {
  ticker = /** @type {any} */ (null);
  ts = 0;
  state = "live";
  reason = "";
  since = 0;
  merged = 1;
  decimals = 0;
  trend = /** @type {number[]} */ ([]);
  isTrendNew = false;
  shown = NaN;
  arrow = "";
  stops = /** @type {(() => void)[]} */ ([]);

  /** The last price as a number; NaN if there is none. */
  get last() {
    return this.ticker?.last == null ? NaN : Number(this.ticker.last);
  }
}

/** All symbols, one of them chosen. */
export class Market {
  #quotes = /** @type {Map<string, Quote>} */ (new Map());
  #canvases = /** @type {Map<string, HTMLCanvasElement>} */ (new Map());
  #rows;
  #chosen = "";
  /** The least time from a publication to its arrival, with the difference of the clocks in it. */
  #way = Infinity;
  #show = () => this.#draw();

  /**
   * @param {HTMLTableElement} table
   * @param {import("./trading-push.js").Client} client
   * @param {number} staleAfterMs From when on a quote is old.
   * @param {{ chosen: (symbol: string) => void, priced: (symbol: string) => void,
   *   refused: (symbol: string, why: string) => void }} told
   */
  constructor(table, client, staleAfterMs, told) {
    this.#rows = new Rows(table);
    this.client = client;
    this.staleAfterMs = staleAfterMs;
    this.told = told;
    /** The symbol that is chosen when it comes. */
    this.preferred = "BTCUSDT";
    this.#rows.say(word("waiting_for"));
    client.subscribe("ticker.*", (push) => {
      for (const ticker of push.type === "status" ? [] : push.data) this.watch(ticker.symbol);
    }, { maxHz: 1 });
  }

  get chosen() {
    return this.#chosen;
  }

  /** @param {string} symbol @returns {Quote | undefined} */
  quote(symbol) {
    return this.#quotes.get(symbol);
  }

  /**
   * How long ago something was published, in ms, whatever this machine's clock says.
   * @param {number} ts By the server's clock.
   */
  age(ts) {
    return Date.now() - ts - (Number.isFinite(this.#way) ? this.#way : 0);
  }

  /**
   * Show a symbol from now on.
   * @param {string} symbol
   */
  watch(symbol) {
    if (this.#quotes.has(symbol) || this.#quotes.size >= WATCHED) return;
    const quote = new Quote();
    this.#quotes.set(symbol, quote);
    quote.stops.push(this.client.subscribe(`ticker.${symbol}`, (push) => this.#take(symbol, quote, push)));
    if (this.#quotes.size <= TRENDS) {
      const channel = `candles.${symbol}`;
      const trend = () => {
        const bars = this.client.latest(channel)?.data?.["1m"] ?? [];
        quote.trend = bars.slice(-TREND_BARS).map((/** @type {any[]} */ bar) => Number(bar[4]));
        quote.isTrendNew = true;
        inNextFrame(this.#show);
      };
      quote.stops.push(this.client.subscribe(channel, trend, { maxHz: 0.2 }));
    }
    if (this.#chosen === "" || symbol === this.preferred) this.choose(symbol);
  }

  /**
   * Leave a symbol out, because the server does not have it.
   * @param {string} symbol
   * @param {string} why
   */
  refuse(symbol, why) {
    const quote = this.#quotes.get(symbol);
    if (quote === undefined) return;
    for (const stop of quote.stops) stop();
    this.#quotes.delete(symbol);
    this.told.refused(symbol, why);
    if (symbol === this.#chosen) this.step(1);
    inNextFrame(this.#show);
  }

  /** @param {string} symbol */
  choose(symbol) {
    if (!this.#quotes.has(symbol)) return;
    this.#chosen = symbol;
    this.told.chosen(symbol);
    inNextFrame(this.#show);
  }

  /** @param {number} step 1 for the next symbol, -1 for the one before. */
  step(step) {
    const symbols = [...this.#quotes.keys()];
    const at = symbols.indexOf(this.#chosen);
    if (symbols.length > 0) this.choose(symbols[(at + step + symbols.length) % symbols.length]);
  }

  /** Show the ages, and all words, anew. */
  refresh() {
    for (const quote of this.#quotes.values()) quote.isTrendNew = true;
    inNextFrame(this.#show);
  }

  /**
   * @param {string} symbol
   * @param {Quote} quote
   * @param {import("./trading-push.js").Push} push
   */
  #take(symbol, quote, push) {
    this.#way = Math.min(this.#way, Date.now() - push.ts);
    if (push.type === "status") {
      quote.state = push.state ?? "live";
      quote.reason = push.reason ?? "";
      quote.since = push.ts;
    } else if (push.data) {
      quote.ticker = push.data;
      quote.ts = push.ts;
      quote.merged = push.merged ?? 1;
      quote.decimals = Math.max(quote.decimals, decimalsOf(push.data.last));
      this.told.priced(symbol);
    }
    inNextFrame(this.#show);
  }

  #draw() {
    this.#rows.keep([...this.#quotes.keys()]);
    for (const [symbol, quote] of this.#quotes) {
      const { row, cells } = this.#rows.at(symbol);
      row.tabIndex = 0;
      row.classList.toggle("chosen", symbol === this.#chosen);
      const ticker = quote.ticker ?? {};
      const moved = quote.last - quote.shown || 0;
      quote.shown = quote.last;
      if (moved !== 0) quote.arrow = moved > 0 ? "▲" : "▼";
      cells[0].show(symbol);
      cells[1].show(`${quote.arrow} ${decimal(ticker.last, quote.decimals)}`, moved);
      cells[1].colour(quote.arrow === "▲" ? 1 : quote.arrow === "▼" ? -1 : 0);
      cells[2].show(decimal(ticker.bid, quote.decimals));
      cells[3].show(decimal(ticker.ask, quote.decimals));
      const change = ticker.change_pct == null ? NaN : Number(ticker.change_pct);
      cells[4].show(Number.isNaN(change) ? "–" : `${signed(change, 2)} %`);
      cells[4].colour(change);
      if (quote.isTrendNew) {
        quote.isTrendNew = false;
        spark(this.#canvas(symbol, cells[5].element), quote.trend);
      }
      this.#drawAge(row, cells[6], quote);
    }
  }

  /**
   * @param {HTMLElement} row
   * @param {import("./cells.js").Cell} cell
   * @param {Quote} quote
   */
  #drawAge(row, cell, quote) {
    const isStale = quote.state !== "live";
    const age = this.age(quote.ts);
    row.classList.toggle("old", isStale || age > this.staleAfterMs);
    row.title = isStale ? `${word(quote.state)}: ${quote.reason}` : "";
    if (isStale) cell.show(`${word(quote.state)} ${word("since")} ${clock(quote.since)}`);
    else if (quote.ts === 0) cell.show("–");
    else cell.show(`${duration(age)}${quote.merged > 1 ? ` ×${quote.merged}` : ""}`);
  }

  /**
   * @param {string} symbol
   * @param {HTMLElement} cell
   */
  #canvas(symbol, cell) {
    let canvas = this.#canvases.get(symbol);
    if (canvas === undefined || canvas.parentElement !== cell) {
      canvas = document.createElement("canvas");
      canvas.setAttribute("role", "img");
      canvas.setAttribute("aria-label", `${word("trend")} ${symbol}`);
      cell.append(canvas);
      this.#canvases.set(symbol, canvas);
    }
    return canvas;
  }
}
