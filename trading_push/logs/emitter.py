"""The catalogue of log lines (zh, en), their formats, and the handlers behind a queue.

The lines are part of the product: operators watch and grep them. One line is one record; the lines
given to one `emit` stand together, with no other `trading_push` record between them, whichever
thread it comes from. A record carries the event's name (`record.event`) and fields
(`record.fields`). A library embedded in an application attaches no handler: `attached` is for
programs.
"""

from __future__ import annotations

import logging
import os
import queue
import re
import select
import threading
import time
import traceback
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec

from trading_push.errors import CloseCode, ConfigurationError, TradingPushError

__all__ = [
    "Line",
    "attached",
    "close_line",
    "emit",
    "emit_pushed",
    "escape",
    "failure",
    "innermost",
    "line",
    "set_language",
]

FIELD_LENGTH: Final = 64
ERROR_LENGTH: Final = 300
TRACE_LENGTH: Final = 1000
"""How long a text may be in a stack trace."""

# event: (logger below trading_push, Chinese, English). The first character decides the level.
CATALOGUE: Final[dict[str, tuple[str, str, str]]] = {
    "service_started": (
        "service",
        "🚀 启动交易数据WebSocket推送服务",
        "🚀 Starting the trading data WebSocket push service",
    ),
    "poller_started": (
        "poller",
        "🔄 启动{data_type}数据推送线程 - 推送间隔: {interval}秒",
        "🔄 Starting the {data_type} push loop - interval: {interval} s",
    ),
    "connected": (
        "registry",
        "🔌 WebSocket客户端连接 - 来自: {address}",
        "🔌 WebSocket client connected - from: {address}",
    ),
    "connection_count": (
        "registry",
        "🔌 当前连接数: {connections}",
        "🔌 Connections: {connections}",
    ),
    "authenticated": ("registry", "✅ 用户{user}认证成功", "✅ User {user} authenticated"),
    "subscribed": (
        "registry",
        "📋 用户{user}订阅{data_type}数据",
        "📋 User {user} subscribed to {data_type} data",
    ),
    "subscribed_symbol": (
        "registry",
        "📊 用户{user}订阅{symbol}行情",
        "📊 User {user} subscribed to the {symbol} ticker",
    ),
    "subscriber_count": (
        "registry",
        "   当前订阅者: {subscribers}",
        "   Subscribers: {subscribers}",
    ),
    "pushed": (
        "registry",
        "📤 推送{data_type}数据给用户{user}",
        "📤 Pushed {data_type} to user {user}",
    ),
    "disconnected": (
        "registry",
        "🔌 WebSocket客户端断开连接 - 来自: {address}",
        "🔌 WebSocket client disconnected - from: {address}",
    ),
    "leaving_rooms": (
        "registry",
        "👤 用户{user}退出所有房间",
        "👤 User {user} leaves every room",
    ),
    "left_room": ("registry", "   🚪 退出房间: {room}", "   🚪 Left room: {room}"),
    "left_symbol_room": (
        "registry",
        "   🚪 退出行情房间: {room}",
        "   🚪 Left ticker room: {room}",
    ),
    "unsubscribed": (
        "registry",
        "📋 用户{user}取消订阅{data_type}数据 - 剩余订阅者: {subscribers}",
        "📋 User {user} unsubscribed from {data_type} data - subscribers left: {subscribers}",
    ),
    "unsubscribed_symbol": (
        "registry",
        "📊 用户{user}取消订阅{symbol}行情 - 剩余订阅者: {subscribers}",
        "📊 User {user} unsubscribed from the {symbol} ticker - subscribers left: {subscribers}",
    ),
    "symbol_removed": (
        "registry",
        "   {symbol}无订阅者，移除",
        "   {symbol} has no subscribers, removed",
    ),
    "left_all_rooms": (
        "registry",
        "✅ 用户{user}已退出所有房间并清理订阅",
        "✅ User {user} has left every room, subscriptions cleaned up",
    ),
    "unauthenticated_left": (
        "registry",
        "⚠️ 未认证用户断开连接",
        "⚠️ An unauthenticated user disconnected",
    ),
    "cleaned_up": (
        "registry",
        "用户{user}断开连接并清理所有订阅",
        "User {user} disconnected, every subscription cleaned up",
    ),
    "online_count": (
        "registry",
        "👤 当前在线用户数: {users}",
        "👤 Users online: {users}",
    ),
    "closed": (
        "registry",
        "🔌 连接关闭: code={code} reason='{reason}' ({meaning})",
        "🔌 Connection closed: code={code} reason='{reason}' ({meaning})",
    ),
    "closed_oddly": (
        "registry",
        "⚠️ 连接关闭: code={code} reason='{reason}' ({meaning})",
        "⚠️ Connection closed: code={code} reason='{reason}' ({meaning})",
    ),
    "peer_gone": (
        "registry",
        "✅ 用户{user}已断开连接（正常）",
        "✅ User {user} has disconnected (normal)",
    ),
    "peer_gone_unauthenticated": (
        "registry",
        "✅ 客户端已断开连接（正常）",
        "✅ The client has disconnected (normal)",
    ),
    "cleanup_failed": (
        "registry",
        "⚠️ 断开连接处理出错: {error}",
        "⚠️ Error while handling a disconnect: {error}",
    ),
    "fetch_failed": (
        "poller",
        "❌ 获取用户{user}的{data_type}数据失败: {error}",
        "❌ Fetching {data_type} of user {user} failed: {error}",
    ),
    "fetch_failed_again": (
        "poller",
        "❌ 获取用户{user}的{data_type}数据失败: {error}（另有{suppressed}次）",
        "❌ Fetching {data_type} of user {user} failed: {error} ({suppressed} more times)",
    ),
    "fetch_recovered": (
        "poller",
        "✅ 用户{user}的{data_type}数据已恢复",
        "✅ The {data_type} of user {user} has recovered",
    ),
    "data_stale": (
        "poller",
        "⚠️ 用户{user}的{data_type}数据已过期",
        "⚠️ The {data_type} of user {user} is stale",
    ),
    "session_failed": (
        "service",
        "❌ 用户{user}的上游会话出错: {error} - {delay}秒后重试",
        "❌ The upstream session of user {user} failed: {error} - next try in {delay} s",
    ),
    "watch_failed": (
        "service",
        "❌ 数据源变更监听出错: {error} - {delay}秒后重试",
        "❌ The watch over the source failed: {error} - next try in {delay} s",
    ),
    "stream_failed": (
        "service",
        "❌ 数据流{channel}出错: {error} - {delay}秒后重启",
        "❌ The stream {channel} failed: {error} - started again in {delay} s",
    ),
    "publish_failed": (
        "service",
        "❌ 数据源发布的{channel}无法推送: {error}",
        "❌ What the source published to {channel} cannot be pushed: {error}",
    ),
    "symbol_stale": ("feed", "⚠️ {symbol}行情中断", "⚠️ The {symbol} ticker is interrupted"),
    "symbol_recovered": ("feed", "✅ {symbol}行情已恢复", "✅ The {symbol} ticker has recovered"),
    "feed_failed": (
        "feed",
        "❌ 行情源出错: {error} - {delay}秒后重试",
        "❌ The market feed failed: {error} - next try in {delay} s",
    ),
    "feed_failed_at": (
        "feed",
        "❌ 行情源处理{symbol}出错: {error}",
        "❌ The market feed failed at {symbol}: {error}",
    ),
    "part_failed": (
        "service",
        "❌ {part}意外出错: {error} - {delay}秒后重启",
        "❌ The {part} failed: {error} - started again in {delay} s",
    ),
    "notification_unusable": (
        "source",
        "⚠️ 频道{channel}的通知无法解析，已忽略（仅提示一次）: {error} - '{payload}'",
        "⚠️ A notification on {channel} cannot be read, such are ignored: {error} - '{payload}'",
    ),
    "tape_bad_lines": (
        "feed",
        "⚠️ 行情录像{path}有{count}行无法解析 - 第{line}行: {error}",
        "⚠️ Tape {path}: {count} lines cannot be read - line {line}: {error}",
    ),
    "tape_ended": ("feed", "📼 行情录像{path}已播放完毕", "📼 Tape {path} has ended"),
    "exchange_connected": (
        "feed",
        "✅ {exchange}行情已连接 - 订阅{symbols}个交易对",
        "✅ Connected to {exchange} - subscribed to {symbols} symbols",
    ),
    "exchange_lost": (
        "feed",
        "⚠️ {exchange}行情连接中断: {error} - {delay}秒后重连",
        "⚠️ The connection to {exchange} was lost: {error} - next try in {delay} s",
    ),
    "exchange_refused": (
        "feed",
        "⚠️ {exchange}拒绝订阅{symbol}: {error}",
        "⚠️ {exchange} refused to subscribe {symbol}: {error}",
    ),
    "exchange_bad_frames": (
        "feed",
        "⚠️ {exchange}有{count}条消息无法解析: {error}",
        "⚠️ {count} messages of {exchange} cannot be read: {error}",
    ),
    "paper_read_only": (
        "paper",
        "⚠️ 模拟交易所{path}已由另一进程运行，本进程只读",
        "⚠️ Another process trades on {path}, this one only reads",
    ),
    "paper_failed": (
        "paper",
        "❌ 模拟交易所出错: {error}",
        "❌ The paper exchange failed: {error}",
    ),
    "internal_error": (
        "connection",
        "❌ 连接处理出错 - 来自: {address}: {error}",
        "❌ Error while handling a connection - from: {address}: {error}",
    ),
    "registry_died": (
        "registry",
        "❌ 订阅登记任务意外终止: {error}",
        "❌ The registry task died: {error}",
    ),
    "origin_refused": (
        "link",
        "⚠️ 拒绝来源: {origin} - 来自: {address}",
        "⚠️ Origin refused: {origin} - from: {address}",
    ),
    "connection_stopped_by_firewall": (
        "link",
        "⚠️ 已拦截异常连接 - 来自: {address}: {error}",
        "⚠️ Stopped a faulty connection - from: {address}: {error}",
    ),
    "authentication_unavailable": (
        "connection",
        "⚠️ 暂时无法验证令牌: {error}",
        "⚠️ Tokens cannot be checked for now: {error}",
    ),
    "ticker_unusable": (
        "feed",
        "❌ {symbol}行情无法编码: {error}",
        "❌ The {symbol} ticker cannot be encoded: {error}",
    ),
    "service_failed": (
        "service",
        "❌ 服务意外终止: {error}",
        "❌ The service died: {error}",
    ),
    "plain_form": (
        "link",
        "⚠️ 未使用Hypercorn加固连接，以普通ASGI方式运行: {reason}",
        "⚠️ Not on the guarded Hypercorn, running in plain ASGI form: {reason}",
    ),
    "shutting_down": (
        "service",
        "🔌 服务正在关闭 - 通知{connections}个连接",
        "🔌 Shutting down - notifying {connections} connections",
    ),
    "lines_dropped": (
        "logs",
        "⚠️ 日志输出过慢，已丢弃{dropped}行",
        "⚠️ The log's reader is too slow, {dropped} lines dropped",
    ),
}

