"""nightsplit demo: an example run as nights and days, compared with its baselines."""
