"""All that a translator opens: the text of every log line, and what the close codes mean."""

from __future__ import annotations

import os
from typing import Final

from trading_push.errors import CloseCode

__all__ = [
    "CATALOGUE",
    "CODE_NAMES",
    "LANGUAGES",
    "MEANINGS",
    "OTHER_MEANING",
    "RESTART_MEANING",
    "default_language",
    "language",
    "set_language",
    "template",
]

LANGUAGES: Final = ("zh", "en")

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
    "fetch_failed_for_many": (
        "poller",
        "❌ 获取{count}个用户（{users}）的{data_type}数据失败: {error}",
        "❌ Fetching {data_type} of {count} users ({users}) failed: {error}",
    ),
    "fetch_failed_for_many_again": (
        "poller",
        "❌ 获取{count}个用户（{users}）的{data_type}数据失败: {error}（另有{suppressed}次）",
        "❌ Fetching {data_type} of {count} users ({users}) failed: {error} "
        "({suppressed} more times)",
    ),
    "fetch_recovered": (
        "poller",
        "✅ 用户{user}的{data_type}数据已恢复",
        "✅ The {data_type} of user {user} has recovered",
    ),
    "fetch_recovered_for_many": (
        "poller",
        "✅ {count}个用户（{users}）的{data_type}数据已恢复",
        "✅ The {data_type} of {count} users ({users}) has recovered",
    ),
    "fetches_hung": (
        "poller",
        "⚠️ {count}次{data_type}数据获取超时后仍未结束（最多替换{limit}次）",
        "⚠️ {count} fetches of {data_type} go on after their time-out (up to {limit} are replaced)",
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
    "users_unverified": (
        "source",
        "⚠️ {data_types}的查询结果没有user_id列，无法核对数据属于哪个用户",
        "⚠️ The queries of {data_types} give no column user_id: whose rows they are is not verified",
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
    "exchange_replaced": (
        "feed",
        "🔄 {exchange}行情更换连接: {error}",
        "🔄 Another connection to {exchange} takes over: {error}",
    ),
    "exchange_unknown": (
        "feed",
        "⚠️ {exchange}没有已订阅的{count}个交易对: {symbols}",
        "⚠️ {exchange} does not have {count} symbols that were subscribed: {symbols}",
    ),
    "exchange_list_failed": (
        "feed",
        "⚠️ 无法读取{exchange}的交易对列表: {error} - {delay}秒后重试",
        "⚠️ The list of symbols of {exchange} cannot be read: {error} - next try in {delay} s",
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
    "origin_unlisted": (
        "link",
        '⚠️ 拒绝来源: {origin} - 来自: {address} - 如需允许，请设置 server.origins = "{origin}"',
        "⚠️ Origin refused: {origin} - from: {address} - to allow it, "
        'set server.origins = "{origin}"',
    ),
    "origin_missing": (
        "link",
        "⚠️ 拒绝无来源的请求 - 来自: {address} - 如需允许，请设置 server.origin_required = false",
        "⚠️ A request without Origin refused - from: {address} - to allow it, "
        "set server.origin_required = false",
    ),
    "session_refused": (
        "link",
        "⚠️ 未采用Cookie会话: 请求没有唯一且受信的Origin - 来自: {address}",
        "⚠️ A session is not used: its request has no single Origin of this site - from: {address}",
    ),
    "token_refused": (
        "link",
        "⚠️ 拒绝令牌: {error} - 来自: {address}",
        "⚠️ Token refused: {error} - from: {address}",
    ),
    "token_in_url": (
        "link",
        "⚠️ 不读取URL中的令牌（?token=），请使用Authorization: Bearer或auth请求 - 来自: {address}",
        "⚠️ A token in the URL (?token=) is not read: send Authorization: Bearer, or the request "
        "auth - from: {address}",
    ),
    "path_unserved": (
        "link",
        "⚠️ 请求的路径不存在: {requested} - 来自: {address}",
        "⚠️ Nothing is served at {requested} - from: {address}",
    ),
    "kicked": (
        "service",
        "👮 {user}断开了{count}个连接（{whom}）: {reason}",
        "👮 {user} has closed {count} connections ({whom}): {reason}",
    ),
    "revoked": (
        "service",
        "👮 {user}吊销了令牌{whom}，断开{count}个连接",
        "👮 {user} has revoked the token {whom}, which closed {count} connections",
    ),
    "several_processes": (
        "link",
        "⚠️ 共{count}个进程且无消息代理: POST /publish 被拒绝（501），"
        "因为只有一个进程的客户端能收到",
        "⚠️ {count} processes and no broker: POST /publish is refused (501), because only the "
        "clients of one process would get it",
    ),
    "settings_reloaded": (
        "service",
        "🔄 配置已重新加载",
        "🔄 The settings were loaded anew",
    ),
    "settings_need_restart": (
        "service",
        "⚠️ 以下配置需重启后生效: {settings}",
        "⚠️ These settings have changed and need a restart: {settings}",
    ),
    "reload_failed": (
        "service",
        "❌ 配置未重新加载，一切照旧: {error}",
        "❌ The settings were not loaded anew, and all is as before: {error}",
    ),
    "descriptors_too_few": (
        "link",
        "⚠️ 文件描述符上限{descriptors}不足以容纳limits.connections = {wanted}，"
        "实际最多{fitting}个连接：请提高 ulimit -n（systemd: LimitNOFILE=）",
        "⚠️ {descriptors} descriptors are too few for limits.connections = {wanted}: at most "
        "{fitting} connections; raise `ulimit -n` (systemd: LimitNOFILE=)",
    ),
    "descriptors_exhausted": (
        "link",
        "⚠️ 文件描述符已用尽，新连接以503拒绝（此前另有{count}次）",
        "⚠️ No descriptor is left: new connections are answered 503 ({count} more before)",
    ),
    "connection_stopped_by_firewall": (
        "link",
        "⚠️ 已拦截异常连接 - 来自: {address}: {error}",
        "⚠️ Stopped a faulty connection - from: {address}: {error}",
    ),
    "strangers_suppressed": (
        "link",
        "⚠️ 另有{count}条外部请求引起的日志未显示",
        "⚠️ {count} more lines that requests from outside caused are not shown",
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
    "commit_unpublished": (
        "client",
        "⚠️ 提交后发布{count}个数据失败: {error}",
        "⚠️ Publishing {count} values after a commit failed: {error}",
    ),
}
"""By event: the logger below `trading_push`, the Chinese text, the English text.

A text that begins with ⚠️ is a WARNING, with ❌ an ERROR, any other INFO. Both texts begin with the
same mark and use the same fields.
"""

MEANINGS: Final[dict[int, tuple[str, str]]] = {
    CloseCode.NORMAL: ("正常关闭", "normal closure"),
    CloseCode.NO_STATUS: ("正常关闭", "normal closure"),
    CloseCode.GOING_AWAY: ("客户端离开页面", "client left the page"),
    CloseCode.ABNORMAL: ("异常断开", "abnormal closure"),
}
"""What the close codes mean that a peer sends in the normal course of things: Chinese, English."""
RESTART_MEANING: Final = ("服务重启", "service restart")
"""What 1012 means where this server closed the connection."""
OTHER_MEANING: Final = ("其他", "other")
"""What a code means that has no name."""
CODE_NAMES: Final[dict[int, str]] = {
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
"""What the other codes mean, by their names in the wire protocol, in both languages."""

_language = 0  # an index into LANGUAGES, of the whole process
_is_chosen = False  # whether the program has chosen it

# The texts in the language that is set: one look-up for each line.
_templates = {event: texts[1] for event, texts in CATALOGUE.items()}

template: Final = _templates.__getitem__
"""The text of an event in the language that is set, with its fields in braces."""


def set_language(lang: str) -> None:
    """Print the lines of the whole process in `zh`, `en`, or as the locale is (`auto`)."""
    global _is_chosen
    _is_chosen = True
    _use(lang)


def default_language(lang: str) -> None:
    """Print the lines in a language, unless the program has chosen one by `set_language`."""
    if not _is_chosen:
        _use(lang)


def _use(lang: str) -> None:
    global _language
    if lang == "auto":
        # The first that is set is the locale of messages.
        names = ("LC_ALL", "LC_MESSAGES", "LANG")
        locale = next((value for name in names if (value := os.environ.get(name))), "")
        lang = "zh" if locale.lower().startswith("zh") else "en"
    _language = LANGUAGES.index(lang)
    _templates.update((event, texts[1 + _language]) for event, texts in CATALOGUE.items())


def language() -> int:
    """The index in LANGUAGES of the language that is set."""
    return _language
