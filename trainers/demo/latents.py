"""Scenes drawn once, encoded once: what the diffusion model is trained on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny
from jaxtyping import Float16, Int64
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...pcpo import scenes


@dataclass(frozen=True, slots=True)
class Latents:
    """Encoded drawings.

    Attributes:
        latents: one a drawing.
        scene: which of `scenes.split().training` each shows.
    """

    latents: Float16[Tensor, "b 4 8 8"]
    scene: Int64[Tensor, " b"]


@torch.no_grad()
def cache(vae: AutoencoderTiny, file: Path, count: int, seed: int) -> Latents:
    """Draw and encode training scenes on dark ground, or read them where that was done before.

    A light ground as well doubles what so small a network has to learn.

    Args:
        vae: the trained autoencoder.
        file: where the latents are kept, safetensors.
        count: number of drawings; every scene is drawn about equally often.
        seed: of the drawings.

    Returns:
        The latents.
    """
    if not file.exists():
        training = scenes.split().training
        rng = np.random.default_rng(seed)
        order = rng.permutation(np.arange(count) % len(training))
        encoded = []
        for chunk in np.array_split(order, max(1, count // 64)):
            drawn = np.stack([scenes.draw(training[i], rng, is_light=False) for i in chunk])
            x = torch.from_numpy(drawn).permute(0, 3, 1, 2).float() / 127.5 - 1
            with torch.autocast("cpu", torch.bfloat16):
                z = vae.encoder(x.contiguous(memory_format=torch.channels_last))
            encoded.append(z.half().contiguous())
        save_file({"latents": torch.cat(encoded), "scene": torch.from_numpy(order)}, file)
    found = load_file(file)
    return Latents(found["latents"], found["scene"])
