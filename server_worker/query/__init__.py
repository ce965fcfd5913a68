"""The server's side of the Query shape: takes queries as they come, and keeps public keys alone."""
