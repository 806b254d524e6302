"""The secret of the demo, the tokens made with it, and the directory that it is kept in."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import attrs
import platformdirs

from trading_push.auth.tokens import issue_token
from trading_push.errors import ConfigurationError
from trading_push.settings.schema import Settings
from trading_push.settings.secret_file import read_secret_file
from trading_push.settings.validators import SECRET_BYTES

__all__ = [
    "DEMO_FILE",
    "DEMO_USERS",
    "DemoTokens",
    "data_dir",
    "demo_secret",
    "has_key",
    "secret_of",
]

DEMO_FILE = "jwt-secret"
"""The file of the demo's secret, in the user's data directory."""
DEMO_USERS: Final = ("1", "2", "3", "4", "5")
"""The users of the paper exchange."""


@attrs.frozen
class DemoTokens:
    """Makes tokens of the demo's users, in the embedded default.

    That is a paper exchange, the demo's own secret, and a server that listens on loopback only.

    Args:
        secret: The demo's.
        claims: What the server wants in a token besides.
    """

    secret: str = attrs.field(repr=False)
    claims: Mapping[str, Any]

    def issue(self, user: str, ttl_s: float) -> str:
        """Make a token of a user."""
        return issue_token(self.secret, user, ttl_s, self.claims)


def secret_of(settings: Settings) -> tuple[str | None, bool]:
    """The secret that the settings check tokens with, and whether it is the demo's.

    It is (None, False) if a public key checks them.

    Raises:
        ConfigurationError: The file of the secret cannot be used, or the demo's secret not be made
            or read.
    """
    if settings.auth.algorithm != "HS256":
        return None, False
    if settings.jwt_secret is not None:
        return settings.jwt_secret, False
    if settings.auth.secret_file is not None:
        return _of_file(settings.auth.secret_file), False
    return demo_secret(data_dir()), True


def has_key(settings: Settings) -> bool:
    """Whether tokens are checked by a key of one's own, and not by the demo's secret."""
    return (
        settings.auth.algorithm != "HS256"
        or settings.jwt_secret is not None
        or settings.auth.secret_file is not None
    )


def _of_file(path: Path) -> str:
    data = read_secret_file(path, "auth.secret_file")
    try:
        return data.decode().rstrip("\r\n")
    except UnicodeError:
        raise ConfigurationError(
            f"auth.secret_file {str(path)!r} is no text: write the secret into it, as UTF-8"
        ) from None


def data_dir() -> Path:
    """The user's data directory for this program; it may not exist yet."""
    return platformdirs.user_data_path("trading-push", appauthor=False)


def demo_secret(directory: Path) -> str:
    """Read the secret of the demo, or make it when there is none yet.

    It is kept in `directory` with mode 0600. Processes that ask at the same moment get the same
    one.

    Raises:
        ConfigurationError: It cannot be made or read, or other users can read it.
    """
    path = directory / DEMO_FILE
    try:
        if not path.exists():
            _make_secret(path)
        if os.name == "posix" and path.stat().st_mode & 0o077:
            raise ConfigurationError(
                f"other users can read the demo's secret {str(path)!r}: delete it, and a new one "
                "is made"
            )
        secret = path.read_text(encoding="ascii")
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise ConfigurationError(
            f"cannot keep the demo's secret in {str(path)!r}: {why}; "
            "set TRADING_PUSH_JWT_SECRET to a random text of 32 bytes or more"
        ) from error
    if len(secret) < SECRET_BYTES:
        raise ConfigurationError(
            f"the demo's secret {str(path)!r} is damaged: delete it, and a new one is made"
        )
    return secret


def _make_secret(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    draft = path.with_name(f"{path.name}.{os.getpid()}.{secrets.token_hex(8)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(secrets.token_urlsafe(SECRET_BYTES))
            file.flush()
            os.fsync(file.fileno())
        # A link appears whole or not at all, and never replaces another process's secret.
        with contextlib.suppress(FileExistsError):
            os.link(draft, path)
    finally:
        draft.unlink()
