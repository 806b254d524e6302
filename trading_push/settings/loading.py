"""Load the settings: defaults < TOML file < environment < flags."""

from __future__ import annotations

import codecs
import difflib
import logging
import os
import re
import tomllib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, get_args

import attrs
import typed_settings
from typed_settings.converters import TSConverter
from typed_settings.dict_utils import set_path
from typed_settings.exceptions import TsError
from typed_settings.loaders import Loader
from typed_settings.types import LoadedSettings, LoaderMeta, OptionInfo, OptionList, SettingsDict

from trading_push.errors import ConfigurationError
from trading_push.logs.lines import ERROR_LENGTH, one_line
from trading_push.settings.channels import OwnChannel
from trading_push.settings.consistency import check
from trading_push.settings.schema import MOVED, Settings
from trading_push.settings.sources import Query

__all__ = ["ENVIRONMENT_PREFIX", "load_settings"]

ENVIRONMENT_PREFIX: Final = "TRADING_PUSH_"
_CONFIG_VARIABLE: Final = ENVIRONMENT_PREFIX + "CONFIG"
# These begin like a setting and are none: the file to read, the token of `watch`, and whether an
# unknown Hypercorn may be used.
_OTHER_VARIABLES: Final = (
    _CONFIG_VARIABLE,
    ENVIRONMENT_PREFIX + "TOKEN",
    ENVIRONMENT_PREFIX + "UNGUARDED",
)

# The URL of an SQLite file whose path is relative: three slashes, where an absolute one has four.
_SQLITE_FILE: Final = re.compile(r"^(sqlite(?:\+\w+)?:///)(?!/|:memory:|file:)([^?]+)")

_logger: Final = logging.getLogger("trading_push.settings")


def load_settings(*, config: Path | None, flags: Mapping[str, Any]) -> Settings:
    """Load the settings: defaults < TOML file < environment < flags.

    A setting that was given by an old name is used, and a WARNING names the new one.

    Args:
        config: The TOML file; None reads the one that `TRADING_PUSH_CONFIG` names, if any.
            Relative paths in it start at its own directory.
        flags: Values by setting (`server.port`), as text or in their own types; None is "not
            given".

    Raises:
        ConfigurationError: One line that says where a value came from, what is wrong and what to
            do.
    """
    if config is None and os.environ.get(_CONFIG_VARIABLE):
        config = Path(os.environ[_CONFIG_VARIABLE])
    # click_options() would read the files while it decorates, and --config could not work. So the
    # flags are one more loader.
    names = _Names()
    loaders: list[Loader] = [_EnvironmentLoader(names), _FlagLoader(names, flags)]
    if config is not None:
        loaders.insert(0, _FileLoader(names, config))
    try:
        settings = typed_settings.load_settings(
            Settings, loaders, converter=TSConverter(resolve_paths=False)
        )
    except TsError as error:  # pragma: no cover - nothing known gets past the loaders
        raise ConfigurationError(" ".join(str(error).split())) from error
    names.check()
    check(settings)
    names.warn()
    return settings


class _Names:
    """The names by which settings were given, of which some are old."""

    def __init__(self) -> None:
        self._given: set[str] = set()  # paths
        self._old: dict[str, tuple[str, str, str]] = {}  # by old path: both names, and the place

    def path_of(self, path: str, where: str, old_name: str = "", new_name: str = "") -> str:
        """Note that a setting was given, and return its present path.

        Args:
            path: The path that it was given by.
            where: The place that it was given in, for the warning.
            old_name: How it is called there; by default its path.
            new_name: How it must be called there.
        """
        self._given.add(path)
        if path not in MOVED:
            return path
        self._old[path] = (old_name or path, new_name or MOVED[path], where)
        return MOVED[path]

    def check(self) -> None:
        """Refuse a setting that was given by both of its names, in whatever places."""
        for path in self._old:
            if MOVED[path] in self._given:
                raise ConfigurationError(
                    f"{path} and {MOVED[path]} are both set: keep {MOVED[path]}"
                )

    def warn(self) -> None:
        """Log one WARNING for each old name."""
        for old, new, where in self._old.values():
            text = f"{where}: {old} is now called {new}: rename it"
            _logger.warning("%s", one_line(text, ERROR_LENGTH))


