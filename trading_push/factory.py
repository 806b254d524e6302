"""A service as its settings say: which accounts, which market, which key to check tokens with."""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import attrs

from trading_push.auth.demo import data_dir, secret_of
from trading_push.auth.principal import Authenticate
from trading_push.auth.tokens import JwtAuthenticator
from trading_push.errors import ConfigurationError
from trading_push.service import PushService, open_push_service
from trading_push.settings import import_string
from trading_push.settings.schema import Settings
from trading_push.settings.sources import Ccxt, Database, Function, Market
from trading_push.sources.base import Source, TickerFeed
from trading_push.sources.ccxt.credentials import CredentialsFile, credentials_of_json
from trading_push.sources.ccxt.exchange import ExchangeOptions
from trading_push.sources.ccxt.feed import CcxtFeed
from trading_push.sources.ccxt.source import CcxtSource
from trading_push.sources.exchanges import binance, bybit, okx
from trading_push.sources.exchanges.binance import BinanceFeed
from trading_push.sources.exchanges.bybit import BybitFeed
from trading_push.sources.exchanges.dialect import ExchangeLimits
from trading_push.sources.exchanges.okx import OkxFeed
from trading_push.sources.exchanges.simulated_market import SimulatedMarket
from trading_push.sources.exchanges.stream import ExchangeFeed
from trading_push.sources.exchanges.tape import Tape
from trading_push.sources.flask import FlaskSource
from trading_push.sources.functions import FunctionSource
from trading_push.sources.paper import PaperSource, open_paper_exchange
from trading_push.sources.sql.postgres import PostgresSource
from trading_push.sources.sql.source import SqlSource
from trading_push.transport.outbound_proxies import OutboundProxies

__all__ = [
    "PAPER_FILE",
    "authenticator",
    "exchange_of",
    "open_accounts",
    "open_configured_service",
    "open_market",
    "paper_accounts",
]

PAPER_FILE = "paper.sqlite3"
"""The paper exchange's file, in the user's data directory, where no other is set."""


def authenticator(settings: Settings) -> Authenticate:
    """The check of tokens: by the configured key, else by the demo's secret.

    Raises:
        ConfigurationError: The key cannot be used, or the demo's secret not be made.
    """
    secret, _ = secret_of(settings)
    return JwtAuthenticator(settings.auth, secret)


@asynccontextmanager
async def open_configured_service(
    settings: Settings, authenticate: Authenticate | None = None
) -> AsyncIterator[PushService]:
    """Run the service that the settings describe while the context is open.

    Accounts are read from the one place that is set (`database.url`, `http.url`, `function.fetch`,
    the credentials of `ccxt`), or from a tape that is a recording of them; where none is, a paper
    exchange trades, on the simulated market or on the market that is set.

    Raises:
        ConfigurationError: The market, the place of the accounts or a key cannot be used.
    """
    async with AsyncExitStack() as opened:
        # Made once: accounts and tickers share the pauses that the exchange asks for.
        exchange = exchange_of(settings)
        feed = await open_market(settings, exchange, opened)
        source = open_accounts(settings, exchange, opened)
        if isinstance(source, SqlSource):
            await source.check()
        if source is None and isinstance(feed, Tape) and feed.accounts is not None:
            source = feed.accounts
        if source is None:
            source, feed = await _paper_exchange(settings, feed, opened)
        yield await opened.enter_async_context(
            open_push_service(
                source,
                settings=settings,
                feed=feed,
                channels=[each.named(name) for name, each in settings.channels.items()],
                authenticate=authenticate or authenticator(settings),
            )
        )


def exchange_of(settings: Settings) -> Callable[[], ExchangeOptions]:
    """The exchange of ccxt, made when it is first asked for and then the same for all."""
    return functools.cache(partial(_exchange, settings))


async def open_market(
    settings: Settings, exchange: Callable[[], ExchangeOptions], opened: AsyncExitStack
) -> TickerFeed | None:
    """Open the market that is set; None where the paper exchange has its simulated one.

    Raises:
        ConfigurationError: It cannot be used.
    """
    market, ccxt = settings.market, settings.ccxt
    match market.feed:
        case "binance":
            return _through_proxies(_live(BinanceFeed, binance.LIMITS, market), settings)
        case "bybit":
            return _through_proxies(_live(BybitFeed, bybit.LIMITS, market), settings)
        case "okx":
            return _through_proxies(_live(OkxFeed, okx.LIMITS, market), settings)
        case "ccxt":
            feed = CcxtFeed(exchange(), interval_s=ccxt.interval_s)
            opened.callback(feed.close)
            return feed
    if market.tape is None:
        return None
    tape = Tape(market.tape, market.speed, market.loop)
    await tape.open()
    return tape


