"""The server's side of the Round shape: combines what sites trained."""