class _FileLoader:
    """Load one TOML file, which must exist and hold nothing unknown."""

    def __init__(self, names: _Names, path: Path) -> None:
        self._names = names
        self._path = path

    def __call__(self, settings_cls: type, options: OptionList) -> LoadedSettings:
        path = self._path
        try:
            # Not by typed-settings, which takes no byte order mark.
            raw = tomllib.loads(_decoded(path.read_bytes()))
        except FileNotFoundError as error:
            raise ConfigurationError(
                f"there is no configuration file {str(path)!r}: `trading-push init` writes one"
            ) from error
        except (OSError, ValueError, RecursionError) as error:
            why = getattr(error, "strerror", None) or error
            raise ConfigurationError(
                f"cannot read the configuration file {str(path)!r}: {why}"
            ) from error
        known = {option.path: option for option in options}
        settings: SettingsDict = {}
        for name, value in _flatten(raw, known, str(path)):
            option = known[self._names.path_of(name, str(path))]
            checked = _checked(option, value, name, str(path), path.parent.absolute())
            set_path(settings, option.path, checked)
        return LoadedSettings(settings, LoaderMeta(self))


class _EnvironmentLoader:
    """Load the environment, in which no variable with the prefix may be unknown."""

    def __init__(self, names: _Names) -> None:
        self._names = names

    def __call__(self, settings_cls: type, options: OptionList) -> LoadedSettings:
        known = {_variable(option.path): option for option in options}
        moved = {_variable(old): old for old in MOVED}
        settings: SettingsDict = {}
        for name, value in os.environ.items():
            if not name.startswith(ENVIRONMENT_PREFIX) or name in _OTHER_VARIABLES:
                continue
            if name not in known and name not in moved:
                hint = _hint(name, [*known, *_OTHER_VARIABLES])
                raise ConfigurationError(
                    f"the environment variable {name} is no setting{hint or ': unset it'}"
                )
            if not value:
                raise ConfigurationError(f"{name} is empty: give it a value, or unset it")
            given = moved[name] if name in moved else known[name].path
            new_name = _variable(MOVED.get(given, given))
            self._names.path_of(given, "environment", name, new_name)
            option = known[new_name]
            parsed = _parsed(option, value)
            set_path(settings, option.path, _checked(option, parsed, given, name, Path.cwd()))
        return LoadedSettings(settings, LoaderMeta("environment"))


def _decoded(data: bytes) -> str:
    """Decode a file, with or without a byte order mark, that an editor or a shell has written."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError("it is UTF-16, which a shell of Windows writes: save it as UTF-8")
    return data.decode("utf-8-sig")


def _variable(path: str) -> str:
    """The environment variable of a setting."""
    return ENVIRONMENT_PREFIX + path.replace(".", "_").upper()


class _FlagLoader:
    """Load what the command line gave."""

    def __init__(self, names: _Names, flags: Mapping[str, Any]) -> None:
        self._names = names
        self._flags = flags

    def __call__(self, settings_cls: type, options: OptionList) -> LoadedSettings:
        known = {option.path: option for option in options}
        settings: SettingsDict = {}
        for name, value in self._flags.items():
            if value is None:
                continue
            if name not in known and name not in MOVED:
                raise ConfigurationError(
                    f"command line: there is no setting {name!r}{_hint(name, known)}"
                )
            option = known[self._names.path_of(name, "command line")]
            parsed = _parsed(option, value) if isinstance(value, str) else value
            checked = _checked(option, parsed, name, "command line", Path.cwd())
            set_path(settings, option.path, checked)
        return LoadedSettings(settings, LoaderMeta(self))


def _flatten(
    raw: Mapping[str, Any], known: Collection[str], where: str, section: str = ""
) -> Iterator[tuple[str, Any]]:
    """Give each value of a parsed file with its whole name; refuse an unknown one."""
    sections = {name.rpartition(".")[0] for name in known} - {""}
    for key, value in raw.items():
        name = f"{section}{key}"
        if name in known or name in MOVED:
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
    """Make `: did you mean ...?`, or nothing if no name is similar."""
    last = name.rpartition(".")[2]
    alike = [other for other in known if other.rpartition(".")[2] == last]
    alike = alike or difflib.get_close_matches(name, known, n=1)
    return f": did you mean {alike[0]}?" if alike else ""


def _parsed(option: OptionInfo, value: str) -> Any:
    """Read a text as the number or switch that it stands for, or leave it a text.

    The setting's validator refuses what should not have stayed a text.
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


