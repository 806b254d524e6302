"""Keeps a part of the service running: what raises is told of, and started again after a pause."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

import stamina
import trio

__all__ = ["keep_running"]

_FIRST_PAUSE_S: Final = 1.0
_LAST_PAUSE_S: Final = 60.0


async def keep_running(
    run: Callable[[], Awaitable[None]], failed: Callable[[Exception, float], None]
) -> None:
    """Run until `run` returns; each time it raises, start it again.

    The pause is a second at first and doubles up to a minute; who has run for longer than that
    begins with a second again. Cancellation ends it at once.

    Args:
        run: What is to go on.
        failed: Told the exception, and the seconds until the next start.
    """
    while True:
        async for attempt in stamina.retry_context(
            on=Exception,
            attempts=None,
            timeout=None,
            wait_initial=_FIRST_PAUSE_S,
            wait_max=_LAST_PAUSE_S,
            wait_jitter=0,
        ):
            began = trio.current_time()
            anew = False
            with attempt:
                try:
                    await run()
                    return
                except Exception as error:
                    anew = trio.current_time() - began > _LAST_PAUSE_S
                    failed(error, _FIRST_PAUSE_S if anew else attempt.next_wait)
                    if not anew:
                        raise
            if anew:
                await trio.sleep(_FIRST_PAUSE_S)
                break
