"""The server's side of the Stream shape: the top, and in which order it learns from whom."""
