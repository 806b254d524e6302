"""Tables of the latest values, as `trading-push watch` shows them on a terminal."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import attrs
import trio
from rich.cells import cell_len
from rich.segment import Segment
from rich.style import Style

from trading_push.cli.escaping import escaped
from trading_push.cli.numbers import Decimals
from trading_push.cli.viewport import Section, SegmentLine
from trading_push.client.client import Client
from trading_push.client.messages import Push
from trading_push.client.table import Table
from trading_push.topics import ALL_TICKERS, symbol_of

__all__ = ["Tables"]

# The columns of the tables: the field of the payload, the heading, and how it is shown.
_PLAIN, _NUMBER, _SIGNED, _SIDE, _TIME = range(5)
_Columns = Sequence[tuple[str, str, int]]
_COLUMNS: Final[dict[str, _Columns]] = {
    "ticker": (
        ("symbol", "Symbol", _PLAIN),
        ("last", "Last", _NUMBER),
        ("bid", "Bid", _NUMBER),
        ("ask", "Ask", _NUMBER),
        ("change", "Change", _SIGNED),
        ("change_pct", "Change %", _SIGNED),
    ),
    "balance": (
        ("asset", "Asset", _PLAIN),
        ("free", "Free", _NUMBER),
        ("locked", "Locked", _NUMBER),
        ("total", "Total", _NUMBER),
    ),
    "positions": (
        ("symbol", "Symbol", _PLAIN),
        ("side", "Side", _SIDE),
        ("quantity", "Quantity", _NUMBER),
        ("entry_price", "Entry", _NUMBER),
        ("mark_price", "Mark", _NUMBER),
        ("unrealized_pnl", "Unrealized PnL", _SIGNED),
    ),
    "pnl": (
        ("symbol", "Symbol", _PLAIN),
        ("realized", "Realized", _SIGNED),
        ("unrealized", "Unrealized", _SIGNED),
        ("fees", "Fees", _NUMBER),
        ("total", "Total", _SIGNED),
    ),
    "orders": (
        ("symbol", "Symbol", _PLAIN),
        ("side", "Side", _SIDE),
        ("type", "Type", _PLAIN),
        ("price", "Price", _NUMBER),
        ("quantity", "Quantity", _NUMBER),
        ("filled", "Filled", _NUMBER),
        ("status", "Status", _PLAIN),
        ("order_id", "Order", _PLAIN),
    ),
    "fills": (
        ("at", "Time", _TIME),
        ("symbol", "Symbol", _PLAIN),
        ("side", "Side", _SIDE),
        ("price", "Price", _NUMBER),
        ("quantity", "Quantity", _NUMBER),
        ("fee", "Fee", _NUMBER),
        ("fee_asset", "", _PLAIN),
        ("order_id", "Order", _PLAIN),
    ),
}
_COLUMNS[ALL_TICKERS.channel] = _COLUMNS["ticker"]
_TITLES: Final = {
    "balance": "Balance",
    "positions": "Positions",
    "pnl": "PnL",
    "orders": "Open orders",
    "fills": "Fills",
}
_GREEN: Final = frozenset({"buy", "long"})
_RED: Final = frozenset({"sell", "short"})
_EVENTS: Final = 50
"""How many events of a channel are shown."""
_WIDEST: Final = 200
"""How many characters of one value are shown."""
_GAP: Final = "  "
"""Between two columns."""

_Cell = tuple[str, str]
"""A text and its style."""


@attrs.define
class _Shown:
    """The latest of one channel."""

    data: Any = None  # the last value
    has_data: bool = False  # whether there was one
    # The last events with their numbers, the newest first; None where the latest value counts.
    events: deque[tuple[tuple[str | None, int | None], Any]] | None = None
    table: Table | None = None  # what there is by now, of a channel whose pushes tell changes
    lost: int = 0  # how many events never came
    state: str = "live"  # the last status, and its reason
    reason: str | None = None
    at: float | None = None  # when it was last confirmed, on trio's clock; None for never
    lines: list[SegmentLine] | None = None  # below the title; None where they are to be made anew


class Tables:
    """The latest values as tables.

    Args:
        channels: The channels to show, in this order, also before they have a value.
    """

    def __init__(self, channels: Sequence[str]) -> None:
        self._decimals = Decimals()
        self._shown: dict[str, _Shown] = {}
        for channel in channels:
            self._shown_of(channel)

    def _shown_of(self, channel: str) -> _Shown:
        shown = self._shown.get(channel)
        if shown is None:
            shown = self._shown[channel] = _Shown()
            if channel == "fills":
                shown.events = deque(maxlen=_EVENTS)
            elif channel == ALL_TICKERS.channel:
                shown.table = Table()
        return shown

    async def show(self, push: Push) -> None:
        """Take a push; the next `sections` show it. No checkpoint."""
        shown = self._shown_of(push.channel)
        if push.type == "status":
            shown.state, shown.reason = push.state or "?", push.reason
            return
        shown.at = trio.current_time()
        shown.data, shown.has_data, shown.lines = push.data, True, None
        shown.state, shown.reason = "live", None
        if shown.table is not None:
            shown.table.apply(push)
            shown.data = [*shown.table.rows.values()]
        if shown.events is not None:
            shown.lost += push.dropped
            event = ((push.epoch, push.seq), push.data)
            # A snapshot after a new connection may be the event that was the last one before.
            if not any(_is_same(event, each) for each in shown.events):
                shown.events.appendleft(event)

    def confirm(self, client: Client) -> None:
        """Note that the server vouches for all that is live, where it was heard of."""
        for channel, shown in self._shown.items():
            if shown.events is None and client.is_of_events(channel):
                shown.events = deque(maxlen=_EVENTS)
            if client.is_connected and shown.at is not None and shown.state == "live":
                shown.at = max(shown.at, client.heard_at)

    def head(self, client: Client, url: str) -> SegmentLine:
        """Make the line above the tables: where they come from, and whether they do."""
        if client.is_connected:
            return _line((f"{escaped(url)}  user {escaped(client.user or '?')}", "bold"))
        trouble = escaped(client.trouble or "")
        return _line((f"reconnecting: {trouble}"[:_WIDEST], "bold yellow"))

    def sections(self) -> list[Section]:
        """Make all tables, with the age of each value."""
        tickers = {c: s for c, s in self._shown.items() if symbol_of(c) is not None}
        others = [each for each in self._shown.items() if each[0] not in tickers]
        known = list(_TITLES)
        others.sort(key=lambda each: known.index(each[0]) if each[0] in known else len(known))
        sections = [self._channel(channel, shown) for channel, shown in others]
        return [self._tickers(tickers), *sections] if tickers else sections

    def _tickers(self, tickers: Mapping[str, _Shown]) -> Section:
        columns = _COLUMNS["ticker"]
        rows = [
            shown.data if isinstance(shown.data, dict) else {"symbol": symbol_of(channel)}
            for channel, shown in tickers.items()
        ]
        cells = self._cells("ticker", rows, columns)
        for row, shown in zip(cells, tickers.values(), strict=True):
            row += [_state(shown), _age(shown)]
        columns = (*columns, ("", "State", _PLAIN), ("", "Age", _NUMBER))
        return Section("Tickers", [_line(("Tickers", "bold")), *_table(columns, cells)])

    def _channel(self, channel: str, shown: _Shown) -> Section:
        name = escaped(_TITLES.get(channel, channel))[:_WIDEST]
        title = [(name, "bold"), (_GAP, ""), _state(shown), (" ", ""), _age(shown)]
        if shown.events is not None and shown.has_data:
            lost = f", {shown.lost} lost" if shown.lost else ""
            title.append((f"  the last {len(shown.events)}, the newest first{lost}", "dim"))
        if shown.lines is None:
            shown.lines = self._body(channel, shown)
        return Section(name, [_line(*title), *shown.lines])

    def _body(self, channel: str, shown: _Shown) -> list[SegmentLine]:
        rows = _rows(channel, shown)
        if not rows:
            return [_line(("none", "dim"))] if shown.has_data else []
        # An application's own channel shows whatever its rows hold.
        keys = dict.fromkeys(key for row in rows for key in row)
        columns = _COLUMNS.get(channel) or [(key, escaped(key)[:_WIDEST], _PLAIN) for key in keys]
        return _table(columns, self._cells(channel, rows, columns))

    def _cells(
        self, table: str, rows: Sequence[Mapping[str, Any]], columns: _Columns
    ) -> list[list[_Cell]]:
        """Make the cells of a table, the numbers of each column with as many decimals."""
        texts = [[_text(row.get(field)) for field, _, _ in columns] for row in rows]
        for row in texts:
            for (field, _, kind), text in zip(columns, row, strict=True):
                if text is not None and kind in (_NUMBER, _SIGNED):
                    self._decimals.note((table, field), text)
        return [
            [
                self._cell((table, field), text, kind)
                for (field, _, kind), text in zip(columns, row, strict=True)
            ]
            for row in texts
        ]

    def _cell(self, column: object, text: str | None, kind: int) -> _Cell:
        if text is None:
            return "-", "dim"
        style = ""
        if kind in (_NUMBER, _SIGNED):
            style = _colour_of_sign(text) if kind == _SIGNED else ""
            text = self._decimals.show(column, text)
        elif kind == _SIDE:
            style = "green" if text in _GREEN else "red" if text in _RED else ""
        elif kind == _TIME:
            text = _time(text)
        text = escaped(text)
        return text if len(text) <= _WIDEST else text[: _WIDEST - 3] + "...", style


def _is_same(event: tuple[object, Any], other: tuple[object, Any]) -> bool:
    if event[0] == other[0]:
        return True
    ids = [each[1].get("fill_id") for each in (event, other) if isinstance(each[1], dict)]
    return len(ids) == 2 and ids[0] is not None and ids[0] == ids[1]


def _rows(channel: str, shown: _Shown) -> list[Mapping[str, Any]]:
    """The rows of a channel's table."""
    data = shown.data
    if shown.events is not None:
        rows = [event for _, event in shown.events]
    else:
        rows = data if isinstance(data, list) else [] if data is None else [data]
    if channel == "pnl" and isinstance(data, dict):
        by_symbol = data.get("by_symbol")
        rows = [*(by_symbol if isinstance(by_symbol, list) else []), {**data, "symbol": "all"}]
    return [row if isinstance(row, dict) else {"value": row} for row in rows]


