/**
 * The words of the pages in both languages, and how numbers and times are written.
 * @module words
 */

const WORDS = {
  en: {
    user: "User", palette: "Colours", "palette-green": "green up", "palette-red": "red up",
    "palette-blue": "blue / orange", theme: "Dark or light", language: "Language", keys: "Keys",
    token: "Token", remember: "Keep it until this tab is closed", connect: "Connect",
    market: "Market", "add-symbol": "add a symbol", symbol: "Symbol", last: "Last", bid: "Bid",
    ask: "Ask", change: "24 h", trend: "Trend", age: "Age", interval: "Interval", chart: "Candles",
    pnl: "Profit and loss", balance: "Balance", positions: "Positions", orders: "Open orders",
    fills: "Fills", asset: "Asset", free: "Free", locked: "Locked", total: "Total", side: "Side",
    quantity: "Quantity", entry: "Entry", mark: "Mark", unrealized: "Unrealized", price: "Price",
    filled: "Filled", created: "Placed", time: "Time", fee: "Fee", log: "This connection",
    close: "Close",
    realized: "Realized", fees: "Fees",
    rtt: "Round trip", rate: "Pushes a second", long: "long", short: "short", buy: "buy",
    sell: "sell", market_order: "market", none: "nothing", waiting_for: "waiting for the first value",
    not_offered: "not served here", live: "live", stale: "stale", down: "no data", since: "since",
    merged: "merged", open: "connected", connecting: "connecting", waiting: "reconnecting in",
    ended: "ended", lost: "The connection is lost: what you see is of", resumed: "resumed",
    gap: "missed on the way, asked for again", slow: "this page was too slow, left out",
    refused: "refused", notice: "the server says", shutdown: "it restarts",
    token_expires: "the token is about to expire", no_token: "Give a token of this server.",
    "key-symbol": "next or former symbol", "key-interval": "1 second or 1 minute",
    "key-theme": "dark or light", "key-language": "中文", "key-palette": "next colours",
    "key-add": "add a symbol", "key-help": "these keys", open_at: "O", high_at: "H", low_at: "L",
    close_at: "C", volume_at: "V",
  },
  zh: {
    user: "用户", palette: "配色", "palette-green": "绿涨红跌", "palette-red": "红涨绿跌",
    "palette-blue": "蓝涨橙跌", theme: "深色或浅色", language: "语言", keys: "快捷键",
    token: "令牌", remember: "保留到关闭此标签页", connect: "连接", market: "行情",
    "add-symbol": "添加币种", symbol: "币种", last: "最新价", bid: "买一", ask: "卖一",
    change: "24 小时", trend: "走势", age: "更新", interval: "周期", chart: "K 线", pnl: "盈亏",
    balance: "余额", positions: "持仓", orders: "当前委托", fills: "成交", asset: "资产",
    free: "可用", locked: "冻结", total: "合计", side: "方向", quantity: "数量", entry: "开仓价",
    mark: "标记价", unrealized: "未实现盈亏", price: "价格", filled: "已成交", created: "委托时间",
    time: "时间", fee: "手续费", log: "本连接",
    close: "关闭",
    realized: "已实现盈亏", fees: "手续费", rtt: "往返",
    rate: "每秒推送", long: "多", short: "空", buy: "买", sell: "卖", market_order: "市价",
    none: "无", waiting_for: "等待第一个值", not_offered: "此服务器不提供", live: "实时",
    stale: "已过时", down: "无数据", since: "自", merged: "合并", open: "已连接",
    connecting: "连接中", waiting: "重连倒计时", ended: "已结束", lost: "连接已断开，显示的是",
    resumed: "已恢复", gap: "途中有遗漏，已重新请求", slow: "页面太慢，略过", refused: "被拒绝",
    notice: "服务器通知", shutdown: "即将重启", token_expires: "令牌即将到期",
    no_token: "请输入此服务器的令牌。",
    "key-symbol": "下一个或上一个币种",
    "key-interval": "1 秒或 1 分钟", "key-theme": "深色或浅色", "key-language": "English",
    "key-palette": "换配色", "key-add": "添加币种", "key-help": "这些快捷键", open_at: "开",
    high_at: "高", low_at: "低", close_at: "收", volume_at: "量",
  },
};

