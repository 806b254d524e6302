"""The URLs of the HTTP source, made of a template and percent-encoded parts."""

from __future__ import annotations

from urllib.parse import quote

from trading_push.errors import SourceError
from trading_push.settings.validators import DOT_SEGMENT

__all__ = ["encoded", "expand"]


def encoded(value: str) -> str:
    """Percent-encode one piece of a path; raises SourceError if no URL can hold it."""
    try:
        quoted = quote(value, safe="")
    except UnicodeEncodeError:
        quoted = ""
    if not quoted:
        raise SourceError("the user's id is one that no URL can hold", retryable=False)
    return quoted


def expand(template: str, **quoted: str) -> str:
    """Put encoded pieces into a template; raises SourceError if they would make another path."""
    url = template
    for name, value in quoted.items():
        url = url.replace(f"{{{name}}}", value)
    # No quoting helps here: servers, and asks, take "%2e%2e" for "..", and go up.
    if DOT_SEGMENT.search(url):
        raise SourceError("the user's id is one that no URL can hold", retryable=False)
    return url
