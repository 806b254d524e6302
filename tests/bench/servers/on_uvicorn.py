"""Runs an ASGI application on uvicorn as `uvicorn[standard]` does: uvloop, default logging."""

from __future__ import annotations

from typing import Any

import uvicorn
from common import say


def run(app: Any) -> None:
    config = uvicorn.Config(app, host="127.0.0.1", port=0, backlog=4096)
    listener = config.bind_socket()
    listener.listen(4096)
    say(port=listener.getsockname()[1])
    uvicorn.Server(config).run(sockets=[listener])
