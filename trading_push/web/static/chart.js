/**
 * The candle chart: by the chart library where it is there, else by a canvas of our own.
 * @module chart
 */

import { inNextFrame } from "./cells.js";
import { clock, decimal, shownLanguage, word } from "./words.js";

/** How many bars are kept of each interval; the library itself knows no bound. */
const BARS_KEPT = 3600;
/** How many bars are shown at first. */
const SHOWN = 120;
const LENGTH_MS = /** @type {Record<string, number>} */ ({ "1s": 1000, "1m": 60_000 });

/** @typedef {[number, string, string, string, string, string | null]} Bar */
/** @typedef {{ time: number, open: number, high: number, low: number, close: number, volume: number | null }} Candle */

/** @param {Bar} bar @returns {Candle} */
function candle([t, open, high, low, close, volume]) {
  return {
    time: t, open: Number(open), high: Number(high), low: Number(low), close: Number(close),
    volume: volume === null ? null : Number(volume),
  };
}

/** @param {string} name */
function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

/** The bars of one symbol, shown in one interval at a time. */
export class Chart {
  #bars = /** @type {Map<number, Candle>} */ (new Map());
  #interval = "1m";
  #decimals = 2;
  #wasReset = true;
  #changed = /** @type {Set<number>} */ (new Set());
  #drawing;
  #push = /** @type {any} */ (null);
  #show = () => this.#draw();

  /**
   * @param {HTMLElement} container
   * @param {HTMLElement} legend Where the prices under the pointer are told.
   */
  constructor(container, legend) {
    this.legend = legend;
    const library = /** @type {any} */ (globalThis).LightweightCharts;
    /** Whether the library is there. */
    this.isLibrary = library !== undefined;
    const told = (/** @type {number | null} */ time) => this.#tell(time);
    this.#drawing = this.isLibrary
      ? new LibraryDrawing(container, library, told)
      : new CanvasDrawing(container, told);
  }

  get interval() {
    return this.#interval;
  }

