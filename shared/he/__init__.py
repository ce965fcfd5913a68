"""Encrypted arithmetic that both sides know: parameters, packing, weights. Needs the extra `he`."""
