"""Check where accounts come from: that it answers, and each query or request for one user."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack, closing, nullcontext
from typing import Any, Final

import trio

from trading_push.auth.demo import data_dir
from trading_push.check.findings import Finding, guarded, words
from trading_push.factory import (
    PAPER_FILE,
    exchange_of,
    open_accounts,
    open_market,
    paper_accounts,
)
from trading_push.settings.schema import Settings
from trading_push.sources.base import Source, TickerFeed
from trading_push.sources.ccxt.source import CcxtSource
from trading_push.sources.exchanges.tape import Tape
from trading_push.sources.functions import FunctionSource
from trading_push.sources.offered import channels_for, offered_by
from trading_push.sources.sql.source import SqlSource
from trading_push.upstream.fetching import Fetcher

__all__ = ["accounts"]

_MADE_UP: Final = "0"
_MADE_UP_UUID: Final = "00000000-0000-0000-0000-000000000000"
_ABOUT_A_USER: Final = frozenset({400, 404, 410, 422})
"""What an HTTP service answers where it does not know a user."""


async def accounts(settings: Settings, user: str | None, timeout_s: float) -> list[Finding]:
    """Ask the place that accounts come from, and look at the channels that it makes."""
    async with AsyncExitStack() as opened:
        exchange = exchange_of(settings)
        source = open_accounts(settings, exchange, opened)
        if source is None:
            source = await _of_a_tape(settings, opened)
        found: list[Finding] = []
        if source is None:
            found, source = _paper(settings, opened)
        if source is not None:
            found += await _of_source(source, settings, user, timeout_s)
        own = [each.named(name) for name, each in settings.channels.items()]
        channels = channels_for(source, settings.intervals, own)
        names = ", ".join(each.name for each in channels)
        return [*found, Finding("ok", "channels", f"{names}, ticker.SYMBOL, ticker.*")]


async def _of_a_tape(settings: Settings, opened: AsyncExitStack) -> Source | None:
    if settings.market.tape is None:
        return None
    feed: TickerFeed | None = await open_market(settings, exchange_of(settings), opened)
    return feed.accounts if isinstance(feed, Tape) else None


def _paper(settings: Settings, opened: AsyncExitStack) -> tuple[list[Finding], Source | None]:
    """Look at the paper exchange's file, which is made by the first `serve`."""
    path = settings.database.path or data_dir() / PAPER_FILE
    if not path.exists():
        there = next(each for each in path.absolute().parents if each.exists())
        if not os.access(there, os.W_OK | os.X_OK):
            text = f"{path} cannot be made: let this user write in {there}, or set database.path"
            return [Finding("failed", "accounts", text)], None
        return [Finding("ok", "accounts", f"a paper exchange, which is made in {path}")], None
    with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as file:
        try:
            file.execute("PRAGMA schema_version").fetchone()
        except sqlite3.Error as error:
            text = f"{path} is no paper exchange's file ({error}): set database.path"
            return [Finding("failed", "accounts", text)], None
    source = paper_accounts(path, settings.database)
    opened.callback(source.close)
    return [Finding("ok", "accounts", f"the paper exchange in {path}")], source


async def _of_source(
    source: Source, settings: Settings, user: str | None, timeout_s: float
) -> list[Finding]:
    """Ask a source for one user's data of each type."""
    findings: list[Finding] = []
    if isinstance(source, SqlSource | CcxtSource):
        what = "database" if isinstance(source, SqlSource) else "exchange"

        async def check() -> list[Finding]:
            await source.check()
            return [Finding("ok", what, "it answers")]

        [found] = await guarded(what, check, timeout_s)
        findings.append(found)
        if found.state == "failed" and "the query of " not in found.text:
            return findings
    if isinstance(source, CcxtSource) and user is None:
        text = "no user's keys are tried: give --user ID"
        return [*findings, Finding("warning", "accounts", text)]
    asked = [_DataType(source, each, settings, user, timeout_s) for each in sorted(_types(source))]
    async with AsyncExitStack() as session:
        if isinstance(source, CcxtSource):
            assert user is not None
            await session.enter_async_context(source.session(user))
        async with trio.open_nursery() as nursery:
            for each in asked:
                nursery.start_soon(each.ask)
    return [*findings, *(each.found for each in asked)]


def _types(source: Source) -> Sequence[str]:
    offered = offered_by(source)
    return sorted(offered) if offered is not None else ("balance", "orders", "pnl", "positions")


class _DataType:
    """One data type of a source, asked for one user."""

    def __init__(
        self, source: Source, name: str, settings: Settings, user: str | None, timeout_s: float
    ) -> None:
        self._source = source
        self._name = name
        self._settings = settings
        self._is_made_up = user is None
        section: Any = settings.http
        if isinstance(source, SqlSource):
            section = settings.database
        elif isinstance(source, FunctionSource):
            section = settings.function
        self._user = user or (_MADE_UP_UUID if section.user_id == "uuid" else _MADE_UP)
        self._timeout_s = timeout_s
        self.found = Finding("failed", name, "it was not asked for")

    async def ask(self) -> None:
        [self.found] = await guarded(self._name, self._asked, self._timeout_s + 1)

    async def _asked(self) -> list[Finding]:
        fetcher = Fetcher(
            self._source,
            self._name,
            context=nullcontext,
            slots=1,
            batch=2,
            timeout_s=self._timeout_s,
        )
        began = time.perf_counter()
        try:
            answers = await fetcher.fetch([self._user], await fetcher.wait_for_slot(), _nothing)
            answer = answers.get(self._user)
            if isinstance(answer, Exception):
                raise answer
        except trio.TooSlowError:
            raise
        except Exception as error:
            if self._is_made_up and self._may_be_the_user(error):
                text = f"{words(error)} for the made-up user {self._user!r}: give --user ID"
                return [Finding("warning", self._name, text)]
            raise
        took_ms = (time.perf_counter() - began) * 1000
        whom = f"the made-up user {self._user!r}" if self._is_made_up else f"user {self._user!r}"
        return [Finding("ok", self._name, f"answered for {whom} in {took_ms:.0f} ms")]

    def _may_be_the_user(self, error: Exception) -> bool:
        """Whether it may well be that only this user cannot be asked for."""
        if isinstance(self._source, FunctionSource):
            return True
        if getattr(error, "status", None) in _ABOUT_A_USER:
            return True
        return isinstance(self._source, SqlSource) and not getattr(error, "retryable", True)


def _nothing() -> None:
    """A call that hangs in a thread has ended."""
