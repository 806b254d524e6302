"""Descriptors of the process: as many as its connections need, and an answer where none is left.

Without a free descriptor a connection cannot even be accepted to be refused: it would wait in the
backlog, and trio's server would try, and log a trace, ten times a second. So a listener keeps a
spare one.
"""

from __future__ import annotations

import errno
import os
import socket
import time
from contextlib import suppress
from typing import Final

import trio

from trading_push import logs

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

__all__ = ["BUSY", "SparingListener", "fitting_connections"]

BUSY: Final = (
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\nretry-after: 5\r\n"
    b"connection: close\r\n\r\n"
)
"""The answer to whatever is asked for where there is no room for another connection."""

_RESERVE: Final = 8
"""Descriptors that no connection takes: for files, and for upstreams that are opened later."""
_REFUSALS: Final = 248
"""Descriptors besides, where they are to be had: one that is refused has its own for a moment."""
_TOLD_EVERY_S: Final = 60.0
_RETRY_S: Final = 0.1


def fitting_connections(wanted: int) -> int:
    """Return how many connections the process has descriptors for: `wanted`, or fewer.

    The soft limit (RLIMIT_NOFILE) is raised first, as far as that needs and the hard limit allows;
    where it is too low all the same, one line says so.
    """
    if resource is None:
        return wanted
    needed = _open_now() + _RESERVE + wanted
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    raised = needed + _REFUSALS
    if soft != resource.RLIM_INFINITY and soft < raised:
        raised = raised if hard == resource.RLIM_INFINITY else min(raised, hard)
        with suppress(ValueError, OSError):  # macOS has another bound besides
            resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return wanted
    fitting = max(1, wanted - (needed - soft))
    logs.emit(logs.line("descriptors_too_few", wanted=wanted, fitting=fitting, descriptors=soft))
    return fitting


def _open_now() -> int:
    with suppress(OSError):
        return len(os.listdir("/dev/fd"))
    return 32


class SparingListener(trio.abc.Listener[trio.SocketStream]):
    """A listening socket that answers 503 where the process has no descriptor left.

    Args:
        sock: A socket that listens; it is closed with this.
    """

    def __init__(self, sock: trio.socket.SocketType) -> None:
        self._listener = trio.SocketListener(sock)
        # The same descriptor: to accept without a wait, in which another would take the spare one.
        self._bare = socket.socket(fileno=sock.fileno())
        self._spare: int | None = None
        self._told_at = -_TOLD_EVERY_S
        self._untold = 0
        self._keep_spare()

    async def accept(self) -> trio.SocketStream:
        """Accept a connection.

        Raises:
            ClosedResourceError: The listener is closed.
        """
        while True:
            try:
                return await self._listener.accept()
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE):
                    raise
                self._tell()
            if not self._refuse():
                await trio.sleep(_RETRY_S)

    async def aclose(self) -> None:
        """Close the socket."""
        self._bare.detach()
        if self._spare is not None:
            os.close(self._spare)
            self._spare = None
        await self._listener.aclose()

    def _keep_spare(self) -> None:
        if self._spare is None:
            with suppress(OSError):
                self._spare = os.open(os.devnull, os.O_RDONLY)

    def _refuse(self) -> bool:
        """Answer one connection; return False if there was no descriptor for that."""
        self._keep_spare()
        if self._spare is None:
            return False
        os.close(self._spare)
        self._spare = None
        try:
            peer, _ = self._bare.accept()
        except OSError:
            pass  # it has gone, or another process has taken it, or the descriptor
        else:
            with peer, suppress(OSError):
                peer.setblocking(False)
                peer.send(BUSY)
                peer.shutdown(socket.SHUT_WR)
                # Closed with bytes unread, it would be reset, and the answer might be lost.
                peer.recv(65536)
        self._keep_spare()
        return True

    def _tell(self) -> None:
        now = time.monotonic()
        if now < self._told_at + _TOLD_EVERY_S:
            self._untold += 1
            return
        logs.emit(logs.line("descriptors_exhausted", count=self._untold))
        self._told_at, self._untold = now, 0
