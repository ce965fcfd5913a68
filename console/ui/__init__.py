"""Text, progress and logs as a user sees them."""
