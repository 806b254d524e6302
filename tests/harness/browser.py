"""The browser of this machine, and how tests start it."""

from __future__ import annotations

import shutil
from typing import Final

BROWSERS: Final = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER_FLAGS: Final = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"),
    # It stays until the test ends it.
    "--remote-debugging-port=0",
)


def find_browser() -> str | None:
    """The path of the first browser that is there."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)
