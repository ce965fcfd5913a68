"""How good the trained models are, beside their baselines; and attacks on what leaves a site."""
