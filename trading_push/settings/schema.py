"""Every setting, each described where it is defined, in one tree of frozen attrs classes.

Units stand in the names: `_s` seconds, `_ms` milliseconds, `_bytes`, `_hz` times a second. Values
are checked when an object is made, so that a setting from a file, the environment, a flag or an
application's code meets the same check.
"""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import Any, Final, Literal

import attrs

from trading_push.errors import ConfigurationError
from trading_push.settings.channels import CHANNELS_EXAMPLE, OwnChannel
from trading_push.settings.definition import section, setting
from trading_push.settings.sources import Ccxt, Database, Function, Http, Market, Proxy, Query
from trading_push.settings.validators import (
    events,
    file_path,
    is_host,
    is_path,
    is_url,
    market_channels,
    networks,
    number,
    one_of,
    optional,
    origins,
    secret,
    switch,
    text,
    whole,
)

__all__ = [
    "MOVED",
    "Auth",
    "Ccxt",
    "Database",
    "Function",
    "Http",
    "Intervals",
    "Limits",
    "Log",
    "Market",
    "OwnChannel",
    "Polling",
    "Proxy",
    "Query",
    "Server",
    "Settings",
    "Web",
]


@attrs.frozen
class Server:
    """Where the server listens, and who may connect."""

    host: str = setting(
        "127.0.0.1",
        text("give an address or a host name", is_host),
        "The address that `serve` listens on. Clients of other machines need a secret of your own "
        "first.",
    )
    port: int = setting(8000, whole(0, 65535), "The port; 0 takes any free one.")
    path: str = setting(
        "/ws", text("give a path that begins with /", is_path), "The path of the WebSocket."
    )
    origins: str = setting(
        "",
        origins,
        "The web pages that may connect, separated by spaces (`https://app.example.com`); `*` "
        "allows all, and an empty list those of the same host. Schemes of desktop shells can be "
        "listed, too (`file://`, `tauri://localhost`). Pages of this machine may connect to it "
        "without standing here.",
    )
    origin_required: bool = setting(
        False, switch, "Refuse clients that send no `Origin`, which every browser sends."
    )
    trusted_proxies: str = setting(
        "",
        networks,
        "The reverse proxies whose `X-Forwarded-For` is believed: addresses or networks, separated "
        "by spaces; `unix:` for those that connect by a Unix socket.",
    )


@attrs.frozen
class Auth:
    """How tokens are checked. The secret of HS256 is `Settings.jwt_secret`."""

    algorithm: Literal["HS256", "RS256", "ES256", "EdDSA"] = setting(
        "HS256",
        one_of("HS256", "RS256", "ES256", "EdDSA"),
        "How tokens are signed: `HS256` (with `jwt_secret`), `RS256`, `ES256` or `EdDSA` (checked "
        "with one of the two keys below). No other algorithm is accepted in a token.",
    )
    secret_file: Path | None = setting(
        None,
        optional(file_path),
        "A file with the secret of HS256, in place of `jwt_secret`; only its owner may use it "
        "(mode 0600). It is read again at SIGHUP.",
        example='"jwt-secret"',
    )
    public_key_file: Path | None = setting(
        None, optional(file_path), "A public key in PEM.", example='"key.pem"'
    )
    jwks_url: str | None = setting(
        None,
        optional(text("give a URL that begins with https://", is_url)),
        "The URL of a JWKS with the public keys.",
        example='"https://id.example.com/jwks.json"',
    )
    audience: str | None = setting(
        None,
        optional(text("give the `aud` that tokens carry")),
        "The `aud` that a token must carry.",
        example='"trading-push"',
    )
    issuer: str | None = setting(
        None,
        optional(text("give the `iss` that tokens carry")),
        "The `iss` that a token must carry.",
        example='"https://id.example.com/"',
    )
    leeway_s: float = setting(5.0, number(0, 300), "How much clocks may differ.", unit="s")
    cookie_session_s: float = setting(
        3600,
        number(1),
        "How long a connection lasts that an `authenticate` of your own let in by its cookies, "
        "without telling when that ends.",
        unit="s",
    )
    anonymous_channels: str = setting(
        "",
        market_channels,
        "The market channels that clients may subscribe to without a token, separated by spaces: "
        "`ticker`, `candles`, `ticker.*`.",
    )


@attrs.frozen
class Intervals:
    """The time between two polls of the source, for each data type."""

    balance: float = setting(
        10, number(0.1), "The time between two polls of a user's balance.", unit="s"
    )
    positions: float = setting(
        5, number(0.1), "The time between two polls of a user's positions.", unit="s"
    )
    pnl: float = setting(5, number(0.1), "The time between two polls of a user's PnL.", unit="s")
    orders: float = setting(
        15, number(0.1), "The time between two polls of a user's open orders.", unit="s"
    )


