"""Check what settings lead to.

Each check has a deadline of its own, and one that fails does not keep the others from being made.
Nothing is written: no file is made, nothing is traded, and sources are only read.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import attrs
import trio

from trading_push.check import machine
from trading_push.check.accounts import accounts
from trading_push.check.findings import Check, Finding, guarded
from trading_push.check.market import market
from trading_push.settings.schema import Settings

__all__ = ["check_settings"]

_LOGGED: Final = 5
"""How many warnings that were logged meanwhile are told."""


async def check_settings(settings: Settings, user: str | None, timeout_s: float) -> list[Finding]:
    """Check what the settings lead to, all at the same time.

    Args:
        settings: What was loaded.
        user: Whose data sources are asked for; None for a user who is made up.
        timeout_s: How long each check may take.
    """
    checks: list[tuple[str, Check]] = [
        ("tokens", lambda: machine.tokens(settings)),
        ("address", lambda: machine.address(settings)),
        ("descriptors", lambda: machine.descriptors(settings)),
        ("log file", lambda: machine.log_file(settings)),
        ("market", lambda: market(settings, timeout_s)),
        ("accounts", lambda: accounts(settings, user, timeout_s)),
    ]
    found: dict[str, list[Finding]] = {}

    async def make(what: str, check: Check, limit_s: float) -> None:
        found[what] = await guarded(what, check, limit_s)

    with _warnings() as logged:
        async with trio.open_nursery() as nursery:
            for what, check in checks:
                # Those two bound each of their steps.
                has_steps = what in ("market", "accounts")
                nursery.start_soon(make, what, check, 4 * timeout_s if has_steps else timeout_s)
    findings = [each for what, _ in checks for each in found[what]]
    findings += [Finding("warning", "log", text) for text in dict.fromkeys(logged[:_LOGGED])]
    return [_without_secrets(each, settings) for each in findings]


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """Collect the warnings that the parts log meanwhile, in place of writing them."""
    found: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if getattr(record, "event", "") != "descriptors_too_few":  # which is told
                found.append(record.getMessage())

    logger, handler = logging.getLogger("trading_push"), Collect(logging.WARNING)
    kept = logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield found
    finally:
        logger.propagate = kept
        logger.removeHandler(handler)


def _without_secrets(finding: Finding, settings: Settings) -> Finding:
    """Take out whatever a setting keeps secret, should a library's own words hold it."""
    text = finding.text
    for secret in _secrets(settings):
        text = text.replace(secret, "***")
    return attrs.evolve(finding, text=text)


def _secrets(settings: Any) -> Iterator[str]:
    for field in attrs.fields(type(settings)):
        value = getattr(settings, field.name)
        if attrs.has(type(value)):
            yield from _secrets(value)
        elif field.repr is False and isinstance(value, str) and value:
            yield value
        elif field.repr is False and isinstance(value, Path):
            yield str(value)