let language = /** @type {"en" | "zh"} */ ("en");

/** The language that is shown, `en` or `zh`. */
export function shownLanguage() {
  return language;
}

/**
 * The word for a key.
 * @param {string} key
 * @returns {string}
 */
export function word(key) {
  return /** @type {Record<string, string>} */ (WORDS[language])[key] ?? key;
}

/**
 * Show a language, in all elements that name their words.
 * @param {"en" | "zh"} wanted
 */
export function showLanguage(wanted) {
  language = wanted;
  document.documentElement.lang = wanted === "zh" ? "zh-CN" : "en";
  for (const element of document.querySelectorAll("[data-text]")) {
    element.textContent = word(/** @type {HTMLElement} */ (element).dataset.text ?? "");
  }
  for (const element of document.querySelectorAll("[data-title]")) {
    element.setAttribute("title", word(/** @type {HTMLElement} */ (element).dataset.title ?? ""));
  }
  for (const element of document.querySelectorAll("[data-label]")) {
    element.setAttribute("aria-label", word(/** @type {HTMLElement} */ (element).dataset.label ?? ""));
  }
  for (const element of document.querySelectorAll("[data-placeholder]")) {
    const { placeholder } = /** @type {HTMLElement} */ (element).dataset;
    element.setAttribute("placeholder", word(placeholder ?? ""));
  }
}

/**
 * How many decimals a decimal string has.
 * @param {unknown} text
 */
export function decimalsOf(text) {
  return (String(text ?? "").split(".")[1] ?? "").length;
}

/**
 * Write a decimal with thousands apart, without losing a digit of it.
 * @param {unknown} value A decimal string as the server sends it, or a number.
 * @param {number} [decimals] How many to show; all that there are by default.
 * @returns {string} "–" where there is none.
 */
export function decimal(value, decimals) {
  if (value === null || value === undefined || value === "") return "–";
  let text = String(value);
  if (!/^[-+]?\d+(\.\d+)?$/.test(text)) {
    if (typeof value !== "number" || !Number.isFinite(value)) return text;
    text = value.toFixed(decimals ?? 8);
  }
  const negative = text.startsWith("-");
  let [whole, part = ""] = text.replace(/^[-+]/, "").split(".");
  if (decimals !== undefined) {
    if (part.length > decimals) {
      [whole, part = ""] = Math.abs(Number(text)).toFixed(decimals).split(".");
    }
    part = part.padEnd(decimals, "0");
  }
  whole = whole.replace(/\B(?=(\d{3})+$)/g, ",");
  const isZero = !/[1-9]/.test(whole + part);
  return `${negative && !isZero ? "−" : ""}${whole}${part ? `.${part}` : ""}`;
}

/**
 * Write an amount with its sign and its direction beside it, so that colour is not all that tells.
 * @param {number} value
 * @param {number} decimals
 */
export function signed(value, decimals) {
  const text = decimal(value.toFixed(decimals), decimals);
  return value > 0 && /[1-9]/.test(text) ? `+${text}` : text;
}

/**
 * The time of day.
 * @param {number} ms Since the epoch.
 */
export function clock(ms) {
  return new Date(ms).toLocaleTimeString(language === "zh" ? "zh-CN" : "en-GB", { hour12: false });
}

/**
 * Write a duration.
 * @param {number} ms
 */
export function duration(ms) {
  const s = Math.max(0, ms) / 1000;
  if (s < 10) return `${s.toFixed(1)} s`;
  if (s < 100) return `${Math.round(s)} s`;
  if (s < 5400) return `${Math.round(s / 60)} min`;
  return `${Math.round(s / 3600)} h`;
}
