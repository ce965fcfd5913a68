"""nightsplit demo: an example played as nights and days, beside its baselines."""
