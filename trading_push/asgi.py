"""The configured service for a plain ASGI server: `hypercorn -k trio trading_push.asgi:app`.

Settings come from the environment (`TRADING_PUSH_...`) and from the file that `TRADING_PUSH_CONFIG`
names. Importing this module guards every Hypercorn server of the process (`endpoints.hypercorn`).
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from typing import NoReturn

import trio

from trading_push import logs
from trading_push.endpoints.asgi import AsgiEndpoint, Receive, Scope, Send
from trading_push.endpoints.hypercorn.link import install
from trading_push.endpoints.hypercorn.server import worker
from trading_push.errors import ConfigurationError, LinkError, innermost
from trading_push.factory import authenticator, open_configured_service
from trading_push.server import attached_log, tune, with_descriptors
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
            if not trio.lowlevel.in_trio_run():
                _give_up(
                    "this server does not run applications on trio, which this one needs: start "
                    "it by `hypercorn --worker-class trio trading_push.asgi:app`"
                )
            await self._lifespan(receive, send)
        elif self._endpoint is None:
            raise RuntimeError("the server must support ASGI's lifespan: it starts the service")
        else:
            await self._endpoint(scope, receive, send)

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        unusable = None
        with attached_log(self._settings.log):
            await receive()
            self._settings = with_descriptors(self._settings)
            install(self._settings.limits)
            try:
                await self._serve(receive, send)
            except* ConfigurationError as errors:
                unusable = str(innermost(errors, first=True))
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
        if unusable is not None:
            _give_up(unusable)

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
        _give_up(str(error))


def _give_up(why: str) -> NoReturn:
    """End the process with one line and a status that is not 0, and Hypercorn's with it.

    Hypercorn's parent ends with status 0 when a worker of its has failed to start, so that a
    supervisor would think that all is well; it is ended by a signal that it does not handle.
    """
    parent = multiprocessing.parent_process()
    # What the process was started for: another parent of ours is not to be ended.
    target = getattr(multiprocessing.current_process(), "_target", None)
    if parent is None or not getattr(target, "__module__", "").startswith("hypercorn."):
        sys.stderr.write(f"trading_push: {why}\n")
    elif parent.pid == os.getppid():  # no other worker has ended it, and said why
        sys.stderr.write(f"trading_push: {why}\n")
        os.kill(parent.pid, signal.SIGUSR1)
    sys.stderr.flush()
    # An exception would pass through the server, which would print it.
    os._exit(2)


app = _make()
