"""Lines of the catalogue with their values, and the escaping that keeps a text in its line."""

from __future__ import annotations

import re
import unicodedata
from typing import Any, Final, NamedTuple

from trading_push.errors import CloseCode, TradingPushError
from trading_push.logs import catalogue

__all__ = [
    "ERROR_LENGTH",
    "FIELD_LENGTH",
    "Line",
    "close_line",
    "escape",
    "failure",
    "line",
    "one_line",
    "safe_str",
    "traced",
    "without_tokens",
]

FIELD_LENGTH: Final = 64
"""How many characters of a field are printed."""
ERROR_LENGTH: Final = 300
"""How many characters of an error's text, a path or a list of users are printed."""

# What could end, hide or reorder a line: controls, formats, surrogates, line and paragraph breaks.
_UNSAFE_CATEGORIES: Final = ("Cc", "Cf", "Cs", "Zl", "Zp")

# A JWT. Where the text was cut inside one, the signature may be missing.
_TOKEN: Final = re.compile(r"eyJ[\w-]+\.[\w-]+\.[\w-]*")

# The close codes of an ordinary end, which is no reason for a warning.
_ORDINARY: Final = frozenset({CloseCode.NORMAL, CloseCode.NO_STATUS, CloseCode.GOING_AWAY})


class Line(NamedTuple):
    """A line of the catalogue with its values, not yet in any language.

    `exception` is printed below the line as a stack trace.
    """

    event: str
    fields: dict[str, Any]
    exception: BaseException | None = None


def line(event: str, **fields: Any) -> Line:
    """Make a line of the catalogue.

    A number prints in its shortest form; the text of anything else is escaped and cut.
    """
    for name, value in fields.items():
        if isinstance(value, BaseException):
            fields[name] = failure(value)
        elif isinstance(value, float):
            fields[name] = float(f"{value:g}") if value % 1 else int(value)
        elif not isinstance(value, int):
            limit = ERROR_LENGTH if name in ("error", "path", "users") else FIELD_LENGTH
            fields[name] = escape(safe_str(value), limit)
    return Line(event, fields)


def traced(event: str, error: BaseException, **fields: Any) -> Line:
    """A line that tells of a bug, or of what an application's code raised, with its stack trace."""
    return line(event, error=error, **fields)._replace(exception=error)


def close_line(code: int, reason: str, *, ours: bool) -> Line:
    """Make the line that says how a connection was closed.

    Args:
        code: The close code that decided.
        reason: The text that came with it.
        ours: This server closed the connection.
    """
    language = catalogue.language()
    if code == CloseCode.SERVICE_RESTART and ours:
        event, meaning = "closed", catalogue.RESTART_MEANING[language]
    elif code in catalogue.MEANINGS:
        event = "closed" if code in _ORDINARY else "closed_oddly"
        meaning = catalogue.MEANINGS[code][language]
    else:
        event = "closed_oddly"
        meaning = catalogue.CODE_NAMES.get(code, catalogue.OTHER_MEANING[language])
    return line(event, code=code, reason=reason, meaning=meaning)


def escape(text: str, limit: int = FIELD_LENGTH) -> str:
    """Make a text safe inside one line: nothing in it can end, hide or reorder the line.

    Characters of the Unicode categories Cc, Cf, Cs, Zl and Zp, and the quote that surrounds a
    value, appear as `\\xNN`, `\\uNNNN` or `\\'`. The result is cut at `limit` characters.
    """
    if text.isascii() and text.isprintable() and "'" not in text:
        return text[:limit]
    return "".join(map(_escape_character, text[:limit]))[:limit]


def _escape_character(character: str) -> str:
    if character == "'":
        return "\\'"
    if unicodedata.category(character) not in _UNSAFE_CATEGORIES:
        return character
    code = ord(character)
    return (
        f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 65536 else f"\\U{code:08x}"
    )


def one_line(text: str, limit: int) -> str:
    """Escape a text that no quotes surround."""
    return escape(text, limit).replace("\\'", "'")


def failure(error: BaseException) -> str:
    """Put an exception in one escaped line: its class and the first line of its text.

    The class is left out if it is this package's own: their texts stand for themselves.
    """
    kind = type(error).__name__
    text = without_tokens(safe_str(error).strip().split("\n", 1)[0], ERROR_LENGTH)
    if not text:
        text = kind
    elif not isinstance(error, TradingPushError):
        text = f"{kind}: {text}"
    return escape(text, ERROR_LENGTH)


def safe_str(value: object) -> str:
    """The text of any object; empty if its `__str__` raises."""
    try:
        return str(value)
    except Exception:
        return ""


def without_tokens(text: str, limit: int) -> str:
    """Cut a text, and replace each token in it.

    An application's `authenticate` may raise with the token in its text, and anyone who reads the
    log could then use it.
    """
    return _TOKEN.sub("(token)", text[:limit])
