"""The log lines, byte for byte, of a real server with real clients."""

from __future__ import annotations

import asyncio
import json
import re

import pytest

from harness.support import SIX, client, serving, token

START = """\
🚀 启动交易数据WebSocket推送服务
🔄 启动balance数据推送线程 - 推送间隔: 10秒
🔄 启动positions数据推送线程 - 推送间隔: 5秒
🔄 启动pnl数据推送线程 - 推送间隔: 0.2秒
🔄 启动orders数据推送线程 - 推送间隔: 15秒""".splitlines()

LEAVE = """\
🔌 连接关闭: code=1000 reason='done' (正常关闭)
🔌 WebSocket客户端断开连接 - 来自: 127.0.0.1
👤 用户4退出所有房间
   🚪 退出房间: balance_4
   🚪 退出房间: positions_4
   🚪 退出房间: pnl_4
   🚪 退出房间: orders_4
📋 用户4取消订阅balance数据 - 剩余订阅者: 0
📋 用户4取消订阅positions数据 - 剩余订阅者: 0
📋 用户4取消订阅pnl数据 - 剩余订阅者: 0
📋 用户4取消订阅orders数据 - 剩余订阅者: 0
   🚪 退出行情房间: ticker_BTCUSDT_4
   🚪 退出行情房间: ticker_ETHUSDT_4
📊 用户4取消订阅BTCUSDT行情 - 剩余订阅者: 0
   BTCUSDT无订阅者，移除
📊 用户4取消订阅ETHUSDT行情 - 剩余订阅者: 0
   ETHUSDT无订阅者，移除
✅ 用户4已退出所有房间并清理订阅
用户4断开连接并清理所有订阅
🔌 当前连接数: 0
👤 当前在线用户数: 0""".splitlines()

UNAUTHENTICATED = """\
🔌 连接关闭: code=1001 reason='' (客户端离开页面)
🔌 WebSocket客户端断开连接 - 来自: 127.0.0.1
⚠️ 未认证用户断开连接
🔌 当前连接数: 0
👤 当前在线用户数: 0""".splitlines()


def subscribed(*channels: str) -> list[str]:
    lines = []
    for channel in channels:
        symbol = channel.removeprefix("ticker.")
        lines.append(
            f"📋 用户4订阅{channel}数据" if symbol == channel else f"📊 用户4订阅{symbol}行情"
        )
        lines.append("   当前订阅者: 1")
    return lines


def contains(lines: list[str], block: list[str]) -> bool:
    return any(lines[i : i + len(block)] == block for i in range(len(lines)))


def test_a_users_whole_visit(tmp_path):
    async def visit(url: str) -> None:
        async with client(url, 4) as user:
            await user.subscribe(*SIX)
            await user.until_snapshots(SIX)
            assert (await user.request("unsubscribe", args=["pnl", "ticker.ETHUSDT"]))["ok"]
            await user.subscribe("ticker.ETHUSDT", "pnl_4")
            await user.socket.close(1000, "done")

    with serving(tmp_path, "--interval", "pnl=0.2") as server:
        asyncio.run(visit(server.url))
        server.wait_for_line("当前在线用户数: 0")
        lines = list(server.err)
        assert lines[: len(START)] == START
        assert lines[5:8] == [
            "🔌 WebSocket客户端连接 - 来自: 127.0.0.1",
            "🔌 当前连接数: 1",
            "✅ 用户4认证成功",
        ]
        assert contains(lines, subscribed(*SIX))
        assert contains(
            lines,
            [
                "   🚪 退出房间: pnl_4",
                "📋 用户4取消订阅pnl数据 - 剩余订阅者: 0",
                "   🚪 退出行情房间: ticker_ETHUSDT_4",
                "📊 用户4取消订阅ETHUSDT行情 - 剩余订阅者: 0",
                "   ETHUSDT无订阅者，移除",
            ],
        )
        assert contains(lines, subscribed("ticker.ETHUSDT", "pnl"))
        assert "📤 推送balance数据给用户4" in lines
        assert not any("推送ticker" in line or "推送BTC" in line for line in lines)
        assert lines[-len(LEAVE) :] == LEAVE
        assert server.stop() == 0