# How a close code reads: the few that the catalogue names, then the names of the wire protocol.
_MEANINGS: Final[dict[int, tuple[str, str]]] = {
    CloseCode.NORMAL: ("正常关闭", "normal closure"),
    CloseCode.NO_STATUS: ("正常关闭", "normal closure"),
    CloseCode.GOING_AWAY: ("客户端离开页面", "client left the page"),
    CloseCode.ABNORMAL: ("异常断开", "abnormal closure"),
}
_RESTART: Final = ("服务重启", "service restart")
_OTHER: Final = ("其他", "other")
_NAMES: Final[dict[int, str]] = {
    CloseCode.PROTOCOL_ERROR: "broken framing",
    CloseCode.UNSUPPORTED_DATA: "binary message",
    CloseCode.INVALID_DATA: "bad UTF-8",
    CloseCode.TOO_BIG: "message over the limit",
    CloseCode.INTERNAL_ERROR: "our own error",
    CloseCode.SERVICE_RESTART: "server restarting",
    CloseCode.TOO_SLOW: "too slow",
    CloseCode.HEARTBEAT_TIMEOUT: "nothing heard within the heartbeat timeout",
    CloseCode.TOKEN_EXPIRED: "token expired and not renewed, or not valid yet",
    CloseCode.BAD_TOKEN: "bad token",
    CloseCode.TOO_MANY_BAD_REQUESTS: "too many bad requests",
    CloseCode.AUTHENTICATION_TIMEOUT: "not authenticated in time",
    CloseCode.KICKED: "kicked by an administrator",
    CloseCode.CONNECTION_LIMIT: "over a connection limit",
    CloseCode.REPLACED: "replaced by the user's newer connection",
}
_QUIET: Final = frozenset({CloseCode.NORMAL, CloseCode.NO_STATUS, CloseCode.GOING_AWAY})

