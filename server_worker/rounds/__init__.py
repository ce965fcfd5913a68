"""Server's side of the Round shape: it combines the updates of sites."""
