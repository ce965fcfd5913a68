"""Server's side of the Query shape: it answers queries to the model of a finished run."""
