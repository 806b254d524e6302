"""The ways in for clients: ASGI under Hypercorn, and native on trio."""
