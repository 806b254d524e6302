"""An echo at an endpoint, `linked` or `native`, for the conformance run; see `run.py`.

It prints its port and serves until its standard input ends. The endpoints, the transports and the
streams are the service's own; only what a connection does with a message is replaced.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from typing import Any

import hypercorn.config
import hypercorn.trio
import trio

from trading_push import JwtAuthenticator, PushService, logs, open_push_service
from trading_push.endpoints import asgi, native
from trading_push.endpoints.hypercorn import link as hypercorn_link
from trading_push.errors import TransportClosed
from trading_push.protocol import frames
from trading_push.settings.schema import Auth, Limits, Server, Settings
from trading_push.transport.base import Transport

SECRET = "a secret of at least thirty-two bytes"
# Over the largest message of the cases, 16 MiB.
LIMITS = Limits(message_bytes=2**25, heartbeat_s=60, send_timeout_s=60)
BINARY = b"\x82"  # FIN and the opcode (RFC 6455 section 5.2)


class Echo:
    """In the place of `connection.Connection`: what comes goes back, until the peer is gone."""

    def __init__(
        self, context: Any, transport: Transport, seat: Any, principal: Any = None
    ) -> None:
        self._transport = transport

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            self._transport.start(nursery)
            try:
                while True:
                    await self._transport.send([echoed(await self._transport.receive())])
            except TransportClosed:
                await self._transport.close(1000, "")


def echoed(message: str | bytes) -> bytes:
    if isinstance(message, str):
        return frames.frame(message.encode())
    return BINARY + frames.frame(message)[1:]


async def start(kind: str, service: PushService, nursery: trio.Nursery) -> int:
    """Serve in the nursery; the port."""
    if kind == "native":
        listeners = await nursery.start(service.serve_native, "127.0.0.1", 0)
        return listeners[0].socket.getsockname()[1]
    hypercorn_link.install(LIMITS)
    config = hypercorn.config.Config.from_mapping(
        {
            "bind": ["127.0.0.1:0"],
            "errorlog": "-",
            "loglevel": "WARNING",
            "websocket_max_message_size": LIMITS.message_bytes,
        }
    )
    binds = await nursery.start(
        partial(hypercorn.trio.serve, service.asgi_app, config, shutdown_trigger=trio.sleep_forever)
    )
    return int(binds[0].rsplit(":", 1)[1])


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=["linked", "native"])
    kind = parser.parse_args().kind
    native.Connection = asgi.Connection = Echo
    with logs.attached():
        async with (
            open_push_service(
                settings=Settings(limits=LIMITS, server=Server(path="/")),
                authenticate=JwtAuthenticator(Auth(), SECRET),
            ) as service,
            trio.open_nursery() as nursery,
        ):
            print(await start(kind, service, nursery), flush=True)
            await trio.to_thread.run_sync(sys.stdin.read, abandon_on_cancel=True)
            nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(main)
