"""The site's side of the Stream shape: the bottom, its batches, what is sent when."""
