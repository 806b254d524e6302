"""A client in Python, on trio."""
