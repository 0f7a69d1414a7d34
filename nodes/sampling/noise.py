"""Noise as `pcpo sample` draws it: one stream an image, told by the seed and its place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from ...pcpo import noise_streams
from ..errors import NodeError


def stream_noise(
    seed: int, images: Sequence[int], num_steps: int, shape: Sequence[int]
) -> Float[Tensor, "b n_plus_1 *d"]:
    """The noise of a batch, each image from the stream that `pcpo sample` gives it.

    Args:
        images: which image of the batch each one is, from 0.

    Returns:
        Initial noise and one draw a step, float32 on the CPU.
    """
    # with one draw more than asked for, the first does not depend on how many there are
    keys = [("sample", int(seed), 0, int(image)) for image in images]
    return noise_streams(keys, max(1, num_steps), shape)[:, : num_steps + 1]


@dataclass(frozen=True, slots=True)
class StreamNoise:
    """A NOISE that gives each image the first draw of its own stream.

    Attributes:
        seed: of the batch; the sampler draws the other steps' noise from it too.
    """

    seed: int

    def generate_noise(self, latent: dict[str, Any]) -> Float[Tensor, "b *d"]:
        """The initial noise of a LATENT batch, on the CPU."""
        samples = plain_latents(latent)
        images = batch_places(latent)
        return stream_noise(self.seed, images, 0, samples.shape[1:])[:, 0]


def plain_latents(latent: dict[str, Any]) -> Float[Tensor, "b *d"]:
    """The latents of a LATENT."""
    samples = latent["samples"]
    if samples.is_nested:
        raise NodeError(
            "this LATENT holds video and sound together, which PCPO's nodes cannot sample; "
            "use RandomNoise and SamplerCustomAdvanced"
        )
    if samples.shape[0] == 0:
        raise NodeError("the LATENT batch is empty; give it at least one image")
    return samples


def batch_places(latent: dict[str, Any]) -> list[int]:
    """Which image of its first batch each one is; Latent From Batch keeps count."""
    places = latent.get("batch_index") or range(len(latent["samples"]))
    return [int(place) for place in places]
