"""Every setting and every bound in one tree of frozen attrs classes.

Units stand in the names: `_s` seconds, `_ms` milliseconds, `_bytes`, `_hz` times a second.
Defaults are the ones of the wire protocol. Values are checked when an object is made, so that a
setting from a file, the environment, a flag or an application's code meets the same check.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import attrs

from trading_push.errors import ConfigurationError

__all__ = [
    "Auth",
    "Database",
    "Intervals",
    "Limits",
    "Log",
    "Market",
    "Query",
    "Server",
    "Settings",
]

Check = Callable[[Any, "attrs.Attribute[Any]", Any], None]


def number(low: float, high: float = math.inf) -> Check:
    """A check for a finite number from `low` to `high`; no bool passes, nor a NaN."""

    def check(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not (low <= value <= high and math.isfinite(value))
        ):
            upto = f" to {high:g}" if math.isfinite(high) else " or more"
            raise ConfigurationError(f"{attribute.name} is {value!r}: give a number, {low:g}{upto}")

    return check


def whole(low: int, high: int = 2**53) -> Check:
    """A check for a whole number from `low` to `high`."""

    def check(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ConfigurationError(
                f"{attribute.name} is {value!r}: give a whole number, {low} to {high}"
            )

    return check


def one_of(*choices: object) -> Check:
    """A check for one of a few values."""

    def check(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
        if value not in choices:
            raise ConfigurationError(
                f"{attribute.name} is {value!r}: give one of {', '.join(map(str, choices))}"
            )

    return check


@attrs.frozen
class Server:
    """Where the server listens."""

    host: str = "127.0.0.1"
    port: int = attrs.field(default=8000, validator=whole(0, 65535))
    path: str = "/ws"


@attrs.frozen
class Auth:
    """How a token is checked; the secret itself is `Settings.jwt_secret`.

    `public_key_file` (PEM) or `jwks_url` serve RS256, ES256 and EdDSA; the secret serves HS256.
    """

    algorithm: Literal["HS256", "RS256", "ES256", "EdDSA"] = attrs.field(
        default="HS256", validator=one_of("HS256", "RS256", "ES256", "EdDSA")
    )
    public_key_file: Path | None = None
    jwks_url: str | None = None
    audience: str | None = None
    issuer: str | None = None
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
    heartbeat_s: float = attrs.field(default=15, validator=number(0.1))
    send_timeout_s: float = attrs.field(default=10, validator=number(0.1))
    drain_timeout_s: float = attrs.field(default=4, validator=number(0))
    close_timeout_s: float = attrs.field(default=1, validator=number(0))
    """How long a polite close may take before the stream is aborted."""
    reap_after_s: float = attrs.field(default=5, validator=number(0.1))
    """How long a handler may go on after its peer's end of file."""
    handler_timeout_s: float = attrs.field(default=30, validator=number(1))
    """How long a handler may leave its peer's bytes unread."""
    connections: int = attrs.field(default=10_000, validator=whole(1))
    connections_per_user: int = attrs.field(default=50, validator=whole(1))
    unauthenticated_per_address: int = attrs.field(default=200, validator=whole(1))
    subscriptions: int = attrs.field(default=200, validator=whole(1))
    message_bytes: int = attrs.field(default=65_536, validator=whole(128))
    messages_per_s: int = attrs.field(default=20, validator=whole(1))
    message_burst: int = attrs.field(default=60, validator=whole(1))
    bad_messages: int = attrs.field(default=10, validator=whole(1))
    pending_bytes: int = attrs.field(default=1_048_576, validator=whole(65_536))
    first_value_wait_s: float = attrs.field(default=1, validator=number(0))
    """How long a subscription waits for the source's first value before it is told `down`."""
    fetch_timeout_s: float = attrs.field(default=60, validator=number(0.1))
    """How long one fetch from the source may take."""
    fetch_threads: int = attrs.field(default=40, validator=whole(1, 1000))
    """How many worker threads the sources may use at the same time."""
    fetch_batch: int = attrs.field(default=500, validator=whole(1, 10_000))
    """How many users one `fetch_many` is asked for."""


@attrs.frozen
class Market:
    """Where tickers come from: the simulation, or a recorded tape."""

    seed: int = attrs.field(default=1, validator=whole(0))
    tape: Path | None = None
    speed: float = attrs.field(default=1.0, validator=number(0.001, 100_000))
    loop: bool = False
    max_hz: float = attrs.field(default=10, validator=number(0.1, 1000))
    """How often a second a symbol's latest value is published at most."""


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

    sql: str
    single: bool = False
    json_columns: tuple[str, ...] = ()
    empty: str | None = None


@attrs.frozen
class Database:
    """Where accounts are read from.

    `url` (SQLAlchemy) is a production database, which is only read, by `queries` (a query for each
    data type). Without it a paper exchange trades in the SQLite file `path` (by default in the
    user's data directory) and brings its own queries.
    """

    url: str | None = attrs.field(default=None, repr=False)
    path: Path | None = None
    queries: dict[str, Query] = attrs.field(factory=dict)
    threads: int = attrs.field(default=4, validator=whole(1, 100))


@attrs.frozen
class Log:
    """The log lines' language, format and file; without a file they go to standard error."""

    lang: Literal["zh", "en"] = attrs.field(default="zh", validator=one_of("zh", "en"))
    format: Literal["text", "json"] = attrs.field(default="text", validator=one_of("text", "json"))
    file: Path | None = None
    queue_lines: int = attrs.field(default=100_000, validator=whole(100))
    """How many lines may wait for a slow reader before lines are dropped and counted."""


@attrs.frozen
class Settings:
    """The whole tree. `jwt_secret` never shows in a `repr`."""

    jwt_secret: str | None = attrs.field(default=None, repr=False)
    server: Server = attrs.field(factory=Server)
    auth: Auth = attrs.field(factory=Auth)
    intervals: Intervals = attrs.field(factory=Intervals)
    limits: Limits = attrs.field(factory=Limits)
    market: Market = attrs.field(factory=Market)
    database: Database = attrs.field(factory=Database)
    log: Log = attrs.field(factory=Log)
