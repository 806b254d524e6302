"""JSON pointers: the examples of RFC 6901, and bytes that stay as they are."""

from __future__ import annotations

import msgspec
import pytest

from trading_push.sources.http.pointer import parse_pointer, resolve_pointer

# RFC 6901, section 5.
DOCUMENT = rb"""
{
   "foo": ["bar", "baz"],
   "": 0,
   "a/b": 1,
   "c%d": 2,
   "e^f": 3,
   "g|h": 4,
   "i\\j": 5,
   "k\"l": 6,
   " ": 7,
   "m~n": 8
}
"""


@pytest.mark.parametrize(
    ("pointer", "part"),
    [
        ("", DOCUMENT.strip()),
        ("/foo", b'["bar", "baz"]'),
        ("/foo/0", b'"bar"'),
        ("/", b"0"),
        ("/a~1b", b"1"),
        ("/c%d", b"2"),
        ("/e^f", b"3"),
        ("/g|h", b"4"),
        ("/i\\j", b"5"),
        ('/k"l', b"6"),
        ("/ ", b"7"),
        ("/m~0n", b"8"),
    ],
)
def test_the_examples_of_the_standard(pointer: str, part: bytes) -> None:
    assert resolve_pointer(DOCUMENT, parse_pointer(pointer)) == part


def test_escapes_are_undone_in_the_order_of_the_standard() -> None:
    assert parse_pointer("/~01/~00~1") == ("~1", "~0/")


@pytest.mark.parametrize("number", [b"0.10", b"1E-8", b"-0", b"123456789012345678901234567890.10"])
def test_digits_stay_as_they_are(number: bytes) -> None:
    document = b'[ 1 , {"a" : [ [%s] , 2]}]' % number
    assert resolve_pointer(document, parse_pointer("/1/a/0/0")) == number
    assert resolve_pointer(b" %s\n" % number, ()) == number


@pytest.mark.parametrize(
    ("document", "pointer"),
    [
        (b"{}", "/a"),
        (b"[1]", "/1"),
        (b"[1]", "/-1"),
        (b"[1]", "/00"),
        (b"[1]", "/-"),
        (b"[1]", "/a"),
        (b"[1]", "/" + "9" * 5_000),
        (b"[1]", "/٠"),
        (b"1", "/0"),
        (b'"0"', "/0"),
        (b"", "/0"),
    ],
)
def test_what_points_to_nothing(document: bytes, pointer: str) -> None:
    with pytest.raises(LookupError):
        resolve_pointer(document, parse_pointer(pointer))


def test_what_is_not_json() -> None:
    with pytest.raises(msgspec.DecodeError):
        resolve_pointer(b'{"a": 1', ("a",))
