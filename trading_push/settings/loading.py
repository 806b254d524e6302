"""The settings put together from defaults < TOML file < environment < flags."""

from __future__ import annotations

import difflib
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import attrs
import typed_settings
from typed_settings.converters import TSConverter
from typed_settings.dict_utils import set_path
from typed_settings.exceptions import ConfigFileNotFoundError, TsError
from typed_settings.loaders import EnvLoader, Loader, TomlFormat
from typed_settings.types import LoadedSettings, LoaderMeta, OptionInfo, OptionList, SettingsDict

from trading_push.errors import ConfigurationError
from trading_push.settings.schema import Intervals, Query, Settings

__all__ = ["ENVIRONMENT_PREFIX", "load_settings"]

ENVIRONMENT_PREFIX = "TRADING_PUSH_"
_CONFIG_VARIABLE = ENVIRONMENT_PREFIX + "CONFIG"
# These begin like a setting and are none: which file to read, and the token of `watch`.
_OTHER_VARIABLES = (
    _CONFIG_VARIABLE,
    ENVIRONMENT_PREFIX + "TOKEN",
    ENVIRONMENT_PREFIX + "UNGUARDED",
)
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
    _check_accounts(settings)
    _check_market(settings)
    return settings


def _check_accounts(settings: Settings) -> None:
    """What does not go together of the places that accounts are read from."""
    database, http = settings.database, settings.http
    function, ccxt = settings.function, settings.ccxt
    places = {
        "database.url": database.url,
        "database.path": database.path,
        "http.url": http.url,
        "function.fetch": function.fetch,
        "ccxt.credentials_file": ccxt.credentials_file,
        "ccxt.credentials": ccxt.credentials,
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
    for name in ("fetch_many", "flask_app"):
        if getattr(function, name) is not None and function.fetch is None:
            raise ConfigurationError(
                f"function.{name} is set without function.fetch: name the function that reads "
                "one user's data"
            )


def _check_market(settings: Settings) -> None:
    """What does not go together of the market, and of an exchange that may be both."""
    market, ccxt = settings.market, settings.ccxt
    if market.tape is not None and market.feed != "simulated":
        raise ConfigurationError(
            f"market.tape and market.feed = {market.feed!r} are both set: keep the one to take "
            "tickers from"
        )
    if market.url is not None and market.feed not in ("binance", "bybit"):
        raise ConfigurationError(
            "market.url is set without an exchange: set market.feed to binance or bybit"
        )
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
