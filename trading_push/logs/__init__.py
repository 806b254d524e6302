"""The log lines: their texts, their formats, and where they are written."""
