"""The link to Hypercorn's inside; nothing else of the package knows it."""
