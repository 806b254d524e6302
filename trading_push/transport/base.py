"""What a transport is: one peer that frames are sent to and messages received from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import attrs
import trio
from wsproto.connection import Connection
from wsproto.frame_protocol import FrameDecoder

from trading_push.errors import CloseCode

__all__ = ["ABNORMAL", "Close", "Transport", "Writer", "decoder_of", "most_fragments", "try_write"]


@attrs.frozen
class Close:
    """How a connection was closed: the first close frame sent or received."""

    code: int
    reason: str = ""
    ours: bool = False


ABNORMAL = Close(CloseCode.ABNORMAL)
"""The end without a close frame."""


def most_fragments(message_bytes: int) -> int:
    """In how many frames a message of so many bytes may come: the empty ones cost time, too."""
    return 64 + message_bytes // 64


def decoder_of(connection: Connection | None) -> FrameDecoder | None:
    """What takes a wsproto connection's frames apart; None where this wsproto has none to find."""
    decoder = getattr(getattr(connection, "_proto", None), "_frame_decoder", None)
    return decoder if isinstance(decoder, FrameDecoder) else None


class Writer(Protocol):
    """Writes without waiting: what the fan-out does at every delivery, with nothing between."""

    @property
    def write_now(self) -> Callable[[bytes], int] | None:
        """Takes whole frames, and returns how many bytes of them it took; synchronous.

        It raises OSError where it takes nothing. None where nothing may be written at once: a
        frame then goes by `Transport.send`, as after an OSError.
        """
        ...

    def flush_later(self, rest: bytes) -> None:
        """Send what `write_now` has not taken of a frame, before anything else; synchronous."""
        ...


def try_write(writer: Writer, data: bytes) -> bool:
    """Write one frame, or some that are joined, now; synchronous.

    Returns:
        False where nothing was written: `Transport.send` is to be used, which waits, or finds the
        peer gone and says so. True where all of it was, or the rest is being flushed.
    """
    write = writer.write_now
    if write is None:
        return False
    try:
        written = write(data)
    except OSError:
        return False
    if written < len(data):
        writer.flush_later(data[written:])
    return True


class Transport(Protocol):
    """One peer. Every endpoint hands a connection one of these.

    Frames are ready-made WebSocket text frames (`protocol.frames.frame`).
    """

    @property
    def endpoint(self) -> str:
        """Which way in it has come, for counts: `asgi`, `native`."""
        ...

    @property
    def peer(self) -> str:
        """The peer's address, for the log and for limits; client-made text is not escaped yet."""
        ...

    @property
    def peer_close(self) -> Close | None:
        """The close frame that decided, where one came or was sent below; None otherwise."""
        ...

    @property
    def gone(self) -> bool | None:
        """Whether the peer has hung up or its stream broke; None where that cannot be known."""
        ...

    @property
    def last_heard(self) -> float | None:
        """When bytes of the peer last came, by trio's clock.

        None where a ping frame cannot be sent: then its silence says nothing.
        """
        ...

    def start(self, nursery: trio.Nursery) -> None:
        """Take the connection's nursery, for what a short write left over."""
        ...

    async def receive(self) -> str | bytes:
        """The next message: text, or bytes for a binary message.

        Raises:
            TransportClosed: There is none to come.

        Cancellation loses no message.
        """
        ...

    async def send(self, frames: Sequence[bytes]) -> None:
        """Send some frames, in order and undivided.

        Raises:
            SendTimeout: The peer did not take them in time; the stream is aborted.
            TransportClosed: The peer is gone, or a close frame was sent.

        Cancellable while it waits for its turn, with nothing sent; not once writing has begun,
        which the send deadline bounds and `shorten_deadline` shortens.
        """
        ...

    @property
    def writer(self) -> Writer:
        """What writes at once; the same object as long as the transport lives."""
        ...

    def shorten_deadline(self, grace_s: float) -> None:
        """Give a send that is under way no longer than this; then the stream is aborted."""
        ...

    async def close(self, code: int, reason: str) -> None:
        """Send a close frame, once, and wait for the peer's; nothing is sent after it.

        Does nothing where the peer is gone. The caller bounds it; cancelled, the peer's answer is
        not waited for.
        """
        ...

    def abort(self) -> None:
        """Drop the peer at once; synchronous. A send under way ends with TransportClosed."""
        ...
