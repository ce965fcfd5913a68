"""Measurements: speed as ratios, accuracy with its baselines."""
