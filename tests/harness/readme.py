"""The programs that the README prints."""

from __future__ import annotations

import re

from harness.support import TESTS

README = (TESTS.parent / "README.md").read_text(encoding="utf-8")


def block(name: str) -> str:
    """The fenced block that is marked as tested by this name."""
    (found,) = re.findall(rf"<!-- tested: {name} -->\n```\w+\n(.*?)^```$", README, re.S | re.M)
    return found
