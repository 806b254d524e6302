"""The broker: it numbers what is published, keeps the last values, and delivers them."""
