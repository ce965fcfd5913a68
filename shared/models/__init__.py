"""Models: partition, weights, published files, and small reference networks."""
