"""The site's side of the Round shape: trains the whole model, sends what changed."""
