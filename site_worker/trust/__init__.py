"""Decisions of a hospital about a run, which its worker obeys."""
