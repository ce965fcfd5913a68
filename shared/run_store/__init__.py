"""What the workers of a run know of each other besides their messages."""
