"""Contract between site and server, and the machinery of both."""
