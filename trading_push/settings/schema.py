"""Every setting and every bound in one tree of frozen attrs classes.

Units stand in the names: `_s` seconds, `_ms` milliseconds, `_bytes`, `_hz` times a second.
Defaults are the ones of the wire protocol. Values are checked when an object is made, so that a
setting from a file, the environment, a flag or an application's code meets the same check.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import attrs

from trading_push.settings.validators import (
    columns,
    file_path,
    headers,
    is_host,
    is_identifier,
    is_json,
    is_object_name,
    is_path,
    is_pointer,
    is_query,
    is_token,
    is_url,
    is_websocket_url,
    networks,
    number,
    one_of,
    origins,
    secret,
    switch,
    text,
    url_template,
    whole,
    words,
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
]

optional = attrs.validators.optional
_object_name = optional(text("give module:attribute, as in shop.push:fetch", is_object_name))


@attrs.frozen
class Server:
    """Where the server listens."""

    host: str = attrs.field(
        default="127.0.0.1", validator=text("give an address or a host name", is_host)
    )
    port: int = attrs.field(default=8000, validator=whole(0, 65535))
    path: str = attrs.field(
        default="/ws", validator=text("give a path that begins with /", is_path)
    )
    origins: str = attrs.field(default="", validator=origins)
    """The web pages that may connect, by a blank between them; empty allows those of our host."""
    origin_required: bool = attrs.field(default=False, validator=switch)
    """Whether a handshake without `Origin`, which no browser sends, is refused."""
    trusted_proxies: str = attrs.field(default="", validator=networks)
    """Addresses or networks, with blanks between them, whose `X-Forwarded-For` is believed."""


@attrs.frozen
class Auth:
    """How a token is checked; the secret itself is `Settings.jwt_secret`.

    `public_key_file` (PEM) or `jwks_url` serve RS256, ES256 and EdDSA; the secret serves HS256.
    """

    algorithm: Literal["HS256", "RS256", "ES256", "EdDSA"] = attrs.field(
        default="HS256", validator=one_of("HS256", "RS256", "ES256", "EdDSA")
    )
    public_key_file: Path | None = attrs.field(default=None, validator=optional(file_path))
    jwks_url: str | None = attrs.field(
        default=None, validator=optional(text("give a URL that begins with https://", is_url))
    )
    audience: str | None = attrs.field(
        default=None, validator=optional(text("give the `aud` that tokens carry"))
    )
    issuer: str | None = attrs.field(
        default=None, validator=optional(text("give the `iss` that tokens carry"))
    )
    leeway_s: float = attrs.field(default=5.0, validator=number(0, 300))


@attrs.frozen
class Intervals:
    """Seconds between two polls of the source, for each user channel."""

    balance: float = attrs.field(default=10, validator=number(0.1))
    positions: float = attrs.field(default=5, validator=number(0.1))
    pnl: float = attrs.field(default=5, validator=number(0.1))
    orders: float = attrs.field(default=15, validator=number(0.1))


@attrs.frozen
class Limits:
    """The bounds that keep one connection from harming the others."""

    authentication_timeout_s: float = attrs.field(default=10, validator=number(0.1))
    handshake_timeout_s: float = attrs.field(default=10, validator=number(0.1))
    header_bytes: int = attrs.field(default=16_384, validator=whole(1024))
    """How long a request's head may be, under `serve`."""
    heartbeat_s: float = attrs.field(default=15, validator=number(0.1))
    expiry_notice_s: float = attrs.field(default=30, validator=number(0))
    send_timeout_s: float = attrs.field(default=10, validator=number(0.1))
    drain_timeout_s: float = attrs.field(default=4, validator=number(0))
    close_timeout_s: float = attrs.field(default=1, validator=number(0.1))
    """How long a polite close may take before the stream is aborted."""
    reap_after_s: float = attrs.field(default=5, validator=number(0.1))
    """How long a handler may go on after its peer's end of file."""
    handler_timeout_s: float = attrs.field(default=30, validator=number(1))
    """How long a handler may leave its peer's bytes unread."""
    connections: int = attrs.field(default=10_000, validator=whole(1))
    unauthenticated_per_address: int = attrs.field(default=200, validator=whole(1))
    connections_per_user: int = attrs.field(default=50, validator=whole(1))
    over_user_limit: Literal["reject", "replace"] = attrs.field(
        default="reject", validator=one_of("reject", "replace")
    )
    """What happens to a user's connection too many: it is refused, or takes the oldest's place."""
    subscriptions: int = attrs.field(default=200, validator=whole(1))
    messages_per_s: float = attrs.field(default=20, validator=number(0.1))
    """How many messages of a connection are served, on an average of some seconds."""
    messages_burst: int = attrs.field(default=60, validator=whole(1))
    """How many at once; as many again may be refused before the connection ends."""
    message_bytes: int = attrs.field(default=65_536, validator=whole(128))
    publish_bytes: int = attrs.field(default=1_048_576, validator=whole(128))
    """How long the body of a `POST /publish` may be."""
    bad_messages: int = attrs.field(default=10, validator=whole(1))
    pending_bytes: int = attrs.field(default=1_048_576, validator=whole(65_536))
    first_value_wait_s: float = attrs.field(default=1, validator=number(0))
    """How long a subscription waits for the source's first value before it is told `down`."""
    fetch_timeout_s: float = attrs.field(default=60, validator=number(0.1))
    """How long one fetch from the source may take."""
    fetches: int = attrs.field(default=40, validator=whole(1, 1000))
    """How many fetches of one data type may be under way at the same time."""
    fetch_batch: int = attrs.field(default=500, validator=whole(1, 10_000))
    """How many users one `fetch_many` is asked for."""
    stale_after_s: float = attrs.field(default=30, validator=number(0.1))
    """After how long without an answer of the source a polled value is said to be stale, where two
    intervals are not longer."""
    watch_linger_s: float = attrs.field(default=1, validator=number(0))
    """How long the source is still asked for what nobody watches any more."""
    topic_linger_s: float = attrs.field(default=60, validator=number(0))
    """How long a polled topic that nobody watches keeps its value and its numbering."""


