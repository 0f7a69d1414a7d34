"""The reward nodes: make rewards, combine them, and score images with them."""
