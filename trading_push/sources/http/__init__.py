"""Accounts from an HTTP service."""
