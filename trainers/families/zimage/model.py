"""Z-Image: a transformer on 16-channel latents, Qwen3-4B's tokens, FLUX.1's autoencoder.

Sigma, the share of noise, is in [0, 1]; the velocity is eps - x0. The network itself is told
1 - sigma and gives x0 - eps.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from .. import autoencoder
from ..assemble import assemble
from ..embeds import Embeds
from ..errors import ModelError
from ..files import Files, Parts
from ..flow import FlowSchedule
from ..qwen_module import QwenModule
from ..source import read_config
from ..spec import FamilySpec
from ..text.files import encoders_in, part_tensors
from ..text.qwen import Qwen3, Reading, qwen_from_files, qwen_from_folder
from ..weights import open_weights
from .file import CONFIGS, load_transformer
from .header import is_turbo, judge_zimage_config, judge_zimage_parts
from .network import ZImageTransformer2DModel
from .spec import ZIMAGE

Latents = Float[Tensor, "b c h w"]

READING = Reading(
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n", layers=(-2,), is_padded=False
)

_TURBO_SHIFT = 3.0


@dataclass(eq=False)
class ZImage(QwenModule):
    """A Z-Image model, frozen and in eval mode; `Family` describes its methods.

    Attributes:
        transformer: the denoising network, in `dtype`; trained through adapters or whole.
        vae: the autoencoder, in its own dtype.
        text: Qwen3-4B; None once released.
        schedule: the sigmas it was trained with.
        dtype: that the network computes in; float16 overflows.
    """

    spec: ClassVar[FamilySpec] = ZIMAGE
    name: ClassVar[str] = ZIMAGE.name
    lora_targets: ClassVar[tuple[str, ...]] = ZIMAGE.lora_targets
    base_model_version: ClassVar[str] = ZIMAGE.lora_base

    transformer: ZImageTransformer2DModel
    vae: autoencoder.Autoencoder
    text: Qwen3 | None
    schedule: FlowSchedule
    dtype: torch.dtype

    def __post_init__(self) -> None:
        if self.dtype == torch.float16:
            raise ModelError("Z-Image overflows in float16: load it in bfloat16 or float32")
        config: Any = self.transformer.config
        self._freeze(config.cap_feat_dim)

    def encode(self, prompts: list[str]) -> Embeds:
        """Hidden states of prompts in their template, as many as each has tokens, float32.

        `RuntimeError` after `release_text_encoder`.
        """
        return Embeds.from_rows(prompts, self.states(prompts))

    def predict(self, latents: Latents, sigma: Tensor, prompt_embeds: Embeds) -> Latents:
        """The network's velocity, float32, with gradients if they are on.

        Latents and embeddings are cast to the network's dtype; sigma, in [0, 1], is one for all or
        one per sample. `ValueError` if the embeddings have no lengths.
        """
        if prompt_embeds.lengths is None:
            raise ValueError("the prompt embeddings have no lengths: they are not Z-Image's")
        time = 1 - sigma.to(latents.device, torch.float32).expand(len(latents))
        clean_minus_noise = self.network(
            latents.to(self.dtype),
            time,
            prompt_embeds.tokens.to(self.dtype),
            prompt_embeds.lengths,
            is_ragged=prompt_embeds.is_ragged,
        )
        return -clean_minus_noise.float()


# --- loading -------------------------------------------------------------------------------------


def load_folder(
    path: Path, *, dtype: torch.dtype, vae_dtype: torch.dtype, parts: Parts = "all"
) -> ZImage:
    """Load a diffusers folder on the CPU.

    `dtype` is of the network and the text encoder; `parts` as in `load_family`.
    """
    config = read_config(path / "transformer" / "config.json")
    judge_zimage_config(config, str(path))
    kind: Any = ZImageTransformer2DModel
    tensors = part_tensors(path / "transformer", dtype, is_outline=parts == "text")
    return ZImage(
        transformer=assemble(lambda: kind.from_config(config), tensors, f"the network in {path}"),
        vae=autoencoder.autoencoder_from_folder(path / "vae", dtype=vae_dtype),
        text=None if parts == "network" else qwen_from_folder(path, READING, dtype),
        schedule=FlowSchedule.of_folder(path),
        dtype=dtype,
    )


def load_files(
    files: Files, *, dtype: torch.dtype, vae_dtype: torch.dtype, parts: Parts = "all"
) -> ZImage:
    """Load a checkpoint, or a network's file with others beside it, on the CPU.

    A file of `files` replaces that part of the checkpoint. `dtype` is of the network and the text
    encoder; `parts` as in `load_family`.
    """
    checkpoint = open_weights(files.network)
    given = [open_weights(path) for path in files.text_encoders]
    vae = None if files.vae is None else open_weights(files.vae)
    judge_zimage_parts(checkpoint.header, [w.header for w in given], vae and vae.header)
    schedule = FlowSchedule.of_folder(CONFIGS)
    if is_turbo(files.network):
        schedule = replace(schedule, shift=_TURBO_SHIFT)
    places, tokenizer = encoders_in(checkpoint, given), files.qwen_tokenizer
    return ZImage(
        transformer=load_transformer(
            checkpoint.outline() if parts == "text" else checkpoint, dtype=dtype
        ),
        vae=autoencoder.load_autoencoder(vae or checkpoint, CONFIGS, dtype=vae_dtype),
        text=None if parts == "network" else qwen_from_files(places, READING, tokenizer, dtype),
        schedule=schedule,
        dtype=dtype,
    )
