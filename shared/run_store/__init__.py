"""State that the workers of a run share besides their messages."""
