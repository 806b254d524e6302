"""The bearer token of the HTTP source: a fixed one, one in a file, or one that a command writes.

1. A file is read again when it has changed. One that cannot be used leaves the token as it was.
2. A command is run again before its token is too old, and when the service answers 401; its output
   and its errors are shown nowhere.
3. At 401 a request is sent once more if there is another token by now.
"""

from __future__ import annotations

import codecs
import math
import os
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Final, Protocol

import trio

from trading_push.errors import ConfigurationError, SourceError
from trading_push.settings.secret_file import read_secret_file
from trading_push.settings.sources import Http
from trading_push.settings.validators import is_token

__all__ = ["Tokens", "tokens_of"]

COMMAND_S: Final = 10.0
"""How long a command may take."""
AGAIN_S: Final = 10.0
"""A command that gave the token that was refused is not run again before this time is over."""


class Tokens(Protocol):
    """Where the token comes from."""

    name: str
    """What an error tells to look after."""

    async def current(self) -> str | None:
        """Return the token to send; None for none.

        Raises:
            SourceError: There is none now.
        """
        ...

    async def other_than(self, refused: str | None) -> str | None:
        """Return a newer token than one that the service has refused; None if there is none."""
        ...


def tokens_of(settings: Http) -> Tokens:
    """Make what the settings name.

    Raises:
        ConfigurationError: The file or the command cannot be used.
    """
    if settings.token_file is not None:
        return _FileToken(settings.token_file)
    if settings.token_command is not None:
        return _CommandToken(settings.token_command, settings.token_command_s)
    return _FixedToken(settings.token)


class _FixedToken:
    name = "http.token"

    def __init__(self, token: str | None) -> None:
        self._token = token

    async def current(self) -> str | None:
        return self._token

    async def other_than(self, refused: str | None) -> str | None:
        return None


class _FileToken:
    def __init__(self, path: Path) -> None:
        self._path = path
        self.name = "http.token_file"
        # What told, when it was last looked at, that the file is still the same.
        self._state: tuple[int, ...] | None = None
        self._token = self._read()

    async def current(self) -> str | None:
        return self._again()

    async def other_than(self, refused: str | None) -> str | None:
        self._state = None
        token = self._again()
        return None if token == refused else token

    def _again(self) -> str:
        if self._look() != self._state:
            try:
                self._token = self._read()
            except ConfigurationError as error:
                self.name = str(error)
            else:
                self.name = "http.token_file"
        return self._token

    def _look(self) -> tuple[int, ...] | None:
        try:
            state = os.stat(self._path)
        except OSError:
            return None
        return state.st_mtime_ns, state.st_size, state.st_ino, state.st_mode

    def _read(self) -> str:
        self._state = self._look()
        data = read_secret_file(self._path, "http.token_file")
        token = data.strip().decode("latin-1")
        if not is_token(token):
            raise ConfigurationError(
                f"http.token_file {str(self._path)!r} is not usable: write the token into it, as "
                "it stands behind `Bearer`"
            )
        return token


class _CommandToken:
    name = "http.token_command"

    def __init__(self, command: str, lifetime_s: float) -> None:
        try:
            self._command = shlex.split(command)
        except ValueError:
            self._command = []
        if not self._command or shutil.which(self._command[0]) is None:
            raise ConfigurationError(
                "http.token_command is not usable: give a program that there is, and its arguments "
                "as in a shell"
            )
        self._lifetime_s = lifetime_s
        # One command at a time, whose token all take who wait for it.
        self._lock = trio.Lock()
        self._token: str | None = None
        # When the token was got, and until when the command is not run again, on trio's clock.
        self._got_at = -math.inf
        self._not_before = -math.inf

    async def current(self) -> str | None:
        async with self._lock:
            if trio.current_time() < self._got_at + self._lifetime_s:
                return self._token
            try:
                await self._run()
            except SourceError:
                # The one that there is may still be good.
                if self._token is None:
                    raise
                self._got_at = trio.current_time() + AGAIN_S - self._lifetime_s
            return self._token

    async def other_than(self, refused: str | None) -> str | None:
        async with self._lock:
            if self._token == refused and trio.current_time() >= self._not_before:
                await self._run()
                if self._token == refused:
                    self._not_before = trio.current_time() + AGAIN_S
            return None if self._token == refused else self._token

    async def _run(self) -> None:
        with trio.move_on_after(COMMAND_S) as scope:
            try:
                ended = await trio.run_process(
                    self._command, capture_stdout=True, stderr=subprocess.DEVNULL, check=False
                )
            except OSError as error:
                raise SourceError(f"http.token_command cannot be run: {error.strerror}") from None
        if scope.cancelled_caught:
            raise SourceError(f"http.token_command took longer than {COMMAND_S:g} s")
        if ended.returncode:
            raise SourceError(f"http.token_command ended with status {ended.returncode}")
        token = ended.stdout.removeprefix(codecs.BOM_UTF8).strip().decode("latin-1")
        if not is_token(token):
            raise SourceError("http.token_command wrote something else than a token")
        self._token = token
        self._got_at = trio.current_time()
