"""Stable Diffusion 1.x: a UNet on 4-channel latents, one CLIP text encoder, a VAE of factor 8."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from jaxtyping import Float, Float64
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from ..embeds import Embeds
from ..errors import ModelError
from ..files import Files, Parts
from ..module import Module
from ..scheduler import SchedulerConfig
from ..sizes import check_sides
from . import folder, single_file
from .spec import SD1

log = logging.getLogger(__name__)


@dataclass(eq=False)
class StableDiffusion(Module):
    """An SD1.x model, frozen and in eval mode; `Family` describes its methods.

    Attributes:
        unet: the denoising network, in `dtype`; trained through adapters or whole.
        vae: the autoencoder, in its own dtype.
        text_encoder: CLIP, float32; None once released.
        scheduler_config: the noise schedule and what the network predicts.
        max_prompt_length: tokens of a prompt that the text encoder takes.
        dtype: that the network computes in.
    """

    name: ClassVar[str] = SD1.name
    lora_targets: ClassVar[tuple[str, ...]] = SD1.lora_targets

    unet: UNet2DConditionModel
    vae: AutoencoderKL | AutoencoderTiny
    text_encoder: CLIPTextModel | None
    tokenizer: CLIPTokenizer
    scheduler_config: SchedulerConfig
    dtype: torch.dtype

    def __post_init__(self) -> None:
        self._network: Any = self.unet
        self.max_prompt_length: int = 0
        for module in (self.unet, self.vae, self.text_encoder):
            if module is not None:
                module.requires_grad_(False).eval()
        if self.text_encoder is not None:
            self._check_text(self.text_encoder)

    def _check_text(self, text_encoder: CLIPTextModel) -> None:
        config = text_encoder.config
        self.max_prompt_length = config.max_position_embeddings
        if len(self.tokenizer) > config.vocab_size:
            raise ModelError(
                f"the tokenizer knows {len(self.tokenizer)} tokens and the text encoder "
                f"{config.vocab_size}: they belong to different models"
            )
        if config.hidden_size != self._unet_config.cross_attention_dim:
            raise ModelError(
                f"the text encoder is {config.hidden_size} wide and the network expects "
                f"{self._unet_config.cross_attention_dim}: they belong to different models"
            )

    @property
    def _unet_config(self) -> Any:  # diffusers calls it a dict, but its fields are attributes
        return self.unet.config

    @property
    def _vae_config(self) -> Any:
        return self.vae.config

    @property
    def network(self) -> Any:
        """The module that is trained: the UNet, or its wrapper."""
        return self._network

    @network.setter
    def network(self, wrapped: Any) -> None:
        self._network = wrapped

    @property
    def text_modules(self) -> list[nn.Module]:
        return [] if self.text_encoder is None else [self.text_encoder]

    @property
    def base_model_version(self) -> str:
        """The base's name in LoRA managers ("sd_v1", "sd_v1_v" for v-prediction)."""
        is_v = self.scheduler_config.prediction_type == "v_prediction"
        return "sd_v1_v" if is_v else "sd_v1"

    @property
    def schedule(self) -> SchedulerConfig:
        return self.scheduler_config

    @property
    def alpha_bars(self) -> Float64[Tensor, "n"]:
        """Cumulative alphas of the training schedule, decreasing; float64 on the CPU."""
        return self.scheduler_config.alpha_bars()

    @property
    def vae_scale(self) -> int:
        """Pixels along the side of one latent point: 8."""
        return 2 ** (len(self._vae_config.block_out_channels) - 1)

    @property
    def native_resolution(self) -> tuple[int, int]:
        """(width, height) in pixels that the model was made for: 512 x 512 for SD1.x."""
        size = self._unet_config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return width * self.vae_scale, height * self.vae_scale

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        """(channels, height, width) of a latent, for the width and height of an image in pixels.

        `ValueError` if a side is not a positive multiple of the VAE's factor.
        """
        scale = self.vae_scale
        check_sides(width, height, scale)
        return self._unet_config.in_channels, height // scale, width // scale

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Embeds:
        """Prompt embeddings: CLIP's last hidden state after its final norm, padded to 77 tokens.

        What exceeds 77 tokens is cut off and logged, as in diffusers' pipeline. Float32, on the
        model's device, nothing pooled; `RuntimeError` after `release_text_encoder`.
        """
        if self.text_encoder is None:
            raise RuntimeError("the text encoder was released: encode all prompts before that")
        length = self.max_prompt_length
        for prompt in prompts:
            count = self.prompt_length(prompt)
            if count > length:
                log.warning("prompt of %d tokens cut to %d: %.60s...", count, length, prompt)
        tokens = self.tokenizer(
            prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )
        ids = tokens.input_ids.to(self.text_encoder.device)
        return Embeds.from_encoder(prompts, self.text_encoder(ids).last_hidden_state.float())

    def prompt_length(self, prompt: str) -> int:
        return len(self.tokenizer(prompt).input_ids)

    def release_text_encoder(self) -> None:
        self.text_encoder = None

    def predict(
        self,
        latents: Float[Tensor, "b c h w"],
        timestep: Tensor,
        prompt_embeds: Embeds,
    ) -> Float[Tensor, "b c h w"]:
        """The network's raw prediction (noise, v or clean sample: see `scheduler_config`).

        Inputs are cast to the network's dtype and the prediction to float32; there is no autocast.
        `timestep` is 0 to 999, one for all or one per sample.
        """
        return self._network(
            latents.to(self.dtype),
            timestep,
            encoder_hidden_states=prompt_embeds.tokens.to(self.dtype),
            return_dict=False,
        )[0].float()


def load_folder(
    path: Path,
    *,
    dtype: torch.dtype,
    vae_dtype: torch.dtype,
    prediction_type: str | None = None,
    zero_snr: bool | None = None,
    parts: Parts = "all",
) -> StableDiffusion:
    """Load a diffusers folder on the CPU; see `load_family` for the arguments.

    `parts` "network" leaves out the text encoder.
    """
    with_text = parts != "network"
    loaded = folder.load_parts(
        path, dtype, vae_dtype, prediction_type, zero_snr, with_text=with_text
    )
    return StableDiffusion(**vars(loaded), dtype=dtype)


def load_files(
    files: Files,
    *,
    dtype: torch.dtype,
    vae_dtype: torch.dtype,
    prediction_type: str | None = None,
    zero_snr: bool | None = None,
    parts: Parts = "all",
) -> StableDiffusion:
    """The same for a checkpoint, which is one file."""
    path, with_text = files.network, parts != "network"
    loaded = single_file.load_parts(
        path, dtype, vae_dtype, prediction_type, zero_snr, with_text=with_text
    )
    return StableDiffusion(**vars(loaded), dtype=dtype)
