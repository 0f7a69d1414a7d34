"""Stable Diffusion 3.x: its files, its network and its text encoders."""
