"""Stable Diffusion XL: a UNet with size conditions, CLIP-L and CLIP-G."""
