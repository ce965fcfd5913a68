"""Approval of runs, and the log of what left the hospital."""
