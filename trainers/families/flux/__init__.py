"""FLUX.1: its files and its network."""
