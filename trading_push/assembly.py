"""A service as its settings say: which source, which market, which key to check tokens with."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TypedDict

from trading_push.auth import Authenticate, JwtAuthenticator, data_dir, demo_secret
from trading_push.errors import ConfigurationError
from trading_push.service import PushService, open_push_service
from trading_push.settings import Auth, Settings
from trading_push.sources.base import TickerFeed
from trading_push.sources.market import SimulatedMarket
from trading_push.sources.paper import PaperSource, open_paper_exchange
from trading_push.sources.postgres import PostgresSource
from trading_push.sources.sql import SqlSource
from trading_push.sources.tape import Tape

__all__ = ["authenticator", "open_configured_service"]

PAPER_FILE = "paper.sqlite3"


class _Bounds(TypedDict):
    """What every source that reads SQL is given."""

    threads: int
    statement_timeout_s: float


def authenticator(settings: Settings) -> Authenticate:
    """The check of tokens: by the configured key, else by the demo's secret.

    Raises:
        ConfigurationError: The key cannot be used, or the demo's secret not be made.
    """
    secret = settings.jwt_secret
    if secret is None and settings.auth.algorithm == Auth().algorithm:
        secret = demo_secret(data_dir())
    return JwtAuthenticator(settings.auth, secret)


@asynccontextmanager
async def open_configured_service(
    settings: Settings, authenticate: Authenticate | None = None
) -> AsyncIterator[PushService]:
    """Run the service that the settings describe while the context is open.

    With `database.url` the accounts are read from there; otherwise a paper exchange trades, on the
    simulated market or on the tape.

    Raises:
        ConfigurationError: The tape, the database or a key cannot be used.
    """
    database, market = settings.database, settings.market
    bounds = _Bounds(threads=database.threads, statement_timeout_s=database.statement_timeout_s)
    feed: TickerFeed | None = None
    async with AsyncExitStack() as opened:
        if market.tape is not None:
            tape = Tape(market.tape, market.speed, market.loop)
            await tape.open()
            feed = tape
        if database.url is None:
            path = database.path or _default_path()
            exchange = await opened.enter_async_context(
                open_paper_exchange(
                    path, market=feed or SimulatedMarket(market.seed), seed=market.seed
                )
            )
            feed = exchange
            source: SqlSource = PaperSource(path, database.queries, **bounds)
        elif database.notify_channel is not None:
            source = PostgresSource(
                database.url, database.queries, database.notify_channel, **bounds
            )
        else:
            source = SqlSource(database.url, database.queries, **bounds)
        opened.callback(source.close)
        await source.check()
        yield await opened.enter_async_context(
            open_push_service(
                source,
                settings=settings,
                feed=feed,
                authenticate=authenticate or authenticator(settings),
            )
        )


def _default_path() -> Path:
    directory = data_dir()
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(
            f"{directory} cannot be made ({error.strerror}): give another file with --db"
        ) from None
    return directory / PAPER_FILE
