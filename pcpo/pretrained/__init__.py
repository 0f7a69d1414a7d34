"""Pretrained networks: which weights are needed, finding and reading them."""
