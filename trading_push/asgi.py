"""The configured service for a plain ASGI server: `hypercorn -k trio trading_push.asgi:app`.

Settings come from the environment (`TRADING_PUSH_...`) and from the file that `TRADING_PUSH_CONFIG`
names. Importing this module guards every Hypercorn server of the process (`endpoints.hypercorn`).
"""

from __future__ import annotations

import signal
import sys
import threading

import trio

from trading_push import logs
from trading_push.endpoints.asgi import AsgiEndpoint, Receive, Scope, Send
from trading_push.endpoints.hypercorn.link import install
from trading_push.endpoints.hypercorn.server import worker
from trading_push.errors import ConfigurationError, LinkError
from trading_push.factory import authenticator, open_configured_service
from trading_push.server import tune
from trading_push.settings.loading import load_settings
from trading_push.settings.schema import Settings

__all__ = ["app"]


class _Application:
    """Opens the service when the server starts, drains it when the server stops."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._authenticate = authenticator(settings)
        self._endpoint: AsgiEndpoint | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        elif self._endpoint is None:
            raise RuntimeError("the server must support ASGI's lifespan: it starts the service")
        else:
            await self._endpoint(scope, receive, send)

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        log = self._settings.log
        with logs.attached(
            lang=log.lang, json=log.format == "json", file=log.file, queue_lines=log.queue_lines
        ):
            await receive()
            try:
                await self._serve(receive, send)
            except* ConfigurationError as errors:
                await send(
                    {"type": "lifespan.startup.failed", "message": str(errors.exceptions[0])}
                )
            except* Exception as errors:
                # Hypercorn would serve on without us: this ends the worker, and its parent, which
                # starts a new one only for a worker that ends in order.
                logs.emit(logs.traced("service_failed", errors))
                context = worker()
                if self._endpoint is None or context is None:
                    await send({"type": "lifespan.startup.failed", "message": str(errors)})
                else:
                    await context.terminate.set()
                    await receive()
                    await send({"type": "lifespan.shutdown.complete"})

    async def _serve(self, receive: Receive, send: Send) -> None:
        async with (
            open_configured_service(self._settings, self._authenticate) as service,
            trio.open_nursery() as nursery,
        ):
            self._endpoint = service.asgi_app
            context = worker()
            if context is not None:
                # Hypercorn tells an application of its end only after it has cut every connection.
                context.last = service.drain
            if threading.current_thread() is threading.main_thread():
                nursery.start_soon(_terminate_at_sigterm)
            await send({"type": "lifespan.startup.complete"})
            await receive()
            nursery.cancel_scope.cancel()
        await send({"type": "lifespan.shutdown.complete"})


async def _terminate_at_sigterm() -> None:
    # Hypercorn's workers have no handler of their own: a SIGTERM to the process group, or to a
    # server without workers, would kill them undrained.
    context = worker()
    if context is None:
        return
    with trio.open_signal_receiver(signal.SIGTERM) as signals:
        async for _ in signals:
            await context.terminate.set()


def _make() -> _Application:
    try:
        settings = load_settings(config=None, flags={})
        install(settings.limits)
        tune()
        return _Application(settings)
    except (ConfigurationError, LinkError) as error:
        sys.stderr.write(f"trading_push: {error}\n")
        raise SystemExit(2) from None


app = _make()
