"""An HTTP service as a source: GET requests on connections that are kept, by the library asks.

1. A user id is one piece of the URL, percent-encoded: it never makes another path.
2. The data go on as the bytes that the service wrote, once they are known to be strict JSON.
3. One deadline holds for a whole request: connecting, waiting, and a body that comes byte by byte.
4. A connection is used again only after a whole answer, and when nothing has come on it since:
   what came late, or too much, is never taken for the next answer.
5. An answer is bounded, before and after it is unpacked.
6. Redirects are not followed: the token is for this service alone.
7. No URL, token or header, and nothing that the service wrote, is in the text of an error.
"""

from __future__ import annotations

import email.utils
import math
import os
import socket
import ssl
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final
from urllib.parse import urlsplit

import anyio
import attrs
import msgspec
import trio
from anyio.abc import SocketAttribute
from anyio.streams.tls import TLSAttribute

from trading_push.errors import ConfigurationError, SourceError
from trading_push.settings.sources import Http
from trading_push.sources.http.known_answers import KnownAnswers
from trading_push.sources.http.pointer import parse_pointer, resolve_pointer
from trading_push.sources.http.urls import encoded, expand

try:
    import asks
    from asks.errors import BadHttpResponse
except ImportError:
    # asks 3.0.0 says that it needs anyio 3, which fails on today's trio; it works with anyio 4.
    raise ConfigurationError(
        "the HTTP source needs the library asks: pip install --no-deps asks async_generator h11"
    ) from None

__all__ = ["HttpBatchSource", "HttpSource"]

BODY_BYTES: Final = 8 * 1024 * 1024
"""How long an answer may be, packed or not."""
KNOWN_BYTES: Final = 64 * 1024 * 1024
"""How much is kept of answers that have an ETag."""
URL_BYTES: Final = 6000
"""How long the URL of a batch may be: servers take 8000 at least (RFC 9110, section 4.1)."""
PAUSE_S: Final = 300.0
"""How long a service's Retry-After is heeded at most."""

_CLOSE_S: Final = 1.0
# Come later, and the answer may be another (RFC 9110, 15.5.9; RFC 8470, 5.2; RFC 6585, 4).
_TRANSIENT: Final = frozenset({408, 425, 429})
# What a batch is answered where the service cannot do with one of its users.
_ABOUT_A_USER: Final = frozenset({400, 404, 410, 422})

_decode = msgspec.json.Decoder().decode
_encode = msgspec.json.Encoder().encode
_members = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_objects = msgspec.json.Decoder(list[dict[str, msgspec.Raw]]).decode
_user_id = msgspec.json.Decoder(str | int).decode


class _TimedOut(SourceError, trio.TooSlowError):
    """Subscribers are told `source_timeout`, as where a fetch itself took too long."""


class _Refused(SourceError):
    """A status other than success."""

    def __init__(self, status: int, advice: str, *, retryable: bool) -> None:
        super().__init__(f"the HTTP service answered {status}{advice}", retryable=retryable)
        self.status = status


@attrs.frozen
class _Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes


