"""Accounts from any SQL database, and PostgreSQL's word that they have changed."""
