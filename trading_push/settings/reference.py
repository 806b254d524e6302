"""Write what mirrors the settings: the table of the documentation, and the sample file.

`nox -s settings` runs this; a test fails if one of them differs from the descriptions.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from trading_push.settings.definition import Description, descriptions
from trading_push.settings.schema import Settings

__all__ = ["PAGE", "SAMPLE", "default_text", "page_with_table", "sample", "table"]

PAGE: Final = "docs/configuration.md"
"""The page with the table, from the root of the repository."""
SAMPLE: Final = "trading_push/data/trading-push.toml"
"""The sample file, from the root of the repository."""

_BEGIN: Final = "<!-- settings -->\n"
_END: Final = "<!-- end of settings -->\n"
_WIDTH: Final = 100

_SAMPLE_HEAD: Final = """\
Settings of trading-push. A line like "# port = 8000" shows a default: remove the "# " to change
it. A line like "#! path = ..." is an example of a setting that has no default: remove the "#! ".
The environment goes before this file (TRADING_PUSH_SERVER_PORT=9000), and a flag before both
(--port 9000). Relative paths start at the directory of this file.
"""


def default_text(value: Any) -> str:
    """A default as TOML."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'"{value}"'
    return f"{value:.15g}"


def table() -> str:
    """The table of all settings, in Markdown."""
    rows = ["| setting | default | unit | meaning |", "|---|---|---|---|"]
    for each in descriptions(Settings):
        default = "not set" if each.default is None else f"`{default_text(each.default)}`"
        cells = [f"`{each.path}`", default, each.unit, each.meaning]
        rows.append("|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|")
    return "\n".join(rows) + "\n"


def page_with_table(text: str) -> str:
    """Put the table into the text of a page, between the two comments that mark its place."""
    before, _, rest = text.partition(_BEGIN)
    _, found, after = rest.partition(_END)
    if not found:
        raise ValueError(f"the page needs the lines {_BEGIN.strip()} and {_END.strip()}")
    return f"{before}{_BEGIN}{table()}\n{_END}{after}"


def sample() -> str:
    """The sample file: every setting with its meaning, and its default or an example."""
    lines = [f"# {line}" for line in _SAMPLE_HEAD.splitlines()]
    section = ""
    tables: list[Description] = []  # of this section; in TOML they come after its other settings
    for each in descriptions(Settings):
        if each.section != section:
            lines += _tables(tables)
            tables.clear()
            section = each.section
            lines += ["", *_comment(each.of_section), f"[{section}]"]
        elif not section and not (each.example or "").startswith("["):
            lines.append("")
        if each.example is not None and each.example.startswith("["):
            tables.append(each)
            continue
        lines += _comment(each.meaning)
        if each.default is None:
            lines.append(f"#! {each.name} = {each.example}")
        else:
            lines.append(f"# {each.name} = {default_text(each.default)}")
    lines += _tables(tables)
    return "\n".join(lines) + "\n"


def _tables(tables: list[Description]) -> Iterator[str]:
    for each in tables:
        yield ""
        yield from _comment(each.meaning)
        yield from (f"#! {line}" for line in (each.example or "").splitlines())


def _comment(text: str) -> list[str]:
    # A comment may not look like a setting that is commented out.
    return [f"# {line}" for line in textwrap.wrap(text, _WIDTH - 2, break_on_hyphens=False)]


def main(root: Path) -> None:
    """Write both below the root of the repository."""
    page = root / PAGE
    page.write_text(page_with_table(page.read_text(encoding="utf-8")), encoding="utf-8")
    (root / SAMPLE).write_text(sample(), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
