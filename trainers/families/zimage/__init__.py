"""Z-Image: its files and its network."""
