"""Sequences that leave the site encrypted: keys, what was submitted, what came back."""
