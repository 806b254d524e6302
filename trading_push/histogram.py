"""A histogram in plain numbers: cheap to add to, and read only when somebody asks."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

__all__ = ["Histogram"]


class Histogram:
    """How often a value was in each of some buckets.

    Args:
        bounds: The highest value of each bucket, in order; a last one takes all that is higher.
    """

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(bounds) + 1)
        """How many values were in each bucket, those of lower ones left out."""
        self.total = 0.0
        """The sum of all values."""

    def observe(self, value: float, times: int = 1) -> None:
        """Add a value, once or so many times; synchronous."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times
