"""Sequences leave the site encrypted: its keys, and what it sends and reads with them."""
