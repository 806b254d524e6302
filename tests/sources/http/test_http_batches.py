"""Many users in one request: the forms of an answer, whose its values are, one user's trouble."""

from __future__ import annotations

import json
from contextlib import aclosing
from typing import Any

import msgspec
import pytest

from harness.http_service import HTTP_CLIENT
from harness.sources import Service

from trading_push import ConfigurationError, SourceError
from trading_push.sources.base import BatchSource
from trading_push.sources.http import source as http
from trading_push.sources.http.source import HttpBatchSource, HttpSource


def batch(service: Service, **options: Any) -> HttpBatchSource:
    url = service.url("/{data_type}?users={user_ids}")
    return HttpBatchSource(service.url(), url, client=HTTP_CLIENT, **options)


def as_text(values: Any) -> dict[str, str]:
    assert all(isinstance(value, msgspec.Raw) for value in values.values())
    return {user: bytes(value).decode() for user, value in values.items()}


def test_only_a_source_with_a_batch_url_offers_batches() -> None:
    one = "http://host/{user_id}/{data_type}"
    assert not isinstance(HttpSource(one), BatchSource)
    assert isinstance(HttpBatchSource(one, "http://host/{user_ids}/{data_type}"), BatchSource)


@pytest.mark.parametrize(
    "answer",
    [
        '{"4": [0.10], "7": null, "9": [], "a/b": {"x": 1}}',
        '[{"user_id": 4, "data": [0.10]}, {"user_id": "9", "data": []}, {"user_id": "7",'
        ' "data": null}, {"user_id": "a/b", "x": 1}]',
    ],
)
async def test_each_form_of_a_batch(service: Service, answer: str) -> None:
    service.say(f'{{"result": {answer}}}'.encode(), etag='"1"')
    async with aclosing(batch(service, pointer="/result")) as source:
        expected = {"4": "[0.10]", "a/b": '{"x":1}'}
        for _ in range(2):
            got = as_text(await source.fetch_many(["4", "5", "7", "a/b"], "balance"))
            assert {user: text.replace(" ", "") for user, text in got.items()} == expected
            service.say(b"", 304)
        assert service.headers[1]["if-none-match"] == '"1"'
        service.say(b'{"result": [1]}')
        assert bytes(await source.fetch("4", "balance")) == b"[1]"
        assert await source.fetch_many([], "balance") == {}
    assert service.asked == [*["/balance?users=4,5,7,a%2Fb"] * 2, "/users/4/balance"]


async def test_a_batch_goes_in_urls_that_servers_take(service: Service) -> None:
    users = [f"user-{number:04}-" + "ü" * 50 for number in range(100)]

    def echo(path: str) -> tuple[int, bytes, dict[str, str]]:
        numbers = [piece.split("-")[1] for piece in path.partition("=")[2].split(",")]
        values = {users[int(number)]: int(number) for number in numbers}
        return 200, json.dumps(values).encode(), {}

    service.answer = echo
    async with aclosing(batch(service)) as source:
        got = as_text(await source.fetch_many(users, "balance"))
    assert got == {user: str(number) for number, user in enumerate(users)}
    assert max(map(len, service.asked)) <= http.URL_BYTES
    assert len(service.asked) == 6


@pytest.mark.parametrize(
    ("status", "answer", "retryable"),
    [
        (200, b'{"4": 1', False),
        (200, b'{"4": NaN, "5": 1}', False),
        (200, b'{"4": "\\ud800", "5": 1}', False),
        (200, b'[{"user_id": 4, "data": -Infinity}]', False),
        (200, b"[1]", True),
        (200, b'[{"data": 1}]', True),
        (200, b'[{"user_id": true, "data": 1}]', True),
        (200, b'"text"', True),
        (400, b"", False),
        (404, b"", False),
        (422, b"", False),
        (302, b"", True),
        (401, b"", True),
        (403, b"", True),
        (414, b"", True),
        (429, b"", True),
        (500, b"", True),
    ],
)
async def test_what_concerns_everybody_is_not_looked_for_in_smaller_batches(
    service: Service, status: int, answer: bytes, retryable: bool
) -> None:
    service.say(answer, status)
    async with aclosing(batch(service)) as source:
        with pytest.raises(SourceError) as caught:
            await source.fetch_many(["4", "5"], "balance")
    assert caught.value.retryable is retryable


# --- one user's trouble ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (b'{"4": 1e999, "5": [0.10]}', "is not JSON that can be passed on"),
        (b'[{"user_id": 4, "data": "\xff"}, {"user_id": "5", "data": [0.10]}]', "is not JSON"),
        (
            b'[{"user_id": 4, "data": 1}, {"user_id": "5", "data": [0.10]}, '
            b'{"user_id": "4", "data": 1}]',
            "two values for one user",
        ),
        (b'{"4": 1, "5": [0.10], "4": 2}', ""),  # JSON itself: the last one counts
    ],
)
async def test_one_users_value_takes_nothing_from_the_others(
    service: Service, answer: bytes, says: str
) -> None:
    service.say(answer)
    async with aclosing(batch(service)) as source:
        values = await source.fetch_many(["4", "5"], "balance")
    assert bytes(values["5"]) == b"[0.10]"
    if says:
        assert says in str(values["4"])
        assert isinstance(values["4"], SourceError)
    else:
        assert bytes(values["4"]) == b"2"


