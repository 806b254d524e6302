"""A service under guarded Hypercorn, until a signal ends it; `trading-push serve` does this."""

from __future__ import annotations

import errno
import gc
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, cast

import attrs
import hypercorn.config
import hypercorn.trio
import trio

from trading_push import logs
from trading_push.auth.demo import DemoTokens
from trading_push.auth.principal import Authenticate
from trading_push.endpoints.hypercorn.link import install
from trading_push.errors import ConfigurationError
from trading_push.factory import open_configured_service
from trading_push.reload import reload_settings
from trading_push.service import PushService
from trading_push.settings.schema import Log, Settings
from trading_push.transport.descriptors import fitting_connections

__all__ = ["attached_log", "listen", "run_server", "serve", "tune", "with_descriptors"]

BACKLOG = 4096
_AFTER_DRAIN_S = 0.5


async def run_server(
    settings: Settings,
    *,
    authenticate: Authenticate,
    on_ready: Callable[[str, str], None],
    demo: DemoTokens | None = None,
    reload: Callable[[], tuple[Settings, Authenticate]] | None = None,
) -> None:
    """Serve the configured service until SIGINT or SIGTERM; see `serve`.

    SIGHUP loads the settings anew (see `reload`). Where standard error is a terminal, which has
    gone then, it ends the server as SIGTERM does.

    Log lines go to standard error, and to `log.file` as well.

    Args:
        settings: Where to listen, and everything else.
        authenticate: The check of tokens.
        on_ready: Called with the HTTP and the WebSocket URL when the server answers.
        demo: Makes tokens for the page, in the embedded default; see `auth.demo.DemoTokens`.
        reload: Called at SIGHUP, for the settings and the check of tokens as they are by now; may
            raise ConfigurationError. None leaves the signal alone.

    Raises:
        ConfigurationError: The address cannot be listened on, or a setting cannot be used.
        LinkError: The installed Hypercorn is not the one that can be guarded.
    """
    with (
        attached_log(settings.log),
        listen(settings.server.host, settings.server.port) as listener,
    ):
        address = listener.getsockname()
        settings = with_descriptors(settings)
        async with (
            open_configured_service(settings, authenticate) as service,
            trio.open_nursery() as nursery,
        ):
            service.context.demo = demo
            if reload is not None:
                await nursery.start(_reload_at_sighup, service, settings, reload)
            await serve(
                service,
                _config(listener, settings),
                on_ready=lambda: on_ready(*_urls(address, settings.server.path)),
            )
            nursery.cancel_scope.cancel()


def attached_log(log: Log) -> AbstractContextManager[None]:
    """Write the log as the settings say, while the context is open; see `logs.attached`."""
    logs.set_quiet(log.quiet.split())
    return logs.attached(
        lang=log.lang,
        level=log.level,
        json=log.format == "json",
        file=log.file,
        queue_lines=log.queue_lines,
    )


async def _reload_at_sighup(
    service: PushService,
    settings: Settings,
    reload: Callable[[], tuple[Settings, Authenticate]],
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    if not hasattr(signal, "SIGHUP"):  # Windows
        task_status.started()
        return
    with trio.open_signal_receiver(signal.SIGHUP) as signals:
        task_status.started()
        async for _ in signals:
            if sys.stderr.isatty():
                os.kill(os.getpid(), signal.SIGTERM)
                continue
            try:
                settings = reload_settings(service, settings, *reload())
            except ConfigurationError as error:
                logs.emit(logs.line("reload_failed", error=error))


async def serve(
    service: PushService,
    config: hypercorn.config.Config,
    *,
    on_ready: Callable[[], None] = lambda: None,
) -> None:
    """Serve a service under guarded Hypercorn until SIGINT or SIGTERM, then drain it.

    A second signal ends at once. To be called in the main thread.

    Args:
        service: A running service.
        config: Hypercorn's configuration; certificates, for example.
        on_ready: Called when the server answers.

    Raises:
        LinkError: The installed Hypercorn is not the one that can be guarded.

    Cancelled, it cuts the connections; to have them told first, drain the service before.
    """
    install(service.limits)
    tune()
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:
            drained = trio.Event()
            await nursery.start(
                partial(
                    hypercorn.trio.serve,
                    cast(Any, service.asgi_app),
                    config,
                    shutdown_trigger=drained.wait,
                )
            )
            on_ready()
            await anext(signals)
            async with trio.open_nursery() as draining:

                async def end_at_once() -> None:
                    await anext(signals)
                    nursery.cancel_scope.cancel()

                draining.start_soon(end_at_once)
                # Before Hypercorn is told: it would cut every connection without a close frame.
                await service.drain()
                draining.cancel_scope.cancel()
            drained.set()


def tune() -> None:
    """Set the interpreter up for very many long-lived objects and a few threads.

    A full garbage collection goes through every object there is: with 10,000 connections it stops
    the service for seconds, and by default one comes whenever there is a quarter more of them.
    Here it comes a hundred times less often; most garbage never needs one. And a thread that
    converts a database's rows gives the interpreter back after 1 ms instead of 5.

    For a whole process, so that programs call it and not the library: `serve` and the application
    `trading_push.asgi:app` do.
    """
    gc.set_threshold(10_000, 10, 100)
    sys.setswitchinterval(0.001)


def with_descriptors(settings: Settings) -> Settings:
    """Return settings whose `limits.connections` the process has descriptors for.

    The soft limit of descriptors is raised first; for a whole process, so that programs call it.
    """
    fitting = fitting_connections(settings.limits.connections)
    if fitting == settings.limits.connections:
        return settings
    return attrs.evolve(settings, limits=attrs.evolve(settings.limits, connections=fitting))


def listen(host: str, port: int) -> socket.socket:
    """Bind an address to listen on; raises ConfigurationError that says what to do."""
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            advice = f"port {port} of {host} is taken: give another with --port, or 0 for any free"
        elif error.errno == errno.EACCES:
            advice = f"port {port} is not for this user: give one above 1023 with --port"
        else:
            advice = f"{host} cannot be listened on ({error}): give another with --host"
        raise ConfigurationError(advice) from None
    return listener


def _config(listener: socket.socket, settings: Settings) -> hypercorn.config.Config:
    config = hypercorn.config.Config()
    config.bind = [f"fd://{listener.detach()}"]  # Hypercorn closes it
    config.backlog = BACKLOG
    config.websocket_max_message_size = settings.limits.message_bytes
    config.h11_max_incomplete_size = settings.limits.header_bytes
    config.graceful_timeout = _AFTER_DRAIN_S
    # No access log: a path can forge a line in it.
    config.errorlog = logging.getLogger("hypercorn.error")
    config.alpn_protocols = ["http/1.1", "h2"]
    return config


def _urls(address: tuple[str, int], path: str) -> tuple[str, str]:
    host = f"[{address[0]}]" if ":" in address[0] else address[0]
    return f"http://{host}:{address[1]}", f"ws://{host}:{address[1]}{path}"
