"""Refuse settings that do not go together."""

from __future__ import annotations

import ipaddress
from typing import Final

import attrs

from trading_push.errors import ConfigurationError
from trading_push.settings.schema import Auth, Intervals, Settings

__all__ = ["DATA_TYPES", "check", "check_auth", "check_demo", "has_paper_exchange", "is_loopback"]

DATA_TYPES: Final = tuple(field.name for field in attrs.fields(Intervals))
"""The data types that accounts have."""


def check(settings: Settings) -> None:
    """Check what can be known from the settings themselves, before anything is opened.

    Raises:
        ConfigurationError: Two of them do not go together.
    """
    _check_accounts(settings)
    _check_channels(settings)
    _check_market(settings)
    if settings.jwt_secret is not None and settings.auth.secret_file is not None:
        raise ConfigurationError(
            "jwt_secret and auth.secret_file are both set: keep the one that has the secret"
        )


def has_paper_exchange(settings: Settings) -> bool:
    """Whether accounts are those of the paper exchange, because no other place is set."""
    return not set(_places(settings)) - {"database.path"}


def _places(settings: Settings) -> list[str]:
    """The settings of where accounts are read from that are set."""
    places = {
        "database.url": settings.database.url,
        "database.path": settings.database.path,
        "http.url": settings.http.url,
        "function.fetch": settings.function.fetch,
        "ccxt.credentials_file": settings.ccxt.credentials_file,
        "ccxt.credentials": settings.ccxt.credentials,
    }
    return [name for name, value in places.items() if value is not None]


def _check_accounts(settings: Settings) -> None:
    """Accounts are read from one place, which has all that it needs."""
    database, http = settings.database, settings.http
    function = settings.function

    # One place.
    given = _places(settings)
    if len(given) > 1:
        raise ConfigurationError(
            f"{given[0]} and {given[1]} are both set: keep the one to read accounts from"
        )

    # All that it needs.
    if database.notify_channel is not None and database.url is None:
        raise ConfigurationError(
            "database.notify_channel is set without database.url: set the url of a PostgreSQL "
            "database, or remove the channel"
        )
    tokens = [
        name for name in ("token", "token_file", "token_command") if getattr(http, name) is not None
    ]
    if len(tokens) > 1:
        raise ConfigurationError(
            f"http.{tokens[0]} and http.{tokens[1]} are both set: keep the one that has the token"
        )
    if http.client_key is not None and http.client_cert is None:
        raise ConfigurationError(
            "http.client_key is set without http.client_cert: give the certificate as well"
        )
    if http.url is None and http.batch_url is not None:
        raise ConfigurationError("http.batch_url is set without http.url: give that one as well")
    if database.url is not None and not database.queries:
        raise ConfigurationError(
            "database.url is set without queries: write a table [database.queries.NAME] with the "
            f"sql of each data type ({', '.join(DATA_TYPES)}) in the configuration file"
        )
    for name in ("fetch_many", "flask_app", "data_types"):
        if getattr(function, name) not in (None, "") and function.fetch is None:
            raise ConfigurationError(
                f"function.{name} is set without function.fetch: name the function that reads "
                "one user's data"
            )


