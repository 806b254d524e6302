"""Keeps a part of the service running: what raises is told of, and started again after a pause.

A loop of its own, without a library: one that retries has a switch for the whole process, which an
application's tests turn off, and then the first error would be the end of the part, and with it of
the service.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

import trio

__all__ = ["keep_running"]

_FIRST_PAUSE_S: Final = 1.0
_LAST_PAUSE_S: Final = 60.0

_Error = TypeVar("_Error", bound=Exception)


async def keep_running(
    run: Callable[[], Awaitable[None]],
    failed: Callable[[_Error, float], None],
    *,
    on: type[_Error] = Exception,  # type: ignore[assignment]
    first_s: float = _FIRST_PAUSE_S,
    last_s: float = _LAST_PAUSE_S,
    jitter_s: float = 0.0,
) -> None:
    """Run until `run` returns; each time it raises, start it again.

    The pause is a second at first and doubles up to a minute; who has run for longer than that
    begins with a second again. Cancellation ends it at once.

    Args:
        run: What is to go on.
        failed: Told the exception, and the seconds until the next start, jitter left out.
        on: What is answered with another start; anything else is raised.
        first_s: The first pause, in seconds.
        last_s: The longest pause.
        jitter_s: How much longer, at random, a pause is at most, so that many do not come back at
            the same moment.
    """
    next_s = first_s
    while True:
        began = trio.current_time()
        try:
            await _run(run, on, failed)
            return
        except on as error:
            pause_s, next_s = next_s, min(2 * next_s, last_s)
            if trio.current_time() - began > last_s:
                pause_s = next_s = first_s
            failed(error, pause_s)
        await trio.sleep(pause_s + random.uniform(0, jitter_s))


async def _run(
    run: Callable[[], Awaitable[None]], on: type[_Error], failed: Callable[[_Error, float], None]
) -> None:
    try:
        await run()
    except BaseExceptionGroup as group:
        # Cancelled, a nursery in it may raise more than that: the scope that it was cancelled by
        # must see nothing else, or it would raise the rest where nobody expects it.
        cancelled, rest = group.split(trio.Cancelled)
        if cancelled is None:
            raise
        if isinstance(rest, on):
            failed(rest, 0)
        raise cancelled from None
