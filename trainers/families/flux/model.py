"""FLUX.1-dev: a transformer on 16-channel latents, T5 tokens with CLIP-L's pooled vector.

The latents are packed for the network: squares of 2 x 2 points become its tokens.
Sigma, the share of noise, is in [0, 1]; the velocity is eps - x0.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import FluxTransformer2DModel
from jaxtyping import Float
from torch import Tensor, nn

from .. import autoencoder
from ..assemble import assemble
from ..embeds import Embeds
from ..errors import ModelError
from ..files import Files, Parts
from ..flow import FlowSchedule
from ..module import Module
from ..source import read_config
from ..text.encoders import T5, Clip
from ..text.files import clip_from_folder, encoders_in, load_clip, load_t5, part_tensors
from ..text.header import Kind
from ..text.tokenizers import clip_tokenizer, t5_tokenizer
from ..times import Times
from ..weights import Weights, open_weights
from .file import CONFIGS, load_transformer
from .header import REMEDY, judge_flux_config, judge_flux_parts
from .spec import FLUX

Latents = Float[Tensor, "b c h w"]


@dataclass(eq=False)
class Flux(Module):
    """A FLUX.1-dev model, frozen and in eval mode; `Family` describes its methods.

    Attributes:
        transformer: the denoising network, in `dtype`; trained through adapters or whole.
        vae: the autoencoder, in its own dtype.
        clip: CLIP-L; None once released.
        t5: T5; None once released, and for a network that attends to CLIP-L's tokens instead.
        schedule: the sigmas it was trained with.
        dtype: that the network computes in.
        guidance: the scale that was distilled into the network, an input of it.
        t5_length: tokens of every prompt for T5.
    """

    name: ClassVar[str] = FLUX.name
    lora_targets: ClassVar[tuple[str, ...]] = FLUX.lora_targets
    base_model_version: ClassVar[str] = "flux1"
    native_resolution: ClassVar[tuple[int, int]] = (1024, 1024)

    transformer: FluxTransformer2DModel
    vae: autoencoder.Autoencoder
    clip: Clip | None
    t5: T5 | None
    schedule: FlowSchedule
    dtype: torch.dtype
    guidance: float = 3.5
    t5_length: int = 512

    def __post_init__(self) -> None:
        self.network: Any = self.transformer
        if self.clip is not None:
            _check_text(self.transformer.config, self.clip, self.t5)
        for module in (self.transformer, self.vae):
            module.requires_grad_(False).eval()
        self._times = Times(self.transformer.time_text_embed)

    @property
    def max_prompt_length(self) -> int:
        """Tokens that T5 takes of a prompt, or CLIP-L if there is no T5; 0 once released."""
        if self.clip is None:
            return 0
        return self.clip.length if self.t5 is None else self.t5_length

    @property
    def text_modules(self) -> list[nn.Module]:
        return [one.model for one in (self.clip, self.t5) if one is not None]

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        """(channels, height, width) of one latent; sides are multiples of 16 pixels."""
        return autoencoder.latent_shape(FLUX, width, height)

    def encode(self, prompts: list[str]) -> Embeds:
        """T5's tokens (CLIP-L's where there is no T5) and CLIP-L's pooled vector, float32.

        `RuntimeError` after `release_text_encoder`.
        """
        if self.clip is None:
            raise RuntimeError("the text encoders were released: encode all prompts before that")
        states = self.clip.encode(prompts)
        if self.t5 is None:
            return Embeds.from_encoder(prompts, states.last, states.pooled)
        tokens = self.t5.encode(prompts, self.t5_length)
        return Embeds.from_encoder(prompts, tokens, states.pooled)

    def prompt_length(self, prompt: str) -> int:
        """Tokens by the encoder whose tokens the network attends to, including start and end."""
        encoder = self.t5 or self.clip
        if encoder is None:
            raise RuntimeError("the text encoders were released: count tokens before that")
        return encoder.count(prompt)

    def release_text_encoder(self) -> None:
        self.clip = self.t5 = None

    def predict(self, latents: Latents, sigma: Tensor, prompt_embeds: Embeds) -> Latents:
        """The network's velocity, float32, with gradients if they are on.

        Latents and embeddings are cast to the network's dtype; sigma, in [0, 1], is embedded in
        float32, one for all or one per sample. `ValueError` if the pooled vector is missing.
        """
        if prompt_embeds.pooled is None:
            raise ValueError("the prompt embeddings lack the pooled vector: they are not FLUX's")
        rows, _, height, width = latents.shape
        sigmas = sigma.to(latents.device, torch.float32).expand(rows)
        guidance = torch.full_like(sigmas, self.guidance)
        self._times.set(sigmas, guidance)
        tokens = prompt_embeds.tokens.to(self.dtype)
        packed = self.network(
            hidden_states=pack(latents.to(self.dtype)),
            timestep=sigmas,
            guidance=guidance,
            encoder_hidden_states=tokens,
            pooled_projections=prompt_embeds.pooled.to(self.dtype),
            img_ids=positions(height // 2, width // 2, latents.device),
            txt_ids=torch.zeros(tokens.shape[1], 3, device=latents.device),
            return_dict=False,
        )[0]
        return unpack(packed, height, width).float()


def pack(latents: Latents) -> Float[Tensor, "b n d"]:
    """Latents as tokens: each a square of 2 x 2 points, its channels first."""
    rows, channels, height, width = latents.shape
    squares = latents.reshape(rows, channels, height // 2, 2, width // 2, 2)
    return squares.permute(0, 2, 4, 1, 3, 5).reshape(rows, -1, channels * 4)


def unpack(tokens: Float[Tensor, "b n d"], height: int, width: int) -> Latents:
    """Undo `pack`, for this height and width in latent points."""
    rows, _, size = tokens.shape
    squares = tokens.reshape(rows, height // 2, width // 2, size // 4, 2, 2)
    return squares.permute(0, 3, 1, 4, 2, 5).reshape(rows, size // 4, height, width)


def positions(height: int, width: int, device: torch.device) -> Float[Tensor, "n 3"]:
    """Positions of an image's tokens: 0, row, column."""
    rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
    grid = torch.cartesian_prod(rows, columns).reshape(-1, 2)
    return nn.functional.pad(grid.float(), (1, 0))


