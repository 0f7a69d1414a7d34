"""PCPO Compare Models: the same prompts and noise through two models, side by side."""
