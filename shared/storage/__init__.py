"""Files that survive a crash: atomic writes, SQLite, checkpoints."""
