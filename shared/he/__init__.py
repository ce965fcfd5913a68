"""Homomorphic encryption on both sides: parameters, packing, weights. Needs the extra `he`."""
