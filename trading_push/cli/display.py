"""Show pushes: as tables on a terminal, as one JSON line each in a pipe or a file."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import trio

from trading_push.cli.escaping import escaped
from trading_push.client.client import Client, open_client
from trading_push.client.messages import Push
from trading_push.errors import TradingPushError

if TYPE_CHECKING:
    from trading_push.cli.tables import Tables

__all__ = ["JsonLines", "follow", "show"]


class JsonLines:
    """Write one push a line to a file descriptor, each at once."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    async def show(self, push: Push) -> None:
        """Write a push.

        A thread writes, because a full pipe would stop the answers to the server's pings.
        Cancellation abandons that thread.

        Raises:
            BrokenPipeError: The reader has gone.
        """
        # Between the tokens of JSON line breaks are white space; inside strings they are escaped.
        text = push.json.replace("\r", " ").replace("\n", " ")
        line = (escaped(text) + "\n").encode("utf-8", "replace")
        await trio.to_thread.run_sync(self._write, line, abandon_on_cancel=True)

    def _write(self, line: bytes) -> None:
        while line:
            line = line[os.write(self._descriptor, line) :]


async def show(
    url: str,
    token: str,
    channels: Sequence[str],
    *,
    offered: bool,
    count: int | None,
    descriptor: int,
) -> None:
    """Show pushes until `count` of them have come, or an interrupt does.

    Args:
        channels: What to show.
        offered: Whether to show all that the server offers, too.
        count: After how many pushes to end; None for never.
        descriptor: Where to show them: a terminal gets tables, anything else JSON lines.

    Raises:
        TradingPushError: What ended the client for good (see `trading_push.client`).
        BrokenPipeError: Nobody reads what is written.
    """
    await follow(
        url,
        token,
        channels,
        offered,
        partial(_show, url=url, channels=channels, count=count, descriptor=descriptor),
    )


async def follow(
    url: str,
    token: str,
    channels: Sequence[str],
    offered: bool,
    use: Callable[[Client], Awaitable[None]],
) -> None:
    """Use a client until `use` returns, or an interrupt comes; then leave politely.

    Args:
        channels: What to subscribe.
        offered: Whether to subscribe all that the server offers, too.
        use: Takes the pushes of the client.

    Raises:
        TradingPushError: What ended the client for good (see `trading_push.client`).
        OSError: What `use` writes cannot be written.
    """
    failure: TradingPushError | OSError | None = None
    reading = trio.CancelScope()
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:
            # The first interrupt ends only the reading, so that the client leaves politely. The
            # second one, or one that comes before there is a client, ends everything.
            scopes = [nursery.cancel_scope]
            nursery.start_soon(_end_at_interrupt, signals, scopes)
            try:
                async with open_client(url, token, channels=channels, offered=offered) as client:
                    scopes.append(reading)
                    with reading:
                        await use(client)
            except (TradingPushError, OSError) as error:
                failure = error  # raised outside the nursery, which would put it in a group
            nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure


async def _end_at_interrupt(signals: AsyncIterator[int], scopes: list[trio.CancelScope]) -> None:
    async for _ in signals:
        scopes.pop().cancel()


async def _show(
    client: Client, url: str, channels: Sequence[str], count: int | None, descriptor: int
) -> None:
    if not os.isatty(descriptor) or os.environ.get("TERM", "dumb") in ("dumb", "unknown"):
        await _pass_on(client, JsonLines(descriptor), count)
        return

    from trading_push.cli.terminal import Terminal  # which a pipe does without

    terminal = Terminal(client, url, channels, descriptor)
    await terminal.run(lambda: _pass_on(client, terminal.tables, count))


async def _pass_on(client: Client, output: JsonLines | Tables, count: int | None) -> None:
    shown = 0
    async for push in client:
        await output.show(push)
        shown += 1
        if shown == count:
            return
