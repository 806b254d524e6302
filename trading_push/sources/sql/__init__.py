"""Accounts from any SQL database; PostgreSQL also tells when they have changed."""
