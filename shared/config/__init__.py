"""Configuration files as frozen objects."""
