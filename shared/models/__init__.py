"""Cutting a model, and small reference networks."""
