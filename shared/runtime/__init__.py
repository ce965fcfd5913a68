"""A worker as a process: its shift, heartbeat, signals and metrics."""
