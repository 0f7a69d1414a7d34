"""Stable Diffusion XL: a UNet on 4-channel latents, CLIP-L and CLIP-G, a VAE of factor 8.

Beside the timestep the network takes CLIP-G's pooled vector and six sizes: of the image that was
trained on, of its crop's corner, and of the image that is wanted.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import UNet2DConditionModel
from jaxtyping import Float
from torch import Tensor, nn

from .. import autoencoder
from ..assemble import assemble
from ..embeds import Embeds
from ..errors import ModelError
from ..files import Files, Parts
from ..header import Header
from ..module import Module
from ..prediction import prediction_of
from ..scheduler import SchedulerConfig
from ..source import read_config
from ..text.files import part_tensors
from ..weights import open_weights
from .file import CONFIGS, load_unet
from .header import SIZES, distilled, judge_sdxl_config, judge_sdxl_parts
from .spec import SDXL
from .text import TextEncoders, encoders_from_files, encoders_from_folder

log = logging.getLogger(__name__)

Latents = Float[Tensor, "b c h w"]

_FACTOR = 8  # pixels along the side of one latent point


@dataclass(eq=False)
class StableDiffusionXL(Module):
    """An SDXL model, frozen and in eval mode; `Family` describes its methods.

    Attributes:
        unet: the denoising network, in `dtype`; trained through adapters or whole.
        vae: the autoencoder, in its own dtype, never float16, which it overflows.
        text: the text encoders; None once released.
        schedule: the noise schedule and what the network predicts.
        dtype: that the network computes in.
        size_condition: height and width of the original image, top and left of its crop, height and
            width wanted, in pixels; None for the image's own size, uncropped. Several times six
            are choices, one of which the embeddings have for each image.
        clip_skip: the layer whose hidden states are taken, counted from the last, 1.
    """

    name: ClassVar[str] = SDXL.name
    lora_targets: ClassVar[tuple[str, ...]] = SDXL.lora_targets

    unet: UNet2DConditionModel
    vae: autoencoder.Autoencoder
    text: TextEncoders | None
    schedule: SchedulerConfig
    dtype: torch.dtype
    size_condition: tuple[int, ...] | None = None
    clip_skip: int = 2

    def __post_init__(self) -> None:
        self.network: Any = self.unet
        for module in (self.unet, self.vae):
            module.requires_grad_(False).eval()
        if self.text is not None:
            pooled = self._config.projection_class_embeddings_input_dim - SIZES
            self.text.check(self._config.cross_attention_dim, pooled)

    @property
    def _config(self) -> Any:  # diffusers calls it a dict, but its fields are attributes
        return self.unet.config

    @property
    def max_prompt_length(self) -> int:
        """Tokens that the CLIPs take of a prompt; 0 once released."""
        return 0 if self.text is None else self.text.clip_l.length

    @property
    def base_model_version(self) -> str:
        """The base's name in LoRA managers ("sdxl_base_v1-0"; "-v" for v-prediction)."""
        is_v = self.schedule.prediction_type == "v_prediction"
        return SDXL.lora_base + ("-v" if is_v else "")

    @property
    def native_resolution(self) -> tuple[int, int]:
        """(width, height) in pixels that the model was made for: 1024 x 1024."""
        side = self._config.sample_size * _FACTOR
        return side, side

    @property
    def text_modules(self) -> list[nn.Module]:
        return [] if self.text is None else [self.text.clip_l.model, self.text.clip_g.model]

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        """(channels, height, width) of one latent; sides are multiples of 8 pixels."""
        return autoencoder.latent_shape(SDXL, width, height)

    def encode(self, prompts: list[str]) -> Embeds:
        """Hidden states of both CLIPs side by side, and CLIP-G's projected pooled vector.

        What exceeds 77 tokens is cut off and logged; an empty prompt is encoded like any other, as
        in ComfyUI. Float32, on the text encoders' device; `RuntimeError` after
        `release_text_encoder`.
        """
        if self.text is None:
            raise RuntimeError("the text encoders were released: encode all prompts before that")
        return self.text.encode(prompts, self.clip_skip)

    def prompt_length(self, prompt: str) -> int:
        if self.text is None:
            raise RuntimeError("the text encoders were released: count tokens before that")
        return self.text.clip_l.count(prompt)

    def release_text_encoder(self) -> None:
        self.text = None

    def predict(self, latents: Latents, timestep: Tensor, prompt_embeds: Embeds) -> Latents:
        """The network's raw prediction (noise, v or clean sample: see `schedule`), float32.

        Inputs are cast to the network's dtype; there is no autocast. `timestep` is 0 to 999, one
        for all or one per sample. `ValueError` if the pooled vector is missing, or the sizes of
        each image where there are several to choose from.
        """
        if prompt_embeds.pooled is None:
            raise ValueError("the prompt embeddings lack the pooled vector: they are not SDXL's")
        height, width = (side * _FACTOR for side in latents.shape[-2:])
        sizes = self.size_condition or (height, width, 0, 0, height, width)
        if (time_ids := prompt_embeds.sizes) is None:
            if len(sizes) > 6:
                raise ValueError("the embeddings lack the sizes that each image drew")
            time_ids = torch.tensor(sizes, dtype=torch.float32)
        time_ids = time_ids.to(latents.device, non_blocking=True)
        return self.network(
            latents.to(self.dtype),
            timestep,
            encoder_hidden_states=prompt_embeds.tokens.to(self.dtype),
            added_cond_kwargs={
                "text_embeds": prompt_embeds.pooled.to(self.dtype),
                "time_ids": time_ids.expand(len(latents), 6),
            },
            return_dict=False,
        )[0].float()


