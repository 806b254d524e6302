"""Restart a part of the service that fails: report what it raised, wait, and run it again.

An application's function that asks to end the process (`sys.exit`) has failed like any other.

The loop is written here, without a library: retry libraries have a switch for the whole process,
which an application's tests turn off. The first error would then end the part, and the service.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Final, TypeVar

import trio

__all__ = ["ExitAsked", "back_off", "exits_are_errors", "keep_running"]

_FIRST_PAUSE_S: Final = 1.0
_LAST_PAUSE_S: Final = 60.0

_Error = TypeVar("_Error", bound=Exception)


class ExitAsked(RuntimeError):
    """An application's function has asked to end the process, which is not its to end."""

    def __init__(self) -> None:
        super().__init__("it asked to end the process (sys.exit): return, or raise an error")


@contextmanager
def exits_are_errors() -> Iterator[None]:
    """Run code of an application's; a SystemExit that it raises is an ExitAsked.

    Cancellation passes through it.
    """
    try:
        yield
    except SystemExit as error:
        raise ExitAsked from error
    except BaseExceptionGroup as group:
        if group.subgroup(SystemExit) is None:
            raise
        cancelled, _ = group.split(trio.Cancelled)
        raise (ExitAsked() if cancelled is None else cancelled) from group


def back_off(failures: int, first_s: float, last_s: float) -> float:
    """Compute the pause after some failures in a row, in seconds.

    It is `first_s` after the first failure, and doubles up to `last_s`.
    """
    # The exponent is bounded because a float would overflow after a thousand failures.
    return min(first_s * 2.0 ** min(max(failures - 1, 0), 100), last_s)


async def keep_running(
    run: Callable[[], Awaitable[None]],
    failed: Callable[[_Error, float], None],
    *,
    on: type[_Error] = Exception,  # type: ignore[assignment]
    first_s: float = _FIRST_PAUSE_S,
    last_s: float = _LAST_PAUSE_S,
    jitter_s: float = 0.0,
) -> None:
    """Run until `run` returns; each time it raises, start it again after a pause.

    The pauses are those of `back_off`; a run that lasted longer than `last_s` starts them anew.
    Cancellation ends the loop at once.

    Args:
        run: The part to keep running.
        failed: Called with the exception and the seconds until the next start, without the jitter.
        on: Which exceptions are answered with another start; others are raised.
        first_s: The first pause, in seconds.
        last_s: The longest pause, in seconds.
        jitter_s: Up to how many random seconds a pause is extended by, so that many parts do not
            come back at the same moment.
    """
    failures = 0
    while True:
        began = trio.current_time()
        try:
            await _run(run, on, failed)
            return
        except on as error:
            failures = 0 if trio.current_time() - began > last_s else failures + 1
            pause_s = back_off(failures, first_s, last_s)
            failed(error, pause_s)
        await trio.sleep(pause_s + random.uniform(0, jitter_s))


async def _run(
    run: Callable[[], Awaitable[None]], on: type[_Error], failed: Callable[[_Error, float], None]
) -> None:
    try:
        with exits_are_errors():
            await run()
    except BaseExceptionGroup as group:
        # A cancelled nursery may raise other exceptions beside Cancelled. The scope that was
        # cancelled must see nothing else, or it would raise the rest where it is not expected.
        cancelled, rest = group.split(trio.Cancelled)
        if cancelled is None:
            raise
        if isinstance(rest, on):
            failed(rest, 0)
        raise cancelled from None
