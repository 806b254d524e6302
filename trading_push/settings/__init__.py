"""The settings: their definitions, how they are loaded and how they are checked."""

from typing import TYPE_CHECKING

from trading_push.lazy import lazy

if TYPE_CHECKING:
    from trading_push.settings.loading import load_settings
    from trading_push.settings.schema import (
        Auth,
        Ccxt,
        Database,
        Function,
        Http,
        Intervals,
        Limits,
        Log,
        Market,
        Polling,
        Query,
        Server,
        Settings,
    )
else:
    __getattr__ = lazy(
        __name__,
        {
            "loading": "load_settings",
            "schema": (
                "Auth Ccxt Database Function Http Intervals Limits Log Market Polling Query Server "
                "Settings"
            ),
        },
    )

__all__ = [
    "Auth",
    "Ccxt",
    "Database",
    "Function",
    "Http",
    "Intervals",
    "Limits",
    "Log",
    "Market",
    "Polling",
    "Query",
    "Server",
    "Settings",
    "load_settings",
]
