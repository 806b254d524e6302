"""Read the rows of a tape's CSV: which column is what, and what a time looks like.

The layouts are those of the exchanges' public data, by the names of a header or, without one, as
Binance has them: klines, trades and aggTrades of Binance, trades of Bybit and OKX.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import PurePath
from typing import Final, Literal

import attrs

from trading_push.errors import ConfigurationError
from trading_push.sources.exchanges.amounts import DECIMALS, Symbols, epoch_ns, number, price
from trading_push.sources.exchanges.ticker_state import Event
from trading_push.topics import canonical_symbol

__all__ = ["CsvParser", "Layout", "layout_of", "symbol_in"]

# A time that is written as one number, by how many digits it has; an epoch never has so many.
_DATES: Final = {8: "%Y%m%d", 12: "%Y%m%d%H%M", 14: "%Y%m%d%H%M%S", 17: "%Y%m%d%H%M%S%f"}
_FLOAT: Final = re.compile(r"[0-9]{1,20}\.[0-9]{0,20}|[0-9.]{1,20}[eE]\+?[0-9]{1,2}")
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


def _time_ns(text: str) -> int:
    """Read the time in a cell, in ns: an epoch, a date, or ISO 8601 (UTC unless it says more)."""
    text = text.strip()
    if text.isdecimal() and text.isascii():
        form = _DATES.get(len(text)) if text[:2] in ("19", "20") else None
        since = epoch_ns(int(text[:20])) if form is None else _since(_date(text, form))
    elif _FLOAT.fullmatch(text):
        whole = Decimal(text)
        unit_ns = epoch_ns(int(whole)) // int(whole)
        since = int(DECIMALS.multiply(whole, Decimal(unit_ns)))
    else:
        try:
            moment = datetime.fromisoformat(text.replace("/", "-").removesuffix(" UTC"))
        except ValueError:
            raise ValueError("a time is neither ISO nor an epoch") from None
        since = _since(moment if moment.tzinfo else moment.replace(tzinfo=UTC))
    if not _FIRST_NS <= since < _LAST_NS:
        raise ValueError("a time is not of the years 1990 to 2199")
    return since


_FIRST_NS: Final = 631_152_000 * 10**9
_LAST_NS: Final = 7_258_118_400 * 10**9


def _date(text: str, form: str) -> datetime:
    try:
        return datetime.strptime(text, form).replace(tzinfo=UTC)
    except ValueError:
        raise ValueError("a time is neither a date nor an epoch") from None


def _since(moment: datetime) -> int:
    since = moment - _EPOCH
    return (since.days * 86_400 + since.seconds) * 1_000_000_000 + since.microseconds * 1000


@attrs.frozen
class Layout:
    """Which column is what; `values` are price and quantity, or open, high, low, close, volume."""

    kind: Literal["trade", "kline"]
    time: int
    values: tuple[int, ...]
    symbol: int | None
    header: bytes | None


def _cells(line: bytes) -> list[str]:
    # OKX's headers are in GBK: what counts of them is ASCII. No number has other characters.
    return line.decode(errors="replace").strip().replace('"', "").split(",")


def layout_of(line: bytes) -> Layout | None:
    """Tell the layout by a line: by its names where it is a header, else by its cells."""
    cells = [cell.strip() for cell in _cells(line)]
    if not cells[0][:1].isdecimal():
        return _named_layout(cells, line)
    flags = [cell.lower() in ("true", "false") for cell in cells]
    if len(cells) in (12, 13) and not any(flags):
        return Layout("kline", 6, (1, 2, 3, 4, 5), 12 if len(cells) == 13 else None, None)
    # trades: id, price, quantity, quote quantity, time, maker; aggTrades: id, price, quantity,
    # first id, last id, time, maker. Both may have a last column for "best match".
    if len(cells) in (6, 7) and flags[5]:
        return Layout("trade", 4, (1, 2), None, None)
    if len(cells) in (7, 8) and flags[6]:
        return Layout("trade", 5, (1, 2), None, None)
    return None


def _named_layout(cells: Sequence[str], line: bytes) -> Layout | None:
    # OKX has two names in one: "trade_id/..." in English and in Chinese.
    at: dict[str, int] = {}
    for i, cell in enumerate(cells):
        at.setdefault(re.sub("[_ ]", "", cell.lower().partition("/")[0]), i)

    def first(*names: str) -> int | None:
        return next((at[name] for name in names if name in at), None)

    time = first(*_TIMES)
    if time is None:
        return None
    symbol, header = first("symbol", "instrumentname", "instid"), line.strip()
    candle = [first(name) for name in ("open", "high", "low", "close")]
    volume = first("volume", "vol")
    columns = [column for column in (*candle, volume) if column is not None]
    if len(columns) == 5:
        return Layout("kline", time, tuple(columns), symbol, header)
    at_price, at_quantity = first("price"), first("qty", "quantity", "size", "volume", "amount")
    if at_price is not None and at_quantity is not None:
        return Layout("trade", time, (at_price, at_quantity), symbol, header)
    return None


_TIMES: Final = (
    "closetime",
    "time",
    "transacttime",
    "timestamp",
    "createdtime",
    "exectime",
    "datetime",
    "date",
    "opentime",
)


class CsvParser:
    """Parses the rows of a CSV.

    Args:
        layout: Which column is what.
        symbol: The symbol of all rows, where no column holds it.
    """

    def __init__(self, layout: Layout, symbol: str | None) -> None:
        self._layout = layout
        self._symbol = symbol
        self._symbols = Symbols()

    def parse(self, line: bytes) -> list[Event]:
        """Read a row: one event, or none of a header."""
        layout = self._layout
        # A header may stand in the midst of files that were joined.
        if line.isspace() or (layout.header and line.strip() == layout.header):
            return []
        cells = _cells(line)
        _ = cells[max(layout.time, layout.symbol or 0, *layout.values)]  # are there so many?
        due_ns = _time_ns(cells[layout.time])
        symbol = self._symbol or self._symbols[cells[layout.symbol or 0]]
        if layout.kind == "trade":
            at_price, at_quantity = layout.values
            values = (price(cells[at_price]), number(cells[at_quantity]))
            return [Event(due_ns, due_ns // 1_000_000, symbol, "trade", values)]
        *prices, volume = layout.values
        candle = (*(price(cells[i]) for i in prices), number(cells[volume]))
        return [Event(due_ns, due_ns // 1_000_000, symbol, "kline", candle)]


# What stands behind the symbol in the exchanges' own names: BTCUSDT-1m-2025-01,
# BTC-USDT-trades-2025-04-19, BTCUSDT_2025-05-19, BTCUSDT2020-03-25.
_KNOWN_NAME: Final = re.compile(
    r"(.+?)[-_]?(?:(?:aggtrades|trades|candle\w*|klines?|[0-9]{1,2}(?:mo|[smhdw]))[-_.]"
    r"|20[0-9]{2}-[0-9]{2}|\.)",
    re.IGNORECASE,
)
_OTHER_NAME: Final = re.compile(r"([A-Z0-9]{5,24}(?:_(?:\d{6}|PERP))?)(?:[-_.].*)?")


def symbol_in(path: PurePath, *names: str) -> str:
    """Read the symbol in the name of a tape.

    Args:
        path: The tape's, for the error.
        names: Its name; of an archive, that of the file in it, and its own.

    Raises:
        ConfigurationError: There is none.
    """
    for name in names:
        for pattern in (_KNOWN_NAME, _OTHER_NAME):
            match = pattern.match(name)
            if match is None or len(match[1]) < 5 or re.search("[a-z]", match[1]):
                continue
            symbol = canonical_symbol(match[1])
            if symbol is not None and re.search(r"[^\W\d_]{3}", symbol):
                return symbol
    raise ConfigurationError(
        f"the tape {path} does not tell its symbol: give it a column 'symbol', or a file name "
        "that begins with it (BTCUSDT-trades-2024-08-08.csv)"
    )
