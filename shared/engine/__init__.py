"""The machinery that runs a role, and makes it exactly-once in effect."""
