"""Every setting and every bound in one tree of frozen attrs classes, and how they are loaded.

Units stand in the names: `_s` seconds, `_ms` milliseconds, `_bytes`, `_hz` times a second.
Defaults are the ones of the wire protocol. Values are checked when an object is made, so that a
setting from a file, the environment, a flag or an application's code meets the same check.

`load_settings` puts them together: defaults < TOML file < environment < flags.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import attrs
import msgspec
import typed_settings
from typed_settings.converters import TSConverter
from typed_settings.dict_utils import set_path
from typed_settings.exceptions import ConfigFileNotFoundError, TsError
from typed_settings.loaders import EnvLoader, Loader, TomlFormat
from typed_settings.types import LoadedSettings, LoaderMeta, OptionInfo, OptionList, SettingsDict

from trading_push.errors import ConfigurationError
from trading_push.origin import is_origin
from trading_push.proxies import networks

__all__ = [
    "ENVIRONMENT_PREFIX",
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

ENVIRONMENT_PREFIX = "TRADING_PUSH_"
_CONFIG_VARIABLE = ENVIRONMENT_PREFIX + "CONFIG"
# These begin like a setting and are none: which file to read, and the token of `watch`.
_OTHER_VARIABLES = (
    _CONFIG_VARIABLE,
    ENVIRONMENT_PREFIX + "TOKEN",
    ENVIRONMENT_PREFIX + "UNGUARDED",
)

SECRET_BYTES = 32
"""How long the secret of HS256 is at least (RFC 7518, section 3.2)."""

DOT_SEGMENT = re.compile(r"/(?:\.|%2e){1,2}(?:[/?]|$)", re.IGNORECASE)
"""A piece of a URL's path that leads up, or nowhere (RFC 3986, section 5.2.4)."""

optional = attrs.validators.optional
Check = Callable[[Any, "attrs.Attribute[Any]", Any], None]


def _shown(attribute: attrs.Attribute[Any], value: object) -> str:
    """A value for a message: short, and not at all where it is a secret."""
    if attribute.repr is False:
        return "not usable"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _refuse(attribute: attrs.Attribute[Any], value: object, advice: str) -> ConfigurationError:
    return ConfigurationError(f"{attribute.name} is {_shown(attribute, value)}: {advice}")


def number(low: float, high: float = 1_000_000) -> Check:
    """A check for a finite number from `low` to `high`; no bool passes, nor a NaN."""

    def check(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not low <= value <= high
        ):
            raise _refuse(attribute, value, f"give a number, {low} to {high}")

    return check


