"""The site's side of the Round shape: trains the whole model and sends its updates."""
