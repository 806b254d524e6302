"""A real-time push server for trading back ends, on trio."""
