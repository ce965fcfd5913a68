"""The contract between site and server, and the machinery that both need."""