def _line(*cells: _Cell) -> SegmentLine:
    return [Segment(text, Style.parse(style)) for text, style in cells]


def _table(columns: _Columns, rows: Iterable[Sequence[_Cell]]) -> list[SegmentLine]:
    """Put cells into columns: numbers end together, all else begins together.

    Rich's own table takes twenty times as long, several times a second. There are no lines round
    it, which would cost a screen of 24 lines two tables.
    """
    rows = [[(heading, "dim") for _, heading, _ in columns], *rows]
    widths = [max([cell_len(text) for text, _ in cells]) for cells in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells: list[_Cell] = []
        for (text, style), (_, _, kind), width in zip(row, columns, widths, strict=True):
            blanks = " " * (width - cell_len(text))
            cells.append((blanks + text if kind in (_NUMBER, _SIGNED) else text + blanks, style))
            cells.append((_GAP, ""))
        lines.append(_line(*cells[:-1]))
    return lines


def _text(value: object) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False)


def _time(text: str) -> str:
    """The time of day of a moment in ms, here; whatever else it is stays as it is."""
    try:
        return time.strftime("%H:%M:%S", time.localtime(int(text) / 1000))
    except (ValueError, OverflowError, OSError):
        return text


def _colour_of_sign(text: str) -> str:
    if not any(digit in text for digit in "123456789"):
        return ""
    return "red" if text.startswith("-") else "green"


def _state(shown: _Shown) -> _Cell:
    if shown.at is None and shown.state == "live" and shown.reason is None:
        return "waiting", "dim"
    style = {"live": "green", "stale": "yellow"}.get(shown.state, "red")
    reason = f" ({escaped(shown.reason)})" if shown.reason else ""
    return (escaped(shown.state) + reason)[:_WIDEST], style


def _age(shown: _Shown) -> _Cell:
    if shown.at is None:
        return "", ""
    return f"{max(0, trio.current_time() - shown.at):.0f} s", "dim"
