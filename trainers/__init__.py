"""Training: configs, model families, the loop, and the command `pcpo`."""
