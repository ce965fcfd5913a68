"""A sequence judge on ciphertexts: what a server computes that never sees a number."""
