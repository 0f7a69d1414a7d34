"""Scenes drawn once and encoded once: the diffusion model's training data.

Like a scraped set, it has two sources that differ in style and in care: pictures on a dark ground
have the right caption, pictures on a light ground that of some other picture. A model of both draws
in both styles and follows its prompt in one: alignment has something to find.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny
from jaxtyping import Bool, Float16, Int64
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...pcpo import scenes
from ..job.files import replace_file

CARELESS = 0.4
"""Share of pictures on a light ground with the caption of another picture."""


@dataclass(frozen=True, slots=True)
class Latents:
    """Encoded drawings.

    Attributes:
        scene: index in `scenes.split().training` of its caption's scene.
        is_light: drawn on a light ground, and so captioned carelessly.
    """

    latents: Float16[Tensor, "b c 8 8"]
    scene: Int64[Tensor, " b"]
    is_light: Bool[Tensor, " b"]


@torch.no_grad()
def cache(
    vae: AutoencoderTiny, file: Path, count: int, seed: int, careless: float = CARELESS
) -> Latents:
    """Draw and encode training scenes, or read them from `file` (safetensors) if it is there.

    Every scene is drawn about equally often; `careless` is the share of pictures, in [0, 1], from
    the careless source.
    """
    if not file.exists():
        training = scenes.split().training
        rng = np.random.default_rng(seed)
        order = rng.permutation(np.arange(count) % len(training))
        is_light = rng.random(count) < careless
        encoded = []
        for chunk in np.array_split(np.arange(count), max(1, count // 64)):
            drawn = np.stack(
                [scenes.draw(training[order[i]], rng, is_light=bool(is_light[i])) for i in chunk]
            )
            x = torch.from_numpy(drawn).permute(0, 3, 1, 2).float() / 127.5 - 1
            with torch.autocast("cpu", torch.bfloat16):
                z = vae.encoder(x.contiguous(memory_format=torch.channels_last))
            encoded.append(z.half().contiguous())
        told = order.copy()
        told[is_light] = rng.permutation(order[is_light])
        tensors = {
            "latents": torch.cat(encoded),
            "scene": torch.from_numpy(told),
            "is_light": torch.from_numpy(is_light),
        }
        with replace_file(file) as fresh:
            save_file(tensors, fresh)
    tensors = load_file(file)
    return Latents(tensors["latents"], tensors["scene"], tensors["is_light"])
