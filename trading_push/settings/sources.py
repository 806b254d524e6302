"""The settings of where data come from: the market, and the places that accounts are read from."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

import attrs

from trading_push.settings.definition import setting
from trading_push.settings.validators import (
    ccxt_options,
    columns,
    file_path,
    headers,
    is_identifier,
    is_json,
    is_object_name,
    is_pointer,
    is_proxy_url,
    is_query,
    is_time_zone,
    is_token,
    is_url,
    is_websocket_url,
    number,
    one_of,
    optional,
    switch,
    text,
    url_template,
    whole,
    words,
)
from trading_push.user_ids import IdKind

__all__ = ["Ccxt", "Database", "Function", "Http", "Market", "Proxy", "Query"]

_object_name = optional(text("give module:attribute, as in shop.push:fetch", is_object_name))


@attrs.frozen
class Market:
    """Where tickers come from: the simulation, a recorded tape, or an exchange."""

    feed: Literal["simulated", "binance", "bybit", "okx", "ccxt"] = setting(
        "simulated",
        one_of("simulated", "binance", "bybit", "okx", "ccxt"),
        "Where tickers come from: `simulated` (or the tape below), `binance`, `bybit`, `okx`, or "
        "`ccxt` for the exchange of that section.",
    )
    url: str | None = setting(
        None,
        optional(text("give a URL that begins with wss:// or ws://", is_websocket_url)),
        "Another address of the exchange: a test network, or another category of Bybit.",
        example='"wss://stream.bybit.com/v5/public/linear"',
    )
    rest_url: str | None = setting(
        None,
        optional(text("give a URL that begins with https:// or http://", is_url)),
        "Where the exchange lists its symbols, so that others are refused. By default the "
        "exchange's own address; with another `url` and without this, symbols are taken as they "
        "are asked for.",
        example='"https://api.bybit.com"',
    )
    symbols: int = setting(
        1000,
        whole(1, 1_000_000),
        "How many symbols are asked of the exchange at most; of one user, a quarter of them.",
    )
    seed: int = setting(1, whole(0), "The seed of the simulated market.")
    tape: Path | None = setting(
        None,
        optional(file_path),
        "Play recorded frames of an exchange as the market: Binance stream frames or CSV, plain, "
        "gzip or zip.",
        example='"binance.jsonl.gz"',
    )
    speed: float = setting(
        1.0, number(0.001, 100_000), "How many times as fast as it was recorded a tape is played."
    )
    loop: bool = setting(False, switch, "Start the tape again at its end.")
    max_hz: float = setting(
        10, number(0.1, 1000), "How often a symbol is published at most.", unit="1/s"
    )
    all_max_hz: float = setting(
        2, number(0.1, 1000), "How often `ticker.*`, all symbols in one, is published.", unit="1/s"
    )
    stale_after_s: float = setting(
        60, number(0.1), "After this time without an update a symbol is stale.", unit="s"
    )


@attrs.frozen
class Query:
    """How one data type is read from an SQL database.

    Args:
        sql: With an expanding `:user_ids` and a column `user_id` in its result (many users in one
            query), or with `:user_id` (one user a query).
        single: The value is one object, the row itself; otherwise it is the list of the rows.
        json_columns: Columns whose text is JSON and goes into the value unchanged.
        empty: The JSON of a user without rows; None is `[]`, or no value if `single`.
        as_text: Columns whose numbers leave as texts.
        cursor: For events: the column that only grows, which `sql` compares with `:after`.
        history: For events: how many of the last ones a user gets who is watched for the first
            time.
    """

    sql: str = attrs.field(validator=text("it must select by :user_ids or :user_id", is_query))
    single: bool = attrs.field(default=False, validator=switch)
    json_columns: tuple[str, ...] = attrs.field(default=(), validator=columns)
    empty: str | None = attrs.field(default=None, validator=optional(text("give JSON", is_json)))
    as_text: tuple[str, ...] = attrs.field(default=(), validator=columns)
    cursor: str | None = attrs.field(
        default=None, validator=optional(text("name a column that only grows"))
    )
    history: int = attrs.field(default=0, validator=whole(0, 1000))


_QUERIES_EXAMPLE = """\
[database.queries.balance]
sql = "SELECT user_id, asset, free, locked, total FROM balances WHERE user_id IN :user_ids"
single = false
json_columns = []
as_text = []
empty = "[]"
"""


@attrs.frozen
class Database:
    """The database that accounts are read from.

    `url` is a production database, which is only read, with one of `queries` for each data type.
    Without it a paper exchange trades in the SQLite file `path` and brings its own queries.
    """

    url: str | None = setting(
        None,
        optional(text("give a URL of SQLAlchemy")),
        "A production database in place of the paper exchange, as a URL of SQLAlchemy. It needs a "
        "query for each data type that it has.",
        example='"postgresql+psycopg://user:password@host/database"',
        repr=False,
    )
    path: Path | None = setting(
        None,
        optional(file_path),
        "The paper exchange's SQLite file; by default one in your data directory.",
        example='"accounts.sqlite3"',
    )
    queries: dict[str, Query] = setting(
        attrs.Factory(dict),
        None,
        "A table `[database.queries.TYPE]` for each data type. Its `sql` reads many users at once "
        "(an expanding `:user_ids` and a column `user_id`) or one user (`:user_id`). `single`: the "
        "value is the row itself, not a list of rows. `json_columns`: columns whose text is JSON. "
        "`as_text`: columns whose numbers leave as texts, such as ids beyond 2^53. `empty`: the "
        "JSON of a user without rows. For events (`fills`, a channel of kind `events`): `cursor`, "
        "the column that only grows, with `:after` in the `sql`, and `history`, how many of the "
        "last events come first.",
        example=_QUERIES_EXAMPLE,
    )
    threads: int = setting(
        4,
        whole(1, 100),
        "Worker threads that read from the database, each with a connection. Of several data types "
        "none uses all of them.",
    )
    statement_timeout_s: float = setting(
        30,
        number(0.1),
        "How long one query may take, in PostgreSQL, SQLite, MySQL and MariaDB.",
        unit="s",
    )
    value_bytes: int = setting(
        1_000_000,
        whole(1_000),
        "How long a user's value may be as JSON. A longer one is an error of that user.",
        unit="bytes",
    )
    user_id: IdKind = setting(
        "text",
        one_of("text", "integer", "uuid", "caseless"),
        "How the database compares user ids: `text` as they are; `integer` or `uuid`, where any "
        "other id is refused before a query; `caseless` where capitals count as small letters.",
    )
    time_zone: str = setting(
        "UTC",
        text("give an IANA name that this machine knows, like Asia/Shanghai", is_time_zone),
        "The time zone of times that have none (`timestamp` in PostgreSQL, `DATETIME` in MySQL).",
    )
    notify_channel: str | None = setting(
        None,
        optional(text("give a name of a-z, 0-9 and _", is_identifier)),
        "The channel on which PostgreSQL tells what has changed, so that it is pushed at once.",
        example='"trading_push"',
    )


@attrs.frozen
class Http:
    """The HTTP service that accounts are read from."""

    url: str | None = setting(
        None,
        optional(url_template("user_id", "data_type")),
        "The URL of one user's data, with `{user_id}` and `{data_type}` in it.",
        example='"https://accounts.example.com/users/{user_id}/{data_type}"',
        repr=False,
    )
    batch_url: str | None = setting(
        None,
        optional(url_template("user_ids", "data_type")),
        "The URL of many users' data, with `{user_ids}` and `{data_type}` in it.",
        example='"https://accounts.example.com/{data_type}?users={user_ids}"',
        repr=False,
    )
    pointer: str = setting(
        "",
        text("give a JSON pointer, like /data", is_pointer),
        "A JSON pointer (RFC 6901) to the data in an answer; empty for the whole answer.",
    )
    token: str | None = setting(
        None,
        optional(text("give the token as it stands behind `Bearer`", is_token)),
        "A token that is sent as `Authorization: Bearer`. Better set in the environment, as "
        "`TRADING_PUSH_HTTP_TOKEN`.",
        example='"..."',
        repr=False,
    )
    headers: dict[str, str] = setting(
        attrs.Factory(dict),
        headers,
        "A table `[http.headers]` of further request headers.",
        example='[http.headers]\nX-Api-Version = "2"\n',
        repr=False,
    )
    token_file: Path | None = setting(
        None,
        optional(file_path),
        "A file that holds the token, of mode 0600. It is read again when it has changed.",
        example='"http-token"',
    )
    token_command: str | None = setting(
        None,
        optional(text("give a program and its arguments, as in a shell")),
        "A command that writes the token. It is run without a shell, and again when the token is "
        "too old or is refused with 401.",
        example='"/usr/local/bin/get-token --for accounts"',
    )
    token_command_s: float = setting(
        300, number(1), "How long the token of `token_command` is used.", unit="s"
    )
    timeout_s: float = setting(
        10,
        number(0.1),
        "How long one request may take, to the last byte of its answer.",
        unit="s",
    )
    connections: int = setting(20, whole(1, 1000), "Connections to the service at the same time.")
    user_id: IdKind = setting(
        "text",
        one_of(*get_args(IdKind)),
        "What the service's user ids are: `text`; `integer` or `uuid`, which refuse any other id "
        "before it is asked for; `caseless`, where capitals and small letters are the same.",
    )
    data_types: str = setting(
        "",
        words,
        "The data types that the service has, separated by spaces; by default all of them.",
    )
    client: Literal["httpx", "asks"] = setting(
        "httpx",
        one_of("httpx", "asks"),
        "The library that sends the requests, `httpx` or `asks`. The documentation says how to "
        "install either.",
    )
    http2: bool = setting(False, switch, "Use HTTP/2 if the service has it; `httpx` only.")
    ca_file: Path | None = setting(
        None,
        optional(file_path),
        "The authorities that may have signed the service's certificate, in PEM; by default the "
        "system's.",
        example='"ca.pem"',
    )
    client_cert: Path | None = setting(
        None,
        optional(file_path),
        "A certificate to show to the service, in PEM.",
        example='"client.pem"',
    )
    client_key: Path | None = setting(
        None,
        optional(file_path),
        "The key of `client_cert`, in PEM without a password; by default it stands in the same "
        "file.",
        example='"client-key.pem"',
    )


@attrs.frozen
class Proxy:
    """The proxy that leads to HTTP services and exchanges."""

    url: str | None = setting(
        None,
        optional(text("give one like http://host:3128 or socks5://host:1080", is_proxy_url)),
        "The proxy that leads to the HTTP service, to exchanges and to what ccxt opens. By default "
        "the environment's `HTTPS_PROXY`, `HTTP_PROXY` and `ALL_PROXY` say it.",
        example='"http://proxy.example.com:3128"',
        repr=False,
    )
    no_proxy: str = setting(
        "",
        words,
        "Hosts, addresses and networks that are connected to without the proxy, separated by "
        "spaces, beside those of `NO_PROXY`; `*` for all. This machine always is.",
    )


@attrs.frozen
class Function:
    """An application's own functions that accounts are read with."""

    fetch: str | None = setting(
        None,
        _object_name,
        "The function that reads accounts. It is called with a user's id and a data type.",
        example='"shop.push:fetch"',
    )
    fetch_many: str | None = setting(
        None,
        _object_name,
        "A function that is called in its place, with the ids of many users.",
        example='"shop.push:fetch_many"',
    )
    data_types: str = setting(
        "",
        words,
        "The data types that the functions answer for, separated by spaces (`balance positions`); "
        "none for all four. What is not named is no channel.",
    )
    user_id: IdKind = setting(
        "text",
        one_of("text", "integer", "uuid", "caseless"),
        "What the ids of users are: `text`, `integer` or `uuid`, of which another id is refused "
        "unasked, or `caseless` if capital and small letters count as the same.",
    )
    flask_app: str | None = setting(
        None,
        _object_name,
        "A Flask application, or the function that makes it. Each call runs in a fresh context of "
        "it.",
        example='"shop.app:create_app"',
    )


