"""The settings: what they are loaded from, and everything that is refused."""

from __future__ import annotations

import importlib.resources
import math
import os
import re
import tomllib
from pathlib import Path
from typing import Any

import attrs
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from trading_push.errors import ConfigurationError
from trading_push.settings.loading import load_settings
from trading_push.settings.schema import Auth, Intervals, Limits, Log, Server, Settings
from trading_push.settings.sources import Database, Query

SECRET = "0123456789abcdef0123456789abcdef"
HTTP = "http://host/{user_id}/{data_type}"
SQL = "SELECT user_id, asset FROM balances WHERE user_id IN :user_ids"


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("TRADING_PUSH_"):
            monkeypatch.delenv(name)


def from_file(path: Path, toml: str, **flags: Any) -> Settings:
    path.write_text(toml, encoding="utf-8")
    return load_settings(config=path, flags=flags)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return tmp_path / "settings.toml"


def refusal(error: pytest.ExceptionInfo[ConfigurationError]) -> str:
    """The text of a refusal, which is one line."""
    text = str(error.value)
    assert "\n" not in text
    return text


def test_without_anything_it_is_the_defaults() -> None:
    assert load_settings(config=None, flags={}) == Settings()


def test_each_source_goes_before_the_one_below(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toml = '[server]\nport = 1\nhost = "::1"\npath = "/push"\n[intervals]\nbalance = 3'
    assert from_file(config, toml).server == Server("::1", 1, "/push")
    monkeypatch.setenv("TRADING_PUSH_SERVER_PORT", "2")
    monkeypatch.setenv("TRADING_PUSH_SERVER_PATH", "/env")
    assert from_file(config, toml).server == Server("::1", 2, "/env")
    settings = load_settings(
        config=config, flags={"server.port": "3", "server.host": None, "intervals.pnl": "0.2"}
    )
    assert settings.server == Server("::1", 3, "/env")
    assert settings.intervals == Intervals(balance=3, pnl=0.2)


def test_the_environment_may_name_the_file(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config.write_text("[server]\nport = 1", encoding="utf-8")
    monkeypatch.setenv("TRADING_PUSH_CONFIG", str(config))
    assert load_settings(config=None, flags={}).server.port == 1
    other = config.with_name("other!.conf")  # whose name typed-settings would take apart
    assert from_file(other, "[server]\nport = 2").server.port == 2


def test_every_setting_has_a_variable_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {
        "TRADING_PUSH_JWT_SECRET": SECRET,
        "TRADING_PUSH_AUTH_PUBLIC_KEY_FILE": "/k.pem",
        "TRADING_PUSH_LIMITS_BAD_MESSAGES": "7",
        "TRADING_PUSH_LIMITS_SEND_TIMEOUT_S": "2.5",
        "TRADING_PUSH_MARKET_LOOP": "Yes",
        "TRADING_PUSH_DATABASE_PATH": "db.sqlite3",
        "TRADING_PUSH_LOG_LANG": "en",
    }
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TRADING_PUSH_TOKEN", "of the command `watch`")
    settings = load_settings(config=None, flags={})
    assert settings.jwt_secret == SECRET
    assert settings.auth == Auth(public_key_file=Path("/k.pem"))
    assert settings.limits == Limits(bad_messages=7, send_timeout_s=2.5)
    assert settings.market.loop is True
    assert settings.database == Database(path=Path.cwd() / "db.sqlite3")
    assert settings.log == Log(lang="en")


def test_paths_of_a_file_start_at_the_file(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/of-someone")
    settings = from_file(
        config, '[market]\ntape = "tapes/a.gz"\n[log]\nfile = "~/b.log"\n[database]\npath = "/c"'
    )
    assert settings.market.tape == config.parent / "tapes/a.gz"
    assert settings.log.file == Path("/home/of-someone/b.log")
    assert settings.database.path == Path("/c")


def test_queries_are_a_table_for_each_data_type(config: Path) -> None:
    settings = from_file(
        config,
        f"""
        [database]
        url = "sqlite://"
        [database.queries.balance]
        sql = "{SQL}"
        [database.queries.pnl]
        sql = "SELECT total FROM pnl WHERE user_id = :user_id"
        single = true
        json_columns = ["by_symbol"]
        empty = "{{}}"
        """,
    )
    assert settings.database.queries == {
        "balance": Query(SQL),
        "pnl": Query("SELECT total FROM pnl WHERE user_id = :user_id", True, ("by_symbol",), "{}"),
    }


@pytest.mark.parametrize(
    ("toml", "says"),
    [
        ("[server]\nport = 9.7", "server.port is 9.7: give a whole number, 0 to 65535"),
        ("[server]\nport = true", "server.port is True"),
        ("[server]\nport = '8000'", "server.port is '8000'"),
        ("[server]\nport = -1", "server.port is -1"),
        ("[server]\nport = 65536", "server.port is 65536"),
        ("[server]\nport = 99999999999999999999999", "server.port is 9999"),
        ("[server]\npath = 'ws'", "server.path is 'ws': give a path that begins with /"),
        ("[server]\npath = '/a b'", "server.path"),
        ("[server]\nhost = ''", "server.host is ''"),
        ("[server]\nhost = 'a b'", "server.host"),
        ("[server]\nhost = 127", "server.host is 127"),
        ("[intervals]\nbalance = 0.05", "intervals.balance is 0.05: give a number, 0.1 to"),
        ("[intervals]\nbalance = nan", "intervals.balance is nan"),
        ("[intervals]\nbalance = inf", "intervals.balance is inf"),
        ("[intervals]\nbalance = -5", "intervals.balance is -5"),
        ("[intervals]\nbalance = true", "intervals.balance is True"),
        ("[limits]\nconnections = 0", "limits.connections is 0"),
        ("[market]\nloop = 1", "market.loop is 1: give true or false"),
        ("[market]\nfeed = 'kraken'", "market.feed is 'kraken': give one of simulated, binance"),
        ("[market]\nurl = 'https://x/'", "market.url is 'https://x/': give a URL that begins with"),
        ("[market]\nfeed = 'bybit'\ntape = 'a.gz'", "market.feed = 'bybit' are both set"),
        ("[market]\nurl = 'ws://localhost/'", "market.url is set without an exch"),
        ("[market]\ntape = 5", "market.tape is 5: give the path of a file"),
        ("[market]\ntape = ''", "market.tape is ''"),
        ("[log]\nlang = 'fr'", "log.lang is 'fr': give one of zh, en, auto"),
        ("[auth]\nalgorithm = 'none'", "auth.algorithm is 'none': give one of HS256"),
        ("[auth]\nalgorithm = ['HS256']", "auth.algorithm"),
        ("[auth]\njwks_url = 'file:///etc/passwd'", "auth.jwks_url"),
        ("[sever]\nport = 1", "there is no setting 'sever': did you mean server?"),
        ("[server]\nprt = 1", "there is no setting 'server.prt': did you mean server.port?"),
        ("port = 1", "there is no setting 'port': did you mean server.port?"),
        ("'x\\ny' = 1", "there is no setting"),
        ("xylophone = 1", "there is no setting 'xylophone': remove it"),
        ("server = 1", "server is a section: write [server]"),
        ("[server\nport = 1", "cannot read the configuration file"),
        ("a = " + "[" * 5000, "cannot read the configuration file"),
        ("[database]\nqueries = 1", "write a table [database.queries.NAME]"),
        ("[database]\nurl = 'sqlite://'", "database.url is set without queries"),
        ("[database]\nurl = 'sqlite://'\npath = 'a'", "are both set"),
        ("[database]\nnotify_channel = 'a'", "notify_channel is set without database.url"),
        ("[database]\nnotify_channel = 'a\"; DROP'", "give a name of a-z, 0-9 and _"),
        ("[database]\nnotify_channel = 'Trades'", "give a name of a-z, 0-9 and _"),
        (f"[database]\nnotify_channel = '{'a' * 64}'", "give a name of a-z, 0-9 and _"),
        ("[database]\nstatement_timeout_s = 0", "give a number, 0.1 to"),
        (f"[http]\nurl = '{HTTP}'\n[database]\nurl = 'sqlite://'", "are both set"),
        (f"[http]\nurl = '{HTTP}'\n[database]\npath = 'a'", "are both set"),
        ("[http]\nbatch_url = 'http://h/{user_ids}/{data_type}'", "is set without http.url"),
        (
            "[http]\nurl = 'http://me:hunter2@h/{user_id}/{data_type}'",
            "http.url is not usable: give",
        ),
        ("[http]\nurl = 'http://h/{user_id}'", "{user_id} and {data_type} in it"),
        (f"[http]\nbatch_url = '{HTTP}'", "{user_ids} and {data_type} in it"),
        ("[http]\npointer = 'data'", "http.pointer is 'data': give a JSON pointer"),
        ("[http]\npointer = '/~2'", "http.pointer is '/~2'"),
        ("[http]\ntoken = 'hunter2 x'", "http.token is not usable"),
        ("[http]\ntimeout_s = 0", "http.timeout_s is 0"),
        ("[http]\nconnections = 0", "http.connections is 0"),
        ("[http]\nheaders = 'X: hunter2'", "write a table [http.headers]"),
        ("[http.headers]\nX = 5", "http.headers.X is not usable"),
        ('[http.headers]\nX = "hunter2\\nY"', "http.headers.X is not usable"),
        ("[http.headers]\n'a b' = '5'", "no name that HTTP knows"),
        ("[http.headers]\nHost = 'h'", "http.headers.Host is not for you to set"),
        ("[function]\nfetch = 'shop.push'", "function.fetch is 'shop.push': give module:attribute"),
        ("[function]\nfetch = 'shop/push.py:fetch'", "give module:attribute"),
        ("[function]\nfetch = 'shop:fetch'\n[database]\npath = 'a'", "function.fetch are both set"),
        ("[function]\nflask_app = 'shop:app'", "flask_app is set without function.fetch"),
        ("[function]\nfetch_many = 'shop:app'", "fetch_many is set without function.fetch"),
        ("[ccxt]\nexchange = 'binance'", "ccxt.exchange is set and not used"),
        ("[market]\nfeed = 'ccxt'", "market.feed = 'ccxt' is set without ccxt.exchange"),
        ("[ccxt]\ncredentials = '{}'", "ccxt.credentials is set without ccxt.exchange"),
        ("[ccxt]\ncredentials = '{}'\n[database]\npath = 'a'", "are both set"),
        ("[ccxt]\ncredentials = '{}'\ncredentials_file = 'a'", "are both set"),
        ("[ccxt]\ncredentials = 5", "ccxt.credentials is not usable"),
        ("[ccxt]\nmarket_type = 'margin'", "give one of spot, swap, future"),
        (
            "[ccxt]\nexchange = 'a'\ncredentials = '{}'\ntimeout_s = 60",
            "ccxt.timeout_s is 60.0: give less than polling.fetch_timeout_s",
        ),
        (f"[database.queries.balances]\nsql = '{SQL}'", "there is no such data type"),
        (f"[database.queries.margin]\nsql = '{SQL}'\n[channels.margin]", "with interval_s"),
        ("channels = 5", "write a table [channels.NAME]"),
        ("[channels]\nmargin = 5", "channels.margin is no table"),
        ("[channels.margin]\nintervals = 5", "did you mean interval_s?"),
        ("[channels.margin]\ninterval_s = 0", "channels.margin.interval_s is 0"),
        ("[channels.margin]\ninterval_s = 2", "write [database.queries.margin]"),
        ("[channels.margin]\nkind = 'event'", "give one of state, events"),
        ("[channels.margin]\nper_user = 1", "channels.margin.per_user"),
        ("[channels.Margin]", "'Margin' cannot name a channel"),
        ("[channels.ticker]", "not 'ticker'"),
        ("[channels.fills]\nkind = 'events'", "a channel of that name already"),
        ("[channels.fills]\ninterval_s = 3", "only interval_s can be set, with a query"),
        (f"[database.queries.fills]\nsql = '{SQL}'", "without a cursor: name the column"),
        (
            f"[database.queries.alerts]\nsql = '{SQL}'\n[channels.alerts]\nkind = 'events'",
            "database.queries.alerts reads events without a cursor",
        ),
        (
            f"[database.queries.fills]\nsql = '{SQL}'\ncursor = 'fill_id'",
            "reads events without database.url",
        ),
        (
            f"[database.queries.pnl]\nsql = '{SQL}'\ncursor = 'id'",
            "database.queries.pnl has a cursor, which is for events",
        ),
        ("[channels.pnl]\ninterval_s = 3", "set intervals.pnl instead"),
        ("[channels.margin]\ninterval_s = 3\nkind = 'events'", "cannot be polled"),
        ("[channels.margin]\ninterval_s = 3\nper_user = false", "cannot be polled"),
        (
            "[channels.margin]\ninterval_s = 3\n[function]\nfetch = 'a:b'\ndata_types = 'pnl'",
            "function.data_types does not name margin",
        ),
        (
            "[channels.margin]\ninterval_s = 3\n[ccxt]\nexchange = 'a'\ncredentials = '{}'",
            "accounts of ccxt have no margin",
        ),
        ("[function]\ndata_types = 'pnl'", "data_types is set without function.fetch"),
        ("[database.queries.balance]\nsingle = true", "database.queries.balance has no query"),
        ("[database.queries.balance]\nsql = 'SELECT 1'", "it must select by :user_ids"),
        (f"[database.queries.balance]\nsql = '{SQL}'\nsingel = true", "did you mean single?"),
        (f"[database.queries.balance]\nsql = '{SQL}'\nsingle = 1", "balance.single is 1"),
        (f"[database.queries.balance]\nsql = '{SQL}'\nempty = '['", "balance.empty is '['"),
        (f"[database.queries.balance]\nsql = '{SQL}'\nempty = 'NaN'", "balance.empty is 'NaN'"),
        (f"[database.queries.balance]\nsql = '{SQL}'\nempty = '-Infinity'", "empty is '-Infinity'"),
        (f"[database.queries.balance]\nsql = '{SQL}'\nempty = '1e999'", "balance.empty is '1e999'"),
        (f"[database.queries.balance]\nsql = '{SQL}'\njson_columns = 'a'", "json_columns is 'a'"),
        (f"[database.queries.balance]\nsql = '{SQL}'\njson_columns = [1]", "json_columns is (1,)"),
    ],
)
def test_what_a_file_may_not_hold(config: Path, toml: str, says: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        from_file(config, toml)
    assert says in refusal(error)
    # Two settings that do not go together may come from two places.
    # What two settings together may not say is not one line's fault, nor one file's.
    together = ("are both set", " without ", "less than polling.", "not used", "[channels.")
    assert any(each in refusal(error) for each in together) or str(config) in refusal(error)
    assert "hunter2" not in refusal(error)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("SERVER_PORT", "9.7", "TRADING_PUSH_SERVER_PORT: server.port is '9.7'"),
        ("SERVER_PORT", "true", "server.port is 'true'"),
        ("SERVER_PORT", "9" * 5000, "give a whole number"),
        ("SERVER_PORT", "", "TRADING_PUSH_SERVER_PORT is empty"),
        ("INTERVALS_PNL", "nan", "intervals.pnl is nan"),
        ("INTERVALS_PNL", "fast", "intervals.pnl is 'fast'"),
        ("MARKET_LOOP", "2", "market.loop is '2': give true or false"),
        ("PORT", "1", "TRADING_PUSH_PORT is no setting: did you mean TRADING_PUSH_SERVER_PORT?"),
        ("JWT_SECRT", "1", "did you mean TRADING_PUSH_JWT_SECRET?"),
        ("CONFG", "1", "did you mean TRADING_PUSH_CONFIG?"),
        ("HTTP_HEADERS", "X=hunter2", "TRADING_PUSH_HTTP_HEADERS: http.headers is not usable"),
        ("DATABASE_QUERIES", "1", "TRADING_PUSH_DATABASE_QUERIES: database.queries"),
    ],
)
def test_what_the_environment_may_not_hold(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, says: str
) -> None:
    monkeypatch.setenv(f"TRADING_PUSH_{name}", value)
    with pytest.raises(ConfigurationError) as error:
        load_settings(config=None, flags={})
    assert says in refusal(error)


@pytest.mark.parametrize("secret", ["hunter2", "0123456789abcdef0123456789abcde", 12345678])
def test_a_secret_that_is_refused_is_not_told(
    config: Path, monkeypatch: pytest.MonkeyPatch, secret: object
) -> None:
    with pytest.raises(ConfigurationError, match="32 bytes") as error:
        from_file(config, f"jwt_secret = {secret!r}")
    assert str(secret) not in refusal(error)
    assert str(config) in refusal(error)
    monkeypatch.setenv("TRADING_PUSH_JWT_SECRET", str(secret))
    with pytest.raises(ConfigurationError, match="TRADING_PUSH_JWT_SECRET") as error:
        load_settings(config=None, flags={})
    assert str(secret) not in refusal(error)


def test_secrets_do_not_show_in_a_repr(config: Path) -> None:
    url = "postgresql://user:pass@host/db"
    settings = from_file(
        config,
        f"jwt_secret = '{SECRET}'\n[database]\nurl = '{url}'\n"
        f"[database.queries.balance]\nsql = '{SQL}'",
    )
    assert SECRET not in repr(settings)
    assert "pass" not in repr(settings)


def test_the_http_token_comes_from_the_environment_and_does_not_show(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRADING_PUSH_HTTP_TOKEN", "t0ken")
    settings = from_file(config, f"[http]\nurl = '{HTTP}?key=s3cret'\nheaders = {{X = 'k3y'}}")
    assert settings.http.token == "t0ken"
    assert settings.http.headers == {"X": "k3y"}
    for hidden in ("t0ken", "s3cret", "k3y"):
        assert hidden not in repr(settings)


def test_a_file_that_cannot_be_read(tmp_path: Path, config: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"there is no configuration file .*trading-push"):
        load_settings(config=tmp_path / "nope.toml", flags={})
    with pytest.raises(ConfigurationError, match="cannot read the configuration file"):
        load_settings(config=tmp_path, flags={})
    config.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigurationError, match="cannot read the configuration file"):
        load_settings(config=config, flags={})


@pytest.mark.parametrize("ends", ["\n", "\r\n"])
def test_a_file_as_an_editor_of_windows_writes_it(config: Path, ends: str) -> None:
    text = "\ufeff# 端口\n[server]\nport = 9001\n".replace("\n", ends)
    config.write_bytes(text.encode())
    assert load_settings(config=config, flags={}).server.port == 9001
    for encoding in ("utf-16-le", "utf-16-be"):
        config.write_bytes(text.encode(encoding))
        with pytest.raises(ConfigurationError, match=r"it is UTF-16, .*: save it as UTF-8"):
            load_settings(config=config, flags={})


def test_flags_are_checked_as_well() -> None:
    with pytest.raises(ConfigurationError, match=r"command line: server.port is '9\.7'"):
        load_settings(config=None, flags={"server.port": "9.7"})
    with pytest.raises(ConfigurationError, match=r"did you mean intervals\.balance"):
        load_settings(config=None, flags={"intervals.balnce": "1"})


def test_objects_are_checked_when_they_are_made() -> None:
    with pytest.raises(ConfigurationError, match="port"):
        Server(port=True)
    with pytest.raises(ConfigurationError, match="jwt_secret"):
        Settings(jwt_secret="short")
    with pytest.raises(ConfigurationError, match="balance"):
        Intervals(balance=math.nan)


def every_setting() -> dict[str, Any]:
    """All settings by name, with their defaults."""
    settings: dict[str, Any] = {}
    for field in attrs.fields(Settings):
        value = getattr(Settings(), field.name)
        if attrs.has(type(value)):
            for inner in attrs.fields(type(value)):
                settings[f"{field.name}.{inner.name}"] = getattr(value, inner.name)
        else:
            settings[field.name] = value
    return settings


def test_the_sample_holds_every_setting_with_its_default(config: Path) -> None:
    sample = importlib.resources.files("trading_push").joinpath("data/trading-push.toml")
    text = sample.read_text(encoding="utf-8")
    assert from_file(config, text) == Settings()

    defaults = re.sub(r"(?m)^# (\w+ = .*)$", r"\1", text)
    assert from_file(config, defaults) == Settings()
    written = {
        f"{section}.{name}" if isinstance(table, dict) else section
        for section, table in tomllib.loads(defaults).items()
        for name in (table if isinstance(table, dict) else [""])
    }
    assert written == {
        name for name, default in every_setting().items() if default not in (None, {})
    }

    # The examples are the settings without a default; each of them is one that can be used.
    examples = tomllib.loads(re.sub(r"(?m)^#! ", "", text))
    balance = examples["database"].pop("queries")["balance"]
    assert {*balance, "cursor", "history"} == {field.name for field in attrs.fields(Query)}
    assert examples["http"].pop("headers")
    assert examples.pop("channels")
    assert examples["ccxt"].pop("options")
    named = {
        f"{section}.{name}" if isinstance(table, dict) else section
        for section, table in examples.items()
        for name in (table if isinstance(table, dict) else [""])
    }
    assert named == {name for name, default in every_setting().items() if default is None}
    # Of the places that accounts are read from each excludes the others, and a tape an exchange.
    database, http = ('url = "postgresql', "notify_channel"), ('url = "https', "batch_url")
    function, ccxt = ("fetch", "flask_app"), ("credentials", "exchange")
    always_left_out = (
        *("jwt_secret", "path", 'url = "wss', "rest_url"),
        *("token_file", "token_command"),
    )

    def usable(*left_out: str) -> Settings:
        pattern = "|".join(map(re.escape, (*always_left_out, *left_out)))
        return from_file(config, re.sub(f"(?m)^#! (?!{pattern})", "", text))

    assert usable(*http, *function, *ccxt).database.queries["balance"].empty == "[]"
    assert usable(*database, *function, *ccxt).http.headers == {"X-Api-Version": "2"}
    assert usable(*database, *http, *ccxt).function.fetch == "shop.push:fetch"
    directly = usable(*database, *http, *function, "credentials =").ccxt
    assert directly.credentials_file == config.parent / "keys.toml"


# The first text takes a while where hypothesis has not yet cached its tables of Unicode.
@hypothesis_settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.dictionaries(st.sampled_from(sorted(every_setting())), st.text() | st.floats() | st.none())
)
def test_no_flag_ends_in_anything_but_settings_or_one_line(flags: dict[str, Any]) -> None:
    try:
        settings = load_settings(config=None, flags=flags)
    except ConfigurationError as error:
        assert "\n" not in str(error)  # noqa: PT017
    else:
        assert isinstance(settings, Settings)