def _checked(option: OptionInfo, value: Any, name: str, where: str, base: Path) -> Any:
    """Check a value by its setting's validator, before typed-settings sees it.

    typed-settings would make 9.7 the port 9 and `true` the number 1, and would show secrets in its
    messages.

    Args:
        option: The setting.
        value: The value, which is returned in the setting's type.
        name: The name that the setting was given by.
        where: The place that it was given in.
        base: The directory that a relative path starts at.
    """
    if Path in get_args(option.cls) and isinstance(value, str) and value:
        try:
            value = base / Path(value).expanduser()
        except RuntimeError as error:
            raise ConfigurationError(f"{where}: {name}: {error}") from error
    if option.path == "database.url" and isinstance(value, str):
        value = _SQLITE_FILE.sub(lambda found: f"{found[1]}{base / found[2]}", value)
    attribute = getattr(attrs.fields(option.parent_cls), option.name)
    try:
        if option.path == "database.queries":
            return _queries(value)
        if option.path == "channels":
            return _channels(value)
        if attribute.validator is not None:
            attribute.validator(None, attribute.evolve(name=name), value)
    except ConfigurationError as error:
        raise ConfigurationError(f"{where}: {error}") from None
    return value


def _queries(tables: object) -> dict[str, Query]:
    """Make queries of the tables [database.queries.NAME]."""
    if not isinstance(tables, dict):
        raise ConfigurationError(
            "database.queries: write a table [database.queries.NAME] for each data type, in the "
            "configuration file"
        )
    queries: dict[str, Query] = {}
    fields = [field.name for field in attrs.fields(Query)]
    for name, table in tables.items():
        path = f"database.queries.{name}"
        if not isinstance(table, dict) or "sql" not in table:
            raise ConfigurationError(f"{path} has no query: write sql = ... below [{path}]")
        for key in table:
            if key not in fields:
                raise ConfigurationError(
                    f"there is no setting '{path}.{key}'{_hint(key, fields) or ': remove it'}"
                )
        # TOML has lists and no tuples; anything else is left for the check to refuse.
        lists = {key: tuple(value) for key, value in table.items() if isinstance(value, list)}
        try:
            queries[name] = Query(**{**table, **lists})
        except ConfigurationError as error:
            raise ConfigurationError(f"{path}.{error}") from None
    return queries


def _channels(tables: object) -> dict[str, OwnChannel]:
    """Make channels of the tables [channels.NAME]."""
    advice = "write a table [channels.NAME] for each channel, in the configuration file"
    if not isinstance(tables, dict):
        raise ConfigurationError(f"channels: {advice}")
    channels: dict[str, OwnChannel] = {}
    fields = [field.name for field in attrs.fields(OwnChannel)]
    for name, table in tables.items():
        path = f"channels.{name}"
        if not isinstance(table, dict):
            raise ConfigurationError(f"{path} is no table: {advice}")
        for key in table:
            if key not in fields:
                raise ConfigurationError(
                    f"there is no setting '{path}.{key}'{_hint(key, fields) or ': remove it'}"
                )
        try:
            channels[name] = OwnChannel(**table)
        except ConfigurationError as error:
            raise ConfigurationError(f"{path}.{error}") from None
    return channels
