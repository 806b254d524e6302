"""From a source to the broker: who is asked for, when, and what becomes of the answers."""
