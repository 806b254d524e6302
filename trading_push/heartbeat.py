"""The heartbeat sweeper: one task looks after every connection, once a second.

It pings the peers that are silent, ends those that stay so, and tells of tokens that are to expire.
"""

from __future__ import annotations

from typing import Final

import trio

from trading_push.connection import Hub

__all__ = ["sweep"]

_PERIOD_S: Final = 1.0
"""At most; a quarter of a heartbeat that is shorter."""
_CHUNK: Final = 256
"""How many connections there are between two checkpoints."""


async def sweep(hub: Hub) -> None:
    """Look at every connection about once a second, until cancelled.

    Nothing heard for `limits.heartbeat_s`: a ping (RFC 6455 section 5.5.2), to which every client
    library answers by itself. Nothing for twice that: close 4002, or the end of the stream where
    the close frame does not go out either.
    """
    period_s = min(_PERIOD_S, hub.limits.heartbeat_s / 4)
    while True:
        await trio.sleep(period_s)
        for number, connection in enumerate(list(hub.connections), 1):
            connection.look_after(trio.current_time())
            if number % _CHUNK == 0:
                await trio.lowlevel.checkpoint()
