"""Names of an evaluation's metrics for people, and which way is better. No torch."""

from __future__ import annotations

WORDS = {
    "fid": "FID, Fréchet distance of Inception-2015 features; less is nearer to the base's images",
    "fd_dinov2": "FD-DINOv2, Fréchet distance of DINOv2 features; less is nearer",
    "fd_random": "Fréchet distance of a fixed random network's features: an offline stand-in, not "
    "FID; less is nearer",
    "inception_score": "Inception Score; more is sharper and more varied over all prompts",
    "lpips_diversity": "mean LPIPS of two images of a prompt; more is more diverse",
    "pixel_diversity": "mean RMS of the pixels of two images of a prompt, an offline stand-in; "
    "more is more diverse",
    "ssim_diversity": "1 less the mean SSIM of two images of a prompt, an offline stand-in; more "
    "is more diverse",
    "drift_pixels": "RMS of the pixels to the base's image of the same prompt and seed; less is "
    "nearer",
}
LESS_IS_BETTER = {"fid", "fd_dinov2", "fd_random", "drift_pixels"}
"""Metrics of which less is better; of all others more is."""