_language = 0  # index into a catalogue entry's texts: 0 Chinese, 1 English


class Line(NamedTuple):
    """One line of the catalogue with its values, not yet in any language."""

    event: str
    fields: dict[str, Any]
    exception: BaseException | None = None


def set_language(lang: str) -> None:
    """Print the lines of the whole process in `zh` or `en`."""
    global _language
    _language = ("zh", "en").index(lang)


def escape(text: str, limit: int = FIELD_LENGTH) -> str:
    """`text` made safe for one line: nothing in it can end, hide or reorder the line.

    Characters of the Unicode categories Cc, Cf, Cs, Zl and Zp, and the quote that surrounds a
    value, appear as `\\xNN`, `\\uNNNN` or `\\'`; the result is cut at `limit` characters.
    """
    if text.isascii() and text.isprintable() and "'" not in text:
        return text[:limit]
    return "".join(map(_escape_character, text[:limit]))[:limit]


def _escape_character(character: str) -> str:
    if character == "'":
        return "\\'"
    if unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Zl", "Zp"):
        return character
    code = ord(character)
    return (
        f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 65536 else f"\\U{code:08x}"
    )


def _one_line(text: str, limit: int) -> str:
    # As `escape`, for what no quote surrounds.
    return escape(text, limit).replace("\\'", "'")


