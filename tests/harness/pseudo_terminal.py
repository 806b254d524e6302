"""A program on a terminal of some size: what its screen shows, and what is typed."""

from __future__ import annotations

import fcntl
import os
import struct
import subprocess
import termios
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyte
import trio

from harness.support import PATIENCE_S

__all__ = ["PseudoTerminal", "on_terminal"]


class _Screen(pyte.Screen):
    """A screen with the alternate one and the modes of a real terminal, as far as we ask."""

    def __init__(self, columns: int, lines: int) -> None:
        self.private: set[int] = set()
        super().__init__(columns, lines)

    def set_mode(self, *modes: int, **kwargs: Any) -> None:
        if kwargs.get("private"):
            self.private |= {*modes}
            if 1049 in modes:
                self.erase_in_display(2)
        super().set_mode(*modes, **kwargs)

    def reset_mode(self, *modes: int, **kwargs: Any) -> None:
        if kwargs.get("private"):
            self.private -= {*modes}
            if 1049 in modes:
                self.erase_in_display(2)
                self.cursor_position(1, 1)
        super().reset_mode(*modes, **kwargs)


class PseudoTerminal:
    """The program, its terminal, and what came of it; a thread reads while it runs."""

    def __init__(
        self, args: Sequence[str], columns: int, lines: int, env: dict[str, str] | None
    ) -> None:
        self._outside, inside = os.openpty()
        self._screen = _Screen(columns, lines)
        self._stream = pyte.ByteStream(self._screen)
        self._lock = threading.Lock()
        self.raw = bytearray()
        """All that the program has written."""
        self.resize(columns, lines)
        self.modes_before = termios.tcgetattr(inside)
        self._inside = inside
        self.process = subprocess.Popen(
            args,
            stdin=inside,
            stdout=inside,
            stderr=subprocess.PIPE,
            env={**os.environ, "TERM": "xterm-256color", **(env or {})},
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        while True:
            try:
                data = os.read(self._outside, 65536)
            except OSError:
                return
            if not data:
                return
            with self._lock:
                self.raw += data
                self._stream.feed(data)

    def resize(self, columns: int, lines: int) -> None:
        """Give the terminal another size; the program is told."""
        with self._lock:
            self._screen.resize(lines, columns)
        fcntl.ioctl(self._outside, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def feed(self, data: bytes) -> None:
        """Show what another program has written."""
        with self._lock:
            self._stream.feed(data)

    def type(self, keys: bytes) -> None:
        os.write(self._outside, keys)

    @property
    def shown(self) -> list[str]:
        """The lines of the screen, a wide character with a blank behind it for its other half."""
        with self._lock:
            rows = [self._screen.buffer[row] for row in range(self._screen.lines)]
            columns = range(self._screen.columns)
            return ["".join([row[each].data or " " for each in columns]).rstrip() for row in rows]

    @property
    def text(self) -> str:
        return "\n".join(self.shown)

    @property
    def is_taken(self) -> bool:
        """Whether the program has the alternate screen."""
        with self._lock:
            return 1049 in self._screen.private

    @property
    def has_cursor(self) -> bool:
        with self._lock:
            return not self._screen.cursor.hidden

    @property
    def modes(self) -> list[Any]:
        """The modes of the terminal now."""
        return termios.tcgetattr(self._inside)

    async def until(self, holds: Callable[[], object], what: str) -> None:
        """Wait until something holds of the screen."""
        with trio.move_on_after(PATIENCE_S):
            while not holds():
                await trio.sleep(0.02)  # nothing tells of what a screen shows
            return
        raise AssertionError(f"{what} did not come; the screen:\n{self.text}")

    async def ended(self) -> int:
        """Wait for the end of the program; its exit status."""
        return await trio.to_thread.run_sync(self.process.wait, PATIENCE_S)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stderr is not None
        self.process.stderr.close()
        os.close(self._inside)
        self._thread.join(PATIENCE_S)
        os.close(self._outside)


@contextmanager
def on_terminal(
    *args: str, columns: int = 80, lines: int = 24, env: dict[str, str] | None = None
) -> Iterator[PseudoTerminal]:
    """Run a program on a terminal; it is killed at the end if it is still there."""
    terminal = PseudoTerminal(args, columns, lines, env)
    try:
        yield terminal
    finally:
        terminal.close()
