"""Losses, optimizers, figures of a model, seeds."""