# --- loading -------------------------------------------------------------------------------------


def load_folder(
    path: Path,
    *,
    dtype: torch.dtype,
    vae_dtype: torch.dtype,
    prediction_type: str | None = None,
    zero_snr: bool | None = None,
    parts: Parts = "all",
) -> StableDiffusionXL:
    """Load a diffusers folder on the CPU; see `load_family` for the arguments."""
    config = read_config(path / "unet" / "config.json")
    judge_sdxl_config(config, str(path))
    schedule = SchedulerConfig.of_folder(path, prediction_type, zero_snr)
    _warn(Header(path.name, {}))
    kind: Any = UNet2DConditionModel
    tensors = part_tensors(path / "unet", dtype, is_outline=parts == "text")
    return StableDiffusionXL(
        unet=assemble(lambda: kind.from_config(config), tensors, f"the network in {path}"),
        vae=autoencoder.autoencoder_from_folder(path / "vae", dtype=_safe(vae_dtype)),
        text=None if parts == "network" else encoders_from_folder(path),
        schedule=schedule,
        dtype=dtype,
    )


def load_files(
    files: Files,
    *,
    dtype: torch.dtype,
    vae_dtype: torch.dtype,
    prediction_type: str | None = None,
    zero_snr: bool | None = None,
    parts: Parts = "all",
) -> StableDiffusionXL:
    """Load a checkpoint, or a network's file with others beside it, on the CPU.

    A file of `files` replaces that part of the checkpoint; see `load_family` for the arguments.
    """
    checkpoint = open_weights(files.network)
    given = [open_weights(path) for path in files.text_encoders]
    vae = None if files.vae is None else open_weights(files.vae)
    judge_sdxl_parts(checkpoint.header, [w.header for w in given], vae and vae.header)
    schedule = read_config(CONFIGS / "scheduler" / "scheduler_config.json")
    schedule |= prediction_of(checkpoint.header, prediction_type, zero_snr, SDXL)
    _warn(checkpoint.header)
    return StableDiffusionXL(
        unet=load_unet(checkpoint.outline() if parts == "text" else checkpoint, dtype=dtype),
        vae=autoencoder.load_autoencoder(vae or checkpoint, CONFIGS, dtype=_safe(vae_dtype)),
        text=None if parts == "network" else encoders_from_files(checkpoint, given),
        schedule=SchedulerConfig.from_dict(schedule),
        dtype=dtype,
    )


def _safe(vae_dtype: torch.dtype) -> torch.dtype:
    if vae_dtype == torch.float16:
        raise ModelError("SDXL's VAE overflows in float16: load it in bfloat16 or float32")
    return vae_dtype


def _warn(header: Header) -> None:
    if word := distilled(header.name, header.metadata):
        log.warning(
            f"{header.name} has {word!r} in its name or notes: it seems to be distilled to a few "
            "steps, and is no diffusion model at the others; training then breaks the "
            "distillation. Choose the model that it was made from"
        )