@attrs.frozen
class Ccxt:
    """An exchange that ccxt knows: accounts by their users' keys, tickers by `market.feed`."""

    exchange: str | None = setting(
        None,
        optional(text("give its name in ccxt, as binance")),
        "The exchange's name in ccxt.",
        example='"binance"',
    )
    credentials_file: Path | None = setting(
        None,
        optional(file_path),
        "A TOML file with a table `[users.ID]` of `api_key`, `secret`, ... for each user. It must "
        "have mode 0600.",
        example='"keys.toml"',
    )
    credentials: str | None = setting(
        None,
        optional(text("give JSON")),
        "The same as JSON, for the environment: `TRADING_PUSH_CCXT_CREDENTIALS`.",
        example='"..."',
        repr=False,
    )
    market_type: Literal["spot", "swap", "future"] | None = setting(
        None,
        optional(one_of("spot", "swap", "future")),
        "Which markets are meant where an exchange has several kinds: `spot`, `swap` or `future`; "
        "by default those that ccxt takes.",
        example='"spot"',
    )
    url: str | None = setting(
        None,
        optional(text("give a URL of scheme and host", is_url)),
        "Other servers than the exchange's own.",
        example='"http://127.0.0.1:9000"',
    )
    sandbox: bool = setting(False, switch, "Use the exchange's test network.")
    timeout_s: float = setting(
        10,
        number(0.1, 300),
        "How long the exchange may take to answer a request.",
        unit="s",
    )
    interval_s: float = setting(
        1, number(0.1), "The time between two requests for watched tickers.", unit="s"
    )
    order_symbols: str = setting(
        "",
        words,
        "The markets whose open orders are read, separated by spaces, for exchanges that give them "
        "of one market at a time; by default those of `fill_symbols` there.",
    )
    options: dict[str, Any] = setting(
        attrs.Factory(dict),
        ccxt_options,
        "A table `[ccxt.options]` of ccxt's own options of the exchange.",
        example="[ccxt.options]\nrecvWindow = 10000\n",
        repr=False,
    )
    fill_symbols: str = setting(
        "",
        words,
        "The markets whose fills are published, separated by spaces (`BTC/USDT ETH/USDT`); `*` "
        "for all of them, if the exchange can.",
    )
    fills_interval_s: float = setting(
        5, number(0.1), "The time between two requests for fills.", unit="s"
    )