  /** @param {string} interval `1s` or `1m`. */
  setInterval(interval) {
    this.#interval = interval;
    if (this.#push !== null) this.#reset(this.#push);
  }

  /** Show nothing until the next snapshot. */
  clear() {
    this.#push = null;
    this.#reset({ data: {} });
  }

  /**
   * Take a push of `candles.SYMBOL`.
   * @param {any} push
   * @param {any} whole All rows as they are by now.
   * @param {number} decimals Of the symbol's prices.
   */
  take(push, whole, decimals) {
    this.#decimals = decimals;
    this.#push = whole;
    if (push.type === "snapshot") {
      this.#reset(whole);
      return;
    }
    for (const bar of push.data?.[this.#interval] ?? []) this.#put(candle(bar));
    inNextFrame(this.#show);
  }

  /**
   * Have the present bar move with the ticker.
   * @param {number} at In ms, by the server's clock.
   * @param {number} price
   */
  trade(at, price) {
    const last = [...this.#bars.values()].at(-1);
    if (last === undefined || !Number.isFinite(price)) return;
    if (at < last.time || at >= last.time + LENGTH_MS[this.#interval]) return;
    const { high, low } = last;
    this.#put({ ...last, high: Math.max(high, price), low: Math.min(low, price), close: price });
    inNextFrame(this.#show);
  }

  /** Take the colours, and the language, anew. */
  restyle() {
    this.#drawing.style(this.#decimals);
    this.#wasReset = true;
    inNextFrame(this.#show);
  }

  /** @param {any} push */
  #reset(push) {
    this.#bars.clear();
    this.#changed.clear();
    for (const bar of push.data?.[this.#interval] ?? []) {
      const each = candle(bar);
      this.#bars.set(each.time, each);
    }
    this.#wasReset = true;
    this.#drawing.style(this.#decimals);
    inNextFrame(this.#show);
  }

  /** @param {Candle} each */
  #put(each) {
    const isNew = !this.#bars.has(each.time);
    this.#bars.set(each.time, each);
    this.#changed.add(each.time);
    if (!isNew) return;
    const times = [...this.#bars.keys()];
    // The library raises at a bar that is older than its last: all are given again then.
    if (times.length > 1 && /** @type {number} */ (times.at(-2)) > each.time) {
      this.#bars = new Map([...this.#bars].sort(([a], [b]) => a - b));
      this.#wasReset = true;
    }
    if (this.#bars.size > BARS_KEPT) {
      for (const time of times.slice(0, this.#bars.size - BARS_KEPT / 2)) this.#bars.delete(time);
      this.#wasReset = true;
    }
  }

  #draw() {
    if (this.#wasReset) {
      this.#drawing.set([...this.#bars.values()], SHOWN);
    } else {
      const changed = [...this.#changed].sort((a, b) => a - b);
      for (const time of changed) {
        const bar = this.#bars.get(time);
        if (bar !== undefined && !this.#drawing.update(bar)) {
          this.#drawing.set([...this.#bars.values()]);
          break;
        }
      }
    }
    this.#wasReset = false;
    this.#changed.clear();
    this.#tell(this.#drawing.pointed);
  }

  /** @param {number | null} time Of the bar under the pointer; null tells of the last. */
  #tell(time) {
    const bar = (time === null ? undefined : this.#bars.get(time)) ?? [...this.#bars.values()].at(-1);
    if (bar === undefined) {
      this.legend.textContent = "";
      return;
    }
    const parts = [["open_at", bar.open], ["high_at", bar.high], ["low_at", bar.low], ["close_at", bar.close]];
    const prices = parts.map(([key, value]) => `${word(String(key))} ${decimal(Number(value), this.#decimals)}`);
    const volume = bar.volume === null ? "" : `  ${word("volume_at")} ${decimal(bar.volume, 3)}`;
    this.legend.textContent = `${clock(bar.time)}  ${prices.join("  ")}${volume}`;
  }
}

/** The chart as the library draws it. */
class LibraryDrawing {
  pointed = /** @type {number | null} */ (null);
  #last = -Infinity;

  /**
   * @param {HTMLElement} container
   * @param {any} library
   * @param {(time: number | null) => void} told
   */
  constructor(container, library, told) {
    this.chart = library.createChart(container, {
      autoSize: true,
      layout: { attributionLogo: false, background: { type: "solid", color: "transparent" } },
      timeScale: { timeVisible: true, secondsVisible: true, rightOffset: 4, tickMarkFormatter: mark },
      localization: { timeFormatter: (/** @type {number} */ time) => clock(time * 1000) },
      crosshair: { mode: 0 },
    });
    this.candles = this.chart.addSeries(library.CandlestickSeries, { borderVisible: false });
    this.volumes = this.chart.addSeries(library.HistogramSeries, {
      priceScaleId: "", priceFormat: { type: "volume" }, lastValueVisible: false, priceLineVisible: false,
    });
    this.volumes.priceScale().applyOptions({ scaleMargins: { top: 0.84, bottom: 0 } });
    this.candles.priceScale().applyOptions({ scaleMargins: { top: 0.06, bottom: 0.18 } });
    this.chart.subscribeCrosshairMove((/** @type {any} */ at) => {
      this.pointed = at.time === undefined ? null : at.time * 1000;
      told(this.pointed);
    });
  }

  /** @param {number} decimals */
  style(decimals) {
    const [text, line, up, down] = ["--quiet", "--line", "--up", "--down"].map(colour);
    // It cannot read CSS variables, and the borders of its axes have colours of their own.
    this.chart.applyOptions({
      layout: { textColor: text },
      grid: { vertLines: { color: line }, horzLines: { color: line } },
      rightPriceScale: { borderColor: line },
      timeScale: { borderColor: line },
      localization: { locale: shownLanguage() === "zh" ? "zh-CN" : "en-GB" },
    });
    this.candles.applyOptions({
      upColor: up, downColor: down, wickUpColor: up, wickDownColor: down,
      priceFormat: { type: "price", precision: decimals, minMove: 1 / 10 ** decimals },
    });
    this.volumes.applyOptions({ color: line });
  }

  /** @param {Candle[]} bars @param {number} [shown] How many of them to show, of a new symbol. */
  set(bars, shown) {
    this.candles.setData(bars.map(drawn));
    this.volumes.setData(bars.map(amount));
    this.#last = bars.at(-1)?.time ?? -Infinity;
    if (shown !== undefined && bars.length > 0) {
      const from = Math.max(0, bars.length - shown);
      this.chart.timeScale().setVisibleLogicalRange({ from, to: bars.length + 4 });
    }
  }

  /** @param {Candle} bar @returns {boolean} False for a bar that it takes with all others only. */
  update(bar) {
    if (bar.time < this.#last) return false;
    this.#last = bar.time;
    this.candles.update(drawn(bar));
    this.volumes.update(amount(bar));
    return true;
  }
}

/** @param {Candle} bar */
function drawn({ time, open, high, low, close }) {
  return { time: time / 1000, open, high, low, close };
}

/** @param {Candle} bar */
function amount({ time, volume }) {
  return { time: time / 1000, value: volume ?? 0 };
}

/** @param {number} time In s. */
function mark(time) {
  const text = clock(time * 1000);
  return text.endsWith(":00") ? text.slice(0, -3) : text;
}

/** A line of the closes, where the library is not there. */
class CanvasDrawing {
  pointed = /** @type {number | null} */ (null);
  #bars = /** @type {Candle[]} */ ([]);
  #decimals = 2;

  /**
   * @param {HTMLElement} container
   * @param {(time: number | null) => void} told
   */
  constructor(container, told) {
    this.canvas = document.createElement("canvas");
    container.append(this.canvas);
    new ResizeObserver(() => this.#draw()).observe(container);
    this.canvas.addEventListener("pointermove", (event) => {
      const shown = this.#shown();
      const index = Math.round((event.offsetX / this.canvas.clientWidth) * (shown.length - 1));
      this.pointed = shown[index]?.time ?? null;
      told(this.pointed);
    });
    this.canvas.addEventListener("pointerleave", () => {
      this.pointed = null;
      told(null);
    });
  }

  /** @param {number} decimals */
  style(decimals) {
    this.#decimals = decimals;
  }

  /** @param {Candle[]} bars */
  set(bars) {
    this.#bars = bars;
    this.#draw();
  }

  /** @param {Candle} bar */
  update(bar) {
    if (this.#bars.at(-1)?.time === bar.time) this.#bars.pop();
    this.#bars.push(bar);
    this.#draw();
    return true;
  }

  #shown() {
    return this.#bars.slice(-SHOWN);
  }

  #draw() {
    const { canvas } = this;
    const { clientWidth: width, clientHeight: height } = canvas;
    const ratio = devicePixelRatio || 1;
    canvas.width = width * ratio;
    canvas.height = height * ratio;
    const context = canvas.getContext("2d");
    const shown = this.#shown();
    if (context === null || shown.length < 2) return;
    context.scale(ratio, ratio);
    const low = Math.min(...shown.map((bar) => bar.low));
    const high = Math.max(...shown.map((bar) => bar.high));
    const span = high - low || 1;
    const x = (/** @type {number} */ index) => 8 + (index / (shown.length - 1)) * (width - 90);
    const y = (/** @type {number} */ price) => 12 + ((high - price) / span) * (height - 24);
    context.strokeStyle = colour("--focus");
    context.lineWidth = 1.5;
    context.beginPath();
    shown.forEach((bar, index) => context.lineTo(x(index), y(bar.close)));
    context.stroke();
    context.fillStyle = colour("--quiet");
    context.font = "12px system-ui, sans-serif";
    for (const price of [high, (high + low) / 2, low]) {
      context.fillText(decimal(price, this.#decimals), width - 76, y(price) + 4);
    }
  }
}

/**
 * Draw the course of some prices, small.
 * @param {HTMLCanvasElement} canvas
 * @param {number[]} prices
 */
export function spark(canvas, prices) {
  const { clientWidth: width, clientHeight: height } = canvas;
  const ratio = devicePixelRatio || 1;
  if (canvas.width !== width * ratio) canvas.width = width * ratio;
  if (canvas.height !== height * ratio) canvas.height = height * ratio;
  const context = canvas.getContext("2d");
  if (context === null) return;
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  if (prices.length < 2) return;
  const low = Math.min(...prices);
  const span = Math.max(...prices) - low || 1;
  context.strokeStyle = colour(prices[prices.length - 1] >= prices[0] ? "--up" : "--down");
  context.lineWidth = 1.25;
  context.beginPath();
  prices.forEach((price, index) => {
    const x = 1 + (index / (prices.length - 1)) * (width - 2);
    context.lineTo(x, 2 + (1 - (price - low) / span) * (height - 4));
  });
  context.stroke();
}
