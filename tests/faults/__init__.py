"""Campaigns of kills, faults and mutants, and the oracle that judges them; tests play short ones."""