class _MovedNames:
    """Holds what was given to `Limits` under a name that has moved to `Polling`.

    A base class, because a slot of its own makes no attrs field, and so no setting.
    """

    __slots__ = ("_moved",)
    _moved: dict[str, Any]


@attrs.frozen
class Limits(_MovedNames):
    """The bounds that keep one connection from harming the others."""

    authentication_timeout_s: float = setting(
        10, number(0.1), "How long a client may take to authenticate.", unit="s"
    )
    handshake_timeout_s: float = setting(
        10, number(0.1), "How long a request may take to come in.", unit="s"
    )
    header_bytes: int = setting(
        16_384, whole(1024), "How long the head of a request may be, under `serve`.", unit="bytes"
    )
    heartbeat_s: float = setting(
        15,
        number(0.1),
        "After this time of silence a client is pinged; after twice this time it is dropped.",
        unit="s",
    )
    expiry_notice_s: float = setting(
        30, number(0), "How long before its token expires a client is told.", unit="s"
    )
    send_timeout_s: float = setting(
        10, number(0.1), "How long a client may take to accept what is sent to it.", unit="s"
    )
    drain_timeout_s: float = setting(
        4, number(0), "How long clients have to leave when the server stops.", unit="s"
    )
    close_timeout_s: float = setting(
        1,
        number(0.1),
        "How long a polite close may take before the connection is aborted.",
        unit="s",
    )
    reap_after_s: float = setting(
        5,
        number(0.1),
        "How long a handler may go on after its client's end of file.",
        unit="s",
    )
    handler_timeout_s: float = setting(
        30, number(1), "How long a handler may leave its client's bytes unread.", unit="s"
    )
    connections: int = setting(
        10_000, whole(1), "Connections of one process. Further ones get HTTP 503."
    )
    unauthenticated_per_address: int = setting(
        200,
        whole(1),
        "Connections of one address that have not authenticated. Further ones get HTTP 503.",
    )
    connections_per_user: int = setting(50, whole(1), "Connections of one user in one process.")
    over_user_limit: Literal["reject", "replace"] = setting(
        "reject",
        one_of("reject", "replace"),
        "What happens to one connection too many of a user: `reject` closes it (4504), `replace` "
        "closes the user's oldest one (4505).",
    )
    subscriptions: int = setting(200, whole(1), "Subscriptions of one connection.")
    anonymous_subscriptions: int = setting(
        20, whole(1), "Subscriptions of one connection without a user (`auth.anonymous_channels`)."
    )
    messages_per_s: float = setting(
        20,
        number(0.1),
        "Messages of one connection that are served, on average. One counts as one more for each "
        "20 items in it, and for each 64 KiB that a subscribe request is answered with.",
        unit="1/s",
    )
    messages_burst: int = setting(
        60,
        whole(1),
        "Messages of one connection that are served at once. As many again are refused "
        "(`rate_limited`) before it is closed (4501).",
    )
    message_bytes: int = setting(
        65_536, whole(128), "How long a message of a client may be.", unit="bytes"
    )
    publish_bytes: int = setting(
        1_048_576, whole(128), "How long the body of a `POST /publish` may be.", unit="bytes"
    )
    bad_messages: int = setting(
        10, whole(1), "Bad messages in a row, before the connection is closed."
    )
    pending_bytes: int = setting(
        1_048_576, whole(65_536), "Events that may wait for one connection.", unit="bytes"
    )
    first_value_wait_s: float = setting(
        1,
        number(0),
        "How long a subscription waits for its first value before it is told `down`.",
        unit="s",
    )


@attrs.frozen
class Polling:
    """How the source is asked for the data of users who are watched."""

    fetch_timeout_s: float = setting(60, number(0.1), "How long one fetch may take.", unit="s")
    fetches: int = setting(
        40, whole(1, 1000), "Fetches of one data type that may run at the same time."
    )
    fetch_batch: int = setting(
        500, whole(1, 10_000), "Users that one call of `fetch_many` asks for."
    )
    change_gap_s: float = setting(
        0.2,
        number(0),
        "The shortest time between two reads for changes that the source tells of a user.",
        unit="s",
    )
    stale_after_s: float = setting(
        30,
        number(0.1),
        "After this time without an answer of the source, and after two intervals, a value is "
        "stale.",
        unit="s",
    )
    watch_linger_s: float = setting(
        1,
        number(0),
        "How long the source is still asked for what no client watches any more.",
        unit="s",
    )
    topic_linger_s: float = setting(
        60,
        number(0),
        "How long a polled value that no client watches is kept, with its numbering.",
        unit="s",
    )


@attrs.frozen
class Web:
    """The HTTP routes beside the WebSocket."""

    metrics: Literal["local", "token", "off"] = setting(
        "local",
        one_of("local", "token", "off"),
        "Who may read `/metrics`: `local` asks for no token on this machine itself, with no proxy "
        "in between; `token` asks everyone for a token with the claim `metrics` or `admin`; `off` "
        "serves it to nobody.",
    )
    pages: bool = setting(True, switch, "Whether the page at `/` is served, with its files.")


