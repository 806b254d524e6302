"""Where accounts and tickers come from; `base` says what a source and a feed have to offer."""