def line(event: str, **fields: Any) -> Line:
    """A line of the catalogue; a number prints at its shortest, the text of all else is escaped."""
    for name, value in fields.items():
        if isinstance(value, BaseException):
            fields[name] = failure(value)
        elif isinstance(value, float):
            fields[name] = float(f"{value:g}") if value % 1 else int(value)
        elif not isinstance(value, int):
            limit = ERROR_LENGTH if name in ("error", "path") else FIELD_LENGTH
            fields[name] = escape(_text_of(value), limit)
    return Line(event, fields)


def innermost(error: BaseException) -> BaseException:
    """The exception that nurseries have wrapped; a group where there are several."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


def failure(error: BaseException) -> str:
    """An exception in one escaped line: its kind (unless it is ours) and its text's first line."""
    kind = type(error).__name__
    text = _without_tokens(_text_of(error).strip().split("\n", 1)[0], ERROR_LENGTH)
    if not text:
        text = kind
    elif not isinstance(error, TradingPushError):
        text = f"{kind}: {text}"
    return escape(text, ERROR_LENGTH)


def _text_of(value: object) -> str:
    try:
        return str(value)
    except Exception:  # a foreign object's __str__ must not end whoever reports it
        return ""


_TOKEN: Final = re.compile(r"eyJ[\w-]+\.[\w-]+\.[\w-]*")


def _without_tokens(text: str, limit: int) -> str:
    # An application's `authenticate` may raise with the token in its text: whoever reads the log
    # could use it. Of one that the cut goes through, the signature is missing.
    return _TOKEN.sub("(token)", text[:limit])


def _told(text: str) -> str:
    return _one_line(_without_tokens(text, TRACE_LENGTH), TRACE_LENGTH)


_CAUSE: Final = "The above exception was the direct cause of the following exception:"
_CONTEXT: Final = "During handling of the above exception, another exception occurred:"
_EXCEPTIONS: Final = 50


def _trace(error: BaseException, told: set[int]) -> Iterator[str]:
    """The lines of a stack trace, as Python prints it, for at most so many exceptions.

    What an exception says may be a peer's text: it is one line, escaped and cut, for a line feed in
    it could begin a line that reads like one of the catalogue.
    """
    told.add(id(error))
    earlier, why = error.__cause__, _CAUSE
    if earlier is None and not error.__suppress_context__:
        earlier, why = error.__context__, _CONTEXT
    if earlier is not None and id(earlier) not in told and len(told) < _EXCEPTIONS:
        yield from _trace(earlier, told)
        yield from ("", why, "")
    yield "Traceback (most recent call last):"
    for frame in traceback.format_tb(error.__traceback__):
        for text in frame.splitlines():
            yield _one_line(text, TRACE_LENGTH)
    kind = type(error)
    name = f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")
    said = _text_of(error)
    yield _told(f"{name}: {said}" if said else name)
    notes = getattr(error, "__notes__", ())
    for note in notes if isinstance(notes, list) else ():
        yield _told(f"note: {_text_of(note)}")
    if isinstance(error, BaseExceptionGroup):
        for each in error.exceptions:
            if id(each) not in told and len(told) < _EXCEPTIONS:
                yield from (f"  | {text}" for text in _trace(each, told))