class HttpSource:
    """Reads each user's data type from a URL of its own; a `Source`.

    The answer to a GET is 200 with JSON, whatever its content type says; 204, or a null where the
    data should be, is "nothing to say". ETags are sent back, and what is answered 304 counts as
    unchanged. 429 and 503 with a Retry-After hold all requests back for that time.

    Args:
        url: With `{user_id}` and `{data_type}`.
        headers: Further request headers.
        token: Sent as `Authorization: Bearer`.
        pointer: A JSON pointer (RFC 6901) to the data within the answer; empty is all of it.
        timeout_s: For one request, from the connection to the last byte. The time it waits for one
            of the connections to be free is not counted.
        connections: How many there may be at the same time; they are kept and used again.
        ssl_context: For a certification authority of your own; by default the system's.

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
        # Ours goes before the one of asks: what waits for a connection is not on the clock yet.
        self._limiter = trio.CapacityLimiter(connections)
        parts = urlsplit(url)
        if ssl_context is None and parts.scheme == "https":
            ssl_context = ssl.create_default_context()
        self._session = _Session(connections=connections, ssl_context=ssl_context)
        self._headers = {
            "User-Agent": "trading_push",
            "Accept": "application/json",
            **checked.headers,
            # That of asks is wrong for an IPv6 address; by default it keeps no connection.
            "Host": parts.netloc,
            "Connection": "keep-alive",
            "Accept-Encoding": "gzip",
        }
        if token is not None:
            self._headers["Authorization"] = f"Bearer {token}"
        self._known = KnownAnswers(KNOWN_BYTES)
        self._paused_until = -math.inf

    async def fetch(self, user_id: str, data_type: str) -> msgspec.Raw | None:
        """One user's current value, as the service wrote it.

        Cancellation closes the connection that it comes on.

        Raises:
            SourceError: Retryable: no connection, no whole answer in time, 5xx, 408, 425, 429, or
                a pause that the service asked for. Not retryable: any other status, an answer that
                is too long, is not JSON or holds no data where they should be, and a user id that
                no URL can hold.
        """
        url = expand(self._url, user_id=encoded(user_id), data_type=encoded(data_type))
        data = await self._read(url)
        return None if data in (None, b"null") else msgspec.Raw(data)

    async def aclose(self) -> None:
        """Close the connections, when no fetch is under way. Cancellation does not stop it."""
        with trio.move_on_after(_CLOSE_S, shield=True):
            await self._session.close()

    async def _read(self, url: str) -> bytes | None:
        """The data that a URL answers with, or answered with when it says 304."""
        known = self._known.get(url)
        headers = self._headers
        if known is not None:
            headers = {**headers, "If-None-Match": known[0]}
        answer = await self._request(url, headers)
        if answer.status == 304 and known is not None:
            # Not "nothing to say": the value may be forgotten by now where it is to go.
            return known[1]
        if answer.status == 204:
            return None
        if answer.status != 200:
            raise self._refusal(answer)
        data = self._data(answer)
        self._known.put(url, answer.headers.get("etag", ""), data)
        return data

    async def _request(self, url: str, headers: Mapping[str, str]) -> _Answer:
        async with self._limiter:
            left_s = self._paused_until - trio.current_time()
            if left_s > 0:
                raise SourceError(
                    f"the HTTP service asked for a pause, of which {math.ceil(left_s)} s are left"
                )
            with trio.move_on_after(self._timeout_s):
                # A kept connection may end just as it is used again, and a GET may be sent twice
                # (RFC 9110, section 9.2.2): once, without a pause, on a connection that is new.
                try:
                    return await self._get(url, headers)
                except _Broken:
                    await self._session.close()
                return await self._get(url, headers)
        raise _TimedOut(f"the HTTP service did not answer within {self._timeout_s:g} s")

    async def _get(self, url: str, headers: Mapping[str, str]) -> _Answer:
        body = bytearray()

        async def take(data: bytes) -> None:  # noqa: ASYNC124 - asks awaits it
            body.extend(data)
            if len(body) > BODY_BYTES:
                raise _too_long()

        try:
            response = await self._session.get(
                url,
                headers=headers,
                callback=take,
                follow_redirects=False,
                retries=0,
                connection_timeout=None,  # ours is for all of it
            )
        except SourceError:
            raise
        except Exception as error:
            raise _explained(error, begun=bool(body)) from None
        return _Answer(response.status_code, response.headers, bytes(body))

    def _refusal(self, answer: _Answer) -> SourceError:
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
        return _Refused(status, advice, retryable=status >= 500 or status in _TRANSIENT)

    def _data(self, answer: _Answer) -> bytes:
        body = _unpacked(answer)
        try:
            # Stricter than looking for the data alone: nobody is sent what nobody can read.
            _decode(body)
            return resolve_pointer(body, self._pointer)
        except LookupError:
            raise SourceError(
                "the HTTP service's answer has nothing where http.pointer points", retryable=False
            ) from None
        except (msgspec.MsgspecError, UnicodeError, RecursionError):
            raise SourceError(
                "the HTTP service's answer is not JSON that can be passed on", retryable=False
            ) from None


class HttpBatchSource(HttpSource):
    """Reads many users' data in one request; a `BatchSource`.

    The data of an answer are either an object by user id, or a list of objects with `user_id`: the
    value is then the object's `data`, or without such a member the object itself less `user_id`.
    Users who are not in it, or whose value is null, keep what they have.

    Args:
        url: For one user, as above.
        batch_url: With `{user_ids}`, ids with commas between them, and `{data_type}`; of the same
            origin as `url`. A comma in an id is `%2C`.
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
        """The current values by user id, in as few requests as have room for the ids.

        Raises:
            SourceError: As of `fetch`, but retryable where what is wrong concerns all users, and
                smaller batches would be refused as well.
        """
        values: dict[str, msgspec.Raw | None] = {}
        for url in self._urls(user_ids, data_type):
            try:
                data = await self._read(url)
            except _Refused as error:
                if error.status in _ABOUT_A_USER:
                    raise
                raise SourceError(str(error)) from None
            if data is not None:
                values.update(_by_user(data))
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


