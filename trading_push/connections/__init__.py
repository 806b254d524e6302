"""Connections: the life of each, and the registry of who subscribes to what."""
