"""Files that browsers are given: caching, compression, and what another origin may have."""

from __future__ import annotations

import gzip
import http.client
from importlib import resources

import pytest
import trio

from harness.support import PATIENCE_S, SECRET, hypercorn_serving

from trading_push import open_push_service
from trading_push.settings.schema import Settings

STATIC = resources.files("trading_push.web") / "static"
CLIENT = (STATIC / "trading-push.js").read_bytes()


async def ask(
    port: int, method: str = "GET", path: str = "/trading-push.js", **headers: str
) -> tuple[int, dict[str, str], bytes]:
    """The answer: status, headers by lower-case name, body."""

    def blocking() -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
        try:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, headers=named)
            response = connection.getresponse()
            found = {name.lower(): value for name, value in response.getheaders()}
            return response.status, found, response.read()
        finally:
            connection.close()

    return await trio.to_thread.run_sync(blocking)


@pytest.fixture(params=["linked", "plain"])
async def port(request):
    async with open_push_service(settings=Settings(jwt_secret=SECRET)) as service:

        async def plain(scope, receive, send):
            async def passed_on(message):
                await send(message)

            await service.asgi_app(scope, receive, passed_on)

        async with hypercorn_serving(service if request.param == "linked" else plain) as found:
            yield found


async def test_the_client_is_given_to_pages_of_every_origin(port):
    status, headers, body = await ask(port, Origin="https://elsewhere.example")
    assert (status, body) == (200, CLIENT)
    assert headers["content-type"] == "text/javascript; charset=utf-8"
    assert headers["access-control-allow-origin"] == "*"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["cache-control"] == "no-cache"
    assert headers["vary"] == "Accept-Encoding"
    assert int(headers["content-length"]) == len(CLIENT)


async def test_who_has_it_is_told_so(port):
    _, headers, _ = await ask(port)
    etag = headers["etag"]
    for named in (etag, f"W/{etag}", f'"other", {etag}', "*"):
        status, again, body = await ask(port, If_None_Match=named)
        assert (status, body) == (304, b"")
        assert again["etag"] == etag
        assert again["access-control-allow-origin"] == "*"
    for named in ('"other"', etag.strip('"'), ""):
        assert (await ask(port, If_None_Match=named))[0] == 200


@pytest.mark.parametrize("accepted", ["gzip", "GZIP", "br, gzip;q=0.5", "*", "deflate, *;q=0.1"])
async def test_it_is_compressed_for_who_takes_that(port, accepted):
    plain = (await ask(port))[1]["etag"]
    status, headers, body = await ask(port, Accept_Encoding=accepted)
    assert (status, headers["content-encoding"]) == (200, "gzip")
    assert gzip.decompress(body) == CLIENT
    assert len(body) < len(CLIENT) / 2
    assert headers["etag"] != plain
    assert (await ask(port, Accept_Encoding=accepted, If_None_Match=headers["etag"]))[0] == 304
    assert (await ask(port, Accept_Encoding=accepted, If_None_Match=plain))[0] == 200


@pytest.mark.parametrize(
    "accepted", ["", "identity", "gzip;q=0", "gzip; q=0.000, *", "*;q=0", "br"]
)
async def test_it_is_not_compressed_for_who_does_not(port, accepted):
    _, headers, body = await ask(port, Accept_Encoding=accepted)
    assert "content-encoding" not in headers
    assert body == CLIENT


async def test_its_head_and_its_neighbours(port):
    status, headers, body = await ask(port, "HEAD")
    assert (status, body) == (200, b"")
    assert int(headers["content-length"]) == len(CLIENT)
    assert (await ask(port, "POST"))[0] == 405
    # Only what has a route is given out.
    for path in ("/package.json", "/static/package.json", "/trading-push.js/", "/../routes.py"):
        assert (await ask(port, path=path))[0] in (307, 404)
