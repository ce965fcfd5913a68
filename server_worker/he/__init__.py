"""A sequence model on ciphertexts: what a server computes that never sees a number."""
