"""PCPO Implicit Reward Guider: guidance by the difference between a tuned model and its base."""