@attrs.frozen
class Market:
    """Where tickers come from: the simulation, a recorded tape, or an exchange.

    `url` is another address of the exchange: its test network, another category, a loopback.
    """

    feed: Literal["simulated", "binance", "bybit", "ccxt"] = attrs.field(
        default="simulated", validator=one_of("simulated", "binance", "bybit", "ccxt")
    )
    url: str | None = attrs.field(
        default=None,
        validator=optional(text("give a URL that begins with wss:// or ws://", is_websocket_url)),
    )
    seed: int = attrs.field(default=1, validator=whole(0))
    tape: Path | None = attrs.field(default=None, validator=optional(file_path))
    speed: float = attrs.field(default=1.0, validator=number(0.001, 100_000))
    loop: bool = attrs.field(default=False, validator=switch)
    max_hz: float = attrs.field(default=10, validator=number(0.1, 1000))
    """How often a second a symbol's latest value is published at most."""
    stale_after_s: float = attrs.field(default=60, validator=number(0.1))
    """After how long without an update a symbol is said to be stale."""


@attrs.frozen
class Query:
    """How one data type is read from an SQL database.

    Args:
        sql: With an expanding `:user_ids` and a `user_id` column in its result (many users in one
            go), or with `:user_id` (one user a query).
        single: The value is one object, the row itself; otherwise it is the list of the rows.
        json_columns: Columns whose text is JSON and goes into the value as it is.
        empty: The JSON of a user without rows; None is `[]`, or nothing to say where `single`.
    """

    sql: str = attrs.field(validator=text("it must select by :user_ids or :user_id", is_query))
    single: bool = attrs.field(default=False, validator=switch)
    json_columns: tuple[str, ...] = attrs.field(default=(), validator=columns)
    empty: str | None = attrs.field(default=None, validator=optional(text("give JSON", is_json)))


@attrs.frozen
class Database:
    """Where accounts are read from.

    `url` (SQLAlchemy) is a production database, which is only read, by `queries` (a query for each
    data type). Without it a paper exchange trades in the SQLite file `path` (by default in the
    user's data directory) and brings its own queries.
    """

    url: str | None = attrs.field(
        default=None, repr=False, validator=optional(text("give a URL of SQLAlchemy"))
    )
    path: Path | None = attrs.field(default=None, validator=optional(file_path))
    queries: dict[str, Query] = attrs.field(factory=dict)
    threads: int = attrs.field(default=4, validator=whole(1, 100))
    statement_timeout_s: float = attrs.field(default=30, validator=number(0.1))
    """How long one query may take, where the database can be told (PostgreSQL and SQLite)."""
    notify_channel: str | None = attrs.field(
        default=None,
        validator=optional(text("give a name of a-z, 0-9 and _", is_identifier)),
    )
    """PostgreSQL's channel on which the database tells of changes, so that they push at once."""


