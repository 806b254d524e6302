"""An HTTP service as a source: GET requests on connections that are kept, by httpx or asks.

1. A user id is one piece of the URL, percent-encoded: it never makes another path (`urls`).
2. The data go on as the bytes that the service wrote, once they are known to be strict JSON
   (`body`).
3. One deadline holds for a whole request: connecting, waiting, and a body that comes byte by byte.
4. An answer is bounded, before and after it is unpacked.
5. Redirects are not followed: the token is for this service only.
6. No URL, token or header, and nothing that the service wrote, is in the text of an error; but a
   user id that may be another spelling of one that was asked for is.
"""

from __future__ import annotations

import math
import ssl
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final
from urllib.parse import urlsplit

import attrs
import msgspec
import trio

from trading_push.errors import ConfigurationError, SourceError
from trading_push.settings.consistency import DATA_TYPES
from trading_push.settings.sources import Http
from trading_push.sources.http.body import by_user, data_in, refusal, unpacked
from trading_push.sources.http.known_answers import KnownAnswers
from trading_push.sources.http.pauses import Pauses
from trading_push.sources.http.pointer import parse_pointer
from trading_push.sources.http.pool import CLOSE_S, Answer, Pool, Target
from trading_push.sources.http.tls import tls_context
from trading_push.sources.http.tokens import tokens_of
from trading_push.sources.http.urls import encoded, expand
from trading_push.sources.retry_after import retry_after_s
from trading_push.transport.outbound_proxies import OutboundProxies
from trading_push.user_ids import UserIds

__all__ = ["HttpBatchSource", "HttpSource", "http_source"]

KNOWN_BYTES: Final = 64 * 1024 * 1024
"""How much is kept of answers that have an ETag."""
URL_BYTES: Final = 6000
"""How long the URL of a batch may be: servers accept 8000 at least (RFC 9110, section 4.1)."""

# The same request may succeed later (RFC 9110, 15.5.9; RFC 8470, 5.2; RFC 6585, 4).
_TRANSIENT: Final = frozenset({408, 425, 429})
# What a batch is answered where the service cannot serve one of its users.
_ABOUT_A_USER: Final = frozenset({400, 404, 410, 422})

_NULL = msgspec.Raw(b"null")


def http_source(settings: Http, proxies: OutboundProxies | None = None) -> HttpSource:
    """Make the source that the settings describe.

    Raises:
        ConfigurationError: One of them cannot be used, or a library is not installed.
    """
    options = {each.name: getattr(settings, each.name) for each in attrs.fields(Http)}
    url, batch_url = options.pop("url"), options.pop("batch_url")
    if batch_url is None:
        return HttpSource(url, proxies=proxies, **options)
    return HttpBatchSource(url, batch_url, proxies=proxies, **options)


class _TimedOut(SourceError, trio.TooSlowError):
    """Subscribers are told `source_timeout`, as where a fetch itself took too long."""


class _BadStatus(SourceError):
    """The service answered with a status that is not a success."""

    def __init__(self, status: int, advice: str, **options: Any) -> None:
        super().__init__(f"the HTTP service answered {status}{advice}", **options)
        self.status = status


