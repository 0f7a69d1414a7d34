"""Models of the published sizes with random weights: time and memory do not depend on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from ..families.assemble import assemble
from ..families.source import read_config
from ..families.spec import FamilySpec
from ..job.prompts import PromptSplit
from ..run.conditioning import Conditioning, SharedEmbeds
from ..run.setup import Loaded

TINY_TEXT = 32
"""Tokens of a prompt of a tiny network."""


def random_model(
    spec: FamilySpec, dtype: torch.dtype, device: torch.device, *, is_tiny: bool, waits: bool
) -> Loaded:
    """A family's published model and one prompt, random but for their shapes.

    Args:
        dtype: of the network.
        device: where numbers are drawn.
        is_tiny: a network of the same kind for tests on a CPU.
        waits: whether the weights go to main memory, as those of a file do.
    """
    costs, place = spec.part("costs"), torch.device("cpu") if waits else device
    vae_config = _config(spec, 1)
    if is_tiny:
        vae_config["block_out_channels"] = [32] * len(vae_config["block_out_channels"])
    kind = getattr(costs, "AUTOENCODER", AutoencoderKL)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        network = random_network(spec, dtype, device, place, is_tiny=is_tiny)
        vae = _drawn(lambda: kind.from_config(vae_config), torch.float32, device, place)
        family = costs.model_of(network, vae, dtype)
        text = TINY_TEXT if is_tiny else spec.text
        prompts = costs.random_prompts(family.network.config, 2, text).to(dtype)
    embeds = SharedEmbeds(prompts[:1], torch.tensor([0]))
    return Loaded(family, Conditioning(embeds, prompts[1:]), PromptSplit(("a prompt",), ()))


def random_network(
    spec: FamilySpec,
    dtype: torch.dtype,
    device: torch.device,
    place: torch.device,
    *,
    is_tiny: bool,
) -> nn.Module:
    """Its network alone, drawn on a device and kept at a place."""
    costs, config = spec.part("costs"), _config(spec, 0)
    config |= costs.TINY if is_tiny else {}
    return _drawn(lambda: costs.COUNTABLE.make(config, ()), dtype, device, place)


def _config(spec: FamilySpec, part: int) -> dict[str, Any]:
    """The published config of the network, 0, or of the autoencoder, 1."""
    folder = Path(str(spec.part("costs").__file__)).parent / "configs"
    return read_config(folder / spec.folders[part] / "config.json")


def _drawn(make: Any, dtype: torch.dtype, device: torch.device, place: torch.device) -> nn.Module:
    """A module drawn tensor by tensor: the device never holds the whole where it has to wait."""
    with torch.device("meta"):
        expected = make().state_dict()
    tensors = {
        name: _draw(name, tensor, dtype, device).to(place) for name, tensor in expected.items()
    }
    return assemble(make, tensors, "a random network")


def _draw(name: str, like: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Random numbers that keep activations of size 1; scales are 1 and shifts 0."""
    if not like.is_floating_point():
        return torch.zeros(like.shape, dtype=like.dtype, device=device)
    if like.ndim >= 2:
        drawn = torch.randn(like.shape, dtype=dtype, device=device)
        return drawn.mul_(like[0].numel() ** -0.5)
    is_scale = name.endswith((".weight", "running_var"))
    return torch.full(like.shape, float(is_scale), dtype=dtype, device=device)
