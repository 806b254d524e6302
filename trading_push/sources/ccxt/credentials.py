"""The users' own keys for an exchange, from a file or from JSON."""

from __future__ import annotations

import logging
import os
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

from trading_push.errors import ConfigurationError
from trading_push.logs.lines import ERROR_LENGTH, one_line
from trading_push.settings.secret_file import read_secret_file

__all__ = ["CredentialsFile", "credentials_of_file", "credentials_of_json"]

_logger: Final = logging.getLogger("trading_push.settings")

# ccxt's names for credentials, by how a configuration may write them.
_CREDENTIALS = {
    "api_key": "apiKey",
    "secret": "secret",
    "password": "password",
    "uid": "uid",
    "login": "login",
    "account_id": "accountId",
    "private_key": "privateKey",
    "wallet_address": "walletAddress",
    "token": "token",
}


class CredentialsFile(Mapping[str, Mapping[str, str]]):
    """The users' credentials in a file, which is read again when it has changed.

    A file that cannot be used leaves them as they were, and is told in one line of the log.

    Raises:
        ConfigurationError: It cannot be used at the start; see `credentials_of_file`.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        # What told, when it was last read, that the file is still the same.
        self._state = self._look()
        self._users = credentials_of_file(path)

    def __getitem__(self, user: str) -> Mapping[str, str]:
        return self._current()[user]

    def __iter__(self) -> Iterator[str]:
        return iter(self._current())

    def __len__(self) -> int:
        return len(self._current())

    def _current(self) -> Mapping[str, Mapping[str, str]]:
        state = self._look()
        if state != self._state:
            self._state = state
            try:
                self._users = credentials_of_file(self._path)
            except ConfigurationError as error:
                _logger.error("%s", one_line(str(error), ERROR_LENGTH))
        return self._users

    def _look(self) -> tuple[int, ...] | None:
        try:
            state = os.stat(self._path)
        except OSError:
            return None
        return state.st_mtime_ns, state.st_size, state.st_ino, state.st_mode


def credentials_of_file(path: Path) -> dict[str, dict[str, str]]:
    """Read each user's credentials from a TOML file with a table [users.ID] for each.

    Raises:
        ConfigurationError: It cannot be read, can be read by others than its owner, or holds
            something else. No value is in the text.
    """
    data = read_secret_file(path, "ccxt.credentials_file")
    try:
        tables = tomllib.loads(data.decode())
    except (ValueError, RecursionError):
        raise ConfigurationError(
            f"ccxt.credentials_file {str(path)!r} cannot be read: it is not TOML"
        ) from None
    if set(tables) != {"users"} or not isinstance(tables["users"], dict):
        raise ConfigurationError(
            f"ccxt.credentials_file {str(path)!r}: write a table [users.ID] for each user, and "
            "nothing else"
        )
    return _credentials(tables["users"], f"ccxt.credentials_file {str(path)!r}")


def credentials_of_json(text: str) -> dict[str, dict[str, str]]:
    """Read each user's credentials from JSON: {"4": {"api_key": "...", "secret": "..."}}.

    Raises:
        ConfigurationError: It is something else. No value is in the text.
    """
    try:
        tables = msgspec.json.decode(text)
    except (ValueError, RecursionError):
        tables = None
    if not isinstance(tables, dict):
        raise ConfigurationError(
            'ccxt.credentials is not usable: give JSON like {"4": {"api_key": "...", ...}}'
        )
    return _credentials(tables, "ccxt.credentials")


def _credentials(tables: Mapping[str, Any], where: str) -> dict[str, dict[str, str]]:
    """Check the tables, and name the credentials as ccxt does.

    Args:
        tables: The credentials by user, as they were written.
        where: The name of the setting, for errors.
    """
    if not tables:
        raise ConfigurationError(f"{where} names no user: give at least one")
    found: dict[str, dict[str, str]] = {}
    for user, table in tables.items():
        if not isinstance(table, dict):
            raise ConfigurationError(f"{where}: user {user} has no table of credentials: write one")
        names = {_CREDENTIALS.get(str(name), str(name)): table[name] for name in table}
        for name, value in names.items():
            if name not in _CREDENTIALS.values():
                raise ConfigurationError(
                    f"{where}: there is no credential {name!r} (user {user}): use some of "
                    f"{', '.join(_CREDENTIALS)}"
                )
            if not isinstance(value, str) or not value:
                raise ConfigurationError(f"{where}: {name} of user {user} is no text: correct it")
        found[user] = names
    return found
