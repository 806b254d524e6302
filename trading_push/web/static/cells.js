/**
 * Cells and rows that change: what arrives is only stored, and shown once a frame.
 * @module cells
 */

/** A cell is marked as changed at most twice a second. */
const MARK_EVERY_MS = 500;
const MARK_MS = 350;
const MARKS = ["changed", "changed-up", "changed-down"];

const dirty = /** @type {Set<() => void>} */ (new Set());
let asked = false;

/**
 * Have something shown in the next frame, once however often it is asked for.
 * @param {() => void} show The same function each time.
 */
export function inNextFrame(show) {
  dirty.add(show);
  if (asked) return;
  asked = true;
  requestAnimationFrame(() => {
    asked = false;
    const now = [...dirty];
    dirty.clear();
    for (const each of now) each();
  });
}

/** A table cell, or another element with one text. */
export class Cell {
  #text = "";
  #markedAt = -MARK_EVERY_MS;
  #timer = /** @type {ReturnType<typeof setTimeout> | undefined} */ (undefined);

  /** @param {HTMLElement} element */
  constructor(element) {
    this.element = element;
  }

  /**
   * Show a text.
   * @param {string} text
   * @param {number | null} [direction] Mark a change: above 0 as up, below as down, 0 as either;
   *   null not at all.
   */
  show(text, direction = null) {
    if (text === this.#text) return;
    const isFirst = this.#text === "";
    this.#text = text;
    this.element.textContent = text;
    if (direction === null || isFirst) return;
    const now = performance.now();
    if (now - this.#markedAt < MARK_EVERY_MS) return;
    this.#markedAt = now;
    const mark = direction > 0 ? "changed-up" : direction < 0 ? "changed-down" : "changed";
    this.element.classList.remove(...MARKS);
    this.element.classList.add(mark);
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.element.classList.remove(mark), MARK_MS);
  }

  /**
   * Colour by the direction of a value.
   * @param {number} value
   */
  colour(value) {
    this.element.classList.toggle("up", value > 0);
    this.element.classList.toggle("down", value < 0);
  }
}

/** The rows of a table's body, each with a key. */
export class Rows {
  #rows = /** @type {Map<string, { row: HTMLTableRowElement, cells: Cell[] }>} */ (new Map());
  #empty = /** @type {HTMLTableRowElement | null} */ (null);

  /**
   * @param {HTMLTableElement} table Its head says how many columns there are, and of what class.
   */
  constructor(table) {
    this.body = table.tBodies[0];
    this.columns = [...(table.tHead?.rows[0].cells ?? [])].map((each) => each.className);
  }

  /**
   * The cells of a row, which is made where there is none.
   * @param {string} key
   */
  at(key) {
    let found = this.#rows.get(key);
    if (found === undefined) {
      const row = document.createElement("tr");
      const cells = this.columns.map((name) => {
        const cell = document.createElement("td");
        cell.className = name;
        row.append(cell);
        return new Cell(cell);
      });
      row.dataset.key = key;
      found = { row, cells };
      this.#rows.set(key, found);
      this.body.append(row);
    }
    return found;
  }

  /**
   * Keep the rows of these keys only, in their order.
   * @param {string[]} keys
   */
  keep(keys) {
    const wanted = new Set(keys);
    for (const [key, { row }] of this.#rows) {
      if (!wanted.has(key)) {
        row.remove();
        this.#rows.delete(key);
      }
    }
    keys.forEach((key, index) => {
      const { row } = this.at(key);
      if (this.body.rows[index] !== row) this.body.insertBefore(row, this.body.rows[index] ?? null);
    });
    if (keys.length > 0) this.say("");
  }

  /**
   * Say why there is no row; "" says nothing.
   * @param {string} text
   */
  say(text) {
    if (text === "") {
      this.#empty?.remove();
      this.#empty = null;
      return;
    }
    if (this.#empty === null) {
      this.#empty = document.createElement("tr");
      const cell = document.createElement("td");
      cell.className = "empty";
      cell.colSpan = this.columns.length;
      this.#empty.append(cell);
      this.body.append(this.#empty);
    }
    const cell = this.#empty.cells[0];
    if (cell.textContent !== text) cell.textContent = text;
  }
}
