"""Losses, optimizers, metrics and seeds."""
