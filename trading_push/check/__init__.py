"""Check all that a server needs, without serving: `trading-push check`."""
