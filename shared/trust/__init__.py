"""Identities of a run's participants, and the envelope around each of their messages."""
