"""Market data: live from an exchange, from a tape, or simulated."""
