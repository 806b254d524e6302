"""`trading-push` with the recorder between the application and the server."""

from harness import recorder

from trading_push.cli.commands import main

recorder.install()
main()
