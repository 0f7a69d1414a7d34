"""FLUX.2 [klein] 4B: its files, its network and its autoencoder."""
