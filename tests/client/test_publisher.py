"""A Publisher against the real server, and against one that is scripted to fail."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from decimal import Decimal
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import trio

from harness.readme import block
from harness.support import PATIENCE_S, SECRET, free_port, hypercorn_serving

from trading_push import (
    Channel,
    ConfigurationError,
    PayloadError,
    Publisher,
    PublishError,
    Settings,
    issue_token,
    open_push_service,
)
from trading_push.testing import peer

TOKEN = issue_token(SECRET, "shop", 3600, {"publish": True})
CHANNELS = [Channel("alerts", kind="events"), Channel("news", per_user=False)]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Scripted

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append((self.path, dict(self.headers), json.loads(body)))
        self.server.connections.add(self.client_address)
        answer = self.server.script.pop(0) if self.server.script else 200
        if answer == "hang":
            self.server.ended.wait(PATIENCE_S)
            self.close_connection = True
            return
        if answer == "cut":
            self.close_connection = True
            return
        status, headers, text = answer if isinstance(answer, tuple) else (answer, {}, None)
        if text is None:
            text = '{"ok":true,"published":1}' if status == 200 else ""
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        pass


class Scripted(ThreadingHTTPServer):
    """Answers with what `script` says, in turn: a status, all of an answer, "cut" or "hang"."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script: list[object] = []
        self.asked: list[tuple[str, dict[str, str], list[object]]] = []
        self.connections: set[object] = set()
        self.ended = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def keys(self) -> list[str]:
        return [headers["Idempotency-Key"] for _, headers, _ in self.asked]


@pytest.fixture
def server() -> Iterator[Scripted]:
    with Scripted() as made:
        thread = threading.Thread(target=made.serve_forever)
        thread.start()
        yield made
        made.ended.set()
        made.shutdown()
        thread.join()


@contextmanager
def failing(**expected: object) -> Iterator[pytest.ExceptionInfo[PublishError]]:
    with pytest.raises(PublishError) as caught:
        yield caught
    found = {name: getattr(caught.value, name) for name in expected}
    assert found == expected
    assert TOKEN not in str(caught.value)


async def test_what_is_published_from_threads_arrives():
    settings = Settings(jwt_secret=SECRET)
    async with (
        open_push_service(settings=settings, channels=CHANNELS) as service,
        hypercorn_serving(service) as port,
        peer(service, "4") as four,
    ):
        await four.subscribe("alerts", "news")

        async def values(count: int) -> list[object]:
            found: list[object] = []
            while len(found) < count:
                [push] = await four.next()
                if "data" in push:  # and not a status
                    found.append(push["data"])
            return found

        with Publisher(f"http://127.0.0.1:{port}/", TOKEN, timeout_s=PATIENCE_S) as publisher:
            publish = partial(publisher.publish, "alerts", user=4)
            async with trio.open_nursery() as nursery:
                for number in range(50):
                    nursery.start_soon(trio.to_thread.run_sync, publish, number)
            assert sorted(await values(50)) == list(range(50))
            many = [("news", {"price": Decimal("1E+3")}, None), ("alerts", "last", "4")]
            await trio.to_thread.run_sync(publisher.publish_many, many)
            pushes = await values(2)
            assert {"price": "1000"} in pushes
            assert "last" in pushes
            for _ in range(2):
                again = partial(publish, "once", key="task 7")
                await trio.to_thread.run_sync(again)
            await trio.to_thread.run_sync(publish, "end")
            assert await values(2) == ["once", "end"]

            def refused() -> None:
                with failing(status=400, retryable=False) as error:
                    publisher.publish("nope", 1)
                assert "nope" in str(error.value)

            await trio.to_thread.run_sync(refused)
        assert service.statistics().users_online == 1


def test_publishes_as_printed(server):
    program = block("publisher").replace("http://127.0.0.1:8000", server.url)
    exec(compile(program, "publishing.md", "exec"), {})
    assert server.asked[0][2] == [{"channel": "pnl", "data": {"total": "12.50"}, "user": "4"}]


@pytest.mark.parametrize("first", [429, 500, 502, 503, 504, 408, "cut"])
def test_what_may_pass_is_tried_again_with_the_same_key(server, first):
    server.script = [first, first]
    with Publisher(server.url, TOKEN) as publisher:
        publisher.publish("alerts", 1, 4)
        publisher.publish("alerts", 2, 4)
    keys = server.keys()
    assert keys[0] == keys[1] == keys[2] != keys[3]
    path, headers, body = server.asked[0]
    assert (path, headers["Authorization"]) == ("/publish", f"Bearer {TOKEN}")
    assert body == [{"channel": "alerts", "data": 1, "user": "4"}]


def test_a_server_that_hangs_is_asked_again(server):
    server.script = ["hang"]
    with Publisher(server.url, TOKEN, timeout_s=2) as publisher:
        publisher.publish("alerts", 1, 4)
    assert len(set(server.keys())) == 1 < len(server.keys())


