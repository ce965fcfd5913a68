"""Brokers, which move bytes and know no tensor and no model."""
