"""What the README and the pages of `docs/` print, as the tests run it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

ROOT: Final = next(each for each in Path(__file__).parents if (each / "pyproject.toml").is_file())

PAGES: Final = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md")))
}
"""The text of each page, by its path."""
README: Final = PAGES["README.md"]
PRINTED: Final = "\n".join(PAGES.values())


def block(name: str) -> str:
    """The fenced block, of whichever page, that is marked as tested by this name."""
    (found,) = re.findall(rf"<!-- tested: {name} -->\n```\w+\n(.*?)^```$", PRINTED, re.S | re.M)
    return found
