"""Stable Diffusion 1.x: its files, its network and its text encoder."""
