"""SD3 and SD3.5: a transformer on 16-channel latents, CLIP-L, CLIP-G and T5, a VAE of factor 8.

Sigma, the share of noise, is in [0, 1]; the velocity is eps - x0.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import SD3Transformer2DModel
from jaxtyping import Float
from torch import Tensor, nn

from .. import autoencoder
from ..assemble import assemble
from ..embeds import Embeds
from ..files import Files, Parts
from ..flow import FlowSchedule
from ..module import Module
from ..source import read_config
from ..text.files import part_tensors
from ..weights import open_weights
from .file import CONFIGS, load_transformer
from .header import judge_sd3_config, judge_sd3_parts
from .spec import SD3
from .text import TextEncoders, encoders_from_files, encoders_from_folder

log = logging.getLogger(__name__)

Latents = Float[Tensor, "b c h w"]

_FACTOR = 8  # pixels along the side of one latent point


@dataclass(eq=False)
class StableDiffusion3(Module):
    """An SD3 or SD3.5 model, frozen and in eval mode; `Family` describes its methods.

    Attributes:
        transformer: the denoising network, in `dtype`; trained through adapters or whole.
        vae: the autoencoder, in its own dtype.
        text: the text encoders; None once released.
        schedule: the sigmas it was trained with.
        dtype: that the network computes in.
        t5_length: tokens of every prompt for T5; 256 in diffusers, 128 in Flow-GRPO.
    """

    name: ClassVar[str] = SD3.name
    lora_targets: ClassVar[tuple[str, ...]] = SD3.lora_targets

    transformer: SD3Transformer2DModel
    vae: autoencoder.Autoencoder
    text: TextEncoders | None
    schedule: FlowSchedule
    dtype: torch.dtype
    t5_length: int = 256

    def __post_init__(self) -> None:
        self.network: Any = self.transformer
        for module in (self.transformer, self.vae):
            module.requires_grad_(False).eval()
        if self.text is not None:
            self.text.check(self._config.joint_attention_dim, self._config.pooled_projection_dim)
            if self.text.missing and not self.text.is_whole(self._config.pooled_projection_dim):
                log.warning(
                    "the model comes without %s: as in ComfyUI, a missing CLIP's part of the "
                    "prompt embeddings is zero and a missing T5's is left out",
                    " and ".join(self.text.missing),
                )

    @property
    def _config(self) -> Any:  # diffusers calls it a dict, but its fields are attributes
        return self.transformer.config

    @property
    def max_prompt_length(self) -> int:
        """Tokens that T5 takes of a prompt, or CLIP if there is no T5; 0 once released."""
        return 0 if self.text is None else self.text.length(self.t5_length)

    @property
    def base_model_version(self) -> str:
        """Which of the SD3 models this is, by its architecture."""
        if self._config.dual_attention_layers:
            return "sd3.5-m"
        return "sd3.5-l" if self._config.qk_norm else "sd3-m"

    @property
    def native_resolution(self) -> tuple[int, int]:
        """(width, height) in pixels that the model was made for: 1024 x 1024."""
        side = self._config.sample_size * _FACTOR
        return side, side

    @property
    def text_modules(self) -> list[nn.Module]:
        return [] if self.text is None else self.text.modules

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        """(channels, height, width) of one latent, for sides in pixels, multiples of 16.

        `ValueError` if a side is longer than the network's positions reach.
        """
        shape = autoencoder.latent_shape(SD3, width, height)
        points = self._config.pos_embed_max_size * self._config.patch_size
        if max(shape[1:]) > points:
            raise ValueError(
                f"the image is {width} x {height} pixels; this network's positions reach "
                f"{points * _FACTOR} pixels along a side"
            )
        return shape

    def encode(self, prompts: list[str]) -> Embeds:
        """Tokens of both CLIPs side by side, then T5's, and the pooled vectors of both CLIPs.

        Padding is not masked, as in diffusers. What exceeds 77 tokens of CLIP, or `t5_length` of
        T5, is cut off and logged. Float32, on the text encoders' device; `RuntimeError` after
        `release_text_encoder`.
        """
        if self.text is None:
            raise RuntimeError("the text encoders were released: encode all prompts before that")
        config = self._config
        return self.text.encode(
            prompts, config.joint_attention_dim, config.pooled_projection_dim, self.t5_length
        )

    def prompt_length(self, prompt: str) -> int:
        """T5's number of tokens, or CLIP's if there is no T5, including start and end."""
        if self.text is None:
            raise RuntimeError("the text encoders were released: count tokens before that")
        return self.text.count(prompt)

    def release_text_encoder(self) -> None:
        self.text = None

    def predict(self, latents: Latents, sigma: Tensor, prompt_embeds: Embeds) -> Latents:
        """The network's velocity, float32, with gradients if they are on.

        Latents and embeddings are cast to the network's dtype; sigma, in [0, 1], is embedded in
        float32, one for all or one per sample. `ValueError` if the pooled vector is missing.
        """
        if prompt_embeds.pooled is None:
            raise ValueError("the prompt embeddings lack the pooled vector: they are not SD3's")
        times = sigma.to(latents.device, torch.float32) * self.schedule.num_train_timesteps
        return self.network(
            hidden_states=latents.to(self.dtype),
            timestep=times.expand(len(latents)),
            encoder_hidden_states=prompt_embeds.tokens.to(self.dtype),
            pooled_projections=prompt_embeds.pooled.to(self.dtype),
            return_dict=False,
        )[0].float()


# --- loading -------------------------------------------------------------------------------------


def load_folder(
    path: Path, *, dtype: torch.dtype, vae_dtype: torch.dtype, parts: Parts = "all"
) -> StableDiffusion3:
    """Load a diffusers folder on the CPU; it may lack text encoders.

    `dtype` is of the network and T5; `parts` as in `load_family`.
    """
    config = read_config(path / "transformer" / "config.json")
    judge_sd3_config(config, str(path))
    schedule = FlowSchedule.of_folder(path)
    kind: Any = SD3Transformer2DModel
    tensors = part_tensors(path / "transformer", dtype, is_outline=parts == "text")
    return StableDiffusion3(
        transformer=assemble(lambda: kind.from_config(config), tensors, f"the network in {path}"),
        vae=autoencoder.autoencoder_from_folder(path / "vae", dtype=vae_dtype),
        text=None if parts == "network" else encoders_from_folder(path, dtype),
        schedule=schedule,
        dtype=dtype,
    )


def load_files(
    files: Files, *, dtype: torch.dtype, vae_dtype: torch.dtype, parts: Parts = "all"
) -> StableDiffusion3:
    """Load a checkpoint, or a network's file with others beside it, on the CPU.

    A file of `files` replaces that part of the checkpoint. `dtype` is of the network and T5;
    `parts` as in `load_family`.
    """
    checkpoint = open_weights(files.network)
    given = [open_weights(path) for path in files.text_encoders]
    vae = None if files.vae is None else open_weights(files.vae)
    judge_sd3_parts(checkpoint.header, [w.header for w in given], vae and vae.header)
    return StableDiffusion3(
        transformer=load_transformer(
            checkpoint.outline() if parts == "text" else checkpoint, dtype=dtype
        ),
        vae=autoencoder.load_autoencoder(vae or checkpoint, CONFIGS, dtype=vae_dtype),
        text=None
        if parts == "network"
        else encoders_from_files(checkpoint, given, files.t5_tokenizer, dtype),
        schedule=FlowSchedule.of_folder(CONFIGS),
        dtype=dtype,
    )
