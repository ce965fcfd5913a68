"""Broker for one host, kept in a folder as SQLite rows and files."""
