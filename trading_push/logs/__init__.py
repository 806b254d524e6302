"""The log lines: their texts, their forms, and where they are written."""

from typing import TYPE_CHECKING

from trading_push.lazy import lazy

if TYPE_CHECKING:
    from trading_push.logs.catalogue import CATALOGUE, default_language, set_language
    from trading_push.logs.emitter import emit, emit_pushed, enabled, set_quiet
    from trading_push.logs.lines import (
        ERROR_LENGTH,
        Line,
        close_line,
        escape,
        failure,
        line,
        traced,
    )
    from trading_push.logs.output import (
        JsonFormatter,
        SafeFormatter,
        attached,
        lines_dropped,
        set_level,
    )
    from trading_push.logs.process import adopt
else:
    __getattr__ = lazy(
        __name__,
        {
            "catalogue": "CATALOGUE default_language set_language",
            "emitter": "emit emit_pushed enabled set_quiet",
            "lines": "ERROR_LENGTH Line close_line escape failure line traced",
            "output": "JsonFormatter SafeFormatter attached lines_dropped set_level",
            "process": "adopt",
        },
    )

__all__ = [
    "CATALOGUE",
    "ERROR_LENGTH",
    "JsonFormatter",
    "Line",
    "SafeFormatter",
    "adopt",
    "attached",
    "close_line",
    "default_language",
    "emit",
    "emit_pushed",
    "enabled",
    "escape",
    "failure",
    "line",
    "lines_dropped",
    "set_language",
    "set_level",
    "set_quiet",
    "traced",
]
