"""A broker for one host, in a folder: SQLite and files."""
