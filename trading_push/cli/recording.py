"""Write a recording: pushes as JSON lines, with the time of their receipt and whose they are."""

from __future__ import annotations

import json
import os
import time
import zlib
from pathlib import Path
from typing import IO, Final

import trio

from trading_push.client.client import Client
from trading_push.client.messages import Push
from trading_push.errors import ConfigurationError

__all__ = ["Recording"]

FLUSH_EVERY_S: Final = 1.0
"""How long a push may wait until it is in the file, where gzip packs some together."""


class Recording:
    """One recording, in one file or, where it is rotated, in several.

    Args:
        path: The first file; gzip if its name ends in `.gz`.
        rotate_bytes: From which size on another file is begun.

    Raises:
        ConfigurationError: The file is there already.
        OSError: It cannot be written.
    """

    def __init__(self, path: Path, rotate_bytes: float) -> None:
        self.count = 0
        """How many pushes were written."""
        self.files: list[Path] = []
        """The files, in their order."""
        self._path = path
        self._rotate_bytes = rotate_bytes
        # The bytes of the present file, and its gzip member; None where it is plain.
        self._size = 0
        self._packer: zlib._Compress | None = None
        # One thread writes at a time.
        self._turn = trio.Lock()
        self._file = self._open()

    async def write_all(self, client: Client, count: int | None) -> None:
        """Write each push of a client, until `count` were written or cancelled.

        Raises:
            TradingPushError: What ended the client.
            OSError: The file cannot be written.
        """
        failure: Exception | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._flush_regularly)
            try:
                async for push in client:
                    # In a thread, because a disk that is slow would stop the answers to pings.
                    async with self._turn:
                        await trio.to_thread.run_sync(self._write, push, client.user or "")
                    if self.count == count:
                        break
            except Exception as error:
                failure = error  # raised outside the nursery, which would put it in a group
            nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure

    def close(self) -> None:
        """End the file."""
        if self._packer is not None:
            self._put(self._packer.flush(zlib.Z_FINISH))
        self._file.close()

    async def _flush_regularly(self) -> None:
        if self._packer is None:
            return
        while True:
            await trio.sleep(FLUSH_EVERY_S)
            async with self._turn:
                await trio.to_thread.run_sync(self._flush)

    def _flush(self) -> None:
        if self._packer is not None:
            self._put(self._packer.flush(zlib.Z_SYNC_FLUSH))

    def _write(self, push: Push, user: str) -> None:
        # Between the tokens of JSON line breaks are white space; inside strings they are escaped.
        text = push.json.replace("\r", " ").replace("\n", " ")
        head = f'{{"recv_ns":{time.time_ns()},"user":{json.dumps(user)},"push":'
        line = f"{head}{text}}}\n".encode("utf-8", "replace")
        self._put(line if self._packer is None else self._packer.compress(line))
        self.count += 1
        if self._size >= self._rotate_bytes:
            self.close()
            self._file = self._open()

    def _put(self, data: bytes) -> None:
        self._file.write(data)
        self._file.flush()
        self._size += len(data)

    def _open(self) -> IO[bytes]:
        name, dot, suffixes = self._path.name.partition(".")
        part = f"-{len(self.files) + 1}" if self.files else ""
        path = self._path.with_name(f"{name}{part}{dot}{suffixes}")
        try:
            # What is recorded of an account is its owner's.
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            raise ConfigurationError(
                f"{path} is there already: give another name, or remove it"
            ) from None
        self.files.append(path)
        self._size = 0
        self._packer = zlib.compressobj(wbits=31) if path.suffix == ".gz" else None
        return os.fdopen(descriptor, "wb")
