"""How a command ends."""

STOPPED = "stopped; start the same command again to go on"
INTERRUPTED, CRASHED = 130, 70
"""Exit codes: as a shell reports Ctrl-C, and EX_SOFTWARE of sysexits.h."""
