"""Speed, beside a baseline of the same run."""
