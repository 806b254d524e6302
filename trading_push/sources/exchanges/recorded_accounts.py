"""The account channels of a recording, as a source: each user has what was recorded of them."""

from __future__ import annotations

from typing import NamedTuple

import msgspec
import trio

from trading_push.sources.base import ChangeSink
from trading_push.topics import BUILTIN_CHANNELS

__all__ = ["CHANNELS", "AccountPush", "RecordedAccounts"]

CHANNELS = (*BUILTIN_CHANNELS, "fills")


class AccountPush(NamedTuple):
    """One push of a user's channel in a recording.

    Args:
        due_ns: When it was received, in ns since the epoch.
        user: Whose it is.
        channel: One of `CHANNELS`.
        data: The payload, as JSON.
    """

    due_ns: int
    user: str
    channel: str
    data: bytes


class RecordedAccounts:
    """Gives each user's last value, and tells of each push as it is played; a `WatchingSource`.

    A user of whom nothing was recorded has no values.
    """

    def __init__(self) -> None:
        # The last value, by user and channel; of states only.
        self._last: dict[tuple[str, str], bytes] = {}
        # Who is to be told; None while no user is watched.
        self._sink: ChangeSink | None = None

    async def fetch(self, user_id: str, data_type: str) -> msgspec.Raw | None:
        """Return what the user's channel shows now. A checkpoint."""
        await trio.lowlevel.checkpoint()
        data = self._last.get((user_id, data_type))
        return None if data is None else msgspec.Raw(data)

    async def watch(self, sink: ChangeSink) -> None:
        """Tell the sink of each push, until cancelled."""
        self._sink = sink
        try:
            await trio.sleep_forever()
        finally:
            self._sink = None

    def play(self, push: AccountPush) -> None:
        """Show a push to its user, now; synchronous."""
        if push.channel != "fills":
            self._last[push.user, push.channel] = push.data
        if self._sink is not None:
            self._sink.publish([(push.channel, msgspec.Raw(push.data), push.user)])
