"""How fast things are, beside a baseline of the same run."""