def test_fifty_one_users_leaving_at_once_do_not_mix(tmp_path):
    users = [*range(100, 150), 4]

    async def leave_together(url: str) -> None:
        everybody_in = asyncio.Barrier(len(users))

        async def visit(user: int) -> None:
            async with client(url, user) as each:
                await each.subscribe(*SIX)
                await each.until_snapshots(SIX)
                await everybody_in.wait()
                await each.socket.close(1000, "done")

        await asyncio.gather(*map(visit, users))

    with serving(tmp_path, "--interval", "pnl=0.2", "--interval", "positions=0.1") as server:
        asyncio.run(leave_together(server.url))
        server.wait_for_line("当前在线用户数: 0")
        lines = list(server.err)

    # Only the numbers differ from one user's block to the other's; who is last has the zeros.
    gone: set[int] = set()
    starts = [i for i, line in enumerate(lines) if line.startswith("🔌 连接关闭")]
    assert len(starts) == len(users)
    for start in starts:
        unit = lines[start : start + 2]
        user = int(re.fullmatch(r"👤 用户(\d+)退出所有房间", lines[start + 2])[1])
        gone.add(user)
        left = len(users) - len(gone)
        expected = [
            re.sub(
                r"(?<=用户)4(?=\D)|(?<=_)4$",
                str(user),
                re.sub(r"(剩余订阅者|当前连接数|当前在线用户数): 0", rf"\1: {left}", line),
            )
            for line in LEAVE
            if left == 0 or "无订阅者" not in line
        ]
        unit = lines[start : start + len(expected)]
        assert unit == expected
    assert gone == set(users)


def test_a_second_connection_of_a_user_keeps_the_user_counted(tmp_path):
    async def visit(url: str) -> None:
        async with client(url, 4) as tab:
            await tab.subscribe("balance", "ticker.BTCUSDT")
            async with client(url, 4) as other:
                await other.subscribe("ticker.BTCUSDT", "balance")
                await other.socket.close(1000, "done")
            await asyncio.get_running_loop().run_in_executor(
                None, server.wait_for_line, "当前在线用户数: 1"
            )

    with serving(tmp_path) as server:
        asyncio.run(visit(server.url))
        server.wait_for_line("当前在线用户数: 0")
        first = server.err.index("🔌 连接关闭: code=1000 reason='done' (正常关闭)")
        assert server.err[first + 2 : first + 11] == [
            "👤 用户4退出所有房间",
            "   🚪 退出房间: balance_4",
            "📋 用户4取消订阅balance数据 - 剩余订阅者: 1",
            "   🚪 退出行情房间: ticker_BTCUSDT_4",
            "📊 用户4取消订阅BTCUSDT行情 - 剩余订阅者: 1",
            "✅ 用户4已退出所有房间并清理订阅",
            "用户4断开连接并清理所有订阅",
            "🔌 当前连接数: 1",
            "👤 当前在线用户数: 1",
        ]


def test_a_disconnect_before_authentication(tmp_path):
    async def visit(url: str) -> None:
        async with client(url) as nobody:
            await nobody.socket.close(1001)

    with serving(tmp_path) as server:
        asyncio.run(visit(server.url))
        server.wait_for_line("当前在线用户数: 0")
        assert server.err[-len(UNAUTHENTICATED) :] == UNAUTHENTICATED