_NULL = msgspec.Raw(b"null")


class _Session(asks.Session):  # type: ignore[misc]
    """The session of asks, which hands out no connection that has anything to say by itself."""

    async def _grab_connection(self, url: str) -> Any:
        while self._conn_pool and not _is_quiet(self._conn_pool[0]):
            await self._conn_pool.popleft().aclose()
        return await super()._grab_connection(url)


class _Broken(SourceError):
    """The connection broke before any of the answer's body had come."""


def _explained(error: Exception, *, begun: bool) -> SourceError:
    """What a failed request means, in words without a secret."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return SourceError(
            "the HTTP service's certificate is not one to trust: correct http.url, or add the "
            "authority that signed it to the system's",
            retryable=False,
        )
    if isinstance(error, OSError):
        return SourceError(f"the HTTP service cannot be reached: {_reason(error)}")
    if isinstance(error, BadHttpResponse | anyio.BrokenResourceError | anyio.EndOfStream):
        kind = SourceError if begun else _Broken
        return kind("the HTTP service broke the connection, or what it answered is not HTTP")
    # What asks stumbles over: a cookie without a value, a header that is not UTF-8.
    return SourceError(f"the HTTP service's answer cannot be read ({type(error).__name__})")


def _reason(error: OSError) -> str:
    # anyio tells only in the cause why it could not connect.
    cause = error.__cause__ if isinstance(error.__cause__, OSError) else error
    if isinstance(cause, ssl.SSLError):
        return f"no TLS ({cause.reason})"
    if isinstance(cause, socket.gaierror) or cause.errno is None:
        return cause.strerror or "no address of it answered"
    return os.strerror(cause.errno)


def _too_long() -> SourceError:
    return SourceError(
        f"the HTTP service's answer is longer than {BODY_BYTES} bytes", retryable=False
    )


def _is_quiet(stream: Any) -> bool:
    """Whether nothing has come on an idle connection: not its end, nor what nobody asked for."""
    try:
        stream.extra(SocketAttribute.raw_socket).recv(1, socket.MSG_PEEK)
        return False
    except BlockingIOError:
        pass
    except OSError:
        return False
    tls = stream.extra(TLSAttribute.ssl_object, None)
    if tls is None:
        return True
    try:
        tls.read(1)
    except ssl.SSLWantReadError:
        return True
    except ssl.SSLError:
        pass
    return False


def _unpacked(answer: _Answer) -> bytes:
    encoding = answer.headers.get("content-encoding", "identity").strip().lower()
    if encoding in ("", "identity"):
        return answer.body
    if encoding not in ("gzip", "x-gzip"):
        raise SourceError("the HTTP service's answer is packed, and not by gzip", retryable=False)
    unpack = zlib.decompressobj(wbits=zlib.MAX_WBITS + 16)
    try:
        body = unpack.decompress(answer.body, BODY_BYTES + 1)
    except zlib.error:
        body = b""
    if len(body) > BODY_BYTES:
        raise _too_long()
    if not unpack.eof or unpack.unused_data:
        raise SourceError("the HTTP service's answer cannot be unpacked", retryable=False)
    return body


def _retry_after_s(value: str) -> float:
    """The seconds of a Retry-After, which are a number or a date (RFC 9110, section 10.2.3)."""
    value = value.strip()
    try:
        if value.isascii() and value.isdecimal():
            return float(value)
        return email.utils.parsedate_to_datetime(value).timestamp() - time.time()
    except (ValueError, OverflowError, TypeError):
        return 0.0


def _by_user(data: bytes) -> dict[str, msgspec.Raw]:
    """The values of a batch's answer by user id."""
    try:
        if data.startswith(b"{"):
            return _members(data)
        values: dict[str, msgspec.Raw] = {}
        for each in _objects(data):
            user = str(_user_id(each.pop("user_id")))
            if user in values:
                raise SourceError(
                    "the HTTP service's answer has two values for one user", retryable=False
                )
            values[user] = each["data"] if "data" in each else msgspec.Raw(_encode(each))
        return values
    except (msgspec.MsgspecError, KeyError):
        raise SourceError(
            "the HTTP service's answer for many users is neither an object by user id nor a list "
            "of objects with `user_id`"
        ) from None