@attrs.frozen
class Http:
    """The HTTP service that accounts are read from."""

    url: str | None = attrs.field(
        default=None, repr=False, validator=optional(url_template("user_id", "data_type"))
    )
    batch_url: str | None = attrs.field(
        default=None, repr=False, validator=optional(url_template("user_ids", "data_type"))
    )
    """Where many users are read in one request."""
    pointer: str = attrs.field(
        default="", validator=text("give a JSON pointer, like /data", is_pointer)
    )
    """Where in an answer the data are (RFC 6901); empty is the whole answer."""
    token: str | None = attrs.field(
        default=None,
        repr=False,
        validator=optional(text("give the token as it stands behind `Bearer`", is_token)),
    )
    headers: dict[str, str] = attrs.field(factory=dict, repr=False, validator=headers)
    timeout_s: float = attrs.field(default=10, validator=number(0.1))
    connections: int = attrs.field(default=20, validator=whole(1, 1000))


@attrs.frozen
class Function:
    """An application's own functions, each as `module:attribute`, to read accounts by."""

    fetch: str | None = attrs.field(default=None, validator=_object_name)
    """Called with a user's id and a data type."""
    fetch_many: str | None = attrs.field(default=None, validator=_object_name)
    """Called in its place, with many users' ids."""
    flask_app: str | None = attrs.field(default=None, validator=_object_name)
    """A Flask application, or what makes one, a fresh context of which is round each call."""


@attrs.frozen
class Ccxt:
    """An exchange that ccxt knows: accounts by their credentials, tickers by `market.feed`."""

    exchange: str | None = attrs.field(
        default=None, validator=optional(text("give its name in ccxt, as binance"))
    )
    credentials_file: Path | None = attrs.field(default=None, validator=optional(file_path))
    """TOML with a table [users.ID] for each user, which nobody but its owner may read."""
    credentials: str | None = attrs.field(
        default=None, repr=False, validator=optional(text("give JSON"))
    )
    """The same as JSON, for the environment."""
    market_type: Literal["spot", "swap", "future"] | None = attrs.field(
        default=None, validator=optional(one_of("spot", "swap", "future"))
    )
    """Which markets are meant where a symbol or an account may be of several."""
    url: str | None = attrs.field(
        default=None, validator=optional(text("give a URL of scheme and host", is_url))
    )
    """Where the exchange's servers are instead; all of them."""
    sandbox: bool = attrs.field(default=False, validator=switch)
    timeout_s: float = attrs.field(default=10, validator=number(0.1, 300))
    """How long the exchange may leave a request unanswered."""
    interval_s: float = attrs.field(default=1, validator=number(0.1))
    """How often watched tickers are asked for."""
    fill_symbols: str = attrs.field(default="", validator=words)
    """The markets whose fills are published, by ccxt's names, with blanks between them; `*` is all
    of them, where the exchange can."""
    fills_interval_s: float = attrs.field(default=5, validator=number(0.1))


@attrs.frozen
class Log:
    """The log lines' language and format; they go to standard error, and to `file` as well."""

    lang: Literal["zh", "en"] = attrs.field(default="zh", validator=one_of("zh", "en"))
    format: Literal["text", "json"] = attrs.field(default="text", validator=one_of("text", "json"))
    file: Path | None = attrs.field(default=None, validator=optional(file_path))
    queue_lines: int = attrs.field(default=100_000, validator=whole(100))
    """How many lines may wait for a slow reader before lines are dropped and counted."""


@attrs.frozen
class Settings:
    """The whole tree. `jwt_secret` never shows in a `repr`."""

    jwt_secret: str | None = attrs.field(default=None, repr=False, validator=optional(secret))
    server: Server = attrs.field(factory=Server)
    auth: Auth = attrs.field(factory=Auth)
    intervals: Intervals = attrs.field(factory=Intervals)
    limits: Limits = attrs.field(factory=Limits)
    market: Market = attrs.field(factory=Market)
    database: Database = attrs.field(factory=Database)
    http: Http = attrs.field(factory=Http)
    function: Function = attrs.field(factory=Function)
    ccxt: Ccxt = attrs.field(factory=Ccxt)
    log: Log = attrs.field(factory=Log)
