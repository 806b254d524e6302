"""Tables of the latest values, as `trading-push watch` shows them on a terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

import attrs
import trio
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from trading_push.cli.escaping import escaped
from trading_push.client.client import Client
from trading_push.client.messages import Push
from trading_push.topics import symbol_of

__all__ = ["Tables"]

# The columns of the tables: the field of the payload, the heading, and how it is shown.
_PLAIN, _NUMBER, _SIGNED, _SIDE = range(4)
_COLUMNS: Final[dict[str, tuple[tuple[str, str, int], ...]]] = {
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
}
_TITLES: Final = {
    "balance": "Balance",
    "positions": "Positions",
    "pnl": "PnL",
    "orders": "Open orders",
}
_GREEN: Final = frozenset({"buy", "long"})
_RED: Final = frozenset({"sell", "short"})


@attrs.define
class _Shown:
    """The latest of one channel."""

    data: Any = None  # the last value
    has_data: bool = False  # whether there was one
    state: str = "live"  # the last status, and its reason
    reason: str | None = None
    at: float = 0  # when the last push came, by trio's clock; 0 for never


class Tables:
    """The latest values as tables.

    Args:
        channels: The channels to show, in this order, also before they have a value.
    """

    def __init__(self, channels: Sequence[str]) -> None:
        self._shown = {channel: _Shown() for channel in channels}

    async def show(self, push: Push) -> None:
        """Take a push; the next `render` shows it. No checkpoint."""
        shown = self._shown.setdefault(push.channel, _Shown())
        shown.at = trio.current_time()
        if push.type == "status":
            shown.state, shown.reason = push.state or "?", push.reason
        else:
            shown.data, shown.has_data = push.data, True
            shown.state, shown.reason = "live", None

    def render(self, client: Client, url: str) -> RenderableType:
        """Make all tables, with the age of each value."""
        if client.is_connected:
            head = Text(f"{escaped(url)}  user {escaped(client.user or '?')}", style="bold")
        else:
            head = Text(f"reconnecting: {escaped(client.trouble or '')}", style="bold yellow")
        tickers = {c: s for c, s in self._shown.items() if symbol_of(c) is not None}
        others = {c: s for c, s in self._shown.items() if c not in tickers}
        parts: list[RenderableType] = [head]
        if tickers:
            parts.append(self._tickers(tickers))
        parts += [self._channel(channel, shown) for channel, shown in others.items()]
        return Group(*parts)

    def _tickers(self, tickers: Mapping[str, _Shown]) -> Table:
        columns = _COLUMNS["ticker"]
        table = _table("Tickers", columns)
        table.add_column("State")
        table.add_column("Age", justify="right")
        for channel, shown in tickers.items():
            row = shown.data if isinstance(shown.data, dict) else {"symbol": symbol_of(channel)}
            table.add_row(*_cells(row, columns), _state(shown), _age(shown))
        return table

    def _channel(self, channel: str, shown: _Shown) -> Table:
        data = shown.data
        rows = data if isinstance(data, list) else [] if data is None else [data]
        if channel == "pnl" and isinstance(data, dict):
            by_symbol = data.get("by_symbol")
            rows = [*(by_symbol if isinstance(by_symbol, list) else []), {**data, "symbol": "all"}]
        rows = [row if isinstance(row, dict) else {"value": row} for row in rows]
        # An application's own channel shows whatever its rows hold.
        keys = dict.fromkeys(key for row in rows for key in row)
        columns = _COLUMNS.get(channel) or tuple((key, escaped(key), _PLAIN) for key in keys)
        title = Text(escaped(_TITLES.get(channel, channel)) + "  ")
        title.append_text(_state(shown))
        title.append_text(_age(shown))
        table = _table(title, columns)
        for row in rows:
            table.add_row(*_cells(row, columns))
        if not rows and shown.has_data:
            table.caption = Text("none")
        return table


def _table(title: str | Text, columns: Sequence[tuple[str, str, int]]) -> Table:
    # Without a frame, which would cost a screen of 24 lines two tables.
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
    )
    for _, heading, kind in columns:
        table.add_column(heading, justify="right" if kind in (_NUMBER, _SIGNED) else "left")
    return table


def _cells(row: Mapping[str, Any], columns: Sequence[tuple[str, str, int]]) -> list[Text]:
    return [_cell(row.get(field), kind) for field, _, kind in columns]


def _cell(value: object, kind: int) -> Text:
    if value is None:
        return Text("-", style="dim")
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    style = ""
    if kind == _SIGNED:
        style = _colour_of_sign(text)
    elif kind == _SIDE:
        style = "green" if text in _GREEN else "red" if text in _RED else ""
    return Text(escaped(text), style=style)


def _colour_of_sign(text: str) -> str:
    if not any(digit in text for digit in "123456789"):
        return ""
    return "red" if text.startswith("-") else "green"


def _state(shown: _Shown) -> Text:
    if not shown.at:
        return Text("waiting", style="dim")
    style = {"live": "green", "stale": "yellow"}.get(shown.state, "red")
    reason = f" ({escaped(shown.reason)})" if shown.reason else ""
    return Text(escaped(shown.state) + reason, style=style)


def _age(shown: _Shown) -> Text:
    return Text(f" {trio.current_time() - shown.at:.0f} s" if shown.at else "", style="dim")
