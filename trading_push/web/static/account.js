/**
 * The panels of an account, tied up with the market: what is open is valued at the last price.
 * @module account
 */

import { Cell, inNextFrame, Rows } from "./cells.js";
import { clock, decimal, decimalsOf, duration, signed, word } from "./words.js";

const FILLS_SHOWN = 100;
/** A panel whose data were not confirmed for so long says how old they are in a warning colour. */
const CHANNELS = ["balance", "positions", "pnl", "orders", "fills"];

/** @param {string} id @returns {HTMLElement} */
function element(id) {
  return /** @type {HTMLElement} */ (document.getElementById(id));
}

/** What is known of one channel. */
class Panel {
  data = /** @type {any} */ (undefined);
  ts = 0;
  state = "waiting";
  reason = "";
  since = 0;
  merged = 1;
  refused = "";
}

/** The account of the user who is signed in. */
export class Account {
  #panels = new Map(CHANNELS.map((channel) => [channel, new Panel()]));
  #rows = new Map(["balance", "positions", "orders", "fills"].map(
    (id) => [id, new Rows(/** @type {HTMLTableElement} */ (element(id)))],
  ));
  #ages = new Map(CHANNELS.map((channel) => [channel, new Cell(element(`${channel}-age`))]));
  #fills = /** @type {any[]} */ ([]);
  #totals = /** @type {Map<string, Cell>} */ (new Map());
  #footer = /** @type {Cell[]} */ ([]);
  #show = () => this.#draw();

  /**
   * @param {import("./trading-push.js").Client} client
   * @param {import("./market.js").Market} market
   */
  constructor(client, market) {
    this.market = market;
    for (const [channel, panel] of this.#panels) {
      client.subscribe(channel, (push) => this.#take(channel, panel, push));
    }
    this.#makeTotals();
    this.refresh();
  }

  /**
   * A channel is not served.
   * @param {string} channel
   * @param {string} why
   */
  refuse(channel, why) {
    const panel = this.#panels.get(channel);
    if (panel !== undefined) panel.refused = why;
    inNextFrame(this.#show);
  }

  /** Show all of it anew: prices, ages or words have changed. */
  refresh() {
    inNextFrame(this.#show);
  }

  /**
   * @param {string} channel
   * @param {Panel} panel
   * @param {import("./trading-push.js").Push} push
   */
  #take(channel, panel, push) {
    panel.refused = "";
    if (push.type === "status") {
      panel.state = push.state ?? "live";
      panel.reason = push.reason ?? "";
      panel.since = push.ts;
    } else if (push.type !== "gap") {
      panel.data = push.data;
      panel.ts = push.ts;
      panel.merged = push.merged ?? 1;
      if (panel.state !== "stale" || push.type === "update") panel.state = "live";
      if (channel === "fills" && push.data) {
        this.#fills = [push.data, ...this.#fills.filter((fill) => fill.fill_id !== push.data.fill_id)];
        this.#fills.length = Math.min(this.#fills.length, FILLS_SHOWN);
      }
    }
    inNextFrame(this.#show);
  }

  #makeTotals() {
    const list = element("pnl");
    list.replaceChildren();
    for (const key of ["total", "realized", "unrealized", "fees"]) {
      const group = document.createElement("div");
      const term = document.createElement("dt");
      const value = document.createElement("dd");
      term.dataset.text = key;
      term.textContent = word(key);
      if (key === "total") group.className = "main";
      group.append(term, value);
      list.append(group);
      this.#totals.set(key, new Cell(value));
    }
  }

  /** The mark price of a position by now, and whether it is that of the market. @param {any} position */
  #mark(position) {
    const quote = this.market.quote(position.symbol);
    const isLive = quote !== undefined && quote.state === "live" && !Number.isNaN(quote.last);
    return isLive ? quote.last : Number(position.mark_price);
  }

  /** @param {any} position */
  #unrealized(position) {
    const sign = position.side === "short" ? -1 : 1;
    const value = (this.#mark(position) - Number(position.entry_price)) * Number(position.quantity) * sign;
    return Number.isNaN(value) ? Number(position.unrealized_pnl) : value;
  }

  #draw() {
    this.#drawAges();
    this.#drawBalance();
    const open = this.#drawPositions();
    this.#drawPnl(open);
    this.#drawOrders();
    this.#drawFills();
  }

  #drawAges() {
    for (const [channel, panel] of this.#panels) {
      let text;
      if (panel.refused !== "") text = word("not_offered");
      else if (panel.state === "waiting") text = word("waiting_for");
      else if (panel.state === "live") {
        const merged = panel.merged > 1 ? ` · ${word("merged")} ×${panel.merged}` : "";
        const age = panel.ts === 0 ? "" : ` · ${duration(this.market.age(panel.ts))}`;
        text = `${word("live")}${age}${merged}`;
      } else text = `${word(panel.state)} ${word("since")} ${clock(panel.since)}: ${panel.reason}`;
      this.#ages.get(channel)?.show(text);
      const isOld = panel.state === "stale" || panel.state === "down";
      element(channel).classList.toggle("old", isOld && panel.data !== undefined);
    }
  }

  /** @param {string} channel @param {number} count */
  #sayEmpty(channel, count) {
    const panel = this.#panels.get(channel);
    if (count > 0 || panel === undefined) return;
    const isKnown = panel.data !== undefined || panel.reason === "quiet";
    const text = panel.refused !== "" ? "not_offered" : isKnown ? "none" : "waiting_for";
    this.#rows.get(channel)?.say(word(text));
  }

  /** @param {string} channel @returns {any[]} */
  #list(channel) {
    const data = this.#panels.get(channel)?.data;
    return Array.isArray(data) ? data : [];
  }

  #drawBalance() {
    const rows = this.#rows.get("balance");
    const assets = this.#list("balance");
    rows?.keep(assets.map((each) => String(each.asset)));
    for (const each of assets) {
      const cells = rows?.at(String(each.asset)).cells ?? [];
      // Large amounts have no room for a dozen decimals; the title has all of them.
      const most = Math.abs(Number(each.total)) >= 1000 ? 2 : 8;
      const decimals = Math.min(most, Math.max(...[each.free, each.locked, each.total].map(decimalsOf)));
      cells[0]?.show(String(each.asset));
      ["free", "locked", "total"].forEach((key, at) => {
        const cell = cells[at + 1];
        cell?.show(decimal(each[key], decimals), 0);
        if (cell !== undefined) cell.element.title = decimal(each[key]);
      });
    }
    this.#sayEmpty("balance", assets.length);
  }

  #drawPositions() {
    const rows = this.#rows.get("positions");
    const positions = this.#list("positions");
    const keys = positions.map((each) => `${each.symbol} ${each.side}`);
    rows?.keep(keys);
    let open = 0;
    positions.forEach((each, at) => {
      const cells = rows?.at(keys[at]).cells ?? [];
      const decimals = this.market.quote(each.symbol)?.decimals || decimalsOf(each.entry_price);
      const unrealized = this.#unrealized(each);
      open += unrealized;
      cells[0]?.show(String(each.symbol));
      cells[1]?.show(word(each.side));
      cells[1]?.colour(each.side === "long" ? 1 : -1);
      cells[2]?.show(decimal(each.quantity), 0);
      cells[3]?.show(decimal(each.entry_price, decimals));
      cells[4]?.show(decimal(this.#mark(each), decimals));
      cells[5]?.show(signed(unrealized, 2), null);
      cells[5]?.colour(unrealized);
    });
    this.#sayEmpty("positions", positions.length);
    this.#drawSum(positions.length > 0, open);
    return positions.length > 0 || this.#panels.get("positions")?.data !== undefined ? open : NaN;
  }

  /** @param {boolean} isThere @param {number} open */
  #drawSum(isThere, open) {
    const table = /** @type {HTMLTableElement} */ (element("positions"));
    const foot = /** @type {HTMLTableSectionElement} */ (table.tFoot);
    foot.hidden = !isThere;
    if (this.#footer.length === 0) {
      const row = foot.insertRow();
      for (const name of this.#rows.get("positions")?.columns ?? []) {
        const cell = row.insertCell();
        cell.className = name;
        this.#footer.push(new Cell(cell));
      }
    }
    this.#footer[0].show(word("total"));
    this.#footer[5].show(signed(open, 2));
    this.#footer[5].colour(open);
  }

  /** @param {number} open What the open positions are worth; NaN if that is not known. */
  #drawPnl(open) {
    const pnl = this.#panels.get("pnl")?.data;
    if (!pnl || typeof pnl !== "object") return;
    const [realized, fees] = [Number(pnl.realized), Number(pnl.fees)];
    const unrealized = Number.isNaN(open) ? Number(pnl.unrealized) : open;
    const currency = pnl.currency ? ` ${pnl.currency}` : "";
    const values = { total: realized + unrealized - fees, realized, unrealized, fees: -fees };
    for (const [key, value] of Object.entries(values)) {
      const cell = this.#totals.get(key);
      cell?.show(Number.isNaN(value) ? "–" : `${signed(value, 2)}${key === "total" ? currency : ""}`);
      cell?.colour(key === "fees" ? 0 : value);
    }
  }

  #drawOrders() {
    const rows = this.#rows.get("orders");
    const orders = this.#list("orders");
    rows?.keep(orders.map((each) => String(each.order_id)));
    for (const each of orders) {
      const cells = rows?.at(String(each.order_id)).cells ?? [];
      const decimals = this.market.quote(each.symbol)?.decimals || decimalsOf(each.price);
      cells[0]?.show(String(each.symbol));
      cells[1]?.show(word(each.side));
      cells[1]?.colour(each.side === "buy" ? 1 : -1);
      cells[2]?.show(each.price == null ? word("market_order") : decimal(each.price, decimals));
      cells[3]?.show(decimal(each.quantity));
      cells[4]?.show(decimal(each.filled), 0);
      cells[5]?.show(each.created_at == null ? "–" : clock(Number(each.created_at)));
    }
    this.#sayEmpty("orders", orders.length);
  }

  #drawFills() {
    const rows = this.#rows.get("fills");
    rows?.keep(this.#fills.map((each) => String(each.fill_id)));
    for (const each of this.#fills) {
      const cells = rows?.at(String(each.fill_id)).cells ?? [];
      const decimals = this.market.quote(each.symbol)?.decimals || decimalsOf(each.price);
      cells[0]?.show(clock(Number(each.at)));
      cells[1]?.show(String(each.symbol));
      cells[2]?.show(word(each.side));
      cells[2]?.colour(each.side === "buy" ? 1 : -1);
      cells[3]?.show(decimal(each.price, decimals));
      cells[4]?.show(decimal(each.quantity));
      cells[5]?.show(`${decimal(each.fee)} ${each.fee_asset ?? ""}`);
    }
    this.#sayEmpty("fills", this.#fills.length);
  }
}
