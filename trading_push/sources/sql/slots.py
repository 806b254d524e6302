"""The worker threads that read: as many as connections, and not all of them for one data type."""

from __future__ import annotations

import trio

__all__ = ["TypeSlots"]


class TypeSlots:
    """The threads of one data type, which are among those of all; a limiter for `to_thread`.

    Without it one slow query could hold every thread, and the other types would wait for it.

    Args:
        most: How many threads the type may use at the same time.
        all_types: The threads of all types.
    """

    def __init__(self, most: int, all_types: trio.CapacityLimiter) -> None:
        self._own = trio.CapacityLimiter(most)
        self._all_types = all_types

    async def acquire_on_behalf_of(self, borrower: object) -> None:
        """Wait for a thread of the type's own, then for one of all; a cancellation takes none."""
        await self._own.acquire_on_behalf_of(borrower)
        try:
            await self._all_types.acquire_on_behalf_of(borrower)
        except BaseException:
            self._own.release_on_behalf_of(borrower)
            raise

    def release_on_behalf_of(self, borrower: object) -> None:
        """Give the thread back; called when it has ended, also after a cancellation."""
        self._all_types.release_on_behalf_of(borrower)
        self._own.release_on_behalf_of(borrower)