def whole(low: int, high: int = 2**53) -> Check:
    """A check for a whole number from `low` to `high`."""

    def check(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise _refuse(attribute, value, f"give a whole number, {low} to {high}")

    return check


def one_of(*choices: str) -> Check:
    """A check for one of a few words."""

    def check(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
        if not isinstance(value, str) or value not in choices:
            raise _refuse(attribute, value, f"give one of {', '.join(choices)}")

    return check


def text(advice: str, accepts: Callable[[str], bool] = bool) -> Check:
    """A check for a text that `accepts` takes; by default one that is not empty."""

    def check(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
        if not isinstance(value, str) or not accepts(value):
            raise _refuse(attribute, value, advice)

    return check


def switch(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    """A check for true or false, and nothing that merely counts as one of them."""
    if not isinstance(value, bool):
        raise _refuse(attribute, value, "give true or false")


def words(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    """A check for a text of words, or none."""
    if not isinstance(value, str) or not value.isprintable():
        raise _refuse(attribute, value, "give words with blanks between them")


def file_path(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    """A check for a path; whether something is there is for whoever opens it."""
    if not isinstance(value, Path) or "\0" in str(value):
        raise _refuse(attribute, value, "give the path of a file")


def columns(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    """A check for a tuple of names."""
    if not isinstance(value, tuple) or not all(isinstance(name, str) and name for name in value):
        raise _refuse(attribute, value, "give the names of columns")


def secret(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    """A check for the secret of HS256, which no message shows."""
    try:
        enough = isinstance(value, str) and len(value.encode()) >= SECRET_BYTES
    except UnicodeEncodeError:  # bytes of the environment that are no UTF-8
        enough = False
    if not enough:
        raise ConfigurationError(
            f"{attribute.name} is not usable: give a random text of {SECRET_BYTES} bytes or more"
        )


def _is_path(value: str) -> bool:
    return value.startswith("/") and value.isascii() and value.isprintable() and " " not in value


def _is_url(value: str) -> bool:
    return value.startswith(("https://", "http://")) and len(value.split()) == 1


def _is_websocket_url(value: str) -> bool:
    return value.startswith(("wss://", "ws://")) and len(value.split()) == 1


def _is_host(value: str) -> bool:
    return len(value.split()) == 1 and value.isprintable() and "/" not in value


def _url_template(*names: str) -> Check:
    """A check for an http(s) URL whose path or query holds each of these names in braces.

    There may be no user and password in it, no fragment, no `.` or `..`, and nothing but what
    RFC 3986 lets stand there.
    """
    piece = "|".join((r"[\w.~!$&'()*+,;=:@/?-]", "%[0-9A-Fa-f]{2}", *(f"{{{n}}}" for n in names)))
    host = r"(?:[\w.-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?"
    url = re.compile(f"https?://{host}/(?:{piece})*", re.ASCII)
    in_braces = [f"{{{name}}}" for name in names]
    return text(
        f"give one like https://host/path with {' and '.join(in_braces)} in it, and without a user "
        "or password (http.token is for a token)",
        lambda value: (
            url.fullmatch(value) is not None
            and all(name in value for name in in_braces)
            and not DOT_SEGMENT.search(value)
            and int((_PORT.match(value) or ["", "80"])[1]) in range(1, 65536)
        ),
    )


_PORT = re.compile(r"https?://[^/]*:([0-9]+)/")
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110, section 5.6.2
# What the source says itself, or HTTP says.
_OWN_HEADERS = frozenset(
    {
        *("accept-encoding", "connection", "content-length", "host", "if-none-match"),
        *("te", "transfer-encoding", "upgrade"),
    }
)


def _headers(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    if not isinstance(value, dict):
        raise _refuse(attribute, value, "write a table [http.headers] in the configuration file")
    for name, text_ in value.items():
        if not isinstance(name, str) or not _HEADER_NAME.fullmatch(name):
            raise ConfigurationError(f"{attribute.name}: one has no name that HTTP knows")
        if name.lower() in _OWN_HEADERS:
            raise ConfigurationError(f"{attribute.name}.{name} is not for you to set: remove it")
        if (
            not isinstance(text_, str)
            or text_ != text_.strip()
            or not (text_.isascii() and text_.isprintable())
        ):
            raise ConfigurationError(
                f"{attribute.name}.{name} is not usable: give a text of ASCII characters"
            )


def _is_token(value: str) -> bool:
    return bool(value) and value.isascii() and value.isprintable() and " " not in value


def _is_pointer(value: str) -> bool:
    return re.fullmatch(r"(?:/(?:[^~/]|~[01])*)*", value) is not None  # RFC 6901, section 3


def _is_query(value: str) -> bool:
    return ":user_id" in value  # :user_ids too


def _is_identifier(value: str) -> bool:
    # Of capitals, NOTIFY makes small letters and pg_notify() does not; a name has 63 at most.
    return re.fullmatch("[a-z_][a-z0-9_]{0,62}", value) is not None


def _is_object_name(value: str) -> bool:
    module, _, attribute = value.partition(":")
    return all(part.isidentifier() for part in (*module.split("."), *attribute.split(".")))


_object_name = optional(text("give module:attribute, as in shop.push:fetch", _is_object_name))


def _is_json(value: str) -> bool:
    try:
        msgspec.json.decode(value)  # strict, where json takes NaN and Infinity
    except (ValueError, RecursionError):
        return False
    return True


def _origins(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    if not isinstance(value, str) or not all(map(is_origin, value.split())):
        advice = "give origins like https://app.example.com, with blanks between them"
        raise _refuse(attribute, value, advice)


def _networks(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    try:
        if isinstance(value, str):
            networks(value)
            return
    except ValueError:
        pass
    advice = "give addresses or networks like 10.0.0.0/8, with blanks between them"
    raise _refuse(attribute, value, advice)


@attrs.frozen
class Server:
    """Where the server listens."""

    host: str = attrs.field(
        default="127.0.0.1", validator=text("give an address or a host name", _is_host)
    )
    port: int = attrs.field(default=8000, validator=whole(0, 65535))
    path: str = attrs.field(
        default="/ws", validator=text("give a path that begins with /", _is_path)
    )
    origins: str = attrs.field(default="", validator=_origins)
    """The web pages that may connect, by a blank between them; empty allows those of our host."""
    origin_required: bool = attrs.field(default=False, validator=switch)
    """Whether a handshake without `Origin`, which no browser sends, is refused."""
    trusted_proxies: str = attrs.field(default="", validator=_networks)
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
        default=None, validator=optional(text("give a URL that begins with https://", _is_url))
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
    close_timeout_s: float = attrs.field(default=1, validator=number(0))
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
        validator=optional(text("give a URL that begins with wss:// or ws://", _is_websocket_url)),
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

    sql: str = attrs.field(validator=text("it must select by :user_ids or :user_id", _is_query))
    single: bool = attrs.field(default=False, validator=switch)
    json_columns: tuple[str, ...] = attrs.field(default=(), validator=columns)
    empty: str | None = attrs.field(default=None, validator=optional(text("give JSON", _is_json)))


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
        validator=optional(text("give a name of a-z, 0-9 and _", _is_identifier)),
    )
    """PostgreSQL's channel on which the database tells of changes, so that they push at once."""


@attrs.frozen
class Http:
    """The HTTP service that accounts are read from."""

    url: str | None = attrs.field(
        default=None, repr=False, validator=optional(_url_template("user_id", "data_type"))
    )
    batch_url: str | None = attrs.field(
        default=None, repr=False, validator=optional(_url_template("user_ids", "data_type"))
    )
    """Where many users are read in one request."""
    pointer: str = attrs.field(
        default="", validator=text("give a JSON pointer, like /data", _is_pointer)
    )
    """Where in an answer the data are (RFC 6901); empty is the whole answer."""
    token: str | None = attrs.field(
        default=None,
        repr=False,
        validator=optional(text("give the token as it stands behind `Bearer`", _is_token)),
    )
    headers: dict[str, str] = attrs.field(factory=dict, repr=False, validator=_headers)
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
        default=None, validator=optional(text("give a URL of scheme and host", _is_url))
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


_DATA_TYPES = tuple(field.name for field in attrs.fields(Intervals))


def load_settings(*, config: Path | None, flags: Mapping[str, Any]) -> Settings:
    """Put the settings together: defaults < TOML file < environment < flags.

    Args:
        config: The TOML file; None reads the one that `TRADING_PUSH_CONFIG` names, if any.
            Relative paths in it start at its own directory.
        flags: Values by setting (`server.port`), as text or as they are; None is "not given".

    Raises:
        ConfigurationError: One line with where a value came from, what is wrong and what to do.
    """
    if config is None and os.environ.get(_CONFIG_VARIABLE):
        config = Path(os.environ[_CONFIG_VARIABLE])
    # click_options() would read the files while it decorates, and --config could not work: the
    # flags are one more loader instead.
    loaders: list[Loader] = [_load_environment, _FlagLoader(flags)]
    if config is not None:
        loaders.insert(0, _FileLoader(config))
    try:
        settings = typed_settings.load_settings(
            Settings, loaders, converter=TSConverter(resolve_paths=False)
        )
    except TsError as error:  # pragma: no cover - what the loaders let through, nothing known
        raise ConfigurationError(" ".join(str(error).split())) from error
    database, http = settings.database, settings.http
    places = {
        "database.url": database.url,
        "database.path": database.path,
        "http.url": http.url,
        "function.fetch": settings.function.fetch,
        "ccxt.credentials_file": settings.ccxt.credentials_file,
        "ccxt.credentials": settings.ccxt.credentials,
    }
    given = [name for name, value in places.items() if value is not None]
    if len(given) > 1:
        raise ConfigurationError(
            f"{given[0]} and {given[1]} are both set: keep the one to read accounts from"
        )
    if database.notify_channel is not None and database.url is None:
        raise ConfigurationError(
            "database.notify_channel is set without database.url: set the url of a PostgreSQL "
            "database, or remove the channel"
        )
    if http.url is None and http.batch_url is not None:
        raise ConfigurationError("http.batch_url is set without http.url: give that one as well")
    if database.url is not None and not database.queries:
        raise ConfigurationError(
            "database.url is set without queries: write a table [database.queries.NAME] with the "
            f"sql of each data type ({', '.join(_DATA_TYPES)}) in the configuration file"
        )
    market = settings.market
    if market.tape is not None and market.feed != "simulated":
        raise ConfigurationError(
            f"market.tape and market.feed = {market.feed!r} are both set: keep the one to take "
            "tickers from"
        )
    if market.url is not None and market.feed not in ("binance", "bybit"):
        raise ConfigurationError(
            "market.url is set without an exchange: set market.feed to binance or bybit"
        )
    function = settings.function
    for name in ("fetch_many", "flask_app"):
        if getattr(function, name) is not None and function.fetch is None:
            raise ConfigurationError(
                f"function.{name} is set without function.fetch: name the function that reads "
                "one user's data"
            )
    ccxt = settings.ccxt
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
    if ccxt.exchange is not None and ccxt.timeout_s >= settings.limits.fetch_timeout_s:
        raise ConfigurationError(
            f"ccxt.timeout_s is {ccxt.timeout_s}: give less than limits.fetch_timeout_s"
        )
    return settings


class _FileLoader:
    """The settings of one TOML file, which must be there and hold nothing unknown."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __call__(self, settings_cls: type, options: OptionList) -> LoadedSettings:
        path = self._path
        try:
            # Without a section: with one, a mistyped section would be passed over in silence.
            raw = TomlFormat(None)(path, settings_cls, options)
        except ConfigFileNotFoundError as error:
            raise ConfigurationError(
                f"there is no configuration file {str(path)!r}: `trading-push init` writes one"
            ) from error
        except (TsError, OSError, ValueError, RecursionError) as error:
            why = getattr(error, "strerror", None) or error
            raise ConfigurationError(
                f"cannot read the configuration file {str(path)!r}: {why}"
            ) from error
        known = {option.path: option for option in options}
        settings: SettingsDict = {}
        for name, value in _flatten(raw, known, str(path)):
            set_path(
                settings, name, _checked(known[name], value, str(path), path.parent.absolute())
            )
        return LoadedSettings(settings, LoaderMeta(self))


def _load_environment(settings_cls: type, options: OptionList) -> LoadedSettings:
    """The settings from the environment, which must name nothing unknown with our prefix."""
    loader = EnvLoader(ENVIRONMENT_PREFIX)
    known = {loader.get_envvar(option): option for option in options}
    settings: SettingsDict = {}
    for name, value in os.environ.items():
        if not name.startswith(ENVIRONMENT_PREFIX) or name in _OTHER_VARIABLES:
            continue
        if name not in known:
            hint = _hint(name, [*known, *_OTHER_VARIABLES])
            raise ConfigurationError(
                f"the environment variable {name} is no setting{hint or ': unset it'}"
            )
        if not value:
            raise ConfigurationError(f"{name} is empty: give it a value, or unset it")
        option = known[name]
        set_path(settings, option.path, _checked(option, _parsed(option, value), name, Path.cwd()))
    return LoadedSettings(settings, LoaderMeta("environment"))


class _FlagLoader:
    """The settings that the command line gave."""

    def __init__(self, flags: Mapping[str, Any]) -> None:
        self._flags = flags

    def __call__(self, settings_cls: type, options: OptionList) -> LoadedSettings:
        known = {option.path: option for option in options}
        settings: SettingsDict = {}
        for name, value in self._flags.items():
            if value is None:
                continue
            if name not in known:
                raise ConfigurationError(
                    f"command line: there is no setting {name!r}{_hint(name, known)}"
                )
            option = known[name]
            parsed = _parsed(option, value) if isinstance(value, str) else value
            set_path(settings, name, _checked(option, parsed, "command line", Path.cwd()))
        return LoadedSettings(settings, LoaderMeta(self))


def _flatten(
    raw: Mapping[str, Any], known: Collection[str], where: str, section: str = ""
) -> Iterator[tuple[str, Any]]:
    """The settings of a parsed file with their whole names; an unknown one is refused."""
    sections = {name.rpartition(".")[0] for name in known} - {""}
    for key, value in raw.items():
        name = f"{section}{key}"
        if name in known:
            yield name, value
        elif name not in sections:
            raise ConfigurationError(
                f"{where}: there is no setting {name!r}"
                f"{_hint(name, [*known, *sections]) or ': remove it'}"
            )
        elif not isinstance(value, dict):
            raise ConfigurationError(
                f"{where}: {name} is a section: write [{name}] and its settings below"
            )
        else:
            yield from _flatten(value, known, where, name + ".")


def _hint(name: str, known: Collection[str]) -> str:
    """`: did you mean ...?`, or nothing where nothing is alike."""
    last = name.rpartition(".")[2]
    alike = [other for other in known if other.rpartition(".")[2] == last]
    alike = alike or difflib.get_close_matches(name, known, n=1)
    return f": did you mean {alike[0]}?" if alike else ""


def _parsed(option: OptionInfo, value: str) -> Any:
    """A text as the number or the switch it stands for; the text itself where it is none.

    What stays a text here is refused by the setting's own check.
    """
    switches = {"true": True, "yes": True, "on": True, "1": True}
    switches |= {"false": False, "no": False, "off": False, "0": False}
    try:
        if option.cls is bool:
            return switches.get(value.lower(), value)
        if option.cls is int:
            return int(value)
        if option.cls is float:
            return float(value)
    except ValueError:
        pass
    return value


def _checked(option: OptionInfo, value: Any, where: str, base: Path) -> Any:
    """The value in the type of its setting, after the check of that setting.

    typed-settings would make 9.7 the port 9 and `true` the number 1, and would say a secret aloud
    in its messages: so each value is checked before it gets there.
    """
    if Path in get_args(option.cls) and isinstance(value, str) and value:
        try:
            value = base / Path(value).expanduser()
        except RuntimeError as error:
            raise ConfigurationError(f"{where}: {option.path}: {error}") from error
    attribute = getattr(attrs.fields(option.parent_cls), option.name)
    try:
        if option.path == "database.queries":
            return _queries(value)
        if attribute.validator is not None:
            attribute.validator(None, attribute.evolve(name=option.path), value)
    except ConfigurationError as error:
        raise ConfigurationError(f"{where}: {error}") from None
    return value


def _queries(tables: object) -> dict[str, Query]:
    """The tables [database.queries.NAME] as queries."""
    if not isinstance(tables, dict):
        raise ConfigurationError(
            "database.queries: write a table [database.queries.NAME] for each data type, in the "
            "configuration file"
        )
    queries: dict[str, Query] = {}
    fields = [field.name for field in attrs.fields(Query)]
    for name, table in tables.items():
        path = f"database.queries.{name}"
        if name not in _DATA_TYPES:
            raise ConfigurationError(
                f"{path}: there is no such data type: use {', '.join(_DATA_TYPES)}"
            )
        if not isinstance(table, dict) or "sql" not in table:
            raise ConfigurationError(f"{path} has no query: write sql = ... below [{path}]")
        for key in table:
            if key not in fields:
                raise ConfigurationError(
                    f"there is no setting '{path}.{key}'{_hint(key, fields) or ': remove it'}"
                )
        names = table.get("json_columns", ())
        try:
            # TOML has lists and no tuples; anything else is left for the check to refuse.
            table = {**table, "json_columns": tuple(names) if isinstance(names, list) else names}
            queries[name] = Query(**table)
        except ConfigurationError as error:
            raise ConfigurationError(f"{path}.{error}") from None
    return queries
