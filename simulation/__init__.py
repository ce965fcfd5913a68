"""Simulation of a whole run in one process: a broker and a run store in memory, seeded faults, a manual clock."""
