"""The site's side of the Query shape: keys, submitted sequences, encrypted queries, scores."""
