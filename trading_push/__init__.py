"""A real-time push server for trading back ends, on trio.

::

    async with open_push_service(MySource(), authenticate=my_authenticate) as service:
        await serve(service, hypercorn.Config())
"""

from typing import TYPE_CHECKING

from trading_push.lazy import lazy

if TYPE_CHECKING:
    from trading_push.auth.principal import Authenticate, Handshake, Principal
    from trading_push.auth.tokens import JwtAuthenticator, issue_token
    from trading_push.client.client import open_client
    from trading_push.client.messages import Push
    from trading_push.client.publisher import Publisher
    from trading_push.endpoints.hypercorn.link import guard_hypercorn
    from trading_push.errors import (
        AuthenticationError,
        CloseCode,
        ConfigurationError,
        ErrorCode,
        LinkError,
        PayloadError,
        PublishError,
        RequestError,
        SendTimeout,
        ServiceClosed,
        SourceError,
        TradingPushError,
        TransportClosed,
    )
    from trading_push.models import Balance, Fill, Order, Pnl, Position, SymbolPnl, Ticker
    from trading_push.server import serve
    from trading_push.service import PushService, open_push_service
    from trading_push.settings.loading import load_settings
    from trading_push.settings.schema import Settings
    from trading_push.sources.base import (
        BatchSource,
        ChangeSink,
        ListedFeed,
        MarketSink,
        SessionSource,
        Source,
        TickerFeed,
        WatchedFeed,
        WatchingSource,
    )
    from trading_push.sources.ccxt.exchange import ExchangeOptions
    from trading_push.sources.ccxt.feed import CcxtFeed
    from trading_push.sources.ccxt.source import CcxtSource
    from trading_push.sources.exchanges.binance import BinanceFeed
    from trading_push.sources.exchanges.bybit import BybitFeed
    from trading_push.sources.exchanges.okx import OkxFeed
    from trading_push.sources.flask import FlaskSource
    from trading_push.sources.functions import FunctionSource
    from trading_push.sources.sql.postgres import PostgresSource
    from trading_push.sources.sql.source import SqlSource
    from trading_push.statistics import Latest, Statistics
    from trading_push.topics import Channel
else:
    __getattr__ = lazy(
        __name__,
        {
            "auth.principal": "Authenticate Handshake Principal",
            "auth.tokens": "JwtAuthenticator issue_token",
            "client.client": "open_client",
            "client.messages": "Push",
            "client.publisher": "Publisher",
            "errors": (
                "AuthenticationError CloseCode ConfigurationError ErrorCode LinkError PayloadError "
                "PublishError RequestError SendTimeout ServiceClosed SourceError "
                "TradingPushError TransportClosed"
            ),
            "models": "Balance Fill Order Pnl Position SymbolPnl Ticker",
            "server": "serve",
            "service": "PushService open_push_service",
            "statistics": "Latest Statistics",
            "settings.loading": "load_settings",
            "settings.schema": "Settings",
            "sources.base": (
                "BatchSource ChangeSink ListedFeed MarketSink SessionSource Source TickerFeed "
                "WatchedFeed WatchingSource"
            ),
            "sources.ccxt.exchange": "ExchangeOptions",
            "sources.ccxt.feed": "CcxtFeed",
            "sources.ccxt.source": "CcxtSource",
            "sources.exchanges.binance": "BinanceFeed",
            "sources.exchanges.bybit": "BybitFeed",
            "sources.exchanges.okx": "OkxFeed",
            "sources.flask": "FlaskSource",
            "sources.functions": "FunctionSource",
            "sources.sql.postgres": "PostgresSource",
            "sources.sql.source": "SqlSource",
            "topics": "Channel",
            "endpoints.hypercorn.link": "guard_hypercorn",
        },
    )

__all__ = [
    "Authenticate",
    "AuthenticationError",
    "Balance",
    "BatchSource",
    "BinanceFeed",
    "BybitFeed",
    "CcxtFeed",
    "CcxtSource",
    "ChangeSink",
    "Channel",
    "CloseCode",
    "ConfigurationError",
    "ErrorCode",
    "ExchangeOptions",
    "Fill",
    "FlaskSource",
    "FunctionSource",
    "Handshake",
    "JwtAuthenticator",
    "Latest",
    "LinkError",
    "ListedFeed",
    "MarketSink",
    "OkxFeed",
    "Order",
    "PayloadError",
    "Pnl",
    "Position",
    "PostgresSource",
    "Principal",
    "PublishError",
    "Publisher",
    "Push",
    "PushService",
    "RequestError",
    "SendTimeout",
    "ServiceClosed",
    "SessionSource",
    "Settings",
    "Source",
    "SourceError",
    "SqlSource",
    "Statistics",
    "SymbolPnl",
    "Ticker",
    "TickerFeed",
    "TradingPushError",
    "TransportClosed",
    "WatchedFeed",
    "WatchingSource",
    "guard_hypercorn",
    "issue_token",
    "load_settings",
    "open_client",
    "open_push_service",
    "serve",
]
