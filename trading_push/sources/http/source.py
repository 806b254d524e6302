"""An HTTP service as a source: GET requests on connections that are kept, by the library asks.

1. A user id is one piece of the URL, percent-encoded: it never makes another path (`urls`).
2. The data go on as the bytes that the service wrote, once they are known to be strict JSON
   (`body`).
3. One deadline holds for a whole request: connecting, waiting, and a body that comes byte by byte.
4. An answer is bounded, before and after it is unpacked.
5. Redirects are not followed: the token is for this service only.
6. No URL, token or header, and nothing that the service wrote, is in the text of an error.
"""

from __future__ import annotations

import email.utils
import math
import ssl
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final
from urllib.parse import urlsplit

import msgspec
import trio

from trading_push.errors import ConfigurationError, SourceError
from trading_push.settings.sources import Http
from trading_push.sources.http.body import by_user, data_in, unpacked
from trading_push.sources.http.known_answers import KnownAnswers
from trading_push.sources.http.pointer import parse_pointer
from trading_push.sources.http.pool import Answer, ConnectionBroken, ConnectionPool
from trading_push.sources.http.urls import encoded, expand

__all__ = ["HttpBatchSource", "HttpSource"]

KNOWN_BYTES: Final = 64 * 1024 * 1024
"""How much is kept of answers that have an ETag."""
URL_BYTES: Final = 6000
"""How long the URL of a batch may be: servers accept 8000 at least (RFC 9110, section 4.1)."""
PAUSE_S: Final = 300.0
"""The longest Retry-After of a service that is heeded."""

_CLOSE_S: Final = 1.0
# The same request may succeed later (RFC 9110, 15.5.9; RFC 8470, 5.2; RFC 6585, 4).
_TRANSIENT: Final = frozenset({408, 425, 429})
# What a batch is answered where the service cannot serve one of its users.
_ABOUT_A_USER: Final = frozenset({400, 404, 410, 422})

_NULL = msgspec.Raw(b"null")


class _TimedOut(SourceError, trio.TooSlowError):
    """Subscribers are told `source_timeout`, as where a fetch itself took too long."""


class _BadStatus(SourceError):
    """The service answered with a status that is not a success."""

    def __init__(self, status: int, advice: str, *, retryable: bool) -> None:
        super().__init__(f"the HTTP service answered {status}{advice}", retryable=retryable)
        self.status = status