@pytest.mark.parametrize("user", ["", "\ud800"])
async def test_a_user_who_cannot_be_asked_for_is_left_out(service: Service, user: str) -> None:
    service.say(b'{"4": 1}')
    async with aclosing(batch(service)) as source:
        values = await source.fetch_many(["4", user], "balance")
    assert bytes(values["4"]) == b"1"
    assert "no URL can hold" in str(values[user])
    assert service.asked == ["/balance?users=4"]


async def test_a_user_who_would_make_another_path(service: Service) -> None:
    service.say(b'{"4": 1}')
    url = service.url("/{user_ids}/{data_type}")
    async with aclosing(HttpBatchSource(service.url(), url, client=HTTP_CLIENT)) as source:
        values = await source.fetch_many([".."], "balance")
    assert "no URL can hold" in str(values[".."])
    assert service.asked == []


# --- whose a value is -----------------------------------------------------------------------------

UUID = "0b9f8c1e-6d3a-4f57-9c58-0a4b7d2f1e63"


@pytest.mark.parametrize(
    ("kind", "asked", "answered"),
    [
        ("text", "4", "4"),
        ("text", "4", "4.00"),
        ("text", "4", '"4"'),
        ("text", "4", '"4.0"'),
        ("text", "4", '"4  "'),
        ("text", "9007199254740993", "9007199254740993"),
        ("text", UUID.upper(), f'"{UUID}"'),
        ("uuid", UUID, f'"{UUID.replace("-", "")}"'),
        ("caseless", "Ann", '"ANN"'),
        ("caseless", "ann", '"Ann "'),
    ],
)
@pytest.mark.parametrize("form", ["object", "list"])
async def test_an_id_that_is_the_one_asked_for(
    service: Service, kind: str, asked: str, answered: str, form: str
) -> None:
    key = answered if answered.startswith('"') else f'"{answered}"'
    items = {"object": f"{{{key}: [1]}}", "list": f'[null, {{"user_id": {answered}, "data": [1]}}]'}
    service.say(items[form].encode())
    async with aclosing(batch(service, user_id=kind)) as source:
        values = await source.fetch_many([asked, UUID.replace("0", "1")], "balance")
    assert as_text(values) == {asked: "[1]"}


@pytest.mark.parametrize(
    ("kind", "asked", "answered"),
    [
        ("text", "Ann", "ANN"),
        ("text", "04", "4"),
        ("text", "4", "04"),
        ("text", "4abc", "4"),
        ("text", " 4", "4"),
        ("caseless", "josé", "jose"),
    ],
)
async def test_an_id_that_may_be_the_one_asked_for_is_an_error_that_names_both(
    service: Service, kind: str, asked: str, answered: str
) -> None:
    service.say(json.dumps({answered: [1], "7": [2]}).encode())
    async with aclosing(batch(service, user_id=kind)) as source:
        values = await source.fetch_many([asked, "7", "8"], "balance")
    assert bytes(values["7"]) == b"[2]"
    assert "8" not in values
    error = values[asked]
    assert isinstance(error, SourceError)
    for part in (repr(asked), repr(answered), "http.user_id"):
        assert part in str(error)


@pytest.mark.parametrize(("kind", "bad"), [("integer", "4abc"), ("uuid", "4"), ("integer", "04")])
async def test_an_id_of_another_kind_is_not_asked_for(
    service: Service, kind: str, bad: str
) -> None:
    good = UUID if kind == "uuid" else "4"
    service.say(f'{{"{good}": 1}}'.encode())
    async with aclosing(batch(service, user_id=kind)) as source:
        values = await source.fetch_many([bad, good], "balance")
        assert bytes(values[good]) == b"1"
        error = values[bad]
        assert isinstance(error, SourceError)
        assert (error.retryable, error.reason) == (False, "refused")
        with pytest.raises(SourceError, match="the user's id is not"):
            await source.fetch(bad, "balance")
    assert service.asked == [f"/balance?users={good}"]


@pytest.mark.parametrize("answer", [b'{"result": null}', b'{"result": []}', b'{"result": [null]}'])
async def test_a_batch_with_nothing_to_say(service: Service, answer: bytes) -> None:
    service.say(answer)
    async with aclosing(batch(service, pointer="/result")) as source:
        assert await source.fetch_many(["4"], "balance") == {}


async def test_only_the_data_types_that_the_service_has_are_asked_for(service: Service) -> None:
    service.say(b'{"4": 1}')
    async with aclosing(batch(service, data_types="balance orders")) as source:
        assert source.data_types == ["balance", "orders"]
        assert await source.fetch_many(["4"], "pnl") == {}
        assert await source.fetch("4", "pnl") is None
        assert as_text(await source.fetch_many(["4"], "orders")) == {"4": "1"}
    assert service.asked == ["/orders?users=4"]


@pytest.mark.parametrize(
    "batch_url",
    [
        "https://host/{user_ids}/{data_type}",
        "http://host:81/{user_ids}/{data_type}",
        "http://host/",
    ],
)
def test_batch_urls_that_cannot_be_used(batch_url: str) -> None:
    with pytest.raises(ConfigurationError):
        HttpBatchSource("http://host/{user_id}/{data_type}", batch_url)