class _Feed(Protocol):
    """Makes the feed of an exchange; `url` has a default."""

    def __call__(
        self, url: str = ..., *, limits: ExchangeLimits, rest_url: str | None
    ) -> ExchangeFeed: ...


def _live(feed: _Feed, limits: ExchangeLimits, market: Market) -> ExchangeFeed:
    limits = attrs.evolve(limits, mute_s=market.stale_after_s)
    if market.url is None:
        return feed(limits=limits, rest_url=market.rest_url)
    return feed(market.url, limits=limits, rest_url=market.rest_url)


def open_accounts(
    settings: Settings, exchange: Callable[[], ExchangeOptions], opened: AsyncExitStack
) -> Source | None:
    """Open where the settings say that accounts come from; None for the paper exchange.

    Raises:
        ConfigurationError: That cannot be used.
    """
    if settings.database.url is not None:
        database = _database(settings.database.url, settings.database)
        opened.callback(database.close)
        return database
    if settings.http.url is not None:
        return _http(settings, opened)
    if settings.function.fetch is not None:
        return _functions(settings.function.fetch, settings.function)
    if settings.ccxt.credentials_file is not None or settings.ccxt.credentials is not None:
        accounts = CcxtSource(
            exchange(),
            _credentials(settings.ccxt),
            order_symbols=settings.ccxt.order_symbols.split(),
            fill_symbols=settings.ccxt.fill_symbols.split(),
            fills_interval_s=settings.ccxt.fills_interval_s,
        )
        opened.callback(accounts.close)
        return accounts
    return None


def _database(url: str, database: Database) -> SqlSource:
    if database.notify_channel is not None:
        return PostgresSource(url, database.queries, database.notify_channel, **_options(database))
    return SqlSource(url, database.queries, **_options(database))


def _options(database: Database) -> dict[str, Any]:
    names = ("threads", "statement_timeout_s", "user_id", "time_zone", "value_bytes")
    return {name: getattr(database, name) for name in names}


def _http(settings: Settings, opened: AsyncExitStack) -> Source:
    # It needs a library that is not installed with this one.
    from trading_push.sources.http.source import http_source

    source = http_source(settings.http, _proxies(settings))
    opened.push_async_callback(source.aclose)
    return source


def _through_proxies(feed: ExchangeFeed, settings: Settings) -> ExchangeFeed:
    feed.reach_through(_proxies(settings))
    return feed


def _proxies(settings: Settings) -> OutboundProxies:
    return OutboundProxies(settings.proxy.url, settings.proxy.no_proxy)


async def _paper_exchange(
    settings: Settings, market: TickerFeed | None, opened: AsyncExitStack
) -> tuple[Source, TickerFeed]:
    database, seed = settings.database, settings.market.seed
    path = database.path or _default_path()
    exchange = await opened.enter_async_context(
        open_paper_exchange(path, market=market or SimulatedMarket(seed), seed=seed)
    )
    source = paper_accounts(path, database)
    opened.callback(source.close)
    await source.check()
    return source, exchange


def paper_accounts(path: Path, database: Database) -> PaperSource:
    """Read the accounts of a paper exchange's file, which has to be there."""
    return PaperSource(path, database.queries, **_options(database))


def _functions(fetch: str, settings: Function) -> Source:
    asked = import_string.function("function.fetch", fetch)
    many = None
    if settings.fetch_many is not None:
        many = import_string.function("function.fetch_many", settings.fetch_many)
    data_types = settings.data_types.split() or None
    if settings.flask_app is None:
        return FunctionSource(
            asked, fetch_many=many, data_types=data_types, user_id=settings.user_id
        )
    app = import_string.flask_app("function.flask_app", settings.flask_app)
    return FlaskSource(app, asked, fetch_many=many, data_types=data_types, user_id=settings.user_id)


def _exchange(whole: Settings) -> ExchangeOptions:
    settings = whole.ccxt
    if settings.exchange is None:
        raise ConfigurationError("ccxt.exchange is not set: name the exchange")
    return ExchangeOptions(
        settings.exchange,
        url=settings.url,
        sandbox=settings.sandbox,
        market_type=settings.market_type,
        timeout_s=settings.timeout_s,
        options=settings.options,
        proxies=_proxies(whole),
    )


def _credentials(settings: Ccxt) -> Mapping[str, Mapping[str, str]]:
    if settings.credentials_file is not None:
        return CredentialsFile(settings.credentials_file)
    return credentials_of_json(settings.credentials or "")


def _default_path() -> Path:
    directory = data_dir()
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(
            f"{directory} cannot be made ({error.strerror}): give another file with --db"
        ) from None
    return directory / PAPER_FILE
