"""The log lines: their texts, their formats, and where they are written."""

from typing import TYPE_CHECKING

from trading_push.lazy import lazy

if TYPE_CHECKING:
    from trading_push.logs.emitter import (
        CATALOGUE,
        JsonFormatter,
        Line,
        SafeFormatter,
        attached,
        close_line,
        emit,
        emit_pushed,
        enabled,
        escape,
        failure,
        innermost,
        line,
        set_language,
    )
else:
    __getattr__ = lazy(
        __name__,
        {
            "emitter": (
                "CATALOGUE JsonFormatter Line SafeFormatter attached close_line emit emit_pushed "
                "enabled escape failure innermost line set_language"
            ),
        },
    )

__all__ = [
    "CATALOGUE",
    "JsonFormatter",
    "Line",
    "SafeFormatter",
    "attached",
    "close_line",
    "emit",
    "emit_pushed",
    "enabled",
    "escape",
    "failure",
    "innermost",
    "line",
    "set_language",
]
