"""Put the chart library into the wheel: the bytes that were looked at, or none.

They come from a package of the index (the build requirement `litecharts`), or from the file that
`TRADING_PUSH_CHART_FILE` names. Where neither is there, the wheel is built without, and the page
draws its chart by itself.
"""

from __future__ import annotations

import hashlib
import os
from importlib import resources
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SHA256 = "756b0ba9f58930226d6b8b9d47ad310448ab85d799ea1f7c2c02304777c10b52"
"""Of lightweight-charts.standalone.production.js, version 5.1.0, as npm has it."""
PLACE = "trading_push/web/static"
NOTICE = """TradingView Lightweight Charts(TM) 5.1.0
Copyright (c) 2025 TradingView, Inc. https://www.tradingview.com/

Licensed under the Apache License, Version 2.0, whose text follows.

"""


class ChartHook(BuildHookInterface[Any]):
    """Copies the file, its notice and its licence before a wheel is built."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Copy, or fail if the bytes are others than those recorded here."""
        root = Path(self.root)
        script = root / PLACE / "lightweight-charts.js"
        text = root / PLACE / "lightweight-charts.LICENSE.txt"
        for old in (script, text):
            old.unlink(missing_ok=True)
        content = _content()
        if content is None:
            self.app.display_warning("the chart library is not there: the page draws by itself")
            return
        digest = hashlib.sha256(content).hexdigest()
        if digest != SHA256:
            self.app.abort(
                f"the chart library has the SHA-256 {digest}, not {SHA256}: do not build with it"
            )
        script.write_bytes(content)
        text.write_text(NOTICE + (root / "LICENSES" / "Apache-2.0.txt").read_text("utf-8"), "utf-8")
        for each in (script, text):
            name = f"{PLACE}/{each.name}"
            build_data["artifacts"].append(name)


def _content() -> bytes | None:
    try:
        return resources.files("litecharts").joinpath("js", "lightweight-charts.js").read_bytes()
    except (ImportError, OSError):
        named = os.environ.get("TRADING_PUSH_CHART_FILE")
        return None if named is None else Path(named).read_bytes()
