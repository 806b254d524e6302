"""Watches what is sent after a close, and how long a send waits that is never taken."""

from __future__ import annotations

import sys
import weakref
from typing import Any

import trio

from trading_push.endpoints.hypercorn.websocket import GuardedWSStream
from trading_push.errors import SendTimeout
from trading_push.transport.push_stream import PushStream

violations: list[str] = []
closes = 0
stalled_s: list[float] = []
"""How long each stream whose peer was too slow had waited, from its first refused write on."""
closed: weakref.WeakSet[Any] = weakref.WeakSet()


def install() -> None:
    """Record every `websocket.close` and each message or raw frame that comes after one."""
    original_send = GuardedWSStream.app_send
    original_frames = PushStream.send_frames
    original_aim = PushStream._aim

    async def app_send(self: GuardedWSStream, message: Any) -> None:
        global closes
        if message is not None:
            if self in closed:
                _violated(f"{message['type']} after a close")
            if message["type"] == "websocket.close":
                closes += 1
                closed.add(self)
                if self.push_stream is not None:
                    closed.add(self.push_stream)
        await original_send(self, message)

    async def send_frames(self: PushStream, frames: Any) -> None:
        after = self in closed
        began = trio.current_time()
        try:
            await original_frames(self, frames)
        except SendTimeout:
            stalled_s.append(trio.current_time() - began)
            raise
        if after:
            _violated("frames sent after a close")

    def aim(self: PushStream) -> None:
        original_aim(self)
        write = self.write_now
        if write is None:
            return
        stream = weakref.ref(self)

        def watched(frame: bytes) -> int:
            after = stream() in closed
            written = write(frame)
            if after:
                _violated("a frame written after a close")
            return written

        self.write_now = watched

    PushStream._aim = aim
    GuardedWSStream.app_send = app_send
    PushStream.send_frames = send_frames


def _violated(what: str) -> None:
    violations.append(what)
    print("RECORDER:", what, file=sys.stderr, flush=True)
