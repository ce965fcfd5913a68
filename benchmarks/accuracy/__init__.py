"""Quality of the trained models, beside their baselines; and attacks on what leaves a site."""
