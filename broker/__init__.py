"""Moves bytes. Knows no tensor and no model."""
