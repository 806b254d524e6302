"""The users' own keys for an exchange, from a file or from JSON."""

from __future__ import annotations

import os
import stat
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from trading_push.errors import ConfigurationError

__all__ = ["credentials_of_file", "credentials_of_json"]

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


def credentials_of_file(path: Path) -> dict[str, dict[str, str]]:
    """Read each user's credentials from a TOML file with a table [users.ID] for each.

    Raises:
        ConfigurationError: It cannot be read, can be read by others than its owner, or holds
            something else. No value is in the text.
    """
    try:
        with path.open("rb") as file:
            if stat.S_IMODE(os.fstat(file.fileno()).st_mode) & 0o077:
                raise ConfigurationError(
                    f"ccxt.credentials_file {str(path)!r} can be used by others than its owner: "
                    f"chmod 600 {path}"
                )
            tables = tomllib.load(file)
    except (OSError, ValueError, RecursionError) as error:
        why = getattr(error, "strerror", None) or "it is not TOML"
        raise ConfigurationError(
            f"ccxt.credentials_file {str(path)!r} cannot be read: {why}"
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