def close_line(code: int, reason: str, *, ours: bool) -> Line:
    """The line that says with which code a connection was closed; `ours`: we closed it."""
    if code == CloseCode.SERVICE_RESTART and ours:
        event, meaning = "closed", _RESTART[_language]
    elif code in _MEANINGS:
        event = "closed" if code in _QUIET else "closed_oddly"
        meaning = _MEANINGS[code][_language]
    else:
        event, meaning = "closed_oddly", _NAMES.get(code, _OTHER[_language])
    return line(event, code=code, reason=reason, meaning=meaning)


_LEVELS: Final = {
    event: (
        logging.WARNING
        if texts[1].startswith("⚠️")
        else logging.ERROR
        if texts[1].startswith("❌")
        else logging.INFO
    )
    for event, texts in CATALOGUE.items()
}
_LOGGERS: Final = {
    event: logging.getLogger(f"trading_push.{texts[0]}") for event, texts in CATALOGUE.items()
}


def enabled(event: str) -> bool:
    """Whether anybody would see a line of this event; for lines on hot paths."""
    return _LOGGERS[event].isEnabledFor(_LEVELS[event])


def emit(*lines: Line) -> None:
    """Log some lines, with no other record of the package between them; never raises."""
    texts = _texts(lines)
    if texts is not None:
        for output in _outputs if texts else ():
            output.say(texts)
    elif len(lines) == 1:
        _emit(lines[0])
    else:
        with _unbroken(_LOGGERS[lines[0].event]):
            for each in lines:
                _emit(each)


def emit_pushed(pushed: Sequence[tuple[str, str]]) -> None:
    """Log the push of each (data type, user): of all lines, by far the most."""
    if _alone(_LOGGERS["pushed"]):
        # A data type is a channel's name, in which there is nothing to escape.
        text = CATALOGUE["pushed"][1 + _language].format(data_type="%s", user="%s")
        texts = [text % (data_type, escape(user)) for data_type, user in pushed]
        for output in _outputs:
            output.say(texts)
    else:
        emit(*(line("pushed", data_type=data_type, user=user) for data_type, user in pushed))


def _texts(lines: Sequence[Line]) -> list[str] | None:
    """The text of each line; None where it takes records to log them.

    With a record, and the ways of logging, a line costs three times as much.
    """
    texts: list[str] = []
    last: logging.Logger | None = None
    for event, fields, exception in lines:
        logger = _LOGGERS[event]
        if exception is not None or (logger is not last and not _alone(logger)):
            return None
        last = logger
        if logger.isEnabledFor(_LEVELS[event]):
            texts.append(CATALOGUE[event][1 + _language].format_map(fields))
    return texts


def _emit(each: Line) -> None:
    event, fields, exception = each
    logger, level = _LOGGERS[event], _LEVELS[event]
    if logger.disabled and any(isinstance(handler, _Output) for handler in _PACKAGE.handlers):
        # By `logging.config`, which an application's module calls on import: it disables every
        # logger that it does not name. The lines of a program are not the module's to end.
        logger.disabled = False
    if not logger.isEnabledFor(level):
        return
    text = CATALOGUE[event][1 + _language].format_map(fields)
    info = None if exception is None else (type(exception), exception, exception.__traceback__)
    # A factory, filter or handler of the application may raise, also where the registry speaks: a
    # line is no reason to end the service.
    with suppress(Exception):
        record = logging.getLogRecordFactory()(logger.name, level, "", 0, text, None, info)
        record.event = event
        record.fields = fields
        if exception is not None:  # whoever formats it takes this for the trace
            record.exc_text = "\n".join(_trace(exception, set()))
        logger.handle(record)


_PACKAGE: Final = logging.getLogger("trading_push")
_outputs: list[_Output] = []
"""Those of `attached`, where all of them write the bare text of a line."""