def test_the_deadline_holds_and_says_what_is_not_known(server):
    server.script = ["hang"] * 100
    begin = time.monotonic()
    with (
        Publisher(server.url, TOKEN, timeout_s=0.5) as publisher,
        failing(status=None, retryable=True) as error,
    ):
        publisher.publish("alerts", 1, 4)
    assert "may have been published" in str(error.value)
    assert 0.25 < time.monotonic() - begin < PATIENCE_S


def test_no_time_is_waited_that_is_not_there(server):
    server.script = [(503, {"Retry-After": "60"}, '{"error":{"message":"shutting down"}}')] * 9
    with (
        Publisher(server.url, TOKEN, timeout_s=PATIENCE_S) as publisher,
        failing(status=503, retryable=True) as error,
    ):
        publisher.publish("alerts", 1, 4)
    assert "shutting down" in str(error.value)
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((200, {}, ""), "as a trading_push server does"),  # an unconfigured Caddy
        ((200, {}, '{"ok":true,"published":2}'), "as a trading_push server does"),
        ((404, {}, "<html>"), "no POST /publish"),
        ((301, {"Location": "/"}, ""), "no POST /publish"),
        ((401, {}, '{"error":{"message":"the token has expired"}}'), "the token has expired"),
        ((501, {}, '{"error":{"message":"run one process"}}'), "run one process"),
        ((400, {}, '{"error":{"message":"a\\u001b[2J\\nb"}}'), r"a\x1b[2J\x0ab"),
    ],
)
def test_what_stays_is_an_error_at_once(server, answer, said):
    server.script = [answer] * 9
    with (
        Publisher(server.url, TOKEN) as publisher,
        failing(status=answer[0], retryable=False) as error,
    ):
        publisher.publish("alerts", 1, 4)
    assert said in str(error.value)
    assert len(server.asked) == 1


def test_nobody_listens():
    url = f"http://127.0.0.1:{free_port()}"
    with (
        Publisher(url, TOKEN, timeout_s=0.3) as publisher,
        failing(status=None, retryable=True) as error,
    ):
        publisher.publish("alerts", 1, 4)
    assert "cannot be reached" in str(error.value)


def test_a_connection_is_kept_and_made_anew_where_the_server_has_closed_it(server):
    with Publisher(server.url, TOKEN) as publisher:
        for number in range(5):
            publisher.publish("alerts", number, 4)
        assert len(server.connections) == 1
        server.script = ["cut"]
        publisher.publish("alerts", 5, 4)
        publisher.close()
        publisher.publish("alerts", 6, 4)
    assert len(server.connections) == 3


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_has_connections_of_its_own(server):
    with Publisher(server.url, TOKEN) as publisher:
        publisher.publish("alerts", "before", 4)
        child = os.fork()
        if not child:
            try:
                publisher.publish("alerts", "child", 4)
                os._exit(0)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        publisher.publish("alerts", "after", 4)
    assert len(server.connections) == 2
    assert [body[0]["data"] for _, _, body in server.asked] == ["before", "child", "after"]


def test_a_function_gives_each_token(server):
    tokens = iter(["one", " two\n"])
    with Publisher(server.url, lambda: next(tokens)) as publisher:
        publisher.publish("alerts", 1, 4)
        publisher.publish("alerts", 2, 4)
    said = [headers["Authorization"] for _, headers, _ in server.asked]
    assert said == ["Bearer one", "Bearer two"]


@pytest.mark.parametrize("token", ["", "a\nb", "töken", "\x1b"])
def test_a_token_that_no_header_can_hold(server, token):
    with Publisher(server.url, token) as publisher, failing(retryable=False):
        publisher.publish("alerts", 1, 4)
    assert server.asked == []


def test_an_environment_s_proxy_is_not_used(server, monkeypatch):
    with socket.socket() as nothing:
        nothing.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{nothing.getsockname()[1]}")
        with Publisher(server.url, TOKEN, timeout_s=PATIENCE_S) as publisher:
            publisher.publish("alerts", 1, 4)


@pytest.mark.parametrize(
    "url", ["ws://127.0.0.1:8000/ws", "127.0.0.1:8000", "", "http://", "http://a:b@127.0.0.1"]
)
def test_a_url_that_is_none_of_a_server(url):
    with pytest.raises(ConfigurationError, match=r"as http://127\.0\.0\.1:8000"):
        Publisher(url, TOKEN)


def test_a_path_of_its_own(server):
    with Publisher(f"{server.url}/push/publish", TOKEN) as publisher:
        publisher.publish("alerts", 1, 4)
    assert server.asked[0][0] == "/push/publish"


def test_what_cannot_be_published_is_said_before_anything_is_sent(server):
    with Publisher(server.url, TOKEN) as publisher:
        with pytest.raises(PayloadError):
            publisher.publish("alerts", float("nan"), 4)
        with pytest.raises(PayloadError):
            publisher.publish("alerts", object(), 4)
        with pytest.raises(ValueError, match="empty"):
            publisher.publish("alerts", 1, "")
        with pytest.raises(ValueError, match="float"):
            publisher.publish("alerts", 1, 4.5)  # type: ignore[arg-type]
        publisher.publish_many([])
    with pytest.raises(ConfigurationError, match="time-out"):
        Publisher(server.url, TOKEN, timeout_s=0)
    assert server.asked == []