class HttpSource:
    """Reads each user's data type from a URL of its own; a `Source`.

    A GET is answered 200 with JSON, whatever its content type says; 204, or a null in place of the
    data, means "nothing to say". ETags are sent back, and an answer 304 counts as unchanged. 429
    and 503 with a Retry-After hold this user's requests back for that time.

    Args:
        url: With `{user_id}` and `{data_type}`.
        ssl_context: In place of `ca_file` and `client_cert`.
        proxies: Which proxy leads to the service; by default none does.
        options: Each setting of `[http]`, by its name.

    Raises:
        ConfigurationError: One of them cannot be used, or the library that sends the requests is
            not installed.
    """

    def __init__(
        self,
        url: str,
        *,
        ssl_context: ssl.SSLContext | None = None,
        proxies: OutboundProxies | None = None,
        **options: Any,
    ) -> None:
        settings = Http(url=url, **options)
        self._url = url
        self._pointer = parse_pointer(settings.pointer)
        self._timeout_s = settings.timeout_s
        self._ids = UserIds(settings.user_id)
        # The only data types that are asked for; empty for all.
        self._only = frozenset(settings.data_types.split())
        self.data_types: Sequence[str] = settings.data_types.split() or DATA_TYPES
        """The data types that the service has."""
        # Taken before a connection is: a request that waits for one is not timed yet.
        self._limiter = trio.CapacityLimiter(settings.connections)
        parts = urlsplit(url)
        if ssl_context is None and parts.scheme == "https":
            ssl_context = tls_context(settings.ca_file, settings.client_cert, settings.client_key)
        proxy = None if proxies is None else proxies.of(url)
        target = Target(settings.connections, ssl_context, settings.http2, proxy)
        self._tokens = tokens_of(settings)
        self._pool = _open_pool(settings.client, target)
        self._headers = {
            "User-Agent": "trading_push",
            "Accept": "application/json",
            **settings.headers,
            # What asks would write is wrong for an IPv6 address.
            "Host": parts.netloc,
            "Accept-Encoding": "gzip",
        }
        self._known = KnownAnswers(KNOWN_BYTES)
        self._pauses = Pauses()

    async def fetch(self, user_id: str, data_type: str) -> msgspec.Raw | None:
        """Read one user's current value, as the service wrote it; None also for a data type that
        the service does not have.

        Cancellation closes the connection that it comes on.

        Raises:
            SourceError: Retryable: no connection, no whole answer in time, 5xx, 408, 425, 429, or
                a pause that the service asked for. Not retryable: any other status, an answer that
                is too long, is not JSON or has no data in their place, and a user id that no URL
                can hold or that is of another kind than `http.user_id` says.
        """
        if self._only and data_type not in self._only:
            return None
        refused = self._refusal_of(user_id)
        if refused is not None:
            raise refused
        url = expand(self._url, user_id=encoded(user_id), data_type=encoded(data_type))
        data = await self._read(url, user_id)
        return None if data in (None, b"null") else msgspec.Raw(data)

    async def aclose(self) -> None:
        """Close the connections, once no fetch is under way. Cancellation does not stop it."""
        with trio.move_on_after(CLOSE_S, shield=True):
            await self._pool.close()

    def _refusal_of(self, user_id: str) -> SourceError | None:
        why = self._ids.refusal(user_id)
        return None if why is None else SourceError(why, retryable=False, reason="refused")

    async def _read(self, url: str, user: str | None) -> bytes | None:
        """Return the data that a URL answers with now; at a 304, what it answered before.

        Args:
            url: What is asked for.
            user: Whose it is; None for a batch, whose values are not checked yet.
        """
        known = self._known.get(url)
        headers = self._headers
        if known is not None:
            headers = {**headers, "If-None-Match": known[0]}
        answer = await self._request(url, headers, user)
        if answer.status not in (429, 503):
            self._pauses.answered()
        if answer.status == 304 and known is not None:
            # Not "nothing to say": the broker may have forgotten the value by now.
            return known[1]
        if answer.status == 204:
            return None
        if answer.status != 200:
            raise self._refusal(answer, user)
        body = unpacked(answer.body, answer.headers.get("content-encoding", "identity"))
        data = data_in(body, self._pointer, strict=user is not None)
        self._known.put(url, answer.headers.get("etag", ""), data)
        return data

    async def _request(self, url: str, headers: Mapping[str, str], user: str | None) -> Answer:
        async with self._limiter:
            token = await self._tokens.current()
            answer = await self._answer(url, headers, token, user)
            if answer.status == 401:
                newer = await self._tokens.other_than(token)
                if newer is not None:
                    answer = await self._answer(url, headers, newer, user)
            return answer

    async def _answer(
        self, url: str, headers: Mapping[str, str], token: str | None, user: str | None
    ) -> Answer:
        self._pauses.check(user)
        if token is not None:
            headers = {**headers, "Authorization": f"Bearer {token}"}
        with trio.move_on_after(self._timeout_s):
            return await self._pool.get(url, headers)
        raise _TimedOut(
            f"the HTTP service did not answer within {self._timeout_s:g} s",
            reason="source_timeout",
        )

    def _refusal(self, answer: Answer, user: str | None) -> SourceError:
        """Make the error of a status; heed the pause that the service asks for."""
        status, advice = answer.status, ""
        pause_s, everyone = 0.0, False
        if status in (429, 503):
            pause_s = retry_after_s(answer.headers.get("retry-after", ""))
            if pause_s > 0:
                everyone = self._pauses.ask(user, pause_s)
                advice = f", and asked for a pause of {math.ceil(pause_s)} s"
        elif status in (401, 403):
            advice = f": look after {self._tokens.name}"
        elif 300 <= status < 400:
            advice = ", and redirects are not followed: correct http.url"
        return _BadStatus(
            status,
            advice,
            retryable=status >= 500 or status in _TRANSIENT,
            pause_s=pause_s,
            everyone=everyone,
        )


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
                "http.batch_url is of another origin than http.url: the token is for one only"
            )
        self._batch_url = batch_url

    async def fetch_many(
        self, user_ids: Sequence[str], data_type: str
    ) -> Mapping[str, msgspec.Raw | SourceError | None]:
        """Read the current values by user id, in as few requests as have room for the ids.

        A `SourceError` in place of a value is that user's only.

        Raises:
            SourceError: As from `fetch`, but retryable where the fault concerns all users, so that
                smaller batches would be refused as well.
        """
        values: dict[str, msgspec.Raw | SourceError | None] = {}
        if self._only and data_type not in self._only:
            return values
        # Who cannot be asked for.
        asked: dict[str, str] = {}
        for user in user_ids:
            try:
                refused, asked[user] = self._refusal_of(user), encoded(user)
            except SourceError as error:
                refused = error
            if refused is not None:
                values[user] = refused
                asked.pop(user, None)
        # The others.
        for users in self._parts(asked):
            quoted = ",".join(asked[user] for user in users)
            try:
                url = expand(self._batch_url, user_ids=quoted, data_type=encoded(data_type))
            except SourceError as error:  # one user, whose id is `..`
                values.update(dict.fromkeys(users, error))
                continue
            try:
                data = await self._read(url, None)
            except _BadStatus as error:
                if error.status in _ABOUT_A_USER:
                    raise
                raise SourceError(
                    str(error), pause_s=error.pause_s, everyone=error.everyone
                ) from None
            if data is not None:
                values.update(self._values(users, by_user(data)))
        return values

    def _parts(self, asked: Mapping[str, str]) -> Iterator[list[str]]:
        """Divide users so that the ids of each part have room in a URL."""
        part: list[str] = []
        whole = room = URL_BYTES - len(self._batch_url)
        for user, quoted in asked.items():
            room -= len(quoted) + 1
            if room < 0 and part:
                yield part
                part, room = [], whole - len(quoted) - 1
            part.append(user)
        if part:
            yield part

    def _values(
        self, users: Sequence[str], answered: Sequence[tuple[str | int | float, msgspec.Raw]]
    ) -> dict[str, msgspec.Raw | SourceError | None]:
        """Give each user what the service has answered, or what is wrong with it."""
        values: dict[str, msgspec.Raw | SourceError | None] = {}
        matches = self._ids.match(users, [answered_id for answered_id, _ in answered])
        for answered_id, value in answered:
            if value == _NULL:
                continue
            for user in matches.users.get(answered_id, ()):
                if user in values:
                    values[user] = SourceError(
                        "the HTTP service's answer has two values for one user", retryable=False
                    )
                else:
                    values[user] = refusal(value) or value
        for stray, candidates in matches.strays.items():
            for user in candidates:
                values[user] = SourceError(
                    f"the HTTP service answered for {_shown(stray)}, who may be {_shown(user)}: "
                    "let it answer with the id that it was asked for, or set http.user_id to how "
                    "it compares them",
                    retryable=False,
                )
        return values


def _open_pool(client: str, target: Target) -> Pool:
    """Make the pool of a library.

    Raises:
        ConfigurationError: The library is not installed, or cannot do what is wanted of it.
    """
    # Each is imported only where it is used: the other one need not be installed.
    if client == "asks":
        from trading_push.sources.http.asks_pool import AsksPool

        return AsksPool(target)
    from trading_push.sources.http.httpx_pool import HttpxPool

    return HttpxPool(target)


def _shown(user: object) -> str:
    text = repr(user)
    return text if len(text) <= 60 else f"{text[:57]}..."
