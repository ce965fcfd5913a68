"""Quality of the trained models, beside their baselines; and attacks on the messages of a site."""
