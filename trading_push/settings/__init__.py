"""The settings: what they are, how they are checked, and how they are read."""

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
                "Auth Ccxt Database Function Http Intervals Limits Log Market Query Server Settings"
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
    "Query",
    "Server",
    "Settings",
    "load_settings",
]
