"""The stream under an endpoint: a deadline on each send, and writes without a task switch.

Rules, each learnt where it was broken:

1. One first-in-first-out turn for every write; waiting for it counts against the deadline.
2. What a short write left over is flushed at once by a task of its own, before anything else.
3. Before a frame that begins with 0x88 (close) the stream is sealed: nothing of ours follows it.
   It stands behind what the peer has not taken yet, and whoever leaves is not waited for long.
4. The whole stream interface is implemented; nothing is handed on by `__getattr__`.
5. A descriptor is never kept, for it may by then be somebody else's socket: a raw write goes
   through the socket object, which knows when it was closed.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import trio
from wsproto.frame_protocol import FrameDecoder

from trading_push.errors import SendTimeout, TransportClosed

__all__ = ["PushStream", "TlsPushStream", "wrap"]

_CHUNK: Final = 65_536
_AFTER_THE_HEARTBEAT_S: Final = 3.0
_CLOSE: Final = 0x88  # FIN and the close opcode (RFC 6455 section 5.2)
_EMPTY_PONG: Final = b"\x8a\x80"  # FIN and the pong opcode; masked, without a payload
_EMPTY_PONG_BYTES: Final = 6  # those two, and the mask

Bytes = bytes | bytearray | memoryview


class _AtEachDelivery:
    # First among the slots, beside the reference count: see `subscription.py`.
    __slots__ = ("write_now",)


class PushStream(_AtEachDelivery, trio.abc.HalfCloseableStream):
    """A stream whose every send has a deadline; over a plain socket it also offers `write_now`.

    It is longer than 300 lines because it is the whole stream interface, and all of it takes turns.

    Args:
        stream: The stream underneath.
        send_timeout_s: How long one send may take, its wait for a turn included.
        close_timeout_s: The same from the close frame on.
        on_end: Called once, at the peer's end of file, at a broken stream or at our close.
    """

    __slots__ = (
        "__weakref__",
        "_bare",
        "_close_timeout_s",
        "_decoder",
        "_is_plain",
        "_nursery",
        "_on_end",
        "_sealed",
        "_send_timeout_s",
        "_stream",
        "_taken",
        "_waiting",
        "_writing",
        "ended",
        "last_heard",
        "timed_out",
    )

    def __init__(
        self,
        stream: trio.abc.Stream,
        send_timeout_s: float,
        close_timeout_s: float,
        *,
        on_end: Callable[[], None] = lambda: None,
    ) -> None:
        self._stream: Any = stream
        self._is_plain = False
        if isinstance(stream, trio.SocketStream):
            self._stream, self._bare = _with_bare_socket(stream)
            self._is_plain = True
        self._send_timeout_s = send_timeout_s
        self._close_timeout_s = close_timeout_s
        self._on_end = on_end
        self._waiting: trio.lowlevel.ParkingLot | None = None  # made when first two want to write
        self._taken = False
        self._writing: trio.CancelScope | None = None
        self._nursery: trio.Nursery | None = None
        self._decoder: FrameDecoder | None = None
        self._sealed = False
        self.ended = False
        """Whether nothing more comes: the peer's end of file, a broken stream, or our close."""
        self.last_heard = trio.current_time()
        self.timed_out = False
        self.write_now: Callable[[bytes], int] | None = None
        """The socket's own `send`; None where its turn is taken, it is sealed, or no plain one.

        A method of the socket object: it raises OSError once that is closed (rule 5).
        """
        self._aim()

    @property
    def socket(self) -> trio.socket.SocketType:
        """The socket underneath (AttributeError over TLS)."""
        return self._stream.socket  # type: ignore[no-any-return]

    @property
    def peer(self) -> str:
        """The peer's address; "-" where there is none."""
        try:
            name = self._bare_socket().getpeername()
        except OSError:
            return "-"
        return str(name[0]) if isinstance(name, tuple) else "-"

    def start(self, nursery: trio.Nursery) -> None:
        """Take the nursery for flushes of what a short write left over."""
        self._nursery = nursery

    def skip_pongs(self, decoder: FrameDecoder | None) -> None:
        """Read over the answers to our pings, which nothing above has a use for.

        All that a pong says is in `last_heard`; on its way through the protocol it would cost more
        than a delivery. With thousands of connections that are pushed to and never speak, there is
        little else to read.

        Args:
            decoder: Of the WebSocket that has this stream to itself: it knows where a frame begins.
        """
        self._decoder = decoder

    # --- whose turn it is to write ---------------------------------------------------------

    def _aim(self) -> None:
        free = self._is_plain and not self._taken and not self._sealed
        self.write_now = self._bare.send if free else None

    def _take(self) -> None:
        self._taken = True
        self.write_now = None

    async def _take_turn(self) -> None:
        # Not a trio.Lock: a turn taken by the fan-out is given back by the task that flushes.
        if self._taken:
            if self._waiting is None:
                self._waiting = trio.lowlevel.ParkingLot()
            await self._waiting.park()  # handed over by whoever had it
        else:
            await trio.lowlevel.checkpoint_if_cancelled()
            self._take()

    def _give_turn(self) -> None:
        if self._waiting:
            self._waiting.unpark()
        else:
            self._taken = False
            self._aim()

    def _seal(self) -> None:
        self._sealed = True
        self.write_now = None

    # --- writing ---------------------------------------------------------------------------

    def flush_later(self, rest: bytes) -> None:
        """Send what `write_now` has not taken of a frame, before anything else.

        Where the connection's nursery has ended meanwhile, the stream is closed by force: half a
        frame is out, and nothing can follow it.
        """
        assert self._nursery is not None, "start() comes before the first write"
        self._take()
        try:
            self._nursery.start_soon(self._flush, rest)
        except RuntimeError:  # "Nursery is closed to new arrivals"
            self.abort()

    async def _flush(self, rest: bytes) -> None:
        # The turn is taken already. Whoever finds the peer gone is the next to send.
        try:
            await self._write(rest, trio.current_time() + self._send_timeout_s)
        except TransportClosed:
            pass
        finally:
            self._give_turn()

    async def send_frames(self, frames: Sequence[bytes]) -> None:
        """Write some frames, waiting as long as the deadline allows.

        Cancellable while it waits for its turn, with nothing written.

        Raises:
            SendTimeout: The deadline has passed; the stream is closed by force.
            TransportClosed: The stream is sealed, closed or broken.
        """
        if self._sealed:
            raise self._gone("a close frame was sent")
        await self._in_turn(frames[0] if len(frames) == 1 else b"".join(frames), ours=True)

    async def _in_turn(self, data: Bytes, *, ours: bool) -> None:
        sent = self._send_now(data)
        if sent == len(data):
            await trio.lowlevel.cancel_shielded_checkpoint()
            return
        deadline = trio.current_time() + self._send_timeout_s
        if sent:
            self._take()
        else:
            with trio.CancelScope(deadline=deadline) as waiting:
                await self._take_turn()
            if waiting.cancelled_caught:
                self._give_up()
        try:
            if ours and self._sealed and not sent:
                raise self._gone("a close frame was sent")
            await self._write(memoryview(data)[sent:], deadline)
        finally:
            self._give_turn()

    def _send_now(self, data: Bytes) -> int:
        # Most often the socket takes it all at once: no deadline is needed for that, nor a scope.
        if self._taken or not self._is_plain or self._send_timeout_s <= 0:
            return 0
        try:
            return self._bare.send(data)
        except OSError:
            return 0

    async def _write(self, data: Bytes, deadline: float) -> None:
        # Shielded: cancelled in the middle, it would leave half a frame behind.
        try:
            with trio.CancelScope(deadline=deadline, shield=True) as self._writing:
                await self._stream.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise self._gone("the peer is gone") from error
        finally:
            scope, self._writing = self._writing, None
        if scope is not None and scope.cancelled_caught:
            self._give_up()

    def _give_up(self) -> None:
        self.timed_out = True
        self.abort()
        raise self._gone()

    def _gone(self, why: str = "") -> TransportClosed:
        # Whoever wrote before may have met the deadline: that is why, for all.
        if self.timed_out:
            return SendTimeout("the peer did not take a send in time")
        return TransportClosed(why)

    def shorten_deadline(self, grace_s: float) -> None:
        """Give a write that is under way, and each later one, no longer than this."""
        self._send_timeout_s = min(self._send_timeout_s, grace_s)
        if self._writing is not None:
            deadline = trio.current_time() + grace_s
            self._writing.deadline = min(self._writing.deadline, deadline)

    async def send_all(self, data: Bytes) -> None:
        """Send for the protocol above, in turn; a close frame seals the stream.

        Raises:
            BrokenResourceError: The peer is gone or too slow.
            ClosedResourceError: The stream was closed.
        """
        if len(data) and data[0] == _CLOSE:
            self._seal()
            self.shorten_deadline(self._close_timeout_s)
        try:
            await self._in_turn(data, ours=False)
        except TransportClosed as error:
            raise trio.BrokenResourceError(str(error)) from error

    async def wait_send_all_might_not_block(self) -> None:
        """Wait until a send might not block; BusyResourceError where one is under way."""
        with self._turn_or_busy():
            await self._stream.wait_send_all_might_not_block()

    async def send_eof(self) -> None:
        """Send the end of file; BusyResourceError where a send is under way."""
        with self._turn_or_busy():
            await self._stream.send_eof()

    @contextmanager
    def _turn_or_busy(self) -> Iterator[None]:
        if self._taken:
            raise trio.BusyResourceError("another task is sending")
        self._take()
        try:
            yield
        finally:
            self._give_turn()

    # --- reading and the end ---------------------------------------------------------------

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Some bytes of the peer; b"" at its end of file."""
        data, broken = b"", None
        try:
            if self._is_plain:
                data = await self._receive(max_bytes or _CHUNK)
            else:
                data = await self._stream.receive_some(max_bytes)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            broken = error
        if data:
            self.last_heard = trio.current_time()
            return data
        self._end()
        await _turn_to_leave()
        if broken is not None:
            try:
                raise broken
            finally:
                del broken  # which has this frame in its trace
        return data

    async def _receive(self, max_bytes: int) -> bytes:
        # As trio's own stream does, in one frame where that has four: every connection waits here.
        await trio.lowlevel.checkpoint_if_cancelled()
        waited = False
        while True:
            try:
                data = self._bare.recv(max_bytes)
                if not (len(data) == _EMPTY_PONG_BYTES and self._is_pong(data)):
                    break
                self.last_heard = trio.current_time()
            except BlockingIOError:
                pass  # waited for outside, where the exception is not kept alive
            except OSError as error:
                if self._bare.fileno() < 0:
                    raise trio.ClosedResourceError("this socket was closed") from None
                raise trio.BrokenResourceError(f"the socket is broken: {error}") from error
            await trio.lowlevel.wait_readable(self._bare)
            waited = True
        if not waited:
            await trio.lowlevel.cancel_shielded_checkpoint()
        return data

    def _is_pong(self, data: bytes) -> bool:
        decoder = self._decoder
        return (
            data.startswith(_EMPTY_PONG)
            and decoder is not None
            and decoder.header is None  # not within the payload of a frame
            and not decoder.buffer  # nor within the head of one
        )

    def _end(self) -> None:
        if not self.ended:
            self.ended = True
            self._on_end()

    async def aclose(self) -> None:
        """Close the stream; a write under way ends with an error.

        TLS says good-bye first, within a second; cancelled or late, the socket is just closed.
        """
        self._seal()
        self._end()
        with trio.move_on_after(1):
            await self._stream.aclose()

    def abort(self) -> None:
        """Close the socket at once, without a last; synchronous."""
        self._seal()
        self._end()
        self._bare_socket().close()

    def _bare_socket(self) -> trio.socket.SocketType:
        stream = self._stream
        while not hasattr(stream, "socket"):
            stream = stream.transport_stream
        return stream.socket  # type: ignore[no-any-return]

    def set_user_timeout(self, heartbeat_s: float) -> None:
        """Let the kernel drop a peer that acknowledges nothing (Linux).

        Later than the heartbeat, which says why: at the same time, a peer that was being pushed to
        would end now with 4002 and now with 1006.
        """
        seconds = 2 * heartbeat_s + _AFTER_THE_HEARTBEAT_S
        option = getattr(socket, "TCP_USER_TIMEOUT", None)
        bare = self._bare_socket()
        if option is not None and bare.family in (socket.AF_INET, socket.AF_INET6):
            bare.setsockopt(socket.IPPROTO_TCP, option, round(seconds * 1000))


class TlsPushStream(PushStream):
    """A PushStream over TLS: no raw writes, and what a server asks of a TLS stream."""

    __slots__ = ()

    @property
    def transport_stream(self) -> trio.abc.Stream:
        """The stream under the TLS."""
        return self._stream.transport_stream  # type: ignore[no-any-return]

    async def do_handshake(self) -> None:
        """The TLS handshake."""
        await self._stream.do_handshake()

    def selected_alpn_protocol(self) -> str | None:
        """The protocol that the TLS handshake has agreed on."""
        return self._stream.selected_alpn_protocol()  # type: ignore[no-any-return]


# Where thousands are cut at once, all their ends would be one turn of the event loop, and nobody
# accepted meanwhile, nor anything pushed: so many go in a turn.
_LEAVING: Final = trio.CapacityLimiter(256)


async def _turn_to_leave() -> None:
    async with _LEAVING:
        await trio.lowlevel.checkpoint()


def _with_bare_socket(stream: trio.SocketStream) -> tuple[trio.SocketStream, socket.socket]:
    # trio keeps the socket object under its own to itself: the descriptor moves into one of ours,
    # over which trio's is made anew. There is one object that owns it, before and after.
    old = stream.socket
    family, kind, proto = old.family, old.type, old.proto
    bare = socket.socket(family, kind, proto, fileno=old.detach())
    bare.setblocking(False)
    return trio.SocketStream(trio.socket.from_stdlib_socket(bare)), bare


def wrap(
    stream: trio.abc.Stream,
    send_timeout_s: float,
    close_timeout_s: float,
    *,
    on_end: Callable[[], None] = lambda: None,
) -> PushStream:
    """The PushStream of a socket stream or of a TLS stream."""
    kind = TlsPushStream if isinstance(stream, trio.SSLStream) else PushStream
    return kind(stream, send_timeout_s, close_timeout_s, on_end=on_end)