def _alone(logger: logging.Logger) -> bool:
    # Nobody else has put a handler, a filter or a record of their own in the way.
    return (
        bool(_outputs)
        and logger.parent is _PACKAGE
        and not (logger.handlers or logger.filters or logger.disabled or _PACKAGE.propagate)
        and _PACKAGE.handlers == _outputs
        and not any(output.filters or output.level for output in _outputs)
        and logging.getLogRecordFactory() is logging.LogRecord
    )


@contextmanager
def _unbroken(logger: logging.Logger | None) -> Iterator[None]:
    # A record reaches its handlers one by one, each under the handler's own (re-entrant) lock:
    # whoever holds those locks is alone until done, and other threads' records wait their turn.
    held = []
    try:
        while logger is not None:
            for handler in logger.handlers:
                if handler.lock is not None:
                    handler.lock.acquire()
                    held.append(handler.lock)
            logger = logger.parent if logger.propagate else None
        yield
    finally:
        for lock in reversed(held):
            lock.release()


class SafeFormatter(logging.Formatter):
    """A formatter of one line for each record, and below it the stack trace: see `_trace`."""

    def format(self, record: logging.LogRecord) -> str:
        """The record; its trace is not the one that another handler's formatter has left in it."""
        if record.exc_info:
            record.exc_text = None
        return super().format(record)

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The record's line; also of another library's text, it is one."""
        return _one_line(super().formatMessage(record), TRACE_LENGTH)

    def formatException(self, ei: Any) -> str:
        """The trace."""
        return "" if ei[1] is None else "\n".join(_trace(ei[1], set()))


class JsonFormatter(SafeFormatter):
    """One JSON object a line: `at` (ms), `level`, `logger`, `event`, `message`, `fields`."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as JSON; a stack trace stands in `trace`."""
        entry = {
            "at": int(record.created * 1000),
            "level": record.levelname,
            "logger": record.name,
            "event": getattr(record, "event", None),
            "message": _one_line(record.getMessage(), TRACE_LENGTH),
            "fields": getattr(record, "fields", {}),
        }
        if record.exc_info:
            entry["trace"] = self.formatException(record.exc_info)
        return msgspec.json.encode(entry, enc_hook=str).decode()


_AT_A_TIME = 500
# Woken for each line of a burst, the thread would take the interpreter from whoever serves.
_PAUSE_S = 0.01
_LAST_LINES_S = 2
# Thousands who leave at the end are told of by tens of thousands of lines.
_PROGRESS_S = 0.5
_LONGER_S = 6
_STDERR: Final = 2


