"""Engine: runs a role with exactly-once effects."""
