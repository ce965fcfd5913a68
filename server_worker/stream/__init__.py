"""Server's side of the Stream shape: the top, and the order in which it is trained on messages of sites."""