class _Output(logging.Handler):
    """A descriptor that lines are written to by a thread, so that a full pipe blocks nobody.

    Lines wait as text: as records they would be food for the garbage collector. What finds no place
    is counted and said in a line. No file object stands between: at the end of the process it would
    wait for the lock of a write that is stuck.
    """

    def __init__(self, descriptor: int, formatter: logging.Formatter, lines: int) -> None:
        super().__init__()
        self.setFormatter(formatter)
        self._descriptor = descriptor
        self._bound = lines
        self._dropped = 0
        self._queued = self._taken = 0
        self._written = 0
        # Without a bound of its own and without a condition to signal: a line costs a third.
        self._units: queue.SimpleQueue[list[str] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def say(self, lines: list[str]) -> None:
        """Queue bare lines, with no other between them."""
        assert self.lock is not None
        with self.lock:
            self._queue(lines)

    def emit(self, record: logging.LogRecord) -> None:
        self._queue([self._text(record)])

    def _queue(self, unit: list[str]) -> None:
        # One thread counts what is queued, the other what it has taken: no lock is needed for that.
        if self._queued - self._taken + bool(self._dropped) >= self._bound:
            self._dropped += len(unit)
            return
        if self._dropped:
            unit = [self._text(self._gap()), *unit]
            self._dropped = 0
        self._queued += len(unit)
        self._units.put(unit)

    def _text(self, record: logging.LogRecord) -> str:
        try:
            return self.format(record)
        except Exception:  # of a foreign record; its own is no reason to fail
            record = logging.LogRecord(
                record.name, record.levelno, "", 0, f"cannot be formatted: {record.name}", (), None
            )
            return self.format(record)

    def _gap(self) -> logging.LogRecord:
        text = CATALOGUE["lines_dropped"][1 + _language].format(dropped=self._dropped)
        record = logging.LogRecord("trading_push.logs", logging.WARNING, "", 0, text, (), None)
        record.event = "lines_dropped"
        record.fields = {"dropped": self._dropped}
        return record

    def end(self, timeout_s: float) -> None:
        """Write what is queued and close the file.

        The thread is given up if it takes longer; a while later where somebody still reads.
        """
        self._units.put(None)
        given_up_at = time.monotonic() + timeout_s + _LONGER_S
        while self._thread.is_alive() and time.monotonic() < given_up_at:
            written = self._written
            self._thread.join(timeout_s)
            if self._written == written:
                break
            timeout_s = _PROGRESS_S
        if self._descriptor != _STDERR and not self._thread.is_alive():
            os.close(self._descriptor)

    def _run(self) -> None:
        last = False
        while not last:
            units = [self._units.get()]
            while len(units) < _AT_A_TIME and not self._units.empty():
                units.append(self._units.get())
            last = units[-1] is None
            self._taken += sum(len(unit) for unit in units if unit is not None)
            for chunk in _chunks(unit for unit in units if unit is not None):
                self._write(chunk)
            if not last:
                time.sleep(_PAUSE_S)

    def _write(self, chunk: bytes) -> None:
        data = memoryview(chunk)
        while data:
            try:
                data = data[os.write(self._descriptor, data) :]
                self._written += 1
            except BlockingIOError:  # somebody has made the terminal non-blocking
                select.select([], [self._descriptor], [])
            except OSError:
                return  # whoever read has gone, or the disk is full


def _chunks(units: Iterable[list[str]]) -> Iterator[bytes]:
    """Whole units, or of a long one whole lines, no more than a pipe takes in one piece.

    Workers share a pipe: what is longer, the kernel may mix with what another one writes.
    """
    chunk = b""
    for unit in units:
        whole = "".join([f"{line}\n" for line in unit]).encode("utf-8", "backslashreplace")
        if chunk and len(chunk) + len(whole) > select.PIPE_BUF:
            yield chunk
            chunk = b""
        chunk += whole
        while len(chunk) > select.PIPE_BUF:
            end = chunk.rfind(b"\n", 0, select.PIPE_BUF) + 1 or chunk.index(b"\n") + 1
            yield chunk[:end]
            chunk = chunk[end:]
    if chunk:
        yield chunk


@contextmanager
def attached(
    *,
    lang: str = "zh",
    json: bool = False,
    file: Path | None = None,
    queue_lines: int = 100_000,
) -> Iterator[None]:
    """Print the lines to standard error, and to `file` as well, while the context is open.

    Writing is done by threads behind bounded queues, so that a full pipe that nobody reads never
    stops the service. Leaving waits at most two seconds for what is still queued.

    Raises:
        ConfigurationError: The file cannot be opened.
    """
    set_language(lang)
    plain = JsonFormatter() if json else SafeFormatter("%(message)s")
    places: list[tuple[int, logging.Formatter]] = [(_STDERR, plain)]
    if file is not None:
        try:
            descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise ConfigurationError(
                f"the log file {file} cannot be opened ({error.strerror}): give another"
            ) from None
        stamped = SafeFormatter("%(asctime)s - %(name)s - %(levelname)s - %(message)s")
        places.append((descriptor, plain if json else stamped))
    outputs = [_Output(descriptor, formatter, queue_lines) for descriptor, formatter in places]
    loggers = [logging.getLogger("trading_push"), logging.getLogger("hypercorn.error")]
    kept = [(logger, logger.level, logger.propagate) for logger in loggers]
    for logger, level in zip(loggers, (logging.INFO, logging.WARNING), strict=True):
        for output in outputs:
            logger.addHandler(output)
        logger.propagate = False
        logger.disabled = False
        logger.setLevel(level)
    if file is None and not json:
        _outputs[:] = outputs
    try:
        yield
    finally:
        _outputs.clear()
        for logger, old_level, propagate in kept:
            for output in outputs:
                logger.removeHandler(output)
            logger.setLevel(old_level)
            logger.propagate = propagate
        deadline = time.monotonic() + _LAST_LINES_S
        for output in reversed(outputs):  # the file first: standard error may be a full pipe
            output.end(max(0, deadline - time.monotonic()))