class HttpSource:
    """Reads each user's data type from a URL of its own; a `Source`.

    A GET is answered 200 with JSON, whatever its content type says; 204, or a null in place of the
    data, means "nothing to say". ETags are sent back, and an answer 304 counts as unchanged. 429
    and 503 with a Retry-After hold all requests back for that time.

    Args:
        url: With `{user_id}` and `{data_type}`.
        headers: Further request headers.
        token: Sent as `Authorization: Bearer`.
        pointer: A JSON pointer (RFC 6901) to the data within the answer; by default all of it.
        timeout_s: For one request, from the connection to the last byte. The time that it waits for
            one of the connections to be free is not counted.
        connections: How many there may be at the same time; they are kept and used again.
        ssl_context: For a certification authority of your own; by default those of the system.

    Raises:
        ConfigurationError: One of them cannot be used.
    """

    def __init__(
        self,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        token: str | None = None,
        pointer: str = "",
        timeout_s: float = 10,
        connections: int = 20,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        checked = Http(
            url=url,
            headers=dict(headers or {}),
            token=token,
            pointer=pointer,
            timeout_s=timeout_s,
            connections=connections,
        )
        self._url = url
        self._pointer = parse_pointer(pointer)
        self._timeout_s = timeout_s
        # Taken before a connection of asks is: a request that waits for one is not timed yet.
        self._limiter = trio.CapacityLimiter(connections)
        parts = urlsplit(url)
        if ssl_context is None and parts.scheme == "https":
            ssl_context = ssl.create_default_context()
        self._pool = ConnectionPool(connections, ssl_context)
        self._headers = {
            "User-Agent": "trading_push",
            "Accept": "application/json",
            **checked.headers,
            # The header that asks writes is wrong for an IPv6 address, and it keeps no connection.
            "Host": parts.netloc,
            "Connection": "keep-alive",
            "Accept-Encoding": "gzip",
        }
        if token is not None:
            self._headers["Authorization"] = f"Bearer {token}"
        self._known = KnownAnswers(KNOWN_BYTES)
        # Until when the service asked to be left alone, on trio's clock.
        self._paused_until = -math.inf

    async def fetch(self, user_id: str, data_type: str) -> msgspec.Raw | None:
        """Read one user's current value, as the service wrote it.

        Cancellation closes the connection that it comes on.

        Raises:
            SourceError: Retryable: no connection, no whole answer in time, 5xx, 408, 425, 429, or
                a pause that the service asked for. Not retryable: any other status, an answer that
                is too long, is not JSON or has no data in their place, and a user id that no URL
                can hold.
        """
        url = expand(self._url, user_id=encoded(user_id), data_type=encoded(data_type))
        data = await self._read(url)
        return None if data in (None, b"null") else msgspec.Raw(data)

    async def aclose(self) -> None:
        """Close the connections, once no fetch is under way. Cancellation does not stop it."""
        with trio.move_on_after(_CLOSE_S, shield=True):
            await self._pool.close()

    async def _read(self, url: str) -> bytes | None:
        """Return the data that a URL answers with now; at a 304, what it answered before."""
        known = self._known.get(url)
        headers = self._headers
        if known is not None:
            headers = {**headers, "If-None-Match": known[0]}
        answer = await self._request(url, headers)
        if answer.status == 304 and known is not None:
            # Not "nothing to say": the broker may have forgotten the value by now.
            return known[1]
        if answer.status == 204:
            return None
        if answer.status != 200:
            raise self._refusal(answer)
        body = unpacked(answer.body, answer.headers.get("content-encoding", "identity"))
        data = data_in(body, self._pointer)
        self._known.put(url, answer.headers.get("etag", ""), data)
        return data

    async def _request(self, url: str, headers: Mapping[str, str]) -> Answer:
        async with self._limiter:
            left_s = self._paused_until - trio.current_time()
            if left_s > 0:
                raise SourceError(
                    f"the HTTP service asked for a pause, of which {math.ceil(left_s)} s are left"
                )
            with trio.move_on_after(self._timeout_s):
                # A kept connection may end just as it is used again. A GET may be sent twice (RFC
                # 9110, section 9.2.2): once more, without a pause, on a new connection.
                try:
                    return await self._pool.get(url, headers)
                except ConnectionBroken:
                    await self._pool.close()
                return await self._pool.get(url, headers)
        raise _TimedOut(f"the HTTP service did not answer within {self._timeout_s:g} s")

    def _refusal(self, answer: Answer) -> SourceError:
        """Make the error of a status; heed the pause that the service asks for."""
        status, advice = answer.status, ""
        if status in (429, 503):
            pause_s = min(_retry_after_s(answer.headers.get("retry-after", "")), PAUSE_S)
            self._paused_until = max(self._paused_until, trio.current_time() + pause_s)
            if pause_s > 0:
                advice = f", and asked for a pause of {math.ceil(pause_s)} s"
        elif status in (401, 403):
            advice = ": look after http.token"
        elif 300 <= status < 400:
            advice = ", and redirects are not followed: correct http.url"
        return _BadStatus(status, advice, retryable=status >= 500 or status in _TRANSIENT)


class HttpBatchSource(HttpSource):
    """Reads many users' data in one request; a `BatchSource`.

    The data of an answer are either an object by user id, or a list of objects with `user_id`. The
    value is then the object's `data`, or without such a member the object itself less `user_id`.
    Users who are not in it, or whose value is null, keep the value that they have.

    Args:
        url: For one user, as above.
        batch_url: With `{user_ids}`, the ids separated by commas, and `{data_type}`; of the same
            origin as `url`. A comma in an id is written `%2C`.
    """

    def __init__(self, url: str, batch_url: str, **options: Any) -> None:
        super().__init__(url, **options)
        Http(url=url, batch_url=batch_url)
        if urlsplit(url)[:2] != urlsplit(batch_url)[:2]:
            raise ConfigurationError(
                "http.batch_url is of another origin than http.url: the token is for one alone"
            )
        self._batch_url = batch_url

    async def fetch_many(
        self, user_ids: Sequence[str], data_type: str
    ) -> Mapping[str, msgspec.Raw | None]:
        """Read the current values by user id, in as few requests as have room for the ids.

        Raises:
            SourceError: As from `fetch`, but retryable where the fault concerns all users, so that
                smaller batches would be refused as well.
        """
        values: dict[str, msgspec.Raw | None] = {}
        for url in self._urls(user_ids, data_type):
            try:
                data = await self._read(url)
            except _BadStatus as error:
                if error.status in _ABOUT_A_USER:
                    raise
                raise SourceError(str(error)) from None
            if data is not None:
                values.update(by_user(data))
        return {user: values[user] for user in user_ids if user in values and values[user] != _NULL}

    def _urls(self, user_ids: Sequence[str], data_type: str) -> Iterator[str]:
        quoted = [encoded(user) for user in user_ids]
        ids: list[str] = []
        room = URL_BYTES - len(self._batch_url)
        for each in quoted:
            room -= len(each) + 1
            if room < 0 and ids:
                yield expand(self._batch_url, user_ids=",".join(ids), data_type=encoded(data_type))
                ids, room = [], URL_BYTES - len(self._batch_url) - len(each) - 1
            ids.append(each)
        if ids:
            yield expand(self._batch_url, user_ids=",".join(ids), data_type=encoded(data_type))


def _retry_after_s(value: str) -> float:
    """Read a Retry-After, which is a number of seconds or a date (RFC 9110, section 10.2.3)."""
    value = value.strip()
    try:
        if value.isascii() and value.isdecimal():
            return float(value)
        return email.utils.parsedate_to_datetime(value).timestamp() - time.time()
    except (ValueError, OverflowError, TypeError):
        return 0.0
