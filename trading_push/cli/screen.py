"""A terminal that is taken over for a while, and given back as it was.

Rules:

1. Whatever ends the block gives the terminal back: its modes first, for they are set without
   waiting for a terminal that takes no output.
2. A suspended program gives it back, too, and takes it again when it goes on.
3. The modes to give back are those of the last time that the terminal was not ours: a shell may
   change them while we are suspended.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import sys
import termios
import threading
from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, Final

import trio

__all__ = ["Screen"]

_OURS: Final = b"\x1b[?1049h\x1b[?25l\x1b[?7l"
"""The alternate screen, no cursor, no wrapping of long lines."""
_THEIRS: Final = b"\x1b[0m\x1b[?7h\x1b[?25h\x1b[?1049l"
_PATIENCE_S: Final = 1.0
"""How long to wait for a terminal that takes no output."""


class Screen:
    """A terminal's whole screen, and its keyboard where standard input is a terminal.

    Args:
        descriptor: The terminal to write to.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._keyboard = _terminal_of(sys.stdin)
        # The keyboard's modes to give back; None while they are not ours, or there is none.
        self._modes: list[Any] | None = None
        self._is_ours = False
        self.takes_output = True
        """Whether what was written last has been taken; told when the terminal is given back."""
        # Held by the thread that writes, which may have been abandoned.
        self._writing = threading.Lock()
        # What is on the screen; None where that is not known.
        self._shown: Sequence[str | None] | None = None

    @property
    def has_keys(self) -> bool:
        """Whether keys can be read."""
        return self._keyboard is not None

    def __enter__(self) -> Screen:
        self._take()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._give_back()

    def size(self) -> tuple[int, int]:
        """The columns and lines of the terminal; those of the environment where it has none."""
        with suppress(OSError):
            size = os.get_terminal_size(self._descriptor)
            if size.columns and size.lines:
                return size.columns, size.lines
        size = shutil.get_terminal_size()
        return size.columns, size.lines

    def forget(self) -> None:
        """What is on the screen is not known any more: draw all of it the next time."""
        self._shown = None

    async def draw(self, lines: Sequence[str]) -> None:
        """Show some lines, from the top.

        A thread writes, because a terminal that takes no output would stop the answers to the
        server's pings. Cancellation abandons that thread.

        Raises:
            BrokenPipeError: The terminal has gone.
        """
        shown = self._shown
        if shown is None or len(shown) != len(lines):
            shown = [None] * len(lines)
        # A line is erased before it is written: behind a full one, that would take its end away.
        drawn = [
            f"\x1b[{row};1H\x1b[0m\x1b[2K{line}"
            for row, (line, before) in enumerate(zip(lines, shown, strict=True), 1)
            if line != before
        ]
        if not drawn:
            await trio.lowlevel.checkpoint()
            return
        data = ("".join(drawn) + "\x1b[0m").encode(_encoding(), "replace")
        self._shown = lines  # before the write, during which it may be forgotten
        await trio.to_thread.run_sync(self._write, data, abandon_on_cancel=True)

    async def keys(self) -> bytes:
        """Wait for keys, and return the bytes that stand for them; empty where no more come."""
        assert self._keyboard is not None
        while True:
            await trio.lowlevel.wait_readable(self._keyboard)
            try:
                return os.read(self._keyboard, 1024)
            except BlockingIOError:
                continue
            except OSError:  # how a terminal says that the other end has gone
                return b""

    def leave(self, text: str) -> None:
        """Write what stays on the terminal, once it has been given back; synchronous."""
        if self.takes_output:
            self._write_in_time(text.encode(_encoding(), "replace"))

    def suspend(self) -> None:
        """Stop this process, as Ctrl-Z does, until it is told to go on; synchronous."""
        self._give_back()
        os.kill(os.getpid(), signal.SIGSTOP)
        self._take()

    def resume(self) -> None:
        """Take the terminal again after a stop that could not be seen coming; synchronous."""
        if self._is_ours:
            self._set_modes()
            self._write_in_time(_OURS)
            self.forget()

    def _take(self) -> None:
        if self._keyboard is not None:
            self._modes = termios.tcgetattr(self._keyboard)
            self._set_modes()
        self._is_ours = True
        self._write_in_time(_OURS)
        self.forget()

    def _set_modes(self) -> None:
        """Have each key at once and do not show it; Ctrl-C and Ctrl-Z stay signals."""
        if self._modes is not None:
            assert self._keyboard is not None
            modes = [*self._modes]
            modes[3] &= ~(termios.ICANON | termios.ECHO)
            modes[6] = [*modes[6]]
            modes[6][termios.VMIN], modes[6][termios.VTIME] = 1, 0
            termios.tcsetattr(self._keyboard, termios.TCSANOW, modes)

    def _give_back(self) -> None:
        if not self._is_ours:
            return
        self._is_ours = False
        if self._modes is not None:
            assert self._keyboard is not None
            with suppress(termios.error):  # the terminal has gone
                termios.tcflush(self._keyboard, termios.TCIFLUSH)  # keys that were meant for us
                termios.tcsetattr(self._keyboard, termios.TCSANOW, self._modes)
            self._modes = None
        # Behind what a thread still writes that was abandoned.
        self.takes_output = self._write_in_time(_THEIRS)

    def _write_in_time(self, data: bytes) -> bool:
        """Write, and wait for it a moment; whether the terminal has taken it."""

        def write() -> None:
            with suppress(OSError):  # the terminal has gone
                self._write(data)

        thread = threading.Thread(target=write, daemon=True)
        thread.start()
        thread.join(_PATIENCE_S)
        return not thread.is_alive()

    def _write(self, data: bytes) -> None:
        with self._writing:
            while data:
                try:
                    data = data[os.write(self._descriptor, data) :]
                except BlockingIOError:  # another program has made the terminal non-blocking
                    writable = select.poll()
                    writable.register(self._descriptor, select.POLLOUT)
                    writable.poll()
                except OSError as error:
                    raise BrokenPipeError from error


def _terminal_of(stream: Any) -> int | None:
    try:
        descriptor = stream.fileno()
        return descriptor if os.isatty(descriptor) else None
    except (AttributeError, OSError, ValueError):  # standard input is closed
        return None


def _encoding() -> str:
    return sys.stdout.encoding or "utf-8"
