"""FLUX.2 [klein] 4B: a transformer on 128-channel latents of 1/16, Qwen3-4B's tokens.

Sigma, the share of noise, is in [0, 1]; the velocity is eps - x0. Prompts have 512 tokens; the
network attends to the padding.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKLFlux2, AutoencoderTiny, Flux2Transformer2DModel
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from .. import autoencoder
from ..assemble import assemble
from ..embeds import Embeds
from ..files import Files, Parts
from ..flow import FlowSchedule
from ..qwen_module import QwenModule
from ..source import read_config
from ..spec import FamilySpec
from ..text.files import encoders_in, part_tensors
from ..text.qwen import Qwen3, Reading, qwen_from_files, qwen_from_folder
from ..times import Times
from ..weights import open_weights
from .file import CONFIGS, load_transformer
from .header import judge_klein_config, judge_klein_parts
from .spec import KLEIN
from .vae import denormalize, load_vae, vae_from_folder

Latents = Float[Tensor, "b c h w"]

READING = Reading(
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
    layers=(9, 18, 27),
    is_padded=True,
)


@dataclass(eq=False)
class Klein(QwenModule):
    """A FLUX.2 [klein] model, frozen and in eval mode; `Family` describes its methods.

    Attributes:
        transformer: the denoising network, in `dtype`; trained through adapters or whole.
        vae: the autoencoder, in its own dtype, its statistics in float32.
        text: Qwen3-4B; None once released.
        schedule: the sigmas it was trained with.
        dtype: that the network computes in.
    """

    spec: ClassVar[FamilySpec] = KLEIN
    name: ClassVar[str] = KLEIN.name
    lora_targets: ClassVar[tuple[str, ...]] = KLEIN.lora_targets
    base_model_version: ClassVar[str] = KLEIN.lora_base

    transformer: Flux2Transformer2DModel
    vae: AutoencoderKLFlux2 | AutoencoderTiny
    text: Qwen3 | None
    schedule: FlowSchedule
    dtype: torch.dtype

    def __post_init__(self) -> None:
        config: Any = self.transformer.config
        self._freeze(config.joint_attention_dim)
        self._times = Times(self.transformer.time_guidance_embed.time_proj)

    def encode(self, prompts: list[str]) -> Embeds:
        """Three hidden states side by side of prompts in their template, float32.

        `RuntimeError` after `release_text_encoder`.
        """
        return Embeds.from_encoder(prompts, torch.stack(self.states(prompts)))

    def predict(self, latents: Latents, sigma: Tensor, prompt_embeds: Embeds) -> Latents:
        """The network's velocity, float32, with gradients if they are on.

        Latents and embeddings are cast to the network's dtype; sigma, in [0, 1], is embedded in
        float32, one for all or one per sample.
        """
        rows, _, height, width = latents.shape
        sigmas = sigma.to(latents.device, torch.float32).expand(rows)
        self._times.set(sigmas)
        tokens, device = prompt_embeds.tokens.to(self.dtype), latents.device
        out = self.network(
            hidden_states=latents.to(self.dtype).flatten(2).transpose(1, 2),
            timestep=sigmas,
            guidance=None,
            encoder_hidden_states=tokens,
            img_ids=positions(height, width, 1, device),
            txt_ids=positions(1, 1, tokens.shape[1], device),
            return_dict=False,
        )[0]
        return out.transpose(1, 2).unflatten(2, (height, width)).float()

    def decode(self, latents: Latents, batch: int = 8) -> UInt8[Tensor, "b 3 height width"]:
        """Decode clean latents in the network's scale, `batch` at a time."""
        raw = denormalize(self.vae, latents.float()).to(self.vae.dtype)
        return autoencoder.decode_raw(self.vae, raw, batch)


def positions(height: int, width: int, length: int, device: torch.device) -> Int[Tensor, "n 4"]:
    """Positions of tokens: 0, row, column, place in the prompt."""
    sides = (1, height, width, length)
    return torch.cartesian_prod(*(torch.arange(side, device=device) for side in sides))


# --- loading -------------------------------------------------------------------------------------


def load_folder(
    path: Path, *, dtype: torch.dtype, vae_dtype: torch.dtype, parts: Parts = "all"
) -> Klein:
    """Load a diffusers folder on the CPU.

    `dtype` is of the network and the text encoder; `parts` as in `load_family`.
    """
    config = read_config(path / "transformer" / "config.json")
    judge_klein_config(config, str(path))
    kind: Any = Flux2Transformer2DModel
    tensors = part_tensors(path / "transformer", dtype, is_outline=parts == "text")
    return Klein(
        transformer=assemble(lambda: kind.from_config(config), tensors, f"the network in {path}"),
        vae=vae_from_folder(path / "vae", dtype=vae_dtype),
        text=None if parts == "network" else qwen_from_folder(path, READING, dtype),
        schedule=schedule_of(path),
        dtype=dtype,
    )


def load_files(
    files: Files, *, dtype: torch.dtype, vae_dtype: torch.dtype, parts: Parts = "all"
) -> Klein:
    """Load a checkpoint, or a network's file with others beside it, on the CPU.

    A file of `files` replaces that part of the checkpoint. `dtype` is of the network and the text
    encoder; `parts` as in `load_family`.
    """
    checkpoint = open_weights(files.network)
    given = [open_weights(path) for path in files.text_encoders]
    vae = None if files.vae is None else open_weights(files.vae)
    judge_klein_parts(checkpoint.header, [w.header for w in given], vae and vae.header)
    places, tokenizer = encoders_in(checkpoint, given), files.qwen_tokenizer
    return Klein(
        transformer=load_transformer(
            checkpoint.outline() if parts == "text" else checkpoint, dtype=dtype
        ),
        vae=load_vae(vae or checkpoint, dtype=vae_dtype),
        text=None if parts == "network" else qwen_from_files(places, READING, tokenizer, dtype),
        schedule=schedule_of(CONFIGS),
        dtype=dtype,
    )


def schedule_of(path: Path) -> FlowSchedule:
    """The schedule of a folder: its shift follows from the image's size and the steps."""
    # diffusers' pipeline and ComfyUI's node compute the shift themselves, whatever the config says
    return replace(FlowSchedule.of_folder(path), is_empirical=True, patch=1)
