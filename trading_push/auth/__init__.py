"""Who a connection is: tokens, their keys, and those that are revoked."""
