"""The part of the tables that fits a terminal, and a line that says what does not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import attrs
from rich.cells import cell_len, set_cell_size
from rich.segment import Segment
from rich.style import Style

from trading_push.cli.keys import Key

__all__ = ["Section", "SegmentLine", "Viewport"]

SegmentLine = list[Segment]

_DIM: Final = Style(dim=True)
_REVERSE: Final = Style(reverse=True)
_COLUMNS_AT_ONCE: Final = 8


@attrs.frozen
class Section:
    """The lines of one table; the first one, its title, is not moved sideways."""

    title: str
    lines: Sequence[SegmentLine]


class Viewport:
    """Which of the lines and columns are seen; keys move it."""

    def __init__(self, *, has_keys: bool, is_unicode: bool = True) -> None:
        self._has_keys = has_keys
        up, down, left, right, self._cut = "↑↓←→…" if is_unicode else "^v<>."
        self._arrows = {"above": up, "below": down, "left": left, "right": right}
        self._top = 0  # the first line that is seen
        self._left = 0  # the first column that is seen
        self._page = 1  # how many lines were seen the last time

    def move(self, key: Key) -> None:
        """Move as a key says; the next `frame` keeps it within what there is."""
        match key:
            case "up":
                self._top -= 1
            case "down":
                self._top += 1
            case "page up":
                self._top -= max(1, self._page - 1)
            case "page down":
                self._top += max(1, self._page - 1)
            case "home":
                self._top = self._left = 0
            case "end":
                self._top = 10**9
            case "left":
                self._left -= _COLUMNS_AT_ONCE
            case "right":
                self._left += _COLUMNS_AT_ONCE
        self._top, self._left = max(0, self._top), max(0, self._left)

    def frame(
        self, head: SegmentLine, sections: Sequence[Section], width: int, height: int
    ) -> list[SegmentLine]:
        """Make what fits: the head, a part of the sections, and what is left out of them."""
        lines = [
            (line, is_title) for each in sections for line, is_title in _with_titles(each.lines)
        ]
        widest = max([_width(line) for line, is_title in lines if not is_title], default=0)
        self._page = page = max(1, height - 2)
        self._top = min(self._top, max(0, len(lines) - page))
        self._left = min(self._left, max(0, widest - width))
        until = self._top + page
        seen = [
            self._crop(line, 0 if is_title else self._left, width)
            for line, is_title in lines[self._top : until]
        ]
        foot = self._foot(
            {"above": self._top, "below": max(0, len(lines) - until)},
            {"left": self._left, "right": max(0, widest - self._left - width)},
            _titles_beyond(sections, until),
            width,
        )
        head = self._crop(head, 0, width)
        # Where there is room for neither head nor foot, the values come first.
        if height < 3:
            return [*seen, foot][:height]
        return [head, *seen, *[[]] * (page - len(seen)), foot]

    def _foot(
        self, lines: dict[str, int], columns: dict[str, int], below: Sequence[str], width: int
    ) -> SegmentLine:
        counts = [
            f"{self._arrows[where]} {count} {unit if count > 1 else unit[:-1]}"
            for unit, left_out in (("lines", lines), ("columns", columns))
            for where, count in left_out.items()
            if count
        ]
        parts = ["  ".join(counts)]
        if below:
            parts.append("below: " + ", ".join(below))
        parts.append("q quits" if self._has_keys else "Ctrl-C quits")
        if self._has_keys and counts:
            vertical, sideways = any(lines.values()), any(columns.values())
            parts.append(("j k PgUp PgDn Home End" * vertical + " h l" * sideways).strip())
        # What is most missed stands first: the rest may be cut.
        text = " | ".join(filter(None, parts))
        if cell_len(text) > width:
            text = set_cell_size(text, max(0, width - 1)) + self._cut * (width > 0)
        return [Segment(text, _REVERSE if counts else _DIM)]

    def _crop(self, line: SegmentLine, left: int, width: int) -> SegmentLine:
        """Take some columns of a line; a mark stands at its end where there is more of it."""
        is_longer = _width(line) - left > width
        line = Segment.adjust_line_length(_behind(line, left), width - is_longer, pad=is_longer)
        return [*line, Segment(self._cut, _DIM)] if is_longer else line


def _with_titles(lines: Sequence[SegmentLine]) -> Iterator[tuple[SegmentLine, bool]]:
    """The lines of a section, with whether each is its title."""
    return zip(lines, (number == 0 for number in range(len(lines))), strict=True)


def _width(line: SegmentLine) -> int:
    """How many columns a line takes, without the blanks at its end."""
    text = "".join([segment.text for segment in line])
    return cell_len(text.rstrip())


def _behind(line: SegmentLine, left: int) -> SegmentLine:
    """What is left of a line without its first columns."""
    for number, segment in enumerate(line):
        if left < segment.cell_length:
            # A wide character that the cut goes through leaves a blank.
            return [segment.split_cells(left)[1], *line[number + 1 :]] if left else line[number:]
        left -= segment.cell_length
    return []


def _titles_beyond(sections: Sequence[Section], until: int) -> list[str]:
    """The titles of the sections that go on below a line."""
    titles, end = [], 0
    for section in sections:
        end += len(section.lines)
        if end > until:
            titles.append(section.title)
    return titles
