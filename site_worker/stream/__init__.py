"""The site's side of the Stream shape: the bottom, its batches, the order of its messages."""
