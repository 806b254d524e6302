"""The configured application with the recorder between it and the server."""

from harness import recorder

from trading_push.asgi import app

recorder.install()
__all__ = ["app"]