@attrs.frozen
class Log:
    """The log lines, which go to standard error."""

    lang: Literal["zh", "en", "auto"] = setting(
        "zh",
        one_of("zh", "en", "auto"),
        "The language of the log lines: `zh`, `en`, or `auto` for Chinese where the locale "
        "(`LC_ALL`, `LC_MESSAGES`, `LANG`) is, and English elsewhere. It counts for an application "
        "that embeds the service, too, unless that chooses one by `logs.attached`.",
    )
    format: Literal["text", "json"] = setting(
        "text", one_of("text", "json"), "The form of the log lines, `text` or `json`."
    )
    level: Literal["info", "warning", "error"] = setting(
        "info",
        one_of("info", "warning", "error"),
        "The least level that is written: `info`, `warning` or `error`.",
    )
    quiet: str = setting(
        "",
        events,
        "Events whose lines are not written, by name, with spaces between. A line for each push "
        "(`pushed`) is gigabytes a day with a thousand users.",
    )
    file: Path | None = setting(
        None,
        optional(file_path),
        "A file that the log lines are written to as well. Renamed, it is made anew.",
        example='"trading-push.log"',
    )
    queue_lines: int = setting(
        100_000,
        whole(100),
        "Lines that may wait for a slow reader, before lines are dropped and counted.",
    )


@attrs.frozen
class Settings:
    """The whole tree. `jwt_secret` never shows in a `repr`."""

    jwt_secret: str | None = setting(
        None,
        optional(secret),
        "The secret of HS256, 32 bytes or more. Better set in the environment, as "
        "`TRADING_PUSH_JWT_SECRET`. Without one, `serve` makes one for the demo and listens on "
        "this machine only.",
        example='"..."',
        repr=False,
    )
    channels: dict[str, OwnChannel] = setting(
        attrs.Factory(dict),
        None,
        "A table `[channels.NAME]` for each channel of your own. `kind`: `state` or `events`. "
        "`per_user`: false if all users share one. `interval_s`: the time between two polls of the "
        "source, which has the name as a data type; without it the channel is only published to.",
        example=CHANNELS_EXAMPLE,
    )
    server: Server = section(Server)
    auth: Auth = section(Auth)
    intervals: Intervals = section(Intervals, "Only users who are subscribed are polled.")
    limits: Limits = section(Limits)
    polling: Polling = section(Polling)
    market: Market = section(Market)
    database: Database = section(
        Database,
        "The database of the paper exchange (`path`), or a production database in its place "
        "(`url`), which is only read.",
    )
    http: Http = section(
        Http,
        "An HTTP service in place of the paper exchange (pip install 'trading_push[http]').",
    )
    proxy: Proxy = section(Proxy)
    function: Function = section(
        Function,
        "Functions of your own in place of a database, each named as module:attribute.",
    )
    ccxt: Ccxt = section(
        Ccxt,
        "An exchange that ccxt knows (pip install 'trading_push[ccxt]'): tickers, for "
        'market.feed = "ccxt", and the accounts of users who give their keys.',
    )
    web: Web = section(Web)
    log: Log = section(Log)

    def __attrs_post_init__(self) -> None:
        # The values that `Limits` was given by old names; a copy that was unpickled has none.
        moved = getattr(self.limits, "_moved", {})
        if moved:
            default = Polling()
            for name, value in moved.items():
                if getattr(self.polling, name) not in (value, getattr(default, name)):
                    raise ConfigurationError(
                        f"limits.{name} and polling.{name} are both set: keep polling.{name}"
                    )
            # The class is frozen for everyone else. The copy of the limits has no old names left,
            # so that an object that is evolved from this one does not apply them again.
            object.__setattr__(self, "polling", attrs.evolve(self.polling, **moved))
            object.__setattr__(self, "limits", attrs.evolve(self.limits))


MOVED: Final = {f"limits.{each.name}": f"polling.{each.name}" for each in attrs.fields(Polling)}
"""Settings that have a new name, by the old one, which goes on working in this version."""


def _accept_moved_names() -> None:
    """Let `Limits(...)` accept the old names, with a DeprecationWarning for each."""
    made_by_attrs: Any = Limits.__init__

    @functools.wraps(made_by_attrs)
    def __init__(self: Limits, *args: Any, **values: Any) -> None:
        moved = {name: values.pop(name) for name in [*values] if f"limits.{name}" in MOVED}
        for name in moved:
            message = f"Limits({name}=...) is now Polling({name}=...)"
            warnings.warn(message, DeprecationWarning, stacklevel=2)
        Polling(**moved)  # refuses a value that cannot be used
        made_by_attrs(self, *args, **values)
        object.__setattr__(self, "_moved", moved)

    Limits.__init__ = __init__  # type: ignore[method-assign]


_accept_moved_names()
