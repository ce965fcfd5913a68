"""Everything that touches patient data. Never imports the server's side."""