ENGLISH = """\
🚀 Starting the trading data WebSocket push service
🔄 Starting the balance push loop - interval: 10 s
🔄 Starting the positions push loop - interval: 5 s
🔄 Starting the pnl push loop - interval: 5 s
🔄 Starting the orders push loop - interval: 15 s
🔌 WebSocket client connected - from: 127.0.0.1
🔌 Connections: 1
✅ User 4 authenticated
📋 User 4 subscribed to orders data
   Subscribers: 1
📊 User 4 subscribed to the BTCUSDT ticker
   Subscribers: 1
📤 Pushed orders to user 4
🔌 Connection closed: code=1000 reason='' (normal closure)
🔌 WebSocket client disconnected - from: 127.0.0.1
👤 User 4 leaves every room
   🚪 Left room: orders_4
📋 User 4 unsubscribed from orders data - subscribers left: 0
   🚪 Left ticker room: ticker_BTCUSDT_4
📊 User 4 unsubscribed from the BTCUSDT ticker - subscribers left: 0
   BTCUSDT has no subscribers, removed
✅ User 4 has left every room, subscriptions cleaned up
User 4 disconnected, every subscription cleaned up
🔌 Connections: 0
👤 Users online: 0""".splitlines()


async def english_visit(url: str) -> None:
    async with client(url, 4) as user:
        await user.subscribe("orders", "ticker.BTCUSDT")
        await user.until_snapshots(["orders"])
        await user.socket.close(1000)


def test_the_english_catalogue(tmp_path):
    with serving(tmp_path, "--lang", "en") as server:
        asyncio.run(english_visit(server.url))
        server.wait_for_line("Users online: 0")
        assert server.err == ENGLISH


def test_json_lines_carry_the_event_and_its_fields(tmp_path):
    file = tmp_path / "log"
    flags = ("--lang", "en", "--log-format", "json", "--log-file", str(file))
    with serving(tmp_path, *flags) as server:
        asyncio.run(english_visit(server.url))
        server.wait_for_line("Users online: 0")
        entries = [json.loads(line) for line in server.err]
        server.stop()
    assert [entry["message"] for entry in entries] == ENGLISH
    assert entries[5]["event"] == "connected"
    assert entries[5]["fields"] == {"address": "127.0.0.1"}
    assert entries[5]["level"] == "INFO"
    written = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert written == entries


def test_the_file_has_time_name_and_level(tmp_path):
    file = tmp_path / "log"
    with serving(tmp_path, "--log-file", str(file)) as server:
        asyncio.run(english_visit(server.url))
        server.wait_for_line("当前在线用户数: 0")
        server.stop()
    written = file.read_text(encoding="utf-8").splitlines()
    stamp = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} - trading_push\.\w+ - INFO - "
    assert all(re.match(stamp, line) for line in written)
    assert [re.sub(stamp, "", line) for line in written] == server.err


@pytest.mark.parametrize("reason", ["don't", "x\ny", "\u202eevil", "\x1b[2J", "a" * 100], ids=repr)
def test_a_close_reason_cannot_forge_a_line(tmp_path, reason):
    async def visit(url: str) -> None:
        async with client(url) as nobody:
            await nobody.socket.close(4001, reason)

    with serving(tmp_path) as server:
        asyncio.run(visit(server.url))
        server.wait_for_line("当前在线用户数: 0")
        [line] = [line for line in server.err if "连接关闭" in line]
    shown = {
        "don't": r"don\'t",
        "x\ny": r"x\x0ay",
        "\u202eevil": r"\u202eevil",
        "\x1b[2J": r"\x1b[2J",
    }.get(reason, "a" * 64)
    assert line == f"⚠️ 连接关闭: code=4001 reason='{shown}' (too slow)"


def test_tokens_never_appear(tmp_path):
    async def visit(url: str) -> None:
        async with client(url) as user:
            await user.request("auth", token=token(4))
            await user.request("auth", token=token(4) + "x")

    with serving(tmp_path) as server:
        asyncio.run(visit(server.url))
        server.wait_for_line("当前在线用户数: 0")
        assert not any(part in "\n".join(server.err) for part in token(4).split("."))
