"""Devices, and fitting a run into their memory: low-bit weights, offloading, compilation."""