def _check_channels(settings: Settings) -> None:
    """Each channel has a name of its own and, if it is polled, something that answers for it."""
    queries = settings.database.queries
    ccxt = settings.ccxt
    for name, channel in settings.channels.items():
        try:
            channel.named(name)
        except ConfigurationError as error:
            raise ConfigurationError(f"[channels.{name}]: {error}") from None
        if name == "fills" and (channel.interval_s is None or name not in queries):
            raise ConfigurationError(
                "[channels.fills]: there is a channel of that name already; only interval_s can be "
                "set, with a query [database.queries.fills]"
            )
        if channel.interval_s is None:
            continue
        if name in DATA_TYPES:
            raise ConfigurationError(
                f"[channels.{name}] has an interval: set intervals.{name} instead"
            )
        if ccxt.credentials_file is not None or ccxt.credentials is not None:
            raise ConfigurationError(
                f"[channels.{name}] has an interval, and accounts of ccxt have no {name}: remove "
                "interval_s, and publish to it"
            )
        if channel.kind == "events" and name not in queries:
            raise ConfigurationError(
                f"[channels.{name}] is of kind 'events' and cannot be polled: write "
                f"[database.queries.{name}] with a cursor, or remove interval_s, and publish to it"
            )
        if settings.http.url is None and settings.function.fetch is None and name not in queries:
            raise ConfigurationError(
                f"[channels.{name}] has an interval and no query: write [database.queries.{name}], "
                "or remove interval_s"
            )
        asked = settings.function.data_types.split()
        if settings.function.fetch is not None and asked and name not in asked:
            raise ConfigurationError(
                f"[channels.{name}] has an interval, and function.data_types does not name {name}: "
                "add it there"
            )
    for name, query in queries.items():
        own = settings.channels.get(name)
        is_events = name == "fills" or (own is not None and own.kind == "events")
        if is_events and query.cursor is None:
            raise ConfigurationError(
                f"database.queries.{name} reads events without a cursor: name the column that "
                'only grows (cursor = "fill_id") and select by it (AND fill_id > :after ORDER BY '
                "fill_id)"
            )
        if is_events and settings.database.url is None:
            raise ConfigurationError(
                f"database.queries.{name} reads events without database.url: set that, or "
                "remove the query"
            )
        if query.cursor is not None and not is_events:
            raise ConfigurationError(
                f"database.queries.{name} has a cursor, which is for events: remove it, or add "
                f'[channels.{name}] with kind = "events" and interval_s'
            )
        if name == "fills":
            continue
        if name not in DATA_TYPES and (own is None or own.interval_s is None):
            raise ConfigurationError(
                f"database.queries.{name}: there is no such data type: use "
                f"{', '.join(DATA_TYPES)}, or add [channels.{name}] with interval_s"
            )


def _check_market(settings: Settings) -> None:
    """Tickers come from one place; an exchange of ccxt has a use and a time-out that fits."""
    market, ccxt = settings.market, settings.ccxt

    # The market.
    if market.tape is not None and market.feed != "simulated":
        raise ConfigurationError(
            f"market.tape and market.feed = {market.feed!r} are both set: keep the one to take "
            "tickers from"
        )
    for name in ("url", "rest_url"):
        if getattr(market, name) is not None and market.feed not in ("binance", "bybit", "okx"):
            raise ConfigurationError(
                f"market.{name} is set without an exchange: set market.feed to binance, bybit or "
                "okx"
            )

    # The exchange of ccxt, which may have accounts, tickers or both.
    has_keys = ccxt.credentials_file is not None or ccxt.credentials is not None
    if ccxt.exchange is None and (has_keys or market.feed == "ccxt"):
        what = "ccxt.credentials" if has_keys else "market.feed = 'ccxt'"
        raise ConfigurationError(
            f"{what} is set without ccxt.exchange: name the exchange that it is for"
        )
    if ccxt.exchange is not None and not has_keys and market.feed != "ccxt":
        raise ConfigurationError(
            "ccxt.exchange is set and not used: give ccxt.credentials_file to read accounts there, "
            "or set market.feed to ccxt"
        )
    if ccxt.exchange is not None and ccxt.timeout_s >= settings.polling.fetch_timeout_s:
        raise ConfigurationError(
            f"ccxt.timeout_s is {ccxt.timeout_s}: give less than polling.fetch_timeout_s"
        )


def check_auth(auth: Auth) -> None:
    """Check that an algorithm and its key go together; `JwtAuthenticator` does this first.

    Raises:
        ConfigurationError: A key is missing, or is one too many.
    """
    if auth.algorithm == "HS256":
        if auth.public_key_file is not None or auth.jwks_url is not None:
            raise ConfigurationError(
                "auth has a public key, and auth.algorithm is HS256, which has none: "
                "set auth.algorithm to RS256, ES256 or EdDSA"
            )
    elif auth.public_key_file is not None and auth.jwks_url is not None:
        raise ConfigurationError("set auth.public_key_file or auth.jwks_url, not both")
    elif auth.public_key_file is None and auth.jwks_url is None:
        raise ConfigurationError(
            f"auth.algorithm is {auth.algorithm}: "
            "set auth.public_key_file or auth.jwks_url to the key that tokens are checked with"
        )


def check_demo(settings: Settings) -> None:
    """Check that the demo, whose tokens are printed, is open to this machine only.

    Raises:
        ConfigurationError: It would listen for others.
    """
    if not is_loopback(settings.server.host):
        raise ConfigurationError(
            f"--host {settings.server.host} would open the demo to others: set "
            "TRADING_PUSH_JWT_SECRET to a random text of 32 bytes or more first"
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect to this address or host name."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"