def _check_text(config: Any, clip: Clip, t5: T5 | None) -> None:
    wanted, width = config.joint_attention_dim, (t5 or clip).width
    if width != wanted:
        given_width = f"{(t5 or clip).title} gives {width}"
        raise ModelError(
            f"the network attends to prompt tokens {wanted} wide and {given_width}: they belong to "
            f"different models; {REMEDY}"
        )
    if clip.pooled_width != config.pooled_projection_dim:
        raise ModelError(
            f"the network takes a pooled vector of {config.pooled_projection_dim} and {clip.title} "
            f"gives {clip.pooled_width}: they belong to different models; {REMEDY}"
        )


# --- loading -------------------------------------------------------------------------------------


def load_folder(
    path: Path, *, dtype: torch.dtype, vae_dtype: torch.dtype, parts: Parts = "all"
) -> Flux:
    """Load a diffusers folder on the CPU.

    `dtype` is of the network and T5; `parts` as in `load_family`.
    """
    config = read_config(path / "transformer" / "config.json")
    judge_flux_config(config, str(path))
    kind: Any = FluxTransformer2DModel
    with_text = parts != "network"
    tensors = part_tensors(path / "transformer", dtype, is_outline=parts == "text")
    return Flux(
        transformer=assemble(lambda: kind.from_config(config), tensors, f"the network in {path}"),
        vae=autoencoder.autoencoder_from_folder(path / "vae", dtype=vae_dtype),
        clip=_clip_of_folder(path) if with_text else None,
        t5=_t5_of_folder(path, dtype) if with_text else None,
        schedule=FlowSchedule.of_folder(path),
        dtype=dtype,
    )


def _clip_of_folder(path: Path) -> Clip:
    tokenizer = clip_tokenizer("clip_l", path / "tokenizer")
    return clip_from_folder(path / "text_encoder", tokenizer, "clip_l", torch.float32)


def _t5_of_folder(path: Path, dtype: torch.dtype) -> T5 | None:
    part = path / "text_encoder_2"
    if not part.is_dir():
        return None
    tokenizer = t5_tokenizer(path / "tokenizer_2")
    return load_t5(part_tensors(part, dtype), tokenizer, f"the text encoder in {part}")


def load_files(
    files: Files, *, dtype: torch.dtype, vae_dtype: torch.dtype, parts: Parts = "all"
) -> Flux:
    """Load a checkpoint, or a network's file with others beside it, on the CPU.

    A file of `files` replaces that part of the checkpoint. `dtype` is of the network and T5;
    `parts` as in `load_family`.
    """
    checkpoint = open_weights(files.network)
    given = [open_weights(path) for path in files.text_encoders]
    vae = None if files.vae is None else open_weights(files.vae)
    judge_flux_parts(checkpoint.header, [w.header for w in given], vae and vae.header)
    encoders = encoders_in(checkpoint, given)
    with_text = parts != "network"
    return Flux(
        transformer=load_transformer(
            checkpoint.outline() if parts == "text" else checkpoint, dtype=dtype
        ),
        vae=autoencoder.load_autoencoder(vae or checkpoint, CONFIGS, dtype=vae_dtype),
        clip=_clip(*encoders["clip_l"]) if with_text else None,
        t5=_t5(encoders, files.t5_tokenizer, dtype) if with_text else None,
        schedule=FlowSchedule.of_folder(CONFIGS),
        dtype=dtype,
    )


def _clip(weights: Weights, prefix: str) -> Clip:
    what = f"the text encoder in {weights.header.name}"
    tensors = weights.under(prefix, torch.float32)
    return load_clip(tensors, clip_tokenizer("clip_l"), "clip_l", what, is_projected=False)


def _t5(
    encoders: dict[Kind, tuple[Weights, str]], tokenizer: Path | None, dtype: torch.dtype
) -> T5 | None:
    if "t5" not in encoders:
        return None
    weights, prefix = encoders["t5"]
    loaded_tokenizer = t5_tokenizer(tokenizer)  # before gigabytes are read
    what = f"the text encoder in {weights.header.name}"
    return load_t5(weights.under(prefix, dtype), loaded_tokenizer, what)
