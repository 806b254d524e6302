"""Times and amounts in the form of the wire."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trading_push.models import milliseconds, plain_decimal


@given(st.datetimes())
def test_a_time_is_rounded_down_to_its_millisecond(moment: datetime) -> None:
    epoch = datetime(1970, 1, 1)
    assert milliseconds(moment) == (moment - epoch) // timedelta(milliseconds=1)


def test_a_time_without_a_zone_is_utc() -> None:
    moment = datetime(2025, 11, 20, 2, 13, 20, 123_999)
    east = timezone(timedelta(hours=8))
    assert milliseconds(moment) == 1763604800123
    assert milliseconds(moment.replace(tzinfo=UTC)) == 1763604800123
    assert milliseconds(moment.replace(tzinfo=east)) == 1763604800123 - 8 * 3_600_000


@pytest.mark.parametrize(
    ("value", "plain"), [("1E+3", "1000"), ("1.50", "1.50"), ("-2E-7", "-0.0000002"), ("0", "0")]
)
def test_a_decimal_is_plain(value: str, plain: str) -> None:
    assert plain_decimal(Decimal(value)) == plain


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "sNaN"])
def test_a_decimal_that_is_no_amount_is_refused(value: str) -> None:
    with pytest.raises(ValueError, match="not a finite number"):
        plain_decimal(Decimal(value))
