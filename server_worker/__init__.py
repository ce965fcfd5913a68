"""Everything that learns from messages. Never sees raw data."""
