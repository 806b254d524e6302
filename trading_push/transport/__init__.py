"""Streams to peers: those that connect to us, and those that we open."""
