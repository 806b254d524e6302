"""Find for whom a source fails, where one call for many users has failed.

1. Whether the source answers at all is asked first, for some users alone, side by side. If it
   answers for none of them, it is an outage: nothing more is asked.
2. A call that failed at once is repeated in halves, and so on down to single users. One that took
   long is repeated in pieces, and each piece that takes long as well user by user: so whoever has
   nothing to do with the fault waits for two time-outs at most.
3. All of it runs side by side, as far as the source's free slots reach.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Final

import trio

__all__ = ["find_failing"]

_SAMPLES: Final = 6
"""How many users of the failed call are asked for alone, to see whether the source answers."""
_PIECE: Final = 25
_SLOW_S: Final = 0.25
"""A call that fails later than this is not repeated in halves, each of which may take as long."""

Ask = Callable[[Sequence[str]], Awaitable[Exception | None]]


async def find_failing(
    ask: Ask,
    users: Sequence[str],
    took_s: float,
    *,
    good: Sequence[str] | None,
    known: Callable[[], None],
) -> dict[str, Exception] | None:
    """Find whom a failed call has failed for; the others have got their answers on the way.

    Cancellation ends all calls that are under way.

    Args:
        ask: Asks for some users, publishes the answers, and returns what it failed with.
        users: Whom the failed call was for; two or more.
        took_s: How long the failed call took, in seconds.
        good: Some other users, whom the source has answered for lately; None where it is known
            already that the source answers.
        known: Called once it is known that the source answers.

    Returns:
        The error of each user that the source fails for; None if it answers for nobody.
    """
    samples = [] if good is None else users[:: max(1, len(users) // _SAMPLES)][:_SAMPLES]
    failing: dict[str, Exception] = {}
    answers, open_samples = good is None, len(samples) + len(good or ())
    # Set when the source has answered, or has failed for all the samples.
    decided = trio.Event()

    async def sample(user: str) -> None:
        nonlocal open_samples, answers
        error = await ask([user])
        open_samples -= 1
        if error is None:
            answers = True
        elif user in sampled:
            failing[user] = error
        if answers or not open_samples:
            decided.set()

    async def narrow(part: Sequence[str]) -> None:
        began = trio.current_time()
        error = await ask(part)
        if error is None:
            return
        if len(part) == 1:
            failing[part[0]] = error
            return
        for piece in _pieces(part, trio.current_time() - began):
            nursery.start_soon(narrow, piece)

    sampled = frozenset(samples)
    async with trio.open_nursery() as nursery:
        if not answers:
            for user in (*(good or ()), *samples):
                nursery.start_soon(sample, user)
            await decided.wait()
        # A sample that takes long need not be waited for.
        if answers:
            known()
            rest = [user for user in users if user not in sampled]
            for piece in _pieces(rest, took_s):
                nursery.start_soon(narrow, piece)
    return failing if answers else None


def _pieces(users: Sequence[str], took_s: float) -> Iterator[Sequence[str]]:
    """Cut users into the pieces that are asked for next."""
    size = (len(users) + 1) // 2
    if took_s >= _SLOW_S:
        size = _PIECE if len(users) > _PIECE else 1
    for start in range(0, len(users), max(1, size)):
        yield users[start : start + size]
