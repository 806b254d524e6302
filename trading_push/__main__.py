"""`python -m trading_push`: the command line."""

from trading_push.cli.commands import main

main()
