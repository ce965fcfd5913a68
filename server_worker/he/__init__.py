"""Evaluation of a sequence model on ciphertexts."""
