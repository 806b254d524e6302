"""What the server answers over HTTP beside the WebSocket."""
