"""Attacks on what a server sees, to measure what it tells about a patient. Run them on data that you may show."""
