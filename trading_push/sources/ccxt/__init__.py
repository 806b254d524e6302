"""Accounts and tickers of any exchange, by ccxt."""
