"""Worker processes: shifts, heartbeat, signals and metrics."""
