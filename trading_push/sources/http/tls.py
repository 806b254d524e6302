"""The TLS context of the HTTP source: whom it trusts, and who it says that it is."""

from __future__ import annotations

import ssl
from pathlib import Path

from trading_push.errors import ConfigurationError

__all__ = ["tls_context"]


def tls_context(
    ca_file: Path | None, client_cert: Path | None, client_key: Path | None
) -> ssl.SSLContext:
    """Make a context.

    Args:
        ca_file: The authorities to trust, in PEM; None for the system's.
        client_cert: A certificate to show, in PEM, with those of its authorities behind it.
        client_key: Its key, in PEM; None if it stands in the same file.

    Raises:
        ConfigurationError: A file cannot be used.
    """
    try:
        context = ssl.create_default_context(cafile=ca_file)
    except (OSError, ValueError) as error:
        raise _unusable("http.ca_file", ca_file, error) from None
    if client_cert is None:
        return context
    try:
        # With a password of its own OpenSSL would ask for it at the terminal.
        context.load_cert_chain(client_cert, client_key, password="")
    except (OSError, ValueError) as error:
        if client_key is None:
            raise _unusable("http.client_cert", client_cert, error) from None
        raise _unusable("http.client_cert or http.client_key", client_key, error) from None
    return context


def _unusable(setting: str, path: Path | None, error: Exception) -> ConfigurationError:
    if isinstance(error, OSError) and not isinstance(error, ssl.SSLError):
        return ConfigurationError(f"{setting} {str(path)!r} cannot be read: {error.strerror}")
    return ConfigurationError(
        f"{setting} {str(path)!r} is not usable: give PEM, and a key that fits and has no password"
    )
