"""How bytes reach a peer: the doors, and the stream under them."""
