"""From a source to the broker: who is asked for and when, one call of a source, and its answers."""
