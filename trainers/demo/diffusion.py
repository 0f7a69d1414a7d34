"""The demo's text encoder and UNet, trained together on cached latents.

ComfyUI's SD1.x classes limit the widths: channels are a multiple of 32 and each level an integer
multiple of the first, 32 norm groups, 8 attention heads (the class forces 8), quick_gelu.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ...pcpo import Ddim, ddim_grid, noise_streams, plan_diffusion, rollout, scenes
from ...pcpo.credit import Native
from ...pcpo.plan import deterministic
from ...pcpo.rewards import load_reward
from ...pcpo.schedules import scaled_linear_alpha_bars
from .fit import Settings, captions, tidy
from .latents import Latents

WIDTH = 64  # of the text encoder


def new_text_encoder(tokenizer: Any) -> CLIPTextModel:
    """A CLIP text encoder of two small layers for the demo's vocabulary."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            projection_dim=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=77,
            hidden_act="quick_gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def new_unet() -> UNet2DConditionModel:
    """An SD1.x UNet of two levels. `attention_head_dim` is the NUMBER of heads in SD1.x configs."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=8,
        norm_num_groups=32,
    )


def new_scheduler() -> DDIMScheduler:
    """Stable Diffusion 1.5's noise schedule."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        set_alpha_to_one=False,
        clip_sample=False,
    )


def token_ids(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Ids of captions, padded to 77 with the end token as in SD1.x."""
    return tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids


@dataclass(frozen=True, slots=True)
class Recipe:
    vae: AutoencoderTiny
    data: Latents
    tokenizer: CLIPTokenizer

    def new_model(self) -> nn.ModuleDict:
        return nn.ModuleDict({"text_encoder": new_text_encoder(self.tokenizer), "unet": new_unet()})

    def loss(
        self, model: nn.ModuleDict, step: int, settings: Settings, draw: torch.Generator
    ) -> Tensor:
        rng = np.random.default_rng((settings.seed, step))
        rows = torch.randint(len(self.data.scene), (settings.batch,), generator=draw)
        told = captions(self.data.scene[rows], rng, settings.caption_dropout)
        return loss_of(
            model, token_ids(self.tokenizer, told), self.data.latents[rows].float(), draw
        )

    @torch.no_grad()
    def evaluate(self, model: nn.ModuleDict) -> str:
        """Mean scene reward on the 64 held-out prompts, as text."""
        scores = [evaluate(model, self.vae, self.tokenizer, eta) for eta in (0.0, 1.0)]
        return f"scene score {scores[0]:.3f} (eta 0) {scores[1]:.3f} (eta 1)"

    def save(self, folder: Path, model: nn.ModuleDict) -> None:
        save_pipeline(folder, model, self.vae, self.tokenizer)


def loss_of(model: nn.ModuleDict, ids: Tensor, latents: Tensor, rng: torch.Generator) -> Tensor:
    """The epsilon loss of Ho et al. 2020 at uniformly random timesteps."""
    alpha_bars = scaled_linear_alpha_bars().float()
    t = torch.randint(len(alpha_bars), (len(latents),), generator=rng)
    noise = torch.randn(latents.shape, generator=rng)
    a = alpha_bars[t].reshape(-1, 1, 1, 1)
    noisy = a.sqrt() * latents + (1 - a).sqrt() * noise
    # captions repeat, and the encoder is a good part of the cost: each distinct one once
    distinct, rows = ids.unique(dim=0, return_inverse=True)
    embeds = model["text_encoder"](distinct).last_hidden_state[rows]
    return F.mse_loss(model["unet"](noisy, t, embeds).sample, noise)


@torch.no_grad()
def evaluate(
    model: nn.ModuleDict, vae: AutoencoderTiny, tokenizer: CLIPTokenizer, eta: float
) -> float:
    """Mean scene reward on the 64 held-out prompts: guidance 1, 10 DDIM steps, fixed seeds."""
    prompts = list(scenes.split().held_out)
    embeds = model["text_encoder"](token_ids(tokenizer, prompts)).last_hidden_state
    noise = noise_streams([("evaluation", i) for i in range(len(prompts))], 10, (4, 8, 8))
    grid = ddim_grid(10)
    plan = plan_diffusion(grid, Ddim(), Native())
    if eta == 0:
        plan = deterministic(plan, grid, Ddim(), "epsilon")

    def denoiser(x: Tensor, timestep: Tensor) -> Tensor:
        return model["unet"](x, timestep, embeds).sample

    sampled = rollout(denoiser, plan.to("cpu"), noise).final
    images = vae.decoder(sampled).clamp(-1, 1)
    pixels = ((images + 1) * 127.5).round().to(torch.uint8)
    return load_reward("scene").score(pixels, prompts).values.mean().item()


def save_pipeline(
    folder: Path, model: nn.ModuleDict, vae: AutoencoderTiny, tokenizer: CLIPTokenizer
) -> None:
    """Write a diffusers StableDiffusionPipeline folder in half precision."""
    parts = deepcopy({"unet": model["unet"], "text_encoder": model["text_encoder"], "vae": vae})
    others: dict[str, Any] = {"safety_checker": None, "feature_extractor": None}
    StableDiffusionPipeline(
        **{name: part.half().eval() for name, part in parts.items()},
        tokenizer=tokenizer,
        scheduler=new_scheduler(),  # pyright: ignore[reportArgumentType] (it is one of them)
        requires_safety_checker=False,
        **others,
    ).save_pretrained(folder)
    tidy(folder)
