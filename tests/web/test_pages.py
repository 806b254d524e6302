"""The page at `/`, its files, and the token that it is given in the demo."""

from __future__ import annotations

import http.client
import json
import re
from contextlib import closing

import pytest
import trio

from harness.support import PATIENCE_S, SECRET, hypercorn_serving

from trading_push import Principal, open_push_service
from trading_push.auth.demo import DemoTokens
from trading_push.auth.tokens import JwtAuthenticator
from trading_push.settings.schema import Auth, Server, Settings, Web
from trading_push.web import pages

DEMO = DemoTokens(SECRET, {})


async def ask(port, path="/", method="GET", body=None, **headers):
    """Ask as a client of this machine; the status, the headers and the body."""

    def blocking():
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
        with closing(connection):
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, body, named)
            response = connection.getresponse()
            return response.status, dict(response.getheaders()), response.read()

    return await trio.to_thread.run_sync(blocking)


def asks_for_token(port, user="4", **headers):
    headers.setdefault("origin", f"http://127.0.0.1:{port}")
    headers = {name: value for name, value in headers.items() if value is not None}
    return ask(port, "/demo/token", "POST", json.dumps({"user": user}), **headers)


async def test_the_page_and_all_that_it_names():
    async with (
        open_push_service(authenticate=Principal) as service,
        hypercorn_serving(service) as port,
    ):
        status, headers, page = await ask(port)
        assert status == 200
        assert headers["content-type"] == "text/html; charset=utf-8"
        assert headers["content-security-policy"] == pages.POLICY
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        text = page.decode()
        assert 'data-demo="false"' in text
        assert 'data-socket="/ws"' in text
        assert "{" not in text
        # No style and no script stands in the page: the policy would not have them.
        assert " style=" not in text
        assert not re.findall(r"<script>|<style", text)
        named = re.findall(r'(?:src|href)="(/[^"]*)"', text)
        assert named
        for path in named:
            assert (await ask(port, path))[0] == 200, path
        for path in [each for each in named if each.endswith("page.js")]:
            code = (await ask(port, path))[2].decode()
            for module in re.findall(r'from "\./([^"]+)"', code):
                assert (await ask(port, f"/static/{module}"))[0] == 200, module
        again = await ask(port, if_none_match=headers["etag"])
        assert again[0] == 304


async def test_the_page_can_be_switched_off():
    settings = Settings(web=Web(pages=False))
    async with (
        open_push_service(settings=settings, authenticate=Principal) as service,
        hypercorn_serving(service) as port,
    ):
        for path in ("/", "/static/page.js", "/static/page.css", "/demo/token"):
            assert (await ask(port, path))[0] == 404, path
        # Front ends of one's own take the client all the same.
        assert (await ask(port, "/trading-push.js"))[0] == 200


@pytest.mark.parametrize("is_there", [True, False])
async def test_the_chart_library_is_named_only_where_it_is(is_there, monkeypatch):
    monkeypatch.setattr(pages, "_has_chart", lambda: is_there)
    async with (
        open_push_service(authenticate=Principal) as service,
        hypercorn_serving(service) as port,
    ):
        assert (pages.CHART.encode() in (await ask(port))[2]) is is_there


async def test_a_page_of_this_machine_is_given_a_token_of_the_demo():
    async with (
        open_push_service(authenticate=JwtAuthenticator(Auth(), SECRET)) as service,
        hypercorn_serving(service) as port,
    ):
        assert (await asks_for_token(port))[0] == 404
        service.context.demo = DEMO
        assert b'data-demo="true"' in (await ask(port))[2]
        status, headers, body = await asks_for_token(port, "5")
        answer = json.loads(body)
        assert (status, answer["user"], answer["expires_in"]) == (200, "5", 3600)
        assert headers["cache-control"] == "no-store"
        principal = await service.context.tokens.principal(answer["token"], "127.0.0.1")
        assert principal.user == "5"
        for user in ("6", "", "ops", 4, None):
            assert (await asks_for_token(port, user))[0] == 400, user
        assert (await ask(port, "/demo/token"))[0] == 405


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": None},
        {"origin": "null"},
        {"origin": "http://evil.example"},
        {"origin": "http://127.0.0.1:1"},
        {"origin": "http://evil.example", "host": "evil.example"},  # DNS rebinding
        {"x_forwarded_for": "127.0.0.1"},
        {"x_real_ip": "127.0.0.1"},
        {"forwarded": "for=127.0.0.1"},
        {"via": "1.1 proxy"},
    ],
    ids=str,
)
async def test_nobody_else_is_given_one(headers):
    async with (
        open_push_service(authenticate=Principal) as service,
        hypercorn_serving(service) as port,
    ):
        service.context.demo = DEMO
        status, _, body = await asks_for_token(port, **headers)
        assert status == 403
        assert json.loads(body)["error"]["code"] == "forbidden"
        shown = {name: value for name, value in headers.items() if name != "origin"}
        if shown:
            assert b'data-demo="false"' in (await ask(port, **shown))[2]


async def test_behind_trusted_proxies_nobody_is_given_one():
    settings = Settings(server=Server(trusted_proxies="127.0.0.1"))
    async with (
        open_push_service(settings=settings, authenticate=Principal) as service,
        hypercorn_serving(service) as port,
    ):
        service.context.demo = DEMO
        assert (await asks_for_token(port))[0] == 403


async def test_a_key_of_ones_own_ends_the_demo():
    async with open_push_service(authenticate=Principal) as service:
        service.context.demo = DEMO
        service.context.take_over(Settings(), Principal)
        assert service.context.demo is DEMO
        service.context.take_over(Settings(jwt_secret="x" * 32), Principal)
        assert service.context.demo is None
