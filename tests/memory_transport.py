"""A peer in memory, for tests on the autojump clock."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import trio

from trading_push import protocol
from trading_push.errors import SendTimeout, TransportClosed
from trading_push.transport.base import Close


class MemoryTransport:
    """A `Transport` whose peer is the test.

    Args:
        direct: Whether `try_send` works, as over a plain socket.
    """

    peer = "10.0.0.1"

    def __init__(self, *, direct: bool = True, send_timeout_s: float = 10) -> None:
        self.sent: list[dict[str, Any]] = []
        self.events: list[str] = []
        self.closed_with: tuple[int, str] | None = None
        self.peer_close: Close | None = None
        self.reading = trio.Event()  # clear: the peer does not read, and sends get stuck
        self.reading.set()
        self._direct = direct
        self._send_timeout_s = send_timeout_s
        self._stuck: trio.CancelScope | None = None
        self._turn = trio.Lock()
        self._gone = False
        self._messages, self._inbox = trio.open_memory_channel[str | bytes](math.inf)
        self.news = trio.Event()

    # What the test does.

    def say(self, op: str, **fields: Any) -> None:
        self._messages.send_nowait(json.dumps({"op": op, **fields}))

    def say_text(self, text: str | bytes) -> None:
        self._messages.send_nowait(text)

    def leave(self, code: int | None = None, reason: str = "") -> None:
        if code is not None:
            self.peer_close = Close(code, reason)
        self._gone = True
        self._messages.close()

    async def next(self, count: int = 1) -> list[dict[str, Any]]:
        """Wait for so many messages and take them."""
        while len(self.sent) < count:
            self.news = trio.Event()
            await self.news.wait()
        taken, self.sent = self.sent[:count], self.sent[count:]
        return taken

    # What the connection does.

    def start(self, nursery: trio.Nursery) -> None:
        pass

    async def receive(self) -> str | bytes:
        try:
            return await self._inbox.receive()
        except trio.EndOfChannel:
            raise TransportClosed from None

    def try_send(self, frames: Sequence[bytes]) -> bool:
        if not self._direct or self._gone or not self.reading.is_set() or self._turn.locked():
            return False
        self._take(frames)
        return True

    def try_write(self, frame: bytes) -> bool:
        return self.try_send([frame])

    async def send(self, frames: Sequence[bytes]) -> None:
        await trio.lowlevel.checkpoint()
        async with self._turn:
            if self._gone or self.closed_with is not None:
                raise TransportClosed
            with trio.CancelScope(shield=True) as self._stuck:
                self._stuck.deadline = trio.current_time() + self._send_timeout_s
                await self.reading.wait()
            if self._stuck.cancelled_caught:
                self._gone = True
                raise SendTimeout
            self._take(frames)

    def _take(self, frames: Sequence[bytes]) -> None:
        assert self.closed_with is None, "sent after a close"
        self.sent += [json.loads(protocol.payload_of(frame)) for frame in frames]
        self.news.set()

    def hurry(self, grace_s: float) -> None:
        self.events.append("hurried")
        self._send_timeout_s = min(self._send_timeout_s, grace_s)
        if self._stuck is not None:
            self._stuck.deadline = min(self._stuck.deadline, trio.current_time() + grace_s)

    async def close(self, code: int, reason: str) -> None:
        assert self.closed_with is None, "closed twice"
        if not self._gone:
            self.closed_with = code, reason
        await trio.lowlevel.checkpoint()

    def abort(self) -> None:
        self.events.append("closed")
        self._gone = True
        self._messages.close()
